"""Put the figures of results/ into README.md and RESULTS.md, between `<!-- NAME -->` and `<!-- end -->`.

python scripts/render_readme.py            rewrite        (--check: fail if that would change something)
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark import real  # noqa: E402
from benchmark.record import ORIGIN, STAGE  # noqa: E402
from commandline import guarded  # noqa: E402
from errors import UserError  # noqa: E402
from evaluation.tables import TITLES, Board  # noqa: E402
from files import checked, read_json, read_text, write_whole  # noqa: E402

CUDA_DECODE = ("bench_cuda_mixture.json", "bench_cuda_mixture_16.json", "bench_cuda_int8.json")


def result(name: str) -> dict:
    record, where = read_json(ROOT / "results" / name), f"results/{name}"
    needed = {"bench_cpu.json": ("decode", "throughput", "switch"), "bench_real_cpu.json": ("real",)}
    needed["bench_cuda.json"] = ("decode", "throughput", "switch")
    needed |= dict.fromkeys(CUDA_DECODE, ("decode",))
    needed["start_cpu.json"] = ("SmolLM2-135M-Instruct.Q4_1.gguf", "tiny")
    stages = {"stages": dict.fromkeys(needed.get(name, ()), STAGE)}
    return checked(record, stages if name in needed else ORIGIN, where)


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


class Goal(NamedTuple):
    """A figure to reach: `key` of our row `what`, or how many times that of `beside` it is."""

    title: str
    job: str
    precision: str
    prompt: int
    what: str
    beside: str
    least: float | None = None
    key: str = "tokens_per_s"


def goals() -> list[Goal]:
    """In the order of the table."""
    small, short, long, peer = "dropkv x perturbation", real.SHORT, real.LONG, "llama.cpp"
    first = {"float32": 1.2, "bf16": 1.1, "8 bit": 1.1, "4 bit": 1.0}
    found = [
        Goal(f"decode, {n:,} tokens", "decode", precision, n, "full", peer, first[precision] if n == short else None)
        for n in sorted({n for contexts in real.CONTEXTS.values() for n in contexts})
        for precision in first
        if n in real.CONTEXTS[precision]
    ]
    for precision, least in (("float32", 2.0), ("8 bit", 1.5)):
        title = f"decode, {long:,} tokens, ours at 20% of the cache"
        found.append(Goal(title, "decode", precision, long, f"{small} 20%", peer, least))
    for job, n in (("read", short), ("decode", long)):
        own = ("full", peer, 1.5, "prompt_tokens_per_s")
        found += [Goal(f"prefill, {n:,} tokens", job, precision, n, *own) for precision in ("float32", "bf16")]
    for precision, least in (("float32", 0.85), ("bf16", 0.8), ("8 bit", 0.7)):
        title = f"share of the copy rate in a step, {short:,} tokens"
        found.append(Goal(title, "decode", precision, short, "full", "", least, "of_roofline"))
    for precision in ("float32", "bf16", "8 bit"):
        title = f"{real.ROWS} rows, {real.PROMPT:,} + {real.ANSWER} tokens, at 20% against our full cache"
        least = 1.8 if precision == "float32" else None
        found.append(Goal(title, "rows", precision, real.PROMPT, f"{small} 20%", "full", least))
    for pair in (("streaming x random plan", "streaming x uniform"), (small, "dropkv x uniform")):
        plans = [f"{name} 20%" for name in pair]
        found.append(Goal(f"{pair[0]} against equal layers", "decode", "float32", long, *plans, 0.98))
    return found


def real_table(rows: list[dict]) -> str:
    """A line per goal: ours, the other, the ratio, and the goal."""
    figures = {tuple(row.get(k) for k in ("job", "precision", "prompt_tokens", "what")): row for row in rows}
    lines = ["| what | ours | beside it | ratio | goal |", "|---|---|---|---|---|"]
    for title, job, precision, prompt, what, beside, least, key in goals():
        own, other = (figures.get((job, precision, prompt, name), {}).get(key) for name in (what, beside))
        cells = [f"{own:.1f}" if own else "-", f"{other:.1f}" if other else "-"]
        ratio, goal = f"{own / other:.2f}" if own and other else "-", f"{least:g}" if least else "-"
        if not beside:
            cells, ratio, goal = ["-", "-"], f"{own:.0%}" if own else "-", f"{least:.0%}"
        lines.append(f"| {title}, {precision} | {' | '.join(cells)} | {ratio} | {goal} |")
    for row in rows:
        if row.get("job") == "evidence" and "first_token_ms" in row:
            share = row["importance_share"] + row["evidence_share"]
            title = f"importance and evidence of {row['prompt_tokens']:,} tokens, share of prefill"
            lines.append(f"| {title} | - | - | {share:.1%} | 2% |")
    steps = [row for row in rows if row.get("job") == "parts" and "blocks_ms" in row]
    if steps:
        names = ("embedding", "blocks", "head", "sampling")
        lines += ["", f"| ms of a compiled step | {' | '.join(names)} |", "|---" * 5 + "|"]
    for row in steps:
        cells = " | ".join(f"{row[f'{name}_ms']:.2f}" for name in names)
        lines.append(f"| {row['precision']}, {row['prompt_tokens']:,} tokens | {cells} |")
    failed = [
        f"{row.get('precision') or row.get('weights', '')} {row['what']}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return "\n".join([*lines, *(["", f"Failed: {'; '.join(failed)}."] if failed else [])])


def real_speed() -> str:
    file = "bench_real_cpu.json"
    if not (ROOT / "results" / file).exists():
        return "Not measured yet."
    record = result(file)["stages"]["real"]
    return f"{real_table(record['rows'])}\n\n{provenance(record, file)}"


def start() -> str:
    """From the shell to the tokens."""
    stages = result("start_cpu.json")["stages"]
    lines = ["| s from the shell | to the first token | to the second |", "|---|---|---|"]
    for model, stage in stages.items():
        for row in stage["rows"]:
            seconds = f"{row['first_token_s']:.1f} | {row['second_token_s']:.1f}"
            lines.append(f"| {Path(model).stem}, {row['what']} | {seconds} |")
    return "\n".join([*lines, "", provenance(next(iter(stages.values())), "start_cpu.json")])


def cuda() -> str:
    """One GPU: decode against transformers, the largest batches, and what a new plan costs."""
    stages = result("bench_cuda.json")["stages"]
    others = {name: result(name)["stages"]["decode"] for name in CUDA_DECODE}
    lines = ["| GPU | shape, tokens | what | rows | tokens/s | ms a step | of the roofline | times transformers | KV |"]
    lines.append("|---" * 9 + "|")
    measured = [stages["decode"], *others.values(), stages["throughput"]]
    rows = ((stage["device"].split()[1], row) for stage in measured for row in stage["rows"])
    for gpu, row in (own for own in rows if "failed" not in own[1]):
        weights = f", {row['weights']}" if "weights" in row else ""
        job = f"{row['shape']}{weights}, {row['prompt_tokens']} + {row['new_tokens']}"
        times = row["times"].get("transformers generate")
        kv = f"{row['kv_bytes'] / 2**20:,.0f} MiB" if row.get("kv_bytes") else "-"
        cells = [job, row["what"], str(row["batch"]), f"{row['tokens_per_s']:,.0f}", f"{row['ms_per_step']:.1f}"]
        cells += [f"{row['of_roofline']:.0%}", "-" if times is None else f"{times:.1f}", kv]
        lines.append(f"| {gpu} | {' | '.join(cells)} |")
    [switch] = stages["switch"]["rows"]
    cost = f"{switch['ms_median']:.0f} ms each (median), in which its step is captured"
    lines += ["", f"{switch['what']} of {switch['shape']}: {switch['recompilations']} recompilation, {cost}."]
    origins = [(stage, "bench_cuda.json") for stage in stages.values()] + [(others[name], name) for name in others]
    return "\n".join([*lines, "", *(provenance(*origin) + "  " for origin in origins)]).rstrip()


def busy() -> str:
    """Beside a process that keeps as many threads busy."""
    record = result("busy_cpu.json")
    lines = ["| decode | tokens/s alone | share beside it |", "|---|---|---|"]
    for row in record["rows"]:
        way = f"{row['what']}, {'compiled' if row['compiled'] else 'eager'}"
        lines.append(f"| {way} | {row['alone']:.1f} | {row['share_beside']:.0%} |")
    return "\n".join([*lines, "", provenance(record, "busy_cpu.json")])


def serving() -> str:
    """The server under load, beside the same requests as a job."""
    record = result("serve_load.json")
    lines = ["| way | tokens/s | share of the job | lost | wrong | server's memory, MiB |", "|---|---|---|---|---|---|"]
    by_what = {row["what"]: row for row in record["rows"]}
    for what, row in by_what.items():
        if "tokens_per_s" in row:
            mib = " \u2192 ".join(f"{each:.0f}" for each in row.get("server_mib", ())) or "-"
            cells = [f"{row['tokens_per_s']:,.0f}", f"{row['share_of_job']:.0%}"]
            cells += [str(row.get(name, "-")) for name in ("lost", "wrong")]
            lines.append(f"| {what} | {' | '.join(cells)} | {mib} |")
    alone, end = by_what["alone in one row"], by_what["SIGTERM in the middle"]
    load = f"{record['requests']:,} requests of {record['clients']} clients at a time"
    differ = f"Of {alone['requests']} that also ran alone in one row, {alone['wrong']} differ"
    told = f"A SIGTERM in the middle: {end['in_flight']} in flight were answered, {end['lost']} lost"
    lines += ["", f"{load}. {differ}. {told}."]
    return "\n".join([*lines, "", provenance(record, "serve_load.json")])


def ask() -> str:
    """Many questions about one text: what reading it once saves, in a line."""
    if not (ROOT / "results" / "ask_cpu.json").exists():
        return "Not measured yet."
    record = result("ask_cpu.json")
    full, each, kept = record["rows"]
    full_mib, mib = (f"{size / 2**20:,.1f} MiB" for size in (full["kv_bytes"], kept["bytes"]))
    again, squeezed, once = (f"{row['seconds']:.1f} s" for row in (full, each, kept))
    return (
        f"{record['questions']} questions about a text of {record['tokens']:,} tokens take {again} with the full cache "
        f"({full_mib}), {squeezed} at 20%, {once} from a file of {mib} that was made once in {kept['read_s']:.1f} s. "
        f"{provenance(record, 'ask_cpu.json')}"
    )


def first() -> str:
    """Equal layers and perturbation on a real model, and what the paper's plan does there."""
    fidelity, passkey = (f"eval_smollm2{name}/summary.json" for name in ("", "_passkey"))
    record, asked = result(fidelity), result(passkey)
    kl, digits = Board(record, "fidelity", "kl"), Board(asked, "passkey 1024", "digits")
    heads = [f"{name} at {b:.0%}" for name, board in (("KL", kl), ("digits", digits)) for b in board.budgets]
    lines = [f"| SmolLM2-135M-Instruct | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for policy in dict.fromkeys(policy for policy, *_ in kl.scores):
        cells = [
            " \u2192 ".join(board.mean(board.scores[policy, plan, b][:1]) for plan in ("uniform", "perturbation"))
            for board in (kl, digits)
            for b in board.budgets
        ]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    (better, worse, cells), (found, missed, pairs) = (board.counts("perturbation") for board in (kl, digits))
    gain, loss = (
        [difference for (_, plan, _), (difference, *_) in kl.gains.items() if plan == name]
        for name in ("perturbation", "squeeze")
    )
    plan = next(row["plan"] for row in record["cells"] if row["layers"] == "squeeze")
    about = (
        f"Equal layers \u2192 perturbation. KL to the full cache, over the 32 tokens after each of {kl.rows} texts of "
        f"news of 1,024 tokens. Digits: how much of a number hidden in such a text is found again, {digits.rows} "
        f"questions; the full cache finds {digits.full[0]:.0%}. KL is lower beyond its 95% interval in {better} of "
        f"{cells} cells, higher in {worse}, {sum(gain) / len(gain):+.0f}% on average; more digits in {found} of "
        f"{pairs}, fewer in {missed}. The paper's plan makes KL {min(loss):+.0f} to {max(loss):+.0f}%: "
        f"{sum(slots < sum(plan) / len(plan) for slots in plan)} of the {len(plan)} layers, whose signals lie close "
        "together, get less."
    )
    origin = f"{provenance(record, fidelity)}; digits: [{passkey}](results/{passkey})"
    return "\n".join([*lines, "", about, "", origin])


def evaluation(name: str, about: str = "", *also: str) -> str:
    """What counts most of each task of an evaluation, how its plans do, and other metrics."""
    file, parts = f"{name}/summary.json", []
    record = result(file)
    for task, told in record["tasks"].items():
        board = Board(record, task, told["metric"])
        parts += [board.table(f"{about}{TITLES[told['metric']]}"), f"{board.rows} rows. {board.verdict()}"]
        parts += [Board(record, task, metric).table(f"{about}{TITLES[metric]}") for metric in also]
    return "\n\n".join([*parts, provenance(record, file)])


def kvpress() -> str:
    """Our caches and kvpress's presses on the same rows."""
    board = Board(result("eval_kvpress/summary.json"), "fidelity", "kl")
    best: dict[tuple[float, bool], float] = {}  # by budget and whether it is a press
    for (policy, _, budget), (kl, *_) in board.scores.items():
        key = budget, policy.startswith("kvpress")
        best[key] = min(kl, best.get(key, kl))
    ahead = ", ".join(f"{1 - best[budget, False] / best[budget, True]:.0%} at {budget:.0%}" for budget in board.budgets)
    lead = f"KL of our best pair is lower than that of its best press by {ahead}."
    return "\n\n".join([lead, evaluation("eval_kvpress"), evaluation("eval_kvpress_unseen", "unseen: ")])


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
    "README.md": {"first": first, "ask": ask, "models": models},
    "RESULTS.md": {
        "real": partial(evaluation, "eval_smollm2", "1,024 + 32 tokens: "),
        "longer": partial(evaluation, "eval_smollm2_2048", "2,048 + 32 tokens: "),
        "gemma": partial(evaluation, "eval_gemma3", "Gemma 3 270M, 1,024 + 32 tokens: "),
        "passkey": partial(evaluation, "eval_smollm2_passkey", "", "exact"),
        "unseen": partial(evaluation, "eval_smollm2_unseen", "", "exact"),
        "choices": partial(evaluation, "eval_smollm2_choices"),
        "kvpress": kvpress,
        "real_speed": real_speed,
        "start": start,
        "busy": busy,
        "cuda": cuda,
        "decode": decode,
        "step": step,
        "throughput": throughput,
        "batch": batch,
        "chat": chat,
        "serving": serving,
        "families": families,
    },
}


def main() -> int:
    return guarded("render_readme.py", run)


def run() -> int:
    changed = False
    for page, sections in PAGES.items():
        path = ROOT / page
        before = text = read_text(path)
        for name, render in sections.items():
            start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
            if len(parts := re.split(f"{start}.*?{end}", text, flags=re.S)) != 2:
                raise UserError(f"{page} has no section {name}, or several")
            text = f"{start}{render()}{end}".join(parts)
        if text != before:
            changed = True
            if "--check" not in sys.argv:
                write_whole(path, text)
    return int(changed and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
