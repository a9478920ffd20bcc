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
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from decoder import Decoder, Store
from errors import UserError, shown
from graphs import Code, compiled_graphs
from kvcache import KVCache, Memory, Prompt
from model import Transformer
from policies import layers as layer_policies
from policies import tokens as token_policies
from policies.layers import LayerPolicy, Plan, Uniform
from policies.layers.base import Attended, total_slots
from policies.tokens import TokenPolicy
from sampling import GREEDY, NOT_FINITE, Sampler, Sampling
from sizing import Sizing, integers, rows_at_once, whole
from waiting import NotFinite, Waiting


@dataclass(frozen=True)
class Request:
    """Token ids in. `stop` is asked after each token, with all new ids so far, whether to end.

    ids: a sequence, an array or a tensor [S] of integers; a list of ints is kept as it is. UserError for other types.
    """

    ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    eos_ids: Collection[int] = ()
    stop: Callable[[list[int]], bool] | None = None

    def __post_init__(self):
        object.__setattr__(self, "ids", integers(self.ids, "prompt ids"))
        eos_ids = list(self.eos_ids) if isinstance(self.eos_ids, Set) else self.eos_ids
        object.__setattr__(self, "eos_ids", frozenset(integers(eos_ids, "eos_ids")))
        object.__setattr__(self, "max_new_tokens", whole(self.max_new_tokens, "max-new-tokens"))
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling must be a Sampling, not {shown(self.sampling)}")
        if self.stop is not None and not callable(self.stop):
            raise UserError(f"stop must be a function of the new ids, not {shown(self.stop)}")


