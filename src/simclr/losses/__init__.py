"""Contrastive losses of SimCLR, label-free measures of what they do to the features, and SimCLR v2's distillation."""

from simclr.losses.distillation import distillation
from simclr.losses.generalised import generalised_contrastive
from simclr.losses.info_nce import info_nce, info_nce_dense, pretext_accuracy
from simclr.losses.metrics import alignment, contrastive_accuracy_and_entropy, effective_rank, uniformity
from simclr.losses.nt_xent import nt_xent, nt_xent_dense, nt_xent_views, nt_xent_views_dense
from simclr.losses.pairwise import margin_triplet, margin_triplet_dense, nt_logistic, nt_logistic_dense
from simclr.losses.supcon import supcon, supcon_dense

__all__ = [
    "alignment",
    "contrastive_accuracy_and_entropy",
    "distillation",
    "effective_rank",
    "generalised_contrastive",
    "info_nce",
    "info_nce_dense",
    "margin_triplet",
    "margin_triplet_dense",
    "nt_logistic",
    "nt_logistic_dense",
    "nt_xent",
    "nt_xent_dense",
    "nt_xent_views",
    "nt_xent_views_dense",
    "pretext_accuracy",
    "supcon",
    "supcon_dense",
    "uniformity",
]
