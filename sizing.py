"""How large a cache is for sequences of some length: pure arithmetic, without a model.

A length is the most tokens that a prompt and its answer have together. `Sizing.at` says once all that follows from it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from config import ModelConfig, parameters
from errors import UserError, integers, shown
from formats import FORMATS, slot_bytes
from policies.layers import LayerPolicy, Plan
from policies.layers.base import total_slots
from policies.tokens import TokenPolicy
from request import longest, refusal

READ_TOKENS = 16384  # of all prompts of a batch, that go through a block at once: more take memory, not less time
DEFAULT_BUDGET = 0.4  # of the sequence, for a bounded policy without a budget: see KL at 40% in RESULTS.md
SMALLEST_DEFAULT = 64  # slots: below that there is nothing to gain
CAPTURED_LENGTHS = 256  # tokens: sequences within a multiple of it get the same part of a plan that is given


@dataclass(frozen=True)
class Sizes:
    """A cache for sequences of one length.

    caps: the most slots that each layer can use, 0 of one of linear attention, of which the layer policy does not know;
    evidence is of the others in turn. budget_slots: those of a uniform plan, per layer. policies: of each
    layer, the token policy in its own form there. plan: None if it takes the evidence of prompts.
    """

    caps: list[int]
    budget_slots: int
    floor: int
    policies: list[TokenPolicy]
    layer_policy: LayerPolicy
    plan: Plan | None

    def planned(self, evidence: Sequence[Any]) -> Plan:
        """Slots per layer, by each layer's evidence if that decides."""
        if self.plan:
            return self.plan
        plan = self.layer_policy.allocate(evidence, self.budget_slots, self.used, self.floor)
        return Plan(self._each(plan.slots, 0), plan.groups and self._each(plan.groups, None))

    def bounds(self, evidence: Sequence[Any]) -> list[int]:
        """The most slots that each layer can get, up to the last of which there is evidence."""
        used = self.used
        return self._each(self.layer_policy.upper_bound(evidence, len(used), self.budget_slots, used, self.floor), 0)

    @property
    def used(self) -> list[int]:
        """The caps of the layers that have slots."""
        return [cap for cap in self.caps if cap]

    def _each(self, values: Iterable[Any], other: Any) -> list[Any]:
        """One for every layer: `values` are of those that have slots in turn."""
        values = iter(values)
        return [next(values, other) if cap else other for cap in self.caps]

    @property
    def measures(self) -> list[Callable | None] | None:
        """What asks each layer for its evidence, where the plan needs it."""
        own = partial(self.layer_policy.measure, budget=self.budget_slots, floor=self.floor)
        return None if self.plan else [partial(own, cap=cap) if cap else None for cap in self.caps]

    @property
    def total(self) -> int:
        """Slots of all layers, at the most."""
        return sum(self.plan.slots) if self.plan else total_slots(self.budget_slots, self.used, self.floor)


