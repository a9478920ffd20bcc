"""A server over several ranks: the first one has the clients, and all run the same requests in the same steps.

Before each step the first rank tells the others what clients have asked for since the last one. A conversation that it
keeps is kept by each, in its own part, until the first one lets it go.
"""

from collections.abc import Callable
from itertools import count
from queue import SimpleQueue
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import parallel
from promptcache import PromptCache
from serving.worker import Answer, News, Order, Worker
from tokenizer import TextStream, Tokenizer


class Ask(NamedTuple):
    """An answer, as another rank makes it. past: the number of the answer whose cache it goes on from.

    how: what else its request says.
    """

    number: int
    ids: list[int]
    new: int
    stops: tuple[str, ...]
    lane: str | None
    past: int | None
    how: dict[str, Any]


class Leader(Worker):
    """The first rank's."""

    def __init__(self, *how: Any):
        super().__init__(*how)
        self.say, self.numbers = parallel.line(), count()
        self.asked: dict[Answer, int] = {}  # those that have not ended
        self.kept: WeakKeyDictionary[PromptCache, int] = WeakKeyDictionary()
        self.dropped: SimpleQueue[int] = SimpleQueue()

    def orders(self) -> list[Order]:
        """As of `Worker`."""
        found, told, dropped = super().orders(), [], []
        for what, answers in found:
            each = self._ask if what == "add" else lambda answer: self.asked.pop(answer, None)
            told.append((what, [each(answer) for answer in answers]))
        while not self.dropped.empty():
            dropped.append(self.dropped.get())
        self.say((told, dropped))
        return found

    def _ask(self, answer: Answer) -> Ask:
        self.asked[answer] = number = next(self.numbers)
        request, past = answer.request, answer.request.past
        how = {name: getattr(request, name) for name in ("sampling", "eos_ids", "keep")}
        own = (list(request.ids), request.max_new_tokens, answer.stream.stops, answer.lane)
        return Ask(number, *own, None if past is None else self.kept[past], how)

    def heard(self, news: list[News]) -> None:
        """As of `Worker`."""
        for answer in (own.answer for own in news if own.end):
            number, cache = self.asked.pop(answer, None), answer.completion.cache
            if cache is not None and number is not None:
                self.kept[cache] = number
                finalize(cache, self.dropped.put, number).atexit = False
        super().heard(news)


class Follower(Worker):
    """Another rank's. Nobody hears what it says."""

    def __init__(self, tokenizer: Tokenizer, *how: Any):
        super().__init__(*how)
        self.tokenizer, self.hear = tokenizer, parallel.line()
        self.asked: dict[int, Answer] = {}
        self.kept: dict[int, PromptCache] = {}

    def orders(self) -> list[Order]:
        """As of `Worker`: what the first rank says."""
        told, dropped = self.hear(None)
        made: Callable[[str], Callable] = {"add": self._made}.get
        found = [Order(what, [*filter(None, map(made(what, self._known), own))]) for what, own in told]
        for number in dropped:
            self.kept.pop(number, None)
        return found

    def _known(self, number: int | None) -> Answer | None:
        return self.asked.pop(number, None)

    def _made(self, ask: Ask) -> Answer:
        past = None if ask.past is None else self.kept[ask.past]
        stream = TextStream(self.tokenizer, ask.stops, continues=True)
        self.asked[ask.number] = answer = Answer(ask.ids, ask.new, stream, ask.lane, past=past, **ask.how)
        return answer

    def heard(self, news: list[News]) -> None:
        """Keeps what the first rank keeps."""
        ended = {own.answer for own in news if own.end}
        for number, answer in [own for own in self.asked.items() if own[1] in ended]:
            del self.asked[number]
            if answer.completion.cache is not None:
                self.kept[number] = answer.completion.cache
