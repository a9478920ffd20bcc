"""How fast is it here: against transformers, against the full cache and against what the machine could do at most.

    python bench.py                                          every stage, at sizes that suit the device (`JOBS`)
    python bench.py --stage decode --shape llama-3.1-8b      one stage, one shape; both may be repeated
    python bench.py --stage throughput --out results/bench.json --plot results/throughput.png

Shapes are published ones with random weights, made on the device without a download, any config.json, and `embedded`,
the checkpoint that comes along; NAME:DTYPE chooses a dtype (default: fp32 on the CPU, bf16 on CUDA). All contestants of
a stage run in one process on the same weights and take turns, so that a drifting machine hits all of them: one turn to
warm up and compile, from an empty compiler cache, which is reported apart, then `--rounds` turns, of which the tables
give the median and the extremes. Lines on standard output are readable, the last one is everything as JSON; --out has
each row as soon as it is made. A contestant that fails is a row that says why.

Memory, on CUDA: each turn of decode, throughput and prefill begins with nothing of ours but the weights on the device.
`peak_bytes` is what the contestant itself took at most: the weights, and what was allocated during its turn on top of
what lay there before.

"Of the roofline": the larger of bytes that a step must read over the rate of a large copy (bytes read plus written),
and its operations over the rate of a large matrix product, both measured in the same run, as a share of the step's
time. Weights that fit into a processor's cache can exceed 100%.
"""

import argparse
import gc
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from tqdm import tqdm

from benchmark import attention, roofline
from benchmark.record import check_picture, check_stages, origin
from benchmark.subjects import SHAPES, Subject, make, published
from benchmark.timing import OUT_OF_MEMORY, Run, attempt, peak_bytes, race, reset_peak, seconds, synchronise
from bound import Bound
from checkpoint import EMBEDDED
from commandline import Parser, guarded, positive
from config import ModelConfig
from decoder import Store
from engine import Completion, Engine, Request
from errors import UserError, cut, place, shown
from files import check_apart, check_output, parse_json, read_bytes, write_json, write_whole
from graphs import CudaGraphs, compiled, compiled_graphs
from kvcache import KVCache, LayerCache
from memory import explained
from model import Block, Transformer
from policies import tokens as token_policies
from policies.layers import LayerPolicy, Plan
from sizing import rows_at_once

GIB = 2**30
SWITCHES = 20  # random plans of the stage `switch`
PEERS = {  # ways in which transformers decodes
    "generate": "transformers generate",
    "eager": "transformers eager",
    "static": "transformers static, compiled",
}
COMPILED_PEER_LAYERS = 12  # transformers compiles all layers as one graph: on a CPU minutes for more than that
GROUP = 4  # layers of one graph, in the stage `compile`

Row = dict[str, Any]


class Sizes(NamedTuple):
    """What a stage runs. budget: slots per layer, or a share of the sequence. memory: bytes that it may use.

    Of decode only: peers: ways in which transformers takes part; profile: where operators are written.
    """

    shape: str
    prompt: int = 512
    new: int = 128
    batches: tuple[int, ...] = (1,)
    rounds: int = 3
    budget: float = 0.2
    memory: int | None = None
    peers: tuple[str, ...] = tuple(PEERS)
    profile: "Report | None" = None


class Report:
    """A text file that grows: each run writes it anew, and it is whole at any moment."""

    def __init__(self, path: Path):
        self.path, self.text = path, ""

    def add(self, text: str) -> None:
        self.text += text
        write_whole(self.path, self.text)


# ---- stages: each yields rows