class Sizing:
    """What `config` asks of a cache under these policies.

    budget: slots per layer, a share of the length, or None for one that suits it. plan: slots per layer, instead of
    what the layer policy and the budget would give. captured: what is captured is for one plan, so many lengths share
    one. format: how slots hold keys and values (formats.py). weights: bytes of the model's, None if all are numbers of
    `dtype`. UserError for a budget or a plan that makes no sense.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: TokenPolicy,
        layer_policy: LayerPolicy,
        budget: float | None = None,
        plan: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        captured: bool = False,
        format: str = "dense",
        weights: int | None = None,
    ):
        self.config, self.policy, self.layer_policy, self.budget = config, policy, layer_policy, budget
        self.dtype, self.unit = dtype or config.dtype, CAPTURED_LENGTHS if captured else 1
        self.given, self.format = plan, format
        self.weights = parameters(config) * self.dtype.itemsize if weights is None else weights
        if format not in FORMATS:
            raise UserError(f"cache-format must be one of {', '.join(FORMATS)}, not {shown(format)}")
        if budget is not None:
            if not policy.bounded:
                raise UserError(f"policy {policy.name} keeps every token and takes no budget, not {shown(budget)}")
            check_budget(budget)

    @property
    def given(self) -> list[int] | None:
        """The plan that is given, if one is. A sequence gets no more of it than it can use."""
        return self._given

    @given.setter
    def given(self, plan: Sequence[int] | None) -> None:
        if plan is not None:
            plan, layers = integers(plan, "a plan's slots"), self.config.n_layers
            if len(plan) != layers:
                raise UserError(f"the plan has {len(plan)} layers, the model {layers}")
            leasts = [layer not in self.config.linear for layer in range(layers)]
            if wrong := [slots for slots, least in zip(plan, leasts, strict=True) if not least <= slots < 2**63]:
                raise UserError(f"a plan's slots are integers from 1 to 2**63 - 1, not {shown(wrong[0])}")
        self._given = plan

    @property
    def endless(self) -> bool:
        """Whether a sequence may be longer than the model's positions."""
        return self.policy.bounded and self.config.position_offset is None

    def refusal(self, ids: Sequence[int], new: int, seen: int = 0, ready: bool = False) -> str | None:
        """Why a prompt with `new` tokens after it cannot run whatever the budget, in one line.

        seen: the tokens that come before it. ready: what follows those is known, so that the prompt may be empty.
        """
        return refusal(self.config, self.endless, ids, new, seen, ready)

    def check(self, ids: Sequence[int], new: int, seen: int = 0, ready: bool = False) -> None:
        """UserError if the prompt cannot run."""
        if why := self.refusal(ids, new, seen, ready):
            raise UserError(why)

    def beyond(self, length: int) -> str | None:
        """What to say of a sequence of so many tokens, in one line, if they are more than the model is made for.

        A policy that keeps the latest ones can go on for ever: rotary attention knows only how far they lie apart.
        """
        latest = type(self.policy).score_prompt is TokenPolicy.score_prompt
        if length <= self.config.reach or latest:
            return None
        made = f"the {self.config.reach} positions that the model is made for"
        return f"{length} tokens are more than {made}; beyond them it may answer worse (streaming goes on without end)"

    def at(self, length: int, endless: bool = False) -> Sizes:
        """All that follows from the length; a conversation's cache is made for one length and goes on beyond.

        UserError if the policy cannot work in its slots, or no request can be as long.
        """
        most, why = longest(self.config, self.endless)
        if length > most:
            raise UserError(f"a max-length of {shown(length)} tokens exceeds {why}")
        caps, floor = self.caps(length), self.policy.floor
        slots = self._slots(length, caps)
        plan = None if self.given is None else Plan(self._cut_plan(length))
        sizes = Sizes(caps, slots, floor, self.policies(math.inf if endless else length), self.layer_policy, plan)
        if plan is None and not self.layer_policy.reads_prompt:
            return replace(sizes, plan=sizes.planned([0.0] * len(sizes.used)))
        return sizes

    def caps(self, length: int) -> list[int]:
        """The most slots that each layer can use: a sliding window is a cap, and linear attention has no slots."""
        c = self.config
        return [0 if layer in c.linear else min(length, c.window(layer) or length) for layer in range(c.n_layers)]

    def policies(self, length: float) -> list[TokenPolicy]:
        """The token policy of each layer; its own form in those whose window is shorter than the sequence."""
        windows = map(self.config.window, range(self.config.n_layers))
        return [self.policy.within_window(w) if w is not None and w < length else self.policy for w in windows]

    def _slots(self, length: int, caps: list[int]) -> int:
        """The slots per layer of a uniform plan. UserError if the policy cannot work in them."""
        floor, policy = min(self.policy.floor, length), self.policy
        if self.given is not None:
            for layer, (slots, cap) in enumerate(zip(self.given, caps, strict=True)):
                needed = min(floor, cap) if policy.bounded else cap
                if slots < needed:
                    has = f"the plan gives layer {layer} {slots} slots"
                    raise UserError(f"{has}; policy {policy.name} needs at least {needed}")
            return sum(self._cut_plan(length)) // (len(caps) - caps.count(0))
        if not policy.bounded:
            return length
        if self.budget is None:
            return max(int(DEFAULT_BUDGET * length), min(SMALLEST_DEFAULT, length), floor)
        slots = self.budget if self.budget > 1 else math.floor(Fraction(str(self.budget)) * length)
        slots = min(slots, length)  # what more would do: every layer at its cap
        if slots < floor:
            has = f"budget {self.budget} is {slots} slots per layer for {length} tokens"
            raise UserError(f"{has}; policy {policy.name} needs at least {floor}")
        return slots

    def _cut_plan(self, length: int) -> list[int]:
        """The plan that is given, without the slots that sequences of `length` tokens cannot use."""
        caps = self.caps(-(-length // self.unit) * self.unit)
        return [min(slots, cap) for slots, cap in zip(self.given, caps, strict=True)]

    def slot_bytes(self, format: str | None = None) -> int:
        """K and V of one slot of one layer, in one row, in this format or in the cache's own."""
        return self.config.n_kv_heads * slot_bytes(format or self.format, self.dtype, self.config.head_dim)

    @property
    def recurrent_bytes(self) -> int:
        """The states of all layers of linear attention, in one row."""
        parts = self.config.recurrent(self.dtype).values()
        return len(self.config.linear) * sum(kind.itemsize * math.prod(shape) for kind, shape in parts)

    def full_bytes(self, length: int) -> int:
        """K and V of a full cache as the model has them, in one row: what a small cache is compared with."""
        return self.slot_bytes("dense") * sum(self.caps(length))


def rows_at_once(prompt: int) -> int:
    """How many prompts of this many tokens go through a block at once."""
    return max(1, READ_TOKENS // prompt)


def check_budget(budget: float) -> None:
    """UserError unless `budget` is an integer above 1 (slots per layer) or a number in (0, 1] (a share)."""
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not (number and (0 < budget <= 1 or isinstance(budget, int) and budget > 1)):
        raise UserError(f"budget must be a fraction in (0, 1] or an integer of slots above 1, not {shown(budget)}")