@dataclass
class Figures:
    """What a batch cost. Slots per layer, bytes, seconds. Known as soon as the first token is, but for the decoding."""

    plan: list[int]
    groups: list[int] | None
    importance: list[float] | None  # None: of none of the prompts that came first it is finite
    budget_slots: int
    kv_bytes: int
    state_bytes: int
    kv_bytes_full: int
    prefill_tokens: int
    prefill_s: float = 0.0
    compile_s: float = 0.0  # decode steps in which something was compiled
    decode_s: float = 0.0  # all other decode steps
    decode_tokens: int = 0  # tokens made in `decode_s`; a request's first one comes from its prefill

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class Completion:
    """Token ids out. `tokens` holds a final end-of-sequence too.

    finish_reason is eos, stop, length or interrupted; or error, for a request that cannot run, or whose logits are not
    finite: `error` says why in one line, `tokens` are those before. figures: None if it never ran.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    figures: Figures | None = None
    error: str | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if token in self.request.eos_ids:
            self.finish_reason = "eos"
        elif self.request.stop and self.request.stop(self.tokens):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"

    def fail(self, error: str) -> None:
        self.error, self.finish_reason = error, "error"


class Stream:
    """The tokens of one request, as they are made. `completion` grows along and holds the figures, or an error."""

    def __init__(self, steps: Iterator[list[Completion]], completion: Completion):
        self._steps, self.completion = steps, completion

    def __iter__(self) -> Iterator[int]:
        for _ in self._steps:
            if not self.completion.error:
                yield self.completion.tokens[-1]

    def close(self) -> None:
        """End it here; what has been made stays in `completion`."""
        self._steps.close()


class Engine:
    """Runs requests on a model under one token policy and one layer policy.

    policy, layers: a policy or its name. budget: slots per layer (an integer above 1) or the share of
    prompt + max_new_tokens in (0, 1] that a uniform plan would give; None chooses one that suits the request.
    plan: slots per layer, instead of letting `layers` and `budget` decide. compile: run decode through one compiled
    block, used for every layer. cache_format: "dense", or "int8" for a cache of 8 bits a number (kvcache.py). UserError
    for what does not fit together.
    """

    def __init__(
        self,
        model: Transformer,
        policy: str | TokenPolicy = "full",
        layers: str | LayerPolicy = "uniform",
        budget: float | None = None,
        plan: Sequence[int] | None = None,
        compile: bool = False,
        cache_format: str = "dense",
    ):
        self.model = model
        self.policy = token_policies.make(policy) if isinstance(policy, str) else policy
        self.layer_policy = layer_policies.make(layers) if isinstance(layers, str) else layers
        if not isinstance(self.policy, TokenPolicy):
            raise UserError(f"policy must be a token policy or its name, not {shown(policy)}")
        if not isinstance(self.layer_policy, LayerPolicy):
            raise UserError(f"layers must be a layer policy or its name, not {shown(layers)}")
        if not isinstance(compile, bool):
            raise UserError(f"compile must be True or False, not {shown(compile)}")
        self.device = model.device
        self.code, self.store = Code(compile, self.device), Store()
        form = {"dtype": model.dtype, "captured": self.code.capture is not None, "format": cache_format}
        self.sizing = Sizing(model.config, self.policy, self.layer_policy, budget, plan, **form)
        # Steps that are started before the tokens of the first of them are looked at, so that the device never waits.
        self.lag = 2 if self.device.type == "cuda" else 0

    @property
    def plan(self) -> list[int] | None:
        """Slots per layer, if they are given. A sequence gets no more of them than it can use."""
        return self.sizing.given

    @plan.setter
    def plan(self, plan: Sequence[int] | None) -> None:
        self.sizing.given = plan

    def stream(
        self,
        ids: Sequence[int],
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 128,
        eos_ids: Collection[int] = (),
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Stream:
        """One request's tokens as they are made. UserError, before anything is allocated, for one that cannot run."""
        request = Request(ids, max_new_tokens, sampling, eos_ids, stop)
        self.check(request)
        completion, length = Completion(request), len(request.ids) + request.max_new_tokens
        return Stream(self._serve(iter([completion]), 1, length, [sampling]), completion)

    def conversation(self, sampling: Sampling = GREEDY) -> "Conversation":
        """Turns that go on from each other over one cache. See `Conversation`."""
        return Conversation(self, sampling)

    def generate(
        self,
        requests: Iterable[Request],
        batch_size: int | None = None,
        max_length: int | None = None,
        samplings: Collection[Sampling] | None = None,
        apart: bool = False,
    ) -> Iterator[Completion]:
        """Run the requests, `batch_size` rows at a time; yields each one's completion when it ends.

        A row that ends takes the next request: shapes, addresses and the plan stay. The plan is made from the first
        `batch_size` prompts, or given to the engine. max_length, the most tokens of a prompt and its answer, fixes the
        arena. By default a sequence of requests is one batch, as long as the longest that can run; other iterables,
        which are read as rows get free, need both. A request that cannot run yields a completion with its `error`
        as soon as it is read.

        A row gets what it would get alone under the same plan, with one exception: in layers with a sliding window
        max_length decides for all rows whether streaming and the policies that score the prompt once are plain rings
        there (`TokenPolicy.within_window`), so that a request no longer than the window may differ in a longer batch.

        samplings: all ways in which the requests sample, if that is known of such an iterable: no step computes more.
        apart: what a request gets must not depend on the others, not even in the last bits. Prompts are read one by
        one and there are always `batch_size` rows. It needs a plan or a layer policy that does not read the prompts;
        see `plan_for`.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and whole(value, name) < 1:
                raise UserError(f"{name} must be at least 1, not {shown(value)}")
        if samplings is not None and not all(isinstance(sampling, Sampling) for sampling in samplings):
            raise UserError(f"samplings must be some of Sampling, not {shown(samplings)}")
        if not isinstance(requests, Iterable):
            raise UserError(f"requests must be a sequence or an iterable of Request, not {shown(requests)}")
        if isinstance(requests, Sequence):
            able = [request for request in requests if not self.refusal(request)]
            samplings, lengths = [r.sampling for r in able], [len(r.ids) + r.max_new_tokens for r in able]
            batch_size = max(len(able), 1) if batch_size is None else batch_size
            max_length = max_length or max(lengths, default=0)
        if batch_size is None or max_length is None:
            raise UserError("requests that are not a sequence need a batch_size and a max_length")
        if max_length:  # else nothing can run
            self.sizing.check_length(max_length)
            known = self.sizing.plan(max_length)
            if apart and known is None:
                raise UserError(f"requests that run apart need a plan; {self.layer_policy.name} makes it from prompts")
        for updated in self._serve(map(Completion, requests), batch_size, max_length, samplings, apart):
            yield from (completion for completion in updated if completion.finish_reason)

    @torch.inference_mode()
    def plan_for(
        self, requests: Iterable[Request], max_length: int, count: int | None = None
    ) -> tuple[Plan, list[float] | None]:
        """The plan, and the importance of each layer, for sequences of `max_length` tokens that begin with these.

        Prompts are read one by one, up to the first `count` whose importance is finite, and nothing is kept of them. If
        it is finite for none of them, the plan is the one for equal layers and the importance None.
        """
        policies, slots = self.sizing.policies(max_length), self.sizing.slots(max_length)
        plan, signals, seen = self.sizing.plan(max_length), [], []  # evidence by prompt and layer
        measures = None if plan else self._measures(slots, self.sizing.caps(max_length))
        for request in requests:
            found: list[Tensor | None] = []

            def keep(layer: int, evidence: Tensor | None, _: Prompt, found: list = found) -> None:
                found.append(evidence)

            own = self._prefill(*self._padded([request]), self._rotary([request]), policies, keep, measures)[1]
            if all(map(math.isfinite, own)) and all(part is None or bool(part.isfinite().all()) for part in found):
                signals.append(own)
                seen.append(found)
            if len(signals) == count:
                break
        importance = [fmean(layer) for layer in zip(*signals, strict=True)] or None
        if plan is None and not seen:
            plan = Uniform().allocate([], slots, self.sizing.caps(max_length), self.policy.floor)
        if plan is None:
            evidence = [torch.cat(layer).mean(0).tolist() for layer in zip(*seen, strict=True)]
            plan = self.sizing.plan(max_length, evidence)
        return plan, importance

    def check(self, request: Request, seen: int = 0, limit: int | None = None) -> None:
        """UserError, in one line, if the request cannot run.

        In a conversation it comes after `seen` tokens, and the cache is made for `limit` tokens.
        """
        if refusal := self.refusal(request, seen):
            raise UserError(refusal)
        self.sizing.slots(limit or seen + len(request.ids) + request.max_new_tokens)

    def refusal(self, request: Request, seen: int = 0) -> str | None:
        """Why the request cannot run whatever the budget, in one line."""
        if not isinstance(request, Request):
            return f"a request must be a Request, not {shown(request)}"
        config, new = self.model.config, request.max_new_tokens
        if not len(request.ids):
            return "the prompt is empty; give at least one token"
        if new < 1:
            return f"max-new-tokens must be at least 1, not {shown(new)}"
        if not (min(request.ids) >= 0 and max(request.ids) < config.vocab_size):
            wrong = next(i for i in request.ids if not 0 <= i < config.vocab_size)
            return f"token id {shown(wrong)} is outside the vocabulary (0 to {config.vocab_size - 1})"
        if not self.sizing.endless:
            earlier = f"{seen} earlier + " * bool(seen)
        else:  # what came before is in slots that do not grow
            earlier, seen = "", 0
        if seen + len(request.ids) + new > self.sizing.longest:
            return f"{earlier}{len(request.ids)} prompt + {shown(new)} new tokens exceed {self.sizing.longest_why}"
        return None

    @property
    def not_finite(self) -> str:
        """What is said of logits that are not finite, in one line."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        wider = {"float16": "bfloat16 or float32", "bfloat16": "float32", "float32": "float64"}.get(dtype)
        way = f"try another --dtype, such as {wider}" if wider else "check the weights and config.json"
        return f"the logits are not finite in {dtype}: a number overflows or the weights are broken; {way}"

    @torch.inference_mode()
    def _serve(
        self,
        queue: Iterator[Completion],
        batch: int,
        length: int,
        samplings: Collection[Sampling] | None,
        apart: bool = False,
    ) -> Iterator[list[Completion]]:
        """Yields after each step the completions that got a token; ends when all have finished."""
        queue, running = self._checked(queue, length), []
        while True:
            yield from self._admit(queue, batch, running)
            if not running:
                return
            with ExitStack() as stack, suppress(NotFinite):
                requests = [completion.request for completion in running]
                rows = batch if apart else len(requests)
                decoder, figures = self._start(requests, length, later=samplings, stack=stack, rows=rows, apart=apart)
                running += [None] * (rows - len(running))
                yield from self._decode(decoder, figures, running, queue, self.lag, apart)
                return
            for completion in running:  # those that come next may give a plan
                completion.fail(self.not_finite)
            yield running
            running = []

    def _checked(self, queue: Iterator[Completion], length: int) -> Iterator[Completion]:
        """All of them; those that cannot run have an error."""
        for completion in queue:
            request = completion.request
            completion.error = self.refusal(request)
            if not completion.error and len(request.ids) + request.max_new_tokens > length:
                completion.error = (
                    f"{len(request.ids)} prompt + {request.max_new_tokens} new tokens exceed max-length {length}"
                )
            if completion.error:
                completion.fail(completion.error)
            yield completion

    @staticmethod
    def _admit(queue: Iterator[Completion], count: int, admitted: list[Completion]) -> Iterator[list[Completion]]:
        """Append the next `count` that can run to `admitted`. Those met before them that cannot are yielded at once."""
        while len(admitted) < count and (completion := next(queue, None)):
            if completion.error:
                yield [completion]
            else:
                admitted.append(completion)

    def _decode(
        self,
        decoder: Decoder,
        figures: Figures,
        running: list[Completion | None],
        queue: Iterator[Completion],
        lag: int,
        apart: bool = False,
    ) -> Iterator[list[Completion]]:
        """Steps until all that is running, and all in the queue, has finished; their first tokens are chosen."""
        started = time.perf_counter()
        waited = [0] * len(running)  # tokens of each row that have been asked for
        asked: deque[tuple[list[Completion | None], Callable[[], list[int]], bool]] = deque()

        def ask(rows: Iterable[int], stepped: bool) -> None:
            owners = [None] * len(running)
            for row in rows:
                owners[row], waited[row] = running[row], waited[row] + 1
            asked.append((owners, decoder.read(), stepped))

        def wanting() -> list[int]:
            owned = [(row, completion) for row, completion in enumerate(running) if completion]
            return [row for row, completion in owned if waited[row] < completion.request.max_new_tokens]

        try:
            for completion in filter(None, running):
                completion.figures = figures
            ask(range(len(running)), stepped=False)
            graphs = compiled_graphs()
            while asked or wanting():
                if len(asked) <= lag and (rows := wanting()) and not (asked and lag == 0):
                    decoder.step()
                    ask(rows, stepped=True)
                    continue
                owners, tokens, stepped = asked.popleft()
                if all(owner is None or owner.finish_reason for owner in owners):
                    continue  # it ran ahead of their ends: nobody waits for it
                updated = []
                for row, token in enumerate(tokens()):
                    if (completion := owners[row]) and not completion.finish_reason:
                        if token == NOT_FINITE:
                            completion.fail(self.not_finite)
                        else:
                            completion.append(token)
                        updated.append(completion)
                        if completion.finish_reason:
                            running[row] = None
                elapsed = time.perf_counter() - started
                if not stepped:
                    figures.prefill_s += elapsed
                elif compiled_graphs() != graphs:
                    figures.compile_s += elapsed
                else:
                    figures.decode_s += elapsed
                    figures.decode_tokens += sum(not completion.error for completion in updated)
                graphs = compiled_graphs()
                yield updated
                free = [row for row, completion in enumerate(running) if completion is None]
                newcomers: list[Completion] = []
                yield from self._admit(queue, len(free), newcomers)
                started = time.perf_counter()
                if newcomers:
                    rows = free[: len(newcomers)]
                    for row, completion in zip(rows, newcomers, strict=True):
                        running[row], waited[row], completion.figures = completion, 0, figures
                    self._refill(decoder, rows, [completion.request for completion in newcomers], apart)
                    figures.prefill_tokens += sum(len(completion.request.ids) for completion in newcomers)
                    ask(rows, stepped=False)
                    figures.prefill_s += time.perf_counter() - started
                    started = time.perf_counter()
        finally:
            for completion in running:
                if completion:
                    completion.finish_reason = completion.finish_reason or "interrupted"

    def _start(
        self,
        requests: Sequence[Request],
        length: int | None = None,
        endless: bool = False,
        later: Sequence[Sampling] | None = (),
        stack: ExitStack | None = None,
        rows: int | None = None,
        apart: bool = False,
    ) -> tuple[Decoder, Figures]:
        """Prefill, plan and compact a batch; its first tokens are chosen.

        length: the most tokens of any row, by default the longest prompt + new ones; what is `endless` goes on beyond.
        later: how requests that come later sample, None for any way. stack: until it is closed the decoder is borrowed
        from the store; without it, it is the caller's own. rows: of the decoder, if more than there are requests.
        apart: prompts are read one by one.
        """
        started = time.perf_counter()
        length = length or max(len(request.ids) + request.max_new_tokens for request in requests)
        budget_slots = self.sizing.slots(length)
        samplings = [request.sampling for request in requests]
        policies, own_length = self.sizing.policies(math.inf if endless else length), length if endless else None

        plan, caps, floor = self.sizing.plan(length), self.sizing.caps(length), self.policy.floor
        rows = rows or len(requests)
        slots = sum(plan.slots) if plan else total_slots(budget_slots, caps, floor)
        memory = Memory()
        if stack:
            config = self.model.config
            memory = stack.enter_context(self.store.lend(rows * config.n_kv_heads * config.head_dim * slots))

        if plan is not None:
            idle = [GREEDY] * (rows - len(requests))
            decoder, made = self._decoder(plan, policies, samplings + idle, later, memory)
            importance = self._refill(decoder, range(len(requests)), requests, apart, own_length)
        else:
            (ids, lengths), rotary = self._padded(requests), self._rotary(requests, own_length)
            at = torch.arange(rows, device=self.device)
            waiting = Waiting(
                self._cache([slots], rows, memory),  # the arena, before it is divided
                memory,
                lengths,
                policies,
                lambda seen: self.layer_policy.upper_bound(seen, len(caps), budget_slots, caps, floor),
            )
            measures = self._measures(budget_slots, caps)
            logits, importance = self._prefill(ids, lengths, rotary, policies, waiting.keep, measures)
            plan = self.sizing.plan(length, waiting.evidence)
            decoder, made = self._decoder(plan, policies, samplings, later, memory)
            keep = decoder.keeper(at, lengths)
            for layer, prompt in enumerate(waiting.prompts):
                keep(layer, None, prompt)
            decoder.begin(at, lengths, logits, samplings, rotary)
        return decoder, Figures(
            plan=plan.slots,
            groups=plan.groups,
            importance=importance if all(map(math.isfinite, importance)) else None,
            budget_slots=budget_slots,
            kv_bytes=decoder.cache.kv_bytes,
            state_bytes=decoder.cache.state_bytes,
            kv_bytes_full=sum(
                self.sizing.full_bytes(len(request.ids) + request.max_new_tokens) for request in requests
            ),
            prefill_tokens=sum(len(request.ids) for request in requests),
            prefill_s=time.perf_counter() - started - decoder.capture_s * made,
            compile_s=decoder.capture_s * made,
        )

    def _padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """The prompts as ids [R, S], padded on the right, and their lengths [R].

        Padding repeats a row's own last token. No token attends to it, but 0 * inf would be NaN: another token might
        overflow where the row's own do not.
        """
        lengths = [len(request.ids) for request in requests]
        ids = torch.tensor([request.ids[-1:] * max(lengths) for request in requests])
        for row, request in enumerate(requests):
            ids[row, : lengths[row]] = torch.tensor(request.ids)
        return ids.to(self.device), torch.tensor(lengths, device=self.device)

    def _rotary(self, requests: Sequence[Request], length: int | None = None) -> list[Tensor]:
        """What turns each request's keys: fixed by its own length, or by this one."""
        return self.model.rotary_of([length or len(request.ids) + request.max_new_tokens for request in requests])

    def _prefill(
        self,
        ids: Tensor,
        lengths: Tensor,
        rotary: Sequence[Tensor],
        policies: Sequence[TokenPolicy],
        keep: Callable[[int, Tensor | None, Prompt], None],
        measures: Sequence[Callable[[Attended], Tensor] | None] | None = None,
    ) -> tuple[Tensor, list[float]]:
        """ids [R, S], right-padded -> logits [R, vocab] after each row's last token, and every layer's importance.

        A row of which any layer's signal is not finite has logits of NaN; the importance is that of the other rows.
        keep(layer, evidence [R, ...], prompt) is called after each layer: what it does not keep is gone before the next
        one. The evidence is what the layer's own one of `measures` says.
        """
        x = self.model.embedded(ids, torch.arange(ids.shape[1], device=self.device)[None])
        size = rows_at_once(ids.shape[1])
        chunks = [slice(start, start + size) for start in range(0, len(ids), size)]
        ragged = [lengths[rows] if int(lengths.min()) < ids.shape[1] else None for rows in chunks]
        signals = []
        measures = measures or [None] * len(policies)
        layers = zip(self.model.layers, rotary, policies, measures, strict=True)
        for layer, (block, frequencies, policy, measure) in enumerate(layers):
            own, parts = [frequencies[rows] if frequencies.dim() > 1 else frequencies for rows in chunks], []
            for rows, turned, real in zip(chunks, own, ragged, strict=True):
                x[rows], *part = block.prefill(x[rows], turned, real, policy, measure)
                parts.append(part)
            prompt = Prompt.joined([part.pop() for part in parts])
            signals.append(torch.cat([part[0] for part in parts]))
            keep(layer, torch.cat([part[1] for part in parts]) if measure else None, prompt)
            del prompt, part
        last = x[torch.arange(len(lengths), device=self.device), lengths - 1]
        each = torch.stack(signals)  # [L, R]
        finite = each.isfinite()
        logits = self.model.logits(last).masked_fill(~finite.all(0)[:, None], math.nan)
        return logits, each.masked_fill(~finite, math.nan).nanmean(1).tolist()  # one wait for all layers

    def _measures(self, budget_slots: int, caps: Sequence[int]) -> list[Callable[[Attended], Tensor]]:
        """What asks each layer for the evidence that the layer policy wants."""
        fixed = {"budget": budget_slots, "floor": self.policy.floor}
        return [partial(self.layer_policy.measure, cap=cap, **fixed) for cap in caps]

    def _cache(self, slots: Sequence[int], batch: int, memory: Memory) -> KVCache:
        c, scored, format = self.model.config, self.policy.scored, self.sizing.format
        return KVCache(slots, batch, c.n_kv_heads, c.head_dim, self.model.dtype, self.device, scored, memory, format)

    def _decoder(
        self,
        plan: Plan,
        policies: list[TokenPolicy],
        samplings: Sequence[Sampling],
        later: Sequence[Sampling] | None,
        memory: Memory,
    ) -> tuple[Decoder, bool]:
        """A decoder for this, and whether it is new: from the store, if that lent the memory."""
        batch, sampler = len(samplings), Sampler(samplings, self.device, later)

        def make() -> Decoder:
            cache, rotary = self._cache(plan.slots, batch, memory), self.model.rotary_of([1] * batch)
            return Decoder(self.model, self.code, cache, rotary, policies, sampler)

        windowed = tuple(policy is not self.policy for policy in policies)
        key = (tuple(plan.slots), batch, sampler.greedy, sampler.restricted, windowed)
        return self.store.decoder(key, memory, make)

    def _refill(
        self,
        decoder: Decoder,
        rows: Sequence[int],
        requests: Sequence[Request],
        apart: bool = False,
        length: int | None = None,
    ) -> list[float]:
        """Put new requests into rows that are free, and return every layer's importance, the mean over the rows.

        length: what fixes the rotary frequencies, if it is not each request's own.
        """
        if apart:
            each = [self._refill(decoder, [row], [request]) for row, request in zip(rows, requests, strict=True)]
            each = [own for own in each if all(map(math.isfinite, own))] or each
            return [fmean(layer) for layer in zip(*each, strict=True)]
        (ids, lengths), rotary = self._padded(requests), self._rotary(requests, length)
        at = torch.tensor(rows, device=self.device)
        keep = decoder.keeper(at, lengths)
        logits, importance = self._prefill(ids, lengths, rotary, decoder.policies, keep)
        decoder.begin(at, lengths, logits, [request.sampling for request in requests], rotary)
        return importance


