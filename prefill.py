"""Prompts on their way into a cache: read layer by layer, asked for evidence, each layer cut as soon as it is read."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltanet import DeltaNet
from formats import Stored
from kvcache import LayerCache, Recurrent
from model import Attention, Block, Causal, Transformer
from policies.layers import Plan, Uniform
from policies.layers.base import Attended, importance, mean_finite
from policies.tokens import TokenPolicy
from request import Request
from sizing import Sizes, Sizing, rows_at_once

Measure = Callable[[Attended], Tensor]


class NotFinite(Exception):
    """No prompt gives finite evidence, so no plan can be made."""


class Prompts(NamedTuple):
    """R prompts that are read together: ids [R, S], padded on the right; lengths [R]; rotary frequencies of each layer.

    Padding repeats a row's own last token. No token attends to it, but 0 * inf would be NaN: another token might
    overflow where the row's own do not.
    """

    ids: Tensor
    lengths: Tensor
    rotary: list[Tensor]
    ragged: bool  # whether any is padded

    @staticmethod
    def of(model: Transformer, prompts: Sequence[list[int]], limits: Sequence[int]) -> "Prompts":
        """limits: the tokens of each request in all, which decide how its positions are turned."""
        lengths = [len(ids) for ids in prompts]
        ids = torch.tensor([ids + ids[-1:] * (max(lengths) - len(ids)) for ids in prompts])
        tensors = ids.to(model.device), torch.tensor(lengths, device=model.device), model.rotary_of(limits)
        return Prompts(*tensors, ragged=min(lengths) < max(lengths))


class LayerPrompt:
    """What one layer holds of R prompts: keys and values, and scores [R, K, S] if its policy makes any.

    It can be cut again and again: what a token policy keeps in fewer slots is always among what it keeps in more.
    """

    def __init__(self, k: Tensor, v: Tensor, scores: Tensor | None = None):
        self.stored, self.scores = Stored(k, v), scores  # k, v [R, K, S, D]
        self.length = k.shape[2]  # S, whatever is cut
        self.positions: Tensor | None = None  # [R, 1 or K, n], ascending unless placed: what is left; None: all
        self.placed = False

    @property
    def size(self) -> int:
        """How many positions are left."""
        return self.stored.k.shape[2]

    def cut(self, positions: Tensor) -> None:
        """Keep these positions [R, 1 or K, n] only."""
        positions = positions.sort(dim=2).values
        self.stored, self.positions = self._at(positions), positions

    def place(self, positions: Tensor, scored: bool) -> None:
        """Keep these positions in this order, that of the slots; their scores too, if `scored`."""
        self.stored = self._at(positions)
        self.scores = self.scores.gather(2, positions.expand(*self.stored.k.shape[:3])) if scored else None
        self.positions, self.placed = positions, True

    @property
    def held(self) -> LayerCache:
        """What slots get of it."""
        return LayerCache(self.stored, self.scores, self.positions)

    def encode(self, format: str) -> None:
        """Into the form of slots, unless it is in it already."""
        if self.stored.k_scale is None:
            self.stored = Stored.of(self.stored.k, self.stored.v, format)

    def _at(self, positions: Tensor) -> Stored:
        at = positions
        if self.positions is not None:  # entries behind the end of a row may be gone: any others do
            at = torch.searchsorted(self.positions, positions.contiguous()).clamp(max=self.positions.shape[2] - 1)
        rows, heads, length = self.stored.k.shape[:3]
        first = torch.arange(rows * heads, device=at.device).view(rows, heads, 1) * length
        at = (first + at).flatten()  # whole rows of D elements: many times faster on a CPU than `gather`
        return self.stored.each(
            lambda part: part.flatten(0, 2).index_select(0, at).view(rows, heads, -1, *part.shape[3:])
        )


# Some of the rows that are read together, and what a layer holds of them.
Part = tuple[slice, LayerPrompt | Recurrent]


class Reading(Causal):
    """What a block attends to while it reads whole prompts, and what is found out about them meanwhile."""

    signal: Tensor  # [R], of `importance`
    evidence: Tensor | None = None  # [R, ...], what `measure` says
    prompt: LayerPrompt | Recurrent
    tensors: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    gate: Tensor | None = None

    def __init__(self, block: Block, policy: TokenPolicy, lengths: Tensor | None, measure: Measure | None):
        self.block, self.policy, self.lengths, self.measure = block, policy, lengths, measure

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, k_raw: Tensor, rotary: Tensor) -> Tensor:
        """As of `Causal`."""
        self.tensors = q, k, v, k_raw
        return attention.over_prompt(q, k, v)

    def recur(self, linear: DeltaNet, x: Tensor) -> Tensor:
        """As of `Causal`."""
        out, self.prompt = linear.run(x, lengths=self.lengths)
        return out

    def gated(self, gate: Tensor) -> None:
        """As of `Causal`."""
        self.gate = gate

    def moved(self, before: Tensor, after: Tensor) -> None:
        """Look at the layer while its tensors are there: signal, evidence, and what the prompt leaves behind."""
        self.signal = importance(before, after, self.lengths)
        if self.tensors is None:  # of linear attention
            return
        (q, k, v, k_raw), attention, policy = self.tensors, self.block.attention, self.policy
        gate, self.tensors, self.gate = self.gate, None, None
        scores = policy.score_prompt(q, k, v, self.lengths, attention.group_probs)
        if self.measure is not None:
            length, real = k.shape[2], self.lengths
            real = torch.full((len(k),), length, device=k.device) if real is None else real
            self.evidence = self.measure(
                Attended(
                    *(self.signal, after, q, k, v, real, attention.window, attention.logits, attention.sink_logits),
                    branch=lambda heads: self.block.branch(attention.out(heads)),
                    select=partial(policy.select, real, length, scores=scores),
                    gate=gate,
                )
            )
        k[:, :, : policy.sinks] = k_raw[:, :, : policy.sinks]
        self.prompt = LayerPrompt(k, v.contiguous(), scores)


def read(
    model: Transformer,
    prompts: Prompts,
    policies: Sequence[TokenPolicy],
    keep: Callable[[Tensor | None, list[Part]], None],
    measures: Sequence[Measure | None] | None = None,
) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Run prompts through the model; a generator that stops after each layer of each group of rows.

    Returns the logits [R, vocab] after each row's last token, and every layer's importance [L, R]. A row of which any
    is not finite has logits of NaN. keep(evidence [R, ...], parts) is called after each layer: what it does not keep
    is gone before the next one. The evidence is what the layer's own one of `measures` says.
    """
    ids, lengths, rotary, ragged = prompts
    count, length = ids.shape
    size = rows_at_once(length)
    groups = [slice(first, min(first + size, count)) for first in range(0, count, size)]
    real = [lengths[rows] if ragged else None for rows in groups]
    x, signals = model.embedded(ids, torch.arange(length, device=ids.device)[None]), []
    for block, frequencies, policy, measure in zip(
        model.layers, rotary, policies, measures or [None] * len(policies), strict=True
    ):
        done = []
        for rows, own in zip(groups, real, strict=True):
            reading = Reading(block, policy, own, measure)
            turned = frequencies[rows] if frequencies.dim() > 1 else frequencies
            x[rows] = block(x[rows], turned, reading)
            done.append(reading)
            yield
        signals.append(torch.cat([each.signal for each in done]))
        evidence = torch.cat([each.evidence for each in done]) if measure else None
        parts = [(rows, each.prompt) for rows, each in zip(groups, done, strict=True)]
        del done, reading
        keep(evidence, parts)
        del parts
    each = torch.stack(signals)
    logits = model.logits(x[torch.arange(count, device=ids.device), lengths - 1])
    return logits.masked_fill(~each.isfinite().all(0)[:, None], math.nan), each


