"""What a layer policy answers, and `fit`, which makes its wishes true in integers.

`budget`, `caps`, `floor` and `slots` all count slots of one layer (keys that a decode step attends to); L is the number
of layers that have any: layers of linear attention are left out.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class Plan:
    slots: list[int]  # per layer
    groups: list[int | None] | None = None  # squeeze: cluster of each layer, 0..2 ascending by mean signal


class Attended(NamedTuple):
    """One layer's attention over R prompts of S tokens, padded, while its tensors are there. Shapes as in model.py."""

    signal: Tensor  # [R]: SqueezeAttention's, the mean cosine of the residual stream before and after
    after: Tensor  # [R, S, C]: the residual stream after the attention branch
    q: Tensor  # [R, H, S, D], rotated
    k: Tensor  # [R, K, S, D], rotated
    v: Tensor
    lengths: Tensor  # [R]
    window: int | None
    logits: Callable[[Tensor, Tensor], Tensor]  # q [R, H, T, D], k [R, K, M, D] -> [R, K, G, T, M] in fp32
    sink_logits: Tensor | None  # [H]: in the softmax beside those; None: none
    branch: Callable[[Tensor], Tensor]  # what heads read [..., H * D] -> what that adds to the residual stream [..., C]
    select: Callable[[int], Tensor]  # slots -> the prompt positions that the token policy keeps in them [R, 1 or K, n]
    gate: Tensor | None = None  # [R, S, H * D]: what heads read is multiplied by it before `branch`


class LayerPolicy:
    """Base of the policies: frozen dataclasses that are their own configuration."""

    name: ClassVar[str]
    reads_prompt: ClassVar[bool] = True  # False: the plan is known before the prompt is read
    queries: int = 0  # prompt queries whose attention `measure` looks at at the same time

    def measure(self, layer: Attended, budget: int, cap: int, floor: int) -> Tensor:
        """The evidence of each of R prompts about one layer, [R] or [R, numbers]. Here: SqueezeAttention's signal.

        budget, cap, floor: as in `allocate`, which gets the mean over all prompts.
        """
        return layer.signal

    def work(self, rows: int, budget: int, cap: int, floor: int, heads: int, head_dim: int) -> int:
        """Numbers that `measure` holds for so many prompts, however long they are; in fp32 at least."""
        return 0

    def allocate(self, evidence: Sequence[Any], budget: int, caps: Sequence[int], floor: int) -> Plan:
        """Slots per layer, `budget * L` in all or what the layers can use.

        evidence: of each layer, the mean of what `measure` said: a number or a list of numbers.
        budget: slots per layer of a uniform plan. caps: the most that each layer can use.
        floor: the token policy's minimum; a layer with a smaller cap needs only its cap.
        UserError: the budget does not cover the floors.
        """
        raise NotImplementedError

    def upper_bound(
        self, so_far: Sequence[Any], num_layers: int, budget: int, caps: Sequence[int], floor: int
    ) -> list[int]:
        """Slots that each layer seen so far cannot exceed, whatever evidence the remaining layers bring."""
        seen = len(so_far)
        if self.reads_prompt:
            return list(caps[:seen])
        return self.allocate([0.0] * num_layers, budget, caps, floor).slots[:seen]

    def most_waiting(self, budget: int, caps: Sequence[int], floor: int) -> int:
        """The most slots that the upper bounds of all layers seen can add up to while a prompt is read."""
        return sum(caps) if self.reads_prompt else total_slots(budget, caps, floor)


