"""The engine: prefill, plan, compact, decode, finish. It sees token ids only.

    model, config = checkpoint.load("checkpoints/tiny")
    engine = Engine(model, policy="h2o", layers="squeeze", budget=0.25)
    stream = engine.stream(ids, max_new_tokens=64)
    for token in stream:
        ...
    print(stream.completion.figures.plan)

A request runs layer by layer over its whole prompt (prefill), which yields each layer's importance; the layer policy
turns those into slots per layer (plan); the token policy says which prompt tokens stay and they are copied into the
cache (compact); then one token a step is computed (decode), overwriting the token policy's victims.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from kvcache import KVCache
from model import Block, PrefilledLayer, Transformer
from policies import layers as layer_policies
from policies import tokens as token_policies
from policies.layers import LayerPolicy, Plan
from policies.tokens import TokenPolicy
from sampling import GREEDY, Sampler, Sampling

DEFAULT_BUDGET = 0.3  # of the sequence, for a bounded policy without a budget
SMALLEST_DEFAULT = 64  # slots: below that there is nothing to gain
APPEND_CHUNK = 256  # tokens of a later turn that go through the model at once


@dataclass(frozen=True)
class Request:
    """Token ids in. `stop` is asked after each token, with all new ids so far, whether to end."""

    ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    eos_ids: Collection[int] = ()
    stop: Callable[[list[int]], bool] | None = None


@dataclass
class Figures:
    """What a batch cost. Slots per layer, bytes, seconds. Known as soon as the first token is, but for the decoding."""

    plan: list[int]
    groups: list[int] | None
    importance: list[float]
    budget_slots: int
    kv_bytes: int
    state_bytes: int
    kv_bytes_full: int
    prefill_tokens: int
    prefill_s: float = 0.0
    compile_s: float = 0.0  # decode steps in which something was compiled
    decode_s: float = 0.0  # all other decode steps
    decode_tokens: int = 0  # tokens made in `decode_s`

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class Completion:
    """Token ids out. `tokens` holds a final end-of-sequence too; finish_reason is eos, stop, length or interrupted."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    figures: Figures | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if token in self.request.eos_ids:
            self.finish_reason = "eos"
        elif self.request.stop and self.request.stop(self.tokens):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"


class Stream:
    """The tokens of one request, as they are made. `completion` grows along and holds the figures."""

    def __init__(self, steps: Iterator[list[Completion]], completion: Completion):
        self._steps, self.completion = steps, completion

    def __iter__(self) -> Iterator[int]:
        for _ in self._steps:
            yield self.completion.tokens[-1]

    def close(self) -> None:
        """End it here; what has been made stays in `completion`."""
        self._steps.close()


