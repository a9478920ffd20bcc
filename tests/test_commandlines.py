"""All command lines alike: one short line for what a user can put right, a traceback for what is a fault of ours, and
no path of a run that another one of it overwrites.
"""

import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import bench_batch
import bench_chat
import pytest
import train_tiny

import batch
import bench
import commandline
import evaluate
import files
import generate
from errors import UserError

PROGRAMS = {m.__name__: m for m in (generate, evaluate, bench, bench_batch, bench_chat, train_tiny)}
TEXT = "It was a dark and stormy night. " * 40


class Reached(Exception):
    """A model would be loaded now."""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unloaded(monkeypatch):
    """Ends every run where it would load a model."""

    def reached(*args, **options):
        raise Reached

    monkeypatch.setattr(generate.checkpoint, "load", reached)
    monkeypatch.setattr(bench, "make", reached)
    monkeypatch.setattr(train_tiny, "new_model", reached)
    monkeypatch.setattr(bench_batch, "draw", reached)


def refusal(capsys, program: str, *args: str | Path) -> str | None:
    """The one short line that the run ends with; None: it comes to load a model."""
    try:
        code = PROGRAMS[program].main([str(arg) for arg in args])
    except Reached:
        return None
    out, err = capsys.readouterr()
    line = err.removesuffix("\n")
    assert code == 2 and out == "" and line.startswith(f"{program}.py: error: "), (code, out, err)
    assert line.isprintable() and len(line) < 700, line
    return line


def flags(program: str, monkeypatch) -> list[str]:
    """Every flag that takes a value."""
    found = []

    def parse_args(self, argv):
        found.extend(action.option_strings[0] for action in self._actions if action.nargs != 0)
        raise Reached

    with monkeypatch.context() as patch, pytest.raises(Reached):
        patch.setattr(commandline.Parser, "parse_args", parse_args)
        PROGRAMS[program].parse([])
    return found


NASTY = {
    "long": "x" * 10_000,
    "digits": "9" * 10_000,
    "list": "1," * 5_000,
    "path": "/a/b" * 2_500,
    "blanks": "a b " * 2_500,
    "screen": "\x1b[2J",
    "lines": "a\nb\rc\r\n",
    "byte": "\udcff",
    "surrogate": "\ud800",
    "nul": "a\0b",
    "empty": "",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_whatever_a_flag_says_is_answered_in_one_short_line(capsys, monkeypatch, unloaded, program):
    given, refused = flags(program, monkeypatch), 0
    for flag in given:
        for value in NASTY.values():
            refused += refusal(capsys, program, flag, value) is not None if flag != "--checkpoint" else 0
    assert len(given) >= 4 and refused > 3 * len(given)
    for value in NASTY.values():
        for args in ([value], [f"--{value}"], [value] * 50):
            refusal(capsys, program, *args)


def ours() -> Exception:
    try:
        list(zip([1], [], strict=True))
    except ValueError as error:
        return error


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "fault", [ours(), OSError(5, "no"), RuntimeError("no"), KeyError(1)], ids=lambda e: type(e).__name__
)
def test_faults_of_ours_keep_their_traceback(monkeypatch, program, fault):
    def fails(*args):
        raise fault

    for name in ("parse", "run", "evaluate"):
        if hasattr(PROGRAMS[program], name):
            with monkeypatch.context() as patch, pytest.raises(type(fault)):
                patch.setattr(PROGRAMS[program], name, fails)
                PROGRAMS[program].main([])


def test_faults_of_ours_inside_of_a_run_keep_their_traceback(monkeypatch, tmp_path):
    def fails(*args, **options):
        raise ours()

    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    for args in (["--prompt", "a"], ["--input", "in", "--output", "out"], ["--interactive", "--prompt", "a"]):
        for name in ("_prefill", "_refill", "_padded"):
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="shorter than"):
                patch.setattr(generate.Engine, name, fails)
                generate.main(args)


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in refusal(capsys, "evaluate", "--out", "out")
    assert "matplotlib is not installed" in refusal(capsys, "bench", "--plot", "a.png")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm_eval" in refusal(capsys, "evaluate", "--lm-eval", "arc_easy")


