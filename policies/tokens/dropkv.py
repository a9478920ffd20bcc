"""DropKV (kvpress pull request 285): the prompt's tokens whose loss would change what its last queries read the most.

A query attends to token j with share p_j and reads o = sum_i p_i v_i. Without that token it would read
o + p_j / (1 - p_j) * (o - v_j), so the squared error that its loss alone makes is

    (p_j / (1 - p_j))^2 |v_j - o|^2

A token's score is this error, summed over the last `recent` queries of its row and over the query heads of its
key-value head. The last tokens stay too (frozen.py). Positions are absolute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from policies.tokens.frozen import Frozen
from policies.tokens.scoring import from_last_queries

CERTAIN = 1e-6  # 1 - p is held above it: a query that attends to one token alone would read nothing without it


@dataclass(frozen=True)
class DropKV(Frozen):
    name: ClassVar[str] = "dropkv"

    @property
    def queries(self) -> int:
        return self.recent

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
        return from_last_queries(q, k, v, lengths, probs, self.recent, lost)


def lost(shares: Tensor, v: Tensor) -> Tensor:
    """shares [B, K, G, T, M], values v [B, K, M, D] -> errors [B, K, M], summed over queries and the group's heads."""
    v = v[:, :, None].to(shares.dtype)
    out = shares @ v  # [B, K, G, T, D]
    squares = v.square().sum(-1)[..., None, :] + out.square().sum(-1, keepdim=True) - 2 * out @ v.mT
    odds = shares / (1 - shares).clamp_min(CERTAIN)
    return (odds.square() * squares.clamp_min(0)).sum((2, 3))
