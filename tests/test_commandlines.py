"""All command lines alike: one short line for what a user can put right, a traceback for what is a fault of ours, and
no path of a run that another one of it overwrites.
"""

import io
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from conftest import quick

import batch
import bench
import commandline
import engine
import evaluate
import files
import generate
from benchmark import record
from errors import UserError

COMMANDS = {m.__name__: m for m in (generate, evaluate, bench)}
PROGRAMS = dict(COMMANDS)
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

    monkeypatch.setattr(evaluate.checkpoint, "load", reached)
    monkeypatch.setattr(bench.roofline, "copy_rate", reached)


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


@pytest.mark.parametrize("program", COMMANDS)
def test_whatever_a_flag_says_is_answered_in_one_short_line(capsys, monkeypatch, unloaded, program):
    given, refused = flags(program, monkeypatch), 0
    for flag in given:
        for value in NASTY.values():
            refused += refusal(capsys, program, flag, value) is not None
    assert len(given) >= 4 and refused > 3 * len(given)
    for value in NASTY.values():
        for args in ([value], [f"--{value}"], [value] * 50):
            refusal(capsys, program, *args)


def ours() -> Exception:
    try:
        list(zip([1], [], strict=True))
    except ValueError as error:
        return error


@pytest.mark.parametrize("program", COMMANDS)
@pytest.mark.parametrize(
    "fault", [ours(), OSError(5, "no"), RuntimeError("no"), KeyError(1)], ids=lambda e: type(e).__name__
)
def test_faults_of_ours_keep_their_traceback(monkeypatch, program, fault):
    def fails(*args):
        raise fault

    for name in ("parse", "evaluate" if program == "evaluate" else "run"):
        with monkeypatch.context() as patch, pytest.raises(type(fault)):
            patch.setattr(PROGRAMS[program], name, fails)
            PROGRAMS[program].main([])


def test_faults_of_ours_inside_of_a_run_keep_their_traceback(monkeypatch, tmp_path):
    def fails(*args, **options):
        raise ours()

    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    monkeypatch.setattr(engine.Batch, "step", fails)
    for args in (
        ["--prompt", "a"],
        ["--input", "in", "--output", "out", "--squeeze"],
        ["--interactive", "--prompt", "a"],
    ):
        with pytest.raises(ValueError, match="shorter than"):
            generate.main(args)


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in refusal(capsys, "evaluate", "--out", "out")
    assert "matplotlib is not installed" in refusal(capsys, "bench", "--plot", "a.png")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm_eval" in refusal(capsys, "evaluate", "--lm-eval", "arc_easy")


def test_a_missing_compiler_is_named(capsys, monkeypatch):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    missing = InvalidCxxCompiler.__new__(InvalidCxxCompiler)  # its arguments are not alike in all versions of PyTorch

    def fails(*args):
        raise InductorError(missing, None) from missing

    monkeypatch.setattr(engine.Batch, "step", fails)
    assert "--no-compile does without" in refusal(capsys, "generate", "--prompt", "a")


@pytest.mark.parametrize("program", ["generate", "evaluate", "bench", "checkpoint"])
def test_an_interrupt_during_the_imports_is_one_line(program):
    Path("torch.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, str(Path(commandline.__file__).parent / f"{program}.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{program}.py: interrupted\n")


# ---- threads


@pytest.mark.parametrize("program", COMMANDS)
def test_threads_are_as_many_as_are_asked_for(capsys, monkeypatch, unloaded, program):
    monkeypatch.setattr(commandline.threads, "affinity", lambda: {0, 1, 2})
    monkeypatch.setattr(generate, "Asked", unloadable)
    try:
        for count in (3, 1):
            assert refusal(capsys, program, "--threads", count) is None and torch.get_num_threads() == count
        for count in (4, 0, -1, "x", "", "1.5", 10**18):
            line = refusal(capsys, program, "--threads", count)
            assert line is not None and str(count) in line and torch.get_num_threads() == 1
        assert "4 is more than the 3 processors" in refusal(capsys, program, "--threads=4")
    finally:
        torch.set_num_threads(1)


def unloadable(*args) -> NoReturn:
    raise Reached


def test_a_report_says_what_a_busy_machine_decided(capsys, monkeypatch):
    monkeypatch.setattr(generate, "THREADS", ("others used 1.9 of 2 processors",))
    command = ["--prompt", "a", "--max-new-tokens", "1"]
    assert generate.main(command) == 0
    assert "threads  1: others used 1.9 of 2 processors (--threads sets it)\n" in capsys.readouterr().out
    assert generate.main([*command, "--threads", "1"]) == 0 and "threads" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert generate.main(["--interactive"]) == 0 and "threads  1: others" in capsys.readouterr().err
    monkeypatch.setattr(record, "THREADS", ("why",))
    assert record.origin()["limited"] == "why"
    monkeypatch.setattr(record, "THREADS", ())
    assert "limited" not in record.origin()


# ---- paths


def write(path: str | Path, text: str = TEXT) -> str:
    Path(path).write_text(text)
    return str(path)


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def checkpoint_folder() -> str:
    Path("model").mkdir()
    for file in generate.EMBEDDED.iterdir():
        os.symlink(file, f"model/{file.name}")
    return "model"


JOB = ["--input", "in", "--output", "out"]
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
        *(["--text", f"o/{name}", "--out", "{o}"] for name in evaluate.OUTPUTS),
        ["--files", "o/predictions.jsonl", "--out", "{o}"],
        ["--files", "o", "--out", "{o}"],
    ],
    "bench": [
        ["--stage", "throughput", "--out", "a.png", "--plot", "{a.png}"],
        ["--stage", "decode", "--shape", "config.json", "--out", "{config.json}"],
        ["--stage", "throughput", "--shape", "config.json", "--plot", "{config.json}"],
        ["--stage", "decode", "--out", str(generate.EMBEDDED / "config.json")],
    ],
}


