"""The KV cache: one arena, of which each layer owns its slots, and attention of new tokens over them.

Shapes as in model.py. Keys and values are stored once per key-value head. A row's filled slots are always its first
`min(seen, slots)`: a new token overwrites the one that is evicted, and a full layer needs no mask.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from formats import Stored, arenas
from kernels import decoded, dot, mix, softcapped, softmaxed


class LayerCache(NamedTuple):
    """One layer's views of the arenas: what its slots hold [B, K, N, ...]; scores, positions if they are kept."""

    stored: Stored
    score: Tensor | None = None
    position: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.stored.k.shape[2]

    def named(self) -> dict[str, Tensor]:
        """The parts that there are."""
        named = self.stored._asdict() | {"score": self.score, "position": self.position}
        return {name: part for name, part in named.items() if part is not None}

    def parts(self) -> list[Tensor]:
        return list(self.named().values())

    def write(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [B, K, 1, D] in `slot` [B, 1 or K] of each row and head."""
        rows, heads = self.stored.k.shape[:2]
        at = (torch.arange(rows, device=slot.device)[:, None], torch.arange(heads, device=slot.device), slot)
        for part, new in zip(self.stored.parts(), Stored.of(k, v, self.stored.format).parts(), strict=True):
            part.index_put_(at, new[:, :, 0].to(part.dtype))

    def attend(
        self,
        q: Tensor,
        valid: Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of one token per row over its slots.

        q [B, H, 1, D]; valid [B]: how many leading slots count (more than N means all). sinks [B, K, 1, n, D] replace
        the first n keys; sink_logits [H]: as of `softmaxed`, which is taken in fp32. Returns out [B, H, 1, D] and probs
        [B, K, G, N].
        """
        k, v, k_scale, v_scale = self.stored
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3) * scale
        scores = dot(q, k, k_scale)
        if sinks is not None:
            scores = torch.cat((dot(q, sinks[:, :, 0]), scores[..., sinks.shape[3] :]), dim=-1)
        scores = softcapped(scores.to(torch.promote_types(q.dtype, torch.float32)), softcap)
        empty = torch.arange(k.shape[2], device=q.device) >= valid[:, None]
        probs = softmaxed(scores.masked_fill(empty[:, None, None], float("-inf")), sink_logits)
        shares = probs if v_scale is not None else probs.to(q.dtype)
        return mix(shares, v, v_scale).to(q.dtype).flatten(1, 2)[:, :, None], probs

    def followed_by(self, k: Tensor, v: Tensor) -> Stored:
        """What the slots hold and behind it k, v [B, K, T, D], as they will be stored."""
        return self.stored.each(lambda own, new: torch.cat((own, new), dim=2), Stored.of(k, v, self.stored.format))

    def look(
        self,
        q: Tensor,
        both: Stored,
        visible: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        sink_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of T tokens per row over the slots and each other (`both`, of `followed_by`). Nothing is written.

        q [B, H, T, D]; visible [B, 1 or K, T, N + T]; sinks [B, K, T, n, D] are the first n keys as each token sees
        them; sink_logits [H]: as of `softmaxed`. Returns out [B, H, T, D] and probs [B, K, G, T, N + T].
        """
        keys, values = decoded(both.k, both.k_scale, q.dtype), decoded(both.v, both.v_scale, q.dtype)
        q = q.unflatten(1, (keys.shape[1], -1)) * scale
        scores = q @ keys[:, :, None].mT
        if sinks is not None:
            scores[..., : sinks.shape[3]] = (q[..., None, :] @ sinks[:, :, None].mT).squeeze(-2)
        scores = softcapped(scores.to(torch.promote_types(q.dtype, torch.float32)), softcap)
        probs = softmaxed(scores.masked_fill(~visible[:, :, None], float("-inf")), sink_logits)
        return (probs.to(values.dtype) @ values[:, :, None]).flatten(1, 2), probs

    def absorb(self, source: Tensor, both: Stored) -> None:
        """Fill slot n with item source[..., n] of `both`, the slots and what follows them; source [B, 1 or K, N]."""
        for part, items in zip(self.stored.parts(), both.parts(), strict=True):
            index = source.expand(part.shape[:3])
            part.copy_(items.gather(2, index if part.dim() == 3 else index[..., None].expand_as(part)))

    def fill(self, rows: Tensor, kept: "LayerCache") -> None:
        """What the layer keeps of some rows' prompts, into its first n slots.

        rows [R]; kept [R, K, n, ...]; scores and prompt positions [R, 1 or K, n] are for policies that keep them.
        """
        n = kept.slots
        for part, own in zip(self.stored.parts(), kept.stored.parts(), strict=True):
            part[rows, :, :n] = own
        for part in (self.stored.v, self.stored.v_scale):  # what an earlier request left is masked, but 0 * inf is NaN
            if part is not None:
                part[rows, :, n:] = 0
        if self.score is not None:
            self.score[rows, :, :n] = kept.score
            self.position[rows, :, :n] = kept.position

    def of_row(self, row: int, n: int) -> "LayerCache":
        """A copy of what a row's first n slots hold: a layer of one row."""
        own = [None if part is None else part[row : row + 1, :, :n].clone() for part in (self.score, self.position)]
        return LayerCache(self.stored.each(lambda part: part[row : row + 1, :, :n].clone()), *own)


class Recurrent(NamedTuple):
    """What a layer of linear attention holds of each row, in place of slots: as much however long the row is.

    window [B, W, channels]: the last tokens of its convolution. memory [B, Hv, Dk, Dv]: in fp32, in fp64 for an fp64
    model, whatever the format of slots is. Before a row's first token both are 0.
    """

    window: Tensor
    memory: Tensor
    slots = 0

    def named(self) -> dict[str, Tensor]:
        return self._asdict()

    def parts(self) -> list[Tensor]:
        return list(self)

    def fill(self, rows: Tensor, kept: "Recurrent") -> None:
        """What is left of the prompts of some rows [R]."""
        for part, own in zip(self, kept, strict=True):
            part[rows] = own.to(part.dtype)

    def become(self, after: "Recurrent") -> None:
        """Of all rows, in place."""
        for part, own in zip(self, after, strict=True):
            part.copy_(own)

    def of_row(self, row: int, n: int) -> "Recurrent":
        """A copy of what a row has; n, as of `LayerCache`, is 0."""
        return Recurrent(*(part[row : row + 1].clone() for part in self))


class Memory:
    """Flat storage in which the arenas of one plan after another live, as long as they fit."""

    def __init__(self):
        self._flat: dict[str, Tensor] = {}

    def fits(self, name: str, size: int) -> bool:
        return name in self._flat and self._flat[name].numel() >= size

    def arena(self, name: str, size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        if not self.fits(name, size):
            # Zeros, not garbage: slots not yet filled are masked, but 0 * NaN would still be NaN.
            self._flat[name] = torch.zeros(size, dtype=dtype, device=device)
        return self._flat[name][:size]


class KVCache:
    """One arena for each part of what slots hold, and for a policy's scores and positions, if it keeps any.

    Layer l owns a contiguous stretch of each, that of K being B * K * plan[l] * D elements long: attention reads it as
    it lies. As slices of [B, K, sum(plan), D] the same reads take longer, on a CPU at large batches.

    A layer of 0 slots in the plan is one of linear attention. recurrent: the parts of a row's state there, as of
    `ModelConfig.recurrent`.
    """

    def __init__(
        self,
        plan: Sequence[int],
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scored: bool = False,
        memory: Memory | None = None,
        format: str = "dense",
        recurrent: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = MappingProxyType({}),
    ):
        self.plan, self.batch, self.device, self.format = list(plan), batch, device, format
        memory, wide = memory or Memory(), torch.promote_types(dtype, torch.float32)
        self.kv, self.state = arenas(format, dtype, head_dim), {}
        if scored:
            self.state = {"score": (wide, ()), "position": (torch.int64, ())}
        self.arenas: dict[str, Tensor] = {}
        views: dict[str, list[Tensor]] = {}
        for name, (kind, tail) in (self.kv | self.state).items():
            sizes = [batch * kv_heads * slots * math.prod(tail) for slots in plan]
            self.arenas[name] = memory.arena(name, sum(sizes), kind, device)
            parts = zip(self.arenas[name].split(sizes), plan, strict=True)
            views[name] = [part.view(batch, kv_heads, slots, *tail) for part, slots in parts]
        self.recurrent, linear = recurrent, self.plan.count(0)
        states = []
        for name, (kind, shape) in recurrent.items():
            self.arenas[name] = memory.arena(name, linear * batch * math.prod(shape), kind, device)
            states.append(self.arenas[name].view(linear, batch, *shape))
        each = iter(zip(*states, strict=True))  # of the layers of linear attention in turn
        self.layers: list[LayerCache | Recurrent] = [
            LayerCache(Stored(*(views[name][layer] for name in self.kv)), *(views[name][layer] for name in self.state))
            if slots
            else Recurrent(*next(each))
            for layer, slots in enumerate(plan)
        ]

    def of_row(self, row: int, seen: int) -> list[LayerCache | Recurrent]:
        """A copy of what a row's filled slots hold after `seen` tokens."""
        return [layer.of_row(row, min(seen, layer.slots)) for layer in self.layers]

    @property
    def kv_bytes(self) -> int:
        return sum(self.arenas[name].nbytes for name in self.kv)

    @property
    def state_bytes(self) -> int:
        return sum(self.arenas[name].nbytes for name in (*self.state, *self.recurrent))
