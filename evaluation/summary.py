"""What the results say: means with 95% intervals, squeeze against uniform, and how much memory can go.

Intervals of means, differences and ratios come from one paired bootstrap over the rows of a task (the same resampled
rows for every cell, fixed seed); that of a share of exact answers is Wilson's.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from errors import UserError, cut, place
from evaluation.cells import FULL, Cell
from evaluation.tasks import RESULT, Log, Task
from files import MOST_BYTES, Kind, Lines, checked, parse_json
from policies.layers.squeeze import three_means

RESAMPLES = 2000
DEPTHS = 8  # parts of a text in which the depth of a fact is told apart
DRAWN = 64  # prompts whose signals go into the summary
ALLOWED = 0.01  # relative loss that a cut of memory may cost
DEFINITION = (
    "Largest cut: the smallest budget of the grid at which, and at all larger ones, the loss relative to the full "
    "cache is at most 1% (perplexity: ratio - 1; others: 1 - ratio of the means). Estimate: of the measured loss. "
    "Sure, where that differs: of the upper end of its 95% interval (paired bootstrap over the rows; at least 3 / n, "
    "what n rows without one difference leave open). A cut is 1 - KV of the full cache."
)


def summarise(tasks: Sequence[Task], cells: Sequence[Cell], log: Log) -> dict:
    """JSON: `cells` with scores, `against` uniform at equal total, `cuts`, `importance` and `depths` for pictures."""
    scores = {task.name: Scores(task, cells, log) for task in tasks}
    summary = {
        "tasks": {task.name: {"rows": len(task.rows), "metric": task.metric, "new": task.new} for task in tasks},
        "cells": [
            {
                **asdict(cell),
                "kv_share": round(float(np.mean([r["kv_share"] for r in log.of(tasks[0], cell)])), 4),
                "plan": _plan(log, tasks[0], cell),
                "scores": {name: score.of(cell) for name, score in scores.items()},
            }
            for cell in cells
        ],
        "against": [],
        "cuts": [],
        "definition": DEFINITION,
        "importance": {task.name: _importance([r["signal"] for r in log.of(task, FULL)]) for task in tasks},
        "depths": {},
    }
    bounded = [cell for cell in cells if cell != FULL]
    for cell in bounded:
        uniform = Cell(cell.policy, "uniform", None, cell.budget)
        if cell.layers != "uniform" and uniform in cells:
            gains = {name: score.difference(cell, uniform) for name, score in scores.items()}
            summary["against"].append({**asdict(cell), "minus_uniform": gains})
    for kind in dict.fromkeys((cell.policy, cell.layers, cell.p) for cell in bounded):
        own = [cell for cell in bounded if (cell.policy, cell.layers, cell.p) == kind]
        cuts = {name: score.cut(own, summary["cells"]) for name, score in scores.items()}
        summary["cuts"].append(dict(zip(("policy", "layers", "p"), kind, strict=True)) | {"cut": cuts})
    for task in tasks:
        if "depth" in task.rows[0].about:
            hits = [np.array_split([record["exact"] for record in log.of(task, cell)], DEPTHS) for cell in cells]
            shares = [[round(float(part.mean()), 4) if len(part) else None for part in parts] for parts in hits]
            summary["depths"][task.name] = {"length": task.rows[0].about["length"], "exact": shares}
    return summary


def beside(path: str, tasks: Sequence[Task]) -> list[dict]:
    """Results of another program, as `cells` of a summary without plans. UserError unless each task has all rows."""
    cells: dict[Cell, dict[str, dict[int, dict]]] = {}
    names = {task.name: task for task in tasks}
    for number, raw, _, _ in Lines(path, MOST_BYTES):
        where = f"{place(path)} line {number} is no result"
        record = checked(parse_json(raw or b"", where), RESULT, where)
        if record["task"] in names:
            checked(record, needed(names[record["task"]]), where)
            cell = Cell(*(record[name] for name in asdict(FULL)))
            cells.setdefault(cell, {}).setdefault(record["task"], {})[record["row"]] = record
    rows = []
    for cell, results in cells.items():
        scores = {}
        for name, own in results.items():
            if missing := [row.number for row in names[name].rows if row.number not in own]:
                raise UserError(f"{place(path)} lacks row {missing[0]} of {cut(name)} for {cut(cell.policy)}")
            scores[name] = Scores(names[name], [cell], _Rows(own)).of(cell)
        rows.append({**asdict(cell), "scores": scores})
    return rows


class _Rows:
    """Results by row, where `Scores` looks for them."""

    def __init__(self, records: dict[int, dict]):
        self.records = records

    def of(self, task: Task, cell: Cell) -> list[dict]:
        return [self.records[row.number] for row in task.rows]


def _plan(log: Log, task: Task, cell: Cell) -> list[int]:
    for record in log.of(task, cell):
        if "plan" in record:
            return record["plan"]
    raise UserError(f"{place(log.path)} has no plan of {cell.policy} x {cell.layers}; give another --out")


def _importance(signals: list[list[float]]) -> dict:
    """In which share of the prompts squeeze would take from each layer, and some prompts' signals for a picture."""
    squeezed = np.array([[group == 2 for group in three_means(row)] for row in signals])
    return {"prompts": len(signals), "squeezed": squeezed.mean(0).round(4).tolist(), "signals": signals[:DRAWN]}


