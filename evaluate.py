"""How good is a small cache? Compare token policies, layer policies and budgets with the full cache.

    python evaluate.py                                  the embedded model reads Python source; minutes
    python evaluate.py --checkpoint meta-llama/Llama-3.2-1B --text book.txt --budgets 0.2,0.4
    python evaluate.py --checkpoint ~/models/SmolLM2-135M-Instruct --text LongBench/data/multi_news.jsonl \\
        --tasks fidelity,passkey --policies snapkv,dropkv --layers "uniform,perturbation:where=last,queries=64"
    python evaluate.py --checkpoint ~/models/Mistral-7B-v0.3 --files LongBench/data/hotpotqa.jsonl --budgets 512,1024
    python evaluate.py --checkpoint ~/models/Qwen3-0.6B --lm-eval arc_easy --policies h2o --layers squeeze --budgets 64

Every combination of --policies, --layers and --budgets runs with the same total of slots as uniform has; the full cache
is always in the table. A policy's own options stand behind its name, as in snapkv:recent=32 or squeeze:p=0.5; words of
a list have , or ; between them, and a part such as queries=64 is one more option of the policy before it. Tasks:

    fidelity   KL and top-1 agreement of the next token's distribution with the full cache's, and perplexity, on a text
    passkey    a number of 7 digits hidden in a text, asked for through the chat template
    --files    LongBench, RULER, XSUM and CNN/DailyMail: jsonl files, or folders of them

--unseen compresses the text before the question about it is read, as a cache that is asked many times needs it. A
--text that is a jsonl file is read as documents, a piece of each; --skip leaves out those on which choices were made.

The folder --out gets predictions.jsonl (each result as it is made), summary.json, table.md and pictures. --resume goes
on where an earlier run was cut off. --beside puts results of another program into the table
(scripts/kvpress_compare.py).
"""

from commandline import (
    Parser,
    compiling,
    guarded,
    number,
    positive,
    thread_count,
)  # first: Ctrl-C is one line from here on

# isort: split
import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import chat
import checkpoint
import parallel
import tokenizer as tokenizers
from benchmark.record import origin, portable
from checkpoint import EMBEDDED
from errors import UserError, cut, optional, place, shown
from evaluation import standard, summary, tables, texts
from evaluation.cells import Batch, Cell, grid
from evaluation.fidelity import Fidelity
from evaluation.passkey import Passkey
from evaluation.tasks import Log, Task, check_all, run
from files import accessing, check_apart, check_folder, check_output, write_json, write_whole
from machine import explained, use_threads
from policies.layers import LAYER_POLICIES
from policies.options import words
from policies.tokens import TOKEN_POLICIES
from weights import WEIGHT_FORMATS

TASKS = ("fidelity", "passkey")
OUTPUTS = ("predictions.jsonl", "summary.json", "table.md", "frontier.png", "plans.png")  # in --out
SETTINGS = "skip texts read length lengths needles unseen rows batch device dtype".split()  # and paths: of each result
OUT_OF_MEMORY = "out of memory; use a smaller --batch or --dtype, or shorter prompts; --resume goes on"


