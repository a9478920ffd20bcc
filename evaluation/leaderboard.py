"""The leaderboard: policies x plans x budgets, one number each for fidelity and for recall, from a run's summary.

A table per task: KL to the full cache where the task has it, else what counts most of its answers (of a passkey the
digits right). With 95% intervals, the best of each budget in bold; lines go from the best to the worst.
"""

import math

from evaluation.summary import plan_name

UNITS = {"kl": ("KL to the full cache, nats; less is better", 1), "digits": ("digits right, %", 100)}


def leaderboard(summary: dict) -> str:
    """Markdown. Cells of other programs (`beside`) stand among the summary's own."""
    rows = [row for row in summary["cells"] + summary.get("beside", []) if row["budget"] is not None]
    return "\n\n".join(board(task, about["metric"], summary, rows) for task, about in summary["tasks"].items())


def board(task: str, metric: str, summary: dict, rows: list[dict]) -> str:
    title, scale = UNITS.get(metric, (f"{metric}, %", 100))
    sign = 1 if metric == "kl" else -1
    budgets = sorted({row["budget"] for row in rows})
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        if metric in row["scores"].get(task, {}):
            kind = (row["policy"], plan_name(row))
            scores.setdefault(kind, {})[row["budget"]] = row["scores"][task][metric]
    best = {
        budget: min(sign * own[budget][0] for own in scores.values() if budget in own)
        for budget in budgets
        if any(budget in own for own in scores.values())
    }

    def rank(kind: tuple[str, str]) -> tuple[int, float]:
        """Those with all budgets first; by the mean, of KL of its logarithm: a budget counts as much as another."""
        values = [own[0] for own in scores[kind].values()]
        mean = sum(math.log(max(value, 1e-12)) if metric == "kl" else value for value in values) / len(values)
        return len(best) - len(values), sign * mean

    def shown(own: list[float], budget: float) -> str:
        mean, low, high = (figure(scale * value, metric) for value in own)
        mark = "**" if sign * own[0] == best[budget] else ""
        return f"{mark}{mean}{mark} ({low} to {high})"

    full = summary["cells"][0]["scores"][task][metric]
    mean, low, high = (figure(scale * value, metric) for value in full)
    tail = "" if metric == "kl" else f"; the full cache {mean} ({low} to {high})"
    heads = [f"{budget:.0%}" if budget <= 1 else f"{budget:g} slots" for budget in best]
    lines = [f"{task}: {title}{tail}", "", f"| policy | layers | {' | '.join(heads)} |", "|---" * (2 + len(best)) + "|"]
    for kind in sorted(scores, key=rank):
        figures = [shown(scores[kind][budget], budget) if budget in scores[kind] else "" for budget in best]
        lines.append(f"| {kind[0]} | {kind[1]} | {' | '.join(figures)} |")
    return "\n".join(lines)


def figure(value: float, metric: str) -> str:
    return f"{value:.4f}" if metric == "kl" else f"{value:.1f}"
