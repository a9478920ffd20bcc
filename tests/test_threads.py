"""What a process may use, and what follows from it for threads: all of it from files and figures that tests make up."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import threads
from threads import FEW, Choice, Limits, Usage, choose

ROOT = Path(threads.__file__).parent


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUP = "proc/self/cgroup"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, math.inf),  # another system
        ({GROUP: "0::/\n"}, math.inf),  # no controller
        ({GROUP: "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, math.inf),
        ({GROUP: "0::/\n", f"{V2}/cpu.max": "250000 100000\n"}, 2.5),
        ({GROUP: "0::/a/b\n", f"{V2}/a/cpu.max": "50000 100000\n", f"{V2}/a/b/cpu.max": "max 100000\n"}, 0.5),  # above
        ({GROUP: "0::/a/b\n", f"{V2}/a/cpu.max": "400000 100000\n", f"{V2}/a/b/cpu.max": "300000 100000\n"}, 3),
        ({GROUP: "0::/docker/1\n", f"{V2}/cpu.max": "200000 100000\n"}, 2),  # the container's group is its root
        ({GROUP: "1:cpu:/\n0::/\n", f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({GROUP: "3:cpu,cpuacct:/x\n", f"{V1}/x/cpu.cfs_quota_us": "5000", f"{V1}/x/cpu.cfs_period_us": "10000"}, 0.5),
        ({GROUP: "3:cpuset:/x\n", f"{V1}/x/cpu.cfs_quota_us": "5000", f"{V1}/x/cpu.cfs_period_us": "10000"}, math.inf),
        ({GROUP: "0::/\nodd\n", f"{V2}/cpu.max": "100000 0\n"}, math.inf),
        ({GROUP: "0::/\n", f"{V2}/cpu.max": "\n"}, math.inf),
    ],
)
def test_the_quota_is_the_least_of_all_groups(tmp_path, files, expected):
    assert threads.quota(written(tmp_path, files)) == expected


def test_what_others_use_is_what_is_used_without_us(tmp_path, monkeypatch):
    tick = os.sysconf("SC_CLK_TCK")

    def at(clock: float, own: float, *seconds: float) -> Usage:
        """seconds: user to steal of the first processor; a second one waits, a third is not ours."""
        monkeypatch.setattr(threads.time, "monotonic", lambda: clock)
        monkeypatch.setattr(threads.time, "process_time", lambda: own)
        used = " ".join(str(round(amount * tick)) for amount in seconds)
        stat = (
            f"cpu 9 9 9 9\ncpu0 {used} 0 0\ncpu1 0 0 0 {clock * tick:.0f} 7 0 0 0 0 0\ncpu10 {clock * tick:.0f} 0 0 0\n"
        )
        return Usage.now((0, 1), written(tmp_path, {"proc/stat": stat}))

    before = at(10, 1, 1, 1, 1, 50, 50, 1, 1, 1)
    assert at(12, 2, 2, 1.5, 1.25, 90, 90, 1.25, 1.5, 1.5).others(before) == pytest.approx((3 - 1) / 2)
    assert at(12, 4, 2, 1.5, 1.25, 90, 90, 1.25, 1.5, 1.5).others(before) == 0  # ticks are coarse
    assert Usage.now((0, 1), tmp_path / "nothing").all == 0


def test_limits_count_the_cores_of_the_processors_that_we_may_use(tmp_path, monkeypatch):
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = written(tmp_path, {siblings.format(n): f"{n % 4},{n % 4 + 4}\n" for n in range(8)})
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "affinity", lambda: {0, 1, 4, 5})
    assert Limits.now(root) == Limits((0, 1, 4, 5), 2, math.inf, 4) and Limits.now(root).threads == 2
    assert Limits.now(tmp_path / "nothing") == Limits((0, 1, 4, 5), 4, math.inf, 8)
    monkeypatch.delattr(threads.os, "sched_getaffinity", raising=False)
    monkeypatch.undo()
    assert threads.affinity() <= set(range(os.cpu_count()))


def limits(processors: int, quota: float = math.inf, total: int | None = None, cores: int | None = None) -> Limits:
    return Limits(tuple(range(processors)), cores or processors, quota, total or processors)


SLEEP = {"GOMP_SPINCOUNT": str(FEW)}


@pytest.mark.parametrize(
    "allowed, others, environment, expected",
    [
        (limits(2), 0.4, {}, {}),  # free: all is as PyTorch has it
        (limits(2), 0.6, {}, SLEEP),
        (limits(2), 2.0, {}, SLEEP),
        (limits(2), 2.0, {"GOMP_SPINCOUNT": "7"}, {}),
        (limits(2), 2.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        (limits(2), 2.0, {"OMP_NUM_THREADS": "2"}, SLEEP),
        (limits(2), 2.0, {"OMP_NUM_THREADS": "1"}, {}),  # nothing waits
        (limits(2), 2.0, {"MKL_NUM_THREADS": "1"}, {}),
        (limits(2), 2.0, {"OMP_NUM_THREADS": "4,2"}, SLEEP),  # of nested regions
        (limits(8), 2.0, {"OMP_NUM_THREADS": "6"}, {}),  # the others have cores of their own
        (limits(1), 1.0, {}, {}),
        (limits(2, total=8), 0.0, {}, {"OMP_NUM_THREADS": "2"}),
        (limits(2, total=8), 0.0, {"OMP_NUM_THREADS": "3"}, {}),
        (limits(8, quota=2.5), 5.0, {}, {"OMP_NUM_THREADS": "2"}),
        (limits(8, quota=2.5), 7.0, {}, {"OMP_NUM_THREADS": "2"} | SLEEP),
        (limits(8, quota=0.5), 8.0, {}, {"OMP_NUM_THREADS": "1"}),
        (limits(8, quota=0.5), 8.0, {"MKL_NUM_THREADS": "2"}, SLEEP),
        (limits(8, quota=9), 0.0, {}, {}),
        (limits(8, cores=4, total=4), 3.0, {}, {}),  # 4 threads beside 3 on 8 processors
        (limits(8, cores=4, total=4), 5.0, {}, SLEEP),
    ],
)
def test_threads_follow_from_limits_and_waiting_from_what_others_use(allowed, others, environment, expected):
    choice = choose(allowed, others, environment)
    assert choice.variables == expected and len(choice.reasons) == len(expected)


def test_reasons_name_the_figures():
    assert choose(limits(8, quota=2.5), 7.0, {}).reasons == (
        "of 8 cores, the process may use 2.5 by its quota",
        "others used 7.0 of 8 processors at the start: threads sleep early",
    )
    assert choose(limits(2, total=8), 0.0, {}) == Choice(
        {"OMP_NUM_THREADS": "2"}, ("of 8 cores, the process may use 2",)
    )


CHOSEN = (*threads.COUNTS, *threads.SPINS, threads.PAGES)


def environment(program: str, others: float, quota: float, **given: str) -> list[str]:
    """What a command line's PyTorch finds when it is imported, on 2 processors: threads, spins, large pages."""
    Path("sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport threads\n"
        f"threads.affinity = lambda: {{0, 1}}\nthreads.os.cpu_count = lambda: 2\n"
        f"threads.quota = lambda root: {quota}\nthreads.Usage.others = lambda *_: {others}\n"
    )
    Path("torch.py").write_text(
        f"import os\nprint(*map(os.environ.get, ('OMP_NUM_THREADS', 'GOMP_SPINCOUNT', {threads.PAGES!r})))\n"
        "raise KeyboardInterrupt"
    )
    own = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    command = [sys.executable, str(ROOT / f"{program}.py")]
    done = subprocess.run(command, env=own | {"PYTHONPATH": os.getcwd()} | given, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("program", ["generate", "evaluate", "bench"])
def test_pytorch_finds_what_was_chosen_when_it_is_loaded(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert environment(program, 2.0, 2.0) == ["None", str(FEW), "1"]
    if program == "generate":
        assert environment(program, 0.0, 2.0) == ["None", "None", "1"]
        assert environment(program, 2.0, 1.5) == ["1", "None", "1"]
        own = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "5", threads.PAGES: "0"}
        assert environment(program, 2.0, 1.5, **own) == ["2", "5", "0"]


def test_a_library_sets_nothing():
    code = "import os, threads; threads.Usage.others = lambda *_: 9.0\n"
    code += "names = [*threads.COUNTS, *threads.SPINS, threads.PAGES]\n"
    code += "before = [os.environ.get(name) for name in names]; import commandline, engine\n"
    code += "assert before == [os.environ.get(name) for name in names] and commandline.THREADS == ()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
