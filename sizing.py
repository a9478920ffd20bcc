"""How large a cache is, and what a run needs, for sequences of some length: pure arithmetic, without a model.

A length is the most tokens that a prompt and its answer have together. All that follows from it stands here once: the
most slots that each layer can use, the slots of a uniform plan, the plan where it is known beforehand, and bytes.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from config import ModelConfig
from errors import UserError, shown
from kvcache import FORMATS, slot_bytes
from memory import Needs
from model import PROMPT_CHUNK
from policies.layers import LayerPolicy, Plan
from policies.tokens import TokenPolicy

READ_TOKENS = 16384  # of all prompts of a batch, that go through a block at once: more take memory, not less time
DEFAULT_BUDGET = 0.4  # of the sequence, for a bounded policy without a budget (results/eval_defaults)
SMALLEST_DEFAULT = 64  # slots: below that there is nothing to gain
CAPTURED_LENGTHS = 256  # tokens: sequences within a multiple of it get the same part of a plan that is given
MOST_TOKENS = 2**20  # of a prompt and its answer, unless the model has more positions: more is a slip


class Sizing:
    """What `config` asks of a cache under these policies.

    budget: slots per layer, a share of the length, or None for one that suits it. plan: slots per layer, instead of
    what the layer policy and the budget would give. captured: what is captured is for one plan, so many lengths share
    one. format: how slots hold keys and values (kvcache.py). UserError for a budget or a plan that makes no sense.
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
    ):
        self.config, self.policy, self.layer_policy, self.budget = config, policy, layer_policy, budget
        self.dtype, self.unit = dtype or config.dtype, CAPTURED_LENGTHS if captured else 1
        self.given, self.format = plan, format
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
            if wrong := [slots for slots in plan if not 1 <= slots < 2**63]:
                raise UserError(f"a plan's slots are integers from 1 to 2**63 - 1, not {shown(wrong[0])}")
        self._given = plan

    @property
    def endless(self) -> bool:
        """Whether a sequence may be longer than the model's positions."""
        return self.policy.bounded and self.config.position_offset is None

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer."""
        positions = self.config.max_positions
        return max(positions, MOST_TOKENS) if self.endless else positions

    @property
    def longest_why(self) -> str:
        """What a longer sequence exceeds, and what to do about it."""
        positions, learned = self.config.max_positions, self.config.position_offset is not None
        if self.endless:
            return f"the {self.longest} that one request may have; shorten them"
        way = "" if learned else " or use a bounded policy such as streaming"
        return f"the model's {positions} {'learned ' if learned else ''}positions; shorten them{way}"

    def check_length(self, length: int) -> None:
        """UserError for a length that no request can have."""
        if length > self.longest:
            raise UserError(f"a max-length of {shown(length)} tokens exceeds {self.longest_why}")

    def caps(self, length: int) -> list[int]:
        """The most slots that each layer can use: a sliding window is a cap."""
        config = self.config
        return [min(length, config.window(layer) or length) for layer in range(config.n_layers)]

    def policies(self, length: float) -> list[TokenPolicy]:
        """The token policy of each layer; its own form in those whose window is shorter than the sequence."""
        windows = map(self.config.window, range(self.config.n_layers))
        return [self.policy.within_window(w) if w is not None and w < length else self.policy for w in windows]

    def slots(self, length: int) -> int:
        """b, the slots per layer of a uniform plan. UserError if the policy cannot work in them."""
        floor = min(self.policy.floor, length)
        if self.given is not None:
            for layer, (slots, cap) in enumerate(zip(self.given, self.caps(length), strict=True)):
                needed = min(floor, cap) if self.policy.bounded else cap
                if slots < needed:
                    raise UserError(
                        f"the plan gives layer {layer} {slots} slots; policy {self.policy.name} needs at least {needed}"
                    )
            return sum(self._cut_plan(length)) // len(self.given)
        if not self.policy.bounded:
            return length
        if self.budget is None:
            return max(int(DEFAULT_BUDGET * length), min(SMALLEST_DEFAULT, length), floor)
        slots = self.budget if self.budget > 1 else math.floor(Fraction(str(self.budget)) * length)
        slots = min(slots, length)  # what more would do: every layer at its cap
        if slots < floor:
            raise UserError(
                f"budget {self.budget} is {slots} slots per layer for {length} tokens; "
                f"policy {self.policy.name} needs at least {floor}"
            )
        return slots

    def plan(self, length: int, evidence: list[Any] | None = None) -> Plan | None:
        """Slots per layer; None if evidence is needed for it and there is none yet."""
        if self.given is not None:
            return Plan(self._cut_plan(length))
        if evidence is None:
            if self.layer_policy.reads_prompt:
                return None
            evidence = [0.0] * self.config.n_layers
        return self.layer_policy.allocate(evidence, self.slots(length), self.caps(length), self.policy.floor)

    def _cut_plan(self, length: int) -> list[int]:
        """The plan that is given, without the slots that sequences of `length` tokens cannot use."""
        caps = self.caps(-(-length // self.unit) * self.unit)
        return [min(slots, cap) for slots, cap in zip(self.given, caps, strict=True)]

    def slot_bytes(self, format: str | None = None) -> int:
        """K and V of one slot of one layer, in one row, in this format or in the cache's own."""
        return self.config.n_kv_heads * slot_bytes(format or self.format, self.dtype, self.config.head_dim)

    def full_bytes(self, length: int) -> int:
        """K and V of a full cache as the model has them, in one row: what a small cache is compared with."""
        return self.slot_bytes("dense") * sum(self.caps(length))

    def needs(self, length: int, longest_prompt: int | None = None, apart: bool = False) -> Needs:
        """Bytes of rows of `length` tokens, before anything is allocated.

        apart: prompts are read one by one and none waits for the plan.
        """
        self.check_length(length)
        c, caps, budget_slots = self.config, self.caps(length), self.slots(length)
        slots = min(budget_slots * len(caps), sum(caps)) if self.given is None else sum(self._cut_plan(length))
        item = self.dtype.itemsize
        wide = max(4, item)
        heads, groups = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        # Of a prompt in one layer, all at once: the normed copies of the residual stream, what is projected and turned,
        # what the feed-forward holds, and what a policy that scores looks at.
        prompt = length if longest_prompt is None else longest_prompt
        experts = max(1, c.experts_per_token)
        read = prompt * (2 * (item + wide) * (c.dim + heads + 2 * groups) + 3 * item * experts * c.ffn_dim)
        queries = max(
            self.policy.queries, self.layer_policy.queries, PROMPT_CHUNK if c.attention_softcap is not None else 0
        )
        read += 4 * wide * c.n_heads * min(prompt, queries) * prompt
        if not apart and self.plan(length) is None:
            rows, sizes = rows_at_once(prompt), (budget_slots, max(caps), self.policy.floor, c.n_heads, c.head_dim)
            read += wide * self.layer_policy.work(rows, *sizes) // rows
        # Of every prompt meanwhile: the residual stream; the layer's keys and values, and once more while they are
        # joined or cut; what waits for the plan, in the arena and outside.
        held = prompt * item * (c.dim + 4 * groups) + c.vocab_size * (item + wide)
        if not apart and self.plan(length) is None:
            waiting = self.layer_policy.most_waiting(budget_slots, caps, self.policy.floor)
            scoring = type(self.policy).score_prompt is not TokenPolicy.score_prompt
            held += self.slot_bytes() * max(0, waiting - slots)
            held += c.n_kv_heads * (8 * waiting + wide * scoring * prompt * len(caps))  # positions and scores
        # Of one row in a step: the logits with what sampling sorts, and one layer's scores and probabilities.
        step = c.vocab_size * (item + 5 * wide) + 4 * wide * c.n_heads * max(caps)
        if self.format != "dense":  # where no generated loop reads them, a layer's keys and values are decoded
            step += 2 * wide * groups * max(caps)
            held += 4 * wide * groups * prompt  # and while a prompt is encoded
        return Needs(
            weights=parameters(c) * item,
            row=slots * (self.slot_bytes() + c.n_kv_heads * (wide + 8) * self.policy.scored),
            row_full=self.full_bytes(length),
            step=step,
            prefill=read + held if apart else read,
            held=0 if apart else held,
            at_once=1 if apart else rows_at_once(prompt),
        )


