"""What it costs to ask many questions about one text: read again each time, or once and kept in a file.

    python scripts/ask_many.py --text news.jsonl            writes results/ask_cpu.json

The text is the first --tokens tokens of the first line of --text that has as many, as the evaluation reads it. Three
ways, each with the same questions: the full cache, which reads the text for every question; a squeezed one that does so
too; and the squeezed one that reads it once, writes it to a file and goes on from that file for each question.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from commandline import Parser, compiling, guarded, positive  # noqa: E402

# isort: split
import torch  # noqa: E402

import checkpoint  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from benchmark.record import origin  # noqa: E402
from engine import Engine  # noqa: E402
from errors import UserError, place  # noqa: E402
from evaluation.texts import documents  # noqa: E402
from files import write_json  # noqa: E402
from promptcache import PromptCache  # noqa: E402
from request import Stream  # noqa: E402

SMOLLM2 = "checkpoints/real/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is this about?",
    "Who is mentioned first?",
    "Where did it happen?",
    "Which numbers are given?",
    "What may happen next?",
)
POLICY, LAYERS, BUDGET, NEW = "dropkv", "perturbation", 0.2, 24


def timed(call: Callable) -> tuple[float, list[Stream]]:
    """Seconds of the streams that the call runs, without those in which code was compiled."""
    started = time.perf_counter()
    streams = call()
    compiled = sum(stream.completion.figures.compile_s for stream in streams)
    return time.perf_counter() - started - compiled, streams


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", default=SMOLLM2)
    parser.add_argument("--text", required=True, metavar="F", help="a text, or JSON lines with one each")
    parser.add_argument("--tokens", type=positive, default=4000, metavar="N")
    parser.add_argument("--out", default=str(ROOT / "results" / "ask_cpu.json"), metavar="F")
    args = parser.parse_args()
    folder = checkpoint.resolve(args.checkpoint)
    tokenizer = tokenizers.load(folder)
    texts = (tokenizer.encode(text) for text in documents(args.text))
    article = next((ids[: args.tokens] for ids in texts if len(ids) >= args.tokens), None)
    if article is None:
        raise UserError(f"{place(args.text)} has no text of {args.tokens} tokens; ask for fewer")
    questions = [
        tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:", special=False, parse_special=False)
        for question in QUESTIONS
    ]
    model, _ = checkpoint.load(folder)
    with compiling(True), TemporaryDirectory() as scratch:
        rows = measured(model, article, questions, Path(scratch) / "article.safetensors")
    for row in rows:
        print(row)
    write_json(args.out, {**origin(), "tokens": len(article), "questions": len(questions), "rows": rows}, indent=1)
    return 0


def measured(model: torch.nn.Module, article: list[int], questions: list[list[int]], file: Path) -> list[dict]:
    """A row for each way: seconds of all questions, those of reading, bytes of the cache and of the file."""
    most = len(article) + max(map(len, questions)) + NEW
    squeezed = (POLICY, LAYERS, max(2, int(BUDGET * most)))
    rows = []
    for name, how in (("full cache, read each time", ()), ("20%, read each time", squeezed)):
        engine = Engine(model, *how, compile=True)
        list(engine.stream(article[:64], max_new_tokens=3))  # compiles
        seconds, streams = timed(lambda engine=engine: [asked(engine, article + ids) for ids in questions])
        rows.append({"what": name, "seconds": seconds, "kv_bytes": streams[0].completion.figures.kv_bytes})
    engine = Engine(model, *squeezed, compile=True)

    def once() -> list[Stream]:
        stream = engine.stream(article, max_new_tokens=1, keep="prompt")
        list(stream)
        stream.completion.cache.save(file)
        return [stream]

    read_s, [read] = timed(once)
    cache = read.completion.cache
    engine.plan = cache.about.plan
    seconds, streams = timed(lambda: [asked(engine, ids, past=PromptCache.load(file, engine)) for ids in questions])
    kept = {"read_s": read_s, "bytes": file.stat().st_size}
    rows.append({"what": "20%, read once and kept", "seconds": seconds, "kv_bytes": cache.nbytes} | kept)
    return rows


def asked(engine: Engine, ids: list[int], **how) -> Stream:
    stream = engine.stream(ids, max_new_tokens=NEW, **how)
    list(stream)
    return stream


if __name__ == "__main__":
    sys.exit(guarded("ask_many.py", main))
