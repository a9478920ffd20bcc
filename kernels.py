"""Products that have one form for a CPU's generated loops and one for everything else.

Compiled for a CPU, a product with few rows is written as multiply and sum: it becomes part of the generated loops. The
library's call costs more than the arithmetic of small models there, and reaches only a part of the memory bandwidth on
large ones. Shapes as in model.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear through `linear`. experts: how many matrices are stacked in it, by rows."""

    def __init__(self, columns: int, rows: int, bias: bool = True, experts: int = 1):
        super().__init__(columns, rows, bias)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def stack(self) -> Tensor:
        """[experts, out, in]."""
        return self.weight.unflatten(0, (self.experts, -1))

    def expert(self, number: int, x: Tensor) -> Tensor:
        """x [R, in] times one of the experts -> [R, out]."""
        return x @ self.stack[number].T

    @property
    def waits(self) -> bool:
        """Whether the host has to know in `grouped` where groups end, and waits for the device."""
        return self.weight.is_cuda and not fused(self.stack)

    def grouped(self, x: Tensor, ends: Tensor | list[int]) -> Tensor:
        """x [R, in], of which those before ends [experts] are each expert's -> [R, out]. A list where that `waits`."""
        return by_group(x, ends, self.expert) if isinstance(ends, list) else grouped_product(x, self.stack, ends)

    def each(self, x: Tensor) -> Tensor:
        """x [R, experts, in], times each expert its own -> [R, experts, out]."""
        return torch.einsum("rei,eoi->reo", x, self.stack)

    def chosen(self, experts: Tensor, x: Tensor) -> Tensor:
        """x [R, top or 1, in] times the experts [R, top] that each row chose -> [R, top, out]."""
        return matvec(self.stack[experts], x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, as a generated loop for a single row; in float16 the library's, which converts faster than loops do.

    Numbers of bfloat16 become wide ones in the loop's registers, and the sum is rounded once.
    """
    if x.is_cuda or x.numel() > x.shape[-1] or x.dtype == torch.float16 or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (x.flatten().to(wide) * weight.to(wide)).sum(-1)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype).view(*x.shape[:-1], -1)


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """weight [..., out, in] times x [..., in]. Compiled, chosen experts are read in place instead of copied first."""
    if torch.compiler.is_compiling():
        return (weight * x[..., None, :]).sum(-1)
    return (weight @ x[..., None]).squeeze(-1)


@torch.library.custom_op("squeeze_fast::grouped_product", mutates_args=())
def grouped_product(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x [R, in], of which the rows before ends [E] belong to each matrix in turn, times stack [E, out, in] -> [R, out].

    An operation of its own: Inductor has PyTorch's own in bfloat16 only, and cannot trace the loop.
    """
    if fused(stack):
        return F.grouped_mm(x, stack.mT, offs=ends)
    return by_group(x, ends.tolist(), lambda number, part: part @ stack[number].T)


@grouped_product.register_fake
def _(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), stack.shape[1])


def by_group(x: Tensor, ends: list[int], product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """x [R, in], of which product(e, part) takes the rows before each end -> [R, out]."""
    parts = enumerate(x.tensor_split(ends[:-1]))
    return torch.cat([product(number, part) for number, part in parts if len(part)])


def fused(stack: Tensor) -> bool:
    """Whether PyTorch multiplies stacked matrices [E, out, in] in one call that does not wait for the device.

    On CUDA that is in bfloat16, from Hopper on; elsewhere it copies the bounds of the groups to the host.
    """
    experts, size = len(stack), stack.element_size()
    if size > 4 or stack.shape[1] * size % 16 or stack.shape[2] * size % 16:
        return False
    if not stack.is_cuda:
        return True
    new = torch.cuda.is_available() and torch.cuda.get_device_properties(stack.device).major in (9, 10)
    return new and stack.dtype == torch.bfloat16 and experts < 1024


def dot(q: Tensor, k: Tensor, scale: Tensor | None = None) -> Tensor:
    """q [B, K, G, D], k [B, K, N, D] -> [B, K, G, N]. scale [B, K, N]: of keys in int8."""
    if q.is_cuda or not torch.compiler.is_compiling():
        return q @ decoded(k, scale, q.dtype).mT
    if scale is None:
        return (q[:, :, :, None] * k[:, :, None]).sum(-1)
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide)[:, :, :, None] * k[:, :, None]).sum(-1) * scale.to(wide)[:, :, None]


def mix(probs: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """probs [B, K, G, N], v [B, K, N, D] -> [B, K, G, D]. Wide rows of full precision lose by a generated loop."""
    wide = v.shape[-1] > 64 and v.element_size() >= 4
    if probs.is_cuda or wide or not torch.compiler.is_compiling():
        return probs @ decoded(v, scale, probs.dtype)
    if scale is not None:
        probs = probs * scale.to(probs.dtype)[:, :, None]
    return (probs[..., None] * v[:, :, None]).sum(-2)


def decoded(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., D], in int8 with its scale [...] -> numbers of `dtype`."""
    if scale is None:
        return x
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) * scale.to(wide)[..., None]).to(dtype)


def softmaxed(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension of scores [B, K, G, ..., N].

    sink [H]: of each head a logit that takes part in the softmax and reads nothing, so that the shares sum to less than
    1; None: no such logit.
    """
    if sink is None:
        return scores.softmax(-1)
    sink = sink.to(scores.dtype).view(scores.shape[1:3] + (1,) * (scores.dim() - 3))
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    raised = (scores - top).exp_()
    return raised.div_(raised.sum(-1, keepdim=True) + (sink - top).exp())


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """x held softly within [-cap, cap]; None: as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
