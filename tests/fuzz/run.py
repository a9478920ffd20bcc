"""Thousands of odd inputs, and what becomes of each: one line, a result, or a fault.

    python tests/fuzz/run.py --out results/fuzz.json       all of them; about half an hour
    python tests/fuzz/run.py --kinds texts --share 0.1     a tenth of one kind
    python tests/fuzz/run.py --only configs:17             one again, with all that it says; its files stay

Each source (configs, weights, texts, jobs, flags) has `NAMES` of runs that work; `plain` makes such a run in a folder,
`mutate` puts something odd into it. Number and kind are the seed. A worker process calls the programs' main(), one
input after the other, with its own standard streams. One that dies, or takes more than `SECONDS` or `GROWTH`, counts
against the input it is at and is replaced.

Good is: one line and exit code 2 (for the lines of a job, one each); the result that the run has without what is odd;
or another result whose numbers make sense and, for a config.json, are those of transformers. All else is a fault.
"""

import argparse
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
if __name__ == "__main__":
    sys.path[:1] = map(str, (ROOT, TESTS))  # not this folder: its modules belong to the package

from fuzz.odd import Input, program  # noqa: E402

COUNTS = {"configs": 3200, "weights": 1500, "texts": 1500, "jobs": 1500, "flags": 1500}
SECONDS = 10  # of processor time in one input; the clock may show three times as much on a busy machine
GROWTH = 2 << 30  # bytes of memory that an input may add
LONGEST_LINE = 1000  # characters of an error: some name several values, and what there is instead

GOOD = ("one line", "same result", "other result")
FAULTS = ("untidy", "traceback", "hang", "memory", "crash", "NaN in JSON", "nonsense", "written outside")
REASONS = ("eos", "stop", "length", "interrupted", "error")


# ---- the worker: runs inputs in its process


@dataclass
class Ran:
    code: int | None  # None: `error` came out of main()
    out: str
    err: str
    error: str = ""
    kept: frozenset[str] = frozenset()  # lines of the output that were there before