def decode(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Step time of one request, and of a small batch on CUDA, against transformers."""
    caches = {"full": ("full", "uniform", None)}
    caches |= {f"{policy} x squeeze": (policy, "squeeze", sizes.budget) for policy in ("h2o", "streaming")}
    engines = {"full, eager": Engine(subject.model)}
    engines |= {f"{name}, compiled": Engine(subject.model, *cache, compile=True) for name, cache in caches.items()}
    quick = subject.device == "cuda" or subject.config.n_layers <= COMPILED_PEER_LAYERS
    peers = {PEERS[way]: way for way in sizes.peers if way != "static" or quick}
    failed: dict[str, str] = {}
    for batch in sizes.batches:
        prompts = subject.prompts(batch, sizes.prompt)
        contestants = {name: partial(theirs, subject, way, prompts, sizes.new) for name, way in peers.items()}
        contestants |= {name: partial(alone, engine, prompts, sizes.new) for name, engine in engines.items()}
        fit = {
            name: run for name, run in contestants.items() if name not in failed
        }  # a compilation may fail for minutes
        runs = race(f"decode {sizes.shape} x {batch}", fit, sizes.rounds)
        failed |= {name: these for name, these in runs.items() if isinstance(these, str)}
        rows = [row(subject, name, prompts, sizes.new, (failed | runs)[name]) for name in contestants]
        yield from compared(rows, [*peers])
    if sizes.profile is not None:
        for compiled in (False, True):
            yield profile(subject, sizes, compiled)


def throughput(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Tokens per second over the batch: full against uniform against squeeze; on CUDA first the largest that fits."""
    caches = {
        "full": ("full", "uniform", None),
        "uniform": ("streaming", "uniform", sizes.budget),
        "squeeze": ("streaming", "squeeze", sizes.budget),
    }
    largest = {name: largest_batch(Engine(subject.model, *cache), subject, sizes) for name, cache in caches.items()}
    engines = {name: Engine(subject.model, *cache, compile=True) for name, cache in caches.items()}

    def raced(batch: int, names: list[str]) -> list[Row]:
        prompts = subject.prompts(batch, sizes.prompt)
        contestants = {name: partial(alone, engines[name], prompts, sizes.new) for name in names}
        short = {name: partial(run, stop_after=3) for name, run in contestants.items()}
        runs = race(f"throughput {sizes.shape} x {batch}", contestants, sizes.rounds, short)
        return compared([row(subject, name, prompts, sizes.new, these) for name, these in runs.items()], ["full"])

    best: list[Row] = []
    for name, most in largest.items():
        batch = 0 if most is None else most + max(1, most // 8)  # beyond it, to see that it is the largest
        while batch:
            [each] = raced(batch, [name])
            yield each
            if "failed" not in each:
                best.append(each)
            if each.get("failed") != OUT_OF_MEMORY:
                break
            batch = most if batch > most else batch * 9 // 10  # computed too high
    keys = ("batch", "prompt_tokens", "new_tokens", "tokens_per_s", "tokens_per_s_with_prefill", "peak_bytes")
    rows = [{"what": f"{row['what']}, largest batch"} | {key: row[key] for key in keys} for row in best]
    yield from compared(rows, ["full, largest batch"])
    for batch in sizes.batches:
        yield from raced(batch, [name for name, most in largest.items() if most is None or batch < most])


def largest_batch(engine: Engine, subject: Subject, sizes: Sizes) -> int | None:
    """Rows that fit into `sizes.memory`; None: no limit.

    By what prefill and first steps take of as many rows as go through a block at once, and of twice as many: from there
    on it grows evenly.
    """
    if sizes.memory is None:
        return None
    rows, peaks = rows_at_once(sizes.prompt), []
    for batch in (rows, 2 * rows):
        run = attempt(partial(alone, engine, subject.prompts(batch, sizes.prompt), sizes.new, stop_after=3))
        if run == OUT_OF_MEMORY:
            return batch  # the search comes down from there
        peaks.append(run.peak_bytes)
    each = max(1, (peaks[1] - peaks[0]) // rows)
    return rows + max(0, sizes.memory - peaks[0]) // each


def batching(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """New tokens per second, prompts read included, over many requests of all lengths: rows that end take the next.

    `batches` says how many requests. There are as many rows as fit by `Sizing.needs`; on a CPU a quarter of them.
    """
    caches = {"full": ("full", "uniform", None), "squeeze": ("streaming", "squeeze", sizes.budget)}
    for count in sizes.batches:
        rng, length, rows = random.Random(0), sizes.prompt + sizes.new, []
        wanted = [
            Request(subject.prompts(1, rng.randint(sizes.prompt // 4 + 1, sizes.prompt))[0], new)
            for new in (rng.randint(sizes.new // 2 + 1, sizes.new) for _ in range(count))
        ]
        for name, cache in caches.items():
            engine, fit = Engine(subject.model, *cache, compile=True), -(-count // 4)
            if sizes.memory is not None:
                fit = engine.sizing.needs(length, sizes.prompt).rows(count, sizes.memory)
            rows.append(dict(what=name, requests=count, batch=fit) | served(engine, wanted, fit, length))
        yield from compared(rows, ["full"])


def served(engine: Engine, requests: list[Request], rows: int, length: int) -> Row:
    """What it takes to run all of them, after some with a few tokens each to warm up."""
    short = [replace(request, max_new_tokens=3) for request in requests[: rows + 1]]

    def run(wanted: list[Request]) -> tuple[float, list[Completion]]:
        started = time.perf_counter()
        done = list(engine.generate(wanted, batch_size=rows, max_length=length))
        return time.perf_counter() - started, done

    result = attempt(lambda: (run(short), run(requests))[1])
    if isinstance(result, str):
        return dict(failed=result)
    took, done = result
    figures = done[0].figures
    tokens, took = sum(len(completion.tokens) for completion in done), took - figures.compile_s
    return dict(tokens_per_s=tokens / took, seconds=took, new_tokens=tokens, kv_bytes=figures.kv_bytes)


def prefill(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Prompt tokens per second and time to the first token, and what importance and the plan made of it cost of it."""
    streaming = Engine(subject.model, "streaming", "squeeze", sizes.budget)
    plan = ours(streaming, subject.prompts(1, sizes.prompt), 1).plan
    given, snapkv = (Engine(subject.model, policy, plan=plan) for policy in ("streaming", "snapkv"))
    perturbation = Engine(subject.model, "snapkv", "perturbation", sizes.budget)

    def without(prompts: list[list[int]]) -> Run:
        with patch("model.importance", lambda before, after, lengths: torch.zeros_like(before[:, 0, 0])):
            return alone(given, prompts, 1)

    for batch in sizes.batches:
        prompts = subject.prompts(batch, sizes.prompt)
        h2o = Engine(subject.model, "h2o", "squeeze", sizes.budget)
        contestants = {
            "transformers eager": partial(theirs, subject, "eager", prompts, 1),
            "full": partial(alone, Engine(subject.model), prompts, 1),
            "h2o x squeeze": partial(alone, h2o, prompts, 1),
            "streaming x squeeze": partial(alone, streaming, prompts, 1),
            "snapkv x perturbation": partial(alone, perturbation, prompts, 1),
            "snapkv, plan given": partial(alone, snapkv, prompts, 1),
            "plan given": partial(alone, given, prompts, 1),
            "plan given, no importance": partial(without, prompts),
        }
        runs = race(f"prefill {sizes.shape} x {batch}", contestants, sizes.rounds)
        least = roofline.prefill_operations(subject.model, batch, sizes.prompt)
        least /= roofline.matmul_rate(subject.device, subject.config.dtype)
        rows = []
        for name, these in runs.items():
            rows.append(dict(what=name, batch=batch, prompt_tokens=sizes.prompt))
            if isinstance(these, str):
                rows[-1] |= dict(failed=these)
                continue
            times = [run.prefill_s for run in these[1:]]
            rows[-1] |= dict(first_token_ms=1e3 * median(times), ms_min=1e3 * min(times), ms_max=1e3 * max(times))
            rows[-1] |= dict(tokens_per_s=batch * sizes.prompt / median(times), of_matmul_rate=least / median(times))
            rows[-1] |= dict(peak_bytes=these[-1].peak_bytes)
        yield from compared(rows, ["transformers eager"])
        for what, pair in COSTS.items():
            more, less = (runs[name] for name in pair)
            if isinstance(more, list) and isinstance(less, list):
                turns = [(with_it.prefill_s, without.prefill_s) for with_it, without in zip(more, less, strict=True)]
                share = median((with_it - without) / with_it for with_it, without in turns[1:])
                yield dict(what=what, batch=batch, prompt_tokens=sizes.prompt, of_prefill=share)


COSTS = {  # what a prefill costs with it and without it
    "importance": ("plan given", "plan given, no importance"),
    "planning": ("streaming x squeeze", "plan given"),  # reading each layer's importance, cutting its prompt
    "measuring and planning": ("streaming x squeeze", "plan given, no importance"),
    "perturbation": ("snapkv x perturbation", "snapkv, plan given"),  # its curves, and cutting each layer's prompt
}


class Given(LayerPolicy):
    """The plan that it holds at the moment."""

    name: ClassVar[str] = "given"

    def __init__(self, plan: list[int]):
        self.plan = plan

    def allocate(self, signals: Sequence[float], budget: int, caps: Sequence[int], floor: int) -> Plan:
        return Plan([min(slots, cap) for slots, cap in zip(self.plan, caps, strict=True)])


def switch(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """What a request pays for a plan never seen before: its time less that of the same request again."""
    rng, prompts, (slots, plans) = random.Random(0), subject.prompts(1, sizes.prompt), plans_of(subject, sizes)
    layers = Given([slots] * subject.config.n_layers)
    engine = Engine(subject.model, "streaming", layers, slots, compile=True)

    def timed(plan: list[int]) -> float:
        layers.plan = plan
        started = time.perf_counter()
        ours(engine, prompts, sizes.new)
        return time.perf_counter() - started

    warm_s, graphs = timed(layers.plan) + timed(plans(rng)), compiled_graphs()
    costs = []
    for plan in tqdm([plans(rng) for _ in range(SWITCHES)], f"switch {sizes.shape}", leave=False):
        costs.append(1e3 * (timed(plan) - timed(plan)))
    yield dict(
        what=f"{SWITCHES} random plans",
        recompilations=compiled_graphs() - graphs,
        ms_median=median(costs),
        ms_min=min(costs),
        ms_max=max(costs),
        warm_up_s=warm_s,
    )


def plans_of(subject: Subject, sizes: Sizes) -> tuple[int, Callable[[random.Random], list[int]]]:
    """Slots per layer of a uniform plan, and what draws random plans of as many in the mean."""
    slots = max(32, int(sizes.budget * (sizes.prompt + sizes.new)))
    return slots, partial(random_plan, layers=subject.config.n_layers, slots=slots)


def random_plan(rng: random.Random, layers: int, slots: int) -> list[int]:
    """`slots` per layer in the mean, at least 8 in each and mostly different."""
    spare = layers * (slots - 8)
    cuts = sorted(rng.randrange(spare + 1) for _ in range(layers - 1))
    return [8 + end - start for start, end in zip([0, *cuts], [*cuts, spare], strict=True)]


def compiling(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """One compiled block for all layers, as in the engine, against larger graphs: of some layers, of the whole step.

    The whole step, which compiles longest, only runs uneven plans.
    """
    model, config = subject.model, subject.config
    policy, rotary = token_policies.make("streaming"), model.rotary(sizes.prompt + sizes.new)
    seen = torch.full((1,), sizes.prompt, device=subject.device)
    tokens, blocks = torch.ones_like(seen), list(model.layers)

    def in_turn(blocks: list[Block], x: Tensor, rotary: list[Tensor], layers: list[LayerCache]) -> Tensor:
        for block, frequencies, cache in zip(blocks, rotary, layers, strict=True):
            x = block.decode(x, frequencies, cache, seen, policy)
        return x

    def whole(blocks: list[Block], tokens: Tensor, rotary: list[Tensor], layers: list[LayerCache]) -> Tensor:
        x = model.embedded(tokens[:, None], seen[:, None])
        return model.logits(in_turn(blocks, x, rotary, layers)[:, 0])

    def in_parts(run: Callable, size: int, layers: list[LayerCache]) -> Callable[[Tensor], Tensor]:
        parts = [slice(first, first + size) for first in range(0, config.n_layers, size)]
        bound, last = [Bound(run, blocks[part], rotary[part], layers[part]) for part in parts], Bound(head, model)

        def step(tokens: Tensor) -> Tensor:
            x = model.embedded(tokens[:, None], seen[:, None])
            for part in bound:
                x = part(x)
            return last(x[:, 0])

        return step

    def measured(way: Callable, plan: list[int]) -> tuple[float, float]:
        cache = KVCache(plan, 1, config.n_kv_heads, config.head_dim, config.dtype, subject.device, policy.scored)
        if len(set(plan)) > 1:  # one graph for all lengths
            for arena in (arena for layer in cache.layers for arena in layer.stored.parts()):
                torch._dynamo.maybe_mark_dynamic(arena, 2)
        with torch.inference_mode():
            started, run = time.perf_counter(), partial(way(cache.layers), tokens)
            if subject.device == "cuda":
                run = CudaGraphs()(run)
            run()
            synchronise(subject.device)
            return time.perf_counter() - started, 1e3 * seconds(run, subject.device)

    rng, (slots, plans) = random.Random(0), plans_of(subject, sizes)
    uneven = [plans(rng) for _ in range(2)]
    head = compiled(Transformer.logits)
    ways = {
        "one block": partial(in_parts, compiled(in_turn), 1),
        f"{GROUP} layers a graph": partial(in_parts, compiled(in_turn), GROUP),
        "whole step": partial(Bound, compiled(whole), blocks, rotary),
    }
    for name, way in ways.items():
        torch._dynamo.reset()
        even = [] if name == "whole step" else [[slots] * config.n_layers]
        result = attempt(lambda way=way, even=even: [measured(way, plan) for plan in (*even, *uneven)])
        if isinstance(result, str):
            yield dict(what=name, layers=config.n_layers, failed=result)
            continue
        *first, second, third = result
        times = dict(first_plan_s=first[0][0], ms_per_step=first[0][1]) if first else {}
        times |= dict(first_uneven_plan_s=second[0], next_uneven_plan_s=third[0], ms_per_step_uneven=third[1])
        yield dict(what=name, layers=config.n_layers) | times


def attending(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    for batch in sizes.batches:
        yield from attention.measure(subject.config, subject.device, batch)


STAGES: dict[str, Callable[[Subject, Sizes], Iterator[Row]]] = {
    "decode": decode,
    "throughput": throughput,
    "long": throughput,
    "batching": batching,
    "prefill": prefill,
    "switch": switch,
    "compile": compiling,
    "attention": attending,
}
NAMED_ONLY = {"cpu": ("long", "batching", "attention"), "cuda": ()}  # stages that do not run by themselves
# Budgets in multiples of 16 slots: squeeze hands out such, and what is not aligned is slower on CUDA.
JOBS: dict[str, list[tuple[str, Sizes]]] = {
    "cpu": [
        ("decode", Sizes("embedded", 256, 256, rounds=5, budget=0.25)),
        ("decode", Sizes("smollm-135m", 32, 32, rounds=2, budget=0.25)),
        ("decode", Sizes("smollm-135m:bf16", 8, 8, rounds=2, budget=0.5)),  # slow without instructions for it
        ("throughput", Sizes("embedded", batches=(1, 4, 16, 32), rounds=2)),
        ("long", Sizes("embedded", 1536, batches=(1, 4), rounds=1, budget=192)),
        ("batching", Sizes("embedded", 256, 64, batches=(32,))),
        ("prefill", Sizes("embedded", batches=(1, 8), rounds=9)),
        ("switch", Sizes("embedded", new=16)),
        ("compile", Sizes("embedded")),
        ("attention", Sizes("embedded", batches=(1, 16))),
    ],
    "cuda": [
        ("decode", Sizes("llama-3.1-8b", 256, 128, batches=(1, 16), rounds=2, budget=96)),
        ("throughput", Sizes("mistral-7b", new=1024, batches=(1, 32), rounds=1, budget=320)),
        ("long", Sizes("mistral-7b", 8192, 512, batches=(), rounds=1, budget=1024)),
        ("batching", Sizes("mistral-7b", 2048, 512, batches=(256,), budget=512)),
        ("prefill", Sizes("mistral-7b", 2048, batches=(1, 8), rounds=5, budget=416)),
        ("switch", Sizes("mistral-7b", 496, 16, budget=0.25)),
        ("compile", Sizes("mistral-7b")),
        ("attention", Sizes("mistral-7b", batches=(1, 32, 128))),
    ],
}


# ---- what they share


def ours(engine: Engine, prompts: list[list[int]], new: int, stop_after: int | None = None) -> Run:
    stop = None if stop_after is None else lambda tokens: len(tokens) >= stop_after
    requests = [Request(ids, new, stop=stop) for ids in prompts]
    before = reset_peak(engine.device.type)
    done = {id(completion.request): completion for completion in engine.generate(requests)}
    completions = [done[id(request)] for request in requests]
    figures = completions[0].figures
    step_s = figures.decode_s * len(prompts) / figures.decode_tokens if figures.decode_tokens else math.nan
    tokens, peak = [completion.tokens for completion in completions], peak_bytes(engine.model, before)
    return Run(figures.prefill_s, figures.compile_s, step_s, tokens, figures.plan, figures.kv_bytes, peak)


def alone(engine: Engine, prompts: list[list[int]], new: int, stop_after: int | None = None) -> Run:
    """`ours`, after which a CUDA device holds no cache and no graph of the engine: the next one has all the memory.

    So each turn captures anew; that is neither prefill nor decoding (`Figures.compile_s`). But a capture hands idle
    memory back to the driver, where the next prefill has to fetch it; the stage `prefill`, eager, is free of that.
    """
    try:
        return ours(engine, prompts, new, stop_after)
    finally:
        if engine.device.type == "cuda":
            engine.store = Store()
            if engine.code.capture:
                engine.code.capture.pool = torch.cuda.graph_pool_handle()  # of the old one no graph is left
            gc.collect()


def theirs(subject: Subject, way: str, prompts: list[list[int]], new: int) -> Run:
    return getattr(subject.peer, way)(prompts, new)


def row(subject: Subject, what: str, prompts: list[list[int]], new: int, runs: list[Run] | str) -> Row:
    """What the tables say about the runs of one contestant; the first one is the warm-up."""
    batch, prompt = len(prompts), len(prompts[0])
    names = dict(what=what, batch=batch, prompt_tokens=prompt, new_tokens=new)
    timed = [] if isinstance(runs, str) else [run for run in runs[1:] if not math.isnan(run.step_s)]
    if not timed:
        return names | dict(failed=runs if isinstance(runs, str) else "it compiles in every turn")
    steps, first = [1e3 * run.step_s for run in timed], median(run.prefill_s for run in timed)
    step = median(steps) / 1e3
    slots = roofline.valid_slots(timed[-1].plan, prompt, new)
    least, read = (f(subject.model, batch, slots) for f in (roofline.step_seconds, roofline.step_bytes))
    return names | dict(
        ms_per_step=1e3 * step,
        ms_min=min(steps),
        ms_max=max(steps),
        tokens_per_s=batch / step,
        tokens_per_s_with_prefill=batch * new / (first + step * (new - 1)),
        first_token_ms=1e3 * first,
        compile_s=runs[0].compile_s,
        slots=sum(timed[-1].plan),
        kv_bytes=timed[-1].kv_bytes,
        peak_bytes=max((run.peak_bytes for run in timed if run.peak_bytes is not None), default=None),
        roofline_ms=1e3 * least,
        of_roofline=least / step,
        of_copy_rate=read / step / roofline.copy_rate(subject.device),
    )


def compared(rows: list[Row], bases: list[str], key: str = "tokens_per_s") -> list[Row]:
    """Adds to each row how many times as fast it is as each of `bases`."""
    speeds = {base["what"]: base[key] for base in rows if base["what"] in bases and key in base}
    return [row | ({"times": {b: row[key] / s for b, s in speeds.items()}} if key in row else {}) for row in rows]


def profile(subject: Subject, sizes: Sizes, compiled: bool, steps: int = 16) -> Row:
    """Adds to the report the operators of `steps` warm decode steps by time: eager, or compiled and on CUDA captured.

    shares: of the time of kernels on CUDA, of all time on a CPU (the profiler's own in it), by `KINDS`, as far as names
    tell. waits_per_step: what makes the host wait for the device, or a copy that does. Allowed is cudaEventSynchronize,
    once a step: the read-out of a token that was asked for `Engine.lag` steps before.
    """
    cuda = subject.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    if not cuda:
        torch._dynamo.reset()  # to compile again, with loops that tell the profiler their names
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        engine = Engine(subject.model, "streaming", "squeeze", sizes.budget, compile=compiled)
        stream = iter(engine.stream(subject.prompts(1, sizes.prompt)[0], max_new_tokens=3 * steps))
        for _ in zip(range(steps), stream, strict=False):
            pass
        with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function("steps"):
            for _ in zip(range(steps), stream, strict=False):
                pass

    averages, events = profiler.key_averages(), profiler.events()
    [span] = [e.time_range for e in events if e.name == "steps" and e.device_type == DeviceType.CPU]
    during = [e.name for e in events if span.start <= e.time_range.start <= span.end]  # not when the profiler ends
    waits = Counter(name for name in during if any(word in name.lower() for word in WAITS))
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent: Counter[str] = Counter()
    for each in averages:
        if each.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU) and not (cuda and each.key == "steps"):
            kinds = (kind for kind, words in KINDS.items() if any(word in each.key.lower() for word in words))
            spent[next(kinds, "other operators")] += getattr(each, key)

    what = "profile, compiled" if compiled else "profile, eager"
    table = averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
    sizes.profile.add(f"{what}: {steps} steps of {sizes.shape}\n{table}\n")
    shares = {kind: time_ / spent.total() for kind, time_ in spent.most_common()}
    return dict(what=what, steps=steps, shares=shares, waits_per_step={name: n / steps for name, n in waits.items()})


KINDS = {  # by words in their names; the first that fits
    "compiled code's calls": "torch-compiled compiledfxgraph torchdynamo aotdispatcher pregraph".split(),
    "python": ["steps"],
    "generated loops, products in them": ["cpp_fused"],
    "products, attention": "gemm gemv mm nvjet cutlass cublas splitk matmul attention softmax flash fmha".split(),
    "generated kernels": ["triton"],
}
WAITS = ("synchronize", "aten::item", "_local_scalar_dense", "pageable")


# ---- the command


def main(argv: list[str] | None = None) -> int:
    return guarded("bench.py", lambda: run(parse(argv)), "interrupted; --out has every row that was measured")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", action="append", choices=STAGES, help="what to measure (default: all); may be repeated")
    add("--shape", action="append", metavar="NAME[:DTYPE]", help=f"embedded, {', '.join(SHAPES)} or a config.json")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--prompt", type=positive, metavar="N", help="prompt tokens")
    add("--new", type=positive, metavar="N", help="new tokens")
    add("--batches", type=counts, metavar="1,8,32")
    add("--rounds", type=positive, metavar="N", help="timed turns after the one to warm up")
    add("--max-memory", type=float, metavar="GIB", help="throughput on CUDA: what the largest batch has to fit into")
    add("--out", type=Path, metavar="F.json", help="write the results there; stages that it already holds stay")
    add("--peers", type=peers, metavar="A,B", help=f"decode: transformers as {', '.join(PEERS)} (default: all)")
    add("--plot", type=Path, metavar="F.png", help="throughput: draw tokens per second over the batch")
    add("--profile", type=Path, metavar="F.txt", help="decode: write the operators of a step by time")
    args = parser.parse_args(argv)
    args.stage = args.stage or [name for name in STAGES if name not in NAMED_ONLY[args.device]]
    belongs = {"plot": THROUGHPUT, "peers": ("decode",), "profile": ("decode",)}
    belongs["max_memory"] = (*THROUGHPUT, "batching")
    for option, stages in belongs.items():
        if getattr(args, option) is not None and not set(stages) & set(args.stage):
            raise UserError(f"--{option.replace('_', '-')} belongs to --stage {' or '.join(stages)}")
    outputs = {"--out": args.out, "--plot": args.plot, "--profile": args.profile}
    outputs = {flag: path for flag, path in outputs.items() if path is not None}
    for flag, path in outputs.items():
        check_output(path, flag)
    shapes = [shape.partition(":")[0] for shape in args.shape or []]
    check_apart(outputs, {f"--shape {place(shape)}": shape for shape in shapes} | {"the embedded checkpoint": EMBEDDED})
    if args.plot is not None:
        check_picture(args.plot, "--plot")
    args.profile = args.profile and Report(args.profile)
    if args.max_memory is not None and not (0 < args.max_memory < math.inf and args.device == "cuda"):
        raise UserError(f"--max-memory must be positive, and needs --device cuda, not {args.max_memory}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available; there is cpu")
    return args


THROUGHPUT = ("throughput", "long")


def peers(text: str) -> tuple[str, ...]:
    for way in text.split(","):
        if way not in PEERS:
            raise argparse.ArgumentTypeError(f"{shown(way)} is none of {', '.join(PEERS)}")
    return tuple(text.split(","))


def counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def chosen(args: argparse.Namespace) -> list[tuple[str, Sizes]]:
    """The jobs that the command asks for. UserError for what cannot be, before anything runs."""
    jobs = [(stage, sizes) for stage, sizes in JOBS[args.device] if stage in args.stage]
    if args.shape:
        first = dict(reversed(jobs))
        jobs = [(stage, first[stage]._replace(shape=shape)) for stage in dict(jobs) for shape in args.shape]
    given = {key: getattr(args, key) for key in ("prompt", "new", "batches", "rounds", "peers", "profile")}
    given = {key: value for key, value in given.items() if value is not None}
    jobs = [(stage, sizes._replace(**given)) for stage, sizes in jobs]
    for _, sizes in jobs:
        limit = ModelConfig.from_hf(published(sizes.shape)[0]).max_positions
        if sizes.prompt + sizes.new > limit:
            wanted = f"{sizes.prompt} prompt + {sizes.new} new tokens"
            raise UserError(f"{wanted} exceed the {limit} positions of {cut(sizes.shape)}; shorten them")
    return jobs


def run(args: argparse.Namespace) -> int:
    jobs, result = chosen(args), {"stages": {}}
    if args.out is not None and args.out.exists():
        where = f"--out {place(args.out)} holds no results of a benchmark (name another)"
        result = check_stages(parse_json(read_bytes(args.out), where), where)
    done: Row = {}
    # Contestants share the code that is compiled; an empty cache makes first compilations what they are.
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
    ):
        for stage, sizes in jobs:
            started, rate = time.perf_counter(), roofline.copy_rate(args.device)
            record = done.setdefault(stage, {**origin(args.device), "seconds": 0.0, "copy_bytes_per_s": rate})
            with explained(lambda shape=sizes.shape: f"out of memory: the weights of {cut(shape)} do not fit"):
                subject = make(sizes.shape, args.device)
            dtype = str(subject.config.dtype).removeprefix("torch.")
            rates = record.setdefault("matmul_operations_per_s", {})
            rates[dtype] = roofline.matmul_rate(args.device, subject.config.dtype)
            torch._dynamo.reset()
            seconds_before = record["seconds"]
            for each in rows_of(stage, subject, sizes._replace(memory=memory(args))):
                tqdm.write(f"{stage:10} {sizes.shape:16} {readable(each)}")
                rows = record.setdefault("rows", [])
                rows.append({"shape": sizes.shape.split(":")[0], "dtype": dtype} | rounded(each))
                record["seconds"] = seconds_before + time.perf_counter() - started
                result["stages"][stage] = rounded(record)
                if args.out is not None:
                    write_json(args.out, result, indent=1)
            del subject  # before the next one is made
            if args.device == "cuda":
                gc.collect()
    if args.plot is not None:
        plot(result["stages"], args.plot)
    print(json.dumps(result, allow_nan=False))
    return 0


def rows_of(stage: str, subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """The rows of a stage; an error outside of its contestants ends the stage with a row, but not the run."""
    rows = STAGES[stage](subject, sizes)
    while (each := attempt(lambda: next(rows, None))) is not None:
        yield dict(what=stage, failed=each) if isinstance(each, str) else each


def memory(args: argparse.Namespace) -> int | None:
    """Bytes that may be used, and no more from now on; None on a CPU."""
    if args.device != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    free = int(0.98 * (free + torch.cuda.memory_reserved()))  # what the driver and fragments take
    limit = free if args.max_memory is None else min(free, int(args.max_memory * GIB))
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return limit


def readable(row: Row) -> str:
    parts = []
    for name, value in row.items():
        if isinstance(value, dict):
            parts += [f"{number(times)} x {what}" for what, times in value.items()]
        elif name == "what":
            parts.append(f"{value:30}")
        elif value is not None:
            parts.append(f"{name} {number(value)}")
    return "  ".join(parts)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rounded(value: Any) -> Any:
    """Five digits, which is more than any of this is good for."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def plot(stages: dict[str, Any], file: Path) -> None:
    """Tokens per second over the batch, one picture per stage and shape; a cross where memory ran out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures: dict[str, list[Row]] = {}
    for name in THROUGHPUT:
        for row in stages.get(name, {"rows": []})["rows"]:
            if "batch" in row and "largest" not in row["what"]:
                title = f"{row['shape']}, {row['dtype']}, {row['prompt_tokens']} + {row['new_tokens']} tokens"
                pictures.setdefault(title, []).append(row)
    if not pictures:
        return
    figure, axes = plt.subplots(1, len(pictures), figsize=(6 * len(pictures), 4), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[0], pictures.items(), strict=True):
        for what in dict.fromkeys(row["what"] for row in rows):
            own = sorted((row for row in rows if row["what"] == what), key=lambda row: row["batch"])
            fits = [row for row in own if "failed" not in row]
            speeds = [row["tokens_per_s"] for row in fits]
            (drawn,) = axis.plot([row["batch"] for row in fits], speeds, "o-", label=what)
            failed = [row["batch"] for row in own if row.get("failed") == OUT_OF_MEMORY]
            axis.plot(failed, [speeds[-1] if speeds else 0] * len(failed), "X", color=drawn.get_color(), markersize=10)
        axis.set(title=title, xlabel="batch (X: out of memory)", ylabel="tokens/s")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.legend()
    write_whole(file, lambda out: figure.savefig(out, dpi=110, format=file.suffix[1:]))
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
