"""Contrastive losses of SimCLR, label-free measures of what they do to the features, and SimCLR v2's distillation."""

from simclr.losses.distillation import distillation
from simclr.losses.info_nce import info_nce, info_nce_dense, pretext_accuracy
from simclr.losses.metrics import alignment, contrastive_accuracy_and_entropy, effective_rank, uniformity
from simclr.losses.nt_xent import nt_xent, nt_xent_dense, nt_xent_views, nt_xent_views_dense

__all__ = [
    "alignment",
    "contrastive_accuracy_and_entropy",
    "distillation",
    "effective_rank",
    "info_nce",
    "info_nce_dense",
    "nt_xent",
    "nt_xent_dense",
    "nt_xent_views",
    "nt_xent_views_dense",
    "pretext_accuracy",
    "uniformity",
]
