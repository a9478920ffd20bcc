"""A matrix as whole numbers of 8 or 4 bits with scales, whatever then holds them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError

GROUP = 32  # columns of 4 bits that share a scale and a zero point, where we choose
CLIPPED = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)  # parts of a row's range that are tried as that of its codes of 8 bits
PIECE = 1 << 20  # elements that are numbers at a time on a CPU, whose caches they should not leave


class Codes(NamedTuple):
    """The matrix (q - zero) * scale, where each group of neighbouring columns of a row has its own scale and zero.

    q [out, in]: in 8 bits int8, -128 to 127; in 4 bits uint8, 0 to 15. scale, zero [out, groups] in float32.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.q.dtype == torch.int8 else 4

    @staticmethod
    def of(matrix: Tensor, bits: int) -> "Codes":
        """matrix [out, in], a part of it at a time."""
        best = [_nearest(part, bits) for part in matrix.split(rows_at_a_time(matrix, matrix.shape[1]))]
        return Codes(*map(torch.cat, zip(*best, strict=True)))

    def cut(self, rows: Sequence[tuple[int, int]] | None, columns: tuple[int, int] | None) -> "Codes":
        """These ranges of rows, or this one of columns; None: all. UserError for half a group of columns."""
        if columns is not None and self.scale.shape[1] > 1:
            size = self.q.shape[1] // self.scale.shape[1]
            if any(column % size for column in columns):
                raise UserError(f"columns {columns[0]} to {columns[1]} are no whole groups of {size}; use fewer ranks")
            first, last = (column // size for column in columns)
            return Codes(self.q[:, slice(*columns)], self.scale[:, first:last], self.zero[:, first:last])
        if columns is not None:
            return self._replace(q=self.q[:, slice(*columns)])
        return self if rows is None else Codes(*(torch.cat([part[slice(*own)] for own in rows]) for part in self))

    def numbers(self) -> Tensor:
        """The matrix, in float32."""
        q = self.q.unflatten(1, (self.scale.shape[1], -1))
        return ((q - self.zero[..., None]) * self.scale[..., None]).flatten(1)


def rows_at_a_time(tensor: Tensor, columns: int) -> int:
    """How many rows of a matrix on the tensor's device should be numbers at a time: few calls matter on a GPU."""
    return max(1, (PIECE if tensor.device.type == "cpu" else PIECE << 6) // columns)


def _nearest(matrix: Tensor, bits: int) -> Codes:
    groups = matrix.float().unflatten(1, (1, -1) if bits == 8 else (-1, GROUP))
    if bits == 4:
        bottom, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((top - bottom) / 15).clamp(min=1e-30).bfloat16().float()
        zero = (-16 * bottom / scale).round().clamp(0, 255) / 16
        q = (groups / scale[..., None] + zero[..., None]).round_().clamp_(0, 15)
        return Codes(q.flatten(1).to(torch.uint8), scale, zero)
    least = torch.full(groups.shape[:2], torch.inf, device=matrix.device)
    scale, q = torch.empty_like(least), torch.empty_like(groups)
    for part in CLIPPED:  # the range with the least squared error
        tried = (groups.abs().amax(-1) * part / 127).clamp(min=1e-30)
        codes = (groups / tried[..., None]).round_().clamp_(-127, 127)
        error = (codes * tried[..., None] - groups).square().sum(-1)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
        q = torch.where(better[..., None], codes, q)
    return Codes(q.flatten(1).to(torch.int8), scale, torch.zeros_like(scale))
