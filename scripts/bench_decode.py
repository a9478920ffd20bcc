"""Decode speed on the embedded checkpoint against transformers' generate, one run, same weights, greedy, batch 1.

    python scripts/bench_decode.py --out results/decode_cpu.json

256 prompt tokens and 256 new ones. Decode time of transformers is that of 256 new tokens less that of one. The
contestants take turns, so that a drifting machine hits all of them; medians over the rounds. Compilation comes before
the clock starts and is reported.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from record import origin  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import checkpoint  # noqa: E402
from engine import Engine  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PROMPT = NEW = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, config = checkpoint.load(args.checkpoint, args.device, "fp32")
    rng = random.Random(0)
    ids = [rng.randrange(1, config.vocab_size) for _ in range(PROMPT)]
    peer = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval().to(args.device)
    engines = {
        "full, eager": Engine(model),
        "full, compiled": Engine(model, compile=True),
        "h2o x squeeze at 25%, compiled": Engine(model, "h2o", "squeeze", 0.25, compile=True),
        "streaming x squeeze at 25%, compiled": Engine(model, "streaming", "squeeze", 0.25, compile=True),
    }
    times: dict[str, list[float]] = {"transformers generate": [], **{name: [] for name in engines}}
    compile_s = {}
    tokens = {}
    for name, engine in engines.items():
        figures, _ = ours(engine, ids)
        compile_s[name] = figures.compile_s
    theirs(peer, ids, 8)
    for _ in tqdm(range(args.rounds), "rounds"):
        seconds, tokens["transformers generate"] = theirs(peer, ids, NEW)
        times["transformers generate"].append((seconds - theirs(peer, ids, 1)[0]) / (NEW - 1))
        for name, engine in engines.items():
            figures, tokens[name] = ours(engine, ids)
            times[name].append(figures.decode_s / figures.decode_tokens)

    base = statistics.median(times["transformers generate"])
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "what": name,
                "ms_per_token": round(1e3 * median, 3),
                "ms_min": round(1e3 * min(seconds), 3),
                "ms_max": round(1e3 * max(seconds), 3),
                "tokens_per_s": round(1 / median, 1),
                "times_transformers": round(base / median, 2),
                "first_compile_s": round(compile_s.get(name, 0.0), 1),
                "same_tokens_as_transformers": tokens[name] == tokens["transformers generate"],
            }
        )
        print(json.dumps(rows[-1]))
    result = {
        **origin(args.device),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "dtype": "float32",
        "batch": 1,
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def ours(engine: Engine, ids: list[int]):
    stream = engine.stream(ids, max_new_tokens=NEW)
    tokens = list(stream)
    return stream.completion.figures, tokens


def theirs(peer, ids: list[int], new: int) -> tuple[float, list[int]]:
    prompt = torch.tensor([ids], device=peer.device)
    started = time.perf_counter()
    with torch.inference_mode():
        out = peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    tokens = out[0, len(ids) :].tolist()  # waits for the device
    return time.perf_counter() - started, tokens


if __name__ == "__main__":
    main()
