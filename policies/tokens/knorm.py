"""Key norm (arXiv 2406.11430): the prompt's tokens whose keys have the lowest norm stay, per key-value head.

Keys are taken as attention uses them; rotation does not change a norm (but longrope's factor does where only a part of
the key is rotated). The last tokens stay too (frozen.py), which the paper does not ask for: decoding needs them.
Positions are absolute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policies.tokens.frozen import Frozen


@dataclass(frozen=True)
class KNorm(Frozen):
    name: ClassVar[str] = "knorm"

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
        norm = torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32))
        return -norm.float()  # in fp64 too: in the first layer equal tokens tie, but for the rounding of their rotation
