"""Recall from small caches on the embedded checkpoint: uniform against squeeze at the same total.

    python scripts/bench_recall.py --out results/recall_cpu.json

Unseen documents of 1,024 tokens hold 8 facts at uniform depth; one is asked for at the end and counts if both words of
the answer are right. The first word comes out of the prompt's own attention, the second one from the cache.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_data as data  # noqa: E402
import torch  # noqa: E402
from record import origin  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoint  # noqa: E402
from engine import Engine, Request  # noqa: E402
from generate import EMBEDDED  # noqa: E402

LENGTH, BATCH = 1024, 8
BUDGETS = (0.1, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, _ = checkpoint.load(EMBEDDED)
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    filler = tokenizer.encode("".join(data.read(file) for file in data.source_files()[1])).ids
    rng = random.Random(2024)
    prompts = [data.recall_prompt(rng, tokenizer, filler, LENGTH) for _ in range(args.prompts)]

    caches = [("full", "uniform", None)]
    caches += [
        (p, layers, b) for p in ("window", "streaming", "h2o") for b in BUDGETS for layers in ("uniform", "squeeze")
    ]
    rows = []
    for policy, layers, budget in tqdm(caches, "caches"):
        hits, share = 0, 0.0
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            requests = [Request(ids, max_new_tokens=len(answer)) for ids, answer in batch]
            expected = {id(request): answer for request, (_, answer) in zip(requests, batch, strict=True)}
            for completion in Engine(model, policy, layers, budget).generate(requests):
                hits += completion.tokens == expected[id(completion.request)]
                share = completion.figures.kv_bytes / completion.figures.kv_bytes_full
        row = {"policy": policy, "layers": layers, "budget": budget, "kv_share": share, "recall": hits / len(prompts)}
        rows.append(row)
        tqdm.write(json.dumps(row))
    result = {**origin(), "prompts": len(prompts), "prompt_tokens": LENGTH, "rows": rows}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
