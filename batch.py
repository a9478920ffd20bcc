"""A job: requests from a file of JSON lines, results into another, each written when it is done.

    a line in    {"id": "a", "prompt": "..."} or "prompt_ids": [...]; also max_new_tokens, temperature, seed,
                 and "rendered": true for a prompt that a chat template has made already
    a line out   {"id": "a", "text": "...", "tokens": [...], "finish_reason": "eos", "prompt_tokens": 12}
                 "error", one line, where the finish_reason is "error": logits that are not finite

The file is read twice and never held: the first time to find what is wrong with it and how long its requests are. If
a line is another one the second time, the job ends there. OUTPUT.job.json holds what was asked for and what was
decided: plan, length, rows, seed. It is on the disk before the first result, so that a job that was killed goes on to
what it would have given undisturbed. For the same reason the prompts are read one by one, and there are always as many
rows: the last bits of a result do not depend on which other requests it ran beside, and a seed on nothing but the job's
and the line's id.
"""

import json
import os
import secrets
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from engine import Engine
from errors import UserError, cut, place, shown
from files import (
    MOST_BYTES,
    NATURAL,
    POSITIVE,
    PROMPT_BYTES,
    Lines,
    accessing,
    amount,
    append,
    checked,
    exclusive,
    parse_json,
    read_bytes,
    write_json,
)
from prefill import plan_for
from request import Completion, Figures, Request
from sampling import Sampling

FIELDS = ("id", "prompt", "prompt_ids", "rendered", "max_new_tokens", "temperature", "seed")
RESULT = {"id": (str, int), "text": str, "tokens": [NATURAL], "finish_reason": str, "prompt_tokens": NATURAL}
STATE = {
    "asked": dict,
    "input": str,
    "seed": range(2**63),
    "max_length": POSITIVE,
    "plan": [POSITIVE],
    "groups": (None, [NATURAL]),
    "importance": (None, [float]),
    "batch_size": POSITIVE,
}


class Text(Protocol):
    """The text of a growing answer."""

    text: str

    def push(self, tokens: list[int]) -> bool:
        """Take the last of the tokens; whether to stop."""

    def end(self) -> None:
        """Add what was held back."""


@dataclass(frozen=True, kw_only=True)
class Line(Request):
    id: str | int
    text: Text


@dataclass
class Survey:
    """What the first reading of the input found."""

    digest: str = ""  # SHA-256 of the file
    lines: array = field(default_factory=lambda: array("Q"))  # a digest of each line
    ids: set[str | int] = field(default_factory=set)
    count: int = 0  # requests that can run
    longest: int = 0  # tokens of a prompt and its answer
    longest_prompt: int = 0
    samplings: dict[tuple[bool, bool], Sampling] = field(default_factory=dict)  # one of each kind
    bad: dict[int, str] = field(default_factory=dict)  # by number of the line


