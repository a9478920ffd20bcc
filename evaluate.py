"""How good is a small cache? Compare token policies, layer policies and budgets with the full cache.

    python evaluate.py --suite quick                    the embedded model: fidelity and recall, minutes
    python evaluate.py --suite slow --resume            every token policy over more than 1,000 questions; an hour
    python evaluate.py --checkpoint meta-llama/Llama-3.2-1B --text book.txt --tasks fidelity --budgets 0.2,0.4
    python evaluate.py --checkpoint ~/models/SmolLM2-135M-Instruct --text LongBench/data/multi_news.jsonl \\
        --tasks fidelity,passkey --policies snapkv,dropkv --layers "uniform,perturbation:where=last,queries=64"
    python evaluate.py --checkpoint ~/models/Mistral-7B-v0.3 --files LongBench/data/hotpotqa.jsonl --budgets 512,1024
    python evaluate.py --checkpoint ~/models/Qwen3-0.6B --lm-eval arc_easy --policies h2o --layers squeeze --budgets 64

Every combination of --policies, --layers, --budgets (and --p where the layer policy has one) runs with the same total
of slots as uniform has; the full cache is always in the table. A policy's own options stand behind its name, as in
snapkv:recent=32; words of a list have , or ; between them, and a part such as queries=64 is one more option of the
policy before it. Tasks:

    fidelity   KL and top-1 agreement of the next token's distribution with the full cache's, and perplexity, on a text
    needle     one fact in a long text, by depth and length        recall   one of several facts
               (a line of code that is copied: for models of code, the embedded one among them)
    passkey    a number of 7 digits hidden in a text, asked for through the chat template: for models that can talk
    --files    LongBench, RULER, XSUM and CNN/DailyMail jsonl: a file, a folder, a zip or a dataset of the hub

--unseen compresses the text before the question about it is read, as a cache that is asked many times needs it. A
--text that is a jsonl file is read as documents, a piece of each; --skip leaves out those on which choices were made.

The folder --out gets predictions.jsonl (each result as it is made), summary.json, table.md, leaderboard.md and
pictures. --resume goes on where an earlier run was cut off. --beside puts results of another program into the
leaderboard (scripts/kvpress_compare.py).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import chat
import checkpoint
import tokenizer as tokenizers
from benchmark.record import origin, portable
from checkpoint import EMBEDDED
from commandline import Parser, compiling, guarded, number
from errors import UserError, cut, optional, place, shown
from evaluation import standard, summary, texts, tiny_data
from evaluation.cells import Cell, grid
from evaluation.fidelity import Fidelity
from evaluation.leaderboard import leaderboard
from evaluation.passkey import Passkey
from evaluation.recall import Recall
from evaluation.tasks import Log, Task, check_all, run
from files import accessing, check_apart, check_folder, check_output, write_json, write_whole
from machine import explained
from policies.layers import LAYER_POLICIES
from policies.options import words
from policies.tokens import TOKEN_POLICIES

TASKS = ("fidelity", "needle", "recall", "passkey")
HERE = Path(__file__).resolve().parent
DEFAULTS = {
    "policies": ["streaming", "h2o"],
    "layers": ["uniform", "squeeze", "pyramid"],
    "budgets": [0.1, 0.2, 0.3, 0.5],
    "p": [0.3],
    "tasks": ["fidelity", "needle", "recall"],
    "length": 1024,
    "lengths": [256, 512, 1024],
    "read": 64,
    "texts": 64,
    "needles": 32,
    "questions": 128,
    "batch": 16,
}
RESULTS, PICTURES = "predictions.jsonl", ("frontier", "plans", "importance", "needle")  # in --out
NO_SETTINGS = (
    "policies",
    "layers",
    "budgets",
    "p",
    "out",
    "resume",
    "lm_eval",
    "suite",
    "tasks",
    "p_given",
    "beside",
    "compile",
)  # may change on --resume
SUITES = {
    None: {"tasks": ["fidelity", "recall"]},
    "quick": {},
    "slow": {
        "policies": [name for name, policy in TOKEN_POLICIES.items() if policy.bounded],
        "layers": ["uniform", "squeeze"],
        "budgets": [0.1, 0.2, 0.3, 0.4, 0.5, 0.7],
        "tasks": ["fidelity", "recall"],
        "texts": 1024,
        "read": 16,
        "questions": 1024,
        "batch": 64,
    },
}


def main(argv: list[str] | None = None) -> int:
    return guarded("evaluate.py", lambda: evaluate(parse(argv)), "interrupted; --resume goes on from here")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=str(EMBEDDED), help="Hugging Face folder, .gguf file or hub id (default: embedded)")
    add("--suite", choices=[name for name in SUITES if name], help="good values for all that is not given")
    add("--policies", type=words, metavar="A,B", help=f"of {', '.join(TOKEN_POLICIES)}")
    add("--layers", type=words, metavar="A,B", help=f"of {', '.join(LAYER_POLICIES)}")
    add("--budgets", type=listed(number), metavar="A,B", help="slots per layer, or shares of prompt + new in (0, 1]")
    add("--p", type=listed(float), metavar="A,B", help="squeeze and its like: what squeezed layers keep, in (0, 1]")
    add("--tasks", type=listed(str), metavar="A,B", help=f"of {', '.join(TASKS)}")
    add("--files", nargs="+", metavar="F", help="standard tasks; instead of --tasks, or with them")
    add("--lm-eval", type=listed(str), metavar="A,B", help="tasks of lm-eval instead, where that is installed")
    add("--text", metavar="F", help="UTF-8 or jsonl to read and to hide facts in (default: unseen Python source)")
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N documents of --text")
    add("--texts", type=int, metavar="N", help="fidelity: how many pieces of the text")
    add("--read", type=int, metavar="N", help="fidelity: tokens that follow each piece")
    add("--length", type=int, metavar="N", help="fidelity and recall: tokens of a prompt")
    add("--lengths", type=listed(int), metavar="A,B", help="needle, passkey: tokens of a prompt")
    add("--needles", type=int, metavar="N", help="needle, passkey: prompts of each length")
    add("--questions", type=int, metavar="N", help="recall: prompts")
    add("--unseen", action="store_true", help="all but fidelity: compress the text before the question is read")
    add("--rows", type=int, metavar="N", help="files: the first N rows of each (default: all)")
    add("--batch", type=int, metavar="N", help="rows that run together, with one plan (default: 16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="auto (the config's), bf16, fp16, fp32 or float64")
    add("--compile", action="store_true", help="compile the steps: faster where there are many of them")
    add("--out", metavar="DIR", help="where results go (default: results/eval_SUITE, without a suite runs/eval)")
    add("--resume", action="store_true", help="keep the results that are in --out")
    add("--beside", metavar="F", help="results of another program on the same rows, for the leaderboard")
    args = parser.parse_args(argv)
    tasks_given, args.p_given = args.tasks is not None, args.p is not None
    for name, value in (DEFAULTS | SUITES[args.suite]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        for each in value if isinstance(value, list) else [value]:
            given = getattr(args, name)
            if isinstance(each, int) and min(given if isinstance(given, list) else [given]) < 1:
                raise UserError(f"--{name} must be at least 1, not {shown(given)}")
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows must be at least 1, not {shown(args.rows)}")
    if args.files and not tasks_given and not args.suite:
        args.tasks = []
    for name in args.tasks:
        if name not in TASKS:
            raise UserError(f"unknown task {shown(name)}; known: {', '.join(TASKS)}")
    if args.unseen and not args.files and set(args.tasks) <= {"fidelity"}:
        raise UserError(f"--unseen is about questions; give --files, or --tasks of {', '.join(TASKS[1:])}")
    if args.skip < 0 or args.skip and not args.text:
        raise UserError(f"--skip must be a number of documents of --text, not {shown(args.skip)}")
    args.out = Path(args.out or (HERE / "results" / f"eval_{args.suite}" if args.suite else HERE / "runs" / "eval"))
    return args


def listed(kind: Callable[[str], Any]) -> Callable[[str], list]:
    def parse_list(text: str) -> list:
        return [kind(part.strip()) for part in text.split(",")]

    parse_list.__name__ = f"list of {kind.__name__}s"
    return parse_list


def evaluate(args: argparse.Namespace) -> int:
    cells = grid(args.policies, args.layers, args.p, args.budgets, args.p_given)
    folder = checkpoint.resolve(args.checkpoint)
    tokenizer = tokenizers.load(folder)
    if tokenizer is None:
        raise UserError(f"{place(args.checkpoint)} has no tokenizer; evaluation reads text")
    if args.lm_eval:
        return harness(args, cells, tokenizer)
    check_paths(args, folder)
    optional("matplotlib")  # now and not after an hour
    from evaluation import pictures

    model, config = checkpoint.load(folder, args.device, args.dtype)
    tasks = make_tasks(args, folder, tokenizer, config.max_positions)
    check_all(model, tasks, cells, args.batch)
    beside = summary.beside(args.beside, tasks) if args.beside else []
    record = origin(args.device)
    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    # Results say the same wherever the project and its inputs lie.
    settings["checkpoint"] = portable(str(folder))
    settings["text"], settings["files"] = args.text and portable(args.text), args.files and [*map(portable, args.files)]
    needed = {task.name: summary.needed(task) for task in tasks}
    log = Log(args.out / RESULTS, settings, args.resume, needed, config.n_layers)
    try:
        out_of_memory = "out of memory; use a smaller --batch or --dtype, or shorter prompts; --resume goes on"
        with explained(lambda: out_of_memory), compiling("leave out --compile"):
            run(model, tasks, cells, log, args.batch, args.compile)
    finally:
        log.close()

    result = {**record, "settings": settings, **summary.summarise(tasks, cells, log)}
    if args.beside:
        result["beside"] = beside
    text, board = f"{summary.table(result)}\n\n{summary.conclusions(result)}\n", f"{leaderboard(result)}\n"
    write_json(args.out / "summary.json", result)
    write_whole(args.out / "table.md", text)
    write_whole(args.out / "leaderboard.md", board)
    print(f"{text}\n{board}")
    for path in pictures.draw(result, args.out):
        print(path)
    return 0


def check_paths(args: argparse.Namespace, folder: Path) -> None:
    """UserError unless the files in --out can be written and are no other paths of the run."""
    with accessing(args.out):
        there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--out {place(args.out)}: {place(there)} is no folder; name another")
    check_folder(there, "--out")
    names = [RESULTS, "summary.json", "table.md", "leaderboard.md", *(f"{name}.png" for name in PICTURES)]
    outputs = {f"{name} in --out": args.out / name for name in names}
    for flag, path in outputs.items():
        if args.out.exists():
            check_output(path, flag)
    inputs = {"--checkpoint": folder} | ({"--text": args.text} if args.text else {})
    inputs |= {"--beside": args.beside} if args.beside else {}
    inputs |= {f"{place(path)} of --files": path for source in args.files or [] for path in standard.paths(source)}
    check_apart(outputs, inputs)


def make_tasks(args: argparse.Namespace, folder: Path, tokenizer: tokenizers.Tokenizer, limit: int) -> list[Task]:
    tasks: list[Task] = []
    if args.tasks:
        source = [] if args.text else map(tiny_data.read, tiny_data.source_files()[1])
        read = texts.documents(args.text, args.skip) if args.text else ["".join(source)]
        each = [tokenizer.encode(text, special=False) for text in read]

        def encode(said: str) -> list[int]:
            return tokenizer.encode(said, special=False)

    for name in args.tasks:
        if name == "fidelity":
            begun = [[*tokenizer.prefix, *own] for own in each]
            tasks.append(Fidelity(begun, args.length, args.read, args.texts))
        elif name == "passkey":
            template = chat.load(folder, tokenizer)
            for length in sorted(args.lengths):
                tasks.append(Passkey(tokenizer, template, each, length, args.needles, args.unseen))
        else:
            facts, count = (1, args.needles) if name == "needle" else (8, args.questions)
            for length in sorted(args.lengths) if name == "needle" else [args.length]:
                tasks.append(Recall(encode, tokenizer.decode, each, length, facts, count, args.unseen))
    for source in args.files or []:
        for name, lines in standard.read(source):
            eos_ids = tokenizers.eos_ids(folder)
            tasks.append(standard.Standard(name, lines[: args.rows], tokenizer, eos_ids, limit, args.unseen))
            if tasks[-1].name in {task.name for task in tasks[:-1]}:
                other = f"another file is {cut(tasks[-1].name)} too"
                raise UserError(f"{place(name)}: {other}; evaluate them one after the other")
    return tasks


def harness(args: argparse.Namespace, cells: list[Cell], tokenizer: tokenizers.Tokenizer) -> int:
    """lm-eval's own tasks and metrics, once for each cell."""
    lm_eval, utils = optional("lm_eval"), optional("lm_eval.utils")
    from evaluation.lm_eval_model import EngineLM

    folder = checkpoint.resolve(args.checkpoint)
    model, _ = checkpoint.load(folder, args.device, args.dtype)
    for cell in cells:
        lm = EngineLM(model, tokenizer, tokenizers.eos_ids(folder), cell, args.batch, args.compile)
        print(cell)
        with compiling("leave out --compile"):
            found = lm_eval.simple_evaluate(model=lm, tasks=args.lm_eval, limit=args.rows)
        print(utils.make_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
