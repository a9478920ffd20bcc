"""What a run needs and what there is, in bytes: computed before anything is allocated."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from errors import UserError

SHARE = 0.9  # of the free memory that a run plans with: fragments, libraries, other processes
MOST_ROWS = 256  # more of them give no more tokens per second, but later results


class Needs(NamedTuple):
    """Bytes: the weights; a row of the cache, and of the full one; a row in a step; a prompt while it goes through a
    block, `at_once` of them together; and what is held of each row's prompt meanwhile.
    """

    weights: int
    row: int
    row_full: int
    step: int
    prefill: int
    held: int = 0
    at_once: int = 1

    def total(self, rows: int) -> int:
        """At the most: steps go on while a prompt is read."""
        return self.weights + rows * (self.row + self.step + self.held) + min(rows, self.at_once) * self.prefill

    def rows(self, most: int, limit: int) -> int:
        """The largest batch that fits, at least 1 and at most `most`."""
        return max((rows for rows in range(1, min(most, MOST_ROWS) + 1) if self.total(rows) <= limit), default=1)

    def check(self, rows: int, limit: int) -> None:
        """UserError if `rows` rows do not fit."""
        if self.total(rows) > limit:
            raise UserError(self.refusal(rows, limit))

    def refusal(self, rows: int, limit: int) -> str:
        work = self.total(rows) - self.weights - rows * self.row
        smaller = "--batch-size, --budget" if rows > 1 else "--budget"
        return (
            f"out of memory: weights {size(self.weights)}, cache of {rows} row{'s'[: rows > 1]} {size(rows * self.row)}"
            f", work beside them up to {size(work)}, limit {size(limit)}; use a smaller {smaller}, prompt, "
            f"--max-new-tokens or --dtype"
        )

    def explained(self, rows: int, limit: int) -> AbstractContextManager[None]:
        """UserError with these numbers when memory runs out nevertheless."""
        return explained(lambda: self.refusal(rows, limit))


@contextmanager
def explained(line: Callable[[], str]) -> Iterator[None]:
    """UserError with this line when memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a GPU's is a kind of RuntimeError, a CPU's just one
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise UserError(line()) from error


def free(device: torch.device) -> int:
    """Bytes that a process can still get on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kib = _numbers(Path("/proc/meminfo"))
    amounts = [kib["MemAvailable:"] * 1024 if "MemAvailable:" in kib else _installed()]
    group = Path("/sys/fs/cgroup")  # a container's own limit; what the cache of files takes can be had back
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        used = int((group / "memory.current").read_text()) - _numbers(group / "memory.stat").get("inactive_file", 0)
        amounts.append(int(limit) - used)
    return min(amounts)


def _numbers(file: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in file.read_text().splitlines()} if file.exists() else {}


def _installed() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def size(amount: float) -> str:
    amount = min(amount, 1e100)  # an integer may be too large for a division
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"
