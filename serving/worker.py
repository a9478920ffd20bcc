"""The engine thread: it alone runs the model, for many clients at a time over one batch.

The event loop hands it calls through a queue and hears of them once a step, of all rows together. The thread never
waits for the network, and sleeps while there is nothing to do. What goes wrong in one request ends that one alone.
"""

import asyncio
import queue
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, NamedTuple
from weakref import ref

from engine import Batch, Engine
from errors import UserError, reason
from parallel import shard
from prefill import plan_for
from request import Completion, Request
from serving.conversations import Turn
from serving.metrics import Metrics
from serving.watching import Watch
from tokenizer import TextStream

PACE = 0.04  # seconds: nobody reads a stream in smaller pieces, and each takes time from the engine


class End(NamedTuple):
    """How an answer ended. status: the HTTP status that suits its error."""

    reason: str
    error: str | None = None
    status: int = 500


class News(NamedTuple):
    """What the event loop hears of an answer after a step: its text so far, how many tokens, and how it ended."""

    answer: "Answer"
    text: str
    tokens: int
    end: End | None
    seen: dict[str, Any] | None = None  # of its cache, if the client watches it

    @property
    def urgent(self) -> bool:
        return self.end is not None or self.seen is not None or self.tokens <= 1


class Ends:
    """Whether an answer's text has come to a stop string. fault: what went wrong in its text, which ends it, too."""

    def __init__(self, stream: TextStream):
        self.stream, self.fault = stream, None

    def __call__(self, tokens: list[int]) -> bool:
        try:
            return self.stream.ends(tokens)
        except Exception as error:
            self.fault = error
            return True


class Answer:
    """One choice of a call: the request that gives it, and what the event loop has heard of it so far.

    turn: the conversation that it goes on from. how: as of `Request`.
    The engine thread alone uses `stream`, `completion`, `ends` and `watch`, until the answer has ended. Nothing that an
    answer holds leads back to it: its caches are gone as soon as nobody needs it.
    """

    def __init__(
        self,
        ids: Sequence[int],
        new: int,
        stream: TextStream,
        lane: str | None = None,
        watch: Watch | None = None,
        turn: Turn | None = None,
        **how: Any,
    ):
        self.stream, self.lane, self.watch, self.turn, self.ends = stream, lane, watch, turn, Ends(stream)
        self.request = Request(ids, new, stop=self.ends, watched=watch is not None, **how)
        self.completion = Completion(self.request)
        self.call: Callable[[], Call | None] = lambda: None  # None: nobody waits for it
        self.text, self.tokens, self.end, self.seen = "", 0, None, []

    def news(self, batch: Batch, rows: int) -> News | None:
        """After a step: None if nobody waits for it."""
        completion, seen = self.completion, None
        if self.watch and completion.tokens:
            seen = self.watch.event(batch, rows, completion)
        if completion.finish_reason is None:
            if not ((call := self.call()) and call.streamed):
                return None
            return News(self, self.stream.text, len(completion.tokens), None, seen)
        if (fault := self.ends.fault) is not None:
            traceback.print_exception(fault)
            end = End("error", f"the server failed on this request: {reason(fault)}")
        else:
            self.stream.flush()
            end = End(completion.finish_reason, completion.error)
        return News(self, self.stream.text, len(completion.tokens), end, seen)

    def failed(self, error: Exception) -> News:
        """It could not run, or what it ran in has failed."""
        if isinstance(error, UserError):
            end = End("error", str(error), 400)
        else:
            end = End("error", f"the server failed while it ran this request: {reason(error)}")
        return News(self, self.stream.text, len(self.completion.tokens), end)


class Order(NamedTuple):
    """What the event loop wants of the engine thread: to "add" or "cancel" answers, or to "stop"."""

    what: str
    answers: Sequence[Answer] = ()


class Call:
    """A client's request: its answers, and an event for whoever waits for them."""

    def __init__(self, answers: list[Answer], streamed: bool = False):
        self.answers, self.streamed, self.changed, self.gone = answers, streamed, asyncio.Event(), False
        for answer in answers:
            answer.call = ref(self)

    @property
    def ended(self) -> bool:
        return all(answer.end for answer in self.answers)