@pytest.mark.parametrize("program", SAME)
def test_no_path_that_a_run_writes_is_another_path_of_it(capsys, unloaded, program):
    Path("o").mkdir()
    config = (generate.EMBEDDED / "config.json").read_text()
    write("in", '{"prompt": "a"}\n'), write("x.job.json", '{"prompt": "a"}\n'), write("plan", json.dumps([64] * 8))
    write("config.json", config), checkpoint_folder()
    for name in evaluate.OUTPUTS[1:]:
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
    "bench": (["--out"], ["--stage", "throughput", "--plot"]),
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
            if place == "m" * 250 and args[-1] != "--output":  # there only the name of the job's state is too long
                continue
            assert refusal(capsys, program, *args, place) is not None, (args, place)
    assert contents() == {"in": b'{"prompt": "a"}\n'}


INPUTS = {
    "generate": (["--prompt-file"], ["--policy", "window", "--plan"], ["--output", "out", "--input"]),
    "evaluate": (["--out", "o", "--text"], ["--out", "o", "--files"]),
    "bench": (["--shape"],),
}


@pytest.mark.parametrize("program", INPUTS)
def test_inputs_that_never_end_are_refused(capsys, monkeypatch, unloaded, program):
    monkeypatch.setattr(evaluate.checkpoint, "load", lambda *_: (None, SimpleNamespace(reach=2048)))
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


class Server:
    """Runs command lines, each in a fork of a process that has imported them and started no thread."""

    def __init__(self):
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def __call__(self, program: str, args: list[str], **how: Any) -> tuple[int, str]:
        """The exit code, and the traceback if there is one. how: see `child`."""
        print(json.dumps([os.getcwd(), program, args, how]), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def forked():
    server = Server()
    yield server
    server.process.communicate()


def serve() -> None:
    for line in sys.stdin:
        cwd, program, args, how = json.loads(line)
        os.chdir(cwd)
        if (pid := os.fork()) == 0:
            child(program, args, **how)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, Path("report").read_text() if Path("report").exists() else ""]), flush=True)


def child(
    program: str, args: list[str], output: str = "stdout", closed: Sequence[int] = (), most: int | None = None
) -> NoReturn:
    """As Python finds its streams when the shell has redirected them, or closed some.

    output: a file for standard output, or `pipe` for one whose reader has gone. most: bytes that a file may have.
    """
    reading, writing = os.pipe()
    os.close(reading)
    error = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    out = writing if output == "pipe" else os.open(output, os.O_WRONLY | os.O_CREAT)
    for number, to in enumerate((os.open("/dev/null", os.O_RDONLY), out, error)):
        os.dup2(to, number)
    os.closerange(3, 100)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in closed:
            os.close(number)
            setattr(sys, name, None)
        else:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    code = 1
    try:
        code = PROGRAMS[program].main(args)
    except SystemExit as error:
        code = error.code
    except BaseException:
        Path("report").write_text(traceback.format_exc())
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


RUNS = {
    "generate": ["--prompt", "a", "--max-new-tokens", "2", "--save-plan", "plan"],
    "evaluate": "--text text --tasks fidelity --length 20 --read 2 --texts 1 --policies window --layers uniform "
    "--budgets 8 --out o".split(),
    "bench": "--stage prefill --device cpu --shape tiny --prompt 9 --new 1 --rounds 1 --out b.json".split(),
}


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("program", quick("generate", of=RUNS))
def test_closed_streams_are_no_traceback(forked, program, closed):
    write("text")
    for args, wanted in ((RUNS[program], 0), (["--nonsense"], 2), (["--help"], 0)):
        assert forked(program, args, closed=closed) == (wanted, "")
    if program == "generate":
        assert len(json.loads(Path("plan").read_text())["plan"]) == 8
        assert forked(program, ["--prompt", "-"], closed=closed) == (2, "")


