"""What 70B take on several devices, and what a day of prompts takes: computed from sizes and measured rates.

    python scripts/scale.py            writes docs/scale.md        (--check: fail if that would change something)
    python scripts/scale.py --tokens CHECKPOINT TEXT               how fast one core makes ids of a text, into results/

Measured, in results/bench_cuda.json: the rates of a large copy and of a large matrix product, and which share of the
first a decode step reached. Published or assumed, and said so on the page: the links, and what a sum over ranks waits.
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from commandline import guarded  # noqa: E402

# isort: split
import checkpoint  # noqa: E402
import tokenizer  # noqa: E402
from benchmark.record import ORIGIN, STAGE, origin  # noqa: E402
from config import ModelConfig, parameters  # noqa: E402
from errors import UserError, in_bytes  # noqa: E402
from files import MOST_BYTES, POSITIVE, checked, read_json, read_text, write_json, write_whole  # noqa: E402
from policies.layers import Uniform  # noqa: E402
from policies.tokens import Full, Streaming  # noqa: E402
from sizing import Sizing  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
LLAMA_2_70B = dict(  # as in its config.json
    model_type="llama",
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    dtype="bfloat16",
)
MEMORY = int(0.9 * 80e9)  # of a device: the rest is for fragments, libraries and activations
LINK = 450e9  # bytes per second that a device sends: NVLink of an H100, as published
WAIT = 15e-6  # seconds that a sum over the ranks takes whatever its size: assumed
BUDGET, LENGTH = 0.2, 4096
PROMPT, NEW, PROMPTS = 1000, 100, 100_000_000  # the day
PART = 4096  # prompts of a part of scripts/ray_job.py, where there are many
TOKENS = ROOT / "results" / "tokens_cpu.json"


class Rates(NamedTuple):
    """Bytes and operations per second, and the share of the first that a step has reached."""

    copy: float
    operations: float
    reached: float


class Part(NamedTuple):
    """What one of `ranks` devices has and does. sequence: bytes of a sequence's cache."""

    ranks: int
    weights: int
    sequence: int
    dim: int
    layers: int

    @property
    def sequences(self) -> int:
        return max(0, MEMORY - self.weights) // self.sequence

    def sent(self, rows: int) -> float:
        """Bytes that it sends in a step: two sums a layer, each of which takes a ring twice around."""
        return 2 * self.layers * rows * self.dim * 2 * 2 * (self.ranks - 1) / self.ranks

    def step(self, rows: int, rates: Rates) -> float:
        """Seconds of a step of so many rows."""
        waits = 2 * self.layers * WAIT if self.ranks > 1 else 0.0
        return (self.weights + rows * self.sequence) / (rates.copy * rates.reached) + self.sent(rows) / LINK + waits


def main() -> int:
    if "--tokens" in sys.argv:
        return measure(*sys.argv[sys.argv.index("--tokens") + 1 :])
    text = page(measured())
    if "--check" in sys.argv:
        return int(not PAGE.exists() or read_text(PAGE) != text)
    PAGE.parent.mkdir(exist_ok=True)
    write_whole(PAGE, text)
    return 0


def measured() -> Rates:
    where = "results/bench_cuda.json"
    stages = checked(read_json(ROOT / where), {"stages": {"decode": STAGE}}, where)["stages"]
    decode = stages["decode"]
    rows = [row for row in decode["rows"] if row["what"] == "full, compiled"]
    if not rows:
        raise UserError(f"{where} has no compiled step")
    return Rates(decode["copy_bytes_per_s"], decode["matmul_operations_per_s"]["bfloat16"], rows[0]["of_roofline"])


def measure(path: str, text: str) -> int:
    """Each line of a text by itself, as a job's prompts are."""
    encode, lines = tokenizer.load(checkpoint.resolve(path)).encode, read_text(text, MOST_BYTES).splitlines()
    encode(lines[0])
    started = time.perf_counter()
    count = sum(len(encode(line)) for line in lines)
    write_json(TOKENS, {**origin(), "tokens": count, "tokens_per_s": round(count / (time.perf_counter() - started))})
    return 0


def parts(config: ModelConfig, length: int) -> list[tuple[Part, Part]]:
    """For 1, 2, 4 and 8 ranks: with the full cache, and squeezed."""
    found = []
    for ranks in (1, 2, 4, 8):
        own = config.of_rank(ranks)
        weights = parameters(own) * own.dtype.itemsize
        full = Sizing(own, Full(), Uniform()).full_bytes(length)
        small = Sizing(own, Streaming(), Uniform(), BUDGET)
        squeezed = small.at(length).total * small.slot_bytes()
        found.append(tuple(Part(ranks, weights, size, own.dim, own.n_layers) for size in (full, squeezed)))
    return found


