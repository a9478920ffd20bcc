"""Put the figures of results/ into README.md and RESULTS.md, between `<!-- NAME -->` and `<!-- end -->`.

python scripts/render_readme.py            rewrite        (--check: fail if that would change something)
"""

import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVALUATED = "eval_slow/summary.json"
SHOWN = (0.2, 0.4)  # budgets of it that there is room for
FIRST, LONGER, OTHER, PASSKEY, UNSEEN, CHOICES, KVPRESS, KVPRESS_UNSEEN = REAL = (
    *("eval_smollm2", "eval_smollm2_2048", "eval_gemma3", "eval_smollm2_passkey", "eval_smollm2_unseen"),
    *("eval_smollm2_choices", "eval_kvpress", "eval_kvpress_unseen"),
)
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark.record import ORIGIN, STAGE  # noqa: E402
from commandline import guarded  # noqa: E402
from evaluation.leaderboard import leaderboard  # noqa: E402
from evaluation.summary import conclusions  # noqa: E402
from files import checked, read_json, read_text, write_whole  # noqa: E402

EVALUATION = ORIGIN | {
    "cells": [{"policy": str, "layers": str, "p": (None, float), "budget": (None, float), "scores": dict}],
    "tasks": dict,
    "against": [{"policy": str, "layers": str, "p": (None, float), "budget": float, "minus_uniform": dict}],
    "cuts": [{"policy": str, "layers": str, "p": (None, float), "cut": dict}],
    "definition": str,
}
FILES = {  # what is read of each
    "eval_slow/summary.json": EVALUATION,
    "eval_defaults/summary.json": EVALUATION,
    **dict.fromkeys((f"{name}/summary.json" for name in REAL), EVALUATION),
    **dict.fromkeys(
        (f"{name}/summary.json" for name in (KVPRESS, KVPRESS_UNSEEN)),
        EVALUATION | {"beside": [{"policy": str, "layers": str, "budget": float, "scores": dict}]},
    ),
    "plan.json": ORIGIN
    | {
        "run": dict.fromkeys("prompt_tokens max_new_tokens kv_bytes kv_bytes_full".split(), int)
        | dict.fromkeys(("text", "policy", "layers"), str)
    },
    "bench_cpu.json": {"stages": dict.fromkeys(("decode", "throughput", "switch"), STAGE)},
    "batch_cpu.json": ORIGIN
    | dict.fromkeys("prompts prompt_tokens new_tokens same_as_transformers".split(), int)
    | {
        "rows": [
            {"what": str, "kv_bytes": (None, int)}
            | dict.fromkeys("tokens_per_s times_one_by_one times_transformers compile_s".split(), float)
        ]
    },
    "chat_cpu.json": ORIGIN
    | {"slots": int, "trained_positions": int}
    | {"talk": {"seen": int, "kv_bytes": [int], "kv_bytes_full": int, "last_over_first": float}}
    | {"read": dict.fromkeys("streaming window full".split(), [float])},
}


def result(name: str) -> dict:
    path = ROOT / "results" / name
    where = f"results/{name}"
    value = read_json(path)
    return checked(value, FILES[name], where)


def provenance(record: dict, file: str) -> str:
    versions = f"torch {record['torch']}, transformers {record['transformers']}"
    return f"{record['device']}; {versions}; {record['date']}; `{record['command']}` -> [{file}](results/{file})"


def earlier(record: dict, file: str, script: str) -> str:
    """The provenance of what a command of an earlier commit has measured."""
    return f"{provenance(record, file)}; the command is of an earlier commit, `git show 3eb38e3:{script}`"


def decode() -> str:
    """A line per shape: milliseconds a token of each contestant, and how many times as fast the best of ours is."""
    record = result("bench_cpu.json")["stages"]["decode"]
    names = list(dict.fromkeys(row["what"] for row in record["rows"] if "ms_per_step" in row))
    lines = [f"| ms a token | {' | '.join(names)} | times the loop |", "|---" * (2 + len(names)) + "|"]
    jobs: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        if "ms_per_step" in row:
            job = f"{row['shape']}, {row['dtype']}, {row['prompt_tokens']} + {row['new_tokens']}"
            jobs.setdefault(job, {})[row["what"]] = row["ms_per_step"]
    for job, times in jobs.items():
        best = min(time for name, time in times.items() if not name.startswith("transformers"))
        cells = [f"{times[name]:.2f}" if name in times else "-" for name in names]
        lines.append(f"| {job} | {' | '.join(cells)} | {times['transformers eager'] / best:.1f} |")
    return "\n".join([*lines, "", earlier(record, "bench_cpu.json", "bench.py")])


