"""Retrieval between two sets: the rank of the matching gallery images by cosine similarity to each query.

For pairs that are known without a label, such as the same emoji drawn by two vendors (`examples/emoji_retrieval.py`).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch

from simclr.errors import UserError
from simclr.models.inference import require_finite


def retrieval(
    queries: np.ndarray,
    query_keys: Sequence[Any],
    gallery: np.ndarray,
    gallery_keys: Sequence[Any],
    *,
    match: Callable[[Any], Hashable] | None = None,
    ks: Sequence[int] = (1, 5),
    chunk: int = 1024,
) -> dict[str, float]:
    """Shares of queries whose first matching gallery row is among the k most similar, and the mean reciprocal rank.

    The rank of a match is 1 + the number of other rows that are at least as similar: ties count against the features,
    so that features that are all equal find nothing. Queries without a match in the gallery take no part.

    Args:
        queries: (m, F) features.
        query_keys: m keys.
        gallery: (n, F) features.
        gallery_keys: n keys.
        match: What of a key has to be equal, given the key; None: all of it. Several rows may match a query.
        ks: For which k to tell whether a match is among the first k.
        chunk: Queries at a time; memory grows with chunk x n.

    Returns:
        {"top1": share of queries, "top5": ..., "mrr": mean of 1 / rank, "queries": number that took part}.

    Raises:
        UserError: No query has a match, or features are not finite.
    """
    require_finite(queries, "query")
    require_finite(gallery, "gallery")
    codes: dict[Hashable, int] = {}
    wanted, offered = (
        torch.tensor([codes.setdefault(match(key) if match else key, len(codes)) for key in keys], dtype=torch.int64)
        for keys in (query_keys, gallery_keys)
    )  # (m,), (n,)
    paired = torch.isin(wanted, offered)
    if not paired.any():
        raise UserError(
            f"None of {len(wanted):,} queries has a match among {len(offered):,} gallery images; retrieval needs keys "
            "that occur on both sides."
        )
    unit_queries = torch.nn.functional.normalize(
        torch.from_numpy(np.ascontiguousarray(queries))[paired], dim=1
    )  # (p, F)
    bank = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(gallery)), dim=1)  # (n, F)
    ranks = torch.cat(
        [
            _ranks(rows @ bank.T, mine[:, None] == offered)
            for rows, mine in zip(unit_queries.split(chunk), wanted[paired].split(chunk), strict=True)
        ]
    )  # (p,)
    shares = {f"top{k}": float((ranks <= k).double().mean()) for k in ks}
    return {**shares, "mrr": float((1 / ranks.double()).mean()), "queries": len(ranks)}


def _ranks(cosine: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """(c,) rank of the best match, from cosines (c, n) and which of them match (c, n)."""
    best = cosine.masked_fill(~matches, -torch.inf).amax(1, keepdim=True)  # (c, 1)
    return 1 + ((cosine >= best) & ~matches).sum(1)