def test_a_missing_compiler_is_named(capsys, monkeypatch):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def fails(*args):
        raise InductorError(InvalidCxxCompiler("c++"), None) from InvalidCxxCompiler("c++")

    monkeypatch.setattr(generate.Engine, "_refill", fails)
    assert "--no-compile does without" in refusal(capsys, "generate", "--prompt", "a")


# ---- paths


def write(path: str | Path, text: str = TEXT) -> str:
    Path(path).write_text(text)
    return str(path)


def contents() -> dict[str, str]:
    return {str(path): path.read_text() for path in Path().rglob("*") if path.is_file()}


def checkpoint_folder() -> str:
    Path("model").mkdir()
    for file in generate.EMBEDDED.iterdir():
        os.symlink(file, f"model/{file.name}")
    return "model"


JOB = ["--input", "in", "--output", "out"]
OUTPUTS = ("predictions.jsonl", "summary.json", "table.md", "leaderboard.md")  # of evaluate.py, with its pictures
SAME = {  # one path twice, each as the second argument of its flag; {} is another spelling of it
    "generate": [
        ["--prompt-file", "in", "--save-plan", "{in}"],
        ["--plan", "plan", "--policy", "window", "--save-plan", "{plan}"],
        [*JOB, "--save-plan", "{in}"],
        [*JOB, "--save-plan", "{out}"],
        [*JOB, "--save-plan", "{out.job.json}"],
        [*JOB, "--plan", "plan", "--policy", "window", "--save-plan", "{plan}"],
        ["--input", "in", "--output", "{in}"],
        ["--input", "x.job.json", "--output", "{x}"],
        [*JOB[:2], "--plan", "plan", "--policy", "window", "--output", "{plan}"],
        ["--checkpoint", "model", "--save-plan", "{model/config.json}"],
        ["--checkpoint", "model", *JOB[:2], "--output", "{model/tokenizer.json}"],
        ["--checkpoint", "model", *JOB[:2], "--output", "{new}", "--save-plan", "{new}"],
    ],
    "evaluate": [
        *(["--text", f"o/{name}", "--out", "{o}"] for name in OUTPUTS),
        *(["--text", f"o/{name}.png", "--out", "{o}"] for name in evaluate.PICTURES),
        ["--files", "o/predictions.jsonl", "--out", "{o}"],
        ["--files", "o", "--out", "{o}"],
        ["--checkpoint", "o", "--out", "{o}"],
    ],
    "bench": [
        ["--stage", "throughput", "--out", "a.png", "--plot", "{a.png}"],
        ["--stage", "decode", "--out", "a.txt", "--profile", "{a.txt}"],
        ["--stage", "decode", "--shape", "config.json", "--out", "{config.json}"],
        ["--stage", "decode", "--shape", "config.json:fp32", "--profile", "{config.json}"],
        ["--stage", "decode", "--out", str(generate.EMBEDDED / "config.json")],
    ],
    "bench_batch": [["--out", str(bench_batch.PROMPTS)], ["--out", str(generate.EMBEDDED / "config.json")]],
    "bench_chat": [["--out", "a.png", "--plot", "{a.png}"]],
    "train_tiny": [["--run", "o", "--out", "{o}"]],
}


@pytest.mark.parametrize("program", SAME)
def test_no_path_that_a_run_writes_is_another_path_of_it(capsys, unloaded, program):
    Path("o").mkdir()
    config = (generate.EMBEDDED / "config.json").read_text()
    write("in", '{"prompt": "a"}\n'), write("x.job.json", '{"prompt": "a"}\n'), write("plan", json.dumps([64] * 8))
    write("config.json", config), checkpoint_folder()
    for name in (*OUTPUTS[1:], *(f"{name}.png" for name in evaluate.PICTURES)):
        write(f"o/{name}")
    if program == "evaluate":
        write("o/config.json", config), os.symlink(generate.EMBEDDED / "tokenizer.json", "o/tokenizer.json")
    os.symlink(".", "here")
    Path("sub").mkdir()
    before = contents()
    for args in SAME[program]:
        if "predictions" in str(args) or "--files" in args:
            write("o/predictions.jsonl", "")
            before = contents()
        for form in ("{}", "./{}", "here/{}", "sub/../{}", f"{os.getcwd()}/{{}}"):
            spelled = [form.format(arg[1:-1]) if arg.startswith("{") else arg for arg in args]
            line = refusal(capsys, program, *spelled)
            assert line and "a place of its own" in line, (spelled, line)
            assert contents() == before


