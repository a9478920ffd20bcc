"""Evaluation against slow definitions: the naive cache, the engine's own batches, metrics by hand, whole runs."""

import json
import random
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import render_readme
import torch
from conftest import random_ids, random_model
from naive import NaiveCache

import chat
import checkpoint
import evaluate
import tokenizer as tokenizers
from benchmark.record import portable
from conversation import Conversation
from engine import Engine, Request
from errors import UserError
from evaluation import standard, texts
from evaluation.cells import FULL, Batch, Cell, grid
from evaluation.fidelity import Fidelity
from evaluation.leaderboard import leaderboard
from evaluation.passkey import Passkey, scored
from evaluation.recall import Recall
from evaluation.summary import Scores, interval, wilson
from evaluation.tasks import Log, Row, batches
from graphs import compiled_graphs

ROOT = Path(__file__).resolve().parent.parent
TEXT = max(evaluate.tiny_data.source_files()[1][:9], key=lambda file: file.stat().st_size)
SMALL = f"--text {TEXT} --length 96 --lengths 64,80 --texts 3 --read 6 --needles 8 --questions 6 --batch 3".split()
GRID = "--policies streaming,h2o --layers uniform,squeeze --budgets 0.3,0.6".split()


@pytest.fixture(scope="module")
def tiny():
    model, _ = checkpoint.load(evaluate.EMBEDDED)
    tokenizer = tokenizers.load(evaluate.EMBEDDED)
    return model, tokenizer, tokenizer.encode(TEXT.read_text(), special=False)


def refused(capsys, *args) -> str:
    code = evaluate.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("evaluate.py: error: "), err
    return err


