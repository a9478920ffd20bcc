"""How many threads PyTorch gets, and how long they spin before they sleep: chosen by what the process may use.

OpenMP's threads meet after each operation, and who comes first spins for up to some milliseconds. Where another process
needs the cores as well, they spin in vain: one holds the core on which the other has still to compute. The OpenMP that
comes with PyTorch reads all this from the environment as it is loaded, so a command line chooses before that; what the
user has set there stays as it is. A library sets nothing.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# PyTorch asks the kernel for pages of 2 MiB. Where a process happens to get small ones that lie apart, a step of 135M
# weights in float32 takes 4 to 11% longer, measured in pairs; one in bfloat16 as long.
PAGES = "THP_MEM_ALLOC_ENABLE"
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SPINS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
FEW = 1000  # about 15 us, less than a switch of tasks costs; scripts/busy.py measures what it gives


@dataclass(frozen=True)
class Usage:
    """Seconds until now: on the clock, of the processors in use by anybody, and of them by this process."""

    clock: float
    all: float
    own: float

    @classmethod
    def now(cls, processors: Iterable[int], root: Path = Path("/")) -> "Usage":
        names, ticks = {f"cpu{n}" for n in processors}, 0
        for line in _read(root / "proc/stat").splitlines():
            name, *fields = line.split()
            if name in names:  # user nice system idle iowait irq softirq steal: all but the waiting
                ticks += sum(map(int, fields[:3] + fields[5:8]))
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())

    def others(self, before: "Usage") -> float:
        """How many processors other processes have used since."""
        used = (self.all - before.all) - (self.own - before.own)
        return max(0.0, used / max(self.clock - before.clock, 1e-9))


@dataclass(frozen=True)
class Limits:
    """What this process may use."""

    processors: tuple[int, ...]  # their numbers
    cores: int  # two processors of one core count once, as for MKL: the second thread of a core finds its units in use
    quota: float  # processors' worth of time
    total: int  # cores that the machine has

    @classmethod
    def now(cls, root: Path = Path("/")) -> "Limits":
        def cores(processors: Iterable[int]) -> int:
            siblings = (f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list" for n in processors)
            return len({_read(root / file) or file for file in siblings})

        processors = tuple(sorted(affinity()))
        total = cores({*processors, *range(os.cpu_count() or 1)})
        return cls(processors, cores(processors), quota(root), total)

    @property
    def threads(self) -> int:
        return max(1, math.floor(min(self.quota, self.cores)))


@dataclass(frozen=True)
class Choice:
    """Variables for the environment, and why: nothing on a machine that is free."""

    variables: dict[str, str]
    reasons: tuple[str, ...]


def choose(limits: Limits, others: float, environment: Mapping[str, str]) -> Choice:
    """`others`: processors that other processes use, of those that this one may use.

    The number of threads follows from limits alone: it can change the last bit of a result, which must not depend on
    what else runs. Where others use a part of the processors, threads soon sleep. That costs little once the others
    are gone, so the choice may last.
    """
    threads, variables, reasons = limits.threads, {}, []
    if given := next((environment[name] for name in COUNTS if name in environment), ""):
        threads = int(given) if given.isdecimal() and len(given) < 9 else threads
    elif threads < limits.total:
        variables["OMP_NUM_THREADS"] = str(threads)
        most = f"{limits.quota:.4g} by its quota" if limits.quota < limits.cores else str(limits.cores)
        reasons.append(f"of {limits.total} cores, the process may use {most}")
    count = len(limits.processors)
    if threads > 1 and max(0, count - threads) + 0.5 < others and not any(name in environment for name in SPINS):
        variables["GOMP_SPINCOUNT"] = str(FEW)
        reasons.append(f"others used {others:.1f} of {count} processors at the start: threads sleep early")
    return Choice(variables, tuple(reasons))


def start() -> tuple[str, ...]:
    """Sets the environment before PyTorch is loaded, and says why."""
    limits = Limits.now()
    before = Usage.now(limits.processors)
    import numpy  # noqa: F401 PyTorch imports it anyway, and that takes long enough to see who else computes

    choice = choose(limits, Usage.now(limits.processors).others(before), os.environ)
    os.environ.update(choice.variables)
    os.environ.setdefault(PAGES, "1")
    return choice.reasons


def affinity() -> set[int]:
    """The processors on which this process may run."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def quota(root: Path = Path("/")) -> float:
    """How many processors' time the groups around this process may take (cgroup v2 and v1), infinite without limit."""
    limits = [math.inf]
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        for folder in {group, *group.parents}:  # a container may see its own group as the root
            at = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / folder
            given = _read(at / "cpu.max") or f"{_read(at / 'cpu.cfs_quota_us')} {_read(at / 'cpu.cfs_period_us')}"
            amount, _, period = given.strip().partition(" ")
            if amount.isdecimal() and period.isdecimal() and int(amount) and int(period):  # else max, or -1
                limits.append(int(amount) / int(period))
    return min(limits)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""
