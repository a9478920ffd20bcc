"""A job over many machines: generate.py's --input and --output, in parts that Ray's workers take.

    pip install -r requirements-ray.txt
    python scripts/ray_job.py --input prompts.jsonl --output results.jsonl --squeeze --workers 2    on this machine
    ray start --head --port 6379; ssh other ray start --address head:6379                           on many
    python scripts/ray_job.py --address head:6379 --workers 16 --device cuda --checkpoint /share/Mistral-7B \\
        --input /share/prompts.jsonl --output results.jsonl --squeeze --batch-size 64 --resume
    python scripts/ray_job.py --address auto --workers 4 --ranks 8 --device cuda --checkpoint /share/Llama-2-70B ...

The flags, the lines in and out (batch.py), errors and exit codes are those of generate.py. Its folder, the checkpoint,
the input and whatever else a flag or a line names has to be at the same paths on all machines: shared storage. Only the
driver, which this starts, writes: OUTPUT.job.json, and a file for each part into the folder OUTPUT.parts. When all are
there they become OUTPUT, in the order of the input, and the folder goes.

A worker is a Ray actor that holds an engine. With --ranks N it starts N ranks of torchrun instead, each on a GPU of its
own, and keeps them. On a CPU a worker takes --threads of them (default 1). Before the first part, one worker decides
what generate.py would: plan, rows, length and seed. A part is a job of its own under these decisions, so each answer is
the one that a job on one machine of this kind gives.

Ray Data hands out the parts, two to a worker at a time. It gives those of a worker that died to others, and replaces
the worker; a part over which RETRIES + 1 workers died ends the job. --resume does what is missing. A driver that was
killed, kill -9 included, has lost no more than the parts that ran.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from commandline import compiling, guarded, positive  # noqa: E402

# isort: split
import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import secrets  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from array import array  # noqa: E402
from bisect import bisect_left  # noqa: E402
from collections.abc import Iterable, Iterator, Sequence  # noqa: E402
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress  # noqa: E402
from copy import copy  # noqa: E402
from dataclasses import asdict, dataclass, field, replace  # noqa: E402
from hashlib import sha256  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from itertools import chain, islice  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

from tqdm import tqdm  # noqa: E402

import files  # noqa: E402
import generate  # noqa: E402
import machine  # noqa: E402
import parallel  # noqa: E402
from arguments import Asked, make_parser  # noqa: E402
from batch import RESULT, Job, Summary, Survey, fields  # noqa: E402
from errors import UserError, place, reason, shown  # noqa: E402
from files import Lines  # noqa: E402
from needs import MOST_ROWS, Needs  # noqa: E402
from request import Figures  # noqa: E402

RETRIES = 3  # of a part whose worker died
IN_FLIGHT = 2  # parts that a worker has: one runs, one waits, so that none is idle
SPARE = 64  # prompts more than rows, for a plan (Job.decide)
AS_RANK = "--as-rank"  # how torchrun starts this
LONGEST_FOLDER = 40  # characters before the names of Ray's sockets, of which the system takes 107 in all
SUMS = ("prefill_tokens", "prefill_s", "compile_s", "decode_s", "decode_tokens")


def main(argv: list[str] | None = None) -> int:
    return guarded("ray_job.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("the machines").add_argument
    add("--workers", type=positive, metavar="N", help="engines (default: as many as the machines have room for)")
    add("--ranks", type=positive, default=1, metavar="N", help="devices of a worker, which share the model (default 1)")
    add(
        "--part-size",
        type=positive,
        metavar="N",
        help="lines of a part (default: a 64th of the input, from 128 to 4096)",
    )
    add(
        "--address",
        metavar="HOST:PORT|auto",
        help="a Ray cluster that runs (default: one on this machine, for the job)",
    )
    return parser.parse_args(argv)


# ---- parts of the input, and of the output


class Part(NamedTuple):
    """Lines of the input that a worker takes together. number: of the part, from 0; bad: lines that cannot run."""

    number: int
    first: int  # line, from 1
    start: int  # byte
    lines: int
    digest: str  # of the lines' own
    bad: list[int]

    def read(self, source: Path | str) -> list[dict[str, Any]]:
        """What the lines say that can run, each with its id. UserError if they are others than in the survey."""
        lines = [*islice(Lines(source, start=self.start), self.lines)]
        if digest_of(line.digest for line in lines) != self.digest:
            last = self.first + self.lines - 1
            which = f"lines {self.first} to {last} are others than when the job began; put them back"
            raise UserError(f"{place(source)}: {which}")
        numbered = enumerate(lines, self.first)
        return [
            {"id": number, **fields(line.data)}
            for number, line in numbered
            if number not in self.bad and line.data.strip()
        ]


def digest_of(lines: Iterable[int]) -> str:
    return sha256(array("Q", lines).tobytes()).hexdigest()


def split(source: Path | str, survey: Survey, size: int) -> list[Part]:
    """Parts of `size` lines each, the last one of what is left."""
    parts, start, bad, lines = [], 0, sorted(survey.bad), iter(Lines(source))
    for first in range(1, len(survey.lines) + 1, size):
        digests = survey.lines[first - 1 : first - 1 + size]
        own = bad[bisect_left(bad, first) : bisect_left(bad, first + size)]
        parts.append(Part(len(parts), first, start, len(digests), digest_of(digests), own))
        start += sum(line.size for line in islice(lines, size))
    return parts


@dataclass
class Parts:
    """The folder of the parts that are done: a file each, with a line for each request, in the order of the input."""

    folder: Path

    @property
    def way(self) -> str:
        """The end of a line that says why a job has ended."""
        return f"; --resume goes on with what {place(self.folder)} holds" if self.folder.exists() else ""

    def file(self, part: Part) -> Path:
        return self.folder / f"{part.number:08}.jsonl"

    def begin(self, resume: bool, state: dict[str, Any]) -> None:
        """UserError for parts of an earlier job, unless it can go on and shall, and where no folder can be."""
        with files.accessing(self.folder):
            if not self.folder.exists():
                return
            if not self.folder.is_dir():
                raise UserError(f"{place(self.folder)} is no folder; name another --output")
            there = any(self.folder.iterdir())
        if there and not resume:
            raise UserError(f"{place(self.folder)} exists; --resume goes on with it, or name another --output")
        if there and not state:
            raise UserError(f"{place(self.folder)} exists without the job's state; name another --output")

    def done(self, parts: Sequence[Part], source: Path | str) -> dict[int, int]:
        """Of each part that is there and whole, how many results it holds."""
        there = [part for part in parts if self.file(part).exists()]
        found = {}
        for part in tqdm(there, "parts that are done", unit="part", leave=False, disable=None):
            wanted = [said["id"] for said in part.read(source)]
            if self._ids(part) == wanted:
                found[part.number] = len(wanted)
        return found

    def _ids(self, part: Part) -> list[str | int] | None:
        """None for a file that does not hold results only."""
        where, found = place(self.file(part)), []
        try:
            for line in Lines(self.file(part), files.MOST_BYTES):
                if line.data is None or not line.data.endswith(b"\n"):
                    return None
                found.append(files.checked(files.parse_json(line.data, where), RESULT, where)["id"])
        except UserError:
            return None
        return found

    def add(self, part: Part, results: str) -> None:
        with files.accessing(self.folder):
            self.folder.mkdir(exist_ok=True)
        files.write_whole(self.file(part), results)

    def merge(self, parts: Sequence[Part], output: Path) -> None:
        """All of them become the output, at once; the folder goes."""

        def write(file: Any) -> None:
            for part in parts:
                with files.opened(self.file(part)) as own:
                    shutil.copyfileobj(own, file)

        files.write_whole(output, write)
        self.clear()

    def clear(self) -> None:
        """Nothing else that may be in the folder goes."""
        with suppress(OSError):
            for path in [*self.folder.glob("[0-9]*.jsonl"), *self.folder.glob(".[0-9]*.jsonl.*.new")]:
                path.unlink()
            self.folder.rmdir()


# ---- a worker


class Work:
    """An engine on this process's device, and a job's decisions and parts, as they are asked for in JSON.

    A part is run as a job is (batch.py), with files of its own, under the state that was decided for all.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.asked, self.engine = args, None, None

    def __call__(self, ask: str) -> str:
        """The answer, or as "error" the line of a UserError."""
        with tempfile.TemporaryDirectory() as folder:
            self.source, self.output = Path(folder, "in"), Path(folder, "out")
            try:
                machine.use_threads(self.args.threads)  # of the thread that calls
                own = {"input": str(self.source), "output": str(self.output), "save_plan": None}
                self.asked = self.asked or Asked(argparse.Namespace(**{**vars(self.args), **own}))
                said = json.loads(ask)
                answer = self.part(**said) if "part" in said else self.decide(**said)
            except UserError as error:
                answer = {"error": str(error)}
        return json.dumps(answer, allow_nan=False)

    def decide(self, first: list[dict], length: int, longest_prompt: int, requests: int) -> dict[str, Any]:
        """What the job's results depend on: the state of a job (batch.py). first: the first requests of the input."""
        needs = self._needs(length, longest_prompt)
        rows = generate.rows_of(self.asked, needs, None, requests)
        job, survey = self._job(first, None)
        with needs.explained(rows, self.asked.limit), compiling(self.asked.compiles):
            job.decide(self._engine(), survey, rows, length)
        return job.state

    def part(self, part: list, state: dict[str, Any], longest_prompt: int) -> dict[str, Any]:
        """The results of a part of the input, in its order."""
        own = Part(*part)
        lines = own.read(self.args.input)
        rows, length = state["batch_size"], state["max_length"]
        needs, summary, figures, results = self._needs(length, longest_prompt), Summary(), None, {}
        if lines:
            job, survey = self._job(lines, state)
            opened = files.exclusive(self.output) if parallel.shard().rank == 0 else nullcontext()
            with opened as file, needs.explained(rows, self.asked.limit), compiling(self.asked.compiles):
                engine = self._engine()
                job.decide(engine, survey, rows, length)
                summary, figures = job.run(engine, survey, file, set())
            texts = [line.data.decode() for line in Lines(self.output, files.MOST_BYTES)] if file else []
            results = {json.loads(text)["id"]: text for text in texts}
        return {
            "number": own.number,
            "results": [results[line["id"]] for line in lines if results],
            "summary": asdict(summary),
            "figures": figures and asdict(figures),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }

    def _engine(self) -> Any:
        self.engine = self.engine or self.asked.engine()
        return self.engine

    def _needs(self, length: int, longest_prompt: int) -> Needs:
        return self.asked.with_caches(Needs.of(self.asked.sizing, length, longest_prompt, apart=True))

    def _job(self, lines: Sequence[dict], state: dict[str, Any] | None) -> tuple[Job, Survey]:
        """The job of these lines. UserError if any of them cannot run here."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.source.write_bytes(data)
        if state:
            own = {"asked": generate.job_settings(self.asked), "input": sha256(data).hexdigest()}
            files.write_json(f"{self.output}.job.json", state | own)
        job = generate.job_of(self.asked, self.source, self.output, resume=True)
        survey = job.survey()
        for number, error in survey.bad.items():
            raise UserError(f"{place(self.args.input)}: id {shown(lines[number - 1]['id'])}: {error}")
        return job, survey


class Ranks:
    """The same on several devices: ranks of torchrun, which end with this process."""

    def __init__(self, args: argparse.Namespace):
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {args.ranks}".split()
        command = [sys.executable, *launch, __file__, AS_RANK, json.dumps(vars(args))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, ask: str) -> str:
        with suppress(BrokenPipeError):  # they are dead, which their answer shows
            self.process.stdin.write(ask + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer.endswith("\n"):
            os._exit(1)  # Ray replaces this worker and gives the part to another one
        return answer


def follow(args: argparse.Namespace) -> int:
    """One of those ranks: it answers what comes on the first one's standard input, until that ends."""
    said: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            said.put(line)
        os._exit(1)  # the worker is gone, and with it whoever wants what is being computed

    with parallel.ranks(args.device) as shard:
        if shard.rank == 0:
            threading.Thread(target=listen, daemon=True).start()
        work = Work(args)
        for ask in parallel.heard(iter(said.get, None)):
            print(answer := work(ask), flush=True)
            if error := json.loads(answer).get("error"):  # of this rank alone, perhaps: the others must not wait
                raise UserError(error)
    return 0


