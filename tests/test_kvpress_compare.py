"""The comparison with kvpress as far as it goes without it: what a press is told to keep, and arguments."""

import types

import kvpress_compare
import pytest


def test_a_press_keeps_what_a_cell_has_slots():
    """For every budget: a press rounds the share that it keeps down, and must come out at the same number."""
    presses = types.SimpleNamespace(SnapKVPress=lambda compression_ratio: compression_ratio, AdaKVPress=lambda own: own)
    budgets = [*range(21, 140), 0.2, 0.35, 1.0]
    for budget, want in zip(budgets, [*range(21, 100), *[100] * 40, 24, 42, 100], strict=True):
        kept = kvpress_compare.pairs(100, 20, budget)
        assert kept == want
        for name in ("SnapKV", "AdaKV"):
            assert int(100 * (1 - kvpress_compare.made(presses, name, 1 - (kept + 0.5) / 100))) == kept


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--presses Lru", "unknown press 'Lru'; known: SnapKV, "),
        ("--tasks recall", "unknown task 'recall'"),
        ("--tasks fidelity --texts 0", "'0' is no positive integer"),
    ],
)
def test_bad_arguments(capsys, tmp_path, args, words):
    assert kvpress_compare.main([*args.split(), "--results", str(tmp_path / "x.jsonl")]) == 2
    assert words in capsys.readouterr().err


def test_results_are_no_other_path_of_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvpress", types.ModuleType("kvpress"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    for results, words in (
        (text, "is also --text"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "make it first"),
    ):
        args = ["--tasks", "fidelity", "--text", str(text), "--results", str(results)]
        assert kvpress_compare.main(args) == 2
        assert words in capsys.readouterr().err
    assert text.read_text() == '{"text": "a"}\n'


def test_presses_go_on_where_they_ended(tmp_path, capsys, monkeypatch):
    """A press that takes nothing away: no KL to the full cache, and evaluate.py reads the log. The model is ours."""
    modules, calls = __import__("sys").modules, []
    monkeypatch.setitem(modules, "kvpress", types.ModuleType("kvpress"))
    real = kvpress_compare.Cache.__init__
    monkeypatch.setattr(kvpress_compare.Cache, "__init__", lambda *args: calls.append(1) or real(*args))
    rows = "--tasks fidelity,passkey --length 40 --read 4 --texts 2 --lengths 160 --needles 2 --budgets 1.0".split()
    args = ["--presses", "SnapKV,AdaKV", "--results", str(tmp_path / "x.jsonl"), *rows]
    assert kvpress_compare.main(args) == 0
    assert len(calls) == 2 + 4 * 2 and (tmp_path / "x.jsonl").read_text().count("\n") == 1 + 4 * 2
    assert kvpress_compare.main(args) == 0 and len(calls) == 10
    assert kvpress_compare.main([*args, "--read", "5"]) == 2
    assert "other settings (read)" in capsys.readouterr().err


def test_without_kvpress(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvpress", None)
    assert kvpress_compare.main(["--tasks", "fidelity", "--results", str(tmp_path / "x.jsonl")]) == 2
    assert "kvpress is not installed" in capsys.readouterr().err
