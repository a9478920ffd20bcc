"""How fast is it here: against transformers, against the full cache and against what the machine could do at most.

    python bench.py                                          every stage, at sizes that suit the device (`JOBS`)
    python bench.py --stage decode --shape llama-3.1-8b      one stage, one shape; both may be repeated
    python bench.py --stage throughput --out results/bench.json --plot results/throughput.png

The stages are in benchmark/stages.py, those that we are compared with in benchmark/peers.py.

Shapes are published ones with random weights, made on the device without a download, any config.json, and `embedded`,
the checkpoint that comes along. All contestants of a stage run in one process on the same weights and take turns, so
that a drifting machine hits all of them: one turn to warm up and compile, from an empty compiler cache, then `--rounds`
turns, of which the rows give the median and the extremes. Standard output has a line for each row, and everything as
JSON in the last one; --out has each row as soon as it is made. A contestant that fails is a row that says why.

`peak_bytes`, on CUDA: the weights, and the most that was allocated during a turn on top of what lay there before.

`of_roofline`: the larger of bytes that a step must read over the rate of a large copy (bytes read plus written), and
its operations over the rate of a large matrix product, both measured in the same run, as a share of the step's time.
Weights that fit into a processor's cache can exceed 1.
"""

from commandline import Parser, guarded, number, positive  # first: Ctrl-C is one line from here on

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

from benchmark import roofline
from benchmark.peers import PEERS
from benchmark.picture import check_picture, draw
from benchmark.race import Row, Sizes, attempt
from benchmark.record import Log, origin
from benchmark.stages import STAGES
from benchmark.subjects import SHAPES, make, published
from checkpoint import DTYPES, EMBEDDED
from config import ModelConfig
from errors import UserError, cut, place
from files import check_apart, check_output
from machine import SHARE, explained, free
from sizing import check_budget

# Budgets in multiples of 16 slots: squeeze hands out such, and what is not aligned is slower on CUDA.
JOBS: dict[str, list[tuple[str, Sizes]]] = {
    "cpu": [
        ("decode", Sizes("embedded", 256, 256, rounds=5, budget=0.25)),
        ("decode", Sizes("smollm-135m", 32, 32, rounds=2, budget=0.25)),
        ("decode", Sizes("smollm-135m", 8, 8, rounds=2, budget=0.5, dtype="bf16")),  # slow without instructions for it
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
    add("--shape", action="append", metavar="NAME", help=f"embedded, {', '.join(SHAPES)} or a config.json")
    add("--device", choices=devices, default=devices[-1])
    add("--dtype", choices=DTYPES, help="default: fp32 on the CPU, bf16 on CUDA")
    add("--prompt", type=positive, metavar="N", help="prompt tokens")
    add("--new", type=positive, metavar="N", help="new tokens")
    add("--batches", type=lambda text: [*map(positive, text.split(","))], metavar="N,N", help="rows, requests or turns")
    add("--rounds", type=positive, metavar="N", help="timed turns after the one to warm up")
    add("--budget", type=number, metavar="B", help="slots per layer, or a share of prompt + new tokens")
    add("--peer", dest="peers", action="append", choices=PEERS, help="default: generate and eager; may be repeated")
    add("--out", type=Path, metavar="F.json", help="write the results there; stages that it already holds stay")
    add("--plot", type=Path, metavar="F.png", help="throughput: draw tokens per second over the batch")
    args = parser.parse_args(argv)
    args.stage = args.stage or [*STAGES]
    if args.plot is not None and "throughput" not in args.stage:
        raise UserError("--plot belongs to --stage throughput")
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


def chosen(args: argparse.Namespace) -> list[tuple[str, Sizes]]:
    """The jobs that the command asks for. UserError for what cannot be, before anything runs."""
    jobs = [(stage, sizes) for stage, sizes in JOBS[args.device] if stage in args.stage]
    if args.shape:
        first = dict(reversed(jobs))
        jobs = [(stage, first[stage]._replace(shape=shape)) for stage in dict(jobs) for shape in args.shape]
    given = {key: value for key, value in vars(args).items() if key in Sizes._fields and key != "shape" and value}
    jobs = [(stage, sizes._replace(**given)) for stage, sizes in jobs]
    for _, sizes in jobs:
        limit = ModelConfig.from_hf(published(sizes.shape)).max_positions
        if sizes.prompt + sizes.new > limit:
            job = f"{sizes.prompt} prompt + {sizes.new} new tokens exceed the {limit} positions of {cut(sizes.shape)}"
            raise UserError(f"{job}; shorten them")
    return jobs


def run(args: argparse.Namespace) -> int:
    jobs, log = chosen(args), Log(args.out)
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        for stage, own in groupby(jobs, lambda job: job[0]):
            record = log.begin(stage, **origin(args.device), copy_bytes_per_s=round(roofline.copy_rate(args.device)))
            rates = record["matmul_operations_per_s"] = {}
            for _, sizes in own:
                dtype = DTYPES[sizes.dtype or ("bf16" if args.device == "cuda" else "fp32")]
                memory = 0
                if args.device == "cuda":  # what is reserved is free at this moment
                    memory = int(SHARE * (free(torch.device("cuda")) + torch.cuda.memory_reserved()))
                with explained(lambda shape=sizes.shape: f"out of memory: the weights of {cut(shape)} do not fit"):
                    subject = make(sizes.shape, args.device, dtype)
                torch.compiler.reset()
                names = {"shape": sizes.shape, "dtype": str(dtype).removeprefix("torch.")}
                rates[names["dtype"]] = round(roofline.matmul_rate(args.device, dtype))
                rows = STAGES[stage](subject, sizes._replace(memory=memory))
                while (row := attempt(partial(next, rows, None))) is not None:
                    row = {"what": stage, "failed": row} if isinstance(row, str) else row  # the stage itself has ended
                    tqdm.write(f"{stage:10} {sizes.shape:12} {row['what']:32} {readable(row)}")
                    log.add(stage, names | row)
                del subject, rows  # before the next one is made
                gc.collect()
    if args.plot is not None:
        draw(log.stages["throughput"]["rows"], args.plot)
    print(json.dumps({"stages": log.stages}, allow_nan=False))
    return 0


def readable(row: Row) -> str:
    cells = row | {f"times {base}": times for base, times in row.get("times", {}).items()}
    cells = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in cells.items()}
    shown = (name for name in cells if name not in ("what", "times") and not name.endswith(("_min", "_max")))
    return "  ".join(f"{name} {cells[name]}" for name in shown if cells[name] is not None)


if __name__ == "__main__":
    sys.exit(main())
