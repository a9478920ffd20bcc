"""How fast is it here: against transformers, against the full cache and against what the machine could do at most.

    python bench.py                                          every stage, at sizes that suit the device (`JOBS`)
    python bench.py --stage decode --shape llama-3.1-8b      one stage, one shape; both may be repeated
    python bench.py --device cpu --real                      a real model at four precisions, beside llama.cpp
    python bench.py --stage throughput --out results/bench.json --plot results/throughput.png

The stages are in benchmark/stages.py, those that we are compared with in benchmark/peers.py.

Shapes are published ones with random weights, made on the device without a download, any config.json, and `embedded`,
the checkpoint that comes along. All contestants of a stage run in one process on the same weights and take turns, so
that a drifting machine hits all of them: one turn to warm up and compile, from an empty compiler cache, then `--rounds`
turns, of which the rows give the median and the extremes. Standard output has a line for each row, and everything as
JSON in the last one; --out has each row as soon as it is made. A contestant that fails is a row that says why, as
does a peer that is not installed. llama.cpp runs in a process of its own.

`peak_bytes`, on CUDA: the weights, and the most that was allocated during a turn on top of what lay there before.

`of_roofline`: the larger of bytes that a step must read over the rate of a large copy (bytes read plus written), and
its operations over the rate of a large matrix product, both measured in the same run, as a share of the step's time.
Weights that fit into a processor's cache can exceed 1.

On several ranks (torchrun) peers do not run, a failure ends all, and bytes are those of the first rank.
"""

from commandline import Parser, guarded, number, positive, thread_count  # first: Ctrl-C is one line from here on

# isort: split
import argparse
import gc
import json
import os
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from tqdm import tqdm

import parallel
from benchmark import real, roofline
from benchmark.peers import PEERS
from benchmark.picture import check_picture, draw, draw_real
from benchmark.race import Row, Sizes, attempt
from benchmark.record import Log, origin, portable
from benchmark.stages import STAGES
from benchmark.subjects import SHAPES, make, published
from checkpoint import DTYPES, EMBEDDED, find_device
from config import ModelConfig
from errors import UserError, cut, place
from files import check_apart, check_output
from formats import FORMATS
from machine import SHARE, free, use_threads
from sizing import check_budget

# Budgets in multiples of 16 slots: squeeze hands out such, and what is not aligned is slower on CUDA.
JOBS: dict[str, list[tuple[str, Sizes]]] = {
    "cpu": [
        ("decode", Sizes("embedded", 256, 256, rounds=5, budget=0.25)),
        ("prefill", Sizes("embedded", batches=(1, 8), rounds=9)),
        ("throughput", Sizes("embedded", batches=(1, 4, 16, 32), rounds=2)),
        ("batching", Sizes("embedded", 256, 64, batches=(32,))),
        ("chat", Sizes("embedded", 32, 96, batches=(160,), rounds=9, budget=512)),
        ("switch", Sizes("embedded", new=16)),
    ],
    "cuda": [
        ("decode", Sizes("llama-3.1-8b", 256, 128, batches=(1, 16), rounds=2, budget=96)),
        ("prefill", Sizes("mistral-7b", 2048, batches=(1, 8), rounds=5, budget=416)),
        ("throughput", Sizes("mistral-7b", new=512, batches=(1, 32), rounds=1, budget=208)),
        ("batching", Sizes("mistral-7b", 2048, 512, batches=(128,), rounds=1, budget=512)),
        ("chat", Sizes("mistral-7b", 32, 96, batches=(100,), rounds=5, budget=512)),
        ("switch", Sizes("mistral-7b", 496, 16, budget=0.25)),
    ],
}


def main(argv: list[str] | None = None) -> int:
    return guarded("bench.py", lambda: run(parse(argv)), "interrupted; --out has every row that was measured")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--stage", action="append", choices=STAGES, help="what to measure (default: all); may be repeated")
    add("--shape", action="append", metavar="NAME", help=f"embedded, {', '.join(SHAPES)}, a config.json or a GGUF file")
    add("--device", choices=devices, default=devices[-1])
    add("--threads", type=thread_count, metavar="N", help="of the CPU (default: what the process may use)")
    add("--dtype", choices=DTYPES, help="default: fp32 on the CPU, bf16 on CUDA")
    add("--prompt", type=positive, metavar="N", help="prompt tokens")
    add("--new", type=positive, metavar="N", help="new tokens")
    add("--batches", type=lambda text: [*map(positive, text.split(","))], metavar="N,N", help="rows, requests or turns")
    add("--rounds", type=positive, metavar="N", help="timed turns after the one to warm up")
    add("--budget", type=number, metavar="B", help="slots per layer, or a share of prompt + new tokens")
    add("--weights", choices=("auto", "int8", "int4"), help="how the weights are held (default: auto, as stored)")
    add("--cache-format", choices=FORMATS, help="how the cache is held (default: dense)")
    add(
        "--real",
        nargs="?",
        const=real.FILE,
        type=Path,
        metavar="F.gguf",
        help="a real model beside llama.cpp, with 1 GB of files made there",
    )
    add("--peer", dest="peers", action="append", choices=PEERS, help="default: generate and eager; may be repeated")
    add("--out", type=Path, metavar="F.json", help="write the results there; stages that it already holds stay")
    add("--plot", type=Path, metavar="F.png", help="throughput, or --real: draw tokens per second")
    args = parser.parse_args(argv)
    if args.real is not None:
        check_real(args)
    args.stage = args.stage or [*STAGES]
    if args.plot is not None and args.real is None and "throughput" not in args.stage:
        raise UserError("--plot belongs to --stage throughput or to --real")
    if args.budget is not None:
        check_budget(args.budget)
    outputs = {flag: path for flag, path in (("--out", args.out), ("--plot", args.plot)) if path is not None}
    for flag, path in outputs.items():
        check_output(path, flag)
    shapes = {f"--shape {place(shape)}": shape for shape in args.shape or []}
    check_apart(outputs, shapes | {"the embedded checkpoint": EMBEDDED})
    if args.plot is not None:
        check_picture(args.plot, "--plot")
    return args


