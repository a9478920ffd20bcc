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
    assert len(capsys.readouterr().out.splitlines()) > 15


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
