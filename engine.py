"""The engine: rows of requests that come and go over one cache. It sees token ids only.

    model, config = checkpoint.load("checkpoints/tiny")
    engine = Engine(model, policy="h2o", layers="squeeze", budget=0.25)
    for token in engine.stream(ids, max_new_tokens=64):
        ...

What happens to a request, step by step: docs/request.md. `Batch` does it for many rows.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from bound import compiled_graphs
from decoder import Behind, Decoder, Store
from errors import UserError, shown, whole
from graphs import Code
from kvcache import KVCache, Memory
from model import Transformer
from parallel import same
from policies import layers as layer_policies
from policies import options
from policies import tokens as token_policies
from policies.layers import LayerPolicy, Plan
from policies.layers.base import mean_finite
from policies.tokens import TokenPolicy
from prefill import Held, NotFinite, Prompts, read
from promptcache import About, PromptCache, fingerprint
from request import Completion, Figures, Request, Stream
from sampling import GREEDY, NOT_FINITE, Sampler, Sampling, kind_of, not_finite
from sizing import Sizing, rows_at_once

CHUNK = 2048  # tokens of prompts that go through all layers, or as many times more through fewer, between two steps


class Engine:
    """Runs requests on a model under one token policy and one layer policy.

    policy, layers: a policy or its name. budget: slots per layer (an integer above 1) or the share of
    prompt + max_new_tokens in (0, 1] that a uniform plan would give; None chooses one that suits the request.
    plan: slots per layer, instead of letting `layers` and `budget` decide. compile: run decode through one compiled
    block, used for every layer. cache_format: "dense", or "int8" for a cache of 8 bits a number (formats.py). UserError
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
        form["weights"] = sum(parameter.nbytes for parameter in model.parameters())
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
        past: PromptCache | None = None,
        keep: str | None = None,
    ) -> Stream:
        """One request's tokens as they are made. UserError, before anything is allocated, for one that cannot run.

        past, keep: as of `Request`.
        """
        request = Request(ids, max_new_tokens, sampling, eos_ids, stop, past, keep)
        if refusal := self.refusal(request):
            raise UserError(refusal)
        batch = self.batch(1, request.length, [sampling], keeps=keep == "answer")
        if misfit := batch.misfit(request):
            raise UserError(misfit)
        return Stream(batch, Completion(request), within=batch)

    def batch(
        self,
        rows: int,
        max_length: int,
        samplings: Collection[Sampling] | None = None,
        apart: bool = False,
        keeps: bool = False,
    ) -> "Batch":
        """Rows for requests that come and go, of at most `max_length` tokens with their answers. See `Batch`."""
        return Batch(self, rows, max_length, samplings, apart, keeps=keeps)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def about(self, **row: Any) -> About:
        """What a prompt cache says of the engine that made it, and of its row."""
        sizing = self.sizing
        dtype = str(self.model.dtype).removeprefix("torch.")
        own = {"fingerprint": self.fingerprint, "format": sizing.format, "dtype": dtype}
        own |= {"policy": options.word(self.policy), "layers": options.word(self.layer_policy)}
        return About(**own | {"policies": [], "plan": [], "seen": 0, "length": 0} | row)

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
        read as rows get free, need both numbers, and have all rows from the start. A request that cannot run yields a
        completion with its `error` as soon as it is read. max_length, samplings, apart: see `Batch`.
        """
        if not isinstance(requests, Iterable):
            raise UserError(f"requests must be a sequence or an iterable of Request, not {shown(requests)}")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            value is None or whole(value, name, least=1)
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
                    elif refusal := another[1] or batch.misfit(another[0]):
                        yield Completion.refused(another[0], refusal)
                    else:
                        batch.admit(Completion(another[0]))
                batch.step()
                yield from (completion for completion in batch.collect() if completion.finish_reason)

    def refusal(self, request: Request) -> str | None:
        """Why the request cannot run whatever the budget, in one line."""
        if not isinstance(request, Request):
            return f"a request must be a Request, not {shown(request)}"
        past = request.past
        if past and any(getattr(past.about, name) != own for name, own in self._form().items()):
            return "the prompt cache is of another model, policy or format"
        ready = past is not None and past.logits is not None
        return self.sizing.refusal(request.ids, request.max_new_tokens, request.seen, ready)

    def _form(self) -> dict[str, str]:
        """What a prompt cache must have in common with the engine."""
        own = self.about()
        return {name: getattr(own, name) for name in ("fingerprint", "policy", "format", "dtype")}

    def decoder(
        self,
        plan: Sequence[int],
        rows: int,
        policies: Sequence[TokenPolicy],
        samplings: Collection[Sampling] | None,
        lent: ExitStack | None = None,
    ) -> tuple[Decoder, bool]:
        """A decoder of that many rows, and whether it is new. The store lends it until `lent` is closed, if given."""
        c, sampler = self.model.config, Sampler([GREEDY] * rows, self.device, samplings)
        recurrent = c.recurrent(self.model.dtype)

        def make(memory: Memory) -> Decoder:
            form = (self.model.dtype, self.device, self.policy.scored, memory, self.sizing.format, recurrent)
            cache = KVCache(plan, rows, c.n_kv_heads, c.head_dim, *form)
            return Decoder(self.model, self.code, cache, self.model.rotary_of([1] * rows), policies, sampler)

        if lent is None:
            return make(Memory()), True
        windowed = tuple(policy is not self.policy for policy in policies)
        key = (tuple(plan), rows, sampler.greedy, sampler.restricted, windowed)
        sizes = {"k": rows * c.n_kv_heads * c.head_dim * sum(plan)}
        sizes |= {name: rows * len(c.linear) * math.prod(shape) for name, (_, shape) in recurrent.items()}
        return lent.enter_context(self.store.lend(key, sizes, make))


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
    in the last bits, so prompts are read one by one. keeps: requests may keep their answers, so no step runs ahead of
    their ends. endless: there is one row, which is a conversation's.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int,
        max_length: int,
        samplings: Collection[Sampling] | None = None,
        apart: bool = False,
        endless: bool = False,
        keeps: bool = False,
    ):
        if samplings is not None and not all(isinstance(sampling, Sampling) for sampling in samplings):
            raise UserError(f"samplings must be some of Sampling, not {shown(samplings)}")
        rows, max_length = whole(rows, "rows", least=1), whole(max_length, "max_length", least=1)
        self.engine, self.max_length, self.samplings, self.endless = engine, max_length, samplings, endless
        self._kind = kind_of(None if samplings is None else [GREEDY, *samplings])
        self.sizes = engine.sizing.at(max_length, endless)
        if apart and self.sizes.plan is None:
            raise UserError(f"requests that run apart need a plan; {engine.layer_policy.name} makes it from prompts")
        self.apart, self.lag = apart, 0 if endless or keeps else engine.lag  # what has been fed cannot be taken back
        self.decoder: Decoder | None = None
        self.figures = Figures()
        self._waiting: deque[Completion] = deque()  # not read yet
        self._entering: dict[int, Completion] = {}  # by row: being read
        self._running: list[Completion | None] = [None] * rows
        self._reading: Iterator[None] | None = None
        self._wanted = [0] * rows  # tokens of each row that have been asked for
        self._placed: dict[int, tuple[int, list[Tensor]]] = {}  # by row that is watched: see `held`
        self._asked: deque[tuple[list[Completion | None], Callable[[], list[int]], bool]] = deque()
        self._news: dict[int, Completion] = {}  # those that got a token or ended since the last `collect`, by id
        self._step_s, self._graphs = 0.0, compiled_graphs()  # what is not in the figures yet; graphs before it
        self._lent, self._left = ExitStack(), False

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        """All that is left is interrupted, and the memory can be used again."""
        for completion in [*self._waiting, *self._entering.values(), *filter(None, self._running)]:
            completion.finish_reason = completion.finish_reason or "interrupted"
        self._left, self._waiting, self._entering, self._reading, self.decoder = True, deque(), {}, None, None
        self._running, self._news = [None] * len(self._running), {}
        self._asked.clear()
        self._lent.__exit__(*error)

    @property
    def free(self) -> int:
        """How many more requests would find a row."""
        return self._running.count(None) - len(self._entering) - len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do or to collect."""
        return bool(self._waiting or self._entering or self._asked or self._news or any(self._running))

    def misfit(self, request: Request) -> str | None:
        """Why the request does not fit into a row of this batch, in one line."""
        sampling, (greedy, restricted) = request.sampling, self._kind
        if not self.endless and request.length > self.max_length:
            before = f"{request.seen} earlier + " * bool(request.seen)
            tokens = f"{before}{len(request.ids)} prompt + {request.max_new_tokens} new tokens"
            return f"{tokens} exceed max-length {self.max_length}"
        if greedy and sampling.temperature > 0 or sampling.restricted and not restricted:
            return f"the batch's samplings have none like {shown(sampling)}"
        if request.keep == "answer" and self.lag:
            return "in this batch steps run ahead of the ends of answers, so they cannot be kept"
        if request.past is None:
            return None
        if self.sizes.plan is None:
            return "going on from a prompt cache takes a plan that is given, such as its own"
        if request.watched and request.past.placed is None and not self.engine.policy.scored:
            return "the prompt cache does not say which tokens it holds, so it cannot be watched"
        return request.past.misfit(self.sizes.plan.slots, self.sizes.policies)

    def add(self, request: Request) -> Completion:
        """Queue a request, which is read as soon as there is a row for it. UserError if it cannot run."""
        if refusal := self.engine.refusal(request) or self.misfit(request):
            raise UserError(refusal)
        completion = Completion(request)
        self.admit(completion)
        return completion

    def admit(self, completion: Completion) -> None:
        """Queue a request that has been checked."""
        if self._left:
            raise UserError("this batch has been left; make another one")
        self._waiting.append(completion)

    def cancel(self, completion: Completion) -> None:
        """End one of this batch now, with the tokens that it has: its row is free. Nothing, if it has ended."""
        own = [*self._waiting, *self._entering.values(), *self._running]
        if completion in own and not completion.finish_reason:
            self._waiting = deque(other for other in self._waiting if other is not completion)
            self._end(completion, "interrupted")

    def _end(self, completion: Completion, reason: str, error: str | None = None) -> None:
        completion.finish_reason, completion.error = reason, error
        self._running = [None if own is completion else own for own in self._running]
        self._news[id(completion)] = completion
        if all(own.finish_reason for own in self._entering.values()):  # nobody wants what is being read
            if self._entering and self.endless and self.decoder:  # a part of it is in the cache
                completion.error = completion.error or "this turn was cut off while it was read"
            self._entering, self._reading = {}, None

    @torch.inference_mode()
    def step(self) -> None:
        """Read a part of what waits, then start a token of each row that wants one."""
        started = time.perf_counter()
        self._read()
        self.figures.prefill_s += (now := time.perf_counter()) - started
        if len(self._asked) <= self.lag and (rows := self._wanting()):
            self._suit()
            self.decoder.step()
            self._ask(rows, stepped=True)
        self._step_s += time.perf_counter() - now

    def collect(self) -> list[Completion]:
        """The requests that got a token, or ended, since the last time. Waits for a step only if `lag` others run."""
        while not self._news and self._asked and (len(self._asked) > self.lag or not self._wanting()):
            self._take(*self._asked.popleft())
        news, self._news = [*self._news.values()], {}
        return news

    def _suit(self) -> None:
        """The next draws are for the rows that are there, unless a captured step has fixed what it computes."""
        if self.engine.code.capture is None:
            own = [*self._entering.values(), *filter(None, self._running)]
            self.decoder.sampler.suit([completion.request.sampling for completion in own])

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
        self._asked.append((owners, self.decoder.ask(), stepped))

    def _take(self, owners: list[Completion | None], tokens: Callable[[], list[int]], stepped: bool) -> None:
        """Wait for tokens that were asked for and hand them to those that own the rows."""
        started, failed = time.perf_counter(), None
        due = [(row, own) for row, own in enumerate(owners) if own and not own.finish_reason]
        if not due:
            return  # the step ran ahead of their ends: nobody waits for it
        made = tokens()
        for row, completion in due:
            try:
                if made[row] == NOT_FINITE:
                    completion.fail(not_finite(self.engine.model.dtype))
                else:
                    completion.append(made[row])
            except BaseException as error:  # of its `stop`; the others get their tokens first
                failed, completion.finish_reason = failed or error, "interrupted"
            if completion.finish_reason and self._running[row] is completion:
                self._keep("answer", row, completion)
                self._running[row] = None
            self._news[id(completion)] = completion
        seconds, self._step_s = self._step_s + time.perf_counter() - started, 0.0
        before, self._graphs = self._graphs, compiled_graphs()
        self.figures.spent(seconds, sum(not own.error for _, own in due), stepped, compiled=before != self._graphs)
        if failed:
            raise failed

    def _read(self) -> None:
        """The next part of the prompts: one chunk if other rows go on meanwhile, else all that waits and has a row."""
        most, done = CHUNK * len(self.sizes.caps) if any(self._running) else math.inf, 0
        while self._reading is not None or self._enter():
            tokens = max(1, *(len(completion.request.ids) for completion in self._entering.values()))
            part = tokens * min(len(self._entering), rows_at_once(tokens))
            if done and done + part > most:
                return
            done += part
            try:
                next(self._reading)
            except StopIteration:
                self._entered()
            except NotFinite:
                self._end_entering("error", not_finite(self.engine.model.dtype))
            except BaseException:
                self._end_entering("interrupted")
                raise

    def _end_entering(self, reason: str, error: str | None = None) -> None:
        for completion in [*self._entering.values()]:
            self._end(completion, reason, error)

    def _enter(self) -> bool:
        """Begin to read requests that wait, as many together as a block reads at once. Whether any have rows."""
        rows = [row for row, own in enumerate(self._running) if own is None][: len(self._waiting)]
        if not rows:
            return False
        fresh = sum(1 for _ in takewhile(lambda own: own.request.past is None, self._waiting))
        rows = rows[: max(1, fresh)]
        if self.apart or not fresh:
            rows = rows[:1]
        elif self.sizes.plan is not None:  # else it is made from all that are there
            rows = rows[: rows_at_once(max(len(own.request.ids) for own in self._waiting))]
        self._entering = {row: self._waiting.popleft() for row in rows}
        if self.endless and self.decoder is not None:
            self._reading = self._read_turn()
        else:
            self._reading = self._read_prompts() if fresh else self._read_behind()
        return True

    def _read_prompts(self) -> Iterator[None]:
        """Read new prompts into their rows. The first ones make the plan, if it is not known."""
        engine, sizes = self.engine, self.sizes
        requests = [completion.request for completion in self._entering.values()]
        limits = [self.max_length if self.endless else request.length for request in requests]
        prompts = Prompts.of(engine.model, [request.ids for request in requests], limits)
        held = Held(prompts, sizes, engine.sizing.format)
        logits, signals = yield from read(engine.model, prompts, sizes.policies, held.keep, sizes.measures)
        if self.decoder is None:
            self._prepare(held.plan)
        if self.figures.importance is None and bool((mean := mean_finite(signals.T)).isfinite().all()):
            self.figures.importance = mean.tolist()
        rows = torch.tensor(list(self._entering), device=engine.device)
        samplings = [request.sampling for request in requests]
        self._suit()
        self.decoder.begin(rows, prompts.lengths, held.layers, logits, samplings, prompts.rotary)
        for number, (row, completion) in enumerate(self._entering.items()):
            if completion.request.watched:
                self._placed[row] = len(completion.request.ids), held.positions(number)
            self._keep("prompt", row, completion, logits[number : number + 1])

    def _read_behind(self) -> Iterator[None]:
        """Read a prompt that follows a prompt cache into its row."""
        [(row, completion)] = self._entering.items()
        request, model, past, figures = completion.request, self.engine.model, completion.request.past, self.figures
        if self.decoder is None:
            self._prepare(self.sizes.plan)
        behind, logits = Behind(self.decoder, past), past.logits
        for x in behind.append(torch.tensor([request.ids], dtype=torch.int64, device=self.engine.device)):
            last = x[:, -1]
            yield
        if request.ids:
            logits = model.logits(last)
        figures.importance = figures.importance or past.about.importance
        figures.groups = figures.groups or past.about.groups
        self._suit()
        self.decoder.begin_behind(torch.tensor([row], device=self.engine.device), behind, logits, request.sampling)
        if request.watched:
            self._placed[row] = past.seen, past.placed
        self._keep("prompt", row, completion, logits)

    def _keep(self, what: str, row: int, completion: Completion, logits: Tensor | None = None) -> None:
        """Give a completion that wants it a copy of its row. logits [1, vocab] follow it; None if they are spent."""
        request, figures = completion.request, self.figures
        if request.keep != what:
            return
        past, sizes = request.past, self.sizes
        own = {"plan": sizes.plan.slots, "policies": list(map(options.form, sizes.policies))}
        own |= {"seen": int(self.decoder.seen[row]), "length": past.about.length if past else request.length}
        own |= {"importance": figures.importance, "groups": figures.groups}
        placed = self._held(row) if request.watched else None
        about, logits = self.engine.about(**own), None if logits is None else logits.clone()
        completion.cache = PromptCache(about, self.decoder.of_row(row), logits, placed)

    @torch.inference_mode()
    def held(self, completion: Completion) -> list[Tensor]:
        """Of each layer, the positions [1 or K, n] of the tokens in its filled slots, on the CPU.

        UserError for a request that is not watched or not running.
        """
        rows = [row for row, own in enumerate(self._running) if own is completion and row in self._placed]
        if not (rows and completion.request.watched):
            raise UserError("only what a watched request holds while it runs is known")
        return self._held(rows[0])

    def _held(self, row: int) -> list[Tensor]:
        seen, (before, placed) = int(self.decoder.seen[row]), self._placed[row]
        found = []
        for number, (layer, policy) in enumerate(zip(self.decoder.cache.layers, self.sizes.policies, strict=True)):
            n = min(seen, layer.slots)
            if not n:
                found.append(torch.empty(1, 0, dtype=torch.int64))
                continue
            if policy.scored:
                found.append(layer.position[row, :, :n].cpu())
                continue
            first = placed[number].cpu()
            position = torch.full((len(first), n), -1)
            position[:, : first.shape[1]] = first
            new = torch.arange(before, seen)
            place = policy.place(new, layer.slots).expand(len(first), -1)
            found.append(position.scatter_reduce_(1, place, new.expand_as(place), "amax"))
        return found

    def _read_turn(self) -> Iterator[None]:
        """A later turn of a conversation, which goes on behind what its row holds."""
        [request], decoder = [completion.request for completion in self._entering.values()], self.decoder
        self.figures = self.figures.of_a_new_turn()
        for x in decoder.append(torch.tensor([request.ids], device=self.engine.device)):
            last = x[:, -1]
            yield
        self._suit()
        decoder.tokens.copy_(decoder.sampler(self.engine.model.logits(last)))

    def _prepare(self, plan: Plan) -> None:
        """The arena and all that a step needs, now that the plan is known."""
        same(plan.slots, "plans")
        self.sizes = replace(self.sizes, plan=plan)
        own = (plan.slots, len(self._running), self.sizes.policies, self.samplings)
        self.decoder, made = self.engine.decoder(*own, None if self.endless else self._lent)
        figures, cache = self.figures, self.decoder.cache
        figures.plan, figures.groups, figures.budget_slots = plan.slots, plan.groups, self.sizes.budget_slots
        figures.kv_bytes, figures.state_bytes = cache.kv_bytes, cache.state_bytes
        if made:
            figures.compile_s = self.decoder.capture_s
            figures.prefill_s -= self.decoder.capture_s  # which comes with what is added to it

    def _entered(self) -> None:
        """What was being read is in its rows, with its first tokens chosen."""
        entered = {row: own for row, own in self._entering.items() if not own.finish_reason}  # else it was cancelled
        self._entering, self._reading, figures = {}, None, self.figures
        for row, completion in entered.items():
            self._running[row], self._wanted[row], completion.figures = completion, 0, figures
            figures.prefill_tokens += len(completion.request.ids)
        running = [own.request for own in self._running if own]
        earlier = int(self.decoder.seen) - len(running[0].ids) if self.endless else 0
        full = sum(self.engine.sizing.full_bytes(earlier + request.length) for request in running)
        figures.kv_bytes_full = max(figures.kv_bytes_full, full)
        self._ask(entered, stepped=False)
