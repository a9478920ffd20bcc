"""Each file imports only from the floors below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "scripts": 5,
    "bench": 4,
    "evaluate": 4,
    "generate": 4,
    "serve": 4.5,
    "serving": 4.2,
    "benchmark": 3.5,
    "evaluation": 3.5,
    "arguments": 3.5,
    "batch": 3.5,
    "engine": 3,
    "checkpoint": 2,
    "child": -1,
    "decoder": 2.5,
    "prefill": 2,
    "promptcache": 0.5,
    "parallel": -0.35,
    "request": 1,
    "formats": -0.3,
    "conversation": 3.2,
    "sizing": 1.5,
    "needs": 1.7,
    "graphs": 1.5,
    "bound": 0,
    "chat": 1,
    "model": 1,
    "weights": 1.2,
    "codes": -0.6,
    "gguf_file": -0.5,
    "quantized": -0.5,
    "files": -1,
    "errors": -2,
    "threads": -2,
    "config": -0.4,
    "commandline": 0,
    "kept": -0.5,
    "kernels": -0.5,
    "kvcache": 0,
    "deltanet": 0.5,
    "machine": 0,
    "policies": 0,
    "rendering": 0,
    "sampling": 0,
    "tokenizer": 0,
}
PACKAGES = ("benchmark", "evaluation", "policies", "scripts", "serving")
FILES = sorted([*ROOT.glob("*.py"), *(file for package in PACKAGES for file in ROOT.glob(f"{package}/**/*.py"))])


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in FLOORS, f"{own} stands on no floor: name it in FLOORS"
    for name in imported(file) & set(FLOORS) - {own}:
        assert FLOORS[name] < FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[name]})"


def test_the_two_axes_do_not_know_each_other():
    for axis, other in (("layers", "tokens"), ("tokens", "layers")):
        for file in ROOT.glob(f"policies/{axis}/*.py"):
            assert f"policies.{other}" not in file.read_text(), file
