"""What a run needs, in bytes: computed before anything is allocated."""

from contextlib import AbstractContextManager
from typing import NamedTuple

from deltanet import CHUNK, PART
from errors import UserError, in_bytes
from machine import explained
from model import FEED_CHUNK, PROMPT_CHUNK
from policies.tokens import TokenPolicy
from sizing import Sizing, rows_at_once

MOST_ROWS = 256  # more of them give no more tokens per second, but later results


class Needs(NamedTuple):
    """Bytes: the weights; a row of the cache, and of the full one; a row in a step; a prompt while it goes through a
    block, `at_once` of them together; what is held of each row's prompt meanwhile; what stands beside the rows.
    """

    weights: int
    row: int
    row_full: int
    step: int
    prefill: int
    held: int = 0
    at_once: int = 1
    beside: int = 0

    @staticmethod
    def of(sizing: Sizing, length: int, longest_prompt: int | None = None, apart: bool = False) -> "Needs":
        """Bytes of rows of `length` tokens, before anything is allocated.

        apart: prompts are read one by one, for the plan too if it has to be made.
        """
        sizes, c, item = sizing.at(length), sizing.config, sizing.dtype.itemsize
        policy, layers = sizing.policy, sizing.layer_policy
        wide, heads, groups = max(4, item), c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        state, used = sizing.recurrent_bytes, sizes.used
        prompt, widest, planned = longest_prompt or length, max(sizes.caps), apart or sizes.plan is not None
        rows, waiting, scores = 1 if apart else rows_at_once(prompt), sizes.total, prompt
        # Of a prompt in one layer: the normed copies of the residual stream, what is projected and turned, what the
        # feed-forward holds, what a policy that scores looks at, and what gives the evidence.
        queries = max(policy.queries, layers.queries, PROMPT_CHUNK if c.attention_softcap is not None else 0)
        read = prompt * (item + wide) * (3 * c.dim + (3 if c.attention_gate else 2) * heads + 4 * groups)
        copies = 6 if c.ffn_bias or c.activation_limit is not None else 4  # biased or clamped: beside the others
        chosen = c.experts_per_token * (copies * item * c.ffn_dim + (2 * item + wide) * c.dim)
        read += min(prompt, FEED_CHUNK) * max(chosen, 4 * item * (c.dense_dim or c.ffn_dim))
        read += 4 * wide * c.n_heads * min(prompt, queries) * prompt
        if c.attention_sinks:  # queries, keys and values once more, longer by 8 elements
            read += prompt * item * (c.n_heads + 2 * c.n_kv_heads) * (c.head_dim + 8)
        if d := c.delta:  # what linear attention projects, and computes of chunks, of a part of the prompt
            each = 4 * d.channels + d.value_heads * (5 * (d.key_dim + d.value_dim) + 3 * CHUNK)
            read += wide * min(prompt, PART) * each
        if sizes.plan is None:
            work = layers.work(rows, sizes.budget_slots, widest, sizes.floor, c.n_heads, c.head_dim)
            read += wide * work // rows
        if not planned:
            waiting, scores = layers.most_waiting(sizes.budget_slots, used, sizes.floor), prompt * len(used)
        elif not apart:  # of short prompts, which are held as they are, there are more in a group
            waiting = waiting * rows_at_once(min(prompt, max(sizes.plan.slots))) // rows
        # Meanwhile: the residual stream and its logits; a layer's keys and values, and once more while they are cut;
        # what is held of the layers before, with positions and scores.
        held = prompt * item * (c.dim + 4 * groups) + c.vocab_size * (item + wide)
        held += state + waiting * (sizing.slot_bytes() + 8 * c.n_kv_heads)
        if type(policy).score_prompt is not TokenPolicy.score_prompt:
            held += wide * c.n_kv_heads * scores
        # In a step: the logits with what sampling sorts, and one layer's scores and probabilities.
        step = c.vocab_size * (item + 10 * wide) + 4 * wide * c.n_heads * widest
        if sizing.format != "dense":  # where no generated loop reads them, a layer's keys and values are decoded
            step += 2 * wide * groups * widest
            held += 4 * wide * groups * prompt  # and while a prompt is encoded
        return Needs(
            weights=sizing.weights,
            row=sizes.total * (sizing.slot_bytes() + c.n_kv_heads * (wide + 8) * policy.scored) + state,
            row_full=sizing.full_bytes(length),
            step=step,
            prefill=read + held if planned else read,  # with a plan all is gone when a group has been read
            held=0 if planned else held,
            at_once=rows,
        )

    def total(self, rows: int) -> int:
        """At the most: steps go on while a prompt is read."""
        each, reading = self.row + self.step + self.held, min(rows, self.at_once) * self.prefill
        return self.weights + rows * each + reading + self.beside

    def rows(self, most: int, limit: int) -> int:
        """The largest batch that fits, at least 1 and at most `most`."""
        return max((rows for rows in range(1, min(most, MOST_ROWS) + 1) if self.total(rows) <= limit), default=1)

    def check(self, rows: int, limit: int) -> None:
        """UserError if `rows` rows do not fit."""
        if self.total(rows) > limit:
            raise UserError(self.refusal(rows, limit))

    def refusal(self, rows: int, limit: int) -> str:
        cache, smaller = rows * self.row, "--batch-size, --budget" if rows > 1 else "--budget"
        work = self.total(rows) - self.weights - cache
        return (
            f"out of memory: weights {in_bytes(self.weights)}, cache of {rows} row{'s'[: rows > 1]} {in_bytes(cache)}, "
            f"work beside them up to {in_bytes(work)}, limit {in_bytes(limit)}; use a smaller {smaller}, prompt, "
            f"--max-new-tokens or --dtype"
        )

    def explained(self, rows: int, limit: int) -> AbstractContextManager[None]:
        """UserError with these numbers when memory runs out nevertheless."""
        return explained(lambda: self.refusal(rows, limit))
