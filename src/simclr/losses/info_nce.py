"""InfoNCE against a bank of keys, the loss of MoCo: each query picks its own key among it and those of other images.

Sources: He et al. 2020 (MoCo, arXiv:1911.05722), equation 1; van den Oord et al. 2018 (arXiv:1807.03748).

For queries q (n, D), the key k_i of each, and a bank of K keys of other images,

    loss = mean_i  -s_i + log(exp(s_i) + sum_j exp(q_i . bank_j / temperature)),    s_i = q_i . k_i / temperature.

Shapes: n queries on this process, K keys in the bank, D the width.
"""

import math

import torch
from torch import Tensor

from simclr.errors import UserError
from simclr.losses.bank import bank_logsumexp
from simclr.losses.nt_xent import upcast
from simclr.losses.operands import operands_for

__all__ = ["info_nce", "info_nce_dense", "pretext_accuracy"]


def info_nce(queries: Tensor, keys: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Mean over the queries of the cross entropy of picking their key among it and the bank.

    Logits are fp32 (fp64 for fp64 input) under any autocast. Memory grows with (n + K) x D, not n x K. The mean over
    processes of the gradients, which DistributedDataParallel takes, is the gradient of the mean over all queries.

    Args:
        queries: (n, D) unit rows.
        keys: (n, D) unit rows, the key of each query; without gradient.
        bank: (K, D) unit rows, the negatives of all queries; without gradient.
        temperature: What similarities are divided by.

    Returns:
        A scalar, in nats: log(K + 1) where all similarities are equal.

    Raises:
        UserError: A temperature that is not positive, or shapes that do not fit.
    """
    check_bank(queries, keys, bank, temperature)
    with torch.autocast(queries.device.type, enabled=False):
        q = upcast(queries)
        positive = (q * upcast(keys.detach())).sum(-1) / temperature  # (n,)
        negative = bank_logsumexp(q, bank, temperature, kernels=operands_for(queries) is not None)  # (n,)
        return (torch.logaddexp(positive, negative) - positive).mean()


def info_nce_dense(queries: Tensor, keys: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """The definition of `info_nce`, with all logits in memory."""
    check_bank(queries, keys, bank, temperature)
    with torch.autocast(queries.device.type, enabled=False):
        q = upcast(queries)
        positive = (q * upcast(keys.detach())).sum(-1, keepdim=True)  # (n, 1)
        negative = q @ upcast(bank.detach()).T  # (n, K)
        logits = torch.cat([positive, negative], dim=1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).mean()


def check_bank(queries: Tensor, keys: Tensor, bank: Tensor, temperature: float) -> None:
    """Refuse what the loss is not defined for."""
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}, it must be a positive number: try 0.07 or 0.2")
    if queries.shape != keys.shape or queries.ndim != 2 or queries.numel() == 0:
        raise UserError(
            f"queries and keys have shapes {tuple(queries.shape)} and {tuple(keys.shape)}: both must be "
            "(images, width), one row per image, in the same order"
        )
    if bank.ndim != 2 or bank.shape[1] != queries.shape[1] or len(bank) == 0:
        raise UserError(
            f"the bank has shape {tuple(bank.shape)}: it must be (keys, {queries.shape[1]}), with at least one key"
        )


@torch.no_grad()
def pretext_accuracy(queries: Tensor, keys: Tensor, bank: Tensor) -> Tensor:
    """Share of the queries that are more similar to their own key than to every key of the bank; shapes as `info_nce`.

    A bank of keys that look like the query's own by chance alone leaves 1 / (K + 1) of the queries right.
    """
    positive = (queries * keys).sum(-1)  # (n,)
    rows = max(1, (1 << 22) // len(bank))  # 16 MiB of similarities at a time
    nearest = [(part @ bank.T).amax(1) for part in queries.split(rows)]
    return (positive > torch.cat(nearest)).float().mean()