OUTPUTS = {
    "generate": (["--prompt", "a", "--save-plan"], [*JOB[:2], "--output"], [*JOB, "--save-plan"]),
    "bench": (["--out"], ["--stage", "throughput", "--plot"], ["--stage", "decode", "--profile"]),
    "bench_batch": (["--draw", "--out"],),
    "bench_chat": (["--out"],),
    "evaluate": (["--out"],),
}


@pytest.mark.parametrize("program", OUTPUTS)
def test_outputs_that_cannot_be_are_refused_at_once(capsys, unloaded, program):
    write("in", '{"prompt": "a"}\n')
    os.mkfifo("pipe")
    Path("folder").mkdir()
    places = ["pipe", "/dev/full", "/dev/null", "in/a", "/proc/a", "/proc/b/c", "n" * 300, "/dev/stdout"]
    places += ["folder", "no/a", "m" * 250] if program != "evaluate" else []
    for args in OUTPUTS[program]:
        for place in places:
            if place == "m" * 250 and "--output" not in args:  # here only the name of the job's state is too long
                continue
            assert refusal(capsys, program, *args, place) is not None, (args, place)
    assert contents() == {"in": '{"prompt": "a"}\n'}


INPUTS = {
    "generate": (["--prompt-file"], ["--policy", "window", "--plan"], ["--output", "out", "--input"]),
    "evaluate": (["--out", "o", "--text"], ["--out", "o", "--files"]),
    "bench": (["--shape"],),
}


@pytest.mark.parametrize("program", INPUTS)
def test_inputs_that_never_end_are_refused(capsys, monkeypatch, unloaded, program):
    monkeypatch.setattr(evaluate.checkpoint, "load", lambda *_: (None, evaluate.checkpoint.ModelConfig))
    for args in INPUTS[program]:
        for place in ("/dev/zero", "/dev/urandom", "/dev/full"):
            assert refusal(capsys, program, *args, place) is not None, args