@dataclass
class Summary:
    """tokens, seconds: of this run; from the first prompt to the last answer, loading not included."""

    done: int = 0
    failed: int = 0  # of those done: their result is an error
    before: int = 0  # done by earlier runs
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    figures: Figures | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Job:
    """asked: the settings that decide what the results are; with others it is another job.

    default: what a line does not say, its `sampling` with the job's seed or none. encode: a prompt to ids, with
    `rendered` if a line says so. text: a new, empty text of an answer. UserError if there is an output and `resume` is
    false, or nothing to go on with.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        asked: dict[str, Any],
        default: Request,
        encode: Callable[..., list[int]],
        text: Callable[[], Text],
        resume: bool = False,
    ):
        self.source, self.output, self.asked, self.default = source, output, asked, default
        self.encode, self.text = encode, text
        self.file = output.with_name(output.name + ".job.json")
        with accessing(source):
            known = source.is_file()
        if not known:
            raise UserError(f"{place(source)} is no file; it is read twice, so it has to be one")
        with accessing(self.file):
            begun = output.exists() and output.stat().st_size > 0
        if begun and not resume:
            raise UserError(f"{place(output)} exists; --resume goes on with it, or name another --output")
        if begun and not self.file.exists():
            lost = f"exists without {place(self.file.name)}, so --resume cannot go on with it"
            raise UserError(f"{place(output)} {lost}; name another --output")
        self.state: dict[str, Any] = {}  # what was decided; empty for a new job
        if self.file.exists():
            where = f"{place(self.file)} is no state of a job (name another --output)"
            state = checked(parse_json(read_bytes(self.file), where), STATE, where)
            layers = {len(state[name]) for name in ("plan", "importance", "groups") if state[name] is not None}
            if len(layers) > 1:
                raise UserError(f"{where}: plan, importance and groups are of {sorted(layers)} layers")
            if wrong := [cosine for cosine in state["importance"] or () if abs(cosine) > 1.001]:
                raise UserError(f"{where}: an importance is a cosine, within [-1, 1], not {shown(wrong[0])}")
            self.state = state if resume else {}
        seed = default.sampling.seed
        self.seed = self.state.get("seed", secrets.randbits(63) if seed is None else seed)

    def lines(
        self, engine: Engine, max_length: int | None = None, survey: Survey | None = None
    ) -> Iterator[tuple[int, Line | UserError]]:
        """Every line that is not blank, with its number: a request, or why it is none.

        survey: of an earlier reading, from which this one must not differ. Without a digest it is filled.
        """
        file = Lines(self.source)
        number = 0
        for number, raw, size, digest in file:
            if survey is not None and not survey.digest:
                survey.lines.append(digest)
            elif survey is not None and (number > len(survey.lines) or survey.lines[number - 1] != digest):
                raise self._changed(number)
            if raw is not None and not raw.strip():
                continue
            try:
                if raw is None:
                    raise UserError(f"{size / 2**20:,.0f} MiB long; {amount(PROMPT_BYTES)} is the most for a line")
                line = self._line(number, raw)
                if refusal := engine.refusal(line):
                    raise UserError(refusal)
                prompt, new = len(line.ids), line.max_new_tokens
                if max_length is not None and prompt + new > max_length:
                    raise UserError(f"{prompt} prompt + {new} new tokens exceed max-length {max_length}")
            except UserError as error:
                yield number, error
            else:
                yield number, line
        if survey is not None and not survey.digest:
            survey.digest = file.sha256.hexdigest()
        elif survey is not None and number < len(survey.lines):
            raise self._changed(number + 1)

    def _changed(self, number: int) -> UserError:
        return UserError(f"{place(self.source)} line {number} is another one than when the job began; put it back")

    def survey(
        self,
        engine: Engine,
        max_length: int | None = None,
        bad: Callable[[int, UserError], None] = lambda *_: None,
        check: Callable[[Line], None] = lambda _: None,
    ) -> Survey:
        """Reads the input for the first time; the engine's model may be on meta. `bad` is told of each bad line.

        check: raises a UserError for a request that cannot run here, whatever else may.

        UserError for two lines with one id, for no line that can run, and for a job that is not the one to resume.
        """
        survey, numbers = Survey(), {}
        lines = self.lines(engine, max_length or self.state.get("max_length"), survey)
        for number, line in tqdm(lines, "reading", unit="line", leave=False, disable=None):
            if isinstance(line, Line):
                if (first := numbers.setdefault(line.id, number)) != number:
                    same = f"have the same id, {shown(line.id)}"
                    raise UserError(f"{place(self.source)}: lines {first} and {number} {same}")
                try:
                    check(line)
                except UserError as error:
                    line = error
            if isinstance(line, UserError):
                survey.bad[number] = str(line)
                bad(number, line)
                continue
            survey.count += 1
            survey.longest = max(survey.longest, len(line.ids) + line.max_new_tokens)
            survey.longest_prompt = max(survey.longest_prompt, len(line.ids))
            survey.samplings.setdefault((line.sampling.temperature == 0, line.sampling.restricted), line.sampling)
        survey.ids = set(numbers)
        if not survey.count:
            raise UserError(f"{place(self.source)} holds no request that can run")
        if self.state:
            now = {**self.asked, "the input's sha256": survey.digest}
            was = {**self.state["asked"], "the input's sha256": self.state["input"]}
            if other := [name for name in now | was if was.get(name) != now.get(name)]:
                texts = "; ".join(f"{name} was {shown(was.get(name))} and is {shown(now.get(name))}" for name in other)
                raise UserError(f"{place(self.output)} is of another job: {texts}")
        return survey

    def begin(self, survey: Survey) -> tuple[FileIO, set[str | int]]:
        """The output, to be appended to by nobody else, without a torn last line; and the ids that are done."""
        file = exclusive(self.output)
        try:
            done, whole = {}, 0
            for number, raw, size, _ in Lines(self.output, MOST_BYTES):
                if raw is not None and not raw.endswith(b"\n"):
                    break
                where = f"{place(self.output)} line {number} is no result (name another --output)"
                if raw is None:
                    raise UserError(f"{where}: it is {size / 2**20:,.0f} MiB long")
                line_id = checked(parse_json(raw, where), RESULT, where)["id"]
                if line_id not in survey.ids:
                    raise UserError(f"{where}: the input has no id {shown(line_id)}")
                if (first := done.setdefault(line_id, number)) != number:
                    raise UserError(f"{where}: its id {shown(line_id)} is line {first}'s already")
                whole += size
            file.truncate(whole)
        except UserError:
            file.close()
            raise
        return file, set(done)

    def decide(self, engine: Engine, survey: Survey, rows: int, max_length: int) -> None:
        """Everything the results depend on goes to the disk, before the first of them does."""
        if not self.state:
            # some to spare, for prompts whose importance is not finite
            first = islice(self._good(engine, survey, max_length), rows + 64)
            plan, importance = plan_for(engine.model, engine.sizing, first, max_length, rows)
            self.state = {
                "asked": self.asked,
                "input": survey.digest,
                "seed": self.seed,
                "max_length": max_length,
                "plan": plan.slots,
                "groups": plan.groups,
                "importance": importance,
            }
        self.state["batch_size"] = rows
        write_json(self.file, self.state)

    def _good(self, engine: Engine, survey: Survey, max_length: int) -> Iterator[Line]:
        """The requests of the survey, in a second reading."""
        return (line for number, line in self.lines(engine, max_length, survey) if number not in survey.bad)

    def run(self, engine: Engine, survey: Survey, file: FileIO, done: set[str | int]) -> Iterator[Summary]:
        """The requests that are not done yet; yields after each result. The engine has the job's plan."""
        summary, length = Summary(before=len(done)), self.state["max_length"]
        lines = (line for line in self._good(engine, survey, length) if line.id not in done)
        samplings = survey.samplings.values()
        started = time.perf_counter()
        with tqdm(total=survey.count, initial=len(done), unit="request", disable=None) as bar:
            for completion in engine.generate(lines, self.state["batch_size"], length, samplings, apart=True):
                result = json.dumps(self._result(completion), allow_nan=False)
                append(file, result.encode() + b"\n", self.output)
                summary.done += 1
                summary.failed += completion.error is not None
                summary.prompt_tokens += len(completion.request.ids)
                summary.tokens += len(completion.tokens)
                summary.seconds = time.perf_counter() - started
                decided = {name: self.state[name] for name in ("groups", "importance")}
                summary.figures = replace(completion.figures, **decided)
                bar.update()
                bar.set_postfix_str(f"{summary.tokens_per_s:,.0f} tokens/s")
                yield summary
        with accessing(self.output):
            os.fsync(file.fileno())

    def _line(self, number: int, raw: bytes) -> Line:
        said = parse_json(raw, "")
        if unknown := [name for name in said if name not in FIELDS]:
            raise UserError(f"unknown field {shown(unknown[0])}; known: {', '.join(FIELDS)}")
        if ("prompt" in said) == ("prompt_ids" in said):
            raise UserError("give one of prompt and prompt_ids")

        def get(name: str, default: Any, kind: str, *types: type) -> Any:
            value = said.get(name, default)
            if name in said and type(value) not in types:
                raise UserError(f"{name} must be {kind}, not {cut(json.dumps(value))}")
            if type(value) is int and abs(value) >= 2**63:
                raise UserError(f"{name} must have at most 63 bits, not be {shown(value)}")
            return value

        line_id = get("id", number, "a string or an integer", str, int)
        prompt = get("prompt", None, "a string", str)
        ids = get("prompt_ids", None, "a list of integers", list)
        if any(type(i) is not int for i in ids or ()):
            raise UserError("prompt_ids must be a list of integers")
        rendered = get("rendered", None, "true or false", bool)
        if ids is not None and rendered is not None:
            raise UserError("rendered is for a prompt, not for prompt_ids")
        if prompt == "":
            raise UserError("the prompt is empty; give some text")
        if prompt and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError("the prompt holds half of a surrogate pair, which is no character")
        default = self.default.sampling
        temperature = get("temperature", default.temperature, "a number", int, float)
        seed = get("seed", None, "an integer", int)
        if seed is None:
            seed = int.from_bytes(sha256(json.dumps([self.seed, line_id]).encode()).digest()[:8]) >> 1
        encode = self.encode if rendered is None else partial(self.encode, rendered=rendered)
        text = self.text()
        return Line(
            encode(prompt) if ids is None else ids,
            get("max_new_tokens", self.default.max_new_tokens, "an integer", int),
            Sampling(temperature, default.top_k, default.top_p, seed),
            self.default.eos_ids,
            text.push,
            id=line_id,
            text=text,
        )

    @staticmethod
    def _result(completion: Completion) -> dict[str, Any]:
        line = completion.request
        line.text.end()
        result = {
            "id": line.id,
            "text": line.text.text,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(line.ids),
        }
        return result if completion.error is None else result | {"error": completion.error}
