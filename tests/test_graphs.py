"""Compiled code, and calls that are bound to its graphs."""

import pytest
import torch
from conftest import BY_LENGTH, random_ids, random_model

from engine import Engine, Request
from graphs import Bound, compiled
from policies.tokens import TOKEN_POLICIES


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced and guarded as ever, but runs as it stands: that takes less time."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph)


def decoders(model, policy: str):
    """Of an eager engine and a compiled one, with one prompt of 30 tokens."""
    engines = [Engine(model, policy, plan=[40] * model.config.n_layers, compile=compile) for compile in (False, True)]
    return [engine._start([Request(random_ids(30), 9)])[0] for engine in engines]


@torch.inference_mode()
def compiled_equals_eager(model, policy: str) -> None:
    """Also the second step, which Dynamo has no part in."""
    eager, traced = decoders(model, policy)
    for _ in range(2):
        torch.testing.assert_close(traced.logits(), eager.logits())
        assert all(call.graph for call in (*traced.blocks, traced.head))
    assert not any(call.graph for call in (*eager.blocks, eager.head))


@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_every_policy_is_bound(traced, policy):
    compiled_equals_eager(random_model(n_layers=2), policy)


FORMS = [
    dict(experts=4, experts_per_token=2),
    dict(parallel=True, shared_norm=True, norm="layer"),
    dict(qk_norm="head", attention_softcap=20.0, logit_softcap=30.0),
    dict(sliding_window=16, windowed=(0,)),
    dict(rope=BY_LENGTH[1], max_positions=32),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_every_form_is_bound(traced, form):
    compiled_equals_eager(random_model(n_layers=2, **form), "h2o")


def test_models_that_differ_in_a_setting_share_no_graph(traced):
    for activation in ("silu", "relu"):
        compiled_equals_eager(random_model(n_layers=1, activation=activation), "window")


@pytest.mark.slow
def test_one_process_compiles_more_than_the_default_limit(traced):
    for activation in ("silu", "gelu", "relu"):
        for policy in ("full", "streaming", "window", "h2o", "snapkv"):
            compiled_equals_eager(random_model(n_layers=2, activation=activation), policy)


def test_a_bound_call_reads_what_its_tensors_hold_now(traced):
    runs, kept, state = [], torch.ones(3), torch.zeros(3)

    def add(kept, x, state):
        state += x
        return x * kept + state

    def counting(*args):
        runs.append(1)
        return run(*args)

    run, expected = compiled(add), torch.zeros(3)
    bound = Bound(counting, kept, state)
    for number in range(4):
        kept.fill_(number)
        x = torch.full((3,), 2.0 + number)
        expected += x
        assert torch.equal(bound(x), x * number + expected)
    assert torch.equal(state, expected)
    assert len(runs) == 1 and not any(value is x for value in (*bound.before, *bound.after))


def twice(_, x):
    return x + 1, x + 2


def ignored(number, x):
    return number + 1


@pytest.mark.parametrize("function", [twice, ignored])
def test_what_is_no_plain_function_of_x_is_never_bound(traced, function):
    bound, number = Bound(compiled(function), torch.ones(2)), torch.ones(2)
    for value in range(3):
        got, want = bound(torch.full((2,), float(value))), function(number, torch.full((2,), float(value)))
        torch.testing.assert_close(got, want)
    assert bound.graph is None


def test_an_error_in_a_first_call_leaves_nothing_behind(traced):
    def failing(_, x):
        raise ValueError("no result")

    bound = Bound(failing, None)
    for _ in range(2):
        with pytest.raises(ValueError, match="no result"):
            bound(torch.ones(1))
    assert bound.graph is None and torch.equal(Bound(compiled(twice), None)(torch.ones(1))[0], torch.full((1,), 2.0))
