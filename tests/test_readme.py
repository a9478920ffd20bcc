"""What the README shows is what happens."""

import re
from pathlib import Path

import render_readme
import torch

from engine import Engine
from policies import tokens

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_example_policy_runs_and_keeps_what_it_says(model, monkeypatch):
    code = next(block for block in BLOCKS if "class Ends" in block)
    names = {"__name__": "ends"}
    exec(compile(code, "ends.py", "exec"), names)
    monkeypatch.setitem(tokens.TOKEN_POLICIES, "ends", names["Ends"])
    kept = tokens.make("ends").select(torch.tensor([50, 3]), 50, 9, None)
    assert sorted(kept[0, 0].tolist()) == [0, 1, 2, 3, 45, 46, 47, 48, 49] and kept[1, 0, :3].tolist() == [0, 1, 2]
    assert len(list(Engine(model, "ends", "squeeze", 9).stream([1] * 50, max_new_tokens=20))) == 20


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [code] = [block for block in BLOCKS if "import checkpoint" in block]
    exec(compile(code, "example.py", "exec"), {})
    tokens, plan = re.findall(r"\[.*?\]", capsys.readouterr().out)
    assert len(tokens.split(",")) == 32 and len(plan.split(",")) == 8


def test_the_example_family_is_how_it_stands_there():
    code = next(block for block in BLOCKS if "Family(" in block)
    entries = [re.sub(r" *#.*", "", line).strip() for line in code.splitlines()]
    [names] = [line for line in code.splitlines() if line.startswith("#")]
    assert names.startswith("# config.py, FAMILIES")
    for file, own in (
        ("config.py", entries[1:-2]),
        ("checkpoint.py", entries[-2:-1]),
        ("tests/families.py", entries[-1:]),
    ):
        there = [line.strip() for line in (ROOT / file).read_text().splitlines()]
        assert any(there[n : n + len(own)] == own for n in range(len(there))), file


def test_every_file_is_in_the_tree():
    folders = {"benchmark/", "evaluation/", "policies/layers/", "policies/tokens/"}
    files = {path.name for path in ROOT.glob("*.py")} | folders
    missing = [name for name in files if f"`{name}`" not in README]
    assert not missing, missing


def test_it_is_short():
    assert README.count("\n") < 200


def test_figures_come_from_results(monkeypatch):
    monkeypatch.setattr("sys.argv", ["render_readme.py", "--check"])
    assert render_readme.main() == 0, "run python scripts/render_readme.py"
