"""Run the demo's prompt under the paper's plan and draw what happened: each layer's signal, and the slots it got.

python scripts/draw_plan.py            writes results/plan.json and results/plan.png
"""

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from demo import BUDGET  # noqa: E402

import generate  # noqa: E402
from benchmark.record import origin  # noqa: E402
from commandline import guarded  # noqa: E402
from files import write_json, write_whole  # noqa: E402

RESULTS = Path(__file__).resolve().parent.parent / "results"
COLOURS = ["#1b6ca8", "#6aa84f", "#e69138"]
NAMES = ["most important", "important", "squeezed"]


def main() -> int:
    return guarded("draw_plan.py", run)


def run() -> int:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cache = ["--policy", "streaming", "--layers", "squeeze", "--budget", BUDGET]
        if generate.main([*cache, "--json", "--max-new-tokens", "48"]):
            return 1
    run = json.loads(out.getvalue())
    write_json(RESULTS / "plan.json", {**origin(), "run": run}, indent=1)

    layers = range(len(run["plan"]))
    colours = [COLOURS[group] for group in run["groups"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.barh(layers, run["importance"], color=colours)
    left.set(
        xlabel="cos(x, x + attention(x)), mean over the prompt",
        ylabel="layer",
        title="signal: how little attention changes",
    )
    right.barh(layers, run["plan"], color=colours)
    length = run["prompt_tokens"] + run["max_new_tokens"]
    for slots, name, style in ((run["budget_slots"], "uniform", "--"), (length, "full", ":")):
        right.axvline(slots, color="gray", linestyle=style, linewidth=1)
        right.text(slots, len(layers) - 1.2, f" {name}", rotation=90, ha="right", fontsize=8)
    share = run["kv_bytes"] / run["kv_bytes_full"]
    right.set(xlabel="slots", title=f"plan: {share:.0%} of the full cache", xlim=(0, 1.05 * length))
    for axis in (left, right):
        axis.invert_yaxis()
        axis.set_yticks(list(layers))
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    right.legend(handles, NAMES, fontsize=8, loc="center", frameon=False)
    figure.tight_layout()
    write_whole(RESULTS / "plan.png", lambda file: figure.savefig(file, dpi=130))
    return 0


if __name__ == "__main__":
    sys.exit(main())
