"""What the results say: means with 95% intervals, and plans against equal layers at the same total.

Intervals come from one paired bootstrap over the rows of a task, the same resampled rows for every cell; that of a
share of exact answers is Wilson's, which is sensible at 0 and 1 too.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from errors import UserError, cut, place
from evaluation.cells import Cell
from evaluation.tasks import Results, Task

RESAMPLES = 2000


def summarise(tasks: Sequence[Task], cells: Sequence[Cell], results: Results) -> dict:
    """JSON: the tasks, the `cells` with their scores, and `against`: their difference to equal layers."""
    scores = {task.name: Scores(task, cells, results) for task in tasks}
    summary = {
        "tasks": {task.name: {"rows": len(task.rows), "metric": task.metrics[0], "new": task.new} for task in tasks},
        "cells": [],
        "against": [],
    }
    for cell in cells:
        own = results.of(tasks[0], cell)
        kv_share = round(float(np.mean([record["kv_share"] for record in own])), 4)
        plan = next((record["plan"] for record in own if "plan" in record), [])
        means = {name: score.of(cell) for name, score in scores.items()}
        summary["cells"].append({**asdict(cell), "kv_share": kv_share, "plan": plan, "scores": means})
        equal = Cell(cell.policy, budget=cell.budget)
        if cell != equal and equal in cells:
            gains = {name: score.difference(cell, equal) for name, score in scores.items()}
            summary["against"].append({**asdict(cell), "minus_uniform": gains})
    return summary


def beside(path: str, tasks: Sequence[Task]) -> list[dict]:
    """Another program's log, as `cells` of a summary without plans. UserError unless its tasks have all rows."""
    results, rows = Results(tasks), []
    results.read(Path(path))
    if not results.records:
        raise UserError(f"{place(path)} holds no result of {cut(', '.join(results.tasks))}")
    for cell in results.cells():
        scores = {}
        for task in tasks:
            missing = [row.number for row in task.rows if not results.has(task, row, cell)]
            if not missing:
                scores[task.name] = Scores(task, [cell], results).of(cell)
            elif len(missing) < len(task.rows):
                raise UserError(f"{place(path)} lacks row {missing[0]} of {cut(task.name)} for {cut(cell.policy)}")
        rows.append({**asdict(cell), "scores": scores})
    return rows


class Scores:
    """One task's means [1 + RESAMPLES, cells] by metric: first that of all rows, then those of resampled ones."""

    def __init__(self, task: Task, cells: Sequence[Cell], results: Results):
        self.cells, self.means, self.rows = list(cells), {}, (rows := len(task.rows))
        drawn = np.random.default_rng(2024).multinomial(rows, [1 / rows] * rows, size=RESAMPLES)
        weights = np.vstack([np.ones(rows), drawn]) / rows
        for name in task.metrics:
            values = np.array([[float(record[name]) for record in results.of(task, cell)] for cell in cells])
            self.means[name] = weights @ values.T
        if "loss" in self.means:
            self.means["perplexity"] = np.exp(np.minimum(self.means.pop("loss"), 700))  # JSON has no infinity

    def of(self, cell: Cell) -> dict[str, list[float]]:
        """Of each metric the mean, and the lower and upper end of its interval."""
        index = self.cells.index(cell)
        found = {name: with_interval(means[:, index]) for name, means in self.means.items()}
        if "exact" in found:
            found["exact"][1:] = rounded(*wilson(found["exact"][0], self.rows))
        return found

    def difference(self, cell: Cell, other: Cell) -> dict[str, list[float]]:
        a, b = self.cells.index(cell), self.cells.index(other)
        return {name: with_interval(means[:, a] - means[:, b]) for name, means in self.means.items()}


def with_interval(values: np.ndarray) -> list[float]:
    """The first value, which is measured, and the 95% interval of the others, which are resampled."""
    return rounded(values[0], *np.quantile(values[1:], (0.025, 0.975), method="nearest"))


def wilson(share: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    centre, scale = share + z * z / (2 * rows), 1 + z * z / rows
    half = z * ((share * (1 - share) + z * z / (4 * rows)) / rows) ** 0.5
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def rounded(*values: float) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
