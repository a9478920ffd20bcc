"""Pictures of a summary: quality over memory, recall by depth and length, importance per layer, plans."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from evaluation.summary import DEPTHS, plan_name  # noqa: E402
from files import write_whole  # noqa: E402


def draw(summary: dict, folder: Path) -> list[Path]:
    """Write every picture that the summary has the data for; returns their paths."""
    pictures = {"frontier": frontier, "plans": plans, "importance": importance}
    if summary["depths"]:
        pictures["needle"] = heat_maps
    paths = []
    for name, picture in pictures.items():
        figure = picture(summary)
        figure.tight_layout()
        paths.append(folder / f"{name}.png")
        write_whole(paths[-1], lambda file, figure=figure: figure.savefig(file, dpi=110))
        plt.close(figure)
    return paths


COLUMNS = 4  # panels beside each other: more are too small to read


def frontier(summary: dict):
    """Quality over memory: a panel per token policy and metric, a line per layer policy, the full cache dashed.

    Of fidelity only KL: perplexities differ far more between texts than between caches.
    """
    full, *cells = summary["cells"]
    policies = list(dict.fromkeys(row["policy"] for row in cells)) or ["full"]
    tasks = [task for task in full["scores"] if not task.startswith("needle")] or list(full["scores"])
    metrics = [(task, metric) for task in tasks for metric in full["scores"][task]]
    metrics = [(task, metric) for task, metric in metrics if metric not in ("agree", "perplexity")]
    columns = min(COLUMNS, len(policies))
    bands = -(-len(policies) // columns)  # of `columns` policies each, with a row of panels per metric
    size = (2.7 * columns + 0.6, 2 * len(metrics) * bands + 0.6)
    figure, axes = plt.subplots(len(metrics) * bands, columns, figsize=size, squeeze=False, sharex=True, sharey="row")
    for axis in axes.flat[len(axes.flat) - columns * len(metrics) :]:  # the last band may be short
        axis.set_axis_off()
    for number, policy in enumerate(policies):
        own = [row for row in cells if row["policy"] == policy]
        band, column = divmod(number, columns)
        for line, (task, metric) in enumerate(metrics, band * len(metrics)):
            axis = axes[line, column]
            axis.set_axis_on()
            for name in dict.fromkeys(map(plan_name, own)):
                rows = sorted((row for row in own if plan_name(row) == name), key=lambda row: row["kv_share"])
                mean, low, high = np.array([row["scores"][task][metric] for row in rows]).T
                axis.plot(shares := [row["kv_share"] for row in rows], mean, marker=".", label=name)
                axis.fill_between(shares, low, high, alpha=0.15, linewidth=0)
            if metric == "kl" and cells:
                axis.set_yscale("log")
            else:
                axis.axhline(full["scores"][task][metric][0], color="gray", linestyle="--", linewidth=1, label="full")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(policy, fontsize=9)
            axis.tick_params(labelsize=7)
            if column == 0:
                axis.set_ylabel("KL, nats" if metric == "kl" else f"{task}: {metric}", fontsize=8)
    figure.supxlabel("KV cache, share of the full one", fontsize=8)
    axes[len(metrics) - 1][0].legend(fontsize=7, frameon=False)
    return figure


def heat_maps(summary: dict):
    """Recall by depth (down) and length (across): a panel per cache, at a budget near 20%; the full cache first."""
    tasks = [task for task in summary["depths"] if task.startswith("needle")] or list(summary["depths"])
    tasks.sort(key=lambda task: summary["depths"][task]["length"])
    full, *cells = summary["cells"]
    budget = min((row["budget"] for row in cells), key=lambda budget: abs(budget - 0.2), default=None)
    shown = [(index, row) for index, row in enumerate(summary["cells"]) if row is full or row["budget"] == budget]
    plans = len(dict.fromkeys(map(plan_name, cells)))
    columns = 1 + plans * max(1, COLUMNS // max(plans, 1))  # whole policies side by side, after the full cache
    bands = -(-(len(shown) - 1) // (columns - 1)) if len(shown) > 1 else 1
    size = (1.6 * columns + 0.6, 1.6 * bands + 0.6)
    figure, axes = plt.subplots(bands, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (index, row) in enumerate(shown):
        band, column = divmod(number - 1, columns - 1) if number else (0, -1)
        axis = axes[band, column + 1]
        axis.set_axis_on()
        means = np.array([summary["depths"][task]["exact"][index] for task in tasks], dtype=float).T
        axis.imshow(means, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set_title("full" if row is full else f"{row['policy']} {budget:.0%}\n{plan_name(row)}", fontsize=7)
        axis.set_xticks(range(len(tasks)), [summary["depths"][task]["length"] for task in tasks], fontsize=6)
        axis.set_yticks([0, DEPTHS - 1], ["start", "end"] if number == 0 else ["", ""], fontsize=6)
    figure.supxlabel("prompt tokens", fontsize=8)
    figure.supylabel("depth of the fact", fontsize=8)
    return figure


def importance(summary: dict):
    """Each prompt's signal per layer (thin), their mean, and in how many prompts the layer is squeezed."""
    tasks = summary["importance"]
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.2 * len(tasks) + 0.6, 4.6), squeeze=False, sharex=True)
    for (task, record), top, bottom in zip(tasks.items(), *axes, strict=True):
        signals = np.array(record["signals"])
        top.plot(signals.T, color="#1b6ca8", alpha=0.15, linewidth=0.7)
        top.plot(signals.mean(0), color="#e69138", marker=".")
        bottom.bar(range(signals.shape[1]), record["squeezed"], color="#e69138")
        bottom.set(ylim=(0, 1), xlabel="layer")
        top.set_title(f"{task}, {record['prompts']} prompts", fontsize=9)
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("signal", fontsize=8)
    axes[1][0].set_ylabel("squeezed in this share", fontsize=8)
    return figure


def plans(summary: dict):
    """Slots per layer, a panel per layer policy, a line per budget, of the first token policy."""
    cells = summary["cells"][1:] or summary["cells"]
    own = [row for row in cells if row["policy"] == cells[0]["policy"]]
    names = list(dict.fromkeys(map(plan_name, own)))
    figure, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names) + 0.6, 2.9), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        for row in own:
            if plan_name(row) == name:
                axis.step(range(len(row["plan"])), row["plan"], where="mid", label=f"{row['budget'] or 1:g}")
        axis.set_title(f"{cells[0]['policy']} x {name}", fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("slots", fontsize=8)
    axes[0][0].legend(title="budget", fontsize=7, title_fontsize=7, frameon=False)
    return figure