class Conversation:
    """Turns over one cache, which keeps the plan of the first turn and stays as large, however long it all becomes.

    A fraction as budget is of the model's position limit. An end-of-sequence token that ends an answer is never fed:
    what the next turn begins with closes it.
    """

    def __init__(self, engine: Engine, sampling: Sampling):
        self.engine, self.sampling = engine, sampling
        self._decoder: Decoder | None = None
        self._figures: Figures | None = None
        self._stream: Stream | None = None
        self._unfed: list[int] = []  # the last token before the latest turn, not yet fed when that began

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
        """The answer to one more turn. It ends the turn before. UserError, with nothing changed, if it cannot run."""
        unfed = self._unfed
        if self._stream and (said := self._stream.completion.tokens):  # else nobody listened to the turn before
            unfed = said[-1:] if self._stream.completion.finish_reason != "eos" else []
        if self._stream and self._stream.completion.error:
            raise UserError(f"{self._stream.completion.error}; this conversation cannot go on, begin a new one")
        request = Request([*unfed, *integers(ids, "prompt ids")], max_new_tokens, self.sampling, eos_ids, stop)
        self.engine.check(request, self.seen, self._limit)
        completion = Completion(request)
        if self._stream:
            self._stream.close()
        self._stream, self._unfed = Stream(self._answer(completion), completion), unfed
        return self._stream

    @property
    def _limit(self) -> int:
        return self.engine.model.config.max_positions

    @torch.inference_mode()
    def _answer(self, completion: Completion) -> Iterator[list[Completion]]:
        if self._decoder is None:
            try:
                self._decoder, self._figures = self.engine._start([completion.request], self._limit, endless=True)
            except NotFinite:
                completion.fail(self.engine.not_finite)
                yield [completion]
                return
            figures = self._figures
        else:
            figures = self._append(completion.request)
        # No lag: what a step feeds cannot be taken back.
        yield from self.engine._decode(self._decoder, figures, [completion], iter(()), lag=0)

    def _append(self, request: Request) -> Figures:
        started, decoder = time.perf_counter(), self._decoder
        x = decoder.append(torch.tensor([request.ids], device=self.engine.device))
        decoder.tokens.copy_(decoder.sampler(self.engine.model.logits(x[:, -1])))
        full = self.engine.sizing.full_bytes(int(decoder.seen) + request.max_new_tokens)
        figures = replace(self._figures, prefill_tokens=len(request.ids), kv_bytes_full=full, compile_s=0.0)
        return replace(figures, prefill_s=time.perf_counter() - started, decode_s=0.0, decode_tokens=0)
