"""H2O, heavy hitter oracle (arXiv 2306.14048): half recent tokens, half those that drew the most attention so far.

A token's score is the attention it received, summed over queries and over the query heads of its key-value head. Each
step evicts the lowest score outside of the last `slots // 2` positions (the new one included), by the scores after the
previous step, ties to the lowest position. Positions are absolute. A later turn of a conversation comes in chunks: its
tokens see all that is there, and what is too much goes at the end of each chunk.

The sum favours early tokens, which more queries have seen. With `corrected` (the policy h2o-mean) tokens are ranked by
the mean over those queries instead, their own included.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from errors import UserError, shown
from policies.tokens.evicting import Evicting

QUERY_CHUNK = 128  # prompt queries whose attention rows exist at the same time


@dataclass(frozen=True)
class H2O(Evicting):
    corrected: bool = False
    name: ClassVar[str] = "h2o"
    floor: ClassVar[int] = 2
    queries: ClassVar[int] = QUERY_CHUNK

    def __post_init__(self):
        if type(self.corrected) is not bool:
            raise UserError(f"corrected must be True or False, not {shown(self.corrected)}")

    def within_window(self, window: int) -> "H2O":
        return WindowedH2O(self.corrected, window=window)

    def recent(self, slots: int) -> int:
        return slots // 2

    def rank(self, score: Tensor, queries: Tensor) -> Tensor:
        return score / queries if self.corrected else score

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
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

    def rescored(self, score: Tensor, probs: Tensor) -> Tensor:
        return score + probs.sum((2, 3))


@dataclass(frozen=True)
class H2OMean(H2O):
    corrected: bool = True
    name: ClassVar[str] = "h2o-mean"


@dataclass(frozen=True)
class WindowedH2O(H2O):
    window: int = field(kw_only=True)
