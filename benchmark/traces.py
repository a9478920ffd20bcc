"""Traces for scripts/race.py: when each token came, and which tokens each layer held then.

A contestant runs in a process of its own, several times at the same request: eagerly, for the peak of memory; to warm
up and compile; for the times, with nothing but a clock beside it, of which the fastest run counts; and once more to see
what it holds, which takes time.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import chat
import checkpoint
import machine
import tokenizer as tokenizers
from benchmark.record import origin, portable
from benchmark.subjects import Subject
from commandline import compiling
from engine import Engine, Request
from errors import UserError, place
from prefill import Held
from sampling import GREEDY
from tokenizer import TextStream, Tokenizer

WARM_UP = 8  # tokens, of which the first ones compile
RUNS = 5  # of which the fastest counts


class Asked(NamedTuple):
    """The same for all contestants; it goes into their processes."""

    checkpoint: str
    device: str
    ids: list[int]
    new: int
    eos_ids: Collection[int]
    threads: int | None = None

    def request(self) -> Request:
        return Request(self.ids, self.new, eos_ids=self.eos_ids)


class Pass(NamedTuple):
    """One run: tokens; seconds from the start until each layer had read the prompt, and until each token came."""

    tokens: list[int]
    read: list[float]
    came: list[float]
    kv_bytes: int
    plan: list[int] | None = None
    compile_s: float = 0.0


def trace(path: Path, device: str, prompt: str, new: int, budget: float, threads: int | None) -> dict[str, Any]:
    """All contestants on the checkpoint. prompt: what the user of a chat says, or a text to be continued."""
    machine.use_threads(threads)
    folder = checkpoint.resolve(path)
    tokenizer = tokenizers.load(folder)
    if tokenizer is None:
        raise UserError(f"{place(path)} has no tokenizer; its words cannot be shown")
    template = chat.load(folder, tokenizer)
    ids = template.prompt([{"role": "user", "content": prompt}]) if template else tokenizer.encode(prompt)
    asked = Asked(str(path), device, ids, new, tokenizers.eos_ids(folder, tokenizer, template is not None), threads)
    cache = {"policy": "dropkv", "layers": "perturbation", "budget": budget}
    contestants = measured(
        {
            ("transformers", "generate(): the cache grows by every token"): (Peer, asked),
            ("full cache", "ours, compiled: every token in every layer"): (Ours, asked, {}),
            (f"squeezed to {budget:.0%}", "ours, compiled: perturbation x dropkv"): (Ours, asked, cache),
        }
    )
    for own in contestants:
        own["words"] = words(tokenizer, own.pop("tokens"), named=False)
    config = checkpoint.outline(folder, dtype_on(device))[0]
    about = {"checkpoint": portable(str(path)), "dtype": str(dtype_on(device)).removeprefix("torch.")}
    about |= {"prompt_tokens": len(ids), "heads": config.n_kv_heads, "words": words(tokenizer, ids)}
    about["runs"] = RUNS
    return origin(device) | about | {"contestants": contestants}


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def words(tokenizer: Tokenizer, ids: Sequence[int], named: bool = True) -> list[str]:
    """The text of each token, that of a character with its last token; special tokens by name, if `named`."""
    names = {i: name for name, i in tokenizer.special_ids.items()} if named else {}
    text = TextStream(tokenizer, continues=True)
    return [names.get(token) or text.push(token) for token in ids]


# ---- contestants, each in a process of its own


def measured(contestants: dict[tuple[str, str], tuple]) -> list[dict[str, Any]]:
    """They take turns, so that what else the machine does meets them all. By name and about: class and arguments."""
    with ExitStack() as until:
        processes = []
        for made in contestants.values():
            process = until.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            process.submit(enter, *made).result()
            processes.append(process)
        turns = [[process.submit(take_turn).result() for process in processes] for _ in range(RUNS)]
        fastest = [min(own, key=lambda run: run.came[-1]) for own in zip(*turns, strict=True)]
        found = [process.submit(leave, run).result() for process, run in zip(processes, fastest, strict=True)]
    return [{"name": name, "about": about} | own for (name, about), own in zip(contestants, found, strict=True)]


entered: list["Ours | Peer"] = []  # in a contestant's process: itself


def enter(kind: type["Ours | Peer"], *more: Any) -> None:
    entered.append(kind(*more))


def take_turn() -> Pass:
    return entered[0].run()


def leave(run: Pass) -> dict[str, Any]:
    """All about the run, which was one of its own."""
    own = entered[0]
    return described(own.subject, own.asked, run, own.frames(run), own.peak)


class Ours:
    """cache: arguments of an Engine."""

    def __init__(self, asked: Asked, cache: dict[str, Any]):
        self.asked, self.subject = asked, subject_of(asked)
        model, request = self.subject.model, asked.request()
        self.peak = peak_of(self.subject, lambda: timed(Engine(model, **cache), request, stop=WARM_UP))
        self.engine = Engine(model, compile=True, **cache)
        with compiling(True, "and ours are compiled here"):
            self.compile_s = timed(self.engine, request, stop=WARM_UP).compile_s

    def run(self) -> Pass:
        return timed(self.engine, self.asked.request())._replace(compile_s=self.compile_s)

    def frames(self, run: Pass) -> list[list[int]]:
        return observed(self.engine, self.asked.ids, self.asked.new, len(run.tokens))


class Peer:
    """transformers' generate(), which holds every token in every layer."""

    def __init__(self, asked: Asked):
        self.asked, self.subject = asked, subject_of(asked)
        assert self.subject.transformers.hf  # made before anything is measured
        self.peak = peak_of(self.subject, lambda: transformers(self.subject, asked, WARM_UP))

    def run(self) -> Pass:
        return transformers(self.subject, self.asked, self.asked.new)

    def frames(self, run: Pass) -> list[list[int]]:
        layers, prompt, heads = range(len(run.read)), len(self.asked.ids), self.subject.model.config.n_kv_heads
        found = [[layer, 1, 0, prompt, heads] for layer in layers]
        for count in range(len(run.came)):  # the first token comes from the prompt, each later one from that before
            added = ([layer, 1, prompt + count - 1, 1, heads] for layer in layers)
            found.append([number for part in added for number in part] if count else [])
        return found


