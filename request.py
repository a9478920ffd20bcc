"""A request, what comes of it, and what it cost: what a program hands to the engine and gets back."""

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from config import ModelConfig
from errors import UserError, integers, shown, whole
from promptcache import PromptCache
from sampling import GREEDY, Sampling

MOST_TOKENS = 2**20  # of a prompt and its answer, unless the model has more positions: more is a slip


@dataclass(frozen=True)
class Request:
    """Token ids in. `stop` is asked after each token, with all new ids so far, whether to end.

    ids: a sequence, an array or a tensor [S] of integers; a list of ints is kept as it is. UserError for other types.
    past: what they follow; with its logits there may be none. keep: "prompt" or "answer", after which the completion
    gets its row's cache. watched: `Batch.held` will be asked what the row holds.
    """

    ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    eos_ids: Collection[int] = ()
    stop: Callable[[list[int]], bool] | None = None
    past: PromptCache | None = None
    keep: str | None = None
    watched: bool = False

    def __post_init__(self):
        object.__setattr__(self, "ids", integers(self.ids, "prompt ids"))
        eos_ids = list(self.eos_ids) if isinstance(self.eos_ids, Set) else self.eos_ids
        object.__setattr__(self, "eos_ids", frozenset(integers(eos_ids, "eos_ids")))
        object.__setattr__(self, "max_new_tokens", whole(self.max_new_tokens, "max-new-tokens"))
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling must be a Sampling, not {shown(self.sampling)}")
        if self.stop is not None and not callable(self.stop):
            raise UserError(f"stop must be a function of the new ids, not {shown(self.stop)}")
        if self.keep not in (None, "prompt", "answer"):
            raise UserError(f"keep must be prompt or answer, not {shown(self.keep)}")

    @property
    def seen(self) -> int:
        """Tokens before the prompt."""
        return self.past.seen if self.past else 0

    @property
    def length(self) -> int:
        """Tokens of the prompt, what it follows, and the longest answer."""
        return self.seen + len(self.ids) + self.max_new_tokens


@dataclass
class Figures:
    """What a batch cost: slots per layer, bytes, seconds. It grows with each step and each request that comes."""

    plan: list[int] = field(default_factory=list)
    groups: list[int | None] | None = None
    importance: list[float] | None = None  # of those that were read first and have one that is finite
    budget_slots: int = 0
    kv_bytes: int = 0
    state_bytes: int = 0
    kv_bytes_full: int = 0  # of the requests that run together, at the most
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    compile_s: float = 0.0  # decode steps in which something was compiled
    decode_s: float = 0.0  # all other decode steps
    decode_tokens: int = 0  # tokens made in `decode_s`; a request's first one comes from its prefill

    def of_a_new_turn(self) -> "Figures":
        """The same cache, and nothing spent yet."""
        spent = {"prefill_tokens": 0, "prefill_s": 0.0, "compile_s": 0.0, "decode_s": 0.0, "decode_tokens": 0}
        return replace(self, kv_bytes_full=0, **spent)

    def spent(self, seconds: float, tokens: int, stepped: bool, compiled: bool) -> None:
        """What it took to make these tokens, in a step or from prompts."""
        if not stepped:
            self.prefill_s += seconds
        elif compiled:
            self.compile_s += seconds
        else:
            self.decode_s += seconds
            self.decode_tokens += tokens

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(eq=False)
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
    cache: PromptCache | None = None  # if the request keeps it

    @classmethod
    def refused(cls, request: Request, error: str) -> "Completion":
        """Of a request that cannot run."""
        return cls(request, finish_reason="error", error=error)

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


class Rows(Protocol):
    """What a stream asks of a `Batch` (engine.py)."""

    def admit(self, completion: Completion) -> None: ...

    def step(self) -> None: ...

    def collect(self) -> list[Completion]: ...


class Stream:
    """The tokens of the only request of a batch, as they are made. `completion` grows along.

    within: entered before the first token, and left after the last one.
    """

    def __init__(self, batch: Rows, completion: Completion, within: AbstractContextManager):
        self.completion, self._steps = completion, self._tokens(batch, completion, within)

    @staticmethod
    def _tokens(batch: Rows, completion: Completion, within: AbstractContextManager) -> Iterator[int]:
        with within:
            batch.admit(completion)
            while not completion.finish_reason:
                batch.step()
                if completion in batch.collect() and completion.finish_reason not in ("error", "interrupted"):
                    yield completion.tokens[-1]

    def __iter__(self) -> Iterator[int]:
        for token in self._steps:  # noqa: UP028  whoever leaves the loop may come back
            yield token

    def close(self) -> None:
        """End it here; what has been made stays in `completion`."""
        self._steps.close()


def longest(config: ModelConfig, endless: bool) -> tuple[int, str]:
    """The most tokens of a prompt and its answer, and in words what more exceed and what to do about it.

    endless: a sequence may be longer than the model's positions.
    """
    positions, learned = config.reach, config.position_offset is not None
    if endless:
        most = max(positions, MOST_TOKENS)
        return most, f"the {most} that one request may have; shorten them"
    way = "" if learned else " or use a bounded policy such as streaming"
    return positions, f"the model's {positions} {'learned ' if learned else ''}positions; shorten them{way}"


def refusal(
    config: ModelConfig, endless: bool, ids: Sequence[int], new: int, seen: int = 0, ready: bool = False
) -> str | None:
    """Why a prompt with `new` tokens after it, and `seen` before it, cannot run, in one line.

    ready: what follows the tokens before it is known, so that the prompt may be empty.
    """
    if not (len(ids) or ready):
        return "the prompt is empty; give at least one token"
    if new < 1:
        return f"max-new-tokens must be at least 1, not {shown(new)}"
    if len(ids) and not (min(ids) >= 0 and max(ids) < config.vocab_size):
        wrong = next(i for i in ids if not 0 <= i < config.vocab_size)
        return f"token id {shown(wrong)} is outside the vocabulary (0 to {config.vocab_size - 1})"
    most, why = longest(config, endless)
    seen = 0 if endless else seen  # else what came before is in slots that do not grow
    if seen + len(ids) + new > most:
        return f"{f'{seen} earlier + ' * bool(seen)}{len(ids)} prompt + {shown(new)} new tokens exceed {why}"
    return None