class Engine:
    """Runs requests on a model under one token policy and one layer policy.

    policy, layers: a policy or its name. budget: slots per layer (an integer above 1) or the share of
    prompt + max_new_tokens in (0, 1] that a uniform plan would give; None chooses one that suits the request.
    plan: slots per layer, instead of letting `layers` and `budget` decide. compile: run decode through one compiled
    block, used for every layer. ValueError for what does not fit together.
    """

    def __init__(
        self,
        model: Transformer,
        policy: str | TokenPolicy = "full",
        layers: str | LayerPolicy = "uniform",
        budget: float | None = None,
        plan: Sequence[int] | None = None,
        compile: bool = False,
    ):
        self.model = model
        self.policy = token_policies.make(policy) if isinstance(policy, str) else policy
        self.layer_policy = layer_policies.make(layers) if isinstance(layers, str) else layers
        self.budget, self.plan = budget, plan
        if budget is not None:
            if not self.policy.bounded:
                raise ValueError(f"policy {self.policy.name} keeps every token and takes no budget, not {budget}")
            check_budget(budget)
        if plan is not None and len(plan) != model.config.n_layers:
            raise ValueError(f"the plan has {len(plan)} layers, the model {model.config.n_layers}")
        self.device = model.embed.weight.device
        self.compiled = compile
        self.decode_block = _compile(Block.decode) if compile else Block.decode
        self.decode_logits = _compile(Transformer.logits) if compile else Transformer.logits

    def stream(
        self,
        ids: Sequence[int],
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 128,
        eos_ids: Collection[int] = (),
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Stream:
        """One request's tokens as they are made. ValueError, before anything is allocated, for one that cannot run."""
        completion = Completion(Request(ids, max_new_tokens, sampling, eos_ids, stop))
        self.check(completion.request)
        return Stream(self._run([completion], self._start), completion)

    def conversation(self, sampling: Sampling = GREEDY) -> "Conversation":
        """Turns that go on from each other over one cache. See `Conversation`."""
        return Conversation(self, sampling)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Run the requests as one batch with one plan; yields each one's completion when it ends."""
        completions = [Completion(request) for request in requests]
        for request in requests:
            self.check(request)
        for updated in self._run(completions, self._start):
            yield from (completion for completion in updated if completion.finish_reason)

    def check(self, request: Request, seen: int = 0, limit: int | None = None) -> None:
        """ValueError, in one line, if the request cannot run.

        In a conversation it comes after `seen` tokens, and the cache is made for `limit` tokens.
        """
        config, length = self.model.config, seen + len(request.ids) + request.max_new_tokens
        if not len(request.ids):
            raise ValueError("the prompt is empty; give at least one token")
        if request.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens must be at least 1, not {request.max_new_tokens}")
        if not (min(request.ids) >= 0 and max(request.ids) < config.vocab_size):
            wrong = next(i for i in request.ids if not 0 <= i < config.vocab_size)
            raise ValueError(f"token id {wrong} is outside the vocabulary (0 to {config.vocab_size - 1})")
        learned = config.position_offset is not None
        if (learned or not self.policy.bounded) and length > config.max_positions:
            raise ValueError(
                f"{f'{seen} earlier + ' * bool(seen)}{len(request.ids)} prompt + {request.max_new_tokens} new tokens "
                f"exceed the model's "
                f"{config.max_positions} {'learned ' if learned else ''}positions; shorten them"
                + ("" if learned else " or use a bounded policy such as streaming")
            )
        self._budget_slots(limit or length)

    def _caps(self, length: int) -> list[int]:
        """The most slots that each layer can use for sequences of `length` tokens: a sliding window is a cap."""
        config = self.model.config
        return [min(length, config.window(layer) or length) for layer in range(config.n_layers)]

    def _policies(self, length: float) -> list[TokenPolicy]:
        """The token policy of each layer; its own form in those whose window is shorter than the sequence."""
        windows = map(self.model.config.window, range(self.model.config.n_layers))
        return [self.policy.within_window(w) if w is not None and w < length else self.policy for w in windows]

    def _budget_slots(self, length: int) -> int:
        """b, the slots per layer of a uniform plan, for sequences of `length` tokens at most."""
        floor = min(self.policy.floor, length)
        if self.plan is not None:
            for layer, (slots, cap) in enumerate(zip(self.plan, self._caps(length), strict=True)):
                needed = min(floor, cap) if self.policy.bounded else cap
                if type(slots) is not int or slots < needed:
                    raise ValueError(
                        f"the plan gives layer {layer} {slots} slots; policy {self.policy.name} needs at least {needed}"
                    )
            return sum(self.plan) // len(self.plan)
        if not self.policy.bounded:
            return length
        if self.budget is None:
            return max(int(DEFAULT_BUDGET * length), min(SMALLEST_DEFAULT, length), floor)
        slots = self.budget if self.budget > 1 else math.floor(Fraction(str(self.budget)) * length)
        slots = min(slots, length)  # what more would do: every layer at its cap
        if slots < floor:
            raise ValueError(
                f"budget {self.budget} is {slots} slots per layer for {length} tokens; "
                f"policy {self.policy.name} needs at least {floor}"
            )
        return slots

    @torch.inference_mode()
    def _run(
        self, completions: list[Completion], start: Callable[[list[Request]], tuple["_Decoder", Figures]]
    ) -> Iterator[list[Completion]]:
        """Yields after each step the completions that got a token; ends when all have finished."""
        try:
            started = time.perf_counter()
            decoder, figures = start([completion.request for completion in completions])
            for completion in completions:
                completion.figures = figures
            tokens = decoder.tokens.tolist()
            figures.prefill_s = time.perf_counter() - started
            running = list(range(len(completions)))
            while True:
                for row in running:
                    completions[row].append(tokens[row])
                updated, running = running, [row for row in running if not completions[row].finish_reason]
                yield [completions[row] for row in updated]
                if not running:
                    return
                started, graphs = time.perf_counter(), _compiled_graphs()
                decoder.step()
                tokens = decoder.tokens.tolist()
                elapsed = time.perf_counter() - started
                if _compiled_graphs() != graphs:
                    figures.compile_s += elapsed
                else:
                    figures.decode_s += elapsed
                    figures.decode_tokens += len(running)
        finally:
            for completion in completions:
                completion.finish_reason = completion.finish_reason or "interrupted"

    def _start(self, requests: list[Request], limit: int | None = None) -> tuple["_Decoder", Figures]:
        """Prefill, plan and compact a batch; its first tokens are chosen.

        The plan is for the longest of prompt + new tokens, or for `limit` tokens of what goes on without an end.
        """
        lengths = torch.tensor([len(request.ids) for request in requests], device=self.device)
        longest = max(len(request.ids) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64, device=self.device)
        for row, request in enumerate(requests):
            ids[row, : len(request.ids)] = torch.tensor(request.ids, device=self.device)
        length = limit or max(len(request.ids) + request.max_new_tokens for request in requests)
        rotary, policies = self.model.rotary(length), self._policies(math.inf if limit else length)

        logits, prefilled = self._prefill(ids, lengths, rotary, policies)
        importance = torch.stack([layer.signal for layer in prefilled]).mean(1).tolist()
        budget_slots = self._budget_slots(length)
        plan = self._plan(importance, budget_slots, length)
        cache = self._compact(prefilled, lengths, plan.slots, policies)
        if self.compiled and len(set(plan.slots)) > 1:
            # One graph for all lengths from the start. Where all are equal a static one is faster.
            for arena in (arena for layer in cache.layers for arena in layer if arena is not None):
                torch._dynamo.maybe_mark_dynamic(arena, 2)

        sampler = Sampler([request.sampling for request in requests], self.device)
        decoder = _Decoder(self, cache, rotary, policies, sampler, tokens=sampler(logits), seen=lengths.clone())
        return decoder, Figures(
            plan=plan.slots,
            groups=plan.groups,
            importance=importance,
            budget_slots=budget_slots,
            kv_bytes=cache.kv_bytes,
            state_bytes=cache.state_bytes,
            kv_bytes_full=sum(self._full_bytes(len(request.ids) + request.max_new_tokens) for request in requests),
            prefill_tokens=int(lengths.sum()),
        )

    def _full_bytes(self, length: int) -> int:
        """K and V of a full cache for one sequence of `length` tokens."""
        c = self.model.config
        return 2 * c.n_kv_heads * c.head_dim * self.model.embed.weight.element_size() * sum(self._caps(length))

    def _prefill(
        self, ids: Tensor, lengths: Tensor, rotary: list[Tensor], policies: list[TokenPolicy]
    ) -> tuple[Tensor, list[PrefilledLayer]]:
        """ids [B, S], right-padded to S -> logits [B, vocab] after each row's last token, and every layer's part."""
        x = self.model.embedded(ids, torch.arange(ids.shape[1], device=self.device)[None])
        ragged = lengths if int(lengths.min()) < ids.shape[1] else None
        prefilled = []
        for block, frequencies, policy in zip(self.model.layers, rotary, policies, strict=True):
            x, layer = block.prefill(x, frequencies, ragged, policy)
            prefilled.append(layer)
        last = x[torch.arange(len(lengths), device=self.device), lengths - 1]
        return self.model.logits(last), prefilled

    def _plan(self, importance: list[float], budget_slots: int, length: int) -> Plan:
        caps = self._caps(length)
        if self.plan is not None:  # only windows cap it: longer sequences may follow
            windows = map(self.model.config.window, range(len(caps)))
            return Plan([min(slots, window or slots) for slots, window in zip(self.plan, windows, strict=True)])
        return self.layer_policy.allocate(importance, budget_slots, caps, self.policy.floor)

    def _compact(
        self, prefilled: list[PrefilledLayer], lengths: Tensor, plan: list[int], policies: list[TokenPolicy]
    ) -> KVCache:
        k = prefilled[0].k
        cache = KVCache(plan, k.shape[0], k.shape[1], k.shape[3], k.dtype, k.device, self.policy.scored)
        for index, (layer, policy) in enumerate(zip(prefilled, policies, strict=True)):
            cache.fill(index, layer.k, layer.v, layer.scores, policy.select(lengths, plan[index], layer.scores))
        return cache


class _Decoder:
    """A batch in its decode phase. `step` reads and writes buffers that keep shape and address, with no host sync."""

    def __init__(
        self,
        engine: Engine,
        cache: KVCache,
        rotary: list[Tensor],
        policies: list[TokenPolicy],
        sampler: Sampler,
        tokens: Tensor,
        seen: Tensor,
    ):
        self.model = engine.model
        self.decode_block, self.decode_logits = engine.decode_block, engine.decode_logits
        self.cache, self.rotary, self.policies, self.sampler = cache, rotary, policies, sampler
        self.tokens, self.seen = tokens, seen  # [B]: the last token of each row, and how many came before it

    def step(self) -> None:
        """Run `tokens` through the model, put the next ones in their place and advance `seen`."""
        self.tokens.copy_(self.sampler(self.logits()))

    def logits(self) -> Tensor:
        """Feed `tokens` and return the logits [B, vocab] of what follows."""
        return self.decode_logits(self.model, self._feed(self.tokens[:, None], self.decode_block)[:, 0])

    def append(self, ids: Tensor) -> Tensor:
        """Feed ids [B, T], which follow what was seen, and return x [B, T, C] after the last block.

        In chunks. For policies that place a token by its position it is the same as T steps; those that score decide at
        the end of each chunk what goes.
        """
        sinks, parts = max(policy.sinks for policy in self.policies), []
        while ids.shape[1]:
            alone = int(self.seen.min()) < sinks  # sinks have to be in the cache before a chunk can turn them
            size = 1 if alone else min(APPEND_CHUNK, ids.shape[1])
            parts.append(self._feed(ids[:, :size], Block.decode if alone else Block.append))
            ids = ids[:, size:]
        return torch.cat(parts, dim=1)

    def _feed(self, ids: Tensor, run: Callable) -> Tensor:
        """ids [B, T] through all blocks by `run`, which is Block.decode (T = 1) or Block.append."""
        positions = self.seen[:, None] + torch.arange(ids.shape[1], device=ids.device)
        x = self.model.embedded(ids, positions)
        layers = zip(self.model.layers, self.rotary, self.cache.layers, self.policies, strict=True)
        for block, frequencies, layer, policy in layers:
            x = run(block, x, frequencies, layer, self.seen, policy)
        self.seen += ids.shape[1]
        return x


class Conversation:
    """Turns over one cache, which keeps the plan of the first turn and stays as large, however long it all becomes.

    A fraction as budget is of the model's position limit. An end-of-sequence token that ends an answer is never fed:
    what the next turn begins with closes it.
    """

    def __init__(self, engine: Engine, sampling: Sampling):
        self.engine, self.sampling = engine, sampling
        self._decoder: _Decoder | None = None
        self._figures: Figures | None = None
        self._stream: Stream | None = None

    @property
    def seen(self) -> int:
        """How many tokens, of both sides, have gone through the model."""
        return int(self._decoder.seen) if self._decoder else 0

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 128,
        eos_ids: Collection[int] = (),
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Stream:
        """The answer to one more turn. It ends the turn before. ValueError, with nothing changed, if it cannot run."""
        unfed: list[int] = []
        if self._decoder and self._stream.completion.finish_reason != "eos":
            unfed = self._stream.completion.tokens[-1:]
        completion = Completion(Request([*unfed, *ids], max_new_tokens, self.sampling, eos_ids, stop))
        self.engine.check(completion.request, self.seen, self._limit)
        if self._stream:
            self._stream.close()
        start = self._append if self._decoder else self._begin
        self._stream = Stream(self.engine._run([completion], start), completion)
        return self._stream

    @property
    def _limit(self) -> int:
        return self.engine.model.config.max_positions

    def _begin(self, requests: list[Request]) -> tuple[_Decoder, Figures]:
        self._decoder, self._figures = self.engine._start(requests, self._limit)
        return self._decoder, self._figures

    def _append(self, requests: list[Request]) -> tuple[_Decoder, Figures]:
        decoder, [request] = self._decoder, requests
        length = self.seen + len(request.ids) + request.max_new_tokens
        x = decoder.append(torch.tensor([request.ids], device=self.engine.device))
        decoder.tokens.copy_(decoder.sampler(self.engine.model.logits(x[:, -1])))
        of_turn = {"prefill_tokens": len(request.ids), "kv_bytes_full": self.engine._full_bytes(length)}
        return decoder, replace(self._figures, **of_turn, prefill_s=0.0, compile_s=0.0, decode_s=0.0, decode_tokens=0)


def check_budget(budget: float) -> None:
    """ValueError unless `budget` is an integer above 1 (slots per layer) or a number in (0, 1] (a share)."""
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    if (
        isinstance(budget, bool)
        or not isinstance(budget, (int, float))
        or not (0 < budget <= 1 or whole and budget > 1)
    ):
        raise ValueError(f"budget must be a fraction in (0, 1] or an integer of slots above 1, not {budget}")


# Guards that ask, for every layer of every step, whether somebody has patched the code since it was compiled: half of a
# step's time on a CPU. All that a call can bring (tensors, shapes, settings, types) stays guarded.
_PATCH_GUARDS = {
    "BUILTIN_MATCH",
    "CLOSURE_MATCH",
    "DICT_CONTAINS",
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "FUNCTION_MATCH",
    "MODULE_MATCH",
    "NOT_PRESENT_IN_GENERIC_DICT",
}


def _compile(function: Callable) -> Callable:
    options = {"guard_filter_fn": lambda guards: [guard.guard_type not in _PATCH_GUARDS for guard in guards]}
    return torch.compile(function, fullgraph=True, options=options)


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
