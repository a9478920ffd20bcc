"""Helpers of policies that score tokens: attention received from a prompt's end, and the best positions by rank."""

from collections.abc import Callable

import torch
from torch import Tensor


def received(shares: Tensor, v: Tensor) -> Tensor:
    """shares [B, K, G, T, M] -> [B, K, M], summed over queries and the query heads of a group."""
    return shares.sum((2, 3))


def from_last_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    probs: Callable,
    count: int,
    score: Callable[[Tensor, Tensor], Tensor] = received,
) -> Tensor:
    """What `score` makes, of each token [B, K, S], of the attention of the last `count` queries of its row.

    score(shares [B, K, G, T, M], v [B, K, M, D]) -> [B, K, M]: by default the attention received. The other arguments
    are those of `TokenPolicy.score_prompt`. Rows of different lengths are asked one by one: so only those queries'
    attention is ever computed.
    """
    batch, length = q.shape[0], q.shape[2]
    scores = torch.zeros(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=k.device)
    parts = [(0, batch, length)] if lengths is None else [(b, b + 1, n) for b, n in enumerate(lengths.tolist())]
    for first, last, end in parts:
        keys, shares = probs(q[first:last], k[first:last], max(0, end - count), end)
        scores[first:last, :, keys] = score(shares, v[first:last, :, keys])
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
