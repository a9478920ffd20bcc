"""Compiled code, and calls that are bound to its graphs."""

import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import BY_LENGTH, DELTA, begun, quick, random_ids, random_model
from torch._inductor.cpu_vec_isa import VecAVX2
from torch._inductor.output_code import CompiledFxGraph

import bound as bound_module
from bound import Bound, known
from decoder import Decoder
from engine import Engine, Request
from graphs import compiled
from kernels import linear
from policies.tokens import TOKEN_POLICIES


def compiled_equals_eager(model, policy: str) -> Decoder:
    """Also in the second step, which Dynamo has no part in. Returns the compiled one."""
    plan, request = [40] * model.config.n_layers, Request(random_ids(30), 9)
    engines = [Engine(model, policy, plan=plan, compile=compile) for compile in (False, True)]
    eager, ours = (begun(engine, [request]).decoder for engine in engines)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(ours.logits(), eager.logits())
    return ours


@pytest.mark.parametrize("policy", quick("full", of=TOKEN_POLICIES))
def test_every_policy_is_bound(policy):
    decoder = compiled_equals_eager(random_model(n_layers=2), policy)
    assert all(call.code for call in (*decoder.blocks, decoder.head))


def test_another_release_runs_the_compiled_code_as_it_is(monkeypatch):
    assert known("2.11.0+cu126") and known("2.13.1") and not any(map(known, ("2.10.0", "2.14.0.dev1", "3.0", "")))
    monkeypatch.setattr(bound_module, "known", lambda version: False)
    monkeypatch.setattr(bound_module, "LIMITED", {})  # no function has a limit of its own
    monkeypatch.setattr("graphs.LIMITED", {})
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for policy in ("window", "h2o"):
            compiled_equals_eager(random_model(n_layers=2), policy)
    decoder = compiled_equals_eager(random_model(n_layers=2), "streaming")
    assert not any(call.code for call in (*decoder.blocks, decoder.head))


