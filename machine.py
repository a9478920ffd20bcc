"""What this machine is, has and can do: its name, free memory in bytes, and rates that were measured."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

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


def use_threads(count: int | None) -> None:
    """That many threads of the CPU for each operation; None: as many as were found to suit (threads.py)."""
    if count is not None:
        torch.set_num_threads(count)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vector = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "no AVX")
    threads = torch.get_num_threads()
    return f"{model}, {threads} core{'s'[: threads > 1]}, {vector}"


def seconds(statement: str, **operands: Tensor) -> float:
    """Of the statement, the median of many."""
    from torch.utils.benchmark import Timer  # takes a while, and a run needs no rates

    timer = Timer(statement, globals=operands, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median


@lru_cache
def copy_rate(device: str) -> float:
    """Bytes read plus bytes written per second by a copy that no processor cache holds."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds("target.copy_(source)", source=source, target=target)


@lru_cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product (a multiply and an add each).

    At least that of float32: where a processor has no fast product in half precision, a step may compute in float32.
    """
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rate = 2 * size**3 / seconds("a @ b", a=a, b=b)
    return rate if dtype == torch.float32 or device == "cuda" else max(rate, matmul_rate(device, torch.float32))