def importance(before: Tensor, after: Tensor, lengths: Tensor | None = None) -> Tensor:
    """SqueezeAttention's signal (arXiv 2404.04793): mean over a row's own tokens of cos(x, x + attention(x)).

    before, after [B, S, C]: the residual stream on either side of the attention branch. Returns [B], in fp32 (fp64 for
    an fp64 model). High: attention changed little, the layer is less important.
    """
    wide, norm = torch.promote_types(before.dtype, torch.float32), torch.linalg.vector_norm
    before, after = before.to(wide), after.to(wide)
    # F.cosine_similarity divides both by their norms first: two more copies, and more time than all of this.
    norms = (norm(before, dim=-1) * norm(after, dim=-1)).clamp_min(1e-8)
    cosine = torch.linalg.vecdot(before, after) / norms
    if lengths is None:
        return cosine.mean(-1)
    real = torch.arange(cosine.shape[1], device=cosine.device) < lengths[:, None]
    return cosine.masked_fill(~real, 0).sum(-1) / lengths


def mean_finite(evidence: Tensor) -> Tensor:
    """The mean [...] over those rows of [R, ...] that are finite; NaN without any. One broken row spoils no plan."""
    rows = evidence.reshape(len(evidence), -1)
    return rows.masked_fill(~rows.isfinite().all(1, keepdim=True), math.nan).nanmean(0).view(evidence.shape[1:])


def fit(wishes: Sequence[float], budget: int, caps: Sequence[int], floor: int, granule: int | None = None) -> list[int]:
    """Integers closest to the wishes: multiples of the granule within [floor, cap], or exactly a cap.

    They sum to `total_slots`, less a rest below one granule. What a cap strands goes evenly to the other layers, what a
    floor costs is taken evenly from them (`pour`). Reals are rounded down, then granules go out by largest remainder,
    ties by layer index. With equal caps a larger wish never gets fewer slots.
    """
    total = total_slots(budget, caps, floor)
    granule = granule or granule_size(budget, caps, floor)
    reals = pour(wishes, [round_up(floor, granule, cap) for cap in caps], caps, total)
    slots = [cap if real >= cap else int(real) // granule * granule for real, cap in zip(reals, caps, strict=True)]
    rest = total - sum(slots)
    for layer in sorted(range(len(slots)), key=lambda layer: slots[layer] - reals[layer]):
        step = min(granule, caps[layer] - slots[layer])
        if step <= rest:
            slots[layer] += step
            rest -= step
    return slots


def pour(wishes: Sequence[float], lows: Sequence[int], caps: Sequence[int], total: float) -> list[float]:
    """Water filling: all wishes shifted by one amount, each held within [low, cap], so that they sum to the total."""

    def shifted(by: float) -> list[float]:
        return [min(max(wish + by, low), cap) for wish, low, cap in zip(wishes, lows, caps, strict=True)]

    # The sum never falls as the shift grows, and it is linear between two edges.
    edges = sorted({end - wish for ends in (lows, caps) for end, wish in zip(ends, wishes, strict=True)})
    right = bisect_left(edges, total, key=lambda by: sum(shifted(by)))
    if right in (0, len(edges)):
        return shifted(edges[min(right, len(edges) - 1)])
    start, stop = edges[right - 1], edges[right]
    below, above = sum(shifted(start)), sum(shifted(stop))
    return shifted(start + (stop - start) * (total - below) / (above - below))


def total_slots(budget: int, caps: Sequence[int], floor: int) -> int:
    """Slots of all layers together: `budget * L`, or what they can use if that is less. UserError below the floors."""
    need = -(-sum(min(floor, cap) for cap in caps) // len(caps))
    if budget < need:
        raise UserError(
            f"a budget of {budget} slots per layer is below the {need} that the token policy needs: "
            f"raise --budget to at least {need}"
        )
    return min(budget * len(caps), sum(caps))


def granule_size(budget: int, caps: Sequence[int], floor: int) -> int:
    """Step of adaptive plans: 16, or an eighth of a small budget, halved until the floors, rounded up to it, fit."""
    total = total_slots(budget, caps, floor)
    granule = max(1, min(16, budget // 8))
    while sum(round_up(floor, granule, cap) for cap in caps) > total:
        granule //= 2
    return granule


def round_up(floor: int, granule: int, cap: int) -> int:
    """The fewest slots a layer may get: its floor as a multiple of the granule, or its cap."""
    return min(-(-floor // granule) * granule, cap)
