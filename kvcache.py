"""The KV cache: one arena, of which each layer owns its slots, and attention of one new token over them.

Shapes as in model.py. Keys and values are stored once per key-value head. The filled slots of a row are always a
prefix, `min(seen, slots)` of them, so evicting a token means that the next one overwrites it and a full layer needs no
mask.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dot, mix


class LayerCache(NamedTuple):
    """One layer's views into the arenas: k, v [B, K, N, D]; score, position [B, K, N] for policies that keep them."""

    k: Tensor
    v: Tensor
    score: Tensor | None = None
    position: Tensor | None = None

    def write(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [B, K, 1, D] in `slot` [B, 1 or K] of each row and head."""
        row = torch.arange(self.k.shape[0], device=slot.device)[:, None]
        head = torch.arange(self.k.shape[1], device=slot.device)
        self.k.index_put_((row, head, slot), k[:, :, 0])
        self.v.index_put_((row, head, slot), v[:, :, 0])

    def replace(self, source: Tensor, k: Tensor, v: Tensor) -> None:
        """Fill slot n with item source[..., n] of the slots followed by k, v [B, K, T, D]; source [B, 1 or K, N]."""
        source = source[..., None].expand_as(self.k)
        self.k.copy_(torch.cat((self.k, k), dim=2).gather(2, source))
        self.v.copy_(torch.cat((self.v, v), dim=2).gather(2, source))


class Prompt:
    """One layer's keys and values of R prompts, k, v [R, K, S, D], and scores [R, K, S] if the policy has any.

    While the plan is not known yet it can be cut to what the layer may keep at most, again and again: what a token
    policy keeps in fewer slots is always among what it keeps in more.
    """

    def __init__(self, k: Tensor, v: Tensor, scores: Tensor | None):
        self.k, self.v, self.scores = k, v, scores
        self.length = k.shape[2]  # S, whatever is cut
        self.positions: Tensor | None = None  # [R, 1 or K, n], ascending: what is left; None: all

    @staticmethod
    def joined(prompts: list["Prompt"]) -> "Prompt":
        """The rows of all of them, none of which is cut, one after the other. The list is emptied."""
        if len(prompts) == 1:
            return prompts.pop()
        scores = [prompt.scores for prompt in prompts if prompt.scores is not None]
        k, v = ([getattr(prompt, name) for prompt in prompts] for name in ("k", "v"))
        prompts.clear()  # so that no more than k and v of one layer and a half are there at any time
        k = torch.cat(k)
        return Prompt(k, torch.cat(v), torch.cat(scores) if scores else None)

    def cut(self, positions: Tensor) -> None:
        """Keep these positions [R, 1 or K, n] only."""
        positions = positions.sort(dim=2).values
        self.k, self.v = self.gather(positions)
        self.positions = positions

    def put(self, k: Tensor, v: Tensor) -> None:
        """Move into k, v, flat parts of an arena that hold nothing of it yet."""
        self.k, self.v = k.view(self.k.shape).copy_(self.k), v.view(self.v.shape).copy_(self.v)

    def lift(self) -> None:
        """Move out of an arena into tensors of its own."""
        self.k, self.v = self.k.clone(), self.v.clone()

    def gather(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [R, K, n, D] at these positions."""
        at = positions
        if self.positions is not None:  # entries behind the end of a row may be gone: any others do
            at = torch.searchsorted(self.positions, positions.contiguous()).clamp(max=self.positions.shape[2] - 1)
        rows, heads, length, size = self.k.shape
        first = torch.arange(rows * heads, device=at.device).view(rows, heads, 1) * length
        at = (first + at).flatten()  # whole rows of D elements: many times faster on a CPU than `gather`
        k, v = (part.reshape(-1, size).index_select(0, at) for part in (self.k, self.v))
        return k.view(rows, heads, -1, size), v.view(rows, heads, -1, size)


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

    def whole(self, name: str) -> Tensor:
        """All that there is of an arena."""
        return self._flat[name]


class KVCache:
    """One arena for K and one for V, and one each for a policy's scores and positions, if it keeps any.

    Layer l owns a contiguous stretch of each, B * K * plan[l] * D elements long: attention reads it as it lies. As
    slices of [B, K, sum(plan), D] the same reads take longer, on a CPU at large batches.
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
    ):
        self.plan, self.batch, self.device, memory = list(plan), batch, device, memory or Memory()
        wide = torch.promote_types(dtype, torch.float32)
        arenas = [("k", dtype, (head_dim,)), ("v", dtype, (head_dim,))]
        arenas += [("score", wide, ()), ("position", torch.int64, ())] * scored
        self.arenas: dict[str, Tensor] = {}
        views = []
        for name, kind, tail in arenas:
            sizes = [batch * kv_heads * slots * math.prod(tail) for slots in plan]
            self.arenas[name] = memory.arena(name, sum(sizes), kind, device)
            parts = zip(self.arenas[name].split(sizes), plan, strict=True)
            views.append([part.view(batch, kv_heads, slots, *tail) for part, slots in parts])
        self.layers = [LayerCache(*own) for own in zip(*views, strict=True)]

    @property
    def kv_bytes(self) -> int:
        return sum(self.arenas[name].nbytes for name in ("k", "v"))

    @property
    def state_bytes(self) -> int:
        return sum(arena.nbytes for arena in self.arenas.values()) - self.kv_bytes

    def fill(self, index: int, rows: Tensor, prompt: Prompt, positions: Tensor) -> None:
        """Copy the chosen tokens of some rows' prompts into layer `index`.

        rows [R]; positions [R, 1 or K, n]: the prompt position that goes into each of the first n slots.
        """
        layer, n = self.layers[index], positions.shape[2]
        k, v = prompt.gather(positions)
        layer.k[rows, :, :n], layer.v[rows, :, :n] = k, v
        layer.v[rows, :, n:] = 0  # what an earlier request left: it is masked, but 0 * inf would be NaN
        if layer.score is not None:
            positions = positions.expand(*k.shape[:3])
            layer.score[rows, :, :n] = prompt.scores.gather(2, positions)
            layer.position[rows, :, :n] = positions


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    scale: float,
    softcap: float | None = None,
    leading_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per row over its slots.

    q [B, H, 1, D]; k, v [B, K, N, D]; valid [B]: how many leading slots count (more than N means all).
    leading_keys [B, K, s, D] replace the first s keys. Returns out [B, H, D] and probs [B, K, G, N]; softmax in fp32.
    """
    q = q.unflatten(1, (k.shape[1], -1)).squeeze(3) * scale
    scores = dot(q, k)
    if leading_keys is not None:
        scores = torch.cat((dot(q, leading_keys), scores[..., leading_keys.shape[2] :]), dim=-1)
    scores = softcapped(scores.to(torch.promote_types(q.dtype, torch.float32)), softcap)
    empty = torch.arange(k.shape[2], device=q.device) >= valid[:, None]
    probs = scores.masked_fill(empty[:, None, None], float("-inf")).softmax(-1)
    return mix(probs.to(v.dtype), v).flatten(1, 2), probs


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """x held softly within [-cap, cap]; None: as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
