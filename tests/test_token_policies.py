"""Scores against their formulas, on the whole attention matrix; the slow caches of naive.py check the rest."""

import pytest
import torch

from policies.tokens import TOKEN_POLICIES, make
from policies.tokens.h2o import QUERY_CHUNK

LENGTHS = [QUERY_CHUNK + 12, 11, 90]  # of a padded batch


def by_formula(policy, attention: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """attention [K, G, n, n] of one row's queries, k, v [K, n, D] -> scores [K, n]"""
    n = k.shape[1]
    if policy.name in ("h2o", "h2o-mean"):
        return attention.sum((1, 2))
    if policy.name == "tova":
        return attention[:, :, -1].mean((0, 1)).expand(len(k), n)
    if policy.name == "knorm":
        return -k.square().sum(2).sqrt()
    if policy.name == "keydiff":
        unit = k / k.square().sum(2, keepdim=True).sqrt()
        mean = unit.mean(1, keepdim=True)
        return -(unit * mean).sum(2) / mean.square().sum(2).sqrt()
    if policy.name == "dropkv":  # what is read without each token in turn, the shares of the others scaled up
        shares = attention[:, :, -policy.recent :]
        out = shares @ v[:, None]
        errors = []
        for token in range(n):
            others = shares.clone()
            others[..., token] = 0
            others = others / others.sum(-1, keepdim=True)
            errors.append((others @ v[:, None] - out).square().sum(-1).nan_to_num(0.0).sum((1, 2)))
        return torch.stack(errors, dim=1)
    received = attention[:, :, -policy.recent :].sum((1, 2))
    around = [range(max(0, i - 2), min(n, i + 3)) for i in range(n)]
    return torch.stack([received[:, list(near)].sum(1) / 5 for near in around], dim=1)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("policy", [*map(make, TOKEN_POLICIES), make("snapkv", recent=7)], ids=repr)
def test_prompt_scores(model, policy, ragged, window, monkeypatch):
    attention = model.layers[0].attention
    monkeypatch.setattr(attention, "window", window)
    lengths = LENGTHS if ragged else [max(LENGTHS)] * 3
    length = max(lengths)
    q, k, v = (torch.randn(3, heads, length, 12).double() for heads in (6, 2, 2))
    asked = []

    def probs(q, k, start, end):
        asked.append(end - start)
        return attention.prompt_probs(q, k, start, end)

    scores = policy.score_prompt(q, k, v, torch.tensor(lengths) if ragged else None, probs)
    if policy.name in ("full", "window", "streaming"):
        assert scores is None
        return
    assert scores.shape == (3, 2, length)
    if policy.name in ("snapkv", "dropkv", "tova"):  # only the queries that count
        assert max(asked) == (1 if policy.name == "tova" else policy.recent) and len(asked) == (3 if ragged else 1)
    for row, n in enumerate(lengths):
        logits = q[row, :, :n].unflatten(0, (2, 3)) @ k[row, :, None, :n].mT * attention.scale
        distance = torch.arange(n)[:, None] - torch.arange(n)
        visible = (distance >= 0) & (distance < (window or n))
        rows = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        want = by_formula(policy, rows, k[row, :, :n], v[row, :, :n])
        torch.testing.assert_close(scores[row, :, :n].double(), want, rtol=0, atol=1e-6)


def test_tova_keeps_the_same_tokens_in_all_heads(model):
    attention = model.layers[0].attention
    q, k = torch.randn(1, 6, 50, 12).double(), torch.randn(1, 2, 50, 12).double()
    policy = make("tova")
    kept = policy.select(torch.tensor([50]), 50, 9, policy.score_prompt(q, k, k, None, attention.prompt_probs))
    assert kept[0, 0].tolist() == kept[0, 1].tolist() != list(range(41, 50)) and kept[0, 0, -1] == 49


def test_the_mean_takes_the_advantage_of_early_tokens_away():
    """All queries attend to 1 in 8 tokens, and half as much to the others: by the sum, 0 and 1 beat 29."""
    queries = 40 - torch.arange(40)
    scores = (torch.where(torch.arange(40) % 8 == 5, 1.0, 0.5) * queries)[None, None]
    kept = {name: make(name).select(torch.tensor([40]), 40, 10, scores)[0, 0].tolist() for name in ("h2o", "h2o-mean")}
    assert kept["h2o"] == [0, 1, 5, 13, 21, 35, 36, 37, 38, 39]
    assert kept["h2o-mean"] == [5, 13, 21, 29, 34, 35, 36, 37, 38, 39]


@pytest.mark.parametrize("recent", [0, -1, 1.5, True, "8"])
def test_recent_outside_its_range(recent):
    with pytest.raises(ValueError, match="recent must be an integer of at least 1, not "):
        make("snapkv", recent=recent)


def test_a_window_has_no_frozen_tokens():
    for name in ("snapkv", "dropkv", "knorm", "keydiff", "streaming"):
        inside = make(name).within_window(9)
        assert inside.select(torch.tensor([30]), 30, 9, None)[0, 0].sort().values.tolist() == list(range(21, 30))
    assert make("h2o-mean").within_window(9).corrected and make("h2o-mean").within_window(9).window == 9
