"""How long from the shell to the first token, and to the first that a compiled step makes, as results/start_cpu.json.

    python scripts/start_time.py --out results/start_cpu.json

Each start is a process of its own on an idle machine: eager, compiled with nothing kept, and compiled again with what
that one kept. The first token comes from the prompt, the second from the first step.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.record import Log, origin  # noqa: E402

SMOLLM2 = "checkpoints/real/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is the city of"


def start(checkpoint: str, compile: bool, home: str) -> dict[str, float]:
    """Seconds until the first text of an answer, and until the second token's."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    how = ["--compile" if compile else "--no-compile", "--ignore-eos", "--max-new-tokens", "2"]
    command, began = [sys.executable, "generate.py", "--checkpoint", checkpoint, "--prompt", PROMPT, *how], time.time()
    environment["XDG_CACHE_HOME"] = home
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment) as process:
        seconds = {}
        for name in ("first_token_s", "second_token_s"):  # each is written as soon as it is there
            os.read(process.stdout.fileno(), 1 << 16)
            seconds[name] = time.time() - began
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"start_time.py: {checkpoint} ended with {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "start_cpu.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", nargs="+", default=[SMOLLM2, "checkpoints/tiny"])
    args = parser.parse_args()
    log = Log(args.out)
    for checkpoint in args.checkpoint:
        name = Path(checkpoint).name
        log.begin(name, **origin(), repeats=args.repeats)
        runs = {"eager": [], "compiled, first start": [], "compiled, second start": []}
        for _ in range(args.repeats):
            with TemporaryDirectory() as home:
                for what, own in runs.items():
                    own.append(start(checkpoint, what != "eager", home))
        for what, own in runs.items():
            log.add(name, {"what": what, **{key: median(run[key] for run in own) for key in own[0]}})


if __name__ == "__main__":
    main()
