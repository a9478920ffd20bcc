"""Pictures of a summary: quality over memory, and slots per layer."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from files import write_whole  # noqa: E402

COLUMNS = 4  # panels beside each other: more are too small to read


def draw(summary: dict, folder: Path) -> list[Path]:
    """Write the pictures; returns their paths."""
    paths = []
    for picture in (frontier, plans):
        figure = picture(summary)
        figure.tight_layout()
        paths.append(folder / f"{picture.__name__}.png")
        write_whole(paths[-1], lambda file, figure=figure: figure.savefig(file, dpi=110))
        plt.close(figure)
    return paths


def frontier(summary: dict):
    """What counts most of each task over memory: a panel per token policy, a line per layer policy."""
    full, *cells = summary["cells"]
    policies = list(dict.fromkeys(row["policy"] for row in cells)) or ["full"]
    panels = [(task, about["metric"], policy) for task, about in summary["tasks"].items() for policy in policies]
    columns = min(COLUMNS, len(policies))
    bands = -(-len(panels) // columns)
    size, one = (2.7 * columns + 0.6, 2 * bands + 0.6), len(summary["tasks"]) == 1
    figure, axes = plt.subplots(bands, columns, figsize=size, squeeze=False, sharex=True, sharey=one)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (task, metric, policy) in zip(axes.flat, panels, strict=False):
        own = [row for row in cells if row["policy"] == policy]
        for name in dict.fromkeys(row["layers"] for row in own):
            rows = sorted((row for row in own if row["layers"] == name), key=lambda row: row["kv_share"])
            mean, low, high = np.array([row["scores"][task][metric] for row in rows]).T
            axis.plot(shares := [row["kv_share"] for row in rows], mean, marker=".", label=name)
            axis.fill_between(shares, low, high, alpha=0.15, linewidth=0)
        if metric == "kl" and cells:
            axis.set_yscale("log")
        else:
            axis.axhline(full["scores"][task][metric][0], color="gray", linestyle="--", linewidth=1, label="full")
        _plain(axis, policy)
        axis.set_ylabel("KL, nats" if metric == "kl" else f"{task}: {metric}", fontsize=8)
    figure.supxlabel("KV cache, share of the full one", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    return figure


def plans(summary: dict):
    """Slots per layer, a panel per layer policy, a line per budget, of the first token policy."""
    cells = summary["cells"][1:] or summary["cells"]
    own = [row for row in cells if row["policy"] == cells[0]["policy"]]
    names = list(dict.fromkeys(row["layers"] for row in own))
    figure, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names) + 0.6, 2.9), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        for row in own:
            if row["layers"] == name:
                axis.step(range(len(row["plan"])), row["plan"], where="mid", label=f"{row['budget'] or 1:g}")
        _plain(axis, f"{cells[0]['policy']} x {name}")
        axis.set_xlabel("layer", fontsize=8)
    axes[0][0].set_ylabel("slots", fontsize=8)
    axes[0][0].legend(title="budget", fontsize=7, title_fontsize=7, frameon=False)
    return figure


def _plain(axis, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