def subject_of(asked: Asked) -> Subject:
    machine.use_threads(asked.threads)
    folder = checkpoint.resolve(asked.checkpoint)
    model, _ = checkpoint.load(folder, asked.device, dtype_on(asked.device))
    return Subject(tokenizers.read_json(folder / "config.json"), model)


def described(subject: Subject, asked: Asked, run: Pass, frames: list[list[int]], peak: int) -> dict[str, Any]:
    first, last, config = run.came[0], run.came[-1], subject.model.config
    decode_s = last - first
    return {
        "tokens": run.tokens,
        "read_ms": [round(1e3 * moment, 1) for moment in run.read],
        "times_ms": [round(1e3 * moment, 1) for moment in run.came],
        "first_token_s": round(first, 3),
        "tokens_per_s": round((len(run.came) - 1) / decode_s, 2) if decode_s else None,
        "kv_bytes": run.kv_bytes,
        "slot_bytes": 2 * config.n_kv_heads * config.head_dim * config.dtype.itemsize,  # K and V of a layer's slot
        "peak_bytes": peak,
        "compile_s": round(run.compile_s, 1),
        "plan": run.plan,
        "frames": frames,
    }


# ---- runs


def timed(engine: Engine, request: Request, stop: int | None = None) -> Pass:
    """stop: after so many tokens, in a batch that is as long as the whole request."""
    read, came, keep = [], [], Held.keep

    def clocked(held: Held, evidence: Tensor | None, parts: list) -> None:
        keep(held, evidence, parts)
        read.append(time.perf_counter())

    with patch.object(Held, "keep", clocked), engine.batch(1, request.length, [GREEDY]) as batch:
        started = time.perf_counter()
        completion = batch.add(request)
        while batch.busy and len(came) != stop:
            batch.step()
            came += [time.perf_counter() for _ in batch.collect()]
        figures, tokens = batch.figures, completion.tokens
        plan, kv_bytes, compile_s = figures.plan, figures.kv_bytes, figures.compile_s
    since = [[moment - started for moment in moments] for moments in (read, came)]
    return Pass(tokens, *since, kv_bytes, plan, compile_s)


