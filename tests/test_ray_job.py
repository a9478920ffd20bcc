"""A job in parts: what is split, kept, resumed and merged; with Ray (slow), who dies on the way."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray_job
from conftest import ROOT, random_ids

import generate
from batch import Survey
from errors import UserError
from files import Lines

HOW = "--policy h2o --layers squeeze --budget 0.4 --batch-size 3 --max-new-tokens 5 --dtype fp32 --threads 1".split()


def write(path: Path, count: int, new: int = 4) -> Path:
    """Lines with and without ids, some that are drawn, blank or bad."""
    with open(path, "w") as file:
        for n in range(count):
            line = {"prompt_ids": random_ids(5 + 7 * n % 40, n, 2000), "max_new_tokens": new + n % 5}
            line |= {"id": f"n{n}"} if n % 3 else {}
            line |= {"temperature": 0.8} if n % 4 == 1 else {}
            file.write(json.dumps(line) + "\n" + "\n" * (n % 5 == 2) + '{"prompt": 5}\n' * (n % 7 == 3))
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(path: Path) -> dict:
    found = {line["id"]: line for line in lines_of(path)}
    assert len(found) == len(lines_of(path))
    return found


def surveyed(path: Path, bad: set[int] = frozenset()) -> Survey:
    survey = Survey(bad=dict.fromkeys(bad, "bad"))
    survey.lines.extend(line.digest for line in Lines(path))
    return survey


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_parts_hold_each_line_once(tmp_path, size):
    source = tmp_path / "in"
    source.write_bytes(
        b'{"prompt": "a"}\n\n{"id": 2, "prompt": "b\xc3\xa9"}\nbad\n{"prompt": "\\ud800"}\nbad\n{"id": "x"}'
    )
    parts = ray_job.split(source, surveyed(source, {4, 6}), size)
    said = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "bé"}, {"id": 5, "prompt": "\ud800"}, {"id": "x"}]
    assert [line for part in parts for line in part.read(source)] == said
    assert [part.number for part in parts] == list(range(-(-7 // size))) and max(part.lines for part in parts) <= size
    source.write_bytes(source.read_bytes().replace(b"x", b"y"))
    with pytest.raises(UserError, match="others than when the job began"):
        [part.read(source) for part in parts]


class Machines:
    """Stands in for Ray: one worker in this process. It may be interrupted after some parts."""

    def __init__(self, monkeypatch):
        self.asked, self.most, self.work = [], None, None
        monkeypatch.setattr(ray_job, "find_spec", lambda name: name)
        monkeypatch.setattr(ray_job, "cluster", self.cluster)
        monkeypatch.setattr(ray_job, "answers", self.answers)

    @contextmanager
    def cluster(self, args: Namespace):
        yield None, 2

    def answers(self, ray, args: Namespace, workers: int, asks: list):
        work = ray_job.Work(args)
        for ask in asks:
            if "part" in ask and len(self.asked) == self.most:
                raise KeyboardInterrupt
            answer = json.loads(work(json.dumps(ask)))
            if "error" in answer:
                raise UserError(answer["error"])
            yield answer
            self.asked += [ask["part"].number] if "part" in ask else []


@pytest.fixture
def machines(monkeypatch) -> Machines:
    return Machines(monkeypatch)


def call(capsys, source: Path, output: Path, *args, program=ray_job) -> tuple[int, str, str]:
    code = program.main(["--input", str(source), "--output", str(output), *HOW, *map(str, args)])
    return code, *capsys.readouterr()


def test_a_job_in_parts_is_the_job(capsys, tmp_path, machines):
    """The seed given, the drawn rows too; in the order of the input; and generate.py takes it for one of its own."""
    source, whole, output = write(tmp_path / "in", 20), tmp_path / "whole", tmp_path / "out"
    code, _, bad = call(capsys, source, whole, "--seed", 5, program=generate)
    got = call(capsys, source, output, "--seed", 5, "--part-size", 6)
    assert (code, got[0]) == (2, 2) and got[2] == bad.replace("generate.py", "ray_job.py")
    assert results(output) == results(whole) and len(results(output)) == 20
    assert [line["id"] for line in lines_of(output)] == [f"n{n}" if n % 3 else ids for n, ids in enumerate(numbers(20))]
    assert "requests 20 done, 3 bad lines" in got[1] and "2 at a time" in got[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.job.json", "whole", "whole.job.json"]
    assert json.loads((tmp_path / "out.job.json").read_text())["plan"] == lines_state(whole)["plan"]
    for program in (generate, ray_job):
        code, out, _ = call(capsys, source, output, "--seed", 5, "--resume", program=program)
        assert code == 2 and "requests 0 done, 20 before, 3 bad lines" in out
    assert len(machines.asked) == 5


def numbers(count: int) -> list[int]:
    """Of the requests of `write`, the lines on which they stand."""
    found, line = [], 1
    for n in range(count):
        found.append(line)
        line += 1 + (n % 5 == 2) + (n % 7 == 3)
    return found


def lines_state(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".job.json").read_text())


def test_resume_does_what_is_missing(capsys, tmp_path, machines):
    source, output, folder = tmp_path / "in", tmp_path / "out", tmp_path / "out.parts"
    how = ("--part-size", 3, "--seed", 9)
    source.write_text("".join(json.dumps({"prompt_ids": random_ids(9, n, 2000)}) + "\n" for n in range(11)))
    call(capsys, source, tmp_path / "whole", *how)
    machines.asked, machines.most = [], 3
    code, out, err = call(capsys, source, output, *how)
    assert (code, out) == (130, "") and err.startswith("ray_job.py: interrupted; --resume goes on with what ")
    first, torn, short = sorted(folder.iterdir())
    assert [path.name for path in (first, torn, short)] == [f"{n:08}.jsonl" for n in range(3)]
    torn.write_bytes(torn.read_bytes()[:-9])
    short.write_text("".join(short.open().readlines()[1:]))
    refused = [
        ((), "out.parts exists; --resume goes on with it"),
        (("--resume", "--part-size", 5), "--part-size was 3 and is 5"),
        (("--resume", "--top-p", 0.5), "another job: --top-p was 1.0 and is 0.5"),
    ]
    for more, words in refused:
        code, out, err = call(capsys, source, output, "--seed", 9, *more)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err
    machines.asked, machines.most = [], None
    code, out, _ = call(capsys, source, output, "--resume", "--seed", 9)
    assert code == 0 and machines.asked == [1, 2, 3] and "requests 8 done, 3 before: " in out
    assert output.read_text() == (tmp_path / "whole").read_text() and not folder.exists()


def test_what_cannot_begin(capsys, tmp_path, machines, monkeypatch):
    source, output = write(tmp_path / "in", 3), tmp_path / "out"
    cases = [
        (["--input", str(source)], "--input and --output go together"),
        ([], "give --input and --output"),
        (["--input", str(source), "--output", str(output), "--prompt", "a"], "it does not go with --prompt"),
        (["--input", str(source), "--output", str(output), "--device", "cuda:1"], "must be cpu or cuda, not 'cuda:1'"),
        (["--input", str(source), "--output", str(output), "--max-memory", "0.0001"], "out of memory: weights"),
        (["--input", str(source), "--output", str(output), "--workers", "0"], "no positive integer"),
    ]
    for args, words in cases:
        assert ray_job.main(args) == 2
        out, err = capsys.readouterr()
        assert not out and words in (line := err.splitlines()[-1]) and line.startswith("ray_job.py: error: ")
    (tmp_path / "out.parts").write_text("")
    assert "is no folder" in call(capsys, source, output)[2]
    monkeypatch.setattr(ray_job, "find_spec", lambda name: None)
    code, out, err = call(capsys, source, output)
    assert (code, out) == (2, "")
    assert err == "ray_job.py: error: ray is not installed: pip install -r requirements-ray.txt\n"


def test_a_worker_without_the_shared_folder(tmp_path):
    worker = ray_job.Worker(Namespace(ranks=1), str(tmp_path / "none"), str(ROOT / "scripts"))
    assert "at the same paths on all machines" in json.loads(worker({"ask": "{}"})["answer"])["error"]


# ---- with Ray


@pytest.fixture
def short():
    """A folder for Ray: the paths of its sockets may have no more than 107 characters."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        yield Path(folder)


