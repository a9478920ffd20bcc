"""The demo: one question, three caches.

The prompt states a fact near its top, goes on for some 900 tokens of Python, and asks for the fact at its end. It is
answered with the full cache, with a squeezed one, and with a uniform one of the same total.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate  # noqa: E402
from commandline import guarded  # noqa: E402
from files import read_text  # noqa: E402

BUDGET = "0.3"
RUNS = {
    "full cache": ["--policy", "full"],
    "squeezed": ["--squeeze", "--budget", BUDGET],
    "uniform, same budget": ["--policy", generate.SQUEEZE_POLICY, "--budget", BUDGET],
}


def main() -> int:
    return guarded("demo.py", run)


def run() -> int:
    prompt = read_text(generate.DEMO_PROMPT)
    lines = prompt.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("# define"))
    print(f"[... {place} lines of Python ...]\n{lines[place]}")
    print(f"[... {len(lines) - place - 2} lines of Python ...]\n{lines[-1]}")
    for title, args in RUNS.items():
        print(f"\n=== {title}: generate.py {' '.join(args)}\n")
        print(lines[-1], end="", flush=True)
        if code := generate.main([*args, "--max-new-tokens", "48"]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
