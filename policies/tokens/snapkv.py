"""SnapKV (arXiv 2404.14469): the prompt's tokens that its last queries attend to, and those last tokens.

A token's score is the attention it receives from the last `recent` prompt queries, summed over them and over the query
heads of its key-value head, then averaged with its two neighbours on either side (those that do not exist count as 0).
In a layer with few slots fewer tokens stay for being recent (see frozen.py); what is left of the last `recent` is
ranked like the rest, by the queries that saw it. Positions are absolute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from policies.tokens.frozen import Frozen
from policies.tokens.scoring import from_last_queries

KERNEL = 5  # neighbouring positions whose attention is averaged


@dataclass(frozen=True)
class SnapKV(Frozen):
    name: ClassVar[str] = "snapkv"

    @property
    def queries(self) -> int:
        return self.recent

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
        received = from_last_queries(q, k, v, lengths, probs, self.recent)  # 0 in padding, like beyond the edges
        return F.avg_pool1d(received, KERNEL, stride=1, padding=KERNEL // 2)
