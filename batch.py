"""A job: requests from a file of JSON lines, results into another, each written when it is done.

    a line in    {"id": "a", "prompt": "..."} or "prompt_ids": [...]; also max_new_tokens, temperature, seed,
                 and "rendered": true for a prompt that a chat template has made already
    a line out   {"id": "a", "text": "...", "tokens": [...], "finish_reason": "eos", "prompt_tokens": 12}

The file is read twice and never held: the first time to find what is wrong with it and how long its requests are.
OUTPUT.job.json holds what was asked for and what was decided: plan, length, rows, seed. It is on the disk before the
first result, so that a job that was killed goes on to what it would have given undisturbed. For the same reason the
prompts are read one by one, and there are always as many rows: the last bits of a result do not depend on which other
requests it ran beside, and a seed on nothing but the job's and the line's id.
"""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from io import BufferedWriter
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from engine import Completion, Engine, Figures, Request
from errors import UserError
from files import parse_json, read_json
from sampling import Sampling

FIELDS = ("id", "prompt", "prompt_ids", "rendered", "max_new_tokens", "temperature", "seed")


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

    digest: str = ""
    count: int = 0  # requests that can run
    longest: int = 0  # tokens of a prompt and its answer
    longest_prompt: int = 0
    samplings: dict[tuple[bool, bool], Sampling] = field(default_factory=dict)  # one of each kind
    bad: dict[int, str] = field(default_factory=dict)  # by number of the line


@dataclass
class Summary:
    """tokens, seconds: of this run; from the first prompt to the last answer, loading not included."""

    done: int = 0
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
        if not source.is_file():
            raise UserError(f"{source} is no file; it is read twice, so it has to be one")
        if not output.parent.is_dir():
            raise UserError(f"{output}: that folder does not exist; make it first")
        begun = output.exists() and output.stat().st_size > 0
        if begun and not resume:
            raise UserError(f"{output} exists; --resume goes on with it, or remove it")
        if begun and not self.file.exists():
            raise UserError(f"{output} exists without {self.file.name}, so --resume cannot go on with it; remove it")
        self.state: dict[str, Any] = {}  # what was decided; empty for a new job
        if resume and self.file.exists():
            self.state = read_json(self.file)
        seed = default.sampling.seed
        self.seed = self.state.get("seed", secrets.randbits(63) if seed is None else seed)

    def lines(self, engine: Engine, max_length: int | None = None) -> Iterator[tuple[int, Line | UserError]]:
        """Every line that is not blank, with its number: a request, or why it is none."""
        with self.source.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    try:
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

    def survey(
        self, engine: Engine, max_length: int | None = None, bad: Callable[[int, UserError], None] = lambda *_: None
    ) -> Survey:
        """Reads the input for the first time; the engine's model may be on meta. `bad` is told of each bad line.

        UserError for two lines with one id, for no line that can run, and for a job that is not the one to resume.
        """
        survey, numbers = Survey(), {}
        for number, line in tqdm(self.lines(engine, max_length), "reading", unit="line", leave=False, disable=None):
            if isinstance(line, UserError):
                survey.bad[number] = str(line)
                bad(number, line)
                continue
            if (first := numbers.setdefault(line.id, number)) != number:
                raise UserError(f"{self.source}: lines {first} and {number} have the same id, {json.dumps(line.id)}")
            survey.count += 1
            survey.longest = max(survey.longest, len(line.ids) + line.max_new_tokens)
            survey.longest_prompt = max(survey.longest_prompt, len(line.ids))
            survey.samplings.setdefault((line.sampling.temperature == 0, line.sampling.restricted), line.sampling)
        if not survey.count:
            raise UserError(f"{self.source} holds no request that can run")
        with self.source.open("rb") as file:
            digest = sha256()
            while part := file.read(1 << 20):
                digest.update(part)
        survey.digest = digest.hexdigest()
        if self.state:
            now = {**self.asked, "the input's sha256": survey.digest}
            was = {**self.state["asked"], "the input's sha256": self.state["input"]}
            if other := [name for name in now if was.get(name) != now[name]]:
                texts = "; ".join(f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in other)
                raise UserError(f"{self.output} is of another job: {texts}")
        return survey

    def begin(self) -> tuple[BufferedWriter, set[str | int]]:
        """The output, to be appended to by nobody else, without a torn last line; and the ids that are done."""
        file = self.output.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.output} is being written by another run") from None
        done, whole = set(), 0
        with self.output.open("rb") as results:
            for number, raw in enumerate(results, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    done.add(json.loads(raw)["id"])
                except (ValueError, TypeError, KeyError):
                    raise UserError(f"{self.output} line {number} is no result; mend or remove it") from None
                whole += len(raw)
        file.truncate(whole)
        return file, done

    def decide(self, engine: Engine, survey: Survey, rows: int, max_length: int) -> None:
        """Everything the results depend on goes to the disk, before the first of them does."""
        if not self.state:
            first = (line for _, line in self.lines(engine, max_length) if isinstance(line, Line))
            plan, importance = engine.plan_for(islice(first, rows), max_length)
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
        new = self.file.with_name(self.file.name + ".new")
        with new.open("w") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.file)

    def run(self, engine: Engine, survey: Survey, file: BufferedWriter, done: set[str | int]) -> Iterator[Summary]:
        """The requests that are not done yet; yields after each result. The engine has the job's plan."""
        summary, length = Summary(before=len(done)), self.state["max_length"]
        lines = (line for _, line in self.lines(engine, length) if isinstance(line, Line) and line.id not in done)
        samplings = survey.samplings.values()
        started = time.perf_counter()
        with tqdm(total=survey.count, initial=len(done), unit="request", disable=None) as bar:
            for completion in engine.generate(lines, self.state["batch_size"], length, samplings, apart=True):
                file.write(json.dumps(self._result(completion)).encode() + b"\n")
                file.flush()
                summary.done += 1
                summary.prompt_tokens += len(completion.request.ids)
                summary.tokens += len(completion.tokens)
                summary.seconds = time.perf_counter() - started
                decided = {name: self.state[name] for name in ("groups", "importance")}
                summary.figures = replace(completion.figures, **decided)
                bar.update()
                bar.set_postfix_str(f"{summary.tokens_per_s:,.0f} tokens/s")
                yield summary
        os.fsync(file.fileno())

    def _line(self, number: int, raw: bytes) -> Line:
        said = parse_json(raw, "")
        if unknown := [name for name in said if name not in FIELDS]:
            raise UserError(f"unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
        if ("prompt" in said) == ("prompt_ids" in said):
            raise UserError("give one of prompt and prompt_ids")

        def get(name: str, default: Any, kind: str, *types: type) -> Any:
            value = said.get(name, default)
            if name in said and type(value) not in types:
                raise UserError(f"{name} must be {kind}, not {json.dumps(value)}")
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
        return {
            "id": line.id,
            "text": line.text.text,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(line.ids),
        }
