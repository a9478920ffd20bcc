"""The comparison with kvpress as far as it goes without it: what a press is told to keep, and arguments."""

import types

import kvpress_compare
import pytest
import torch

from evaluation.tasks import Row


def test_a_press_keeps_what_a_cell_has_slots(monkeypatch):
    """For every budget: a press rounds the share that it keeps down, and must come out at the same number."""
    kept, within = [], []
    press = types.SimpleNamespace(SnapKVPress=lambda compression_ratio: compression_ratio)
    monkeypatch.setattr(kvpress_compare, "following", lambda model, row, ratio, attention: ratio)
    monkeypatch.setattr(
        kvpress_compare,
        "compare",
        lambda full, ratio, truth: kept.append(100 if ratio is None else int(100 * (1 - ratio))) or torch.zeros(3, 1),
    )
    task, row = types.SimpleNamespace(new=20), Row(0, [0] * 100, [0] * 21)
    budgets = [*range(21, 140), 0.2, 0.35, 1.0]
    for counted, found in ((False, kept), (True, within)):
        for budget in budgets:
            args = ("SnapKV", budget, counted, torch.zeros(1))
            share = kvpress_compare.result(press, None, None, task, row, *args)["kv_share"]
            assert share == (kept[-1] + 20) / 120
        found[:] = kept[-len(budgets) :]
    assert kept[: len(budgets)] == [*range(21, 100), *[100] * 40, 24, 42, 100]
    assert within == [*range(1, 100), *[100] * 20, 4, 22, 100]
    with pytest.raises(ValueError, match="budget 0.1 is 12 pairs, and --within leaves none"):
        kvpress_compare.result(press, None, None, task, row, "SnapKV", 0.1, True, torch.zeros(1))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--presses Lru", "unknown press 'Lru'; known: SnapKV, "),
        ("--tasks recall", "only --tasks fidelity,passkey"),
        ("--tasks fidelity --texts 0", "--texts must be at least 1"),
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


def test_without_kvpress(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvpress", None)
    assert kvpress_compare.main(["--tasks", "fidelity", "--results", str(tmp_path / "x.jsonl")]) == 2
    assert "kvpress is not installed" in capsys.readouterr().err
