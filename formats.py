"""How a slot holds a key or a value [D]: "dense" as it is; "int8" as whole numbers from -127 to 127 and one scale.

The scale is the largest of the numbers / 127, in bfloat16. Slots are overwritten one by one, so each has its own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import decoded

FORMATS = ("dense", "int8")
SCALE = torch.bfloat16  # as wide as float32, and as precise as a scale needs to be


class Stored(NamedTuple):
    """Keys and values as slots hold them: k, v [..., N, D]; in int8 also their scales [..., N]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @staticmethod
    def of(k: Tensor, v: Tensor, format: str) -> "Stored":
        """k, v [..., N, D] of the model, in this format."""
        if format == "dense":
            return Stored(k, v)
        (k, k_scale), (v, v_scale) = encoded(k), encoded(v)
        return Stored(k, v, k_scale, v_scale)

    def each(self, change: Callable[..., Tensor], *others: "Stored") -> "Stored":
        """change(part, the same part of the others) for all parts that there are."""
        return Stored(*(None if own is None else change(own, *rest) for own, *rest in zip(self, *others, strict=True)))

    @property
    def format(self) -> str:
        return "dense" if self.k_scale is None else "int8"

    def leading_keys(self, count: int, dtype: torch.dtype) -> Tensor:
        """The keys [..., count, D] of the first slots, as numbers of this dtype."""
        return decoded(self.k[..., :count, :], None if self.k_scale is None else self.k_scale[..., :count], dtype)

    def parts(self) -> list[Tensor]:
        return [part for part in self if part is not None]


def encoded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 [..., D] and its scale [...].

    The scale is rounded to bfloat16 in its bits: a cast there and back is left out where code is compiled.
    """
    largest = x.abs().amax(-1).float() / 127
    rounded = ((largest.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
    scale = torch.where(largest.isfinite(), rounded, torch.nan)  # so that what is read is not finite either
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = (x.to(wide) / scale.to(wide)[..., None]).nan_to_num(0).round().clamp(-127, 127)
    return whole.to(torch.int8), scale.to(SCALE)


def arenas(format: str, dtype: torch.dtype, head_dim: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The parts of what a slot holds of one head: the kind of its numbers, and its shape."""
    if format == "dense":
        return {"k": (dtype, (head_dim,)), "v": (dtype, (head_dim,))}
    return {
        "k": (torch.int8, (head_dim,)),
        "v": (torch.int8, (head_dim,)),
        "k_scale": (SCALE, ()),
        "v_scale": (SCALE, ()),
    }


def slot_bytes(format: str, dtype: torch.dtype, head_dim: int) -> int:
    """K and V of one slot of one head."""
    return sum(kind.itemsize * math.prod(tail) for kind, tail in arenas(format, dtype, head_dim).values())
