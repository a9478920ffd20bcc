"""Contestants take turns at the same requests, and each gets a row of what it took."""

import gc
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmark import roofline
from benchmark.subjects import Subject
from engine import Request
from parallel import shard

OUT_OF_MEMORY = "out of memory"
Row = dict[str, Any]


class Sizes(NamedTuple):
    """What a stage runs. budget: slots per layer, or a share of the sequence. memory: bytes of CUDA to be filled."""

    shape: str
    prompt: int = 512
    new: int = 128
    batches: tuple[int, ...] = (1,)
    rounds: int = 3
    budget: float = 0.2
    dtype: str | None = None
    weights: str = "auto"
    cache_format: str = "dense"
    peers: Sequence[str] = ("generate", "eager")
    memory: int = 0


class Run(NamedTuple):
    """One turn: the new tokens of each request, seconds until the first ones, seconds of each later step.

    Seconds are nan where they are not known; those in which something was compiled are in compile_s alone.
    slots: filled ones of all layers, in the mean over the steps; None: of every token. Bytes: None or 0 if not known.
    slot_bytes: K and V of one layer's slot.
    """

    tokens: list[list[int]]
    prefill_s: float = math.nan
    step_s: float = math.nan
    compile_s: float = 0.0
    slots: float | None = None
    kv_bytes: int | None = None
    peak_bytes: int = 0
    slot_bytes: float | None = None
    total_s: float = math.nan  # but for compiling


@dataclass(frozen=True)
class Contestant:
    """generate: gives each request all the tokens that it wants.

    clean: all that it allocates is torch's and is free again after the turn, so that its peak on CUDA is known.
    """

    name: str
    generate: Callable[[list[Request]], Run]
    clean: bool = True


def race(
    subject: Subject,
    contestants: Sequence[Contestant],
    requests: list[Request],
    sizes: Sizes,
    bases: Collection[str] = (),
    key: str = "tokens_per_s",
) -> list[Row]:
    """A row of each contestant. times: `key` in relation to that of each of `bases`.

    All take their turns one after the other: once to warm up and compile, then `sizes.rounds` times. One that fails is
    out, and its row says why.
    """
    runs: dict[str, list[Run] | str] = {contestant.name: [] for contestant in contestants}
    turns = [contestant for _ in range(1 + sizes.rounds) for contestant in contestants]
    for contestant in (bar := tqdm(turns, f"{Path(sizes.shape).name} x {len(requests)}", leave=False)):
        bar.set_postfix_str(contestant.name)
        if isinstance(before := runs[contestant.name], list):
            result = attempt(partial(turn, subject, contestant, requests))
            runs[contestant.name] = result if isinstance(result, str) else [*before, result]
    rows = [row(subject, name, requests, own) for name, own in runs.items()]
    speeds = {each["what"]: each[key] for each in rows if each["what"] in bases and key in each}
    for each in rows:
        each["times"] = {base: each[key] / speed for base, speed in speeds.items() if key in each}
    return rows


def turn(subject: Subject, contestant: Contestant, requests: list[Request]) -> Run:
    """With the peak on CUDA: the weights, and the most that was allocated on top of what lay there before."""
    cuda = subject.device == "cuda"
    if cuda:
        gc.collect()  # engines hold graphs and caches in cycles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    run = contestant.generate(requests)
    run = run._replace(total_s=time.perf_counter() - started - run.compile_s)
    if not (cuda and contestant.clean):
        return run
    weights = sum(p.nbytes for p in subject.model.parameters())
    return run._replace(peak_bytes=weights + torch.cuda.max_memory_allocated() - before)


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or one line that says why it failed: whatever that is, the others go on. Not so on several
    ranks: one that goes on alone would wait for the others.
    """
    try:
        return call()
    except Exception as error:
        if shard().world > 1:
            raise
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


def row(subject: Subject, what: str, requests: list[Request], runs: list[Run] | str) -> Row:
    """What the turns after the first one, the warm-up, took. What no turn knows is not in it."""
    batch, news = len(requests), [request.max_new_tokens for request in requests]
    prompt, new = max(len(request.ids) for request in requests), max(news)
    names = dict(what=what, batch=batch, prompt_tokens=prompt, new_tokens=new)
    if isinstance(runs, str):
        return names | dict(failed=runs)
    (warm_up, *timed), model = runs, subject.model
    firsts = [run.prefill_s for run in timed if not math.isnan(run.prefill_s)]
    if not (firsts or math.isnan(warm_up.prefill_s)):  # the only turn that reads prompts
        firsts = [warm_up.prefill_s]
    steps = [run.step_s for run in timed if not math.isnan(run.step_s)]
    made: Row = {}
    if steps and new > 1:
        step, made = spread("ms_per_step", steps)
        slots = timed[-1].slots or roofline.valid_slots([prompt + new] * model.config.n_layers, prompt, new)
        least = roofline.step_seconds(model, batch, slots, timed[-1].slot_bytes)
        made |= dict(tokens_per_s=batch / step, roofline_ms=1e3 * least, of_roofline=least / step)
    if firsts:
        first, spent = spread("first_token_ms", firsts)
        least = roofline.prefill_operations(model, batch, prompt)
        least /= roofline.matmul_rate(subject.device, model.config.dtype)
        made |= spent | dict(prompt_tokens_per_s=batch * prompt / first, of_matmul_rate=least / first)
    made |= dict(tokens_per_s_with_prefill=sum(map(len, timed[-1].tokens)) / median(run.total_s for run in timed))
    made |= dict(compile_s=warm_up.compile_s, kv_bytes=timed[-1].kv_bytes)
    return names | made | dict(peak_bytes=max(run.peak_bytes for run in timed) or None)


def spread(name: str, seconds: Sequence[float]) -> tuple[float, Row]:
    """The median; in milliseconds the median and the extremes as they stand in a row."""
    figures = {name: median(seconds), f"{name}_min": min(seconds), f"{name}_max": max(seconds)}
    return median(seconds), {name: 1e3 * value for name, value in figures.items()}
