"""A layer of linear attention: the gated delta rule (Gated DeltaNet, arXiv 2412.06464) in attention's place.

It keeps no keys and values. Each row has a state of a fixed size (`kvcache.Recurrent`): the last tokens that a short
convolution looks at, and of each value head a matrix M that maps keys to values. A token with decay g and rate b
makes of it

    M <- g M,   M <- M + k (b (v - M' k))',   and reads   M' q.

A step does just that. Of a prompt CHUNK tokens at a time are solved as one triangular system: what they read from each
other and write together are products of matrices (arXiv 2406.06484). Shapes as in model.py, and:

    Hk key heads of Dk elements    Hv value heads of Dv elements; each key head serves Hv / Hk of them, in a row
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ACTIVATIONS, ModelConfig
from kernels import Linear, mix
from kvcache import Recurrent

CHUNK = 64  # tokens in one triangular system
PART = 1024  # tokens of a prompt whose wide queries, keys and values exist at the same time


class DeltaNet(nn.Module):
    """What has `Attention`'s place in a block. All between the projections is computed in fp32, in fp64 if x is."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.sizes = config, config.delta
        heads = self.sizes.value_heads
        self.values = values = heads * self.sizes.value_dim
        self.wqkvz = Linear(config.dim, self.sizes.channels + values, bias=False)  # z gates what is read
        self.wba = Linear(config.dim, 2 * heads, bias=False)  # of each value head what makes its rate and its decay
        self.conv = nn.Parameter(torch.zeros(self.sizes.channels, 1, self.sizes.kernel))
        self.a_log, self.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))
        self.norm = nn.Parameter(torch.ones(self.sizes.value_dim))
        self.wo = Linear(values, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cache: Any) -> Tensor:
        """x [B, T, C] -> output [B, T, C]. `cache`, as of `Attention`, has the state; nothing is rotated."""
        return cache.recur(self, x)

    def run(self, x: Tensor, state: Recurrent | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Recurrent]:
        """x [B, T, C], behind `state` if there were tokens before -> output [B, T, C] and the state behind it.

        lengths [B]: how many tokens of each row count; None: all. The others do not touch the state.
        """
        if state is None:
            parts = self.config.recurrent(x.dtype).values()
            state = Recurrent(*(x.new_zeros(len(x), *shape, dtype=kind) for kind, shape in parts))
        done = []
        for start in range(0, x.shape[1], PART):
            part = x[:, start : start + PART]
            real = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            out, state = self._part(part, state, real)
            done.append(out)
        return (done[0] if len(done) == 1 else torch.cat(done, dim=1)), state

    def _part(self, x: Tensor, state: Recurrent, real: Tensor | None) -> tuple[Tensor, Recurrent]:
        """As of `run`."""
        wide, d = torch.promote_types(x.dtype, torch.float32), self.sizes
        qkv, z = self.wqkvz(x).split([d.channels, self.values], dim=-1)
        rate, fall = self.wba(x).to(wide).split(d.value_heads, dim=-1)  # [B, T, Hv]
        rate, fall = rate.sigmoid(), -self.a_log.to(wide).exp() * F.softplus(fall + self.dt_bias.to(wide))
        qkv, window = self._convolved(qkv, state.window, real)
        if real is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= real[:, None]
            qkv, rate, fall = (part.masked_fill(padding[..., None], 0) for part in (qkv, rate, fall))
        keys = d.key_heads * d.key_dim
        q, k, v = qkv.split([keys, keys, self.values], dim=-1)
        q, k = (normed(part.unflatten(-1, (d.key_heads, -1))) for part in (q, k))
        each = (*q.shape[:3], d.value_heads // d.key_heads, d.key_dim)  # `repeat_interleave` would wait for the device
        q, k = (part[:, :, :, None].expand(each).flatten(2, 3).transpose(1, 2) for part in (q * d.key_dim**-0.5, k))
        v, rate, fall = v.unflatten(-1, (d.value_heads, -1)).transpose(1, 2), rate.mT, fall.mT
        rule = step if x.shape[1] == 1 else over_chunks
        out, memory = rule(q, k, v, rate, fall, state.memory)
        out = F.rms_norm(out.transpose(1, 2), (d.value_dim,), self.norm.to(wide), self.config.norm_eps)
        out = out.flatten(2) * F.silu(z.to(wide))
        return self.wo(out.to(x.dtype)), Recurrent(window, memory)

    def _convolved(self, x: Tensor, window: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels] behind a window -> what the convolution makes of it, wide, and the window behind it."""
        wide, length, back = torch.promote_types(x.dtype, torch.float32), x.shape[1], window.shape[1]
        x = torch.cat((window.to(x.dtype), x), dim=1)
        taps = self.conv[:, 0].to(wide)
        out = sum(x[:, tap : tap + length].to(wide) * taps[:, tap] for tap in range(back + 1))
        if real is None:
            window = x[:, length:].clone()  # a view would keep all tokens in memory
        else:
            last = real[:, None] + torch.arange(back, device=x.device)
            window = x.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return ACTIVATIONS[self.config.activation](out), window


def normed(x: Tensor) -> Tensor:
    """x [..., Dk] of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def step(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, fall: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """As `over_chunks`, of one token. The memory is read once, for the key and the query together."""
    kept = fall.exp()[..., None]  # [B, Hv, 1, 1]
    known, read = (kept * mix(torch.cat((k, q), dim=2), memory)).split(1, dim=2)
    new = rate[..., None] * (v - known)
    return read + (q * k).sum(-1, keepdim=True) * new, kept * memory + k.mT * new


def over_chunks(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, fall: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, Hv, T, Dk], v [B, Hv, T, Dv], rate and log of decay [B, Hv, T], memory [B, Hv, Dk, Dv] -> what is read
    [B, Hv, T, Dv], and the memory behind it.
    """
    length = q.shape[2]
    size = min(CHUNK, length)
    pad = -length % size
    q, k, v = (F.pad(part, (0, 0, 0, pad)).unflatten(2, (-1, size)) for part in (q, k, v))  # [B, Hv, chunks, size, D]
    rate, fall = (F.pad(part, (0, pad)).unflatten(2, (-1, size)) for part in (rate, fall))
    fall = fall.cumsum(-1)  # since the beginning of the chunk
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # The decay from the second token to the first.
    between = (fall[..., None] - fall[..., None, :]).masked_fill(later, float("-inf")).exp()
    written, since = rate[..., None] * k, fall.exp()[..., None]
    # The values that the tokens write if the memory was empty, and what each takes away of what it held.
    sides = torch.cat((rate[..., None] * v, since * written), dim=-1)
    sides = torch.linalg.solve_triangular(written @ k.mT * between, sides, upper=False, unitriangular=True)
    new, known = sides.split([v.shape[-1], k.shape[-1]], dim=-1)
    within, q, until = q @ k.mT * between, since * q, fall[..., -1:]
    k, kept = (until - fall).exp()[..., None] * k, until.exp()[..., None]
    read = []
    for own_q, own_k, own_new, own_known, own_within, own_kept in zip(
        *(part.unbind(2) for part in (q, k, new, known, within, kept)), strict=True
    ):
        own_new = own_new - own_known @ memory
        read.append(own_q @ memory + own_within @ own_new)
        memory = own_kept * memory + own_k.mT @ own_new
    return torch.cat(read, dim=2)[:, :, :length], memory