def step() -> str:
    """How far a compiled step is from what the machine could do, and what a new plan costs."""
    stages = result("bench_cpu.json")["stages"]
    lines = [
        f"- A compiled step of {row['shape']}, {row['dtype']}: {row['roofline_ms']:.2g} ms at the rate of a copy, "
        f"{row['of_roofline']:.0%} of that rate is reached."
        for row in stages["decode"]["rows"]
        if row["what"] == "full, compiled"
    ]
    [switch] = stages["switch"]["rows"]
    cost = f"{switch['recompilations']} recompilations, {switch['ms_median']:.1f} ms each (median)"
    return "\n".join([*lines, f"- {switch['what']} after the first two: {cost}."])


def throughput() -> str:
    record = result("bench_cpu.json")["stages"]["throughput"]
    batches = sorted({row["batch"] for row in record["rows"]})
    lines = [f"| tokens/s at batch | {' | '.join(map(str, batches))} |", "|---" * (1 + len(batches)) + "|"]
    for what in dict.fromkeys(row["what"] for row in record["rows"]):
        own = {row["batch"]: row for row in record["rows"] if row["what"] == what}
        cells = [own[batch].get("failed") or f"{own[batch]['tokens_per_s']:.0f}" for batch in batches]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", earlier(record, "bench_cpu.json", "bench.py")])


class Judged:
    """One task of an evaluation of a real model: means and intervals by (policy, layers, budget)."""

    def __init__(self, name: str, task: str = "fidelity", metric: str = "kl"):
        self.file, self.metric = f"{name}/summary.json", metric
        self.record = result(self.file)
        self.task = next(known for known in self.record["tasks"] if known.startswith(task))
        self.rows = self.record["tasks"][self.task]["rows"]
        self.means = self._of("cells", "scores")
        self.differences = self._of("against", "minus_uniform")
        self.full = self.record["cells"][0]["scores"][self.task][metric][0]
        self.policies, self.layers, self.budgets = (
            list(dict.fromkeys(key[n] for key in self.means if key[2] is not None)) for n in range(3)
        )

    def _of(self, rows: str, scores: str) -> dict[tuple[str, str, float | None], list[float]]:
        return {
            (row["policy"], row["layers"], row["budget"]): row[scores][self.task][self.metric]
            for row in self.record[rows]
            if self.metric in row[scores].get(self.task, {})
        }

    def share(self, policy: str, layers: str, budget: float) -> list[float]:
        """The difference to equal layers and its interval, in percent of what equal layers have."""
        base = self.means[policy, "uniform", budget][0]
        return [100 * value / base for value in self.differences[policy, layers, budget]]

    def counts(self, layers: str) -> tuple[int, int, int]:
        """In how many cells a plan is better than equal layers beyond the interval, in how many worse, and of all."""
        sign = 1 if self.metric == "kl" else -1
        ends = [
            sorted((sign * low, sign * high))
            for (_, own, _), (_, low, high) in self.differences.items()
            if own == layers
        ]
        return sum(high < 0 for _, high in ends), sum(low > 0 for low, _ in ends), len(ends)

    def table(self, title: str) -> list[str]:
        """Equal layers, and what the other plans make of it at the same total."""
        plans = [name for name in self.layers if name != "uniform"]
        heads = [f"{budget:.0%}: {name}" for budget in self.budgets for name in ("uniform", *plans)]
        lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for policy in self.policies:
            cells = []
            for budget in self.budgets:
                mean = self.means[policy, "uniform", budget][0]
                cells.append(f"{mean:.3f}" if self.metric == "kl" else f"{mean:.0%}")
                for layers in plans:
                    if (policy, layers, budget) not in self.differences:
                        cells.append("")
                    elif self.metric == "kl":
                        mean, low, high = self.share(policy, layers, budget)
                        cells.append(f"{mean:+.0f}% ({low:+.0f} to {high:+.0f})")
                    else:
                        own, difference = (
                            self.means[policy, layers, budget][0],
                            self.differences[policy, layers, budget],
                        )
                        low, high = (100 * value for value in difference[1:])
                        cells.append(f"{own:.0%} ({low:+.0f} to {high:+.0f})")
            lines.append(f"| {policy} | {' | '.join(cells)} |")
        return lines

    def verdicts(self) -> str:
        """Of each plan, in how many cells it is better or worse than equal layers."""
        plans = [name for name in self.layers if name != "uniform"]
        said = []
        for name in plans:
            better, worse, cells = self.counts(name)
            said.append(f"{name} better in {better}, worse in {worse} of {cells}")
        return f"Against equal layers, beyond the 95% interval of the paired difference: {'; '.join(said)}."

    @property
    def origin(self) -> str:
        return provenance(self.record, self.file)


