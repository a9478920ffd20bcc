"""Attention of one new token per row as a Triton kernel: many programs read K and V once, and the shares come out.

Flash-decoding (arXiv 2311.01282): each program reads a stretch of one key-value head's slots for all query heads of its
group, and leaves its part of the sum and the logits; a second kernel puts the parts together and turns the logits into
shares. How far a row is filled is read on the device, so a captured graph serves any length. `LayerCache.attend` is
its plain twin. A contestant of the stage `attention`: it moves to where the engine can use it if it wins there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # slots in one step of a program
PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def stretch_of(valid, slots, split, splits, block: tl.constexpr):
    """The slots from..to of this program: whole blocks, evenly dealt."""
    end = tl.minimum(valid, slots)
    size = tl.cdiv(tl.cdiv(end, block), splits) * block
    return tl.minimum(split * size, end), tl.minimum((split + 1) * size, end)


@triton.jit
def parts_kernel(
    q, k, v, valid, logits, sums, tops, parts, slots, scale,
    kv_heads: tl.constexpr, group: tl.constexpr, padded: tl.constexpr, dim: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, end = stretch_of(tl.load(valid + head // kv_heads).to(tl.int32), slots, split, splits, block)
    g, d, n = tl.arange(0, padded), tl.arange(0, dim), tl.arange(0, block)
    query = tl.load(q + (head * group + g[:, None]) * dim + d, mask=g[:, None] < group, other=0.0)
    top = tl.full([padded], float("-inf"), tl.float32)
    total = tl.zeros([padded], tl.float32)
    out = tl.zeros([padded, dim], tl.float32)
    for start in range(first, end, block):
        real = start + n < end
        at = (head * slots + start + n[:, None]) * dim + d
        keys = tl.load(k + at, mask=real[:, None], other=0.0)
        scores = tl.where(real, tl.dot(query, tl.trans(keys), input_precision="ieee") * scale, float("-inf"))
        row = (head * group + g[:, None]) * slots + start + n
        tl.store(logits + row, scores, mask=(g[:, None] < group) & real)
        higher = tl.maximum(top, tl.max(scores, 1))
        faded, shares = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        values = tl.load(v + at, mask=real[:, None], other=0.0)
        out = out * faded[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        total, top = total * faded + tl.sum(shares, 1), higher
    part = (head * splits + split) * padded + g
    tl.store(sums + part, total)
    tl.store(tops + part, top)
    tl.store(parts + part[:, None] * dim + d, out)


@triton.jit
def join_kernel(
    valid, logits, sums, tops, parts, out, slots,
    kv_heads: tl.constexpr, group: tl.constexpr, padded: tl.constexpr, dim: tl.constexpr, block: tl.constexpr,
    splits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    filled = tl.load(valid + head // kv_heads).to(tl.int32)
    first, end = stretch_of(filled, slots, split, splits, block)
    g, d, n, s = tl.arange(0, padded), tl.arange(0, dim), tl.arange(0, block), tl.arange(0, width)
    each = (head * splits + s[:, None]) * padded + g
    top = tl.load(tops + each, mask=s[:, None] < splits, other=float("-inf"))
    highest = tl.max(top, 0)
    weight = tl.exp(top - highest)  # [splits, group]
    total = tl.sum(weight * tl.load(sums + each, mask=s[:, None] < splits, other=0.0), 0)
    if split == splits - 1:  # the others have as much to do; what was never filled gets a share of 0
        end = slots
        joined = tl.zeros([padded, dim], tl.float32)
        for number in range(splits):
            one = (head * splits + number) * padded + g
            faded = tl.exp(tl.load(tops + one) - highest)
            joined += faded[:, None] * tl.load(parts + one[:, None] * dim + d)
        answer = (head * group + g[:, None]) * dim + d
        tl.store(out + answer, joined / total[:, None], mask=g[:, None] < group)
    for start in range(first, end, block):
        at = (head * group + g[:, None]) * slots + start + n
        here = (g[:, None] < group) & (start + n < end)
        there = here & (start + n < filled)
        scores = tl.load(logits + at, mask=there, other=float("-inf"))
        tl.store(logits + at, tl.exp(scores - highest[:, None]) / total[:, None], mask=here)


def split_kv(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, 1, D], k, v [B, K, N, D], valid [B], all contiguous -> out [B, H, D], shares [B, K, G, N] in fp32.

    D is a power of two, at least 16.
    """
    batch, kv_heads, slots, dim = k.shape
    group = q.shape[1] // kv_heads
    splits = max(1, min(triton.cdiv(slots, BLOCK), PROGRAMS // (batch * kv_heads)))
    sizes = dict(kv_heads=kv_heads, group=group, padded=max(16, triton.next_power_of_2(group)), dim=dim, block=BLOCK)
    sums, tops = torch.empty(2, batch * kv_heads * splits * sizes["padded"], device=q.device)
    parts = torch.empty(len(sums) * dim, device=q.device)
    shares = torch.empty(batch, kv_heads, group, slots, device=q.device)
    out = torch.empty(batch, kv_heads * group, dim, dtype=q.dtype, device=q.device)
    grid = (batch * kv_heads, splits)
    parts_kernel[grid](q, k, v, valid, shares, sums, tops, parts, slots, scale, **sizes)
    width = triton.next_power_of_2(splits)
    join_kernel[grid](valid, shares, sums, tops, parts, out, slots, **sizes, splits=splits, width=width)
    return out, shares