def needed(task: Task) -> dict[str, Kind]:
    """The fields of a task's results that are read here."""
    if task.metric == "kl":
        return {"kl": float, "agree": float, "loss": float}
    return {name: (bool, float) for name in getattr(task, "metrics", (task.metric,))}


class Scores:
    """One task's numbers, [rows, cells] per metric, and their resampled means [RESAMPLES, cells]."""

    def __init__(self, task: Task, cells: Sequence[Cell], log: Log):
        self.cells, self.metric, rows = list(cells), task.metric, len(task.rows)
        counts = np.random.default_rng(2024).multinomial(rows, [1 / rows] * rows, size=RESAMPLES) / rows
        self.names = list(needed(task))
        self.rows, self.values, self.resampled = rows, {}, {}
        for name in self.names:
            values = np.array([[float(record[name]) for record in log.of(task, cell)] for cell in cells]).T
            self.values[name], self.resampled[name] = values.mean(0), counts @ values
        if "loss" in self.values:
            for means in (self.values, self.resampled):  # JSON has no infinity
                means["perplexity"] = np.exp(np.minimum(means.pop("loss"), 700))
        self.quality = "perplexity" if "perplexity" in self.values else task.metric  # what a cut is judged by

    def of(self, cell: Cell) -> dict[str, list[float]]:
        """Mean, lower and upper end of each metric."""
        index = self.cells.index(cell)
        return {
            name: _rounded(value[index], *self._interval(name, value[index], self.resampled[name][:, index]))
            for name, value in self.values.items()
        }

    def _interval(self, name: str, mean: float, resampled: np.ndarray) -> tuple[float, float]:
        return wilson(mean, self.rows) if name == "exact" else interval(resampled)

    def difference(self, cell: Cell, other: Cell) -> dict[str, list[float]]:
        a, b = self.cells.index(cell), self.cells.index(other)
        differences = {name: resampled[:, a] - resampled[:, b] for name, resampled in self.resampled.items()}
        return {
            name: _rounded(self.values[name][a] - self.values[name][b], *interval(difference))
            for name, difference in differences.items()
        }

    def cut(self, cells: Sequence[Cell], figures: Sequence[dict]) -> dict[str, float | None]:
        """Largest cuts of memory (DEFINITION) among cells that differ in their budget."""
        means, resampled = self.values[self.quality], self.resampled[self.quality]
        full, sign = self.cells.index(FULL), 1 if self.quality == "perplexity" else -1
        cuts: dict[str, float | None] = {"estimate": None, "sure": None}
        holds = dict.fromkeys(cuts, bool(means[full]))
        for cell in sorted(cells, key=lambda cell: -figures[self.cells.index(cell)]["kv_share"]):
            index = self.cells.index(cell)
            with np.errstate(divide="ignore", invalid="ignore"):
                losses = sign * (resampled[:, index] / resampled[:, full] - 1)
            least = 0.0 if self.quality == "perplexity" else 3 / self.rows
            loss = {
                "estimate": sign * (means[index] / means[full] - 1) if means[full] else np.inf,
                "sure": max(interval(np.nan_to_num(losses, nan=np.inf))[1], least),
            }
            for name in cuts:
                holds[name] = holds[name] and loss[name] <= ALLOWED
                if holds[name]:
                    cuts[name] = round(1 - figures[index]["kv_share"], 4)
        return cuts


def interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, (0.025, 0.975), method="nearest")
    return float(low), float(high)


def wilson(share: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): sensible at 0 and 1 too."""
    centre, scale = share + z * z / (2 * rows), 1 + z * z / rows
    half = z * ((share * (1 - share) + z * z / (4 * rows)) / rows) ** 0.5
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _rounded(*values: float) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def plan_name(row: dict) -> str:
    return row["layers"] if row["p"] is None else f"{row['layers']} p={row['p']:g}"


def table(summary: dict) -> str:
    """Markdown, a line a cell: KV of the full cache, then every task's metrics."""
    heads, columns = [], []
    for name in summary["tasks"]:
        for metric in summary["cells"][0]["scores"][name]:
            columns.append((name, metric))
            heads.append(f"{name}: {metric}" if len(summary["cells"][0]["scores"][name]) == 1 else metric)
    lines = [f"| policy | layers | budget | KV | {' | '.join(heads)} |", "|---" * (4 + len(heads)) + "|"]
    for row in summary["cells"]:
        numbers = " | ".join(show(metric, *row["scores"][name][metric]) for name, metric in columns)
        layers, budget = ("-", "-") if row["budget"] is None else (plan_name(row), f"{row['budget']:g}")
        lines.append(f"| {row['policy']} | {layers} | {budget} | {row['kv_share']:.0%} | {numbers} |")
    return "\n".join(lines)


def show(metric: str, mean: float, low: float, high: float) -> str:
    if metric == "kl":
        return f"{mean:.4f}"
    if metric == "perplexity":
        return f"{mean:.3f}"
    if metric == "agree":
        return f"{mean:.1%}"
    return f"{100 * mean:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def conclusions(summary: dict) -> str:
    """Where a layer policy is better or worse than uniform beyond the interval, and the largest cuts. Markdown."""
    lines = ["Against uniform at the same total, beyond the 95% interval of the paired difference:", ""]
    for plan in dict.fromkeys(map(plan_name, summary["against"])):
        own = [row for row in summary["against"] if plan_name(row) == plan]
        for task, about in summary["tasks"].items():
            better, worse = 0, {}
            for row in own:
                _, low, high = row["minus_uniform"][task][about["metric"]]
                low, high = (-high, -low) if about["metric"] == "kl" else (low, high)
                better += low > 0
                if high < 0:
                    worse.setdefault(row["policy"], []).append(f"{row['budget']:g}")
            where = "; ".join(f"{policy} at {', '.join(budgets)}" for policy, budgets in worse.items())
            count = sum(map(len, worse.values()))
            told = f"- {plan}, {task}: better in {better} of {len(own)}, worse in {count}"
            lines.append(f"{told} ({where})" if where else told)
    return "\n".join([*lines, "", *cuts(summary), "", summary["definition"]])


def cuts(summary: dict) -> list[str]:
    """The largest cuts, a line per token policy, a column per task and layer policy. Markdown."""
    plans = list(dict.fromkeys(map(plan_name, summary["cuts"])))
    judged = {task: "perplexity" if about["metric"] == "kl" else task for task, about in summary["tasks"].items()}
    titles = [f"{name}: {plan}" for name in judged.values() for plan in plans]
    lines = [f"| largest cut at 1% loss | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for policy in dict.fromkeys(row["policy"] for row in summary["cuts"]):
        own = {plan_name(row): row["cut"] for row in summary["cuts"] if row["policy"] == policy}
        lines.append(f"| {policy} | {' | '.join(_cut(**own[plan][task]) for task in judged for plan in plans)} |")
    return lines


def _cut(estimate: float | None, sure: float | None) -> str:
    estimated, safe = ("none" if share is None else f"{share:.0%}" for share in (estimate, sure))
    return estimated if estimated == safe else f"{estimated} (sure: {safe})"
