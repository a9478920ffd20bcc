"""New tokens per second over a file of 200 prompts: 8 rows that refill, one by one, and transformers in batches of 8.

    python scripts/bench_batch.py --out results/batch_cpu.json

results/prompts_200.jsonl holds pieces of unseen source, 16 to 256 tokens, and wants 64 to 128 new ones of each; --draw
writes it again. Reading the prompts counts, loading and compiling do not (compiling is reported). transformers pads a
batch on the left and generates until its longest request has all it wants; only tokens that were wanted count. The
contestants take turns; the best of the rounds counts for each.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import checkpoint  # noqa: E402
from batch import Job  # noqa: E402
from benchmark.record import origin  # noqa: E402
from checkpoint import EMBEDDED  # noqa: E402
from commandline import Parser, guarded, positive  # noqa: E402
from engine import Engine, Request  # noqa: E402
from files import check_apart, check_output, write_json, write_whole  # noqa: E402
from generate import TextSoFar  # noqa: E402

PROMPTS = Path(__file__).resolve().parent.parent / "results" / "prompts_200.jsonl"
ROWS = 8
THEIRS = f"transformers generate, batches of {ROWS}"


def main(argv: list[str] | None = None) -> int:
    return guarded("bench_batch.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--prompts", type=positive, default=200, help="only the first ones")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draw", action="store_true", help="write the file of prompts, and nothing else")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.out is not None:
        check_output(args.out, "--out")
        check_apart({"--out": args.out}, {"the prompts": PROMPTS, "the embedded checkpoint": EMBEDDED})
    return args


def run(args: argparse.Namespace) -> int:
    if args.draw:
        return draw()
    torch.set_num_threads(args.threads)
    model, _ = checkpoint.load(EMBEDDED, args.device, "fp32")
    peer = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval().to(args.device)
    requests = [json.loads(line) for line in PROMPTS.read_text().splitlines()][: args.prompts]
    squeezed = Engine(model, "streaming", "squeeze", 0.3, compile=True)
    contestants = {
        "full, one by one": (Engine(model, compile=True), 1),
        f"full, {ROWS} rows": (Engine(model, compile=True), ROWS),
        f"streaming x squeeze at 30%, {ROWS} rows": (squeezed, ROWS),
    }
    compile_s, best, kv_bytes, tokens = {}, {}, {}, {}
    for name, (engine, rows) in contestants.items():
        compile_s[name] = ours(engine, rows, rows + 1)[1].compile_s
    theirs(peer, requests[:ROWS])
    for _ in tqdm(range(args.rounds), "rounds"):
        for name, (engine, rows) in contestants.items():
            seconds, figures, tokens[name] = ours(engine, rows, args.prompts)
            best[name] = min(seconds, best.get(name, seconds))
            kv_bytes[name] = figures.kv_bytes
        seconds, tokens[THEIRS] = theirs(peer, requests)
        best[THEIRS] = min(seconds, best.get(THEIRS, seconds))

    count = sum(request["max_new_tokens"] for request in requests)
    same = sum(tokens[f"full, {ROWS} rows"][name] == found for name, found in tokens[THEIRS].items())
    rows = [
        {
            "what": name,
            "tokens_per_s": round(count / seconds, 1),
            "seconds": round(seconds, 2),
            "times_one_by_one": round(best["full, one by one"] / seconds, 2),
            "times_transformers": round(best[THEIRS] / seconds, 2),
            "kv_bytes": kv_bytes.get(name),
            "compile_s": round(compile_s.get(name, 0.0), 1),
        }
        for name, seconds in best.items()
    ]
    result = {**origin(args.device), "rounds": args.rounds, "prompts": len(requests), "new_tokens": count}
    result |= {"prompt_tokens": sum(len(request["prompt_ids"]) for request in requests), "dtype": "float32"}
    result |= {"same_as_transformers": same, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result, indent=1)
    return 0


def ours(engine: Engine, rows: int, prompts: int):
    """Seconds without compilation, figures and the tokens of each id, for the first prompts."""
    engine.plan = None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        job = Job(PROMPTS, output, {}, Request(()), list, lambda: TextSoFar(None, []))
        survey = job.survey(engine)
        file, _ = job.begin(survey)
        done = {line.id for _, line in list(job.lines(engine))[prompts:]}
        started = time.perf_counter()
        with file:
            job.decide(engine, survey, rows, survey.longest)
            engine.plan = job.state["plan"]
            for summary in job.run(engine, survey, file, done):  # noqa: B007
                pass
        seconds = time.perf_counter() - started
        results = [json.loads(line) for line in output.read_text().splitlines()]
        return (
            seconds - summary.figures.compile_s,
            summary.figures,
            {result["id"]: result["tokens"] for result in results},
        )


def theirs(peer, requests: list[dict]) -> tuple[float, dict[str, list[int]]]:
    started, tokens = time.perf_counter(), {}
    for start in range(0, len(requests), ROWS):
        batch = requests[start : start + ROWS]
        width = max(len(request["prompt_ids"]) for request in batch)
        new = max(request["max_new_tokens"] for request in batch)
        ids = torch.tensor([[0] * (width - len(r["prompt_ids"])) + r["prompt_ids"] for r in batch])
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in (len(r["prompt_ids"]) for r in batch)])
        with torch.inference_mode():
            out = peer.generate(
                ids.to(peer.device),
                attention_mask=mask.to(peer.device),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        for request, row in zip(batch, out[:, width:].tolist(), strict=True):
            tokens[request["id"]] = row[: request["max_new_tokens"]]
    return time.perf_counter() - started, tokens


def draw() -> int:
    from tokenizers import Tokenizer

    from evaluation import tiny_data as data

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    text = tokenizer.encode("".join(data.read(file) for file in data.source_files()[1])).ids
    rng = random.Random(0)
    lines = []
    for number in range(200):
        length = rng.randint(16, 256)
        start = rng.randrange(len(text) - length)
        line = {"id": f"{number:03}", "prompt_ids": text[start : start + length]}
        line["max_new_tokens"] = rng.randint(64, 128)
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    write_whole(PROMPTS, "".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
