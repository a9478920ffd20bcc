"""Turns of contestants, and the time of one call."""

import gc
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

OUT_OF_MEMORY = "out of memory"


class Run(NamedTuple):
    """One request or batch: seconds, tokens of each row, slots per layer, bytes (None: not known).

    step_s is that of steps in which nothing was compiled; nan if there were none. peak_bytes: the weights and what was
    allocated on top of what lay there before the run, at most.
    """

    prefill_s: float
    compile_s: float
    step_s: float
    tokens: list[list[int]]
    plan: list[int]
    kv_bytes: int | None
    peak_bytes: int | None


def race(
    label: str,
    contestants: dict[str, Callable[[], Run]],
    rounds: int,
    warm_up: dict[str, Callable[[], Run]] | None = None,
) -> dict[str, list[Run] | str]:
    """All in turn: once to warm up, then `rounds` times. A contestant that fails is out: its name -> what it said.

    warm_up: what runs instead the first time.
    """
    runs: dict[str, list[Run] | str] = {name: [] for name in contestants}
    with tqdm(total=len(contestants) * (1 + rounds), desc=label, leave=False) as bar:
        for turn in range(1 + rounds):
            for name, run in (contestants if turn else warm_up or contestants).items():
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
    except Exception as error:
        reason = reason_of(error)
    gc.collect()  # outside of the handler, in which the exception still holds its tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def reason_of(error: Exception) -> str:
    """One line. What ends a capture or a compilation for want of memory may be raised as a consequence of that."""
    chain, cause = [error], error
    while cause := cause.__cause__ or cause.__context__:
        chain.append(cause)
    if any(isinstance(cause, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(cause) for cause in chain):
        return OUT_OF_MEMORY
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # the compiler's first one only announces


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


def reset_peak(device: str) -> int:
    """Begins to watch for the most that is allocated; how much is now."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes(model: nn.Module, before: int) -> int | None:
    """The weights, and the most that was allocated since `reset_peak` on top of the `before` bytes that it found."""
    if not next(model.parameters()).is_cuda:
        return None
    return sum(p.nbytes for p in model.parameters()) + torch.cuda.max_memory_allocated() - before
