"""The presses of NVIDIA's kvpress on evaluate.py's own rows: the same model folder, pieces, questions and kept pairs.

kvpress 0.5.5 wants an older transformers than this project, so it gets a virtual environment of its own:

    python -m venv .kvpress
    .kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5 "transformers>=5.2,<5.3"
    .kvpress/bin/python scripts/kvpress_compare.py --results kvpress.jsonl \\
        --checkpoint models/SmolLM2-135M-Instruct --text multi_news.jsonl --skip 80 --tasks fidelity,passkey \\
        --lengths 1024 --budgets 0.1,0.2,0.4
    python evaluate.py --beside kvpress.jsonl ... the same --checkpoint, --text, --skip, --tasks, ...

All options but --presses and --results are evaluate.py's; --policies and --layers mean nothing here. Results are
appended row by row: a second run goes on where the first one ended.

Where evaluate.py gives a cell b slots per layer, a press keeps b pairs of the prompt in each layer and head, or as many
in all where it divides them itself. What is read and said afterwards comes on top, since no press evicts it, so that
kvpress holds more in the end.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from contextlib import closing, nullcontext
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
from errors import UserError, optional, shown  # noqa: E402
from evaluation.cells import FULL, Cell  # noqa: E402
from evaluation.tasks import Log  # noqa: E402
from files import check_apart, check_output  # noqa: E402

DIVIDING = ("AdaKV", "CriticalKV", "CriticalAdaKV")  # another press's budget: SnapKV's, if none is named
PRESSES = "SnapKV ObservedAttention TOVA StreamingLLM PyramidKV ExpectedAttention KeyDiff Knorm".split()
PRESSES += ["AdaKV(ExpectedAttention)", *DIVIDING]
PREFIX = "kvpress "  # of the policy in a cell
EAGER = ("ObservedAttention",)  # reads the attention of the whole prompt, which only transformers' eager form gives


def main(argv: list[str] | None = None) -> int:
    return guarded("kvpress_compare.py", lambda: run(*parse(argv)), "interrupted; the same command goes on from here")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--presses", default=",".join(PRESSES), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--results", required=True, type=Path, metavar="F", help="jsonl to write and to go on from")
    own, rest = parser.parse_known_args(argv)
    own.presses = own.presses.split(",")
    if unknown := [name for name in own.presses if name not in PRESSES]:
        raise UserError(f"unknown press {shown(unknown[0])}; known: {', '.join(PRESSES)}")
    return own, evaluate.parse(rest)


def run(own: argparse.Namespace, args: argparse.Namespace) -> int:
    optional("kvpress")
    transformers = optional("transformers")
    folder = checkpoint.resolve(args.checkpoint)
    check_output(own.results, "--results")
    check_apart({"--results": own.results}, evaluate.inputs(args, folder))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tasks = evaluate.make_tasks(args, folder, tokenizers.load(folder), model.config.max_position_embeddings)
    cells = [
        Cell(f"{PREFIX}{name}", "pyramid" if name == "PyramidKV" else "uniform", budget)
        for name in own.presses
        for budget in args.budgets
    ]
    with closing(Log(own.results, evaluate.settings(args, folder), True, tasks)) as log, torch.inference_mode():
        evaluate.run(model, tasks, cells, log, 1, batch_of=Presses)
    return 0


class Presses:
    """One row under presses, each named by a cell's policy, with what tasks ask of evaluation.cells.Batch."""

    def __init__(self, model: Any, cells: Sequence[Cell], rows: Sequence[list[int]], new: int, compile: bool = False):
        self.model, self.new, self.plan, [self.ids] = model, new, [], rows
        self.lengths = torch.tensor([len(self.ids)])

    def start(self, cell: Cell) -> "Cache":
        if cell == FULL:
            return Cache(self.model, self.ids)
        name, kept = cell.policy.removeprefix(PREFIX), pairs(len(self.ids), self.new, cell.budget)
        self.kv_share = (kept + self.new) / (len(self.ids) + self.new)
        press = made(optional("kvpress"), name, 1 - (kept + 0.5) / len(self.ids)) if kept < len(self.ids) else None
        return Cache(self.model, self.ids, press, "eager" if name in EAGER else "sdpa")

    def forced(self, cell: Cell, following: Tensor) -> Sequence[Tensor]:
        """Logits [1, vocab] after each of following [1, T], which follow whatever the model would say."""
        return self.start(cell).feed(following[0].tolist()).split(1)

    def greedy(
        self, cell: Cell, eos_ids: Collection[int] = (), questions: Sequence[list[int]] = ([],)
    ) -> list[list[int]]:
        """The most likely continuation, read behind a question: `new` tokens with it, or up to an end of sequence."""
        cache, [question], said = self.start(cell), questions, []
        logits = cache.feed(question)[-1] if question else cache.logits
        while len(question) + len(said) < self.new and (token := int(logits.argmax())) not in eos_ids:
            said.append(token)
            logits = cache.feed([token])[-1]
        return [said]


def pairs(length: int, new: int, budget: float) -> int:
    """How many pairs of a prompt of `length` tokens a press keeps: as many as a cell has slots."""
    slots = int(Fraction(str(budget)) * (length + new)) if budget <= 1 else int(budget)
    return min(max(slots, 1), length)


def made(kvpress: Any, name: str, ratio: float) -> Any:
    """ratio: what a press takes away, such that k_len * (1 - ratio) rounded down is what it is to keep."""
    name, _, inner = name.rstrip(")").partition("(")
    if name in DIVIDING:
        return getattr(kvpress, f"{name}Press")(made(kvpress, inner or "SnapKV", ratio))
    return getattr(kvpress, f"{name}Press")(compression_ratio=ratio)


class Cache:
    """A prompt that a press has compressed, and what is read behind it at the positions where it stands."""

    def __init__(self, model: Any, ids: Sequence[int], press: Any = None, attention: str = "sdpa"):
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


if __name__ == "__main__":
    sys.exit(main())