class Lane:
    """Requests that share a batch, which `make` opens for the first of them; `lasting`: and which stays open."""

    def __init__(self, rows: int, make: Callable[[Request], Batch], lasting: bool):
        self.rows, self.make, self.lasting = rows, make, lasting
        self.batch: Batch | None = None
        self.waiting: deque[Answer] = deque()
        self.running: dict[Completion, Answer] = {}

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or (self.batch and self.batch.busy))

    def cancel(self, answer: Answer) -> None:
        if answer in self.waiting:
            self.waiting.remove(answer)
        elif self.running.pop(answer.completion, None):
            self.batch.cancel(answer.completion)

    def step(self) -> list[News]:
        """Let requests in, and all rows make a step."""
        news = self._admit()
        if self.batch is None:
            return news
        try:
            self.batch.step()
            moved = self.batch.collect()
        except Exception as error:
            check_alone()
            traceback.print_exception(error)
            return news + self._failed(error)
        for completion in moved:
            if answer := self.running.get(completion):  # else it was cancelled
                news.append(self._heard(answer))
                if completion.finish_reason:
                    del self.running[completion]
        if not (self.lasting or self.running):
            self.close()
        return list(filter(None, news))

    def _heard(self, answer: Answer) -> News | None:
        try:
            return answer.news(self.batch, self.rows)
        except Exception as error:  # ends this answer alone
            check_alone()
            traceback.print_exception(error)
            self.batch.cancel(answer.completion)
            return answer.failed(error)

    def _admit(self) -> list[News]:
        refused = []
        while self.waiting and (self.batch is None or self.batch.free > 0):
            answer = self.waiting.popleft()
            try:
                self.batch = self.batch or self.make(answer.request)
                if refusal := self.batch.engine.refusal(answer.request) or self.batch.misfit(answer.request):
                    raise UserError(refusal)
                self.batch.admit(answer.completion)
            except Exception as error:
                if not isinstance(error, UserError):
                    check_alone()
                    traceback.print_exception(error)
                refused.append(answer.failed(error))
            else:
                self.running[answer.completion] = answer
        return refused

    def _failed(self, error: Exception) -> list[News]:
        """A step has failed: with it the requests that it ended, such as a prompt that did not fit into memory, or else
        all that were in it, and then the next ones get another batch.
        """
        own = [completion for completion in self.running if completion.finish_reason]
        failed = [self.running.pop(completion) for completion in own or list(self.running)]
        if not own:
            self.close(error)
        return [answer.failed(error) for answer in failed]

    def warm(self, request: Request) -> None:
        """Make two tokens of it."""
        self.batch = self.batch or self.make(request)
        completion = self.batch.add(request)
        while self.batch.busy:
            self.batch.step()
            self.batch.collect()
            if len(completion.tokens) > 1:
                self.batch.cancel(completion)
        if not self.lasting:
            self.close()

    def close(self, error: Exception | None = None) -> None:
        """Leave the batch; after an error its memory is let go, too."""
        if self.batch is not None:
            self.batch.__exit__(error and type(error), error, error and error.__traceback__)
            self.batch = None


def check_alone() -> None:
    """Called while an exception is handled. On several ranks it goes on: what failed on one has not on the others."""
    if shard().world > 1:
        raise


