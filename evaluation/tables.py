"""What a summary.json says, as Markdown: tables by policy and budget, and how often plans beat equal layers."""

NOTE = (
    "In brackets 95% intervals: of the mean, or, of a plan, of its paired difference to equal layers (of KL and "
    "perplexity in percent, of shares in percentage points). The best of each budget in bold."
)
LESS = ("kl", "perplexity")  # less is better
TITLES = {"kl": "KL, nats", "agree": "same top token", "digits": "digits right", "exact": "whole answers right"}
Pair = tuple[str, str]  # token policy and layer policy


class Board:
    """One metric of one task. By cell (policy, layers, budget): mean, lower and upper end of the interval."""

    def __init__(self, summary: dict, task: str, metric: str):
        self.metric, self.rows = metric, summary["tasks"][task]["rows"]
        self.full: list[float] = summary["cells"][0]["scores"][task][metric]
        given = [row for row in [*summary["cells"], *summary.get("beside", [])] if row["budget"] is not None]
        self.scores: dict[tuple[str, str, float], list[float]] = {
            cell_of(row): row["scores"][task][metric] for row in given if metric in row["scores"].get(task, {})
        }
        self.gains: dict[tuple[str, str, float], list[float]] = {}  # differences to equal layers, percent or points
        for row in summary["against"]:
            policy, layers, budget = cell_of(row)
            equal = self.scores[policy, "uniform", budget][0] if metric in LESS else 1
            if equal:
                own = row["minus_uniform"][task][metric]
                self.gains[policy, layers, budget] = [100 * value / equal for value in own]
        self.budgets = sorted({budget for *_, budget in self.scores})
        self.plans = list(dict.fromkeys(layers for _, layers, _ in self.gains))

    def ranked(self, budget: float) -> list[Pair]:
        """Who has this budget, the best first."""
        sign = 1 if self.metric in LESS else -1
        own = {(policy, layers): sign * mean[0] for (policy, layers, b), mean in self.scores.items() if b == budget}
        return sorted(own, key=lambda pair: own[pair])

    def table(self, title: str) -> str:
        """A line per pair of policies, the best first, by their ranks: who lacks a budget is last there."""
        ranked = [self.ranked(budget) for budget in self.budgets]
        pairs = dict.fromkeys(cell[:2] for cell in self.scores)
        ranks = {pair: sum(o.index(pair) if pair in o else len(pairs) for o in ranked) for pair in pairs}
        heads = [f"{budget:.0%}" if budget <= 1 else f"{budget:g} slots" for budget in self.budgets]
        lines = [f"| {title} | layers | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
        if any(self.full):
            lines.append(f"| full cache | - | {' | '.join([self.mean(self.full)] * len(heads))} |")
        for pair in sorted(pairs, key=lambda pair: ranks[pair]):
            columns = zip(self.budgets, ranked, strict=True)
            cells = [self.shown((*pair, budget), self.scores[*order[0], budget][0]) for budget, order in columns]
            lines.append(f"| {' | '.join([*pair, *cells])} |")
        return "\n".join(lines)

    def shown(self, cell: tuple[str, str, float], best: float) -> str:
        if cell not in self.scores:
            return ""
        if cell not in self.gains:
            return self.mean(self.scores[cell], best)
        difference, low, high = (f"{value:+.0f}" for value in self.gains[cell])
        mean = self.mean(self.scores[cell][:1], best)
        return f"{mean}, {difference}{'%' * (self.metric in LESS)} ({low} to {high})"

    def mean(self, values: list[float], best: float | None = None) -> str:
        """The mean, in bold if it is the best, and its interval if that is there."""
        form = {"kl": ".3f", "perplexity": ".2f"}.get(self.metric, ".0%")
        mean, *ends = (format(value, form) for value in values)
        mean = f"**{mean}**" if values[0] == best else mean
        return f"{mean} ({' to '.join(end.rstrip('%') for end in ends)})" if ends else mean

    def counts(self, layers: str) -> tuple[int, int, int]:
        """In how many cells a plan is better than equal layers beyond the interval, in how many worse, and of all."""
        own = [ends for (_, plan, _), (_, *ends) in self.gains.items() if plan == layers]
        below, above = sum(high < 0 for _, high in own), sum(low > 0 for low, _ in own)
        return (below, above, len(own)) if self.metric in LESS else (above, below, len(own))

    def verdict(self) -> str:
        counts = ((plan, *self.counts(plan)) for plan in self.plans)
        said = "; ".join(f"{plan} better in {better}, worse in {worse} of {all}" for plan, better, worse, all in counts)
        return f"Against equal layers, beyond the 95% interval of the paired difference: {said}."


def cell_of(row: dict) -> tuple[str, str, float]:
    return row["policy"], row["layers"], row["budget"]


def report(summary: dict) -> str:
    """A table for each metric of each task, and a verdict on what counts most of it."""
    parts = []
    for task, about in summary["tasks"].items():
        for metric in summary["cells"][0]["scores"][task]:
            parts.append(Board(summary, task, metric).table(f"{task}: {TITLES.get(metric, metric)}"))
        if summary["against"]:
            parts.append(Board(summary, task, about["metric"]).verdict())
    return "\n\n".join([*parts, NOTE])