def finished(steps: Generator[None, None, Any]) -> Any:
    """What a generator returns when nobody stops between its parts."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@torch.inference_mode()
def plan_for(
    model: Transformer, sizing: Sizing, requests: Iterable[Request], max_length: int, count: int | None = None
) -> tuple[Plan, list[float] | None]:
    """The plan, and the importance of each layer, for sequences of `max_length` tokens that begin with these.

    Prompts are read one by one, up to the first `count` whose evidence is finite, and nothing is kept of them. Where
    none is, the plan is the one for equal layers and the importance None.
    """
    sizes, signals, seen = sizing.at(max_length), [], []  # by prompt, of each layer
    for request in requests:
        found: list[Tensor] = []
        keep = lambda evidence, _, found=found: found.extend([] if evidence is None else [evidence])  # noqa: E731
        prompts = Prompts.of(model, [request.ids], [request.length])
        _, signal = finished(read(model, prompts, sizes.policies, keep, sizes.measures))
        if all(bool(part.isfinite().all()) for part in [*found, signal]):
            signals.append(signal[:, 0].tolist())
            seen.append(found)
        if len(signals) == count:
            break
    importance = [fmean(layer) for layer in zip(*signals, strict=True)] or None
    if sizes.plan is None and not seen:
        return replace(sizes, layer_policy=Uniform()).planned([]), importance
    evidence = [] if sizes.plan else [torch.cat(layer).mean(0).tolist() for layer in zip(*seen, strict=True)]
    return sizes.planned(evidence), importance


class Held:
    """Prompts that wait for the last layer to be read. Until then each layer is cut to the most that it can still get.

    plan: known at the end at the latest. layers: of each the parts, at the end as its slots hold them.
    """

    def __init__(self, prompts: Prompts, sizes: Sizes, format: str):
        self.prompts, self.sizes, self.format, self.plan = prompts, sizes, format, sizes.plan
        self.evidence: list[Any] = []  # of each layer, the mean over the prompts
        self.layers: list[list[Part]] = []

    def positions(self, row: int) -> list[Tensor]:
        """Of each layer, the positions [1 or K, n] of a prompt's tokens in the slots that they fill."""
        found = []
        for parts, slots in zip(self.layers, self.plan.slots, strict=True):
            [(rows, prompt)] = [part for part in parts if part[0].start <= row < part[0].stop]
            if not slots:
                found.append(torch.empty(1, 0, dtype=torch.int64))
                continue
            found.append(prompt.positions[row - rows.start, :, : min(slots, int(self.prompts.lengths[row]))].cpu())
        return found

    def keep(self, evidence: Tensor | None, parts: list[Part]) -> None:
        """Take in the next layer. NotFinite if its evidence is not, for any prompt."""
        if evidence is not None:
            mean = mean_finite(evidence).tolist()  # the layer's one wait for the device
            if not all(map(math.isfinite, mean if isinstance(mean, list) else [mean])):
                raise NotFinite
            self.evidence.append(mean)
        self.layers.append(parts)
        if self.plan is None and len(self.layers) == len(self.sizes.caps):
            self.plan = self.sizes.planned(self.evidence)
        bounds = self.plan.slots if self.plan else self.sizes.bounds(self.evidence)
        for parts, policy, slots in zip(self.layers, self.sizes.policies, bounds, strict=False):
            for rows, prompt in parts if slots else ():
                select = partial(policy.select, self.prompts.lengths[rows], prompt.length, scores=prompt.scores)
                if self.plan and not prompt.placed:
                    prompt.place(select(slots), policy.scored)
                elif not self.plan and slots < prompt.size:
                    prompt.cut(select(slots))
                prompt.encode(self.format)