def main(argv: list[str] | None = None) -> int:
    return guarded("evaluate.py", lambda: evaluate(parse(argv)), "interrupted; --resume goes on from here")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=str(EMBEDDED), help="Hugging Face folder, .gguf file or hub id (default: embedded)")
    add("--policies", type=words, default="snapkv,streaming,h2o", metavar="A,B", help=f"of {', '.join(TOKEN_POLICIES)}")
    add("--layers", type=words, default="uniform,perturbation", metavar="A,B", help=f"of {', '.join(LAYER_POLICIES)}")
    add("--budgets", type=listed(number), default="0.1,0.2,0.4", metavar="A,B", help="slots, or shares in (0, 1]")
    add("--tasks", type=listed(str), metavar="A,B", help=f"of {', '.join(TASKS)} (default: fidelity, or only --files)")
    add("--files", nargs="+", metavar="F", help="standard tasks; instead of --tasks, or with them")
    add("--lm-eval", type=listed(str), metavar="A,B", help="tasks of lm-eval instead, where that is installed")
    add("--text", metavar="F", help="UTF-8 or jsonl to read and to hide numbers in (default: Python source)")
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N documents of --text")
    add("--texts", type=positive, default=64, metavar="N", help="fidelity: how many pieces of the text")
    add("--read", type=positive, default=64, metavar="N", help="fidelity: tokens that follow each piece")
    add("--length", type=positive, default=1024, metavar="N", help="fidelity: tokens of a prompt")
    add("--lengths", type=listed(positive), default="256,512,1024", metavar="A,B", help="passkey: tokens of a prompt")
    add("--needles", type=positive, default=32, metavar="N", help="passkey: prompts of each length")
    add("--unseen", action="store_true", help="passkey, files: compress the text before the question is read")
    add("--rows", type=positive, metavar="N", help="files: the first N rows of each (default: all)")
    add("--batch", type=positive, default=16, metavar="N", help="rows that run together, with one plan (default: 16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="auto (the config's), bf16, fp16, fp32 or float64")
    add("--weights", choices=WEIGHT_FORMATS, default="auto", help="matrices as stored (default), or of 8 or 4 bits")
    add("--threads", type=thread_count, metavar="N", help="of the CPU (default: what the process may use)")
    add("--compile", action="store_true", help="compile the steps: faster where there are many of them")
    add("--out", type=Path, default=Path(__file__).parent / "runs" / "eval", metavar="DIR", help="(default: runs/eval)")
    add("--resume", action="store_true", help="keep the results that are in --out")
    add("--beside", metavar="F", help="results of another program on the same rows, for the table")
    args = parser.parse_args(argv)
    if args.tasks is None:
        args.tasks = [] if args.files else ["fidelity"]
    if unknown := [name for name in args.tasks if name not in TASKS]:
        raise UserError(f"unknown task {shown(unknown[0])}; known: {', '.join(TASKS)}")
    if args.unseen and not args.files and "passkey" not in args.tasks:
        raise UserError("--unseen is about questions; give --files, or --tasks passkey")
    if args.skip < 0 or args.skip and not args.text:
        raise UserError(f"--skip must be a number of documents of --text, not {shown(args.skip)}")
    return args


def listed(kind: Callable[[str], Any]) -> Callable[[str], list]:
    def parse_list(text: str) -> list:
        return [kind(part.strip()) for part in text.split(",")]

    parse_list.__name__ = f"list of {kind.__name__}s"
    return parse_list


def evaluate(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    with parallel.ranks(args.device):
        return run_cells(args)


def run_cells(args: argparse.Namespace) -> int:
    cells = grid(args.policies, args.layers, args.budgets)
    folder = checkpoint.resolve(args.checkpoint)
    tokenizer = tokenizers.load(folder)
    if tokenizer is None:
        raise UserError(f"{place(args.checkpoint)} has no tokenizer; evaluation reads text")
    if args.lm_eval:
        return harness(args, cells, tokenizer)
    check_paths(args, folder)
    optional("matplotlib")  # now and not after an hour
    from evaluation import pictures

    model, config = checkpoint.load(folder, parallel.device(args.device), args.dtype, args.weights)
    tasks = make_tasks(args, folder, tokenizer, config.reach)
    check_all(model, tasks, cells, args.batch)
    beside = {"beside": summary.beside(args.beside, tasks)} if args.beside else {}
    record = {**origin(args.device), "settings": settings(args, folder)}
    with accessing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / OUTPUTS[0], record["settings"], args.resume, tasks)
    try:
        with explained(lambda: OUT_OF_MEMORY), compiling(args.compile, "leave out --compile"):
            run(model, tasks, cells, log, args.batch, partial(Batch, compile=args.compile))
    finally:
        log.close()
    result = {**record, **summary.summarise(tasks, cells, log), **beside}
    if parallel.shard().rank:  # the first one writes
        return 0
    text = f"{tables.report(result)}\n"
    write_json(args.out / "summary.json", result)
    write_whole(args.out / "table.md", text)
    print(text)
    for path in pictures.draw(result, args.out):
        print(path)
    return 0


def settings(args: argparse.Namespace, folder: Path) -> dict:
    """What results depend on; the same wherever the project and its inputs lie."""
    paths = {"checkpoint": portable(str(folder)), "text": args.text and portable(args.text)}
    weights = {} if args.weights == "auto" else {"weights": args.weights}  # earlier results do not name it
    own = {name: getattr(args, name) for name in SETTINGS} | weights
    return paths | {"files": args.files and [*map(portable, args.files)]} | own


def check_paths(args: argparse.Namespace, folder: Path) -> None:
    """UserError unless the files in --out can be written and are no other paths of the run."""
    with accessing(args.out):
        there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--out {place(args.out)}: {place(there)} is no folder; name another")
    check_folder(there, "--out")
    outputs = {f"{name} in --out": args.out / name for name in OUTPUTS}
    for flag, path in outputs.items():
        if args.out.exists():
            check_output(path, flag)
    check_apart(outputs, inputs(args, folder))


def inputs(args: argparse.Namespace, folder: Path) -> dict[str, Path | str]:
    named = {"--checkpoint": folder, "--text": args.text, "--beside": args.beside}
    named |= {f"{place(path)} of --files": path for source in args.files or [] for path in standard.paths(source)}
    return {flag: path for flag, path in named.items() if path}


def make_tasks(args: argparse.Namespace, folder: Path, tokenizer: tokenizers.Tokenizer, limit: int) -> list[Task]:
    tasks: list[Task] = []
    if args.tasks:
        read = texts.documents(args.text, args.skip) if args.text else [texts.python_source()]
        each = [tokenizer.encode(text, special=False) for text in read]
    if "fidelity" in args.tasks:
        begun = [[*tokenizer.prefix, *own] for own in each]
        tasks.append(Fidelity(begun, args.length, args.read, args.texts))
    if "passkey" in args.tasks:
        template = chat.load(folder, tokenizer)
        for length in sorted(set(args.lengths)):
            tasks.append(Passkey(tokenizer, template, each, length, args.needles, args.unseen))
    for source in args.files or []:
        for path in standard.paths(source):
            task = standard.Standard(path, tokenizer, tokenizers.eos_ids(folder), limit, args.rows, args.unseen)
            if task.name in {other.name for other in tasks}:
                other = f"another file is {cut(task.name)} too"
                raise UserError(f"{place(path)}: {other}; evaluate them one after the other")
            tasks.append(task)
    return tasks


def harness(args: argparse.Namespace, cells: list[Cell], tokenizer: tokenizers.Tokenizer) -> int:
    """lm-eval's own tasks and metrics, once for each cell."""
    lm_eval, utils = optional("lm_eval"), optional("lm_eval.utils")
    from evaluation.lm_eval_model import EngineLM

    folder = checkpoint.resolve(args.checkpoint)
    model, _ = checkpoint.load(folder, parallel.device(args.device), args.dtype, args.weights)
    for cell in cells:
        lm = EngineLM(model, tokenizer, tokenizers.eos_ids(folder), cell, args.batch, args.compile)
        print(cell)
        with compiling(args.compile, "leave out --compile"):
            found = lm_eval.simple_evaluate(model=lm, tasks=args.lm_eval, limit=args.rows)
        print(utils.make_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