def parameters(c: ModelConfig) -> int:
    """How many numbers the weights are."""
    norm = 2 if c.norm == "layer" else 1
    heads, groups = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    attention = c.dim * (heads + 2 * groups) + heads * c.dim
    attention += (heads + 2 * groups) * c.qkv_bias + c.dim * c.output_bias
    attention += norm * {None: 0, "head": 2 * c.head_dim, "projection": heads + groups}[c.qk_norm]
    width = (2 if c.ffn_gate else 1) * c.ffn_dim
    if c.experts:
        ffn = c.experts * (c.dim + 3 * c.dim * c.ffn_dim)
    else:
        ffn = c.dim * (width + c.ffn_dim) + (width + c.dim) * c.ffn_bias
    norms = norm * c.dim * (c.pre_norms * (2 - c.shared_norm) + 2 * c.post_norms)
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim
    if c.position_offset is not None:
        tables += (c.max_positions + c.position_offset) * c.dim
    return c.n_layers * (attention + ffn + norms) + norm * c.dim + tables


def rows_at_once(prompt: int) -> int:
    """How many prompts of this many tokens go through a block at once."""
    return max(1, READ_TOKENS // prompt)


def check_budget(budget: float) -> None:
    """UserError unless `budget` is an integer above 1 (slots per layer) or a number in (0, 1] (a share)."""
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not (number and (0 < budget <= 1 or isinstance(budget, int) and budget > 1)):
        raise UserError(f"budget must be a fraction in (0, 1] or an integer of slots above 1, not {shown(budget)}")


def whole(value: Any, name: str) -> int:
    """An integer, of Python or of numpy; UserError for anything else, True and False included."""
    if type(value) is int:
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} must be an integer, not {shown(value)}")
    return int(value)


def integers(values: Any, name: str) -> list[int]:
    """The integers in a sequence, a numpy array or a tensor of one dimension; UserError for anything else."""
    if type(values) is list and all(type(value) is int for value in values):
        return values
    if isinstance(values, Tensor) or type(values).__module__ == "numpy":
        values = values.tolist()  # what is no integer of one dimension gives no integers
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise UserError(f"{name} must be a sequence of integers, not {shown(values)}")
    return [whole(value, f"each of {name}") for value in values]