class Worker:
    """What Ray makes of it. Ray copies this class; the rest is imported from where the driver has it."""

    def __init__(self, args: argparse.Namespace, folder: str, code: str):
        self.args, self.folder, self.code, self.work = args, folder, code, None

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        if self.work is None:
            for path in (self.folder, self.code):
                if not os.path.isdir(path):
                    line = f"{os.uname().nodename} has no folder {path}; code, model and input have to be at the same"
                    return {"answer": json.dumps({"error": f"{line} paths on all machines"})}
            os.chdir(self.folder)
            sys.path.insert(0, self.code)
            from ray_job import Ranks, Work

            self.work = (Work if self.args.ranks == 1 else Ranks)(self.args)
        return {"answer": self.work(row["ask"])}


# ---- the driver


def run(args: argparse.Namespace) -> int:
    parallel.alone("ray_job.py")
    given, device = copy(args), args.device
    if args.input is None:
        raise UserError("ray_job.py is for a file of prompts; give --input and --output")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {shown(device)}; Ray says which one is whose")
    args.device = "cpu"  # of this process, which reads prompts and runs none
    asked = Asked(args)
    args.device = device
    if find_spec("ray") is None:
        raise UserError("ray is not installed: pip install -r requirements-ray.txt")
    job = generate.job_of(asked, Path(args.input), Path(args.output), args.resume)
    job.limit = math.inf if args.max_memory is None else job.limit  # this machine's own means nothing
    kept = Parts(job.output.with_name(f"{job.output.name}.parts"))
    kept.begin(args.resume, job.state)
    survey = job.survey(generate.bad_line("ray_job.py", args))
    with files.exclusive(job.output) as file:
        before = job.begin(survey, file)
        if before and len(before) < len(survey.ids):
            raise UserError(f"{place(job.output)} is of a job on one machine; generate.py --resume goes on with it")
        driver = Driver(asked, given, job, survey, kept, Summary(len(before)))
        try:
            if not before:
                driver.run()
        except KeyboardInterrupt:
            print(f"ray_job.py: interrupted{kept.way}", file=sys.stderr)
            return 130
        except UserError as error:
            raise UserError(f"{error}{kept.way}") from error
        kept.clear()
    asked.save_plan(job.state["plan"])
    result = driver.result()
    print(json.dumps(result, allow_nan=False) if args.json else "\n".join(driver.report(result)))
    return 2 if survey.bad or driver.summary.failed else 0