def page(rates: Rates) -> str:
    config = ModelConfig.from_hf(dict(LLAMA_2_70B))
    both = parts(config, LENGTH)
    lines = [
        "# Llama-2-70B on several devices, on paper",
        "",
        "`scripts/scale.py` computes this page from the sizes of the model and from what one H100 measured "
        f"([bench_cuda.json](../results/bench_cuda.json)): {rates.copy / 1e12:.2f} TB/s for a large copy, of which a "
        f"decode step reached {rates.reached:.0%}, and {rates.operations / 1e12:.0f} TFLOP/s for a large product in "
        f"bfloat16. Published: {LINK / 1e9:.0f} GB/s that a device sends over NVLink. Assumed: {WAIT * 1e6:.0f} "
        f"microseconds for a sum over the ranks, whatever its size, and {MEMORY / 1e9:.0f} of 80 GB that weights and "
        "caches may take. Nothing here "
        "was run on several GPUs.",
        "",
        f"## What a device holds, for sequences of {LENGTH:,} tokens",
        "",
        "| ranks | weights | a sequence, full | at 20% | sequences, full | at 20% |",
        "|---|---|---|---|---|---|",
        *(
            f"| {full.ranks} | {in_bytes(full.weights)} | {in_bytes(full.sequence)} | {in_bytes(small.sequence)} "
            f"| {full.sequences or '-'} | {small.sequences or '-'} |"
            for full, small in both
        ),
        "",
        "Embedding and head are whole on every rank. Where a cell has no number, the weights alone do not fit.",
        "",
        "## What a step takes",
        "",
        "| ranks | bytes sent per token | 1 row | of it the links | tokens/s of all rows, full | at 20% |",
        "|---|---|---|---|---|---|",
        *(step_row(full, small, rates) for full, small in both if full.sequences),
        "",
        *efficiency(both, rates),
        "",
        *day(config, rates),
    ]
    return "\n".join(lines) + "\n"


def step_row(full: Part, small: Part, rates: Rates) -> str:
    one = full.step(1, rates)
    links = 1 - full._replace(ranks=1).step(1, rates) / one
    each = (f"{own.sequences / own.step(own.sequences, rates):,.0f}" for own in (full, small))
    return f"| {full.ranks} | {in_bytes(int(full.sent(1)))} | {1e3 * one:.1f} ms | {links:.0%} | {' | '.join(each)} |"


def efficiency(both: list[tuple[Part, Part]], rates: Rates) -> list[str]:
    """Where more ranks stop helping one sequence: the weights shrink, and the sums do not."""
    steps = {full.ranks: full.step(1, rates) for full, _ in both}
    waits = 2 * both[0][0].layers * WAIT
    gains = ", ".join(f"{b} ranks are {steps[a] / steps[b]:.2f} times as fast as {a}" for a, b in ((2, 4), (4, 8)))
    return [
        f"For one row {gains}: the sums wait {1e3 * waits:.1f} ms a step however many ranks there are, and a step of "
        "one row cannot take less. With many rows the caches are read as well, each rank its part; there more ranks "
        "pay as long as there are sequences to fill them.",
    ]


def day(config: ModelConfig, rates: Rates) -> list[str]:
    """Device hours for many prompts, in groups of 4 devices."""
    full, small = parts(config, PROMPT + NEW)[2]
    operations = 2 * parameters(config) * PROMPT  # of a prompt's products; attention is a few percent more
    read = operations / (0.5 * rates.operations * full.ranks)  # half of the rate is assumed
    lines = [
        f"## A day of {PROMPTS:,} prompts",
        "",
        f"{PROMPT:,} tokens in and {NEW} out each, on groups of {full.ranks} devices that read prompts at half of the "
        "product's rate (assumed):",
        "",
        "| cache | rows | seconds a prompt, read | answered | groups of devices for a day |",
        "|---|---|---|---|---|",
    ]
    for name, own in (("full", full), ("20%", small)):
        answered = NEW * own.step(own.sequences, rates) / own.sequences
        groups = PROMPTS * (read + answered) / 86400
        lines.append(f"| {name} | {own.sequences} | {read:.4f} | {answered:.4f} | {groups:,.0f} |")
    rate = checked(read_json(TOKENS), ORIGIN | {"tokens_per_s": POSITIVE}, TOKENS.name)["tokens_per_s"]
    hours = PROMPT * PROMPTS / rate / 3600
    return [
        *lines,
        "",
        "A smaller cache saves what decoding takes; reading the prompts it does not make cheaper.",
        "",
        f"`scripts/ray_job.py` runs such a day: a group is a worker (`--workers N --ranks {full.ranks}`). What a "
        f"worker that dies loses is a part, {PART:,} prompts, of which there are {-(-PROMPTS // PART):,}; others take "
        "it. Before the first part the driver reads the whole input and makes ids of it, on one core: at "
        f"{rate:,} tokens a second ([tokens_cpu.json](../results/tokens_cpu.json)) that is {hours:,.0f} hours for "
        f"{PROMPTS:,} prompts. With 64 inputs and drivers it is {hours / 64:.1f} hours.",
    ]


if __name__ == "__main__":
    sys.exit(guarded("scale.py", main))
