"""TOVA (arXiv 2401.06104): each step the token goes that the latest query attended to least.

A token's score is the attention of the latest query, averaged over all query heads of the layer: so every key-value
head keeps the same tokens, as in the paper. The victim is chosen by the previous token's query, when the next token
comes, ties to the lowest position; that may be the previous token itself. Of a prompt the last query decides, and the
last token stays (as in kvpress). Positions are absolute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from parallel import shard, summed
from policies.tokens.evicting import Evicting
from policies.tokens.scoring import from_last_queries


@dataclass(frozen=True)
class TOVA(Evicting):
    name: ClassVar[str] = "tova"
    queries: ClassVar[int] = 1

    def within_window(self, window: int) -> "TOVA":
        return WindowedTOVA(window)

    def recent(self, slots: int) -> int:
        return 1

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
        received = from_last_queries(q, k, v, lengths, probs, count=1)
        heads = q.shape[1] * shard().world
        return (summed(received.sum(1, keepdim=True)) / shard().sharers / heads).expand_as(received)

    def rescored(self, score: Tensor, probs: Tensor) -> Tensor:
        return (summed(probs[:, :, :, -1].mean((1, 2))) / shard().world)[:, None].expand_as(score)


@dataclass(frozen=True)
class WindowedTOVA(TOVA):
    window: int
