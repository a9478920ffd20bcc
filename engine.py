"""The engine: rows of requests that come and go over one cache. It sees token ids only.

    model, config = checkpoint.load("checkpoints/tiny")
    engine = Engine(model, policy="h2o", layers="squeeze", budget=0.25)
    stream = engine.stream(ids, max_new_tokens=64)
    for token in stream:
        ...
    print(stream.completion.figures.plan)

What happens to a request, step by step: README.md, "One request". `Batch` does it for many rows.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from bound import compiled_graphs
from decoder import Decoder, Store
from errors import UserError, shown, whole
from graphs import Code
from kvcache import KVCache, Memory
from model import Transformer
from policies import layers as layer_policies
from policies import tokens as token_policies
from policies.layers import LayerPolicy, Plan
from policies.layers.base import mean_finite
from policies.tokens import TokenPolicy
from prefill import Held, NotFinite, Prompts, read
from request import Completion, Figures, Request, Stream
from sampling import GREEDY, NOT_FINITE, Sampler, Sampling, not_finite
from sizing import Sizing, rows_at_once

CHUNK = 2048  # tokens of prompts that go through all layers, or as many times more through fewer, between two steps


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
        self.sizing.check(request.ids, max_new_tokens)
        batch, completion = self.batch(1, request.length, [sampling]), Completion(request)

        def tokens() -> Iterator[int]:
            with batch:
                batch.admit(completion)
                yield from batch.tokens(completion)

        return Stream(tokens(), completion)

    def batch(
        self, rows: int, max_length: int, samplings: Collection[Sampling] | None = None, apart: bool = False
    ) -> "Batch":
        """Rows for requests that come and go, of at most `max_length` tokens with their answers. See `Batch`."""
        return Batch(self, rows, max_length, samplings, apart)

    def generate(
        self,
        requests: Iterable[Request],
        batch_size: int | None = None,
        max_length: int | None = None,
        samplings: Collection[Sampling] | None = None,
        apart: bool = False,
    ) -> Iterator[Completion]:
        """Run the requests, `batch_size` rows at a time; yields each one's completion when it ends.

        By default a sequence of requests is one batch, as long as the longest that can run; other iterables, which are
        read as rows get free, need both numbers. A request that cannot run yields a completion with its `error` as soon
        as it is read. max_length, samplings, apart: see `Batch`.
        """
        if not isinstance(requests, Iterable):
            raise UserError(f"requests must be a sequence or an iterable of Request, not {shown(requests)}")
        if batch_size is not None:
            whole(batch_size, "batch_size", least=1)
        if max_length is not None:
            whole(max_length, "max_length", least=1)
        judged = ((request, self.refusal(request)) for request in requests)
        if isinstance(requests, Sequence):
            judged = list(judged)
            able = [request for request, refusal in judged if not refusal]
            samplings = [*(samplings or ()), *(request.sampling for request in able)]
            if not able:
                yield from (Completion.refused(*refused) for refused in judged)
                return
            batch_size = min(batch_size or len(able), len(able))
            max_length = max_length or max(request.length for request in able)
        if batch_size is None or max_length is None:
            raise UserError("requests that are not a sequence need a batch_size and a max_length")
        queue = iter(judged)
        with self.batch(batch_size, max_length, samplings, apart) as batch:
            while queue or batch.busy:
                while queue and batch.free:
                    if (another := next(queue, None)) is None:
                        queue = None
                    elif refusal := another[1] or batch.too_long(another[0]):
                        yield Completion.refused(another[0], refusal)
                    else:
                        batch.admit(Completion(another[0]))
                batch.step()
                yield from (completion for completion in batch.collect() if completion.finish_reason)

    def refusal(self, request: Request) -> str | None:
        """Why the request cannot run whatever the budget, in one line."""
        if not isinstance(request, Request):
            return f"a request must be a Request, not {shown(request)}"
        return self.sizing.refusal(request.ids, request.max_new_tokens)

    def decoder(
        self,
        plan: Sequence[int],
        rows: int,
        policies: Sequence[TokenPolicy],
        samplings: Collection[Sampling] | None,
        lent: ExitStack | None = None,
    ) -> tuple[Decoder, bool]:
        """A decoder of that many rows, and whether it is new: out of the store until `lent` is closed, or its own."""
        c, sampler = self.model.config, Sampler([GREEDY] * rows, self.device, samplings)

        def make(memory: Memory) -> Decoder:
            form = (self.model.dtype, self.device, self.policy.scored, memory, self.sizing.format)
            cache = KVCache(plan, rows, c.n_kv_heads, c.head_dim, *form)
            return Decoder(self.model, self.code, cache, self.model.rotary_of([1] * rows), policies, sampler)

        if lent is None:
            return make(Memory()), True
        windowed = tuple(policy is not self.policy for policy in policies)
        key = (tuple(plan), rows, sampler.greedy, sampler.restricted, windowed)
        return lent.enter_context(self.store.lend(key, rows * c.n_kv_heads * c.head_dim * sum(plan), make))


class Batch:
    """Rows in flight under one plan. A request may come at any time; a row that ends takes the next one.

        with engine.batch(rows=8, max_length=1024) as batch:
            completion = batch.add(request)
            while batch.busy:
                batch.step()
                for completion in batch.collect():  # each has one more token, or has ended
                    ...

    The plan is the engine's, or is made from the prompts that are there at the first step. A prompt is read between
    steps, CHUNK tokens through all layers or more of them through fewer, at least one, so that the other rows go on. A
    row gets what it would get alone under the same plan, with one exception: where a layer's sliding window is shorter
    than max_length some policies are plain rings in it (`TokenPolicy.within_window`), for short requests too.

    max_length: the most tokens of a prompt and its answer; it fixes the arena. samplings: all ways in which requests
    sample, if that is known: no step computes more. apart: what a request gets must not depend on the others, not even
    in the last bits, so prompts are read one by one. endless: the one row is a conversation's.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int,
        max_length: int,
        samplings: Collection[Sampling] | None = None,
        apart: bool = False,
        endless: bool = False,
    ):
        if samplings is not None and not all(isinstance(sampling, Sampling) for sampling in samplings):
            raise UserError(f"samplings must be some of Sampling, not {shown(samplings)}")
        rows, max_length = whole(rows, "rows", least=1), whole(max_length, "max_length", least=1)
        self.engine, self.max_length, self.samplings, self.endless = engine, max_length, samplings, endless
        self.sizes = engine.sizing.at(max_length, endless)
        if apart and self.sizes.plan is None:
            raise UserError(f"requests that run apart need a plan; {engine.layer_policy.name} makes it from prompts")
        self.apart, self.lag = apart, 0 if endless else engine.lag  # what a conversation has fed cannot be taken back
        self.decoder: Decoder | None = None
        self.figures = Figures()
        self._waiting: deque[Completion] = deque()  # not read yet
        self._entering: dict[int, Completion] = {}  # by row: being read
        self._running: list[Completion | None] = [None] * rows
        self._reading: Iterator[None] | None = None
        self._wanted = [0] * rows  # tokens of each row that have been asked for
        self._asked: deque[tuple[list[Completion | None], Callable[[], list[int]], bool]] = deque()
        self._ended: list[Completion] = []  # without a token, since the last `collect`
        self._step_s, self._graphs = 0.0, compiled_graphs()  # what is not in the figures yet; graphs before it
        self._lent = ExitStack()

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        """All that is left is interrupted, and the memory can be used again."""
        for completion in [*self._waiting, *self._entering.values(), *filter(None, self._running)]:
            completion.finish_reason = completion.finish_reason or "interrupted"
        self._waiting.clear()
        self._lent.__exit__(*error)

    @property
    def free(self) -> int:
        """How many more requests would find a row."""
        return self._running.count(None) - len(self._entering) - len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do or to collect."""
        return bool(self._waiting or self._entering or self._asked or self._ended or any(self._running))

    def too_long(self, request: Request) -> str | None:
        """Why the request does not fit into a row, in one line."""
        if self.endless or request.length <= self.max_length:
            return None
        return f"{len(request.ids)} prompt + {request.max_new_tokens} new tokens exceed max-length {self.max_length}"

    def add(self, request: Request) -> Completion:
        """Queue a request, which is read as soon as there is a row for it. UserError if it cannot run."""
        if refusal := self.engine.refusal(request) or self.too_long(request):
            raise UserError(refusal)
        completion = Completion(request)
        self.admit(completion)
        return completion

    def admit(self, completion: Completion) -> None:
        """Queue a request that has been checked."""
        self._waiting.append(completion)

    def cancel(self, completion: Completion) -> None:
        """End it now, with the tokens that it has: its row is free for the next one. Nothing, if it has ended."""
        if not completion.finish_reason:
            self._waiting = deque(own for own in self._waiting if own is not completion)
            self._end(completion, "interrupted")

    def _end(self, completion: Completion, reason: str, error: str | None = None) -> None:
        completion.finish_reason, completion.error = reason, error
        self._running = [None if own is completion else own for own in self._running]
        if all(own.finish_reason for own in self._entering.values()):  # nobody wants what is being read
            self._entering, self._reading = {}, None
        self._ended.append(completion)

    @torch.inference_mode()
    def step(self) -> None:
        """Read a part of what waits, then start a token of each row that wants one."""
        started = time.perf_counter()
        self._read()
        self.figures.prefill_s += (now := time.perf_counter()) - started
        if len(self._asked) <= self.lag and (rows := self._wanting()):
            self.decoder.step()
            self._ask(rows, stepped=True)
        self._step_s += time.perf_counter() - now

    def collect(self) -> list[Completion]:
        """The requests that got a token, or ended, since the last time. Waits for a step only if `lag` others run."""
        news, self._ended = self._ended, []
        while not news and self._asked and (len(self._asked) > self.lag or not self._wanting()):
            news = self._taken(*self._asked.popleft())
        return news

    def tokens(self, completion: Completion) -> Iterator[int]:
        """One request's tokens as they are made, while the others go on."""
        while not completion.finish_reason:
            self.step()
            if completion in self.collect() and not completion.error:
                yield completion.tokens[-1]

    def _wanting(self) -> list[int]:
        """Rows of which more tokens are to be asked for."""
        running = enumerate(self._running)
        return [row for row, own in running if own and self._wanted[row] < own.request.max_new_tokens]

    def _ask(self, rows: Iterable[int], stepped: bool) -> None:
        """For the tokens that these rows have now, after a step or a prompt."""
        owners: list[Completion | None] = [None] * len(self._running)
        for row in rows:
            owners[row] = self._running[row]
            self._wanted[row] += 1
        self._asked.append((owners, self.decoder.read(), stepped))

    def _taken(
        self, owners: list[Completion | None], tokens: Callable[[], list[int]], stepped: bool
    ) -> list[Completion]:
        """Wait for tokens that were asked for and hand them to those that own the rows; these are returned."""
        started = time.perf_counter()
        due = [(row, own) for row, own in enumerate(owners) if own and not own.finish_reason]
        if not due:
            return []  # the step ran ahead of their ends: nobody waits for it
        made = tokens()
        for row, completion in due:
            if made[row] == NOT_FINITE:
                completion.fail(not_finite(self.engine.model.dtype))
            else:
                completion.append(made[row])
            if completion.finish_reason:
                self._running[row] = None
        seconds, self._step_s = self._step_s + time.perf_counter() - started, 0.0
        before, self._graphs = self._graphs, compiled_graphs()
        self.figures.spent(seconds, sum(not own.error for _, own in due), stepped, compiled=before != self._graphs)
        return [completion for _, completion in due]

    def _read(self) -> None:
        """The next part of the prompts: one chunk if other rows go on meanwhile, else all that waits and has a row."""
        most, done = CHUNK * len(self.sizes.caps) if any(self._running) else math.inf, 0
        while self._reading is not None or self._enter():
            tokens = max(len(completion.request.ids) for completion in self._entering.values())
            part = tokens * min(len(self._entering), rows_at_once(tokens))
            if done and done + part > most:
                return
            done += part
            try:
                next(self._reading)
            except (StopIteration, NotFinite) as end:
                self._entered(isinstance(end, NotFinite))

    def _enter(self) -> bool:
        """Whether there are rows for some that wait, which begin to be read: together, unless that changes much."""
        rows = [row for row, own in enumerate(self._running) if own is None][: len(self._waiting)]
        if not rows:
            return False
        if self.apart:
            rows = rows[:1]
        elif self.sizes.plan is not None:  # else it is made from all that are there
            rows = rows[: rows_at_once(max(len(own.request.ids) for own in self._waiting))]
        self._entering = {row: self._waiting.popleft() for row in rows}
        turn = self.endless and self.decoder is not None
        self._reading = self._read_turn() if turn else self._read_prompts()
        return True

    def _read_prompts(self) -> Iterator[None]:
        engine, sizes = self.engine, self.sizes
        requests = [completion.request for completion in self._entering.values()]
        limits = [self.max_length if self.endless else request.length for request in requests]
        prompts = Prompts.of(engine.model, [request.ids for request in requests], limits)
        held = Held(prompts, sizes, engine.sizing.format)
        logits, signals = yield from read(engine.model, prompts, sizes.policies, held.keep, sizes.measures)
        if self.decoder is None:
            self._prepare(held.plan, mean_finite(signals.T))
        rows = torch.tensor(list(self._entering), device=engine.device)
        samplings = [request.sampling for request in requests]
        self.decoder.begin(rows, prompts.lengths, held.layers, logits, samplings, prompts.rotary)

    def _read_turn(self) -> Iterator[None]:
        """A later turn of a conversation, which goes on behind what its row holds."""
        [request], decoder = [completion.request for completion in self._entering.values()], self.decoder
        self.figures = self.figures.of_a_new_turn()
        for x in decoder.append(torch.tensor([request.ids], device=self.engine.device)):
            last = x[:, -1]
            yield
        decoder.tokens.copy_(decoder.sampler(self.engine.model.logits(last)))

    def _prepare(self, plan: Plan, importance: Tensor) -> None:
        """The arena and all that a step needs, now that the plan is known."""
        self.sizes = replace(self.sizes, plan=plan)
        own = (plan.slots, len(self._running), self.sizes.policies, self.samplings)
        self.decoder, made = self.engine.decoder(*own, None if self.endless else self._lent)
        figures, cache = self.figures, self.decoder.cache
        figures.plan, figures.groups, figures.budget_slots = plan.slots, plan.groups, self.sizes.budget_slots
        figures.kv_bytes, figures.state_bytes = cache.kv_bytes, cache.state_bytes
        figures.importance = importance.tolist() if bool(importance.isfinite().all()) else None
        if made:
            figures.compile_s = self.decoder.capture_s
            figures.prefill_s -= self.decoder.capture_s  # which comes with what is added to it

    def _entered(self, failed: bool) -> None:
        """What was being read is in its rows, with its first tokens chosen; or no plan could be made of it."""
        entered = {row: own for row, own in self._entering.items() if not own.finish_reason}  # else it was cancelled
        self._entering, self._reading, figures = {}, None, self.figures
        for row, completion in entered.items():
            if failed:
                self._end(completion, "error", not_finite(self.engine.model.dtype))
            else:
                self._running[row], self._wanted[row], completion.figures = completion, 0, figures
                figures.prefill_tokens += len(completion.request.ids)
        if entered and not failed:
            running = [own.request for own in self._running if own]
            earlier = int(self.decoder.seen) - len(running[0].ids) if self.endless else 0
            full = sum(self.engine.sizing.full_bytes(earlier + request.length) for request in running)
            figures.kv_bytes_full = max(figures.kv_bytes_full, full)
            self._ask(entered, stepped=False)