def first() -> str:
    """Equal layers and perturbation on a real model, and what the paper's plan does there."""
    kl, digits = Judged(FIRST), Judged(PASSKEY, "passkey", "digits")
    heads = [f"KL at {budget:.0%}" for budget in kl.budgets] + [f"digits at {budget:.0%}" for budget in digits.budgets]
    lines = [f"| SmolLM2-135M-Instruct | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for policy in kl.policies:
        cells = []
        for judged, form in (kl, ".3f"), (digits, ".0%"):
            for budget in judged.budgets:
                pair = (judged.means[policy, layers, budget][0] for layers in ("uniform", "perturbation"))
                cells.append(" \u2192 ".join(format(value, form) for value in pair))
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    better, worse, cells = kl.counts("perturbation")
    gain = sum(kl.share(policy, "perturbation", budget)[0] for policy in kl.policies for budget in kl.budgets) / cells
    found, missed, asked = digits.counts("perturbation")
    losses = [kl.share(policy, "squeeze", budget)[0] for policy in kl.policies for budget in kl.budgets]
    squeezed = sum(share > 0.5 for share in kl.record["importance"]["fidelity"]["squeezed"])
    layers = len(kl.record["importance"]["fidelity"]["squeezed"])
    about = [
        "Equal layers \u2192 perturbation.",
        f"KL to the full cache, over the 32 tokens after each of {kl.rows} texts of news of 1,024 tokens.",
        f"Digits: how much of a number hidden in such a text is found again, {digits.rows} questions;",
        f"the full cache finds {digits.full:.0%}.",
        f"KL is lower beyond its 95% interval in {better} of {cells} cells, higher in {worse},",
        f"{gain:+.0f}% on average; more digits in {found} of {asked}, fewer in {missed}.",
        f"The paper's plan makes KL {min(losses):+.0f} to {max(losses):+.0f}%:",
        f"{squeezed} of the {layers} layers, whose signals lie close together, get the least.",
    ]
    origin = f"{kl.origin}; digits: [{digits.file}](results/{digits.file})"
    return "\n".join([*lines, "", " ".join(about), "", origin])


def real(name: str, about: str) -> str:
    judged = Judged(name)
    title = f"KL, {about}"
    return "\n".join([*judged.table(title), "", f"{judged.rows} pieces. {judged.verdicts()}", "", judged.origin])


def passkey(name: str) -> str:
    judged, whole = Judged(name, "passkey", "digits"), Judged(name, "passkey", "exact")
    lines = judged.table("digits right")
    best = [max((own[0], key) for key, own in judged.means.items() if key[2] == budget) for budget in judged.budgets]
    shown = "; ".join(f"{budget:.0%}: {policy} x {layers} {mean:.0%}" for mean, (policy, layers, budget) in best)
    exact = whole.table("whole answers right")
    full = f"The full cache: {judged.full:.0%} of the digits, {whole.full:.0%} of {whole.rows} answers. Best: {shown}."
    note = "In brackets the 95% interval of the difference to equal layers, in percentage points."
    return "\n".join([*lines, "", f"{full} {judged.verdicts()} {note}", "", *exact, "", judged.origin])


def choices() -> str:
    kl, digits = Judged(CHOICES), Judged(CHOICES, "passkey", "digits")
    return "\n".join([*kl.table("KL"), "", *digits.table("digits right"), "", kl.origin])


def kvpress() -> str:
    """Our caches and kvpress's presses on the same rows, as evaluate.py's leaderboard has them."""
    boards = []
    for name in (KVPRESS, KVPRESS_UNSEEN):
        file = f"{name}/summary.json"
        record = result(file)
        boards += [leaderboard(record), provenance(record, file)]
    record = result(f"{KVPRESS}/summary.json")
    own, theirs = (
        {
            budget: min(row["scores"]["fidelity"]["kl"][0] for row in record[kind] if row["budget"] == budget)
            for budget in sorted({row["budget"] for row in record["beside"]})
        }
        for kind in ("cells", "beside")
    )
    ahead = ", ".join(f"{1 - own[budget] / theirs[budget]:.0%} at {budget:.0%}" for budget in own)
    return "\n\n".join([f"KL of our best pair is lower than that of its best press by {ahead}.", *boards])


def quality() -> str:
    """What `evaluate.py --suite slow` has found."""
    if not (ROOT / "results" / EVALUATED).exists():
        return "Not measured in this version yet; `python evaluate.py --suite slow` does it."
    return quality_of(result(EVALUATED), EVALUATED)


def quality_of(record: dict, file: str) -> str:
    """Recall and KL at equal totals, the largest cuts, and where squeeze does not help, from a summary.json."""
    cells = {(row["policy"], row["layers"], row["budget"]): row["scores"] for row in record["cells"]}
    policies = list(dict.fromkeys(policy for policy, _, budget in cells if budget))
    recall = next(name for name in record["tasks"] if name.startswith("recall"))
    shown = [("recall", recall, "exact", ".0%"), ("KL", "fidelity", "kl", ".3f")]
    have = sorted({budget for *_, budget in cells if budget})
    budgets = dict.fromkeys(min(have, key=lambda budget: abs(budget - wanted)) for wanted in SHOWN)
    columns = [(budget, *kind, layers) for budget in budgets for kind in shown for layers in ("uniform", "squeeze")]
    heads = [f"{title} at {budget:.0%}: {layers}" for budget, title, *_, layers in columns]
    lines = [f"| policy | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for policy in policies:
        scores = [
            format(cells[policy, layers, budget][task][metric][0], form)
            for budget, _, task, metric, form, layers in columns
        ]
        lines.append(f"| {policy} | {' | '.join(scores)} |")
    full = record["cells"][0]["scores"]
    rows = {name: f"{record['tasks'][name]['rows']:,}" for name in (recall, "fidelity")}
    folder = Path(file).parent
    lines += [
        "",
        f"Full cache: recall {full[recall]['exact'][0]:.1%} of {rows[recall]} questions, perplexity "
        f"{full['fidelity']['perplexity'][0]:.2f} on {rows['fidelity']} texts. All budgets: "
        f"[table.md](results/{folder}/table.md).",
        "",
        conclusions(record),
        "",
        f"![quality over memory](results/{folder}/frontier.png)",
        "",
        provenance(record, file),
    ]
    return "\n".join(lines)


def defaults() -> str:
    """The sweep that squeeze's own p was chosen by: recall, and how much perplexity rises, over p and budget."""
    file = "eval_defaults/summary.json"
    record = result(file)
    recall = next(name for name in record["tasks"] if name.startswith("recall"))
    full, *cells = record["cells"]
    scores = {(row["policy"], row["budget"], row["p"]): row["scores"] for row in cells}
    shares = sorted({p for _, _, p in scores})
    lines = [f"| recall, perplexity | {' | '.join(f'p = {p:g}' for p in shares)} |", "|---" * (1 + len(shares)) + "|"]
    for policy, budget in dict.fromkeys((policy, budget) for policy, budget, _ in scores):
        own = [scores[policy, budget, p] for p in shares]
        rises = [s["fidelity"]["perplexity"][0] / full["scores"]["fidelity"]["perplexity"][0] - 1 for s in own]
        shown = [f"{s[recall]['exact'][0]:.0%}, {rise:+.1%}" for s, rise in zip(own, rises, strict=True)]
        lines.append(f"| {policy}, {budget:.0%} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", provenance(record, file)])


def plan() -> str:
    """What a squeezed cache saves in the demo."""
    record = result("plan.json")
    run, share = record["run"], record["run"]["kv_bytes"] / record["run"]["kv_bytes_full"]
    return (
        f"{run['prompt_tokens']} + {run['max_new_tokens']} tokens, {run['policy']} x {run['layers']}: a KV cache of "
        f"{run['kv_bytes']:,} bytes instead of {run['kv_bytes_full']:,} ({share:.0%}), and the answer is still "
        f"`{run['text'].splitlines()[0].strip()}`.\n\n{provenance(record, 'plan.json')}"
    )


def batch() -> str:
    record = result("batch_cpu.json")
    heads = "new tokens/s | times one by one | times transformers | KV bytes | first compile"
    lines = [f"| {record['prompts']} prompts | {heads} |", "|---" * 6 + "|"]
    for row in record["rows"]:
        kv_bytes = f"{row['kv_bytes']:,}" if row["kv_bytes"] else "-"
        compiled = f"{row['compile_s']} s" if row["compile_s"] else "-"
        lines.append(
            f"| {row['what']} | {row['tokens_per_s']:.0f} | {row['times_one_by_one']:.1f} "
            f"| {row['times_transformers']:.1f} | {kv_bytes} | {compiled} |"
        )
    counts = f"{record['prompts']} prompts, {record['prompt_tokens']:,} tokens, {record['new_tokens']:,} new ones"
    same = f"the full cache gave the tokens of transformers for {record['same_as_transformers']} of them"
    return "\n".join([*lines, "", f"{counts}; {same}; {earlier(record, 'batch_cpu.json', 'scripts/bench_batch.py')}"])


def chat() -> str:
    record = result("chat_cpu.json")
    talk, read, limit = record["talk"], record["read"], record["trained_positions"]
    past = limit // 1000 + 1  # the first span that is wholly past the limit

    def mean(policy: str) -> str:
        return f"{sum(read[policy][past:]) / len(read[policy][past:]):.2f}"

    [kv_bytes] = talk["kv_bytes"]
    return (
        f"{talk['seen']:,} tokens with streaming, {record['slots']} slots a layer: KV cache {kv_bytes:,} bytes in all "
        f"turns (in full {talk['kv_bytes_full']:,}), the last 1,000 answered tokens took {talk['last_over_first']:.2f} "
        f"times the first 1,000. Unseen text past the model's {limit:,} positions: {mean('streaming')} nats a token "
        f"with streaming, {mean('window')} with window, {mean('full')} with the full cache, its limit lifted "
        f"({earlier(record, 'chat_cpu.json', 'scripts/bench_chat.py')})."
    )


def families() -> str:
    """Every family, and the forms of it in which the tests compare it with transformers."""
    from families import CASES, MODELS

    lines = ["| models | model_type | compared with transformers as |", "|---|---|---|"]
    for model_type, models in MODELS.items():
        forms = [case.name.removeprefix(model_type).lstrip("-") or "plain" for case in CASES]
        own = [form for form, case in zip(forms, CASES, strict=True) if case.config["model_type"] == model_type]
        lines.append(f"| {models} | `{model_type}` | {', '.join(own)} |")
    return "\n".join(lines)


def models() -> str:
    from families import MODELS

    return "; ".join(MODELS.values()) + "."


PAGES = {
    "README.md": {"first": first, "models": models},
    "RESULTS.md": {
        "real": partial(real, FIRST, "1,024 + 32 tokens"),
        "longer": partial(real, LONGER, "2,048 + 32 tokens"),
        "gemma": partial(real, OTHER, "Gemma 3 270M, 1,024 + 32 tokens"),
        "passkey": partial(passkey, PASSKEY),
        "unseen": partial(passkey, UNSEEN),
        "choices": choices,
        "kvpress": kvpress,
        "quality": quality,
        "defaults": defaults,
        "plan": plan,
        "decode": decode,
        "step": step,
        "throughput": throughput,
        "batch": batch,
        "chat": chat,
        "families": families,
    },
}


def main() -> int:
    return guarded("render_readme.py", run)


def run() -> int:
    changed = 0
    for page, sections in PAGES.items():
        path = ROOT / page
        before = text = read_text(path)
        for name, render in sections.items():
            pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.S)
            if not pattern.search(text):
                print(f"{page} has no section {name}", file=sys.stderr)
                return 1
            start, end = pattern.search(text).span()
            text = f"{text[:start]}<!-- {name} -->\n{render()}\n<!-- end -->{text[end:]}"
        changed |= text != before
        if "--check" not in sys.argv and text != before:
            write_whole(path, text)
    return int(changed) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