class Workshop:
    """Makes inputs below `root`, runs them here and judges what they did. `tell` is told of each step."""

    def __init__(self, root: Path, tell: Callable[..., None]):
        self.root, self.tell = root.resolve(), tell
        self.sources: dict[str, Any] = {}
        self.references: dict[tuple[str, str], tuple[Path, Any]] = {}
        self.outside: list[str] = []  # what a run wrote that is not below root
        self.running = False
        sys.addaudithook(self._audit)

    def attempt(self, kind: str, number: int) -> None:
        source, rng = self._source(kind), random.Random(f"{kind} {number}")
        name = source.NAMES[number % len(source.NAMES)]
        done, expected = self._reference(kind, name)
        if expected is None:
            return self.tell(about=name, outcome="nonsense", detail="it does not work without anything odd either")
        folder = self._folder(f"{kind}-{number}")
        given = source.mutate(rng, name, source.plain(name, folder), folder, done)
        self.tell(about=given.about, argv=[given.program, *given.argv])
        before, children = _memory("VmRSS:"), _children()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        ran = self.run(given, folder)
        grown = max(_memory("VmHWM:") - before, _children() if _children() > children else 0)
        outcome, detail = self._judged(given, folder, ran, expected)
        if grown > GROWTH and outcome in GOOD:
            outcome, detail = "memory", f"{grown >> 20} MiB more"
        self.tell(outcome=outcome, detail=detail)
        if outcome in GOOD and hasattr(source, "doubt"):
            answer = None if outcome == "one line" else _answer(given, folder, ran)
            if doubt := source.doubt(folder, answer, outcome == "same result"):
                self.tell(outcome="nonsense", detail=doubt)

    def run(self, given: Input, folder: Path) -> Ran:
        """Call the program's main() as the interpreter would, with the folder as the working directory."""
        streams = [folder / f".{name}" for name in ("stdin", "stdout", "stderr")]
        streams[0].write_bytes(given.stdin)
        kept = (folder / "output.jsonl").read_bytes() if (folder / "output.jsonl").is_file() else b""
        module, code, error = program(given.program), None, ""
        with ExitStack() as stack:
            stack.enter_context(patch.object(sys, "argv", [given.program, *given.argv]))
            stack.enter_context(_streams(streams))
            os.chdir(folder)
            self.outside.clear()
            self.running = True
            try:
                code = module.main() or 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
            except BaseException:  # of any kind: that is what is looked for
                error = traceback.format_exc()
            finally:
                self.running = False
                os.chdir(self.root)
        out, err = (path.read_bytes().decode("utf-8", "backslashreplace") for path in streams[1:])
        return Ran(code, out, err, error, frozenset(kept.decode("utf-8", "replace").splitlines()))

    def _source(self, kind: str) -> Any:
        if kind not in self.sources:
            self.sources[kind] = importlib.import_module(f"fuzz.{kind}")
            if kind in COUNTS:
                warm()
        return self.sources[kind]

    def _reference(self, kind: str, name: str) -> tuple[Path, Any]:
        """A finished run that has nothing odd, and its answer."""
        if (kind, name) not in self.references:
            folder = self._folder(f"{kind} {name}")
            given = self._source(kind).plain(name, folder)
            ran = self.run(given, folder)
            fine = ran.code == 0 and not _nonsense(given, folder, ran)
            self.references[kind, name] = folder, _answer(given, folder, ran) if fine else None
            if not fine:
                print(f"{kind} {name} does not work as it stands: {ran.err}{ran.error}", file=sys.stderr)
        return self.references[kind, name]

    def _folder(self, name: str) -> Path:
        folder = self.root / f"worker-{os.getpid()}" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        return folder

    def _judged(self, given: Input, folder: Path, ran: Ran, expected: Any) -> tuple[str, str]:
        lines = [line.rpartition("\r")[2] for line in ran.err.split("\n")]  # what is before it is a progress bar
        lines = [line for line in lines if line.strip()]
        last = lines[-1] if lines else ""
        if self.outside:
            return "written outside", ", ".join(self.outside)
        if ran.error:
            return "traceback", ran.error
        if found := [line for line in lines if "Traceback (most" in line or "panicked at" in line]:
            return "traceback", f"{found[0]}\n{ran.err[-2000:]}"
        if ran.code == 2 and lines:
            return _refused(given, folder, ran, lines)
        if ran.code != 0:
            return "untidy", f"exit code {ran.code}: {ran.err[-1500:]}"
        if fault := _nonsense(given, folder, ran):
            return fault
        if found := [line for line in lines if "Warning" in line]:
            return "untidy", f"a warning of a library: {found[0]}"
        same = _answer(given, folder, ran) == expected
        return ("same result", last) if same else ("other result", last or ran.out[:300])

    def _audit(self, event: str, arguments: tuple) -> None:
        """Refuse and remember what is written elsewhere than below `root`."""
        if not self.running:
            return
        if event == "open":
            path, mode, flags = arguments
            if not (flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else set(mode or "") & set("wax+")):
                return
            paths = [path]
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree"):
            paths = list(arguments[:2])
        else:
            return
        for path in paths:
            place = str(self.root)
            if isinstance(path, (str, bytes, os.PathLike)):
                with suppress(ValueError, OSError):  # no path at all: nothing is opened
                    place = os.path.realpath(os.fsdecode(path))
            if not place.startswith((str(self.root), "/dev/", "/proc/")):
                self.outside.append(f"{event} {place}")
                raise PermissionError(f"a test may not write to {place}")


