"""What a run is said to need against what is really allocated, term by term."""

import pytest
import torch
from conftest import random_ids, random_model
from test_prefill import Live

from config import Delta
from engine import Engine, Request
from needs import Needs
from prefill import plan_for
from sampling import Sampling

SAMPLED = Sampling(temperature=1.0, top_k=20, seed=1)
SMALL = dict(n_layers=2, dim=16, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=16, vocab_size=97)
CLAMPED = dict(ffn_bias=True, activation_limit=1.0)
DELTA = Delta(key_heads=16, value_heads=32, key_dim=32, value_dim=32, kernel=4)
# In each case one term is most of what is needed: (changes of the shape, prompt tokens, new tokens, engine)
TERMS = {
    "logits of a step": (dict(vocab_size=60_000), 3, 9, ("window", "uniform", 8)),
    "feed-forward of a prompt": (dict(ffn_dim=3000), 500, 2, ("window", "uniform", 8)),
    "experts of a prompt": (dict(ffn_dim=1000, experts=4, experts_per_token=2), 500, 2, ("window", "uniform", 8)),
    "what experts add": (dict(dim=600, experts=8, experts_per_token=6), 500, 2, ("window", "uniform", 8)),
    "biased experts": (dict(ffn_dim=1000, experts=4, experts_per_token=2, **CLAMPED), 500, 2, ("window", "uniform", 8)),
    "residual stream": (dict(dim=1500), 500, 2, ("window", "uniform", 8)),
    "projections": (dict(n_heads=60), 500, 2, ("window", "uniform", 8)),
    "projections, sink logits": (dict(n_heads=60, attention_sinks=True), 500, 2, ("window", "uniform", 8)),
    "queries that score": (dict(n_heads=12), 1500, 2, ("snapkv", "uniform", 64)),
    "all queries, soft cap": (dict(n_heads=12, attention_softcap=5.0), 1500, 2, ("window", "uniform", 8)),
    "evidence": (dict(n_heads=24, n_kv_heads=8), 900, 2, ("window", "perturbation", 200)),
    "what is held": (dict(n_layers=40), 900, 2, ("window", "perturbation", 0.5)),
    "what is held, as planned": (dict(n_layers=40), 900, 2, ("window", "uniform", 0.9)),
    "scores": (dict(n_layers=40), 900, 2, ("h2o", "squeeze", 0.3)),
    "gated heads": (dict(n_heads=60, attention_gate=True), 500, 2, ("window", "uniform", 8)),
    "linear attention": (dict(linear=(0,), delta=DELTA), 900, 2, ("window", "uniform", 8)),
    "linear attention in parts": (dict(linear=(0,), delta=DELTA), 6000, 2, ("window", "uniform", 8)),
    "states": (dict(n_layers=40, linear=(*range(39),), delta=DELTA), 20, 2, ("window", "uniform", 8)),
    "8 bits": (dict(n_layers=60, n_kv_heads=2, head_dim=32), 900, 2, ("window", "uniform", 0.9, None, False, "int8")),
}


def live_bytes(engine: Engine, request: Request) -> int:
    with Live() as live:
        list(engine.generate([request]))
    return live.peak


@pytest.mark.parametrize("name", TERMS)
def test_each_term_is_what_is_allocated(name):
    """Never less, and no more than a little more: a coefficient that drifts is seen."""
    changes, prompt, new, cache = TERMS[name]
    model = random_model(torch.float32, **{**SMALL, **changes})
    engine, request = Engine(model, *cache), Request(random_ids(prompt), new, SAMPLED)
    needs = Needs.of(engine.sizing, request.length, prompt)
    said, live = needs.total(1) - needs.weights, live_bytes(engine, request)
    assert live <= said < 2 * live


@pytest.mark.parametrize("policy", ["full", "window", "h2o"])
@pytest.mark.parametrize("form", ["dense", "int8"])
def test_rows_are_exactly_what_is_allocated(policy, form):
    model = random_model(torch.float32)
    engine = Engine(model, policy, "squeeze", None if policy == "full" else 16, cache_format=form)
    needs = Needs.of(engine.sizing, 70)
    figures = next(engine.generate([Request(random_ids(60), 10)] * 3)).figures
    assert needs.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert 3 * needs.row == figures.kv_bytes + figures.state_bytes
    assert 3 * needs.row_full == figures.kv_bytes_full


def test_rows_at_once_multiply_what_is_read():
    model = random_model(torch.float32, **SMALL | dict(ffn_dim=3000))
    engine, requests = Engine(model, "window", budget=8), [Request(random_ids(500, n), 2) for n in range(4)]
    needs = Needs.of(engine.sizing, 502, 500)
    with Live() as live:
        list(engine.generate(requests))
    assert live.peak <= needs.total(4) - needs.weights < 2 * live.peak


def test_short_prompts_of_a_batch_are_held_as_they_are():
    """There are more of them in a group than of the longest ones."""
    model = random_model(torch.float32, **SMALL | dict(n_layers=12, n_kv_heads=2, max_positions=9000))
    engine, requests = Engine(model, "window", budget=400), [Request(random_ids(300, n), 2) for n in range(40)]
    needs = Needs.of(engine.sizing, 8002, 8000)
    with Live() as live:
        list(engine.generate(requests, max_length=8002))
    assert live.peak <= needs.total(40) - needs.weights < 3 * live.peak


@pytest.mark.parametrize("layers", ["uniform", "squeeze", pytest.param("perturbation", marks=pytest.mark.slow)])
def test_what_is_read_apart_does_not_wait(layers):
    """A job's plan is made from prompts that are read one by one, and so are all that come under it."""
    model = random_model(torch.float32, **SMALL | dict(n_layers=24, n_kv_heads=2))
    engine, requests = Engine(model, "window", layers, 0.3), [Request(random_ids(600, n), 2) for n in range(12)]
    needs = Needs.of(engine.sizing, 602, 600, apart=True)
    with Live() as live:
        plan, _ = plan_for(model, engine.sizing, requests, 602, 12)
        list(Engine(model, "window", plan=plan.slots).generate(requests, apart=True))
    assert needs.held == 0 and needs.at_once == 1
    assert live.peak <= needs.total(12) - needs.weights < 2 * live.peak