def noise(args: list[str]) -> int:
    """What a library writes to descriptors 1 and 2 while an output is open."""

    def call() -> int:
        with open("precious", "w"):
            os.write(1, b"noise")
            os.write(2, b"noise")
        return 0

    return commandline.guarded("noise", call)


PROGRAMS["noise"] = SimpleNamespace(main=noise)


def test_a_closed_number_is_not_taken_by_a_file(forked):
    assert forked("noise", [], closed=(0, 1, 2)) == (0, "") and Path("precious").read_text() == ""


def test_a_full_standard_output_is_one_line(forked):
    for args in (RUNS["generate"], ["--help"], [*RUNS["generate"], "--json"], ["--interactive", "--prompt", "a"]):
        assert forked("generate", args, output="/dev/full") == (2, "")
        assert Path("stderr").read_text() == "generate.py: error: standard output: No space left on device\n"


def test_a_closed_pipe_ends_quietly(forked):
    for args in (RUNS["generate"], ["--help"]):
        assert forked("generate", args, output="pipe") == (141, "")
        assert Path("stderr").read_text() == ""


# ---- a disk that is full


def test_a_full_disk_leaves_whole_lines_to_go_on_with(forked):
    lines = [{"id": n, "prompt_ids": [5, 6, n], "max_new_tokens": 80} for n in range(1, 9)]
    write("in", "".join(json.dumps(line) + "\n" for line in lines))
    args = ["--input", "in", "--batch-size", "2", "--policy", "h2o", "--budget", "6", "--output"]
    assert forked("generate", [*args, "whole"]) == (0, "")
    whole = Path("whole").read_bytes().splitlines(keepends=True)
    kept = b"".join(whole[:5])
    assert forked("generate", [*args, "out"], most=len(kept) + 20) == (2, "")
    told = "generate.py: error: out: File too large; --resume goes on with what out holds\n"
    assert Path("stderr").read_text() == told and Path("out").read_bytes() == kept
    assert forked("generate", [*args, "out", "--resume"]) == (0, "")
    assert sorted(Path("out").read_bytes().splitlines(keepends=True)) == sorted(whole)


# ---- shapes


ODD = [None, True, -1, 1.5, 10**30, "x", [], {}, [None], [-1], [10**30], [[1]], {"a": 1}, ["x"]]
MODEL = {"asked": {}, "input": "0", "seed": 1, "max_length": 9, "plan": [8], "groups": None, "importance": [0.5]}


def job(resume: bool = True) -> batch.Job:
    return batch.Job(Path("in"), Path("out"), None, {}, generate.Request(()), list, lambda: None, resume)


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
    stage = origin | {"rows": [{"what": "x"}]}

    def told(value) -> str | None:
        text = write("b.json", value if isinstance(value, str) else json.dumps(value))
        line = refusal(capsys, "bench", "--stage", "throughput", "--device", "cpu", "--out", text)
        assert line is None or "--out b.json" in line and "name another" in line
        return line

    assert told({"stages": {"throughput": stage}}) is None
    for value in ("", "[]", "{", "{}", {"stages": []}, {"stages": {"x": 1}}, {"stages": {"x": {}}}, "hello"):
        assert told(value)
    for name in stage:
        for odd in (None, True, {}, [1], [{}], [{"what": 1}]):
            assert told({"stages": {"decode": stage, "throughput": stage | {name: odd}}}), (name, odd)


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
    path.rename(tmp_path / "moved")
    files.append(file, b"two\n", path)
    assert (tmp_path / "moved").read_bytes() == b"one\ntwo\n"
    (tmp_path / "moved").unlink()
    with pytest.raises(UserError, match="log was removed"):
        files.append(file, b"three\n", path)


def test_lines_are_read_without_holding_long_ones(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"a\n" + b"b" * 1000 + b"\nc\n\n" + b"d" * 99)
    lines = files.Lines(path, 99)
    read = [(line.number, line.data, line.size) for line in lines]
    assert read == [(1, b"a\n", 2), (2, None, 1001), (3, b"c\n", 2), (4, b"\n", 1), (5, b"d" * 99, 99)]
    assert lines.sha256.digest() == files.sha256(path.read_bytes()).digest()
    assert len({line.digest for line in files.Lines(path, 99)}) == 5


if __name__ == "__main__":
    serve()