@contextmanager
def _streams(paths: list[Path]) -> Iterator[None]:
    """The process's standard streams are these files, also for what is not Python."""
    kept, before = [os.dup(number) for number in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    for number, path in enumerate(paths):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    reading, writing = partial(open, closefd=False, encoding="utf-8"), partial(open, mode="w", closefd=False)
    sys.stdin, sys.stdout = reading(0), writing(1, encoding="utf-8")
    sys.stderr = writing(2, encoding="utf-8", errors="backslashreplace", buffering=1)
    mine = (sys.stdin, sys.stdout, sys.stderr)
    try:
        yield
    finally:
        for stream in (*mine[1:], sys.stdout, sys.stderr):
            with suppress(Exception):  # it may be closed, or hold what cannot be encoded
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for number, file in enumerate(kept):
            os.dup2(file, number)
            os.close(file)


def _memory(name: str) -> int:
    """Bytes of this process by a name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _children() -> int:
    """Bytes that the largest process took which a run started."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


# ---- what a result has to be


class NotFinite(Exception):
    pass


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise NotFinite(constant)

    return json.loads(text, parse_constant=refuse)


def _written(given: Input, folder: Path, kept: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The JSON that the run wrote, by file, without the lines `kept`. NotFinite, ValueError."""
    found = {}
    for name in given.outputs:
        path = folder / name
        files = sorted(file for file in path.rglob("*.json*")) if path.is_dir() else [path] if path.is_file() else []
        for file in files:
            text = file.read_text(encoding="utf-8")
            lines = text.splitlines() if file.suffix == ".jsonl" else [text]
            found[str(file.relative_to(folder))] = [_strict(line) for line in lines if line not in kept]
    return found


def _said(ran: Ran) -> Any:
    """The last line of standard output, if that is JSON."""
    last = ran.out.strip().rpartition("\n")[2]
    return _strict(last) if last.startswith("{") and last.endswith("}") else None


def _answer(given: Input, folder: Path, ran: Ran) -> Any:
    """What two runs with one result have in common."""
    try:
        said, written = _said(ran), _written(given, folder)
    except (NotFinite, ValueError):
        return ran.out
    if said is None and "--interactive" in given.argv:
        said = {"text": ran.out}
    written.pop("out/summary.json", None)
    return _timeless({**(said or {}), "written": written})


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        gone = ("seconds", "date", "command", "done", "done_before")
        return {k: _timeless(v) for k, v in value.items() if not k.endswith(("_s", "_bytes")) and k not in gone}
    if isinstance(value, list):
        return [_timeless(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def _refused(given: Input, folder: Path, ran: Ran, lines: list[str]) -> tuple[str, str]:
    """Exit code 2: one line, or in a job or a conversation some of them, in our own form."""
    own = [line for line in lines if line.startswith(f"{given.program}: error: ")]
    many = "--input" in given.argv or "--interactive" in given.argv
    if len(own) != len([line for line in lines if not line.startswith("[turn ")]) or not own:
        return "untidy", f"not lines of its own: {ran.err[-1500:]}"
    if long := [line for line in own if len(line) > LONGEST_LINE or not line.isprintable()]:
        return "untidy", f"{len(long[0])} characters: {long[0]!r}"
    if not many and (len(own) > 1 or ran.out):
        return "untidy", f"{len(own)} lines, {len(ran.out)} characters on standard output: {lines[-1]}"
    if many and ran.out and (fault := _nonsense(given, folder, ran)):
        return fault
    return "one line", lines[-1]


def _nonsense(given: Input, folder: Path, ran: Ran) -> tuple[str, str] | None:
    """A fault in the numbers of a run that says it went well."""
    try:
        said, written = _said(ran), _written(given, folder, ran.kept)
    except NotFinite as error:
        return "NaN in JSON", str(error)
    except ValueError as error:
        return "nonsense", f"what was written is not JSON: {error}"
    results = [said] if isinstance(said, dict) else []
    results += [line for name, lines in written.items() if name == "output.jsonl" for line in lines]
    wrong = []
    for each in results:
        try:
            wrong += [fault for fault in [_wrong(each, given)] if fault]
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # another type than it has to be
            wrong.append(f"{error!r} of {str(each)[:200]}")
    if given.program == "checkpoint.py" and re.search(r"\bnan\b|\binf\b|(?<![\w.])-\d", ran.out):
        wrong.append(f"report: {ran.out}")
    if "layer  signal" in ran.out and re.search(r"\bnan\b|\binf\b", ran.out.partition("layer  signal")[2]):
        wrong.append("nan in the table of layers")
    return ("nonsense", wrong[0]) if wrong else None


def _wrong(said: dict[str, Any], given: Input) -> str | None:
    tokens, plan, signals = (said.get(name) for name in ("tokens", "plan", "importance"))
    if tokens is not None:
        if not all(type(token) is int and 0 <= token < given.vocab for token in tokens):
            return f"tokens {tokens[:9]} are not all below {given.vocab}"
        if said["finish_reason"] not in REASONS:
            return f"finish_reason {said['finish_reason']!r}"
        if len(tokens) > said.get("max_new_tokens", len(tokens)) or said["prompt_tokens"] < 1:
            return f"{said['prompt_tokens']} prompt tokens, {len(tokens)} new ones"
        if not tokens and said["finish_reason"] != "error":
            return f"no tokens, but {said['finish_reason']}"
        said["text"].encode()
    if signals is not None and not all(abs(signal) <= 1 + 1e-3 for signal in signals):
        return f"importance {signals}"
    if plan is not None and "kv_bytes" in said:
        if not plan or min(plan) < 0 or sum(plan) < 1 or said["kv_bytes"] < 1 or said["kv_bytes"] % sum(plan):
            return f"{said['kv_bytes']} bytes for the plan {plan}"
        if len(signals) != len(plan) or said["kv_bytes"] > said["kv_bytes_full"] or said["state_bytes"] < 0:
            return f"plan {plan}, {len(signals)} layers, {said['kv_bytes']} bytes of {said['kv_bytes_full']}"
    times = [name for name, value in said.items() if name.endswith("_s") and isinstance(value, float) and value < 0]
    return f"{times[0]} is {said[times[0]]}" if times else None


def work(root: Path) -> None:
    """Answer "KIND NUMBER" a line with what happened, a JSON object a line, of which the last is empty."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker that hangs outlives the driver
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    crashed = (root / f"crash-{os.getpid()}").open("w")
    faulthandler.enable(crashed)
    faulthandler.register(signal.SIGUSR1, crashed)

    def tell(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    workshop = Workshop(root, tell)
    tell()
    for order in orders:
        kind, number = order.split()
        try:
            workshop.attempt(kind, int(number))
        except Exception:  # of the suite itself
            tell(broken=traceback.format_exc())
        tell()


def warm() -> None:
    """Import what programs import when they get to it, and replace what takes minutes and is not about inputs."""
    import bench
    import evaluate  # noqa: F401
    from benchmark import roofline
    from evaluation import pictures

    row = {"what": "full", "batch": 1, "prompt_tokens": 8, "new_tokens": 4, "tokens_per_s": 100.0}
    for stage in bench.STAGES:
        bench.STAGES[stage] = lambda subject, sizes: iter([dict(row)])
    roofline.copy_rate = roofline.matmul_rate = lambda *_: 1e9
    pictures.draw = lambda *_: []
    gc.freeze()  # what is imported stays


# ---- the driver: keeps a worker going


class Worker:
    """A process that runs inputs, and its limits: seconds of processor time, bytes of growth."""

    def __init__(self, root: Path, seconds: float, growth: int):
        home = {name: str(root / "home") for name in "HOME XDG_CACHE_HOME HF_HOME MPLCONFIGDIR TMPDIR".split()}
        (root / "home").mkdir(exist_ok=True)
        path = os.pathsep.join(map(str, (ROOT, TESTS, ROOT / "scripts")))
        environment = os.environ | home | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(root / "home")}
        command = [sys.executable, "-c", f"from fuzz import run; run.work(run.Path({str(root)!r}))"]
        self.root, self.seconds, self.growth = root, seconds, growth
        self.process = subprocess.Popen(
            command, env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.held = b""
        self._follow({})

    def attempt(self, kind: str, number: int) -> dict[str, Any]:
        record: dict[str, Any] = {"input": f"{kind}:{number}"}
        self.process.stdin.write(f"{kind} {number}\n".encode())
        self._follow(record)
        record["folder"] = self.root / f"worker-{self.process.pid}" / f"{kind}-{number}"
        if "broken" in record:
            raise RuntimeError(f"{record['input']}: the suite itself failed\n{record['broken']}")
        return record

    def _follow(self, record: dict[str, Any]) -> None:
        """Collect what the worker says until it is done, or end it."""
        started, used, memory = time.monotonic(), self._used(), self._memory()
        while True:
            prepared = "about" in record  # before that the worker imports, and makes the input
            seconds, growth = (self.seconds, self.growth) if prepared else (30 * SECONDS, 2 * GROWTH)
            if select.select([self.process.stdout], [], [], 0.05)[0]:
                data = os.read(self.process.stdout.fileno(), 1 << 20)
                if not data:
                    code = self.process.wait()
                    self._ended(record, "crash", f"exit code {code}")
                    return
                *lines, self.held = (self.held + data).split(b"\n")
                for said in map(json.loads, lines):
                    if not said:
                        return
                    record |= said
                    started, used, memory = time.monotonic(), self._used(), self._memory()
                continue
            if self._used() - used > seconds or time.monotonic() - started > 3 * seconds:
                self.process.send_signal(signal.SIGUSR1)  # to see where it is
                time.sleep(0.2)
                self._ended(record, "hang", f"{time.monotonic() - started:.0f} s")
                return
            if self._memory() - memory > growth:
                self._ended(record, "memory", f"{(self._memory() - memory) >> 20} MiB more")
                return

    def _ended(self, record: dict[str, Any], outcome: str, detail: str) -> None:
        self.close()
        stack = (self.root / f"crash-{self.process.pid}").read_text()
        record.setdefault("outcome", outcome)  # a worker that ends while it is asking transformers has one
        record.setdefault("detail", f"{detail}\n{stack[-3000:]}")
        if not record.get("about"):
            record["about"] = ""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()

    def _used(self) -> float:
        """Seconds of processor time."""
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def _memory(self) -> int:
        with suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0


def attempts(
    wanted: list[tuple[str, int]], root: Path, seconds: float = SECONDS, growth: int = GROWTH, keep: bool = False
) -> Iterator[dict[str, Any]]:
    """What becomes of each input: {"input", "about", "outcome", "detail", "argv", "folder"}."""
    worker = Worker(root, seconds, growth)
    try:
        for kind, number in wanted:
            if not worker.alive:
                worker = Worker(root, seconds, growth)
            record = worker.attempt(kind, number)
            yield record
            if not keep:
                shutil.rmtree(record["folder"], ignore_errors=True)
    finally:
        worker.close()


def chosen(kinds: list[str], share: float) -> list[tuple[str, int]]:
    """An even choice of the inputs of each kind."""
    wanted = []
    for kind in kinds:
        count = max(1, round(share * COUNTS[kind]))
        wanted += [(kind, n * COUNTS[kind] // count) for n in range(count)]
    return wanted


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of outcomes by kind, and the faults."""
    counts: dict[str, Counter] = {}
    for record in records:
        counts.setdefault(record["input"].partition(":")[0], Counter())[record["outcome"]] += 1
    faults = [record for record in records if record["outcome"] not in GOOD]
    brief = [{k: str(r[k])[-400:] for k in ("input", "about", "outcome", "detail")} for r in faults]
    outcomes = {kind: {name: count[name] for name in (*GOOD, *FAULTS)} for kind, count in counts.items()}
    return {"inputs": len(records), "counts": outcomes, "faults": brief}


def table(counts: dict[str, dict[str, int]]) -> str:
    rows = {**counts, "all": {name: sum(each[name] for each in counts.values()) for name in (*GOOD, *FAULTS)}}
    lines = [f"{'':10}" + "".join(f"{name:>17}" for name in rows)]
    return "\n".join(
        lines
        + [f"{name:16}" + "".join(f"{row[name]:>9}" + 8 * " " for row in rows.values()) for name in (*GOOD, *FAULTS)]
    )


def say(text: str) -> None:
    """Print what may hold anything."""
    print(text.encode("ascii", "backslashreplace").decode(), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(COUNTS), help="of which inputs (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs, evenly chosen (default: all)")
    parser.add_argument("--only", action="append", metavar="KIND:NUMBER", help="this input, with all that it says")
    parser.add_argument("--out", type=Path, metavar="F.json", help="write the counts there")
    args = parser.parse_args(argv)
    wanted = [(kind, int(number)) for kind, _, number in (each.partition(":") for each in args.only or [])]
    wanted = wanted or chosen(args.kinds.split(","), args.share)
    started, records = time.monotonic(), []
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for record in attempts(wanted, root, keep=bool(args.only)):
            records.append(record)
            if args.only or record["outcome"] not in GOOD:
                detail = record["detail"] if args.only else record["detail"][-300:]
                say(f"{record['input']}  {record['outcome']}  {record['about']}\n    {detail}")
            if args.only:
                say(f"cd {record['folder']}; {shlex.join(['python', *record.get('argv', [])])[:1000]}")
    finally:
        if not args.only:
            shutil.rmtree(root, ignore_errors=True)
    result = summary(records)
    print(table(result["counts"]))
    if args.out:
        from benchmark.record import origin

        limits = {"seconds": SECONDS, "bytes": GROWTH}
        result = {**origin(), "took_s": round(time.monotonic() - started), "limits": limits, **result}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["faults"]))


if __name__ == "__main__":
    sys.exit(main())