@dataclass
class Driver:
    """One start of a job. given: the arguments as the workers get them. figures: a worker's cache, and what all spent.

    workers: how many run at a time; gave: those that gave results.
    """

    asked: Asked
    given: argparse.Namespace
    job: Job
    survey: Survey
    kept: Parts
    summary: Summary
    figures: Figures | None = None
    workers: int = 0
    gave: set[str] = field(default_factory=set)

    def run(self) -> None:
        job, before = self.job, self.job.state.get("part_size")
        size = before or self.given.part_size or min(max(len(self.survey.lines) // 64, 128), 4096)
        if self.given.part_size not in (None, size):
            raise UserError(
                f"--part-size was {size} and is {self.given.part_size}; parts that are done stay as they are"
            )
        parts = split(job.source, self.survey, size)
        done = self.kept.done(parts, job.source)
        self.summary.done_before = sum(done.values())
        if left := [part for part in parts if part.number not in done]:
            with cluster(self.given) as (ray, room):
                self.workers = self.given.workers or room
                if not job.state:
                    [state] = answers(ray, self.given, 1, [self._undecided(parts)])
                    job.state = {**state, "asked": job.asked, "input": self.survey.digest}
                job.state["part_size"] = size
                files.write_json(job.file, job.state)
                self._take(left, answers(ray, self.given, self.workers, [self._ask(part) for part in left]))
        self.kept.merge(parts, job.output)

    def _undecided(self, parts: Sequence[Part]) -> dict[str, Any]:
        """What a worker has to know to decide for all."""
        every = (said for part in parts for said in part.read(self.job.source))
        first = list(islice(every, 1))
        if self.given.load_cache is None:  # else no line makes a plan
            fresh = (said for said in chain(first, every) if "load_cache" not in said)
            first = [*islice(fresh, (self.given.batch_size or MOST_ROWS) + SPARE)] or first
        length, longest = self.given.max_length or self.survey.longest, self.survey.longest_prompt
        return {"first": first, "length": length, "longest_prompt": longest, "requests": len(self.survey.ids)}

    def _ask(self, part: Part) -> dict[str, Any]:
        return {"part": part, "state": self.job.state, "longest_prompt": self.survey.longest_prompt}

    def _take(self, parts: Sequence[Part], given: Iterable[dict[str, Any]]) -> None:
        """Keep what the workers give."""
        summary, by_number, started = self.summary, {part.number: part for part in parts}, time.perf_counter()
        with tqdm(total=len(self.survey.ids), initial=summary.done_before, unit="request", disable=None) as bar:
            for answer in given:
                self.kept.add(by_number[answer["number"]], "".join(answer["results"]))
                for name in ("done", "failed", "prompt_tokens", "new_tokens"):
                    setattr(summary, name, getattr(summary, name) + answer["summary"][name])
                summary.seconds = time.perf_counter() - started
                summary.tokens_per_s = summary.new_tokens / summary.seconds
                self._spent(answer["figures"])
                self.gave.add(answer["worker"])
                bar.update(len(answer["results"]))
                bar.set_postfix_str(f"{summary.tokens_per_s:,.0f} tokens/s")

    def _spent(self, figures: dict[str, Any] | None) -> None:
        if figures:
            own = Figures(**figures)
            before = self.figures or Figures()
            self.figures = replace(own, **{name: getattr(own, name) + getattr(before, name) for name in SUMS})

    def result(self) -> dict[str, Any]:
        job, summary, survey = self.job, self.summary, self.survey
        rows, length = job.state["batch_size"], job.state["max_length"]
        own = {"output": self.given.output, **vars(summary), "bad_lines": survey.bad, "batch_size": rows}
        own |= {"max_length": length, "workers": self.workers, "workers_in_all": len(self.gave)}
        full = Needs.of(self.asked.sizing, length, survey.longest_prompt, apart=True).row_full * rows
        figures = self.figures and replace(self.figures, kv_bytes_full=full)
        return generate.result_json(self.asked, own, figures) | {"device": self.given.device}

    def report(self, result: dict[str, Any]) -> list[str]:
        lines = generate.job_report(self.asked, result)
        workers = f"workers  {self.workers} at a time, each with such a cache; {len(self.gave)} of them gave results"
        return [*lines, workers] if self.gave else lines


# ---- Ray


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[tuple[Any, int]]:
    """Ray, and how many workers there is room for. UserError if there is none, or no such cluster."""
    cpus, gpus = resources(args)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with quiet(), tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        if len(folder) > LONGEST_FOLDER and args.address is None:
            raise UserError(f"the sockets of Ray need a shorter path than {place(folder)}; set another TMPDIR")
        where = {"address": args.address}
        if args.address is None:
            most = max(os.cpu_count() or 1, cpus * (args.workers or 1))
            where = {"address": "local", "num_cpus": most, "include_dashboard": False, "_temp_dir": folder}
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray would keep a token in the user's home
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        else:
            reach(args.address)
        import ray
        import ray.data

        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, ValueError, RuntimeError) as error:
            token = "; if it asks for a token, set RAY_AUTH_MODE=token" if args.address else ""
            raise UserError(f"no Ray cluster at {shown(where['address'])}: {reason(error)}{token}") from error
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.disable(logging.CRITICAL)
            there = ray.cluster_resources()
            room = int(min(there.get("CPU", 0) // cpus, there.get("GPU", 0) // gpus if gpus else math.inf))
            if not room:
                needs = f"a worker needs {cpus} CPUs and {gpus} GPUs"
                raise UserError(f"{needs}; the machines have {there.get('CPU', 0):g} and {there.get('GPU', 0):g}")
            yield ray, room
        finally:
            ray.shutdown()
            logging.disable(logging.NOTSET)


def reach(address: str) -> None:
    """UserError if nobody listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise UserError(f"--address must be HOST:PORT of a Ray cluster or auto, not {shown(address)}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {shown(address)}: {error.strerror or reason(error)}") from error


def resources(args: argparse.Namespace) -> tuple[int, int]:
    """CPUs and GPUs of a worker."""
    return args.ranks * (args.threads or 1), args.ranks if args.device == "cuda" else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Ray and what it starts write to the standard streams' numbers; what this process says itself is still seen."""
    sys.stdout.flush()
    with ExitStack() as back:
        error = back.enter_context(open(os.dup(2), "w", errors="replace"))
        back.enter_context(redirect_stderr(error))
        nobody = back.enter_context(open(os.devnull, "w"))
        back.enter_context(redirect_stdout(nobody))
        for number in (1, 2):
            before = os.dup(number)
            back.callback(os.close, before)
            back.callback(os.dup2, before, number)
            os.dup2(nobody.fileno(), number)
        yield


def answers(ray: Any, args: argparse.Namespace, workers: int, asks: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """What the workers answer, as it comes. UserError for what a worker cannot do, and for a part that ends them."""
    cpus, gpus = resources(args)
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(asks)), max_tasks_in_flight_per_actor=IN_FLIGHT)
    how = {"compute": pool, "num_cpus": cpus, "num_gpus": gpus or None, "max_task_retries": RETRIES}
    how["fn_constructor_args"] = (args, os.getcwd(), str(ROOT / "scripts"))
    rows = ray.data.from_items([{"ask": json.dumps(ask)} for ask in asks], override_num_blocks=len(asks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_task_retries will have another place: without it they have no end
        answered = rows.map(Worker, **how)
    try:
        for batch in answered.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for text in batch["answer"].to_pylist():
                if "error" in (answer := json.loads(text)):
                    raise UserError(answer["error"])
                yield answer
    except ray.exceptions.RayTaskError:
        raise  # a fault of ours
    except ray.exceptions.RayError as error:
        line = f"workers died {RETRIES + 1} times over one part, or the cluster is lost ({type(error).__name__})"
        raise UserError(line) from error


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_RANK]:
        sys.exit(guarded("ray_job.py", lambda: follow(argparse.Namespace(**json.loads(sys.argv[2])))))
    sys.exit(main())
