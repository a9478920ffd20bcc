"""The process of its own: its limits, whatever the module takes that it runs."""

from pathlib import Path

import pytest

from child import Child, Overrun

MODULE = """
import mmap
held = mmap.mmap(-1, 2 << 30)  # addresses, as the libraries of a CUDA build take when they are loaded

def length(mib):
    return len(bytes(mib << 20))
"""


def test_memory_limit_leaves_out_what_the_module_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`import torch` of a CUDA build takes more addresses than any limit here."""
    (tmp_path / "large.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("large:length", seconds=5, mib=300)
    assert child.ask(100) == 100 << 20
    with pytest.raises(Overrun):
        child.ask(400)
