"""What this machine has: memory, in bytes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from errors import UserError

SHARE = 0.9  # of the free memory that a run plans with: fragments, libraries, other processes


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
