"""How fast is decode beside a process that is as busy as we are? Writes results/busy_cpu.json.

    python scripts/busy.py --checkpoint checkpoints/real/SmolLM2-135M-Instruct.Q4_1.gguf

Runs generate.py alone and beside another process that multiplies matrices with as many threads, eager and compiled:
with the way of waiting that it chooses (`chosen`), and with OpenMP's own (`GOMP_SPINCOUNT=300000`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.record import origin  # noqa: E402
from checkpoint import EMBEDDED  # noqa: E402
from commandline import Parser, guarded, positive  # noqa: E402
from errors import UserError  # noqa: E402
from files import write_json  # noqa: E402

BUSY = "import torch\na = torch.randn(1024, 1024)\nprint(flush=True)\nwhile True:\n    a @ a"
WAYS = {"chosen": {}, "OpenMP's own": {"GOMP_SPINCOUNT": "300000"}}


@contextmanager
def beside(busy: bool) -> Iterator[None]:
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def rate(checkpoint: str, new: int, way: dict[str, str], compiled: bool) -> float:
    """Tokens/s of decode."""
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", checkpoint, "--prompt", "Once upon a time"]
    command += ["--max-new-tokens", str(new), "--ignore-eos", "--json", "--compile" if compiled else "--no-compile"]
    done = subprocess.run(command, env=os.environ | way, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip())
    return json.loads(done.stdout)["decode_tokens_per_s"]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(EMBEDDED))
    parser.add_argument("--new", type=positive, default=32, metavar="N", help="new tokens")
    parser.add_argument("--rounds", type=positive, default=2, metavar="N")
    parser.add_argument("--out", default=str(ROOT / "results" / "busy_cpu.json"), metavar="F")
    args, rows = parser.parse_args(), []
    for compiled in (False, True):
        found = {(way, busy): [] for busy in (False, True) for way in WAYS}
        for _ in range(args.rounds):
            for way, busy in found:
                with beside(busy):
                    time.sleep(1)
                    found[way, busy].append(rate(args.checkpoint, args.new, WAYS[way], compiled))
        for way in WAYS:
            alone, share = median(found[way, False]), median(found[way, True]) / median(found[way, False])
            row = {"what": way, "compiled": compiled, "alone": round(alone, 1), "share_beside": round(share, 3)}
            rows.append(row | {"all": [[round(each, 1) for each in found[way, busy]] for busy in (False, True)]})
            print(rows[-1], flush=True)
    write_json(args.out, {**origin(), "rows": rows}, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(guarded("busy.py", main))
