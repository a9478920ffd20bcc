"""H2O, heavy hitter oracle (arXiv 2306.14048): half recent tokens, half those that drew the most attention so far.

A token's score is the attention it received, summed over queries and over the query heads of its key-value head. Each
step evicts the lowest score outside of the last `slots // 2` positions (the new one included), by the scores after the
previous step, ties to the lowest position. Positions are absolute. A later turn of a conversation comes in chunks: its
tokens see all that is there, and what is too much goes at the end of each chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policies.tokens.base import TokenPolicy

QUERY_CHUNK = 128  # prompt queries whose attention rows exist at the same time


@dataclass(frozen=True)
class H2O(TokenPolicy):
    name: ClassVar[str] = "h2o"
    scored: ClassVar[bool] = True
    floor: ClassVar[int] = 2
    window: ClassVar[int | None] = None

    def within_window(self, window: int) -> "H2O":
        return WindowedH2O(window)

    def score_prompt(self, q: Tensor, k: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
        length = q.shape[2]
        scores = torch.zeros(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=k.device)
        position = torch.arange(length, device=k.device)
        for start in range(0, length, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, length)
            keys, rows = probs(q, k, start, end)
            if lengths is not None:  # padding asks no questions
                rows = rows.masked_fill((position[start:end] >= lengths[:, None])[:, None, None, :, None], 0)
            scores[:, :, keys] += rows.sum((2, 3))
        return scores

    def select(self, lengths: Tensor, slots: int, scores: Tensor) -> Tensor:
        length = scores.shape[2]
        position = torch.arange(length, device=scores.device).expand_as(scores)
        end = lengths[:, None, None]
        best = self._best(scores, position, position >= end, end, slots)
        return best.masked_fill(best >= end, length).sort(dim=2).values.clamp(max=length - 1)

    def _best(self, score: Tensor, position: Tensor, empty: Tensor, end: Tensor, slots: int) -> Tensor:
        """Which of the tokens at `position` [B, K, M] stay when `end` [B, 1, 1] have been seen: indices [B, K, slots].

        Those that are `empty` come last.
        """
        rank = score.masked_fill(position >= end - slots // 2, float("inf"))
        if self.window is not None:
            rank = rank.masked_fill(position < end - self.window, -1)
        rank = rank.masked_fill(empty, -2)
        # Latest first, then a stable sort: of equal scores the lowest position goes first.
        latest = position.argsort(dim=2, descending=True)
        return latest.gather(2, rank.gather(2, latest).sort(dim=2, descending=True, stable=True).indices[:, :, :slots])

    def slot(self, seen: Tensor, layer) -> Tensor:
        slots = layer.k.shape[2]
        old = layer.position <= (seen - slots // 2)[:, None, None]
        score = layer.score.masked_fill(~old, float("inf"))
        if self.window is not None:
            score = score.masked_fill(layer.position <= (seen - self.window)[:, None, None], -1)
        lowest = score == score.amin(2, keepdim=True)
        victim = layer.position.masked_fill(~lowest, torch.iinfo(torch.int64).max).argmin(2)
        return torch.where((seen < slots)[:, None], seen[:, None], victim)

    def observe(self, layer, slot: Tensor, seen: Tensor, probs: Tensor) -> None:
        row = torch.arange(slot.shape[0], device=slot.device)[:, None]
        head = torch.arange(slot.shape[1], device=slot.device)
        layer.score.index_put_((row, head, slot), layer.score.new_zeros(()))
        layer.position.index_put_((row, head, slot), seen[:, None])
        layer.score.add_(probs.sum(2))

    def visible(self, seen: Tensor, count: int, layer) -> Tensor:
        """Everything there is, and each other: eviction waits until all `count` tokens are in."""
        index = torch.arange(count, device=seen.device)
        query = index[:, None]
        slots = torch.arange(layer.k.shape[2], device=seen.device)
        old = (slots < seen[:, None])[:, None, None].expand(*layer.k.shape[:2], count, -1)
        new = (index <= query).expand(*layer.k.shape[:2], -1, -1)
        if self.window is not None:
            old = old & (layer.position[:, :, None] > seen[:, None, None, None] + query - self.window)
            new = new & (index > query - self.window)
        return torch.cat((old, new), dim=3)

    def absorb(self, layer, seen: Tensor, probs: Tensor) -> Tensor:
        count, slots = probs.shape[3], layer.k.shape[2]
        new = (seen[:, None] + torch.arange(count, device=seen.device))[:, None].expand(-1, layer.k.shape[1], -1)
        position = torch.cat((layer.position, new), dim=2)
        score = torch.cat((layer.score, layer.score.new_zeros(new.shape)), dim=2) + probs.sum((2, 3))
        free = torch.arange(slots + count, device=seen.device)
        empty = (free >= seen[:, None, None]) & (free < slots)
        source = self._best(score, position, empty, (seen + count)[:, None, None], slots)
        layer.score.copy_(score.gather(2, source))
        layer.position.copy_(position.gather(2, source))
        return source


@dataclass(frozen=True)
class WindowedH2O(H2O):
    """In a layer with a sliding window the token that has left it is the victim, whatever its score.

    The prompt's selection prefers tokens inside the window, then one leaves with each step: none is ever seen from
    outside, and no mask is needed.
    """

    window: int
