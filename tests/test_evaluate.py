"""Evaluation against slow definitions: the naive cache, the engine's own batches, metrics by hand, whole runs."""

import argparse
import json
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_ids, random_model
from naive import NaiveCache

import chat
import checkpoint
import evaluate
import tokenizer as tokenizers
from benchmark.record import portable
from bound import compiled_graphs
from conversation import Conversation
from engine import Engine, Request
from errors import UserError
from evaluation import standard, tables, texts
from evaluation.cells import FULL, Batch, Cell, grid
from evaluation.fidelity import Fidelity
from evaluation.passkey import Passkey, scored
from evaluation.summary import Scores, wilson, with_interval
from evaluation.tasks import Log, Results, Row, batches

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path(argparse.__file__)
SMALL = f"--text {TEXT} --length 96 --lengths 160,180 --texts 3 --read 6 --needles 4 --batch 3".split()
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
    cell = Cell(policy, "squeeze:p=0.5", 0.4)
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
    [FULL, Cell("h2o", "squeeze", 0.3), Cell("streaming", "pyramid", 12)] + [Cell("snapkv", "perturbation", 15)],
)
def test_greedy_equals_the_engine(model, cell):
    """One prefill, then cells one after the other: each as the engine would do it from the start, ragged rows."""
    rows, eos = [random_ids(n, seed=n) for n in (30, 41, 35)], frozenset(range(0, 97, 7))
    others = [other for other in grid([cell.policy], ["uniform"], [0.5]) if other.policy == cell.policy]
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
    cells = [Cell(policy, "uniform", 0.5), Cell(policy, "perturbation", 0.3)]
    one, other = Batch(model, cells, rows, 6), Batch(model, cells, rows, 6, compile=True)
    for cell in cells:
        for a, b in zip(one.forced(cell, following), other.forced(cell, following), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert one.greedy(cell) == other.greedy(cell)
    assert compiled_graphs() > before


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
    assert evaluate.main([*GRID, *SMALL, "--tasks", "fidelity,passkey", "--out", str(out)]) == 0
    return out


def test_a_run_writes_everything(small):
    record = json.loads((small / "summary.json").read_text())
    assert {"device", "date", "torch", "command", "settings"} <= record.keys()
    assert len(record["cells"]) == 9 and len(record["against"]) == 4
    full = record["cells"][0]
    assert full["policy"] == "full" and full["kv_share"] == 1 and full["scores"]["fidelity"]["kl"] == [0, 0, 0]
    assert {name: about["rows"] for name, about in record["tasks"].items()} == {
        "fidelity": 3,
        "passkey 160": 4,
        "passkey 180": 4,
    }
    for row in record["cells"][1:]:  # equal totals, within a granule of a layer
        assert row["budget"] - 0.03 < row["kv_share"] <= row["budget"] and len(row["plan"]) == 8
    assert {path.name for path in small.iterdir()} == {*evaluate.OUTPUTS}
    table = (small / "table.md").read_text()
    assert table.count("\n| streaming | squeeze | ") == 3 + 2 * 2 and table.count("squeeze better in ") == 3
    lines = [json.loads(line) for line in (small / "predictions.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 9 * (3 + 2 * 4)
    assert {"prediction", "expected", "exact", "depth"} <= lines[-1].keys()


def test_an_interrupted_run_goes_on_to_the_same_numbers(small, tmp_path, capsys, monkeypatch):
    """Cut off in the middle of a line, and within a batch."""
    monkeypatch.setattr("evaluation.pictures.draw", lambda *_: [])
    whole = (small / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(whole[: len(whole) * 2 // 5])
    args = [*GRID, *SMALL, "--tasks", "fidelity,passkey", "--out", str(tmp_path)]
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
    **{
        f"no {name}": ({name: ...}, f"'{name}' is missing")
        for name in ("task", "row", "budget", "kv_share", "kl", "loss")
    },
    **{
        f"odd {name}": ({name: [1]}, f"'{name}' must be") for name in ("task", "row", "policy", "budget", "kl", "agree")
    },
    "NaN": ({"kl": float("nan")}, "NaN"),
    "huge": ({"row": 10**30}, "'row' must be"),
    "truth": ({"row": True}, "'row' must be"),
    "plan": ({"plan": [0]}, "'plan' must be"),
    **{f"long {name}": ({name: 10**350}, f"'{name}' must be") for name in ("kl", "budget", "kv_share")},
}


@pytest.mark.parametrize("name", WRONG)
def test_every_line_of_a_log_is_checked(tmp_path, name):
    change, words = WRONG[name]
    row = {
        "task": "fidelity",
        "row": 0,
        "policy": "h2o",
        "layers": "uniform",
        "budget": 0.5,
        "kv_share": 0.5,
    }
    row |= {"kl": 0.1, "agree": 1.0, "loss": 2.0}
    tasks = [types.SimpleNamespace(name="fidelity", metrics=Fidelity.metrics)]
    other = change if isinstance(change, str) else {k: v for k, v in (row | change).items() if v is not ...}
    other = other if isinstance(other, str) else json.dumps(other)
    path = tmp_path / "predictions.jsonl"
    text = json.dumps({"settings": {"a": 1}}) + "\n" + json.dumps(row) + "\n" + other + "\n"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Log(path, {"a": 1}, True, tasks)
    assert "predictions.jsonl line 3 is no result" in str(caught.value) and words in str(caught.value)
    assert len(str(caught.value)) < 300 and path.read_text() == text
    path.write_text(text[: text.rindex("{") if not isinstance(change, str) else len(text) - len(other) - 1] + '{"torn')
    Log(path, {"a": 1}, True, tasks).close()
    assert len(path.read_text().splitlines()) == 2  # only the torn line has gone


def test_first_lines_of_a_log(tmp_path):
    path = tmp_path / "predictions.jsonl"
    header = '{"settings": {"a": 1}}\n'
    for text, words in (
        ("hello", "no result"),
        (header[:-1], "no result"),
        ("{}\n", "'settings' is missing"),
        ("[1]\n", "not a JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"predictions.jsonl line 1 .*{words}"):
            Log(path, {"a": 1}, True, [])
        assert path.read_text() == text
    for text in ("", header, header + '{"t'):
        path.write_text(text)
        log = Log(path, {"a": 1}, True, [])
        assert path.read_text() == header
        with pytest.raises(UserError, match="is being written by another run"):
            Log(path, {"a": 1}, True, [])
        log.close()


def test_results_that_are_no_numbers_end_the_run(tmp_path):
    log = Log(tmp_path / "a", {}, False, [])
    with pytest.raises(UserError, match="a number overflows, so try another --dtype"):
        log.add(types.SimpleNamespace(name="fidelity"), Row(0, [], None), FULL, {"kl": float("nan")})


def test_interrupt(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Fidelity, "results", interrupted)
    assert evaluate.main([*SMALL, "--tasks", "fidelity", "--out", str(tmp_path)]) == 130
    assert "--resume goes on from here" in capsys.readouterr().err


def test_differences_are_paired():
    """b is a with 5 of 200 lost: far less than the spread of either shows, and the interval excludes 0."""
    task = types.SimpleNamespace(name="fake", metrics=("exact",), rows=[Row(n, [0], None) for n in range(200)])
    one, other, results = Cell("h2o", budget=0.3), Cell("h2o", "squeeze", 0.3), Results([task])
    for row in task.rows:
        hits = {FULL: True, one: bool(row.number % 2), other: row.number % 2 and row.number >= 10}
        for cell, hit in hits.items():
            results.keep({"row": row.number, **cell.__dict__, "exact": hit}, task)
    made = Scores(task, [FULL, one, other], results)
    mean, low, high = made.difference(other, one)["exact"]
    assert mean == -0.025 and low < -0.035 and -0.015 < high < 0
    assert made.of(one)["exact"][0] == 0.5 and made.of(FULL)["exact"][1:] == pytest.approx([0.98116, 1], abs=1e-4)


def test_intervals():
    assert wilson(0.9, 100) == pytest.approx((0.82563, 0.94477), abs=1e-5)  # statsmodels' proportion_confint
    assert with_interval(np.array([7.0, *range(1001)])) == [7, 25, 975]


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


def task_of(tiny, path: Path, rows: list[dict], unseen: bool = False) -> standard.Standard:
    return standard.Standard(written(path, rows), tiny[1], frozenset(), 2048, unseen=unseen)


def test_prompts_of_standard_files(tiny, tmp_path):
    decode = tiny[1].decode
    long = task_of(tiny, tmp_path / "hotpotqa.jsonl", [LONG])
    text = decode(long.rows[0].ids)
    assert len(long.rows[0].ids) == 2048 - 32 == 2048 - long.new
    assert text.startswith("Answer the question based on the given passages. Only give me")
    assert text.endswith("do not output any other words.\n\nQuestion: Who has the lantern?\nAnswer:")
    prefixed = task_of(tiny, tmp_path / "x/vt/validation.jsonl", [RULER | {"answer_prefix": " Answer: they are"}])
    assert decode(prefixed.rows[0].ids).endswith("numbers ... Answer: they are") and prefixed.new == 30
    assert task_of(tiny, tmp_path / "qasper_e.jsonl", [LONG | {"dataset": "qasper_e"}]).new == 128
    news = task_of(tiny, tmp_path / "cnn.jsonl", [{"article": "It rained.", "highlights": "Rain.", "id": "1"}])
    assert decode(news.rows[0].ids).endswith("It rained.\n\nTL;DR:") and news.rows[0].expected == ["Rain."]
    assert standard.middle_cut(list(range(10)), 5) == [0, 1, 2, 8, 9]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("a.jsonl", [LONG, {"input": "x", "context": "y"}], "a.jsonl line 2: 'answers' is missing"),
        (
            "a.jsonl",
            [LONG, LONG, LONG | {"answers": "x"}],
            "line 3: 'answers' must be a list, each of it a text",
        ),
        ("a.jsonl", [LONG | {"answers": []}], "line 1: 'answers' is empty"),
        ("vt.jsonl", [RULER, RULER | {"outputs": [7]}], "vt.jsonl line 2: 'outputs' must be"),
        ("a.jsonl", [{"question": "x", "id": 3}], "line 1 has the fields question, id; known formats: longbench"),
        ("a.jsonl", [LONG | {"dataset": "dureader"}], "dataset dureader is not among narrativeqa"),
        ("sort.jsonl", [RULER], "sort is no RULER task; their names begin with niah"),
        ("a.jsonl", [], "has no rows"),
    ],
)
def test_wrong_files(tiny, tmp_path, name, rows, words):
    with pytest.raises(ValueError) as error:
        task_of(tiny, tmp_path / name, rows)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_wrong_lines(tiny, tmp_path):
    for text, words in ((json.dumps(RULER) + "\n{", "f line 2: not JSON"), ("[1]", "f line 1: not a JSON object")):
        (tmp_path / "f").write_text(text)
        with pytest.raises(ValueError, match=words):
            standard.Standard(tmp_path / "f", tiny[1], frozenset(), 2048)


def test_metrics():
    score = standard.score
    assert score("f1", "The violin, a lantern!", ["x", "violin lantern table"]) == pytest.approx(0.8)
    assert score("f1", "", ["x"]) == 0
    assert score("rouge_l", "the cat sat", ["the cat lay down", "dog"]) == pytest.approx(4 / 7)
    assert score("edit_similarity", "# note\nreturn ab\nx", ["return abc"]) == pytest.approx(18 / 19)
    assert score("classification", "Food or Color", ["Food"], ["Food", "Color", "Foo"]) == 0.5
    assert score("classification", "Color", ["Food"], ["Food", "Color"]) == 0
    assert score("number", "Paragraph 3, not 4", ["Paragraph 3"]) == 0.5 and score("number", "none", ["7"]) == 0
    assert score("match_all", "It is 12.", ["12", "34"]) == 0.5 and score("match_part", "PARIS", ["x", "Paris"]) == 1


def test_only_the_first_line_counts_where_longbench_says_so(tiny, tmp_path):
    said = tiny[1].encode("\n Food\nColor", special=False)
    batch = types.SimpleNamespace(greedy=lambda *_: [said])
    for dataset, score in (("trec", 1), ("lcc", None)):
        row = LONG | {"dataset": dataset, "answers": ["Food"], "all_classes": ["Food", "Color"]}
        task = task_of(tiny, tmp_path / "a", [row])
        [result] = task.results(batch, FULL, task.rows)
        assert result["prediction"] == "\n Food\nColor" and (score is None or result["classification"] == score)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policies", "lru"], "unknown policy 'lru'"),
        (["--layers", "cone"], "unknown layer policy 'cone'"),
        (["--budgets", "0.2,1.5"], "not 1.5"),
        (["--budgets", "much"], "'much'"),
        (["--layers", "squeeze:p=0"], "p must be in (0, 1], not 0.0"),
        (["--tasks", "chess"], "unknown task 'chess'; known: fidelity, passkey"),
        (["--needles", "0"], "'0' is no positive integer"),
        (["--unseen"], "--unseen is about questions"),
        (["--skip", "3"], "--skip must be a number of documents of --text, not 3"),
        (["--checkpoint", "./nowhere"], "nowhere does not exist"),
        (["--files", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--text", TEXT, "--length", "3000", "--texts", "1"], "exceed the model's 2048 positions"),
        (["--text", TEXT, "--length", "99999999"], "--length 99999999 and --read 64 need more"),
        (["--policies", "streaming", "--budgets", "4", *SMALL], "needs at least 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_bad_input(capsys, tmp_path, args, words):
    assert words in refused(capsys, *args, "--out", tmp_path)


def test_own_text(tmp_path):
    """Any UTF-8 text serves for reading and for hiding numbers."""
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 60)
    args = ["--text", str(tmp_path / "text.txt"), "--policies", "window", "--layers", "uniform", "--budgets", "40"]
    assert evaluate.main([*args, *SMALL, "--out", str(tmp_path / "out")]) == 0


POLICY_WORDS = ["full", "streaming", "h2o", "tova", "dropkv", "snapkv:recent=8", "keydiff", "streaming:sinks=2"]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 16, "windowed": (0, 2)}], ids=["", "windows"])
def test_one_prefill_equals_one_for_each_policy(model, changes):
    """Plans and tokens of every cell, in an order that changes between sinks and none; ragged rows, windows."""
    model = random_model(**changes) if changes else model
    rows = [random_ids(n, seed=n) for n in (30, 41, 35)]
    cells = [Cell(word, plan, 0.4) for plan in ("squeeze", "perturbation") for word in POLICY_WORDS[1:]]
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
    cell = FULL if policy == "full" else Cell(policy, "squeeze", 0.4)
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
    seen, unseen = (Passkey(tokenizer, None, [text], 400, 10, later) for later in (False, True))
    for one, other in zip(seen.rows, unseen.rows, strict=True):
        assert one.ids == other.ids + other.question and one.expected == other.expected and not one.question
    assert tokenizer.decode(unseen.rows[0].question).startswith("\nWhat is the special magic number for")
    made = list(batches(unseen.rows, 4))
    assert sorted(row.number for batch in made for row in batch) == list(range(10))
    assert all(len({len(row.question) for row in batch}) == 1 for batch in made)


def test_standard_files_unseen(tiny, tmp_path):
    def parts(name: str, row: dict) -> tuple[str, str]:
        task = task_of(tiny, tmp_path / name, [row], unseen=True)
        [row] = task.rows
        assert len(row.ids) + len(row.question) + task.new <= 2048
        return tiny[1].decode(row.ids), tiny[1].decode(row.question)

    text, question = parts("hotpotqa.jsonl", LONG)
    assert text.startswith("Answer the question") and text.endswith("word ") and "lantern" not in text
    assert question.endswith("Question: Who has the lantern?\nAnswer:")
    ruler = RULER | {"input": "Some numbers.\nOne: 12.\nWhat is one?", "answer_prefix": " It is"}
    assert parts("vt.jsonl", ruler) == ("Some numbers.\nOne: 12.", "\nWhat is one? It is")
    assert parts("cnn.jsonl", {"article": "It rained.", "highlights": "Rain."}) == ("It rained.", "\n\nTL;DR:")
    with pytest.raises(ValueError, match="vt.jsonl line 1: the format does not part text and question"):
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
        assert unseen == bool(row.question) == tiny[1].decode(row.question).lstrip().startswith("What is the special")


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
    with pytest.raises(ValueError, match="d.jsonl holds no more than 4 texts; --skip 4 leaves none"):
        texts.documents(path, 4)
    with pytest.raises(ValueError, match="line 2 has the fields words; a document is in one of context"):
        texts.documents(str(written(tmp_path / "x.jsonl", [DOCUMENTS[0], {"words": "x"}])))
    with pytest.raises(ValueError, match="line 1: 'text' must be a text"):
        texts.documents(str(written(tmp_path / "x.jsonl", [{"text": 1}])))


def row_of(policy: str, layers: str, budget: float | None, kl: list[float], digits: list[float]) -> dict:
    scores = {"fidelity": {"kl": kl}, "passkey 9": {"digits": digits}}
    return {"policy": policy, "layers": layers, "budget": budget, "scores": scores}


def test_tables():
    """Differences in percent of equal layers' KL, in points of shares; another program's rows; none from no KL."""
    rows = [
        row_of("full", "uniform", None, [0, 0, 0], [0.9, 0.8, 1]),
        row_of("h2o", "uniform", 0.1, [0.2, 0.1, 0.3], [0.5, 0.4, 0.6]),
        row_of("h2o", "uniform", 1.0, [0, 0, 0], [0.7, 0.6, 0.8]),
        row_of("h2o", "perturbation", 0.1, [0.1, 0.05, 0.15], [0.25, 0.2, 0.3]),
        row_of("h2o", "perturbation", 1.0, [0, 0, 0], [0.75, 0.7, 0.8]),
    ]
    gains = [([-0.1, -0.15, -0.05], [-0.25, -0.3, 0.01]), ([0, 0, 0], [0.05, 0.01, 0.1])]
    summary = {
        "tasks": {"fidelity": {"metric": "kl", "rows": 9}, "passkey 9": {"metric": "digits", "rows": 9}},
        "cells": rows,
        "against": [
            row | {"minus_uniform": {"fidelity": {"kl": kl}, "passkey 9": {"digits": digits}}}
            for row, (kl, digits) in zip(rows[3:], gains, strict=True)
        ],
        "beside": [row_of("kvpress TOVA", "uniform", 0.1, [0.01, 0.005, 0.02], [0.1, 0.0, 0.2]), rows[0]],
    }
    begins = (
        "Against equal layers, beyond the 95% interval of the paired difference: perturbation better in 1, worse in"
    )
    assert tables.report(summary).splitlines() == [
        "| fidelity: KL, nats | layers | 10% | 100% |",
        "|---|---|---|---|",
        "| h2o | uniform | 0.200 (0.100 to 0.300) | **0.000** (0.000 to 0.000) |",
        "| h2o | perturbation | 0.100, -50% (-75 to -25) | **0.000** (0.000 to 0.000) |",
        "| kvpress TOVA | uniform | **0.010** (0.005 to 0.020) |  |",
        "",
        f"{begins} 0 of 1.",
        "",
        "| passkey 9: digits right | layers | 10% | 100% |",
        "|---|---|---|---|",
        "| full cache | - | 90% (80 to 100) | 90% (80 to 100) |",
        "| h2o | uniform | **50%** (40 to 60) | 70% (60 to 80) |",
        "| h2o | perturbation | 25%, -25 (-30 to +1) | **75%**, +5 (+1 to +10) |",
        "| kvpress TOVA | uniform | 10% (0 to 20) |  |",
        "",
        f"{begins} 0 of 2.",
        "",
        tables.NOTE,
    ]


def test_a_run_on_documents_beside_another_program(tmp_path, capsys, monkeypatch):
    """End to end: passkey and fidelity, unseen, words with options, and results of another program."""
    monkeypatch.setattr("evaluation.pictures.draw", lambda *_: [])
    source = TEXT.read_text()
    path = written(tmp_path / "d.jsonl", [{"text": source[start : start + 1500]} for start in range(0, 6000, 1500)])
    args = f"--text {path} --skip 1 --tasks fidelity,passkey --unseen --length 96 --lengths 160 --texts 2 --read 4"
    args += " --needles 3 --batch 2 --policies streaming:sinks=2,h2o --budgets 0.5"
    args = [*args.split(), "--layers", "uniform;perturbation:where=last,queries=8", "--out", str(tmp_path / "out")]
    other = {"layers": "uniform", "budget": 0.5, "kv_share": 0.5}
    lines = [
        {"task": "fidelity", "row": n, "policy": "X", **other, "kl": 0.0, "agree": 1.0, "loss": 2.0} for n in (0, 1)
    ]
    header = {"settings": {"by": "another"}}
    beside = written(tmp_path / "x.jsonl", [header, *lines])
    assert evaluate.main([*args, "--beside", str(beside)]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("| X | uniform | **0.000** (0.000 to 0.000) |") == 1
    for task in ("fidelity: KL", "passkey 160 unseen: digits right", "passkey 160 unseen: whole answers right"):
        assert table.count(task) == 1
    assert table.count("| streaming:sinks=2 | perturbation:where=last,queries=8 | ") == 5
    few = written(tmp_path / "y.jsonl", [header])
    assert "y.jsonl holds no result of fidelity, passkey" in refused(capsys, *args, "--resume", "--beside", few)
    few = written(tmp_path / "y.jsonl", [header, *lines[:1]])
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
    cell = Cell("streaming", "squeeze", 24)
    lm = harness(model, tokenizer, frozenset([7]), cell, size=2)
    pairs = [(text[:40], text[40:44]), (text[:39], text[39:40]), (text[100:200], text[200:203])]
    got = lm.loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    for (context, more), (score, greedy) in zip(pairs[2:], got[2:], strict=True):  # alone in its batch
        batch = Batch(model, [cell], [context], len(more))
        logits = [batch.logits, *batch.forced(cell, torch.tensor([more[:-1]]))]
        want = torch.cat(logits).log_softmax(-1)[range(len(more)), more].sum().item()
        assert score == pytest.approx(want, rel=1e-5)
        assert greedy == (torch.cat(logits).argmax(-1).tolist() == more)
    full = harness(model, tokenizer, frozenset([7]), FULL, size=2)
    for (context, more), (score, _) in zip(pairs, full.loglikelihood_tokens([(0, *p) for p in pairs]), strict=True):
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