class Endless(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        buffer[:] = b"y" * len(buffer)
        return len(buffer)


def test_standard_input_that_never_ends_is_refused(capsys, monkeypatch):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for args in (["--prompt", "-"], ["--interactive"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
        assert "more than 16 MiB" in refusal(capsys, "generate", *args)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


# ---- standard streams


def forked(call: Callable[[], int], prepare: Callable[[], None]) -> tuple[int, str]:
    """The exit code of `call` in a process of its own, after `prepare`, and the traceback if there is one."""
    report = Path("report")
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), report.read_text() if report.exists() else ""
    code = 1
    try:
        prepare()
        code = call()
        sys.stdout.flush()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            report.write_text(traceback.format_exc())
        code = error.code if isinstance(error, SystemExit) else 1
    finally:
        os._exit(code)


def closed(*numbers: int) -> Callable[[], None]:
    """As Python finds its streams when the shell has closed some."""

    def prepare() -> None:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if number in numbers:
                os.close(number)
                setattr(sys, name, None)
            else:
                os.dup2(os.open("/dev/null" if number == 0 else name, os.O_RDWR | os.O_CREAT), number)
                setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115

    return prepare


RUNS = {
    "generate": ["--prompt", "a", "--max-new-tokens", "2", "--save-plan", "plan"],
    "evaluate": "--text text --tasks fidelity --length 20 --read 2 --texts 1 --policies window --layers uniform "
    "--budgets 8 --out o".split(),
    "bench": "--stage prefill --device cpu --shape tiny --prompt 9 --new 1 --rounds 1 --out b.json".split(),
}


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "program", ["generate", *(pytest.param(name, marks=pytest.mark.slow) for name in list(RUNS)[1:])]
)
def test_closed_streams_are_no_traceback(program, numbers):
    write("text")
    for args, wanted in ((RUNS[program], 0), (["--nonsense"], 2), (["--help"], 0)):
        assert forked(lambda args=args: PROGRAMS[program].main(args), closed(*numbers)) == (wanted, "")
    if program == "generate":
        assert len(json.loads(Path("plan").read_text())["plan"]) == 8
        assert forked(lambda: generate.main(["--prompt", "-"]), closed(*numbers)) == (2, "")


def test_a_closed_number_is_not_taken_by_a_file():
    """What a library writes to descriptor 1 or 2 must not land in the next file that is opened."""

    def run() -> int:
        def call() -> int:
            with open("precious", "w") as file:
                os.write(1, b"noise"), os.write(2, b"noise")
                return int(file.fileno() < 3)

        return commandline.guarded("x", call)

    assert forked(run, closed(0, 1, 2)) == (0, "") and Path("precious").read_text() == ""


def to(path: str, number: int) -> Callable[[], None]:
    def prepare() -> None:
        closed()()
        os.dup2(os.open(path, os.O_WRONLY), number)

    return prepare


def test_a_full_standard_output_is_one_line(tmp_path):
    for args in (RUNS["generate"], ["--help"], [*RUNS["generate"], "--json"], ["--interactive", "--prompt", "a"]):
        Path("stderr").unlink(missing_ok=True)
        assert forked(lambda args=args: generate.main(args), to("/dev/full", 1)) == (2, "")
        assert Path("stderr").read_text() == "generate.py: error: standard output: No space left on device\n"
    assert forked(lambda: generate.main(["--nonsense"]), to("/dev/full", 2)) == (2, "")


def test_a_closed_pipe_ends_quietly():
    def prepare() -> None:
        closed()()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)

    for args in (RUNS["generate"], ["--help"]):
        assert forked(lambda args=args: generate.main(args), prepare) == (141, "")
        assert Path("stderr").read_text() == ""


# ---- a disk that is full


def test_a_full_disk_leaves_whole_lines_to_go_on_with(tmp_path):
    write(
        "in", "".join(json.dumps({"id": n, "prompt_ids": [5, 6, n], "max_new_tokens": 9}) + "\n" for n in range(1, 9))
    )
    args = ["--input", "in", "--batch-size", "2", "--policy", "h2o", "--budget", "6", "--output"]
    assert forked(lambda: generate.main([*args, "whole"]), closed()) == (0, "")
    whole = Path("whole").read_bytes().splitlines(keepends=True)

    def prepare() -> None:
        closed()()
        most = len(b"".join(whole[:3])) + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    assert forked(lambda: generate.main([*args, "out"]), prepare) == (2, "")
    told = Path("stderr").read_text()
    assert told == "generate.py: error: out: File too large; out is whole, --resume goes on with it\n"
    assert Path("out").read_bytes() == b"".join(whole[:3])
    assert forked(lambda: generate.main([*args, "out", "--resume"]), closed()) == (0, "")
    assert sorted(Path("out").read_bytes().splitlines(keepends=True)) == sorted(whole)


# ---- shapes


ODD = [None, True, -1, 1.5, 10**30, "x", [], {}, [None], [-1], [10**30], [[1]], {"a": 1}, ["x"]]
MODEL = {"asked": {}, "input": "0", "seed": 1, "max_length": 9, "plan": [8], "groups": None, "importance": [0.5]}


def job(resume: bool = True) -> batch.Job:
    return batch.Job(Path("in"), Path("out"), {}, generate.Request(()), list, lambda: None, resume)


