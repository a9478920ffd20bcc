"""Helpers of policies that score tokens: attention received from a prompt's end, and the best positions by rank."""

from collections.abc import Callable

import torch
from torch import Tensor


def from_last_queries(q: Tensor, k: Tensor, lengths: Tensor | None, probs: Callable, count: int) -> Tensor:
    """Attention [B, K, S] that each token receives from the last `count` queries of its row, summed over them and
    over the query heads of its key-value head.

    Arguments as of `TokenPolicy.score_prompt`. Rows of different lengths are asked one by one: so only those queries'
    attention is ever computed.
    """
    batch, length = q.shape[0], q.shape[2]
    scores = torch.zeros(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=k.device)
    parts = [(0, batch, length)] if lengths is None else [(b, b + 1, n) for b, n in enumerate(lengths.tolist())]
    for first, last, end in parts:
        keys, shares = probs(q[first:last], k[first:last], max(0, end - count), end)
        scores[first:last, :, keys] = shares.sum((2, 3))
    return scores


def highest(rank: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The positions [B, K, min(count, S)] of the highest ranks [B, K, S], ascending; of equal ranks the latest.

    A row has `lengths[b]` ranks; entries behind its last position are any valid position.
    """
    length = rank.shape[2]
    end = lengths[:, None, None]
    rank = rank.masked_fill(torch.arange(length, device=rank.device) >= end, float("-inf"))
    # Latest first, then a stable sort: of equal ranks the lowest position goes first.
    best = length - 1 - rank.flip(2).sort(dim=2, descending=True, stable=True).indices[:, :, :count]
    padding = best >= end
    return best.masked_fill(padding, length).sort(dim=2).values.clamp(max=length - 1)
