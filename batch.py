"""A job: requests from a file of JSON lines, results into another, each written when it is done.

    a line in    {"id": "a", "prompt": "..."} or "prompt_ids": [...]; also max_new_tokens, temperature, seed,
                 and "rendered": true for a prompt that a chat template has made already, "load_cache": a prompt cache's
                 file, behind which the prompt stands
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
import math
import os
import secrets
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from io import FileIO
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

import files
import parallel
from engine import Engine
from errors import UserError, cut, in_bytes, place, shown
from files import NATURAL, POSITIVE, Lines
from needs import Needs
from policies import options
from prefill import plan_for
from promptcache import PromptCache, read_about
from promptcache import check as check_about
from request import Completion, Figures, Request
from sampling import Sampling
from sizing import Sizing
from tokenizer import TextStream

FIELDS = {  # of a line in: kind, and what that is called
    "id": ((str, int), "a string or an integer"),
    "prompt": (str, "a string"),
    "prompt_ids": ([int], "a list of integers"),
    "rendered": (bool, "true or false"),
    "load_cache": (str, "the path of a file"),
    "max_new_tokens": (int, "an integer"),
    "temperature": ((int, float), "a number"),
    "seed": (int, "an integer"),
}
RESULT = {"id": (str, int), "text": str, "tokens": [NATURAL], "finish_reason": str, "prompt_tokens": NATURAL}
STATE = {
    "asked": dict,
    "input": str,
    "seed": range(2**63),
    "max_length": POSITIVE,
    "plan": [NATURAL],
    "groups": (None, [(None, NATURAL)]),
    "importance": (None, [float]),
    "batch_size": POSITIVE,
}


@dataclass(frozen=True, kw_only=True)
class Line(Request):
    id: str | int
    text: TextStream


@dataclass
class Survey:
    """What the first reading of the input found."""

    digest: str = ""  # SHA-256 of the file
    lines: array = field(default_factory=lambda: array("Q"))  # a digest of each line
    ids: set[str | int] = field(default_factory=set)  # of requests that can run
    longest: int = 0  # tokens of a prompt and its answer
    longest_prompt: int = 0
    samplings: dict[tuple[bool, bool], Sampling] = field(default_factory=dict)  # one of each kind
    bad: dict[int, str] = field(default_factory=dict)  # by number of the line

    def add(self, line: Line) -> None:
        self.ids.add(line.id)
        self.longest = max(self.longest, line.length)
        self.longest_prompt = max(self.longest_prompt, len(line.ids))
        self.samplings.setdefault((line.sampling.temperature == 0, line.sampling.restricted), line.sampling)


@dataclass
class Summary:
    """Of this run; seconds from the first prompt to the last answer, loading not included."""

    done_before: int = 0  # by earlier runs
    done: int = 0
    failed: int = 0  # of those done: their result is an error
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0

    def add(self, completion: Completion, seconds: float) -> None:
        self.done += 1
        self.failed += completion.error is not None
        self.prompt_tokens += len(completion.request.ids)
        self.new_tokens += len(completion.tokens)
        self.seconds, self.tokens_per_s = seconds, self.new_tokens / seconds


@dataclass
class Job:
    """UserError if there is an output and `resume` is false, or nothing to go on with."""

    source: Path
    output: Path
    sizing: Sizing
    asked: dict[str, Any]  # the settings that decide what the results are; with others it is another job
    default: Request  # what a line does not say; its sampling has the job's seed or none
    encode: Callable[[str, bool | None, bool], list[int]]  # to ids, of a prompt, what its line says of `rendered`, and
    # whether it stands behind a prompt cache
    text: Callable[[], TextStream]  # makes the text of an answer
    resume: bool = False
    max_length: int | None = None  # of a prompt and its answer, in tokens
    limit: float = math.inf  # of bytes
    load_cache: str | None = None  # of lines that do not name another

    def __post_init__(self):
        source, output = self.source, self.output
        self.file = output.with_name(output.name + ".job.json")
        if not os.path.isfile(source):
            raise UserError(f"{place(source)} is no file; it is read twice, so it has to be one")
        with files.accessing(self.file):
            begun = output.exists() and output.stat().st_size > 0
        if begun and not self.resume:
            raise UserError(f"{place(output)} exists; --resume goes on with it, or name another --output")
        if begun and not self.file.exists():
            lost = f"exists without {place(self.file.name)}, so --resume cannot go on with it"
            raise UserError(f"{place(output)} {lost}; name another --output")
        self.past = lru_cache(2)(self._past)  # of the lines that are read now
        self.engine: Engine | None = None
        self.state: dict[str, Any] = {}  # what was decided; empty for a new job
        if parallel.shard().rank == 0 and self.file.exists():
            where = f"{place(self.file)} is no state of a job (name another --output)"
            state = files.checked(files.parse_json(files.read_bytes(self.file), where), STATE, where)
            layers = {len(state[name]) for name in ("plan", "importance", "groups") if state[name] is not None}
            if len(layers) > 1:
                raise UserError(f"{where}: plan, importance and groups are of {sorted(layers)} layers")
            if wrong := [cosine for cosine in state["importance"] or () if abs(cosine) > 1.001]:
                raise UserError(f"{where}: an importance is a cosine, within [-1, 1], not {shown(wrong[0])}")
            self.state = state if self.resume else {}
        self.state = parallel.agreed(self.state)
        seed = self.default.sampling.seed
        self.seed = self.state.get("seed", parallel.agreed(secrets.randbits(63)) if seed is None else seed)

    def survey(self, bad: Callable[[int, UserError], None] = lambda *_: None) -> Survey:
        """Reads the input for the first time; `bad` is told of each bad line.

        UserError for two lines with one id, for no line that can run, and for a job that is not the one to resume.
        """
        survey, numbers, file = Survey(), {}, Lines(self.source)
        for number, raw, size, digest in tqdm(file, "reading", unit="line", leave=False, disable=None):
            survey.lines.append(digest)
            if raw is not None and not raw.strip():
                continue
            try:
                if raw is None:
                    raise UserError(f"{size / 2**20:,.0f} MiB long; {in_bytes(file.most)} is the most for a line")
                line = self._line(number, raw)
                self._check(line)
            except UserError as error:
                survey.bad[number] = str(error)
                bad(number, error)
                continue
            if (first := numbers.setdefault(line.id, number)) != number:
                same = f"have the same id, {shown(line.id)}"
                raise UserError(f"{place(self.source)}: lines {first} and {number} {same}")
            survey.add(line)
        survey.digest = file.sha256.hexdigest()
        if not survey.ids:
            raise UserError(f"{place(self.source)} holds no request that can run")
        if self.state:
            now = {**self.asked, "the input's sha256": survey.digest}
            was = {**self.state["asked"], "the input's sha256": self.state["input"]}
            if other := [name for name in now | was if was.get(name) != now.get(name)]:
                texts = "; ".join(f"{name} was {shown(was.get(name))} and is {shown(now.get(name))}" for name in other)
                raise UserError(f"{place(self.output)} is of another job: {texts}")
        return survey

    def _check(self, line: Line) -> None:
        self.sizing.check(line.ids, line.max_new_tokens, line.seen, ready=line.past is not None)
        prompt, new, most = len(line.ids), line.max_new_tokens, self.max_length or self.state.get("max_length")
        if most is not None and line.length > most:
            before = f"{line.seen} earlier + " * bool(line.seen)
            raise UserError(f"{before}{prompt} prompt + {new} new tokens exceed max-length {most}")
        if line.length > self.sizing.config.reach:  # it must not make the cache of all too large
            Needs.of(self.sizing, line.length, prompt, apart=True).check(1, self.limit)

    def requests(self, survey: Survey) -> Iterator[Line]:
        """What can run, in a second reading. UserError for a line that is another one than in the survey."""
        for number, (line, digest) in enumerate(zip_longest(Lines(self.source), survey.lines), 1):
            if line is None or line.digest != digest:
                changed = f"line {number} is another one than when the job began; put it back"
                raise UserError(f"{place(self.source)} {changed}")
            if number not in survey.bad and line.data.strip():
                yield self._line(number, line.data)

    def begin(self, survey: Survey, file: FileIO) -> set[str | int]:
        """The ids whose results the output holds; a torn last line is cut off."""
        done, whole = {}, 0
        for number, raw, size, _ in Lines(self.output, files.MOST_BYTES):
            if raw is not None and not raw.endswith(b"\n"):
                break
            where = f"{place(self.output)} line {number} is no result (name another --output)"
            if raw is None:
                raise UserError(f"{where}: it is {size / 2**20:,.0f} MiB long")
            line_id = files.checked(files.parse_json(raw, where), RESULT, where)["id"]
            if line_id not in survey.ids:
                raise UserError(f"{where}: the input has no id {shown(line_id)}")
            if (first := done.setdefault(line_id, number)) != number:
                raise UserError(f"{where}: its id {shown(line_id)} is line {first}'s already")
            whole += size
        file.truncate(whole)
        return set(done)

    def decide(self, engine: Engine, survey: Survey, rows: int, max_length: int) -> None:
        """Everything the results depend on goes to the disk, before the first of them does."""
        self.engine = engine
        self.past.cache_clear()
        if not self.state:
            # some to spare, for prompts whose importance is not finite
            first = islice((line for line in self.requests(survey) if line.past is None), rows + 64)
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
        if parallel.shard().rank == 0:
            files.write_json(self.file, self.state)

    def run(self, engine: Engine, survey: Survey, file: FileIO | None, done: set[str | int]) -> tuple[Summary, Figures]:
        """The requests that are not done yet, under the plan that was decided. file: None if another rank writes."""
        summary, length, rows = Summary(len(done)), self.state["max_length"], self.state["batch_size"]
        figures = Figures(self.state["plan"])
        engine.plan = self.state["plan"]
        lines = (line for line in self.requests(survey) if line.id not in done)
        started = time.perf_counter()
        with tqdm(total=len(survey.ids), initial=len(done), unit="request", disable=None) as bar:
            for completion in engine.generate(lines, rows, length, survey.samplings.values(), apart=True):
                line, error = completion.request, completion.error
                line.text.flush()
                result = {"id": line.id, "text": line.text.text, "tokens": completion.tokens}
                result |= {"finish_reason": completion.finish_reason, "prompt_tokens": line.seen + len(line.ids)}
                result |= {} if error is None else {"error": error}
                if file:  # of several ranks, the first one writes
                    files.append(file, json.dumps(result, allow_nan=False).encode() + b"\n", self.output)
                summary.add(completion, time.perf_counter() - started)
                figures = completion.figures or figures  # none of a line that could not run
                bar.update()
                bar.set_postfix_str(f"{summary.tokens_per_s:,.0f} tokens/s")
        if file:
            with files.accessing(self.output):
                os.fsync(file.fileno())
        importance = self.state["importance"] or figures.importance
        return summary, replace(figures, groups=self.state["groups"], importance=importance)

    def _past(self, path: str) -> PromptCache:
        """What the file says of itself, and what it holds as soon as there is an engine."""
        if self.engine is not None:
            return PromptCache.load(path, self.engine)
        about, sizing = read_about(path), self.sizing
        check_about(path, about, policy=options.word(sizing.policy), format=sizing.format)
        return PromptCache(about, [])

    def _line(self, number: int, raw: bytes) -> Line:
        said = fields(raw)
        if ("prompt" in said) == ("prompt_ids" in said):
            raise UserError("give one of prompt and prompt_ids")
        if "prompt_ids" in said and "rendered" in said:
            raise UserError("rendered is for a prompt, not for prompt_ids")
        name = said.get("load_cache", self.load_cache)
        past = None if name is None else self.past(name)
        if said.get("prompt") == "" and past is None:
            raise UserError("the prompt is empty; give some text")
        ids = said.get("prompt_ids")
        if ids is None:
            ids = self.encode(said["prompt"], said.get("rendered"), past is not None)
        line_id, sampling, text = said.get("id", number), self.default.sampling, self.text()
        drawn = sha256(json.dumps([self.seed, line_id]).encode()).digest()
        seed = said.get("seed", int.from_bytes(drawn[:8]) >> 1)
        return Line(
            ids,
            said.get("max_new_tokens", self.default.max_new_tokens),
            replace(sampling, temperature=said.get("temperature", sampling.temperature), seed=seed),
            self.default.eos_ids,
            text.ends,
            past,
            id=line_id,
            text=text,
        )


def fields(raw: bytes) -> dict[str, Any]:
    """What a line says. UserError for a field that is unknown or of another kind."""
    said = files.parse_json(raw, "")
    for name, value in said.items():
        if name not in FIELDS:
            raise UserError(f"unknown field {shown(name)}; known: {', '.join(FIELDS)}")
        kind, called = FIELDS[name]
        if type(value) is int and abs(value) >= 2**63:
            raise UserError(f"{name} must have at most 63 bits, not be {shown(value)}")
        if not files.is_a(value, kind):
            raise UserError(f"{name} must be {called}, not {cut(json.dumps(value))}")
    return said
