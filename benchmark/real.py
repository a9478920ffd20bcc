"""The stage `real`: a real model at four precisions, llama.cpp beside us on the same GGUF file.

What takes long to read is read once by each contestant: its turns go on from each other, a few tokens each.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

import prefill
from benchmark.peers import PEERS
from benchmark.race import Contestant, Row, Sizes, race
from benchmark.stages import alike, going_on, ours, random_plan
from benchmark.subjects import Subject
from engine import Engine
from errors import UserError, place
from files import accessing
from policies.layers import Perturbation
from policies.tokens import DropKV
from request import Request
from sampling import GREEDY

FILE = Path(__file__).resolve().parent.parent / "checkpoints" / "real" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the GGUF file holds, its number in general.file_type, and our dtype and --weights.
PRECISIONS = {"F32": (0, "fp32", "auto"), "BF16": (32, "bf16", "auto"), "Q8_0": (7, "bf16", "int8")}
PRECISIONS |= {"Q4_0": (2, "bf16", "int4")}
NAMES = {("fp32", "auto"): "float32", ("bf16", "auto"): "bf16", ("bf16", "int8"): "8 bit", ("bf16", "int4"): "4 bit"}
# Tokens before those that are timed. To read long ones takes most of the time, so not all are read at each precision.
CONTEXTS = {"float32": (512, 4096), "bf16": (512, 4096, 8000), "8 bit": (512, 4096), "4 bit": (512,)}
SHORT, LONG = 512, 4096  # of which the time to the first token is measured; where small caches are compared too
NEW, STEPS = 160, 24  # tokens that there is room for, and those of a turn
ROWS, PROMPT, ANSWER, ROW_STEPS = 8, 1024, 256, 8  # of the picture
SMALL = ("dropkv", "perturbation")


def jobs(source: Path) -> list[tuple[str, Sizes]]:
    """One of each precision. UserError unless there is such a file."""
    with accessing(source):
        if not source.is_file():
            raise UserError(f"--real: there is no {place(source)}; get it with python scripts/get_model.py smollm2")
    made = {kind: written(source, kind) for kind in tqdm(PRECISIONS, "writing GGUF files", leave=False)}
    return [
        ("real", Sizes(str(made[kind]), SHORT, NEW, dtype=dtype, weights=weights))
        for kind, (_, dtype, weights) in PRECISIONS.items()
    ]


def written(source: Path, kind: str) -> Path:
    """The model of a GGUF file with all its matrices of this kind, as a file beside it, unless that is there."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

    target = source.with_name(f"{source.stem}.{kind}.gguf")
    if target.exists():
        return target
    reader, own = GGUFReader(source), ("general.architecture", "general.file_type", "general.quantization_version")
    with TemporaryDirectory(dir=source.parent) as folder:
        writer = GGUFWriter(part := Path(folder) / target.name, reader.fields[own[0]].contents())
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in own:
                main, sub = field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), main, sub)
        writer.add_quantization_version(2)
        writer.add_file_type(PRECISIONS[kind][0])
        for tensor in reader.tensors:
            numbers, form = dequantize(tensor.data, tensor.tensor_type).astype(np.float32), GGMLQuantizationType[kind]
            form = form if numbers.ndim > 1 else GGMLQuantizationType.F32  # as llama.cpp's own tool does
            writer.add_tensor(tensor.name, quantize(numbers, form), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, target)
    return target