def test_every_field_of_a_job_s_state_is_checked():
    state = MODEL | {"batch_size": 2}
    write("in", '{"prompt_ids": [1]}\n')
    write("out.job.json", json.dumps(state))
    assert job().state == state
    refused = 0
    for name in state:
        for value in (value for value in ODD if not files.is_a(value, batch.STATE[name])):
            write("out.job.json", json.dumps(state | {name: value}))
            for resume in (True, False):
                with pytest.raises(
                    UserError, match=rf"^out.job.json is no state of a job .*: '{name}' must be"
                ) as caught:
                    job(resume)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
            refused += 1
        write("out.job.json", json.dumps({key: value for key, value in state.items() if key != name}))
        with pytest.raises(UserError, match=f"'{name}' is missing"):
            job()
    assert refused > 9 * len(state)
    for text in ("", "[]", "{", "null", '{"plan": ' + "[" * 9999, json.dumps(state | {"groups": [1, 2]})):
        write("out.job.json", text)
        with pytest.raises(UserError, match="^out.job.json"):
            job()


PLANS = [*ODD, [64, 0], [64.0], {"plan": None}, {"plan": [True]}, {"plan": [10**30]}, {"plan": {}}]


def test_every_plan_is_checked(capsys, unloaded):
    for plan in PLANS:
        write("p.json", json.dumps(plan))
        assert "p.json" in refusal(capsys, "generate", "--policy", "window", "--plan", "p.json")
    for text in ("", "[1, 2", "[NaN]", "[" * 9999):
        write("p.json", text)
        assert "p.json" in refusal(capsys, "generate", "--policy", "window", "--plan", "p.json")


def test_every_earlier_benchmark_is_checked(capsys, unloaded):
    origin = {"device": "x", "date": "x", "torch": "x", "transformers": "x", "command": "x"}
    row = {
        "what": "x",
        "batch": 1,
        "shape": "x",
        "dtype": "x",
        "prompt_tokens": 1,
        "new_tokens": 1,
        "tokens_per_s": 1.0,
    }
    good = {"stages": {"throughput": origin | {"rows": [row]}}}

    def told(value) -> str | None:
        text = write("b.json", value if isinstance(value, str) else json.dumps(value))
        line = refusal(capsys, "bench", "--stage", "throughput", "--device", "cpu", "--out", text)
        assert line is None or "--out b.json" in line and "name another" in line
        return line

    assert told(good) is None
    for value in ("", "[]", "{", "{}", {"stages": []}, {"stages": {"x": 1}}, {"stages": {"x": {}}}, "hello"):
        assert told(value)
    for name in row:
        for odd in (None, True, [], {}):
            assert told({"stages": {"throughput": origin | {"rows": [row | {name: odd}]}}}), (name, odd)
    assert "row 2" in told({"stages": {"throughput": origin | {"rows": [row, row | {"shape": 1}]}}})


def test_one_writer_and_whole_lines(tmp_path):
    path = tmp_path / "log"
    file = files.exclusive(path)
    files.append(file, b"one\n", path)
    with pytest.raises(UserError, match="log is being written by another run"):
        files.exclusive(path)
    file.close()
    file = files.exclusive(path)

    class Full:
        fileno, truncate, times = file.fileno, file.truncate, 0

        def write(self, data) -> int:
            self.times += 1
            if self.times > 1:
                raise OSError(28, "No space left on device")
            return file.write(data[:2])

    with pytest.raises(UserError, match="log: No space left on device"):
        files.append(Full(), b"two\n", path)
    assert path.read_bytes() == b"one\n"


def test_lines_are_read_without_holding_long_ones(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"a\n" + b"b" * 1000 + b"\nc\n\n" + b"d" * 99)
    lines = files.Lines(path, 99)
    read = [(line.number, line.data, line.size) for line in lines]
    assert read == [(1, b"a\n", 2), (2, None, 1001), (3, b"c\n", 2), (4, b"\n", 1), (5, b"d" * 99, 99)]
    assert lines.sha256.digest() == files.sha256(path.read_bytes()).digest()
    assert len({line.digest for line in files.Lines(path, 99)}) == 5
