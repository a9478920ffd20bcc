"""Turns of contestants, and the time of one call."""

import gc
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm


class Run(NamedTuple):
    """One request or batch: seconds, tokens of each row, slots per layer, bytes (None: not known).

    step_s is that of steps in which nothing was compiled; nan if there were none.
    """

    prefill_s: float
    compile_s: float
    step_s: float
    tokens: list[list[int]]
    plan: list[int]
    kv_bytes: int | None
    peak_bytes: int | None


def race(label: str, contestants: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run] | str]:
    """All in turn: once to warm up, then `rounds` times. A contestant that fails is out: its name -> what it said."""
    runs: dict[str, list[Run] | str] = {name: [] for name in contestants}
    with tqdm(total=len(contestants) * (1 + rounds), desc=label, leave=False) as bar:
        for _ in range(1 + rounds):
            for name, run in contestants.items():
                bar.set_postfix_str(name)
                if isinstance(runs[name], list):
                    result = attempt(run)
                    runs[name] = result if isinstance(result, str) else [*runs[name], result]
                bar.update()
    return runs


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or a line that says why it failed: whatever that is, the others go on."""
    try:
        return call()
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    gc.collect()  # outside of the handler, in which the exception still holds its tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def seconds(call: Callable[[], Any], device: str, repeats: int = 5, least: float = 0.05) -> float:
    """Of one call, the median of `repeats` measurements that take `least` seconds each, or one call each."""

    def measured(count: int) -> float:
        synchronise(device)
        started = time.perf_counter()
        for _ in range(count):
            call()
        synchronise(device)
        return (time.perf_counter() - started) / count

    measured(1)
    once = measured(1)
    return median(measured(max(1, math.ceil(least / once))) for _ in range(repeats if once < 1 else 1))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int | None:
    """The most that was allocated since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
