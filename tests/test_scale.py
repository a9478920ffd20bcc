"""The page about several devices: it is what its script computes, and that adds up."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import scale

from config import ModelConfig, parameters


def test_the_page_is_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--check"])
    assert scale.main() == 0


def test_the_parts_add_up():
    """Embedding and head are on every rank, all other matrices and the caches in parts; norms are small."""
    config = ModelConfig.from_hf(dict(scale.LLAMA_2_70B))
    assert parameters(config) == 68_976_648_192
    (one, small), *others = scale.parts(config, 4096)
    whole = 2 * 2 * config.vocab_size * config.dim
    for full, squeezed in others:
        assert full.ranks * (full.weights - whole) == pytest.approx(one.weights - whole, rel=1e-3)
        assert full.ranks * full.sequence == one.sequence and squeezed.sequence == pytest.approx(
            0.2 * full.sequence, rel=1e-3
        )
    assert small.sequence == pytest.approx(0.2 * one.sequence, rel=1e-3)


def test_more_ranks_are_faster_and_less_so():
    rates = scale.Rates(3e12, 7e14, 0.75)
    steps = [full.step(1, rates) for full, _ in scale.parts(ModelConfig.from_hf(dict(scale.LLAMA_2_70B)), 4096)]
    gains = [a / b for a, b in zip(steps, steps[1:], strict=False)]
    assert gains == sorted(gains, reverse=True) and 1 < gains[-1] < 2