def transformers(subject: Subject, asked: Asked, new: int) -> Pass:
    """As a user calls it, with a hook on each layer while the prompt is read."""
    from transformers import DynamicCache
    from transformers.generation.streamers import BaseStreamer

    hf, read, came, hooks = subject.transformers.hf, [], [], []

    class Clock(BaseStreamer):
        """`generate` puts the prompt into it, then each token."""

        def put(self, value: Tensor) -> None:
            came.append(time.perf_counter())

        def end(self) -> None:
            pass

    def layer_done(*_: Any) -> None:
        read.append(time.perf_counter())
        hooks.pop(0).remove()

    hooks += [layer.register_forward_hook(layer_done) for layer in hf.get_decoder().layers]
    cache, ids = DynamicCache(config=hf.config), torch.tensor([asked.ids], device=subject.device)
    options = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=sorted(asked.eos_ids) or None)
    started = time.perf_counter()
    with torch.inference_mode():
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=Clock(), **options)
    since = [[moment - started for moment in moments] for moments in (read, came[1:])]
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return Pass(out[0, ids.shape[1] :].tolist(), *since, kv_bytes)


# ---- what is held


def observed(engine: Engine, ids: list[int], new: int, count: int) -> list[list[int]]:
    """A frame after each layer that is read, and one for each token: what has changed in what the layers hold.

    new: tokens that there is room for, as in the run that is watched; count: those that came, an end of sequence last.
    """
    config, keep, length = engine.model.config, Held.keep, len(ids) + new
    known = [torch.zeros(length, dtype=torch.int64) for _ in range(config.n_layers)]
    frames: list[list[int]] = []

    def changed(layers: Sequence[Tensor]) -> list[int]:
        frame = []
        for layer, positions in enumerate(layers):
            before, known[layer] = known[layer], holders(positions, config.n_kv_heads, length)
            if runs := changes(before, known[layer]):
                frame += [layer, len(runs) // 3, *runs]
        return frame

    def look_at_prompt(held: Held, evidence: Tensor | None, parts: list) -> None:
        keep(held, evidence, parts)
        prompts = [own[0][1] for own in held.layers]
        every = torch.arange(len(ids))[None]
        frames.append(changed([every if one.positions is None else one.positions[0].cpu() for one in prompts]))

    def look(tokens: list[int]) -> bool:
        frames.append(changed(batch.held(completion)))
        return len(tokens) == count

    with patch.object(Held, "keep", look_at_prompt), engine.batch(1, length, [GREEDY]) as batch:
        batch.lag = 0  # what is held is that of the latest token
        completion = batch.add(Request(ids, new, stop=look, watched=True))
        while batch.busy:
            batch.step()
            batch.collect()
    return frames


def holders(positions: Tensor, heads: int, length: int) -> Tensor:
    """How many heads hold each position [length], of what they hold [1 or K, n]."""
    counts = torch.bincount(positions.flatten(), minlength=length)
    return counts * (heads // len(positions))


def changes(before: Tensor, after: Tensor) -> list[int]:
    """Where they differ, as runs of first position, length, and how many heads hold it after."""
    at = (before != after).nonzero().flatten()
    if not len(at):
        return []
    values = after[at]
    breaks = (at.diff() != 1) | (values.diff() != 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), breaks.nonzero().flatten() + 1))
    lengths = torch.cat((starts, torch.tensor([len(at)]))).diff()
    return torch.stack((at[starts], lengths, values[starts]), dim=1).flatten().tolist()


# ---- memory


def peak_of(subject: Subject, run: Callable[[], Any]) -> int:
    """The most memory that tensors take on top of the model in a second run: the first one leaves something behind."""
    run()
    gc.collect()
    if subject.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))
