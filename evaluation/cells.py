"""The caches that are compared, and how rows are run through them. All that touches the engine's inside is here.

One prefill of a batch serves every cell: the forward pass is the same for all token policies, which look at each layer
in turn while its tensors are there, and K and V are kept once. Only plan, compaction and decoding are done for each
cell. What is decoded goes through the engine's own steps, with real evictions.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from decoder import Decoder
from engine import Engine
from errors import UserError
from model import Transformer
from policies import layers as layer_policies
from policies import tokens as token_policies
from policies.layers import LayerPolicy
from policies.layers.base import Attended
from policies.tokens import TokenPolicy
from prefill import LayerPrompt, Part, Prompts, finished, read
from sampling import GREEDY, NOT_FINITE, not_finite
from sizing import check_budget


@dataclass(frozen=True)
class Cell:
    """One cache: a token policy, a layer policy and a budget. The default is the full cache.

    The policies are words of a command line, with their options: see policies/options.py.
    """

    policy: str = "full"
    layers: str = "uniform"
    budget: float | None = None

    def token_policy(self) -> TokenPolicy:
        return token_policies.make(self.policy)

    def layer_policy(self) -> LayerPolicy:
        return layer_policies.make(self.layers)


FULL = Cell()
LOGITS = 2**24  # of tokens that were fed together, the most that are computed at once


def grid(policies: Sequence[str], layers: Sequence[str], budgets: Sequence[float]) -> list[Cell]:
    """The full cache, then every combination. UserError for what does not exist."""
    for budget in budgets:
        check_budget(budget)
    bounded = [word for word in dict.fromkeys(policies) if token_policies.make(word).bounded]
    cells = [Cell(*own) for own in product(bounded, dict.fromkeys(layers), budgets)]
    for cell in cells:
        cell.layer_policy()
    return [FULL, *cells]


def check(model: Transformer, cell: Cell, ids: Sequence[int], new: int) -> None:
    """UserError, in one line, if `cell` cannot run a prompt with `new` tokens after it."""
    sizing = _engine(model, cell).sizing
    sizing.check(ids, new)
    sizing.at(len(ids) + new)


def _engine(model: Transformer, cell: Cell, compile: bool = False) -> Engine:
    engine = Engine(model, cell.token_policy(), cell.layer_policy(), cell.budget, compile=compile)
    engine.code.capture = None  # of each cache only a few steps are run
    return engine


class Looking(TokenPolicy):
    """Token policies of one layer that look at the same prompts. What they score is kept here, not handed on.

    The first keys come unrotated if any of the policies has sinks; `turned` are the same ones rotated.
    """

    def __init__(self, policies: Sequence[TokenPolicy]):
        self.policies, self.sinks = policies, max(policy.sinks for policy in policies)
        self.scores: list[list[Tensor | None]] = []  # of each part of the batch, by each policy
        self.turned: list[Tensor] = []

    def score_prompt(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, probs: Callable) -> None:
        self.turned.append(k[:, :, : self.sinks].clone())
        self.scores.append([policy.score_prompt(q, k, v, lengths, probs) for policy in self.policies])


class Batch:
    """Rows of token ids after the prefill that serves `cells`. Each may go on for `new` tokens.

    A batch has one plan for each cell, made from its rows' mean evidence. The rows are ones that `check` lets pass.
    The full cache is always among the cells. compile: steps of one token go through compiled code.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        cells: Sequence[Cell],
        rows: Sequence[Sequence[int]],
        new: int,
        compile: bool = False,
    ):
        self.model, self.new, self.compile = model, new, compile
        cells = list(dict.fromkeys([FULL, *cells]))
        self.words = list(dict.fromkeys(cell.policy for cell in cells))
        self.count, self.length = len(rows), max(map(len, rows)) + new
        sizings = [Engine(model, word).sizing for word in self.words]
        caps = sizings[0].caps(self.length)
        self.prompts = Prompts.of(model, rows, [len(ids) + new for ids in rows])
        self.lengths = self.prompts.lengths
        self.policies = [sizing.policies(self.length) for sizing in sizings]  # by token policy and layer
        looking = [Looking(own) for own in zip(*self.policies, strict=True)]
        # What each layer policy wants to know of each layer [B, ...]. The smallest budget wants to know the most.
        smallest: dict[tuple[str, LayerPolicy], int] = {}
        for cell in cells:
            if (own := cell.layer_policy()).reads_prompt:
                slots = _engine(model, cell).sizing.at(self.length).budget_slots
                smallest[cell.policy, own] = min(smallest.get((cell.policy, own), self.length), slots)
        self.evidence: dict[tuple[str, LayerPolicy], list[list[Tensor]]] = {
            asks: [[] for _ in caps] for asks in smallest
        }

        def ask(seen: Attended, layer: int) -> Tensor:
            for (word, own), found in self.evidence.items():
                number = self.words.index(word)
                policy, scores = looking[layer].policies[number], looking[layer].scores[-1][number]
                select = partial(policy.select, seen.lengths, seen.k.shape[2], scores=scores)
                floor, slots = sizings[number].policy.floor, smallest[word, own]
                found[layer].append(own.measure(seen._replace(select=select), slots, caps[layer], floor))
            return seen.signal

        measures = [partial(ask, layer=layer) if cap else None for layer, cap in enumerate(caps)]
        # Of each layer the parts of the batch, and the first keys unrotated.
        self.layers: list[list[tuple[Part, Tensor]]] = []

        def keep(_: Tensor | None, parts: list[Part]) -> None:
            sinks = looking[len(self.layers)].sinks
            if caps[len(self.layers)]:
                self.layers.append([(part, part[1].stored.k[:, :, :sinks].clone()) for part in parts])
            else:
                self.layers.append([(part, None) for part in parts])

        self.looking = looking
        self.logits, signals = finished(read(model, self.prompts, looking, keep, measures))
        self.signals = signals.T  # [B, L]
        self._check(self.logits)

    def _check(self, logits: Tensor) -> None:
        """UserError if there is no next token in the logits [B, vocab] of a row: no figure may come of them."""
        if not logits.amax(-1).isfinite().all():
            raise UserError(not_finite(self.model.dtype))

    def _start(self, cell: Cell) -> Decoder:
        """A cache of its own for `cell`; `plan` and `kv_share` (of the full cache) say how large it is."""
        engine, evidence, number = _engine(self.model, cell, self.compile), [], self.words.index(cell.policy)
        if found := self.evidence.get((cell.policy, engine.layer_policy)):
            evidence = [torch.cat(layer).mean(0).tolist() for layer in found if layer]
        sizes = engine.sizing.at(self.length)
        self.plan = sizes.planned(evidence).slots
        self.kv_share = sum(self.plan) / sum(sizes.caps)
        policies = self.policies[number]
        layers = []
        for parts, looking, policy, slots in zip(self.layers, self.looking, policies, self.plan, strict=True):
            if not slots:
                layers.append([part for part, _ in parts])
                continue
            own, sinks = [], policy.sinks
            for ((rows, prompt), raw), turned, scores in zip(parts, looking.turned, looking.scores, strict=True):
                k, v = prompt.stored[:2]
                k[:, :, : raw.shape[2]] = torch.cat((raw[:, :, :sinks], turned[:, :, sinks:]), dim=2)
                placed = LayerPrompt(k, v, scores[number])
                placed.place(policy.select(self.lengths[rows], prompt.length, slots, scores[number]), policy.scored)
                own.append((rows, placed))
            layers.append(own)
        decoder, _ = engine.decoder(self.plan, self.count, policies, ())
        rows, greedy = torch.arange(self.count, device=engine.device), [GREEDY] * self.count
        decoder.begin(rows, self.lengths, layers, self.logits, greedy, self.prompts.rotary)
        return decoder

    @torch.inference_mode()
    def forced(self, cell: Cell, following: Tensor) -> Iterator[Tensor]:
        """Feed following [B, T], whatever the model would say; yields the logits [B, vocab] after each.

        Policies that place a token by its position take all T at once, which is the same as one by one.
        """
        decoder = self._start(cell)
        if not decoder.slots[0].policy.scored:
            size = max(1, LOGITS // (len(following) * self.model.config.vocab_size))
            for x in decoder.append(following.to(self.model.device)):
                for part in x.split(size, dim=1):
                    for logits in self.model.logits(part).unbind(1):
                        self._check(logits)
                        yield logits
            return
        for tokens in following.to(self.model.device).T:
            decoder.tokens.copy_(tokens)
            logits = decoder.logits()
            self._check(logits)
            yield logits

    @torch.inference_mode()
    def greedy(
        self, cell: Cell, eos_ids: Collection[int] = (), questions: Sequence[Sequence[int]] = ()
    ) -> list[list[int]]:
        """Each row's most likely continuation: `new` tokens, or up to its end-of-sequence token, left out.

        questions: of each row, all of one length, read behind the compressed prompt as a conversation's later turn is;
        they count among the `new` tokens.
        """
        decoder, asked = self._start(cell), len(questions[0]) if len(questions) else 0
        if asked:
            *_, x = decoder.append(torch.tensor(questions, device=self.model.device))
            logits = self.model.logits(x[:, -1])
            self._check(logits)
            decoder.tokens.copy_(decoder.sampler(logits))
        steps = [decoder.tokens.tolist()]
        ended = [token in eos_ids for token in steps[0]]
        while len(steps) < self.new - asked and not all(ended):
            decoder.step()
            steps.append(decoder.tokens.tolist())
            if any(token == NOT_FINITE and not end for token, end in zip(steps[-1], ended, strict=True)):
                raise UserError(not_finite(self.model.dtype))
            ended = [before or token in eos_ids for before, token in zip(ended, steps[-1], strict=True)]
        rows = [list(row) for row in zip(*steps, strict=True)]
        return [row[: next((n for n, token in enumerate(row) if token in eos_ids), len(row))] for row in rows]
