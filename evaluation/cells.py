"""The caches that are compared, and how rows are run through them. All that touches the engine's inside is here.

One prefill of a batch serves every layer policy, budget and p of a token policy: only plan, compaction and decoding
are done for each of them. What is decoded goes through the engine's own steps, with real evictions.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from decoder import Decoder
from engine import Engine, Request, check_budget
from kvcache import Memory, Prompt
from model import Transformer
from policies import layers as layer_policies
from policies import tokens as token_policies
from policies.layers import LayerPolicy
from policies.layers.base import Attended
from sampling import GREEDY


@dataclass(frozen=True)
class Cell:
    """One cache: a token policy, a layer policy (with p, if it has one) and a budget. The default is the full cache."""

    policy: str = "full"
    layers: str = "uniform"
    p: float | None = None
    budget: float | None = None

    def layer_policy(self) -> LayerPolicy:
        return layer_policies.make(self.layers, **({} if self.p is None else {"p": self.p}))


FULL = Cell()


def grid(policies: Sequence[str], layers: Sequence[str], ps: Sequence[float], budgets: Sequence[float]) -> list[Cell]:
    """The full cache, then every combination; p only where the layer policy has one. UserError for what none has."""
    for budget in budgets:
        check_budget(budget)
    cells = [FULL]
    for policy in dict.fromkeys(policies):
        if token_policies.make(policy).bounded:
            for name in dict.fromkeys(layers):
                has_p = "p" in {field.name for field in fields(layer_policies.make(name))}
                cells += [Cell(policy, name, p, budget) for budget in budgets for p in (ps if has_p else [None])]
    for cell in cells:
        cell.layer_policy()
    return cells


def check(model: Transformer, cell: Cell, ids: Sequence[int], new: int) -> None:
    """UserError, in one line, if `cell` cannot run a prompt with `new` tokens after it."""
    Engine(model, cell.policy, cell.layer_policy(), cell.budget).check(Request(ids, new))


class Batch:
    """Rows of token ids after the prefill under the one token policy of `cells`. Each may go on for `new` tokens.

    A batch has one plan for each cell, made from its rows' mean evidence. The rows are ones that `check` lets pass.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer, cells: Sequence[Cell], rows: Sequence[Sequence[int]], new: int):
        self.model, self.policy, self.new = model, cells[0].policy, new
        policy = self.policy
        engine = Engine(model, policy)
        self.requests = [Request(ids, new) for ids in rows]
        self.length = max(map(len, rows)) + new
        padded, self.lengths = engine._padded(self.requests)
        self.rotary, self.policies = engine._rotary(self.requests), engine._policies(self.length)
        self.prompts: list[Prompt] = []
        # What each layer policy wants to know of each layer [B, ...]. The smallest budget wants to know the most.
        asking = [own for own in {cell.layer_policy(): None for cell in cells} if own.reads_prompt]
        slots = min(self._slots(cell) for cell in cells)
        caps = engine._caps(self.length)
        self.evidence: dict[LayerPolicy, list[list[Tensor]]] = {own: [[] for _ in caps] for own in asking}
        signals: list[list[Tensor]] = [[] for _ in caps]

        def ask(seen: Attended, layer: int) -> Tensor:
            for own, found in self.evidence.items():
                found[layer].append(own.measure(seen, slots, caps[layer], engine.policy.floor))
            signals[layer].append(seen.signal)
            return seen.signal

        measures = [partial(ask, layer=layer) for layer in range(len(caps))]

        def keep(layer: int, _: Tensor | None, prompt: Prompt) -> None:
            self.prompts.append(prompt)

        self.logits, _ = engine._prefill(padded, self.lengths, self.rotary, self.policies, keep, measures)
        self.signals = torch.stack([torch.cat(layer) for layer in signals], dim=1)  # [B, L]

    def _slots(self, cell: Cell) -> int:
        return Engine(self.model, self.policy, cell.layer_policy(), cell.budget)._budget_slots(self.length)

    def _start(self, cell: Cell) -> Decoder:
        """A cache of its own for `cell`; `plan` and `kv_share` (of the full cache) say how large it is."""
        engine = Engine(self.model, self.policy, cell.layer_policy(), cell.budget)
        evidence = None
        if engine.layer_policy in self.evidence:
            evidence = [torch.cat(layer).mean(0).tolist() for layer in self.evidence[engine.layer_policy]]
        plan = engine._plan(evidence, self._slots(cell), self.length)
        self.plan, self.kv_share = plan.slots, sum(plan.slots) / sum(engine._caps(self.length))
        greedy, rows = [GREEDY] * len(self.requests), torch.arange(len(self.requests), device=engine.device)
        decoder, _ = engine._decoder(plan, self.policies, greedy, (), Memory())
        for layer, prompt in enumerate(self.prompts):
            decoder.keeper(rows, self.lengths)(layer, None, prompt)
        decoder.begin(rows, self.lengths, self.logits, greedy, self.rotary)
        return decoder

    @torch.inference_mode()
    def forced(self, cell: Cell, following: Tensor) -> Iterator[Tensor]:
        """Feed following [B, T], whatever the model would say; yields the logits [B, vocab] after each.

        Policies that place a token by its position take all T at once, which is the same as one by one.
        """
        decoder = self._start(cell)
        if not decoder.policies[0].scored:
            for x in decoder.append(following.to(self.lengths.device)).unbind(1):
                yield self.model.logits(x)
            return
        for tokens in following.to(self.lengths.device).T:
            decoder.tokens.copy_(tokens)
            yield decoder.logits()

    @torch.inference_mode()
    def greedy(self, cell: Cell, eos_ids: Collection[int] = ()) -> list[list[int]]:
        """Each row's most likely continuation: `new` tokens, or up to its end-of-sequence token, left out."""
        decoder = self._start(cell)
        steps = [decoder.tokens.tolist()]
        ended = [token in eos_ids for token in steps[0]]
        while len(steps) < self.new and not all(ended):
            decoder.step()
            steps.append(decoder.tokens.tolist())
            ended = [before or token in eos_ids for before, token in zip(ended, steps[-1], strict=True)]
        rows = [list(row) for row in zip(*steps, strict=True)]
        return [row[: next((n for n, token in enumerate(row) if token in eos_ids), len(row))] for row in rows]