def check_real(args: argparse.Namespace) -> None:
    """UserError for what --real decides itself."""
    told = "stage shape dtype prompt new batches budget weights cache_format peers".split()
    if given := next((name for name in told if getattr(args, name)), None):
        flag = {"peers": "peer"}.get(given, given).replace("_", "-")
        raise UserError(f"--real measures what it measures; --{flag} does not go with it")
    if args.device != "cpu":
        raise UserError("--real measures on a processor; add --device cpu")


def chosen(args: argparse.Namespace) -> list[tuple[str, Sizes]]:
    """The jobs that the command asks for. UserError for what cannot be, before anything runs."""
    jobs = real.jobs(args.real) if args.real else JOBS[args.device]
    jobs = [(stage, sizes) for stage, sizes in jobs if stage in args.stage or args.real]
    if args.shape:
        first = dict(reversed(jobs))
        jobs = [(stage, first[stage]._replace(shape=shape)) for stage in dict(jobs) for shape in args.shape]
    given = {key: value for key, value in vars(args).items() if key in Sizes._fields and key != "shape" and value}
    jobs = [(stage, sizes._replace(**given)) for stage, sizes in jobs]
    for _, sizes in jobs:
        limit = ModelConfig.from_hf(published(sizes.shape)).reach
        if sizes.prompt + sizes.new > limit:
            job = f"{sizes.prompt} prompt + {sizes.new} new tokens exceed the {limit} positions of {cut(sizes.shape)}"
            raise UserError(f"{job}; shorten them")
    return jobs


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    with parallel.ranks(args.device):
        if (own := parallel.shard()).world > 1 and (args.real or args.peers):
            raise UserError(f"--{'real' if args.real else 'peer'} runs on one rank; start it without torchrun")
        log = Log(args.out if own.rank == 0 else None)
        with (
            TemporaryDirectory(ignore_cleanup_errors=True) as cache,
            patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        ):
            measure(args, log)
    if own.rank:
        return 0
    if args.plot is not None:
        stage, picture = ("real", draw_real) if args.real else ("throughput", draw)
        picture(log.stages[stage]["rows"], args.plot)
    print(json.dumps({"stages": log.stages}, allow_nan=False))
    return 0


def measure(args: argparse.Namespace, log: Log) -> None:
    """Every job of the command, row by row."""
    jobs, stages, device = chosen(args), STAGES | {"real": real.real}, parallel.device(args.device)
    for stage, own in groupby(jobs, lambda job: job[0]):
        record = log.begin(stage, **origin(args.device), copy_bytes_per_s=round(roofline.copy_rate(args.device)))
        rates = record["matmul_operations_per_s"] = {}
        for _, sizes in own:
            dtype = DTYPES[sizes.dtype or ("bf16" if args.device == "cuda" else "fp32")]
            memory = 0
            if args.device == "cuda":  # what is reserved is free at this moment
                memory = int(SHARE * (free(find_device(device)) + torch.cuda.memory_reserved()))
            torch.compiler.reset()
            names = {"shape": portable(sizes.shape), "dtype": str(dtype).removeprefix("torch.")}
            defaults = {"weights": "auto", "cache_format": "dense"}
            names |= {key: getattr(sizes, key) for key in defaults if getattr(sizes, key) != defaults[key]}
            rates[names["dtype"]] = round(roofline.matmul_rate(args.device, dtype))
            subject = attempt(partial(make, sizes.shape, device, dtype, sizes.weights))
            sizes = sizes._replace(memory=min(parallel.told(memory)))
            if parallel.shard().world > 1:
                sizes = sizes._replace(peers=())
            rows = iter([subject]) if isinstance(subject, str) else stages[stage](subject, sizes)
            while (row := attempt(partial(next, rows, None))) is not None:
                row = {"what": stage, "failed": row} if isinstance(row, str) else row  # the stage itself has ended
                tqdm.write(f"{stage:10} {names['shape']:12} {row['what']:32} {readable(row)}")
                log.add(stage, names | row)
            del subject, rows  # before the next one is made
            gc.collect()


def readable(row: Row) -> str:
    cells = row | {f"times {base}": times for base, times in row.get("times", {}).items()}
    cells = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in cells.items()}
    shown = (name for name in cells if name not in ("what", "times") and not name.endswith(("_min", "_max")))
    return "  ".join(f"{name} {cells[name]}" for name in shown if cells[name] is not None)


if __name__ == "__main__":
    sys.exit(main())