FORMS = [
    dict(experts=4, experts_per_token=2),
    dict(parallel=True, shared_norm=True, norm="layer"),
    dict(qk_norm="head", attention_softcap=20.0, logit_softcap=30.0),
    dict(sliding_window=16, windowed=(0,)),
    dict(attention_sinks=True, sliding_window=16, windowed=(1,)),
    dict(linear=(0,), delta=DELTA, attention_gate=True),
    dict(rope=BY_LENGTH[1], max_positions=32),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_every_form_is_bound(form):
    decoder = compiled_equals_eager(random_model(n_layers=2, **form), "h2o")
    assert all(call.code for call in (*decoder.blocks, decoder.head))


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced and guarded as ever, but runs as it stands: that takes less time."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_models_that_differ_in_a_setting_share_no_graph(traced):
    for activation in ("silu", "relu"):
        compiled_equals_eager(random_model(n_layers=1, activation=activation), "window")


@pytest.mark.slow
def test_one_process_compiles_more_than_the_default_limit(traced):
    for activation in ("silu", "gelu", "relu"):
        for policy in ("full", "streaming", "window", "h2o", "snapkv"):
            compiled_equals_eager(random_model(n_layers=2, activation=activation), policy)


def test_a_bound_call_reads_what_its_tensors_hold_now():
    runs, kept, state = [], torch.ones(3), torch.zeros(3)

    def add(kept, x, state):
        state += x
        return x * kept + state

    def counting(*args):
        runs.append(1)
        return run(*args)

    run, expected = compiled(add), torch.zeros(3)
    bound = Bound(counting, kept, state)
    with torch.inference_mode():
        for number in range(4):
            kept.fill_(number)
            x = torch.full((3,), 2.0 + number)
            expected += x
            assert torch.equal(bound(x), x * number + expected)
    assert torch.equal(state, expected)
    assert len(runs) == 1 and not any(value is x for value in (*bound.before, *bound.after))


@pytest.mark.skipif(not hasattr(VecAVX2, "_probe_load"), reason="this release has no such function")
def test_what_the_processor_can_do_is_tried_without_another_process(monkeypatch, tmp_path):
    monkeypatch.setattr("subprocess.run", None)
    Bound(lambda _, x: x + 1, None)(torch.ones(1))
    (tmp_path / "half.so").write_bytes(b"\x7fELF")
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    loads = [VecAVX2._probe_load(VecAVX2(), str(path)) for path in (library, tmp_path / "half.so")]
    assert loads == [True, False]


def twice(_, x):
    return x + 1, x + 2


def ignored(kept, x):
    return kept + 1


def aliased(kept, x):
    return x[1:]


def product(kept, x):
    return (kept * x)[1:]


@pytest.mark.parametrize("function", [twice, ignored, aliased, product])
def test_only_what_makes_one_new_tensor_of_x_is_bound(function):
    kept, bound = torch.full((2,), 3.0), Bound(compiled(function), torch.full((2,), 3.0))
    with torch.inference_mode():
        for value in range(3):
            x = torch.full((2,), float(value))
            torch.testing.assert_close(bound(x), function(kept, x))
    assert (bound.code is not None) == (function is product)


def test_an_error_in_a_first_call_leaves_nothing_behind():
    before = CompiledFxGraph.__call__

    def failing(_, x):
        raise ValueError("no result")

    bound = Bound(failing, None)
    for _ in range(2):
        with pytest.raises(ValueError, match="no result"):
            bound(torch.ones(1))
    assert bound.code is None and CompiledFxGraph.__call__ is before


@pytest.mark.slow
def test_threads_that_compile_at_the_same_time():
    """Each has an engine, and hears its own graphs only; nothing of it stays."""
    torch._dynamo.reset()
    before, ids = CompiledFxGraph.__call__, random_ids(20)
    forms = [("window", dict(n_layers=2)), ("knorm", dict(n_layers=1, activation="relu", ffn_dim=72))]
    want = [list(Engine(random_model(**form), policy).stream(ids, max_new_tokens=9)) for policy, form in forms]
    engines = [Engine(random_model(**form), policy, compile=True) for policy, form in forms]
    got, limit, together = {}, torch._dynamo.config.recompile_limit, threading.Barrier(2)

    def run(number: int) -> None:
        together.wait()
        got[number] = [list(engines[number].stream(ids, max_new_tokens=9)) for _ in range(2)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got.get(number) for number in range(2)] == [[tokens] * 2 for tokens in want]
    assert CompiledFxGraph.__call__ is before and torch._dynamo.config.recompile_limit == limit
    for engine in engines:
        for decoder in engine.store.idle.values():
            assert all(call.code for call in (*decoder.blocks, decoder.head))


def test_a_call_of_another_thread_is_not_heard():
    """While one thread's first call runs, another one calls what is compiled; then its own first call fails."""
    before, inside, release = CompiledFxGraph.__call__, threading.Event(), threading.Event()
    other = compiled(product)
    x, kept = torch.ones(2), torch.full((2,), 3.0)
    with torch.inference_mode():
        other(kept, x)
    alien = []

    def slow(_, x):
        inside.set()
        assert release.wait(60)
        with torch.inference_mode():
            return run(kept, x)

    def failing(_, x):
        raise ValueError("no result")

    run, bound, errors = compiled(product), Bound(slow, None), []

    def second() -> None:
        assert inside.wait(60)
        with torch.inference_mode():
            alien.append(other(kept, x))  # while `slow` listens
        release.set()
        try:
            Bound(failing, None)(x)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    out = bound(x)
    thread.join()
    assert torch.equal(out, product(kept, x)) and torch.equal(alien[0], out) and len(errors) == 1
    assert bound.code and bound.before == [kept][: len(bound.before)] and CompiledFxGraph.__call__ is before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_row_is_as_exact_as_the_library(dtype, bias):
    """Compiled: a loop, but for float16. The sum of many products is not rounded on its way."""
    weight, x, more = torch.randn(64, 3000), torch.randn(1, 1, 3000), torch.randn(64) if bias else None
    weight, x, more = (None if part is None else part.to(dtype) for part in (weight, x, more))
    exact = linear(x.double(), weight.double(), None if more is None else more.double())
    with torch.inference_mode():
        ours, theirs = compiled(linear)(x, weight, more), linear(x, weight, more)
    assert ours.dtype == dtype
    errors = [(out.double() - exact).square().mean().sqrt().item() for out in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1] + 1e-6
