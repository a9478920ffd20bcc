"""A conversation much longer than the model's positions: memory, speed and perplexity along the way.

    python scripts/bench_chat.py --out results/chat_cpu.json --plot results/chat.png

Talk: 20,000 tokens with the streaming policy on the embedded checkpoint, in turns of 32 tokens of text and 96 answered
ones. Read: 20,000 tokens of unseen source, each predicted from a cache of the same slots, through the same code that
appends a turn (for these policies equal to single decode steps). `full` keeps everything; its position limit is lifted
for this measurement.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoint  # noqa: E402
from benchmark.record import check_picture, origin  # noqa: E402
from checkpoint import EMBEDDED  # noqa: E402
from commandline import Parser, guarded, positive  # noqa: E402
from conversation import Conversation  # noqa: E402
from engine import Engine, Request  # noqa: E402
from evaluation import tiny_data as data  # noqa: E402
from files import check_apart, check_output, write_json, write_whole  # noqa: E402

SAID, ANSWERED = 32, 96
SPAN = 1000  # tokens whose speed or loss makes one figure
FIRST = 64  # tokens of a text that are the prompt


def main(argv: list[str] | None = None) -> int:
    return guarded("bench_chat.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=20_000)
    parser.add_argument("--texts", type=positive, default=4, help="how many texts to read")
    parser.add_argument("--slots", type=positive, default=512)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    outputs = {flag: path for flag, path in (("--out", args.out), ("--plot", args.plot)) if path is not None}
    for flag, path in outputs.items():
        check_output(path, flag)
    check_apart(outputs, {"the embedded checkpoint": EMBEDDED})
    if args.plot is not None:
        check_picture(args.plot, "--plot")
    return args


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    model, config = checkpoint.load(EMBEDDED)
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    text = tokenizer.encode("".join(data.read(file) for file in data.source_files()[1])).ids

    result = {**origin(), "tokens": args.tokens, "slots": args.slots, "trained_positions": config.max_positions}
    result["talk"] = talk(Engine(model, "streaming", budget=args.slots, compile=True), text, args.tokens)
    print(json.dumps({name: value for name, value in result["talk"].items() if name != "ms_per_token"}))
    model.config = dataclasses.replace(config, max_positions=args.tokens + 1)
    result["read"] = {}
    for policy in ("streaming", "window", "full"):
        engine = Engine(model, policy, budget=None if policy == "full" else args.slots)
        result["read"][policy] = read(engine, text, args)
        print(policy, result["read"][policy])
    if args.out:
        write_json(args.out, result, indent=1)
    if args.plot:
        draw(result, args.plot)
    return 0


def talk(engine: Engine, text: list[int], tokens: int) -> dict:
    """Milliseconds an answered token, and every size that the cache had.

    For the last SPAN tokens a second conversation begins and takes turns with the first: a drifting machine hits both.
    """
    conversation, fresh, times, first, sizes = Conversation(engine), Conversation(engine), [], [], set()
    with tqdm(total=tokens, desc="talk", unit="token") as bar:
        while conversation.seen < tokens:
            start = conversation.seen
            times.append(turn(conversation, text, sizes))
            if start >= tokens - SPAN:
                first.append(turn(fresh, text, sizes))
            bar.update(conversation.seen - start)
    last = statistics.median(times[-len(first) :])
    turns = SPAN // ANSWERED
    return {
        "seen": conversation.seen,
        "kv_bytes": sorted(sizes),
        "kv_bytes_full": engine.sizing.full_bytes(conversation.seen),
        "first_ms_per_token": round(statistics.median(first), 4),
        "last_ms_per_token": round(last, 4),
        "last_over_first": round(last / statistics.median(first), 3),
        "ms_per_token": [round(statistics.median(times[n : n + turns]), 4) for n in range(0, len(times), turns)],
    }


def turn(conversation: Conversation, text: list[int], sizes: set[int]) -> float:
    stream = conversation.stream(text[conversation.seen :][:SAID], max_new_tokens=ANSWERED)
    list(stream)
    figures = stream.completion.figures
    sizes.add(figures.kv_bytes)
    return 1e3 * figures.decode_s / max(figures.decode_tokens, 1)


@torch.inference_mode()
def read(engine: Engine, text: list[int], args: argparse.Namespace) -> list[float]:
    """Mean loss in nats of each SPAN tokens, over all texts."""
    model, stride, losses = engine.model, (len(text) - args.tokens) // max(args.texts - 1, 1), []
    for number in range(args.texts):
        part = text[number * stride :][: args.tokens]
        decoder, _ = engine._start([Request(part[:FIRST], 1)], length=args.tokens, endless=True)
        for start in tqdm(range(FIRST, args.tokens - 1, SPAN), f"{engine.policy.name}, text {number + 1}", leave=False):
            ids = torch.tensor([part[start : start + SPAN + 1]])
            losses.append(cross_entropy(model.logits(decoder.append(ids[:, :-1]))[0].float(), ids[0, 1:]))
    return [round(float(loss), 4) for loss in torch.stack(losses).view(args.texts, -1).mean(0)]


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.4))
    for policy, losses in result["read"].items():
        axis.plot(
            [FIRST + (n + 0.5) * SPAN for n in range(len(losses))],
            losses,
            label=policy,
            marker=".",
            linestyle="--" if policy == "window" else "-",
        )
    axis.axvline(result["trained_positions"], color="gray", linestyle=":")
    axis.text(result["trained_positions"], axis.get_ylim()[1], " position limit of the model", fontsize=8, va="top")
    axis.set(xlabel="tokens read", ylabel="loss, nats a token", title=f"unseen text, {result['slots']} slots a layer")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format=path.suffix[1:]))


if __name__ == "__main__":
    sys.exit(main())