def real(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    precision = NAMES[sizes.dtype, sizes.weights]
    for job in (decode, rows, read, evidence, parts):
        for row in job(subject, sizes, precision):
            row.pop("tokens_per_s_with_prefill", None)
            yield dict(job=job.__name__, precision=precision) | row


def decode(subject: Subject, sizes: Sizes, precision: str) -> Iterator[Row]:
    """One request at each context; at the long one small caches too, of equal layers and of others."""
    for context in CONTEXTS[precision]:
        engines: dict[str, dict[str, Any]] = {"full": {}}
        if context == LONG and precision in ("float32", "8 bit"):
            engines |= small("dropkv x perturbation", 0.2) | small("streaming x uniform", 0.2)
        if context == LONG and precision == "float32":
            slots, layers = int(0.2 * (context + sizes.new)), subject.model.config.n_layers
            plan = random_plan(random.Random(0), layers, slots)
            engines |= small("dropkv x uniform", 0.2)
            engines["streaming x random plan 20%"] = dict(policy="streaming", plan=plan)
        yield from beside_llama(subject, engines, 1, sizes._replace(prompt=context), STEPS)


def rows(subject: Subject, sizes: Sizes, precision: str) -> Iterator[Row]:
    """Several requests together, with the full cache and with small ones; in bf16 also of 8 bits a number."""
    if precision == "4 bit":
        return
    sizes = sizes._replace(prompt=PROMPT, new=ANSWER)
    engines = {"full": {}} | small("dropkv x perturbation", 0.2) | small("dropkv x perturbation", 0.4)
    yield from beside_llama(subject, engines, ROWS, sizes, ROW_STEPS)
    if precision == "bf16":
        engines = {f"{name}, int8 cache": options | dict(cache_format="int8") for name, options in engines.items()}
        yield from beside_llama(subject, engines, ROWS, sizes, ROW_STEPS, peer=False)


def small(pair: str, budget: float) -> dict[str, dict[str, Any]]:
    policy, layers = pair.split(" x ")
    return {f"{pair} {budget:.0%}": dict(policy=policy, layers=layers, budget=budget)}


def beside_llama(
    subject: Subject, engines: dict[str, dict[str, Any]], batch: int, sizes: Sizes, steps: int, peer: bool = True
) -> Iterator[Row]:
    """Turns of so many steps, compiled. times: as fast as llama.cpp, and as the first of ours, the full cache."""
    with ExitStack() as until:
        contestants = [Contestant("llama.cpp", subject.llama_cpp.going_on(steps))] if peer else []
        for name, options in engines.items():
            engine = Engine(subject.model, compile=True, **options)
            contestants.append(Contestant(name, going_on(engine, steps, until)))
        bases = ["llama.cpp", next(iter(engines))]
        yield from race(subject, contestants, alike(subject, batch, sizes), sizes, bases)


def read(subject: Subject, sizes: Sizes, precision: str) -> Iterator[Row]:
    """Time to the first token, nothing compiled. Of long prompts it is that of the first turn of `decode`."""
    own = sizes._replace(prompt=SHORT, new=1, rounds=5)
    contestants = [PEERS["llama.cpp"](subject), ours(subject, "full", compile=False)]
    yield from race(subject, contestants, alike(subject, 1, own), own, ["llama.cpp"], "prompt_tokens_per_s")


def evidence(subject: Subject, sizes: Sizes, precision: str) -> Iterator[Row]:
    """What of the time to the first token is spent in finding out which layer and which token deserves a slot."""
    if precision != "float32":
        return
    spent: dict[str, float] = {}

    def clocked(name: str, function: Callable) -> Callable:
        def call(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **named)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return call

    contestant = ours(subject, " x ".join(SMALL), *SMALL, 0.2, compile=False)
    requests = alike(subject, 1, sizes._replace(prompt=LONG, new=1))
    with (
        patch.object(prefill, "importance", clocked("importance", prefill.importance)),
        patch.object(Perturbation, "measure", clocked("evidence", Perturbation.measure)),
        patch.object(DropKV, "score_prompt", clocked("scores", DropKV.score_prompt)),
    ):
        prefill_s = contestant.generate(requests).prefill_s
    yield dict(what=contestant.name, prompt_tokens=LONG, first_token_ms=1e3 * prefill_s) | {
        f"{name}_share": seconds / prefill_s for name, seconds in spent.items()
    }


def parts(subject: Subject, sizes: Sizes, precision: str) -> Iterator[Row]:
    """Where the time of a compiled step goes, with hardly any cache and with a longer one."""
    model, engine = subject.model, Engine(subject.model, compile=True)
    for context in (8, SHORT, LONG // 2):
        with engine.batch(1, context + sizes.new, [GREEDY]) as batch, torch.inference_mode():
            batch.add(Request(subject.prompts(1, context)[0], sizes.new))
            for _ in range(4):
                batch.step()
            decoder, spent = batch.decoder, []
            for _ in range(STEPS):
                clock = [time.perf_counter()]
                x = model.embedded(decoder.tokens[:, None], decoder.seen[:, None]).to(decoder.stream)
                clock.append(time.perf_counter())
                for block in decoder.blocks:
                    x = block(x)
                clock.append(time.perf_counter())
                logits = decoder.head(x[:, 0])
                clock.append(time.perf_counter())
                decoder.sampler(logits)
                clock.append(time.perf_counter())
                spent.append([1e3 * (end - start) for start, end in pairwise(clock)])
        names = ("embedding_ms", "blocks_ms", "head_ms", "sampling_ms")
        yield dict(what="step", prompt_tokens=context) | dict(zip(names, np.median(spent, 0).tolist(), strict=True))
