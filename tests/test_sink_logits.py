"""Sink logits, one a head, against the softmax written out with one column more: wherever attention is computed."""

import pytest
import torch
from conftest import quick, random_ids, random_model
from naive import NaiveCache
from test_engine import teacher_forced

from engine import Engine
from kernels import softmaxed
from policies.tokens import TOKEN_POLICIES

FORMS = {
    "plain": {},
    "every head its own keys": {"n_kv_heads": 6},
    "window": {"sliding_window": 9, "windowed": (0, 1)},
    "soft cap": {"attention_softcap": 3.0},
}


def test_shares_are_those_of_a_softmax_with_one_column_more():
    scores, sink = 5 * torch.randn(2, 3, 4, 7, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    scores[0, 0, 0, 2:] = float("-inf")
    column = sink.view(3, 4, 1).expand(2, 3, 4, 1)
    want = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(softmaxed(scores, sink), want)
    torch.testing.assert_close(softmaxed(scores[..., None, :], sink), want[..., None, :])
    for huge in (1e4, -1e4):
        assert softmaxed(scores, sink + huge).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_prompt(form, dtype, monkeypatch):
    """In one call and in chunks: what the heads read, and the shares that policies are told."""
    monkeypatch.setattr("model.PROMPT_CHUNK", 7)
    attention = random_model(dtype, n_layers=1, attention_sinks=True, **FORMS[form]).layers[0].attention
    q, k, v = (torch.randn(2, heads, 20, 12, dtype=dtype) for heads in (6, *[attention.kv_heads] * 2))
    got, (_, probs) = attention.over_prompt(q, k, v), attention.prompt_probs(q, k, 0, 20)
    k, v = (part.double().repeat_interleave(6 // attention.kv_heads, 1) for part in (k, v))
    scores = q.double() @ k.mT * attention.scale
    if attention.softcap:
        scores = attention.softcap * (scores / attention.softcap).tanh()
    distance = torch.arange(20)[:, None] - torch.arange(20)
    scores = scores.masked_fill((distance < 0) | (distance >= (attention.window or 20)), float("-inf"))
    column = attention.sink_logits.double().view(1, 6, 1, 1).expand(2, 6, 20, 1)
    want = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(probs.flatten(1, 2).double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.double(), want @ v, rtol=0, atol=tolerance)
    assert want.sum(-1).max() < 0.999


GRID = [(policy, form) for policy in TOKEN_POLICIES for form in FORMS]


@pytest.mark.parametrize(
    "case", quick(("full", "window"), ("dropkv", "plain"), ("h2o", "soft cap"), of=GRID), ids="-".join
)
def test_a_cache_of_few_slots_equals_the_naive_one(case):
    policy, form = case
    model, ids = random_model(n_layers=2, attention_sinks=True, **FORMS[form]), random_ids(60)
    plan = [60, 60] if policy == "full" else [12, 18]
    got = teacher_forced(Engine(model, policy, plan=None if policy == "full" else plan), ids[:25], ids[25:40])
    naive = NaiveCache(model, policy, plan, length=41)
    want = torch.stack([naive.prompt(ids[:25]), *(naive.feed(token) for token in ids[25:40])])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
