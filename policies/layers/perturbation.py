"""Perturbation: layers that eviction would change the most get the most.

SqueezeAttention asks how far attention moves a layer's residual stream. What a small cache costs is how far *eviction*
moves it. For layer l and n slots, over some of a prompt's queries i:

    e_l(n) = mean_i |a(i) - a_n(i)|^2 / |x(i) + a(i)|^2

where a is what the attention branch adds to the stream x, and a_n is the same when the query reads only what the token
policy keeps of the prompt in n slots, itself, and the tokens just before it: those would still be there, had the prompt
ended with it. Without them the queries in the middle would charge each layer for its local attention. The plan is the
one with the least `sum_l w_l e_l(n_l)` at the total: slots go where the next ones lower the sum the most, along the
lower convex hull of each curve (as in LU-KV). What a layer's error does to the output grows about linearly with the
depth at which it enters, hence the weights.

One block of attention per layer gives the whole curve. A policy keeps in fewer slots a subset of what it keeps in more,
so the tokens can be put in order of the size from which on they are kept; the sums over the tokens of one size and not
of the size before, added up from size to size, are what the softmax over each size needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errors import UserError, shown
from policies.layers.base import Attended, LayerPolicy, Plan, granule_size, round_up, total_slots

LEAST = 0.3  # of a uniform share, that every layer gets
NEAR = 64  # tokens before a query that it reads whatever is kept; with few slots half as many as there are slots
WEIGHTS = {"depth": lambda share: share, "sqrt": lambda share: share**0.5, "none": lambda share: 1.0}
WHERE = ("last", "spread", "both")
MOST_QUERIES = 1024  # of all rows together, whose attention over the whole prompt is held at once


@dataclass(frozen=True)
class Perturbation(LayerPolicy):
    """weights: of layer l of L, a function of (l + 1) / L: "depth", "sqrt" (its root), "none"; or a number per layer.
    where: which queries: the prompt's "last" ones, "spread" over its last three quarters, or half of "both".
    queries: how many.
    """

    weights: str | tuple[float, ...] = "depth"
    where: str = "both"
    queries: int = 64
    name: ClassVar[str] = "perturbation"

    def __post_init__(self):
        if isinstance(self.weights, str):
            if self.weights not in WEIGHTS:
                raise UserError(f"weights must be one of {', '.join(WEIGHTS)}, or numbers, not {shown(self.weights)}")
        elif not (isinstance(self.weights, tuple) and all(type(w) in (int, float) and w > 0 for w in self.weights)):
            raise UserError(f"weights must be a name or positive numbers, not {shown(self.weights)}")
        if self.where not in WHERE:
            raise UserError(f"where must be one of {', '.join(WHERE)}, not {shown(self.where)}")
        if type(self.queries) is not int or not 2 <= self.queries <= MOST_QUERIES:
            raise UserError(f"queries must be an integer from 2 to {MOST_QUERIES}, not {shown(self.queries)}")

    def measure(self, layer: Attended, budget: int, cap: int, floor: int) -> Tensor:
        """The curve e [R, sizes] at `sizes_of(budget, cap, floor)`. A few rows at a time: many short prompts come."""
        select, rows = cache(layer.select), self._rows
        parts = [slice(first, first + rows) for first in range(0, len(layer.lengths), rows)]
        return torch.cat([self._curve(part_of(layer, part, select), budget, cap, floor) for part in parts])

    @property
    def _rows(self) -> int:
        return max(1, MOST_QUERIES // self.queries)

    def work(self, rows: int, budget: int, cap: int, floor: int, heads: int, head_dim: int) -> int:
        sizes = len(sizes_of(budget, cap, floor)) + 1
        return min(rows, self._rows) * sizes * self.queries * heads * (3 * head_dim + NEAR + 1)

    def _curve(self, layer: Attended, budget: int, cap: int, floor: int) -> Tensor:
        length = layer.k.shape[2]
        asked, real = self._asked(layer.lengths, layer.window)
        sizes = [min(size, length) for size in sizes_of(budget, cap, floor)]
        out = readings(layer, sizes, asked)
        if layer.gate is not None:
            out = out * layer.gate.gather(1, asked[..., None].expand(*asked.shape, out.shape[-1]))
        added = layer.branch(out)
        wide = torch.promote_types(added.dtype, torch.float32)
        added = added.to(wide)
        after = layer.after.gather(1, asked[..., None].expand(-1, -1, layer.after.shape[2])).to(wide)
        errors = (added[:-1] - added[-1]).square().sum(-1) / after.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
        return (errors * real).sum(-1).T / real.sum(-1)[:, None]

    def allocate(self, evidence: Sequence[Any], budget: int, caps: Sequence[int], floor: int) -> Plan:
        return Plan(self._handed_out(evidence, budget, caps, floor))

    def upper_bound(
        self, so_far: Sequence[Any], num_layers: int, budget: int, caps: Sequence[int], floor: int
    ) -> list[int]:
        """What the layers seen get if no other asks for more than its least: together one budget at most.

        What is handed out beyond everybody's least is the same then, and goes out in the same order but for the other
        layers, which can only come in between: a layer's share falls.
        """
        return self._handed_out(so_far, budget, caps, floor)

    def most_waiting(self, budget: int, caps: Sequence[int], floor: int) -> int:
        return total_slots(budget, caps, floor)

    def _handed_out(self, evidence: Sequence[Any], budget: int, caps: Sequence[int], floor: int) -> list[int]:
        """Slots of the layers that there is evidence of; the others get their least.

        Granule by granule to the layer in which the next one lowers the sum the most; of equal gains the first ones of
        all layers come before the second ones. It ends with the first granule that the total does not cover.
        """
        total, granule = total_slots(budget, caps, floor), granule_size(budget, caps, floor)
        lows = [round_up(max(floor, int(LEAST * budget)), granule, cap) for cap in caps]
        if sum(lows) > total:
            lows = [round_up(floor, granule, cap) for cap in caps]
        slots, weights, each = lows[: len(evidence)], self._weights(len(caps)), []
        for curve, weight, low, cap in zip(evidence, weights, lows, caps, strict=False):
            sizes = tuple(sizes_of(budget, cap, floor))
            each.append(granules(weight, sizes, tuple(curve[-len(sizes) :]), low, granule))
        if each:
            gains, steps = map(pad_sequence, zip(*each, strict=True))  # [most, layers], padded with nothing for 0
            order = gains.flatten().argsort(descending=True, stable=True)
            steps = steps.flatten()[order]
            given = steps.where(steps.cumsum(0) <= total - sum(lows), 0)
            slots = torch.tensor(slots, device="cpu").index_add(0, order % len(slots), given).tolist()
        return slots

    def _weights(self, layers: int) -> list[float]:
        if isinstance(self.weights, str):
            return [WEIGHTS[self.weights]((layer + 1) / layers) for layer in range(layers)]
        if len(self.weights) != layers:
            raise UserError(f"perturbation has {len(self.weights)} weights, the plan {layers} layers")
        return list(self.weights)

    def _asked(self, lengths: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Positions [R, W] of the queries, and which of them [R, W] there are: a prompt may have fewer."""
        index = torch.arange(self.queries, device=lengths.device)
        lengths = lengths[:, None]
        last = lengths - self.queries + index
        if self.where == "last":
            return last.clamp(min=0), last >= 0
        span = lengths if window is None else lengths.clamp(max=window)
        count = self.queries if self.where == "spread" else self.queries // 2
        start = lengths - (3 * span + 3) // 4
        spread = torch.maximum(start, start + (index[:count] + 1) * (lengths - start) // count - 1)
        asked = torch.cat((spread, last[:, count:]), dim=1)
        return asked.clamp(min=0), asked >= 0


def sizes_of(budget: int, cap: int, floor: int) -> list[int]:
    """The sizes of a curve: those of 1, 2, 3, 4, 6, 8, 12, ... from the least share, or just under it, and cap.

    Those of a larger budget are the end of those of a smaller one.
    """
    grid = [1, *(size for power in range(1, cap.bit_length() + 1) for size in (2**power, 3 * 2 ** (power - 1)))]
    least = max(int(LEAST * budget), floor)
    first = max(size for size in grid if size <= least)
    return [*(max(size, floor) for size in grid if first <= size and max(size, floor) < cap), cap]


def part_of(layer: Attended, rows: slice, select: Callable[[int], Tensor]) -> Attended:
    """Some of the rows; `select` answers for all."""
    names = ("signal", "after", "q", "k", "v", "lengths", "gate")
    own = {name: part[rows] for name in names if (part := getattr(layer, name)) is not None}
    return layer._replace(**own, select=lambda slots: select(slots)[rows])


def readings(layer: Attended, sizes: Sequence[int], asked: Tensor) -> Tensor:
    """What queries at `asked` [R, W] read from each size, and last from all that they see: [sizes + 1, R, W, H * D]."""
    heads, length, dim = layer.k.shape[1:]
    window, device = layer.window or length, asked.device
    first = first_kept(layer, sizes)  # [R, K, S]
    order = first.argsort(dim=2, stable=True)  # the first n are what n slots keep

    def at(x: Tensor, positions: Tensor) -> Tensor:  # positions [R, heads, n]
        return x.gather(2, positions[..., None].expand(*positions.shape, dim))

    queries = at(layer.q, asked[:, None].expand(-1, layer.q.shape[1], -1))
    logits = layer.logits(queries, at(layer.k, order))  # [R, K, G, W, S]
    values = at(layer.v, order).to(logits.dtype)[:, :, None]

    # Apart from these, of each query its own token and those near it: N of them, the nearest first.
    widths = [min(NEAR, size // 2) for size in sizes]
    back = torch.arange(min(NEAR, sizes[-1] // 2, window - 1) + 1, device=device)
    near = asked[..., None] - back  # [R, W, N]
    unreal = (near < 0)[:, None, None]
    near = near.clamp(min=0).flatten(1)[:, None].expand(-1, heads, -1)
    split = partial(torch.unflatten, dim=2, sizes=(-1, len(back)))
    first_near = torch.minimum(split(first.gather(2, near)), sum((back > width).long() for width in widths))
    rank = split(order.argsort(dim=2).gather(2, near))[:, :, None]  # where they are in the order
    near_logits = logits.gather(4, rank.expand(*logits.shape[:4], -1)).masked_fill(unreal, float("-inf"))
    near_values = split(at(layer.v, near)).to(logits.dtype)  # [R, K, W, N, D]
    distance = (asked[:, None, :, None] - order[:, :, None])[:, :, None]
    logits.masked_fill_((distance < len(back)) | (distance >= window), float("-inf"))

    top = torch.maximum(logits.amax(-1, keepdim=True), near_logits.amax(-1, keepdim=True))
    shares, near_shares = (logits - top).exp_(), (near_logits - top).exp_()
    edges = [0, *sizes, length]
    parts = [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]
    read = torch.stack([shares[..., part] @ values[..., part, :] for part in parts]).cumsum(0)
    mass = torch.stack([shares[..., part].sum(-1, keepdim=True) for part in parts]).cumsum(0)

    count = torch.arange(len(parts), device=device).view(-1, 1, 1, 1, 1)
    near_shares = near_shares * (first_near <= count)[:, :, :, None]  # [sizes + 1, R, K, G, W, N]
    every = near_shares.permute(1, 2, 4, 0, 3, 5).flatten(3, 4) @ near_values  # [R, K, W, (sizes + 1) * G, D]
    read = read + every.unflatten(3, (len(parts), -1)).permute(3, 0, 1, 4, 2, 5)
    mass = mass + near_shares.sum(-1, keepdim=True)
    if layer.sink_logits is not None:
        mass = mass + (layer.sink_logits.to(top.dtype).view(heads, -1, 1, 1) - top).exp()
    read = (read / mass.clamp_min(torch.finfo(mass.dtype).tiny)).to(layer.v.dtype)  # [sizes + 1, R, K, G, W, D]
    return read.permute(0, 1, 4, 2, 3, 5).flatten(3)


def first_kept(layer: Attended, sizes: Sequence[int]) -> Tensor:
    """The number of the smallest of the sizes that keeps a token [R, K, S]; `len(sizes)` if none does."""
    rows, heads, length, _ = layer.k.shape
    first = torch.full((rows, heads, length), len(sizes), device=layer.k.device)
    for number in reversed(range(len(sizes))):
        first.scatter_(2, layer.select(sizes[number]).expand(-1, heads, -1), number)
    padding = torch.arange(length, device=layer.k.device) >= layer.lengths[:, None]
    return first.masked_fill_(padding[:, None], len(sizes))


@lru_cache(maxsize=128)  # while layers come in, those before are asked for again and again
def granules(
    weight: float, sizes: tuple[int, ...], curve: tuple[float, ...], low: int, granule: int
) -> tuple[Tensor, Tensor]:
    """What a layer can get beyond `low`, in order: the weighted gain per slot of each granule, and its slots."""
    ends = [*range(low, sizes[-1], granule), sizes[-1]]
    gains = falling(lower_hull(restricted(sizes, curve, low)), ends)
    return weight * torch.tensor(gains, dtype=torch.float64, device="cpu"), torch.tensor(ends, device="cpu").diff()


def restricted(sizes: Sequence[int], curve: Sequence[float], low: int) -> list[tuple[int, float]]:
    """The points of a curve from `low` on, never rising; at `low` itself it is interpolated."""
    points = list(zip(sizes, curve, strict=True))
    before = [point for point in points if point[0] <= low]
    after = [point for point in points if point[0] > low]
    if before and after:
        (left, high), (right, deep) = before[-1], after[0]
        at_low = high + (deep - high) * (low - left) / (right - left)
    else:
        at_low = before[-1][1] if before else after[0][1]
    least, falling = at_low, [(low, at_low)]
    for size, error in after:
        least = min(least, error)
        falling.append((size, least))
    return falling


def lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those of the points, in ascending order, that make the lower convex hull."""
    edge: list[tuple[int, float]] = []
    for point in points:
        while len(edge) > 1 and slope(edge[-2], edge[-1]) >= slope(edge[-1], point):
            edge.pop()
        edge.append(point)
    return edge


def slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def falling(points: Sequence[tuple[int, float]], ends: Sequence[int]) -> list[float]:
    """How much a convex curve through the points, read linearly between them, falls per slot from end to end."""
    gains, segment = [], 0
    for start, stop in zip(ends, ends[1:], strict=False):
        fall, at = 0.0, start
        while at < stop:
            while points[segment + 1][0] <= at:
                segment += 1
            until = min(stop, points[segment + 1][0])
            fall -= slope(points[segment], points[segment + 1]) * (until - at)
            at = until
        # Rounding does not let a later step gain more than an earlier one.
        gains.append(min(fall / (stop - start), gains[-1] if gains else fall / (stop - start)))
    return gains
