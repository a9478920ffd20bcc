"""Squeeze: layers whose attention changes little get less (SqueezeAttention, arXiv 2404.04793).

3-means on the signals of the L layers. The cluster with the highest mean, n layers that matter least, is squeezed to
`p * b` slots each (b: the budget); every other layer gets `b * (L - n * p) / (L - n)`. With fewer than 3 distinct
signals the plan is uniform.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import ClassVar

from errors import UserError, shown
from policies.layers.base import LayerPolicy, Plan, fit, granule_size, pour, total_slots


@dataclass(frozen=True)
class Squeeze(LayerPolicy):
    """p: what the squeezed layers keep of their uniform share, in (0, 1]."""

    p: float = 0.3
    name: ClassVar[str] = "squeeze"

    def __post_init__(self):
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 < self.p <= 1:
            raise UserError(f"p must be in (0, 1], not {shown(self.p)}")

    def allocate(self, signals: Sequence[float], budget: int, caps: Sequence[int], floor: int) -> Plan:
        groups = three_means(signals)
        if 2 not in groups:
            return Plan(fit([budget] * len(groups), budget, caps, floor, granule=1), groups)
        return Plan(fit(self._wishes([group == 2 for group in groups], budget), budget, caps, floor), groups)

    def upper_bound(
        self, signals_so_far: Sequence[float], num_layers: int, budget: int, caps: Sequence[int], floor: int
    ) -> list[int]:
        """What a layer gets if all layers are squeezed but those with no higher a signal so far, plus one granule.

        Clusters are intervals of the signal: if the layer is not squeezed, neither are those j with no higher a signal.
        So its wish is at most `b * (L - (L - j) * p) / j = p * b + L * b * (1 - p) / j`, the j wish for no less than it
        does, and the others for `p * b` at least. Hence no completion can `pour` it more than these wishes do, with
        any floors and caps. As signals come in, j grows and the bounds only fall.
        """
        if len(signals_so_far) == num_layers:
            return self.allocate(signals_so_far, budget, caps, floor).slots
        check_finite(signals_so_far)
        granule, total = granule_size(budget, caps, floor), total_slots(budget, caps, floor)
        floors = [min(floor, cap) for cap in caps]
        signals = [*signals_so_far] + [math.inf] * (num_layers - len(signals_so_far))
        bounds = []
        for layer, signal in enumerate(signals_so_far):
            wishes = self._wishes([other > signal for other in signals], budget)
            most = wishes[layer]
            if most < caps[layer] and not floor <= self.p * budget <= most <= min(caps):  # pour changes the wishes
                most = pour(wishes, floors, caps, total)[layer]
            most *= 1 + 1e-9  # float rounding
            bounds.append(min(caps[layer], int(most) // granule * granule + granule))
        return bounds

    def most_waiting(self, budget: int, caps: Sequence[int], floor: int) -> int:
        """With equal caps p + (1 - p) H_L budgets and a granule a layer, at most: all but one layer, no two tied."""
        if len(set(caps)) > 1:
            return super().most_waiting(budget, caps, floor)
        return sum(self.upper_bound([float(rank) for rank in range(len(caps) - 1)], len(caps), budget, caps, floor))

    def _wishes(self, squeezed: Sequence[bool], budget: int) -> list[float]:
        layers, few = len(squeezed), sum(squeezed)
        low, high = self.p * budget, budget * (layers - few * self.p) / (layers - few)
        return [low if own else high for own in squeezed]


def three_means(signals: Sequence[float]) -> list[int]:
    """Cluster of each layer, 0..2 ascending by signal, with the least squared error of all clusterings.

    In one dimension the best clusters are intervals that never part equal values, so every pair of cuts between
    distinct values is tried: no seeds, no iterations. Of equally good pairs the lowest cuts win. Fewer than 3 distinct
    signals: each layer gets the rank of its value (0 or 1). UserError for a signal that is not finite.
    """
    check_finite(signals)
    layers = len(signals)
    order = sorted(range(layers), key=lambda layer: signals[layer])

    # Floats are integers over powers of two: over the largest of these the arithmetic is exact.
    ratios = [signals[layer].as_integer_ratio() for layer in order]
    denominator = max(bottom for _, bottom in ratios)
    values = [top * (denominator // bottom) for top, bottom in ratios]
    sums = list(accumulate(values, initial=0))

    # Error = sum of squares - sum over clusters of (sum of values)^2 / size. The latter is maximised, times a common
    # multiple of all sizes so that it stays an integer.
    multiple = math.lcm(*range(1, layers + 1))
    shares = [0] + [multiple // size for size in range(1, layers + 1)]

    def gain(start: int, stop: int) -> int:
        return (sums[stop] - sums[start]) ** 2 * shares[stop - start]

    cuts = [rank for rank in range(1, layers) if values[rank - 1] < values[rank]]
    if len(cuts) > 2:
        firsts, lasts = {cut: gain(0, cut) for cut in cuts}, {cut: gain(cut, layers) for cut in cuts}
        cuts = max(combinations(cuts, 2), key=lambda pair: firsts[pair[0]] + gain(*pair) + lasts[pair[1]])
    groups = [0] * layers
    for rank, layer in enumerate(order):
        groups[layer] = bisect_right(cuts, rank)
    return groups


def check_finite(signals: Sequence[float]) -> None:
    for layer, signal in enumerate(signals):
        if not math.isfinite(signal):
            raise UserError(f"importance signal of layer {layer} is {signal}, not a finite number")