def started(short: Path, source: Path, output: Path, *args) -> subprocess.Popen:
    command = [sys.executable, "scripts/ray_job.py", "--input", source, "--output", output, *HOW, *args]
    environment = {**os.environ, "TMPDIR": str(short), "HOME": str(short / "home"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, text=True, **pipes)


def of(short: Path, name: str = "") -> list[int]:
    """Processes that were started with this folder, of such a name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(short).encode() in (process / "environ").read_bytes() and name in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def until(ready, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.05)


def written(output: Path) -> int:
    return len([*output.with_name(output.name + ".parts").glob("*.jsonl")])


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_and_a_driver_that_is(tmp_path, short, capsys):
    pytest.importorskip("ray.data", reason="needs requirements-ray.txt")
    source, whole = tmp_path / "in", tmp_path / "whole"
    with open(source, "w") as file:
        for n in range(2000):
            file.write(
                json.dumps({"prompt_ids": random_ids(5 + 7 * n % 60, n, 2000), "max_new_tokens": 2 + n % 9}) + "\n"
            )
    how = ("--batch-size", 8, "--squeeze", "--layers", "perturbation", "--policy", "dropkv")
    assert call(capsys, source, whole, *how, program=generate)[0] == 0

    one = tmp_path / "one"
    process = started(short, source, one, *how, "--workers", 2, "--part-size", 100, "--json")
    until(lambda: written(one) >= 4)
    workers = of(short, "ray::MapWorker")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["done"] == 2000 and summary["workers"] == 2 and summary["workers_in_all"] == 3
    assert [line["id"] for line in lines_of(one)] == list(range(1, 2001)) and results(one) == results(whole)

    two = tmp_path / "two"
    process = started(short, source, two, *how, "--workers", 2, "--part-size", 100)
    until(lambda: written(two) >= 4)
    process.kill()
    process.communicate()
    until(lambda: not of(short), 180)  # Ray notices in its own time that its driver is gone
    assert not (short / "home").exists()
    before = written(two)
    process = started(short, source, two, *how, "--workers", 2, "--resume", "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out)["done_before"] == 100 * before and results(two) == results(whole)
    until(lambda: not of(short), 180)  # Ray notices in its own time that its driver is gone
    assert not (short / "home").exists()


@pytest.mark.slow
def test_a_part_that_ends_its_workers_and_several_ranks(tmp_path, short, capsys):
    """The killed worker's part is tried again, but not for ever; a worker of two ranks gives what torchrun gives."""
    pytest.importorskip("ray.data", reason="needs requirements-ray.txt")
    source, output = write(tmp_path / "in", 12), tmp_path / "out"
    process = started(short, source, output, "--ranks", 2, "--workers", 1, "--part-size", 8, "--seed", 3)
    killed = 0
    while process.poll() is None and killed < 12:
        for rank in of(short, ray_job.AS_RANK):
            os.kill(rank, signal.SIGKILL)
            killed += 1
        time.sleep(0.5)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and not out and len(lines := err.splitlines()) == 3, err
    assert all("prompt must be a string" in line for line in lines[:2]) and "died 4 times over one part" in lines[2]
    process = started(short, source, output, "--ranks", 2, "--workers", 1, "--part-size", 8, "--seed", 3, "--resume")
    until(lambda: written(output) or process.poll() is not None)
    [worker], ranks = of(short, "ray::MapWorker"), of(short, ray_job.AS_RANK)
    os.kill(worker, signal.SIGKILL)
    until(lambda: not set(ranks) & set(of(short, ray_job.AS_RANK)), 30)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "12 done, 2 bad lines" in out, err
    whole = tmp_path / "whole"
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 generate.py --seed 3 --input".split()
    subprocess.run([sys.executable, *torchrun, source, "--output", whole, *HOW], cwd=ROOT, capture_output=True)
    assert results(output) == results(whole)
    until(lambda: not of(short), 180)  # Ray notices in its own time that its driver is gone
    assert not (short / "home").exists()
