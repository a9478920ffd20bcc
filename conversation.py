"""A conversation: turns that go on from each other over one cache, which stays as large, however long it becomes."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

from engine import Batch, Engine
from errors import UserError, integers
from request import Completion, Request, Stream
from sampling import GREEDY, Sampling


class Conversation:
    """Its cache keeps the plan of the first turn. A fraction as budget is of the model's position limit.

    An end-of-sequence token that ends an answer is never fed: what the next turn begins with closes it.
    """

    def __init__(self, engine: Engine, sampling: Sampling = GREEDY):
        self.engine, self.sampling = engine, sampling
        self.batch: Batch | None = None
        self._stream: Stream | None = None
        self._unfed: list[int] = []  # the last token before the latest turn, not yet fed when that began

    @property
    def seen(self) -> int:
        """How many tokens, of both sides, have gone through the model."""
        return int(self.batch.decoder.seen) if self.batch and self.batch.decoder else 0

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 128,
        eos_ids: Collection[int] = (),
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Stream:
        """The answer to one more turn. It ends the turn before. UserError, with nothing changed, if it cannot run."""
        before, unfed = self._stream, self._unfed
        if before and (said := before.completion.tokens):  # else nobody listened to the turn before
            unfed = said[-1:] if before.completion.finish_reason != "eos" else []
        if before and before.completion.error:
            raise UserError(f"{before.completion.error}; this conversation cannot go on, begin a new one")
        request = Request([*unfed, *integers(ids, "prompt ids")], max_new_tokens, self.sampling, eos_ids, stop)
        self.engine.sizing.check(request.ids, request.max_new_tokens, self.seen)
        if self.batch is None:
            self.batch = Batch(self.engine, 1, self.engine.model.config.reach, [self.sampling], endless=True)
        if before:
            before.close()
        completion, ended = Completion(request), ExitStack()
        ended.callback(self.batch.cancel, completion)
        self._stream, self._unfed = Stream(self.batch, completion, within=ended), unfed
        return self._stream
