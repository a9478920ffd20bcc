"""The KV cache: one arena, of which each layer owns a slice of slots, and attention of one new token over a slice.

Shapes as in model.py. Keys and values are stored once per key-value head. The filled slots of a row are always a
prefix, `min(seen, slots)` of them, so evicting a token means that the next one overwrites it and a full layer needs no
mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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


class KVCache:
    """Arenas [B, K, sum(plan), D] for K and V, and [B, K, sum(plan)] for a policy's scores and positions."""

    def __init__(
        self,
        plan: Sequence[int],
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scored: bool = False,
    ):
        shape = (batch, kv_heads, sum(plan))
        self.plan = list(plan)
        # Zeros, not garbage: slots not yet filled are masked, but 0 * NaN would still be NaN.
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        wide = torch.promote_types(dtype, torch.float32)
        self.score = torch.zeros(shape, dtype=wide, device=device) if scored else None
        self.position = torch.zeros(shape, dtype=torch.int64, device=device) if scored else None
        self.layers: list[LayerCache] = []
        base = 0
        for slots in plan:
            arenas = (self.k, self.v, self.score, self.position)
            self.layers.append(LayerCache(*(a if a is None else a[:, :, base : base + slots] for a in arenas)))
            base += slots

    @property
    def kv_bytes(self) -> int:
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()

    @property
    def state_bytes(self) -> int:
        return sum(a.untyped_storage().nbytes() for a in (self.score, self.position) if a is not None)

    def fill(self, index: int, k: Tensor, v: Tensor, scores: Tensor | None, positions: Tensor) -> None:
        """Copy the chosen prompt tokens into layer `index`.

        k, v [B, K, S, D] and scores [B, K, S], if the policy has any: the prompt's; scores are kept if the cache has
        room for them. positions [B, 1 or K, n]: the prompt position that goes into each of the first n slots.
        """
        layer, n = self.layers[index], positions.shape[2]
        positions = positions.expand(k.shape[0], k.shape[1], n)
        gather = positions[..., None].expand(-1, -1, -1, k.shape[3])
        layer.k[:, :, :n] = k.gather(2, gather)
        layer.v[:, :, :n] = v.gather(2, gather)
        if layer.score is not None:
            layer.score[:, :, :n] = scores.gather(2, positions)
            layer.position[:, :, :n] = positions


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
    scores = _dot(q, k)
    if leading_keys is not None:
        scores = torch.cat((_dot(q, leading_keys), scores[..., leading_keys.shape[2] :]), dim=-1)
    scores = softcapped(scores.to(torch.promote_types(q.dtype, torch.float32)), softcap)
    empty = torch.arange(k.shape[2], device=q.device) >= valid[:, None]
    probs = scores.masked_fill(empty[:, None, None], float("-inf")).softmax(-1)
    return (probs.to(v.dtype) @ v).flatten(1, 2), probs


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """x held softly within [-cap, cap]; None: as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _dot(q: Tensor, k: Tensor) -> Tensor:
    """q [B, K, G, D], k [B, K, N, D] -> [B, K, G, N]. Compiled for a CPU a generated loop beats the small products."""
    if q.is_cuda or not torch.compiler.is_compiling():
        return q @ k.mT
    return (q[:, :, :, None] * k[:, :, None]).sum(-1)