class Worker:
    """The engine thread, and what the event loop does with it.

    make_engine: loads the model, within the thread. lanes: engines of other caches over the same model, by name, for
    one request at a time. plan_ids: the prompt that the plan is made from; None: the first request's. queue: how many
    requests may wait. keeps: answers may be kept, so that no step runs ahead.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        rows: int,
        max_length: int,
        metrics: Metrics,
        queue_length: int = 64,
        plan_ids: Sequence[int] | None = None,
        keeps: bool = True,
        make_lanes: Callable[[Engine], dict[str, Engine]] = lambda engine: {},
    ):
        self.make_engine, self.make_lanes, self.plan_ids = make_engine, make_lanes, plan_ids
        self.rows, self.max_length, self.queue_length, self.metrics = rows, max_length, queue_length, metrics
        self.keeps = keeps
        self.plan: list[int] | None = None
        self.source = ""  # what the plan was made from
        self.engine: Engine | None = None
        self.lanes: dict[str | None, Lane] = {}
        self.loads: dict[str | None, int] = {}  # answers in flight, as the event loop counts them
        self.loop: asyncio.AbstractEventLoop | None = None
        self.died: Callable[[], None] = lambda: None  # called if the thread ends by an error, which `wait` raises
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._stopped, self._told = False, 0.0
        self._news: list[News] = []  # that the event loop has not heard yet
        self._ready: Future = Future()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    # ---- for the event loop's thread

    def start(self) -> None:
        """Returns when the model is loaded and a first token made; raises what went wrong meanwhile."""
        self._thread.start()
        self._ready.result()

    def stop(self) -> None:
        self._orders.put(Order("stop"))
        self.wait()

    def wait(self) -> None:
        """Until the thread has ended; raises what ended it before its time."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def refusal(self, answer: Answer) -> str | None:
        """Why the request cannot run, in one line."""
        request, batch = answer.request, self.lanes[None].batch
        if answer.lane is None and batch:
            return self.engine.refusal(request) or batch.misfit(request)
        if request.length > self.max_length:
            return (
                f"{len(request.ids)} prompt + {request.max_new_tokens} new tokens exceed max-length {self.max_length}"
            )
        return self.engine.refusal(request)

    def room(self, lane: str | None) -> int:
        """How many more answers may come."""
        return self.most(lane) - self.loads[lane]

    def most(self, lane: str | None) -> int:
        return self.lanes[lane].rows + self.queue_length

    def submit(self, call: Call) -> None:
        for answer in call.answers:
            self.loads[answer.lane] += 1
        self._orders.put(Order("add", call.answers))

    def cancel(self, call: Call) -> None:
        """End what still runs of a call: nobody waits for it any more."""
        left = [answer for answer in call.answers if answer.end is None]
        for answer in left:
            self._ended(answer, End("interrupted"))
        if left:
            self._orders.put(Order("cancel", left))

    def _deliver(self, news: list[News]) -> None:
        for answer, text, tokens, end, seen in news:
            if answer.end is None:  # else it was cancelled meanwhile
                answer.text, answer.tokens = text, tokens
                if seen:
                    answer.seen.append(seen)
                if end:
                    self._ended(answer, end)
                if call := answer.call():
                    call.changed.set()

    def _ended(self, answer: Answer, end: End) -> None:
        answer.end = end
        self.loads[answer.lane] -= 1
        self.metrics.new_tokens.inc(answer.tokens)

    @property
    def waiting(self) -> int:
        return sum(len(lane.waiting) for lane in self.lanes.values())

    @property
    def running(self) -> int:
        return sum(len(lane.running) for lane in self.lanes.values())

    @property
    def kv_bytes(self) -> int:
        batches = filter(None, [lane.batch for lane in self.lanes.values()])
        return sum(batch.figures.kv_bytes + batch.figures.state_bytes for batch in batches)

    # ---- for the engine thread

    def _run(self) -> None:
        try:
            self._prepare()
        except BaseException as error:  # the other thread raises it
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            self._serve()
        except BaseException as error:
            self._error = error
            self.died()

    def _serve(self) -> None:
        while not self._stopped:
            for what, answers in self.orders():
                self._stopped |= what == "stop"
                for answer in answers:
                    lane = self.lanes[answer.lane]
                    lane.waiting.append(answer) if what == "add" else lane.cancel(answer)
            started = time.perf_counter()
            busy = [lane for lane in self.lanes.values() if lane.busy]
            for lane in busy:
                self.heard(lane.step())
            if busy:
                self.metrics.step_seconds.observe(time.perf_counter() - started)
            self._tell()
        for lane in self.lanes.values():
            lane.close()

    def orders(self) -> list[Order]:
        """What was asked for since the last step. Waits for it if there is nothing else to do."""
        found: list[Order] = []
        idle = not any(lane.busy for lane in self.lanes.values())
        with suppress(queue.Empty):
            while True:
                found.append(self._orders.get(block=idle and not found))
        return found

    def heard(self, news: list[News]) -> None:
        """What a step gave, which the event loop will be told."""
        self._news += news

    def _tell(self) -> None:
        """What a small model says goes to the event loop a few tokens at a time: it takes time from the model."""
        now = time.perf_counter()
        if self._news and (any(news.urgent for news in self._news) or now - self._told > PACE):
            latest = {news.answer: news for news in self._news}  # one with `seen` is told at once, so it is the last
            self._news, self._told = [], now
            with suppress(RuntimeError):  # the loop has been closed: nobody waits
                self.loop.call_soon_threadsafe(self._deliver, list(latest.values()))

    def _prepare(self) -> None:
        """Load, plan, and make two tokens, so that code is compiled and memory taken before a client comes."""
        self.engine = self.make_engine()
        _ = self.engine.fingerprint  # by all ranks together: the event loop's thread may not wait for others
        self.lanes[None] = Lane(self.rows, self._own_batch, lasting=True)
        for name, engine in self.make_lanes(self.engine).items():
            self.lanes[name] = Lane(1, partial(batch_for, engine), lasting=False)
        self.loads = dict.fromkeys(self.lanes, 0)
        sizes = self.engine.sizing.at(self.max_length)
        if sizes.plan is None and self.plan_ids is None:
            return
        ids = [0] if self.plan_ids is None else self.plan_ids
        self.lanes[None].batch = self._own_batch(Request(ids[: self.max_length - 1], 1))
        if self.max_length > 1:
            short = ids[: min(8, self.max_length - 1)]
            for lane in self.lanes.values():
                lane.warm(Request(short, self.max_length - len(short)))

    def _own_batch(self, first: Request) -> Batch:
        """Rows under the server's plan, which is made from the first request if there is none yet."""
        engine = self.engine
        if self.plan is None:
            self.source = "a file" if engine.plan else engine.layer_policy.name
            if engine.sizing.at(self.max_length).plan is None:
                plan, _ = plan_for(engine.model, engine.sizing, [first], self.max_length, 1)
                engine.plan, self.source = plan.slots, "the first request" if self.plan_ids is None else "a text"
            self.plan = engine.sizing.at(self.max_length).plan.slots
            self.metrics.planned(self.plan, self.source)
            if self._ready.done():
                print(f"serve.py: plan from {self.source}: {self.plan}", file=sys.stderr)
        return engine.batch(self.rows, self.max_length, apart=True, keeps=self.keeps)


def batch_for(engine: Engine, request: Request) -> Batch:
    """A batch for one request, as generate.py would run it: its plan is made from its own prompt."""
    return engine.batch(1, request.length, [request.sampling], keeps=request.keep == "answer")