@pytest.mark.parametrize("policy", ["streaming", "h2o", "dropkv"])
def test_fidelity_equals_the_naive_cache(model, policy):
    """KL, agreement and loss of single rows, from lists that evict token by token."""
    task = Fidelity([random_ids(60)], context=20, new=12, count=2)
    assert [row.ids + row.expected for row in task.rows] == [random_ids(60)[:33], random_ids(60)[27:]]
    cell = Cell(policy, "squeeze", 0.5, 0.4)
    for row in task.rows:
        [got] = task.results(batch := Batch(model, [cell], [row.ids], 12), cell, [row])
        assert sum(batch.plan) <= 4 * 12 and len(set(batch.plan)) > 1
        naive, full = NaiveCache(model, policy, batch.plan), NaiveCache(model, "full", [99] * 4)
        for cache in (naive, full):
            cache.prompt(row.ids)
        steps = [(naive.feed(token), full.feed(token)) for token in row.expected[:-1]]
        own, other = (torch.stack(logits).float().log_softmax(-1) for logits in zip(*steps, strict=True))
        want = {
            "kl": torch.nn.functional.kl_div(own, other, log_target=True, reduction="sum").item() / 12,
            "agree": (own.argmax(-1) == other.argmax(-1)).double().mean().item(),
            "loss": torch.nn.functional.cross_entropy(own, torch.tensor(row.expected[1:])).item(),
        }
        assert want["kl"] > 1e-3
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "cell",
    [FULL, Cell("h2o", "squeeze", 0.3, 0.3), Cell("streaming", "pyramid", None, 12)]
    + [Cell("snapkv", "perturbation", None, 15)],
)
def test_greedy_equals_the_engine(model, cell):
    """One prefill, then cells one after the other: each as the engine would do it from the start, ragged rows."""
    rows, eos = [random_ids(n, seed=n) for n in (30, 41, 35)], frozenset(range(0, 97, 7))
    others = [other for other in grid([cell.policy], ["uniform"], [], [0.5]) if other.policy == cell.policy]
    batch = Batch(model, [*others, cell], rows, 10)
    for other in others:
        batch.greedy(other)
    requests = [Request(ids, 10, eos_ids=eos) for ids in rows]
    engine = Engine(model, cell.policy, cell.layer_policy(), cell.budget)
    done = {id(completion.request): completion for completion in engine.generate(requests)}
    want = [[t for t in done[id(request)].tokens if t not in eos] for request in requests]
    assert batch.greedy(cell, eos) == want and len(set(map(len, want))) > 1
    assert batch.plan == done[id(requests[0])].figures.plan
    assert batch.kv_share == sum(batch.plan) / (4 * 51)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_compiled_equals_eager(model, policy):
    """Both what is forced and what is said, for two plans."""
    torch._dynamo.reset()  # else graphs of other tests may serve
    before = compiled_graphs()
    rows, following = [random_ids(30), random_ids(30, seed=2)], torch.tensor([random_ids(6), random_ids(6, seed=3)])
    cells = [Cell(policy, "uniform", None, 0.5), Cell(policy, "perturbation", None, 0.3)]
    one, other = Batch(model, cells, rows, 6), Batch(model, cells, rows, 6, compile=True)
    for cell in cells:
        for a, b in zip(one.forced(cell, following), other.forced(cell, following), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert one.greedy(cell) == other.greedy(cell)
    assert compiled_graphs() > before


def test_recall_prompts(tiny):
    """The length asked for, the fact at its depth, the answer only there; equal seeds give equal prompts."""
    _, tokenizer, text = tiny

    def made(**changes):
        kind = {"length": 200, "facts": 3, "count": 10} | changes
        return Recall(lambda words: tokenizer.encode(words, special=False), tokenizer.decode, [text], **kind)

    task = made()
    assert [row.ids for row in task.rows] == [row.ids for row in made().rows] != [row.ids for row in made(seed=1).rows]
    for row in task.rows:
        said, answer = tokenizer.decode(row.ids), tokenizer.decode(row.expected).strip()
        assert len(row.ids) == 200 and len(row.expected) == 2
        assert said.count(answer) == 1 and said.count("# define") == 4
        asked = said.splitlines()[-1]
        assert f"{asked} {answer}\n" in said
    needle = made(facts=1, length=400)
    where = [tokenizer.decode(row.ids).index("# define") / len(tokenizer.decode(row.ids)) for row in needle.rows]
    assert np.abs(np.array(where) - [row.about["depth"] for row in needle.rows]).max() < 0.2
    with pytest.raises(ValueError, match="12 tokens are too few for 3 facts"):
        made(length=12)


def test_results_name_no_place_of_this_machine(tmp_path):
    assert portable("--text") == "--text" and portable("runs/a.txt") == "runs/a.txt"
    assert portable(str(ROOT / "results" / "a")) == "results/a" and portable(str(tmp_path / "b.jsonl")) == "b.jsonl"


def test_batches_hold_rows_of_about_the_same_length():
    rows = [Row(n, [0] * length, None) for n, length in enumerate([10, 100, 95, 90, 89, 11, 100, 9])]
    made = list(batches(rows, 3))
    assert [[len(row.ids) for row in batch] for batch in made] == [[100, 100, 95], [90, 89], [11, 10], [9]]
    asked = [Row(n, [0] * 50, None, question=[0] * length) for n, length in enumerate([2, 3, 2, 2, 2])]
    assert [[row.number for row in batch] for batch in batches(asked, 3)] == [[1], [0, 2, 3], [4]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    assert evaluate.main([*GRID, *SMALL, "--tasks", "fidelity,needle,recall", "--out", str(out)]) == 0
    return out


def test_a_run_writes_everything(small):
    record = json.loads((small / "summary.json").read_text())
    assert {"device", "date", "torch", "command", "settings", "definition"} <= record.keys()
    assert len(record["cells"]) == 9 and len(record["against"]) == 4 and len(record["cuts"]) == 4
    full = record["cells"][0]
    assert full["policy"] == "full" and full["kv_share"] == 1 and full["scores"]["fidelity"]["kl"] == [0, 0, 0]
    assert record["tasks"]["fidelity"]["rows"] == 3 and set(record["depths"]) == {"needle 64", "needle 80", "recall 96"}
    for row in record["cells"][1:]:  # equal totals, within a granule of a layer
        assert row["budget"] - 0.03 < row["kv_share"] <= row["budget"]
    pictures = {path.name for path in small.glob("*.png")}
    assert pictures == {"frontier.png", "plans.png", "importance.png", "needle.png"}
    table = (small / "table.md").read_text()
    assert table.count("\n| streaming | squeeze p=0.3 |") == 2 and "\n- squeeze p=0.3, recall 96: better in " in table
    lines = [json.loads(line) for line in (small / "predictions.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 9 * (3 + 2 * 8 + 6)
    assert {"prediction", "expected", "exact", "depth"} <= lines[-1].keys()
    shown = render_readme.quality_of(record, "x/summary.json")
    assert "| h2o |" in shown and "summary.json" in shown


def test_an_interrupted_run_goes_on_to_the_same_numbers(small, tmp_path, capsys, monkeypatch):
    """Cut off in the middle of a line, and within a batch."""
    monkeypatch.setattr("evaluation.pictures.draw", lambda *_: [])
    whole = (small / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(whole[: len(whole) * 2 // 5])
    args = [*GRID, *SMALL, "--tasks", "fidelity,needle,recall", "--out", str(tmp_path)]
    assert "holds results; go on with --resume" in refused(capsys, *args)
    assert "other settings (read)" in refused(capsys, *args, "--resume", "--read", "5")
    assert evaluate.main([*args, "--resume"]) == 0
    assert (tmp_path / "predictions.jsonl").read_bytes() == whole
    first, again = (json.loads((out / "summary.json").read_text()) for out in (small, tmp_path))
    assert {n: v for n, v in first.items() if n != "command"} == {n: v for n, v in again.items() if n != "command"}
    monkeypatch.setattr(evaluate.run.__globals__["Batch"], "__init__", None)  # nothing is left to do
    assert evaluate.main([*args, "--resume"]) == 0


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
    """Between results, in the middle of one, and while a torn last line is cut off."""
    args = [*GRID, "--tasks", "fidelity", "--length", "96", "--read", "6", "--texts", "40", "--batch", "2"]
    args = ["--text", str(TEXT), *args]
    assert evaluate.main([*args, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    log, rng = tmp_path / "killed" / "predictions.jsonl", random.Random(3)
    command = [sys.executable, "evaluate.py", *args, "--out", str(log.parent), "--resume"]
    for kill in range(30):
        before = log.stat().st_size if log.exists() else 0
        if torn := kill % 3 == 2:
            log.write_bytes(log.read_bytes() + b'{"task": "fidelity", "row": 1, "pol')
        start = log.stat().st_size if log.exists() else 0
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            begun = time.monotonic()
            while run.poll() is None and time.monotonic() < begun + 60:
                if log.exists() and (log.stat().st_size != start if torn else log.stat().st_size > before):
                    break
                time.sleep(0.0005 if torn else 0.01)
            time.sleep(0 if torn else rng.uniform(0, 0.3))
            run.kill()
        assert log.stat().st_size >= before and log.read_bytes()[:before] == whole[:before]
        assert whole.startswith(log.read_bytes()[: log.read_bytes().rindex(b"\n") + 1])
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert log.read_bytes() == whole
    shown = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "whole", log.parent)]
    assert {**shown[0], "command": 0} == {**shown[1], "command": 0}


WRONG = {  # what a line of results may say instead, and what is told
    "empty": ("", "not JSON"),
    "a list": ("[]", "not a JSON object"),
    "torn inside": ('{"task": "fid', "not JSON"),
    "deep": ("[" * 9999, "deep"),
    **{f"no {name}": ({name: ...}, f"'{name}' is missing") for name in ("task", "row", "p", "kv_share", "kl", "loss")},
    **{
        f"odd {name}": ({name: [1]}, f"'{name}' must be") for name in ("task", "row", "policy", "budget", "kl", "agree")
    },
    "NaN": ({"kl": float("nan")}, "NaN"),
    "huge": ({"row": 10**30}, "'row' must be"),
    "truth": ({"row": True}, "'row' must be"),
    "plan": ({"plan": [0]}, "'plan' must be"),
    "signal": ({"policy": "full", "signal": "x"}, "'signal' must be"),
    **{f"long {name}": ({name: 10**350}, f"'{name}' must be") for name in ("kl", "budget", "kv_share")},
    "short plan": ({"plan": [3]}, "its plan has 1 layers, the model 2"),
    "no signal": ({"policy": "full", "signal": []}, "its signal has 0 layers, the model 2"),
    "twice": ({}, "the result of line 2 again"),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_line_of_a_log_is_checked(tmp_path, name):
    change, words = WRONG[name]
    row = {
        "task": "fidelity",
        "row": 0,
        "policy": "h2o",
        "layers": "uniform",
        "p": None,
        "budget": 0.5,
        "kv_share": 0.5,
    }
    row |= {"kl": 0.1, "agree": 1.0, "loss": 2.0}
    needed = {"fidelity": evaluate.summary.needed(types.SimpleNamespace(metric="kl"))}
    other = change if isinstance(change, str) else {k: v for k, v in (row | change).items() if v is not ...}
    other = other if isinstance(other, str) else json.dumps(other)
    path = tmp_path / "predictions.jsonl"
    text = json.dumps({"settings": {"a": 1}}) + "\n" + json.dumps(row) + "\n" + other + "\n"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Log(path, {"a": 1}, True, needed, 2)
    assert "predictions.jsonl line 3 is no result" in str(caught.value) and words in str(caught.value)
    assert len(str(caught.value)) < 300 and path.read_text() == text
    path.write_text(text[: text.rindex("{") if not isinstance(change, str) else len(text) - len(other) - 1] + '{"torn')
    Log(path, {"a": 1}, True, needed, 2).close()
    assert len(path.read_text().splitlines()) == 2  # only the torn line has gone


def test_first_lines_of_a_log(tmp_path):
    path = tmp_path / "predictions.jsonl"
    header = '{"settings": {"a": 1}}\n'
    for text, words in (("hello", "no result"), ("{}\n", "'settings' is missing"), ("[1]\n", "not a JSON object")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"predictions.jsonl line 1 .*{words}"):
            Log(path, {"a": 1}, True)
        assert path.read_text() == text
    for text in ("", header[:9], header, header + '{"t'):
        path.write_text(text)
        log = Log(path, {"a": 1}, True)
        assert path.read_text() == header
        with pytest.raises(UserError, match="is being written by another run"):
            Log(path, {"a": 1}, True)
        log.close()


def test_results_that_are_no_numbers_end_the_run(tmp_path):
    log = Log(tmp_path / "a", {}, False)
    with pytest.raises(UserError, match="kl is nan; the model's numbers overflow, so try another --dtype"):
        log.add({"task": "fidelity", "row": 0, **FULL.__dict__, "kl": float("nan")})


def test_interrupt(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Fidelity, "results", interrupted)
    assert evaluate.main([*SMALL, "--tasks", "fidelity", "--out", str(tmp_path)]) == 130
    assert "--resume goes on from here" in capsys.readouterr().err


class Fake:
    """A task with given results: exact answers of each cell."""

    name, metric, new = "fake", "exact", 1

    def __init__(self, count: int):
        self.rows = [Row(n, [0], None) for n in range(count)]


@pytest.fixture
def scores(tmp_path):
    def made(hits: dict[Cell, list[bool]]) -> Scores:
        task, log = Fake(len(hits[FULL])), Log(tmp_path / f"{len(hits[FULL])}.jsonl", {}, resume=False)
        for cell, results in hits.items():
            for row, exact in enumerate(results):
                log.add({"task": "fake", "row": row, **cell.__dict__, "exact": exact})
        return Scores(task, list(hits), log)

    return made


def test_largest_cuts(scores):
    """Estimate: 0 of 1000 lost at 0.4, 8 at 0.3, 0 at 0.2 but 20 at 0.25: everything above must hold too."""
    lost = {0.5: 0, 0.4: 2, 0.3: 8, 0.25: 20, 0.2: 0}
    hits = {FULL: [True] * 1000}
    hits |= {Cell("h2o", budget=b): [n >= count for n in range(1000)] for b, count in lost.items()}
    figures = [{"kv_share": cell.budget or 1} for cell in hits]
    cells = [cell for cell in hits if cell != FULL]
    assert scores(hits).cut(cells, figures) == {"estimate": 0.7, "sure": 0.6}
    # Without a single loss 100 questions still leave 3% open.
    few = {cell: [True] * 100 for cell in list(hits)[:2]}
    assert scores(few).cut([list(few)[1]], figures) == {"estimate": 0.5, "sure": None}
    never = {cell: [False] * 50 for cell in list(hits)[:2]}  # what the full cache cannot do cannot be lost
    assert scores(never).cut([list(never)[1]], figures) == {"estimate": None, "sure": None}


def test_differences_are_paired(scores):
    """b is a with 5 of 200 lost: far less than the spread of either shows, and the interval excludes 0."""
    a = [bool(n % 2) for n in range(200)]
    b = [hit and n >= 10 for n, hit in enumerate(a)]
    one, other = Cell("h2o", budget=0.3), Cell("h2o", "squeeze", 0.3, 0.3)
    made = scores({FULL: [True] * 200, one: a, other: b})
    mean, low, high = made.difference(other, one)["exact"]
    assert mean == -0.025 and low < -0.035 and -0.015 < high < 0
    assert made.of(one)["exact"][0] == 0.5 and made.of(FULL)["exact"][1:] == pytest.approx([0.98116, 1], abs=1e-4)


def test_intervals():
    assert wilson(0.9, 100) == pytest.approx((0.82563, 0.94477), abs=1e-5)  # statsmodels' proportion_confint
    assert interval(np.arange(1001.0)) == (25, 975)


LONG = {
    "input": "Who has the lantern?",
    "context": "word " * 3000,
    "answers": ["The violin"],
    "length": 3000,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
RULER = {"index": 0, "input": "Some special magic numbers ...", "outputs": ["12", "34"], "length": 99}


def written(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_standard_files_run_end_to_end(tmp_path):
    """Published formats, a few dozen rows: all of them predicted, scored and resumable."""
    folder = tmp_path / "data"
    written(folder / "hotpotqa.jsonl", [LONG | {"context": "word " * (40 + n % 4)} for n in range(25)])
    written(folder / "vt" / "validation.jsonl", [RULER | {"answer_prefix": " are"}] * 24)
    written(folder / "qa_2.jsonl", [RULER | {"outputs": ["a"]}] * 2)
    args = ["--files", str(folder), "--policies", "streaming", "--layers", "squeeze", "--budgets", "0.5"]
    assert evaluate.main([*args, "--rows", "24", "--batch", "24", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: task["rows"] for name, task in record["tasks"].items()} == {
        "longbench: hotpotqa": 24,
        "ruler: vt": 24,
        "ruler: qa_2": 2,
    }
    metrics = {name: list(scores) for name, scores in record["cells"][1]["scores"].items()}
    assert metrics["ruler: vt"] == ["match_all"]
    assert metrics["ruler: qa_2"] == ["match_part"] and metrics["longbench: hotpotqa"] == ["f1"]


def task_of(tiny, name: str, rows: list[dict], limit: int = 2048) -> standard.Standard:
    return standard.Standard(name, [json.dumps(row).encode() for row in rows], tiny[1], frozenset(), limit)


def test_prompts_of_standard_files(tiny):
    decode = tiny[1].decode
    long = task_of(tiny, "hotpotqa.jsonl", [LONG])
    text = decode(long.rows[0].ids)
    assert len(long.rows[0].ids) == 2048 - 32 == 2048 - long.new
    assert text.startswith("Answer the question based on the given passages. Only give me")
    assert text.endswith("do not output any other words.\n\nQuestion: Who has the lantern?\nAnswer:")
    prefixed = task_of(tiny, "x/vt/validation.jsonl", [RULER | {"answer_prefix": " Answer: they are"}])
    assert decode(prefixed.rows[0].ids).endswith("numbers ... Answer: they are") and prefixed.new == 30
    assert task_of(tiny, "qasper_e.jsonl", [LONG | {"dataset": "qasper_e"}]).new == 128
    news = task_of(tiny, "cnn.jsonl", [{"article": "It rained.", "highlights": "Rain.", "id": "1"}])
    assert decode(news.rows[0].ids).endswith("It rained.\n\nTL;DR:") and news.rows[0].expected == ["Rain."]
    assert standard.middle_cut(list(range(10)), 5) == [0, 1, 2, 8, 9]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("a.jsonl", [LONG, {"input": "x", "context": "y"}], "a.jsonl row 2: 'answers' is missing"),
        (
            "a.jsonl",
            [LONG, LONG, LONG | {"answers": "x"}],
            "row 3: 'answers' must be a list, each of it a text",
        ),
        ("a.jsonl", [LONG | {"answers": []}], "row 1: 'answers' is empty"),
        ("vt.jsonl", [RULER, RULER | {"outputs": [7]}], "vt.jsonl row 2: 'outputs' must be"),
        ("a.jsonl", [{"question": "x", "id": 3}], "row 1 has the fields question, id; known formats: longbench"),
        ("a.jsonl", [LONG | {"dataset": "dureader"}], "dataset dureader is not among narrativeqa"),
        ("sort.jsonl", [RULER], "sort is no RULER task; their names begin with niah"),
        ("a.jsonl", [], "has no rows"),
    ],
)
def test_wrong_files(tiny, name, rows, words):
    with pytest.raises(ValueError) as error:
        task_of(tiny, name, rows)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_wrong_lines(tiny):
    with pytest.raises(ValueError, match="f row 2: not JSON"):
        standard.Standard("f", [json.dumps(RULER).encode(), b"{"], tiny[1], frozenset(), 2048)
    with pytest.raises(ValueError, match="f row 1: not a JSON object"):
        standard.Standard("f", [b"[1]"], tiny[1], frozenset(), 2048)


def test_metrics():
    m = standard.METRICS
    assert m["f1"]("The violin, a lantern!", ["x", "violin lantern table"]) == pytest.approx(0.8)
    assert m["f1"]("", ["x"]) == 0
    assert m["rouge_l"]("the cat sat", ["the cat lay down", "dog"]) == pytest.approx(4 / 7)
    assert m["edit_similarity"]("# note\nreturn ab\nx", ["return abc"]) == pytest.approx(18 / 19)
    assert m["classification"]("Food or Color", ["Food"], ["Food", "Color", "Foo"]) == 0.5
    assert m["classification"]("Color", ["Food"], ["Food", "Color"]) == 0
    assert m["number"]("Paragraph 3, not 4", ["Paragraph 3"]) == 0.5 and m["number"]("none", ["7"]) == 0
    assert m["match_all"]("It is 12.", ["12", "34"]) == 0.5 and m["match_part"]("PARIS", ["x", "Paris"]) == 1


def test_only_the_first_line_counts_where_longbench_says_so(tiny, monkeypatch):
    said = tiny[1].encode("\n Food\nColor", special=False)
    batch = types.SimpleNamespace(greedy=lambda *_: [said])
    for dataset, score in (("trec", 1), ("lcc", None)):
        row = LONG | {"dataset": dataset, "answers": ["Food"], "all_classes": ["Food", "Color"]}
        task = task_of(tiny, "a", [row])
        [result] = task.results(batch, FULL, task.rows)
        assert result["prediction"] == "\n Food\nColor" and (score is None or result["classification"] == score)


def test_files_from_a_zip_and_from_the_hub(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", json.dumps(LONG) + "\n")
    assert list(standard.read(str(tmp_path))) == [("data/lcc.jsonl", [json.dumps(LONG).encode()])]
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["repo_type"]))
        if name == "no/such":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(list(standard.read("THUDM/LongBench"))) == 1 and asked == [("THUDM/LongBench", "dataset")]
    with pytest.raises(ValueError, match="no/such is no file here, and the hub did not give it: 404"):
        list(standard.read("no/such"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policies", "lru"], "unknown policy 'lru'"),
        (["--layers", "cone"], "unknown layer policy 'cone'"),
        (["--budgets", "0.2,1.5"], "not 1.5"),
        (["--budgets", "much"], "'much'"),
        (["--p", "0"], "p must be in (0, 1], not 0.0"),
        (["--tasks", "chess"], "unknown task 'chess'; known: fidelity, needle, recall"),
        (["--questions", "0"], "--questions must be at least 1, not 0"),
        (["--suite", "huge"], "'huge'"),
        (["--checkpoint", "./nowhere"], "nowhere does not exist"),
        (["--files", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--text", TEXT, "--length", "3000", "--questions", "1", "--texts", "1"], "exceed the model's 2048 positions"),
        (["--text", TEXT, "--length", "99999999"], "--length 99999999 and --read 64 need more"),
        (["--policies", "streaming", "--budgets", "4", *SMALL], "needs at least 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_bad_input(capsys, tmp_path, args, words):
    assert words in refused(capsys, *args, "--out", tmp_path)


def test_own_text(tmp_path):
    """Any UTF-8 text serves for reading and for hiding facts."""
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 60)
    args = ["--text", str(tmp_path / "text.txt"), "--policies", "window", "--layers", "uniform", "--budgets", "40"]
    assert evaluate.main([*args, *SMALL, "--out", str(tmp_path / "out")]) == 0


POLICY_WORDS = ["full", "streaming", "h2o", "tova", "dropkv", "snapkv:recent=8", "keydiff", "streaming:sinks=2"]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 16, "windowed": (0, 2)}], ids=["", "windows"])
def test_one_prefill_equals_one_for_each_policy(model, changes):
    """Plans and tokens of every cell, in an order that changes between sinks and none; ragged rows, windows."""
    model = random_model(**changes) if changes else model
    rows = [random_ids(n, seed=n) for n in (30, 41, 35)]
    cells = [Cell(word, plan, None, 0.4) for plan in ("squeeze", "perturbation") for word in POLICY_WORDS[1:]]
    together = Batch(model, cells, rows, 6)
    for cell in [*cells, FULL]:
        alone = Batch(model, [cell], rows, 6)
        assert together.greedy(cell) == alone.greedy(cell)
        assert together.plan == alone.plan and (cell == FULL or len(set(together.plan)) > 1)
        ids = torch.tensor([random_ids(5, seed=n) for n in range(3)])
        for one, other in zip(together.forced(cell, ids), alone.forced(cell, ids), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(together.signals, alone.signals)


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "snapkv"])
def test_a_later_question_equals_a_conversations_second_turn(model, policy):
    """Under the same plan: the context as a first turn whose answer is an end-of-sequence token at once."""
    contexts, questions = [random_ids(n, seed=n) for n in (40, 33)], [random_ids(7, seed=n) for n in (8, 9)]
    cell = FULL if policy == "full" else Cell(policy, "squeeze", 0.3, 0.4)
    batch = Batch(model, [cell], contexts, 7 + 9)
    got = batch.greedy(cell, questions=questions)
    assert sum(batch.plan) < 0.5 * 4 * 56 or cell == FULL
    for context, question, answer in zip(contexts, questions, got, strict=True):
        turns = Conversation(Engine(model, policy, plan=batch.plan if cell != FULL else None))
        assert len(list(turns.stream(context, 1, eos_ids=range(97)))) == 1
        assert list(turns.stream(question, 9)) == answer and len(set(answer)) > 1


def test_unseen_parts_the_prompt(tiny):
    """Together text and question are the prompt that is seen; batches hold questions of one length."""
    _, tokenizer, text = tiny

    def encode(words: str) -> list[int]:
        return tokenizer.encode(words, special=False)

    for kind, args in (
        (Recall, (encode, tokenizer.decode, [text], 200, 3, 10)),
        (Passkey, (tokenizer, None, [text], 400, 10)),
    ):
        seen, unseen = kind(*args), kind(*args, unseen=True)
        for one, other in zip(seen.rows, unseen.rows, strict=True):
            assert one.ids == other.ids + other.question and one.expected == other.expected and not one.question
        asked = tokenizer.decode(unseen.rows[0].question)
        assert asked.startswith("\n# define" if kind is Recall else "\nWhat is the special magic number for")
        made = list(batches(unseen.rows, 4))
        assert sorted(row.number for batch in made for row in batch) == list(range(10))
        for batch in made:
            assert len({len(row.question) for row in batch}) == 1


def test_standard_files_unseen(tiny):
    def parts(name: str, row: dict) -> tuple[str, str]:
        task = standard.Standard(name, [json.dumps(row).encode()], tiny[1], frozenset(), 2048, unseen=True)
        [row] = task.rows
        assert len(row.ids) + len(row.question) + task.new <= 2048
        return tiny[1].decode(row.ids), tiny[1].decode(row.question)

    text, question = parts("hotpotqa.jsonl", LONG)
    assert text.startswith("Answer the question") and text.endswith("word ") and "lantern" not in text
    assert question.endswith("Question: Who has the lantern?\nAnswer:")
    ruler = RULER | {"input": "Some numbers.\nOne: 12.\nWhat is one?", "answer_prefix": " It is"}
    assert parts("vt.jsonl", ruler) == ("Some numbers.\nOne: 12.", "\nWhat is one? It is")
    assert parts("cnn.jsonl", {"article": "It rained.", "highlights": "Rain."}) == ("It rained.", "\n\nTL;DR:")
    with pytest.raises(ValueError, match="vt.jsonl row 1: the format does not part text and question"):
        parts("vt.jsonl", RULER)


def test_passkey_prompts(tiny):
    """Never longer than asked for, the number once, at its depth, asked for at the end; the score by hand."""
    _, tokenizer, text = tiny
    task = Passkey(tokenizer, None, [text], 400, 10)
    for row in task.rows:
        said = tokenizer.decode(row.ids)
        assert 380 < len(row.ids) <= 400 and said.count(row.expected) == 1 and len(row.expected) == 7
        key = said.rpartition("number for ")[2].split()[0]
        assert f"One of the special magic numbers for {key} is: {row.expected}." in said
        assert said.endswith(f"The special magic number for {key} mentioned in the provided text is")
        assert abs(said.index("One of the special") / len(said) - row.about["depth"]) < 0.25
    assert task.new >= 8
    for said, exact, digits in (
        (" 1234567.", True, 7),
        (": 1234568, I think", False, 6),
        ("1239567 or 1234567", False, 6),
        ("12", False, 2),
        ("2345671", False, 0),
        ("none", False, 0),
        ("12345678", False, 7),
    ):
        assert {name: scored(said, "1234567")[name] for name in ("exact", "digits")} == {
            "exact": exact,
            "digits": digits / 7,
        }
    with pytest.raises(ValueError, match="no text has 9999999 tokens"):
        Passkey(tokenizer, None, [text], 9999999, 1)
    with pytest.raises(ValueError, match="20 tokens are too few"):
        Passkey(tokenizer, None, [text], 20, 1)


def test_passkey_through_the_chat_template(tiny, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<a>"
    )
    template = chat.load(tmp_path, tiny[1])
    for unseen in (False, True):
        [row] = Passkey(tiny[1], template, [tiny[2]], 300, 1, unseen).rows
        said = tiny[1].decode(row.ids + row.question)
        assert said.startswith("<user>A special magic number") and "text?</><a>The special magic number for" in said
        assert unseen == bool(row.question) == tiny[1].decode(row.question).startswith("\nWhat is the special")


DOCUMENTS = [{"context": "a NEWLINE_CHAR b " * 30}, {"article": "c"}, {"text": "d " * 90}, {"document": "e " * 70}]


def test_documents(tmp_path):
    """Each line is one; pieces come from the beginning of those long enough, and never from two."""
    path = str(written(tmp_path / "d.jsonl", DOCUMENTS))
    read = texts.documents(path)
    assert len(read) == 4 and read[0].startswith("a \n b a") and texts.documents(path, 3) == read[3:]
    ids = [list(text.encode()) for text in read]
    task = Fidelity(ids, context=100, new=20, count=3)
    assert [row.ids + row.expected for row in task.rows] == [ids[0][:121], ids[2][:121], ids[3][:121]]
    with pytest.raises(ValueError, match="only 3 texts have 121 tokens; take --texts 3 or fewer"):
        Fidelity(ids, context=100, new=20, count=4)
    with pytest.raises(ValueError, match="d.jsonl holds 4 texts; --skip 4 leaves none"):
        texts.documents(path, 4)
    with pytest.raises(ValueError, match="line 2 has the fields words; a document is in one of context"):
        texts.documents(str(written(tmp_path / "x.jsonl", [DOCUMENTS[0], {"words": "x"}])))
    with pytest.raises(ValueError, match="line 1: 'text' must be a text"):
        texts.documents(str(written(tmp_path / "x.jsonl", [{"text": 1}])))


def row_of(policy: str, layers: str, budget: float | None, kl: list[float], digits: list[float]) -> dict:
    scores = {"fidelity": {"kl": kl, "agree": [0, 0, 0]}, "passkey 9": {"digits": digits, "exact": [0, 0, 0]}}
    return {"policy": policy, "layers": layers, "p": None, "budget": budget, "scores": scores}


def test_leaderboard():
    summary = {
        "tasks": {"fidelity": {"metric": "kl"}, "passkey 9": {"metric": "digits"}},
        "cells": [
            row_of("full", "uniform", None, [0, 0, 0], [0.9, 0.8, 1]),
            row_of("h2o", "uniform", 0.1, [0.2, 0.1, 0.3], [0.5, 0.4, 0.6]),
            row_of("h2o", "uniform", 0.2, [0.04, 0.03, 0.05], [0.7, 0.6, 0.8]),
            row_of("dropkv", "perturbation", 0.1, [0.1, 0.05, 0.15], [0.25, 0.2, 0.3]),
            row_of("dropkv", "perturbation", 0.2, [0.05, 0.04, 0.06], [0.75, 0.7, 0.8]),
        ],
        "beside": [
            row_of("kvpress TOVA", "uniform", 0.2, [0.01, 0.005, 0.02], [0.1, 0.0, 0.2]),
            row_of("another full", "uniform", None, [0, 0, 0], [0.9, 0.8, 1]),
        ],
    }
    assert leaderboard(summary).splitlines() == [
        "fidelity: KL to the full cache, nats; less is better",
        "",
        "| policy | layers | 10% | 20% |",
        "|---|---|---|---|",
        "| dropkv | perturbation | **0.1000** (0.0500 to 0.1500) | 0.0500 (0.0400 to 0.0600) |",
        "| h2o | uniform | 0.2000 (0.1000 to 0.3000) | 0.0400 (0.0300 to 0.0500) |",
        "| kvpress TOVA | uniform |  | **0.0100** (0.0050 to 0.0200) |",
        "",
        "passkey 9: digits right, %; the full cache 90.0 (80.0 to 100.0)",
        "",
        "| policy | layers | 10% | 20% |",
        "|---|---|---|---|",
        "| h2o | uniform | **50.0** (40.0 to 60.0) | 70.0 (60.0 to 80.0) |",
        "| dropkv | perturbation | 25.0 (20.0 to 30.0) | **75.0** (70.0 to 80.0) |",
        "| kvpress TOVA | uniform |  | 10.0 (0.0 to 20.0) |",
    ]


def test_a_run_on_documents_beside_another_program(tmp_path, capsys, monkeypatch):
    """End to end: passkey and fidelity, unseen, words with options, and results of another program."""
    monkeypatch.setattr("evaluation.pictures.draw", lambda *_: [])
    source = evaluate.tiny_data.source_files()[1][:4]
    path = written(tmp_path / "d.jsonl", [{"text": file.read_text()[:1500]} for file in source])
    args = (
        f"--text {path} --skip 1 --tasks fidelity,passkey,recall --unseen --length 96 --lengths 160 --texts 2 --read 4"
    )
    args += " --needles 3 --questions 3 --batch 2 --policies streaming:sinks=2,h2o --budgets 0.5"
    args = [*args.split(), "--layers", "uniform;perturbation:where=last,queries=8", "--out", str(tmp_path / "out")]
    other = {"layers": "uniform", "p": None, "budget": 0.5, "kv_share": 0.5}
    lines = [
        {"task": "fidelity", "row": n, "policy": "X", **other, "kl": 0.0, "agree": 1.0, "loss": 2.0} for n in (0, 1)
    ]
    beside = written(tmp_path / "x.jsonl", lines)
    assert evaluate.main([*args, "--beside", str(beside)]) == 0
    out = capsys.readouterr().out
    board = (tmp_path / "out" / "leaderboard.md").read_text()
    assert board in out and board.count("| X | uniform | **0.0000** (0.0000 to 0.0000) |") == 1
    for task in ("fidelity: KL", "passkey 160 unseen: digits right, %; the full", "recall 96 unseen: exact, %"):
        assert board.count(task) == 1
    assert board.count("| streaming:sinks=2 | perturbation:where=last,queries=8 | ") == 3
    few = written(tmp_path / "y.jsonl", lines[:1])
    assert "lacks row 1 of fidelity for X" in refused(capsys, *args, "--resume", "--beside", few)


@pytest.fixture
def harness(monkeypatch):
    """lm-eval's base class: the real one where it is installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError:
        fake = types.ModuleType("lm_eval.api.model")
        fake.TemplateLM = type("TemplateLM", (), {})
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "evaluation.lm_eval_model", raising=False)
    from evaluation.lm_eval_model import EngineLM

    yield EngineLM
    sys.modules.pop("evaluation.lm_eval_model", None)


def test_lm_eval_model(tiny, harness):
    model, tokenizer, text = tiny
    cell = Cell("streaming", "squeeze", 0.3, 24)
    lm = harness(model, tokenizer, frozenset([7]), cell, size=2)
    pairs = [(text[:40], text[40:44]), (text[:39], text[39:40]), (text[100:200], text[200:203])]
    got = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    for (context, more), (score, greedy) in zip(pairs[2:], got[2:], strict=True):  # alone in its batch
        batch = Batch(model, [cell], [context], len(more))
        logits = [batch.logits, *batch.forced(cell, torch.tensor([more[:-1]]))]
        want = torch.cat(logits).log_softmax(-1)[range(len(more)), more].sum().item()
        assert score == pytest.approx(want, rel=1e-5)
        assert greedy == (torch.cat(logits).argmax(-1).tolist() == more)
    full = harness(model, tokenizer, frozenset([7]), FULL, size=2)
    for (context, more), (score, _) in zip(pairs, full._loglikelihood_tokens([(0, *p) for p in pairs]), strict=True):
        logits = model(torch.tensor([context + more]))[0, len(context) - 1 : -1]
        want = logits.log_softmax(-1)[range(len(more)), more].sum().item()
        assert score == pytest.approx(want, rel=1e-4)
    said = "import os\nimport sys\n"
    requests = [types.SimpleNamespace(args=(said, {"max_gen_toks": 12, "until": until})) for until in (["e"], [])]
    short, long = full.generate_until(requests)
    tokens = list(Engine(model).stream(tokenizer.encode(said), max_new_tokens=12, eos_ids=frozenset([7])))
    assert long == tokenizer.decode([t for t in tokens if t != 7]) and short == long.split("e")[0]


@pytest.mark.slow
def test_lm_eval_end_to_end(tmp_path, monkeypatch, capsys):
    """Where it is installed: tasks of both kinds, made here, through its own evaluation."""
    lm_eval = pytest.importorskip("lm_eval")
    file = written(tmp_path / "data.json", [{"said": "import os\nimport", "right": " sys", "wrong": " zebra"}] * 4)
    both = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    both |= {"doc_to_text": "{{said}}", "doc_to_target": "{{right}}"}
    choice = {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": ["{{right}}", "{{wrong}}"]}
    choice |= {"doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    free = {"task": "continue", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    free |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    real = lm_eval.simple_evaluate
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda tasks, **options: real(tasks=[both | choice, both | free], **options)
    )
    args = "--lm-eval made --policies streaming --layers uniform --budgets 64 --rows 3".split()
    assert evaluate.main(args) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("Cell(") == 2 and out.count("|choose") == 2 and out.count("exact_match") == 2


@pytest.mark.slow
def test_squeeze_recalls_more_than_uniform_at_the_same_total(tmp_path):
    args = "--tasks recall --questions 64 --policies streaming --layers uniform,squeeze --budgets 0.3".split()
    assert evaluate.main([*args, "--out", str(tmp_path)]) == 0
    [gain] = json.loads((tmp_path / "summary.json").read_text())["against"]
    assert gain["minus_uniform"]["recall 1024"]["exact"][1] > 0
