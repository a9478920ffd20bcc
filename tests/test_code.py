"""Rules of the house that a linter does not hold: how long a function may be, and what is private to whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [file for file in ROOT.rglob("*.py") if not {".venv", "checkpoints"} & {*file.relative_to(ROOT).parts}]
LONGEST = 60  # lines of a function; how many branches and statements it may have is the linter's affair
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}  # public in spite of their names
PYTHON = {"_exit"}  # public in spite of its name, too


def defined(tree: ast.AST) -> set[str]:
    """All names that a file defines: functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def private(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of each underscored attribute that is read, and of each underscored name that is imported."""
    found = [(node.lineno, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [*(getattr(node, "module", "") or "").split("."), *(alias.name for alias in node.names)]
            found += [(node.lineno, part) for name in names for part in name.split(".")]
    return [(line, name) for line, name in found if name.startswith("_") and not name.endswith("__")]


TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in FILES}
OURS = {name for file, tree in TREES.items() for name in defined(tree) if name.startswith("_")}


@pytest.mark.parametrize("file", TREES)
def test_nothing_private_of_others_is_used(file):
    """Of our own files by none, tests included; of packages only by bound.py, and by tests."""
    own = defined(TREES[file]) | NAMED_TUPLE | PYTHON
    others = [f"line {line}: {name}" for line, name in private(TREES[file]) if name not in own]
    if file.startswith("tests/") or file == "bound.py":
        others = [each for each in others if each.partition(": ")[2] in OURS]
    assert not others


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_fit_a_screen(file):
    functions = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef))
    assert not [f"{n.name}: line {n.lineno}" for n in functions if n.end_lineno - n.lineno >= LONGEST]
