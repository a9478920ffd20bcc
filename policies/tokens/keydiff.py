"""KeyDiff (arXiv 2504.15364): the prompt's tokens whose keys are least like the others' stay, per key-value head.

A token's score is minus the cosine of its key and the mean of all keys of its row, each scaled to length 1 before.
Keys are taken as attention uses them, rotated. The last tokens stay too (frozen.py): decoding needs them. Positions are
absolute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.tokens.frozen import Frozen


@dataclass(frozen=True)
class KeyDiff(Frozen):
    name: ClassVar[str] = "keydiff"

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> Tensor:
        unit = F.normalize(k.to(torch.promote_types(k.dtype, torch.float32)), dim=-1)
        own = unit
        if lengths is not None:
            padding = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
            own = unit.masked_fill(padding[:, None, :, None], 0)
        mean = F.normalize(own.sum(2), dim=-1)  # only its direction counts
        return -(unit @ mean[..., None]).squeeze(-1)
