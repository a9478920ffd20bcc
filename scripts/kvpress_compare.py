"""The presses of NVIDIA's kvpress on evaluate.py's own rows: the same model folder, pieces, questions and kept pairs.

kvpress 0.5.5 wants an older transformers than this project, so it gets a virtual environment of its own:

    python -m venv .kvpress
    .kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5 "transformers>=5.2,<5.3"
    .kvpress/bin/python scripts/kvpress_compare.py --results kvpress.jsonl \\
        --checkpoint models/SmolLM2-135M-Instruct --text multi_news.jsonl --skip 80 --tasks fidelity,passkey \\
        --lengths 1024 --budgets 0.1,0.2,0.4
    python evaluate.py --beside kvpress.jsonl ... the same --checkpoint, --text, --skip, --tasks, ...

All options but --presses, --results and --within are evaluate.py's; --policies and --layers mean nothing here. Results
are appended row by row: a second run goes on where the first one ended.

Where evaluate.py gives a cell b slots per layer, a press keeps b pairs of the prompt in each layer and head, or as many
in all where it divides them itself. What is read and said afterwards comes on top, since no press evicts it, so that
kvpress holds more in the end. --within counts it: a press keeps b - (later tokens) of the prompt.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint  # noqa: E402
import evaluate  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from commandline import Parser, guarded  # noqa: E402
from errors import UserError, optional, place, shown  # noqa: E402
from evaluation.fidelity import Fidelity, compare  # noqa: E402
from evaluation.passkey import scored  # noqa: E402
from evaluation.tasks import Row, Task  # noqa: E402
from files import NATURAL, Lines, append, check_apart, check_output, checked, exclusive, parse_json  # noqa: E402

WRAPPED = {  # presses that divide another one's budget
    "AdaKV": ("AdaKVPress", "SnapKVPress"),
    "AdaKV(ExpectedAttention)": ("AdaKVPress", "ExpectedAttentionPress"),
    "CriticalKV": ("CriticalKVPress", "SnapKVPress"),
    "CriticalAdaKV": ("CriticalAdaKVPress", "SnapKVPress"),
}
SINGLE = ("SnapKV", "ObservedAttention", "TOVA", "StreamingLLM", "PyramidKV", "ExpectedAttention", "KeyDiff", "Knorm")
KEY = {"task": str, "row": NATURAL, "policy": str, "budget": float}  # by which results are told apart
EAGER = ("ObservedAttention",)  # reads the attention of the whole prompt, which only transformers' eager form gives


def main(argv: list[str] | None = None) -> int:
    return guarded("kvpress_compare.py", lambda: run(*parse(argv)), "interrupted; the same command goes on from here")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--presses", default=",".join([*SINGLE, *WRAPPED]), metavar="A,B", help="(default: %(default)s)"
    )
    parser.add_argument("--results", required=True, type=Path, metavar="F", help="jsonl to write and to go on from")
    parser.add_argument("--within", action="store_true", help="count the tokens after the prompt among those kept")
    own, rest = parser.parse_known_args(argv)
    own.presses = own.presses.split(",")
    if unknown := [name for name in own.presses if name not in (*SINGLE, *WRAPPED)]:
        raise UserError(f"unknown press {shown(unknown[0])}; known: {', '.join([*SINGLE, *WRAPPED])}")
    args = evaluate.parse(rest)
    if args.files or set(args.tasks) - {"fidelity", "passkey"}:
        raise UserError("only --tasks fidelity,passkey are compared here")
    return own, args


def run(own: argparse.Namespace, args: argparse.Namespace) -> int:
    kvpress, transformers = optional("kvpress"), optional("transformers")
    folder = checkpoint.resolve(args.checkpoint)
    check_output(own.results, "--results")
    check_apart({"--results": own.results}, {"--checkpoint": folder} | ({"--text": args.text} if args.text else {}))
    tokenizer = tokenizers.load(folder)
    tasks = evaluate.make_tasks(args, folder, tokenizer, limit=0)
    done = set()
    for number, raw, *_ in Lines(own.results) if own.results.exists() else []:
        where = f"{place(own.results)} line {number} is no result; take it out, or give another --results"
        done.add(key(checked(parse_json(raw or b"", where), KEY, where)))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cells = [(name, budget) for name in own.presses for budget in args.budgets]
    work = [(task, row) for task in tasks for row in task.rows]
    with exclusive(own.results) as file, torch.inference_mode():
        for task, row in work:
            full = None
            for name, budget in cells:
                plan = "pyramid" if name == "PyramidKV" else "uniform"
                record = {"task": task.name, "row": row.number, "policy": f"kvpress {name}", "layers": plan}
                record |= {"p": None, "budget": budget}
                if key(record) in done:
                    continue
                if full is None and isinstance(task, Fidelity):
                    full = following(model, row, None, "sdpa")
                found = result(kvpress, model, tokenizer, task, row, name, budget, own.within, full)
                append(file, json.dumps(record | row.about | found).encode() + b"\n", own.results)
            print(task.name, row.number, flush=True)
    return 0


def key(record: dict) -> tuple:
    return tuple(record[name] for name in KEY)


def result(
    kvpress: Any,
    model: Any,
    tokenizer: tokenizers.Tokenizer,
    task: Task,
    row: Row,
    name: str,
    budget: float,
    within: bool,
    full: Tensor | None,
) -> dict:
    """What a press makes of one row. full [T, vocab]: of fidelity, log probabilities under the full cache."""
    later = len(row.question) + task.new
    length = len(row.ids) + later
    slots = int(Fraction(str(budget)) * length) if budget <= 1 else int(budget)
    kept = min(slots - later * within, len(row.ids))
    if kept < 1:
        raise UserError(
            f"budget {budget:g} is {slots} pairs, and --within leaves none of the prompt: {later} come later"
        )
    press = made(kvpress, name, 1 - (kept + 0.5) / len(row.ids)) if kept < len(row.ids) else None
    attention = "eager" if name in EAGER else "sdpa"
    if full is not None:
        other = following(model, row, press, attention)
        kl, agree, loss = compare(full, other, torch.tensor(row.expected[1:])).mean(1).tolist()
        found = {"kl": kl, "agree": agree, "loss": loss}
    else:
        found = scored(tokenizer.decode(list(greedy(model, row, task.new, press, attention))), row.expected)
    return found | {"kv_share": (kept + later) / length}


def made(kvpress: Any, name: str, ratio: float) -> Any:
    """ratio: what a press takes away, such that k_len * (1 - ratio) rounded down is what it is to keep."""
    if name in WRAPPED:
        outer, inner = WRAPPED[name]
        return getattr(kvpress, outer)(getattr(kvpress, inner)(compression_ratio=ratio))
    return getattr(kvpress, f"{name}Press")(compression_ratio=ratio)


class Cache:
    """A prompt that a press has compressed, and what is read behind it at the positions where it stands."""

    def __init__(self, model: Any, ids: Sequence[int], press: Any, attention: str):
        self.model, self.seen = model, len(ids)
        model.set_attn_implementation(attention)
        for module in model.modules():
            if getattr(module, "masked_key_indices", None) is not None:  # what a press before this one has masked
                module.masked_key_indices = None
        self.past = optional("transformers").DynamicCache()
        with press(model) if press else nullcontext():
            out = model(torch.tensor([list(ids)]), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.logits = out.logits[0, -1]
        model.set_attn_implementation("sdpa")
        kept = {self.past.get_seq_length(layer) for layer in range(len(self.past))}
        masked = any(getattr(module, "masked_key_indices", None) is not None for module in model.modules())
        # A mask for several tokens at once fits layers of one length; where heads differ, kvpress seeks a key that no
        # query sees, which there may not be for many queries.
        self.at_once = len(kept) == 1 and not masked

    def feed(self, ids: Sequence[int]) -> Tensor:
        """The logits [T, vocab] after each of the ids."""
        size = len(ids) if self.at_once else 1
        parts = []
        for start in range(0, len(ids), size):
            part = torch.tensor([list(ids[start : start + size])])
            positions = torch.arange(self.seen, self.seen + part.shape[1])[None]
            parts.append(self.model(part, position_ids=positions, past_key_values=self.past, use_cache=True).logits[0])
            self.seen += part.shape[1]
        return torch.cat(parts)


def following(model: Any, row: Row, press: Any, attention: str) -> Tensor:
    """Log probabilities [T, vocab] after each token that follows the prompt."""
    return Cache(model, row.ids, press, attention).feed(row.expected[:-1]).float().log_softmax(-1)


def greedy(model: Any, row: Row, new: int, press: Any, attention: str) -> Iterator[int]:
    cache = Cache(model, row.ids, press, attention)
    logits = cache.feed(row.question)[-1] if row.question else cache.logits
    for step in range(new):
        token = int(logits.argmax())
        yield token
        if step < new - 1:
            logits = cache.feed([token])[-1]


if __name__ == "__main__":
    sys.exit(main())
