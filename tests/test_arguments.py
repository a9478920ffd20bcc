"""What comes to the engine through Python: each wrong type or size is one line, and no request takes others along."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import random_ids, random_model

import generate
from conversation import Conversation
from engine import Completion, Engine, Request
from errors import UserError, shown
from needs import Needs
from policies import layers as layer_policies
from policies import tokens as token_policies
from request import MOST_TOKENS
from sampling import GREEDY, Sampling

HUGE = 1 << 20000  # has more digits than Python writes
NO_INTEGERS = [None, True, 1.0, float("nan"), "8", b"8", [8], {}, 1j, torch.tensor(8.0), torch.tensor([8]), object()]
NO_IDS = [None, 5, 1.5, "123", b"123", bytearray(b"12"), {1, 2}, {1: 2}, iter([1]), [1, None], [1, True], [1.0], ["1"]]
NO_IDS += [[[1]], (1, 2.0), [torch.tensor(1.5)], torch.tensor(3), torch.ones(3), torch.ones(1, 3, dtype=torch.int64)]
NO_IDS += [torch.tensor([True]), np.array(3), np.ones(3), np.ones((1, 3), dtype=int), np.array([True]), np.array(["1"])]
CLASSES = [(token_policies.make, cls) for cls in token_policies.TOKEN_POLICIES.values()]
CLASSES += [(layer_policies.make, cls) for cls in layer_policies.LAYER_POLICIES.values()]


def named(value: object) -> str:
    """The same in every process that collects these tests: without an address."""
    return re.sub(r" at 0x\w+", "", shown(value))


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 250
    return text


@pytest.mark.parametrize("ids", NO_IDS, ids=named)
def test_no_ids(model, ids):
    for call in (Request, Engine(model).stream, Conversation(Engine(model)).stream):
        assert "prompt ids must be" in refused(call, ids)
    if ids is not None and not isinstance(ids, set):
        assert "eos_ids must be" in refused(Request, [1], eos_ids=ids)


KINDS = [
    tuple,
    np.array,
    torch.tensor,
    lambda ids: list(np.array(ids)),
    lambda ids: torch.tensor(ids, dtype=torch.uint8),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind(model, kind):
    ids, engine = random_ids(9), Engine(model)
    want = list(engine.stream(ids, max_new_tokens=4))
    assert list(engine.stream(kind(ids), max_new_tokens=np.int64(4), eos_ids=kind([96]))) == want
    [completion] = engine.generate([Request(kind(ids), 4)])
    assert completion.tokens == want and completion.request.ids == ids
    assert list(Conversation(engine).stream(kind(ids), 4)) == want
    assert list(engine.stream(range(5), max_new_tokens=4)) == list(engine.stream([0, 1, 2, 3, 4], max_new_tokens=4))
    assert refused(engine.stream, kind([])) == "the prompt is empty; give at least one token"


def test_a_list_of_ints_stays_the_same():
    ids = [1, 2, 3]
    assert Request(ids).ids is ids


@pytest.mark.parametrize("value", NO_INTEGERS, ids=named)
def test_no_counts(model, value):
    engine = Engine(model)
    assert "max-new-tokens must be an integer" in refused(Request, [1], value)
    assert "max-new-tokens must be an integer" in refused(engine.stream, [1], max_new_tokens=value)
    if value is not None:
        assert "batch_size must be an integer" in refused(next, engine.generate([Request([1])], value))
        assert "max_length must be an integer" in refused(next, engine.generate([Request([1])], 1, value))


@pytest.mark.parametrize("value", [0, -1, -HUGE], ids=named)
def test_counts_below_1(model, value):
    engine = Engine(model)
    assert "max-new-tokens must be at least 1" in refused(engine.stream, [1], max_new_tokens=value)
    assert "batch_size must be at least 1" in refused(next, engine.generate([Request([1])], value))
    assert "max_length must be at least 1" in refused(next, engine.generate([Request([1])], 1, value))


@pytest.mark.parametrize("value", [None, 1, "greedy", {"temperature": 1}, Sampling])
def test_no_sampling_no_stop_no_request(model, value):
    engine = Engine(model)
    assert "sampling must be a Sampling" in refused(Request, [1], 4, value)
    if value is not None and not callable(value):
        assert "stop must be a function" in refused(Request, [1], stop=value)
    good, bad = Request([1, 2], 2), value
    done = list(engine.generate([good, bad, good]))
    assert [c.finish_reason for c in done].count("length") == 2
    [error] = [c.error for c in done if c.error]
    assert error.startswith("a request must be a Request, not ")
    assert "samplings must be" in refused(next, engine.generate([good], samplings=[value]))
    if value is None or isinstance(value, int | type):
        assert "requests must be" in refused(next, engine.generate(value))


@pytest.mark.parametrize("policy", ["full", "window"])
def test_engine_options(model, policy):
    for value in [True, "8", None.__class__, float("nan"), -1, 0, 1.5, [8], HUGE * -1, 1j, torch.tensor(8)]:
        assert "budget" in refused(Engine, model, policy, budget=value)
    for value in [5, "8888", [8, 8, 8, 8.0], [8, 8, 8, True], [8, 8, 8, None], [8, 8, 8, "8"], {}, [8, 8, 8, 0]]:
        assert "plan" in refused(Engine, model, policy, plan=value)
    for value in [[8, 8, 8, -HUGE], [8, 8, 8, 2**63], [8] * 3, [8] * 5, [], torch.ones(4), np.ones((4, 1), dtype=int)]:
        assert "plan" in refused(Engine, model, policy, plan=value)
    for value in [None, 3, b"full", [], token_policies.Window, layer_policies.Uniform(), "lru", "x" * 10**6]:
        assert "policy" in refused(Engine, model, value)
    for value in [None, 3, b"full", {}, layer_policies.Uniform, token_policies.Window(), "lru", "\n" * 99]:
        assert "layer" in refused(Engine, model, policy, value)
    assert "compile" in refused(Engine, model, policy, compile="no")
    engine = Engine(model, policy, plan=np.array([60] * 4))
    assert engine.plan == [60] * 4
    assert "plan" in refused(setattr, engine, "plan", [60, 60, 60, 2**64])


OPTIONS = [(make, cls.name, field) for make, cls in CLASSES for field in fields(cls)]


@pytest.mark.parametrize(("make", "name", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_policy_options(make, name, option):
    for value in (None, "1", b"1", [1], float("nan"), float("inf"), -1, HUGE, -HUGE, 1j, 2**64, GREEDY):
        assert f"{option.name} must be " in refused(make, name, **{option.name: value})


@pytest.mark.parametrize(("make", "name", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_true_is_no_number(make, name, option):
    if not isinstance(option.default, bool):
        refused(make, name, **{option.name: True})
    else:
        refused(make, name, **{option.name: 1})


@pytest.mark.parametrize("make", [token_policies.make, layer_policies.make])
def test_names(make):
    for name in (None, 3, [], {}, b"window", "", "x" * 10**6, "a\nb\x1b[31m"):
        refused(make, name)
    for name in ("window", "uniform"):
        refused(make, name, **{"x" * 10**6: 1})


LONG = [
    Request([1] * 10, 10**12),
    Request([1] * 10, HUGE),
    Request([1] * 3_000_000, 1),
    Request([1] * 10, MOST_TOKENS - 9),
]


@pytest.mark.parametrize("policy", ["full", "window", "h2o"])
@pytest.mark.parametrize("learned", [False, True])
def test_one_request_that_asks_for_too_much(policy, learned):
    """It fails alone, and by itself it is refused before anything is allocated."""
    model = random_model(position_offset=2 if learned else None)
    good = Request(random_ids(9), 3)
    engine = Engine(model, policy)
    want = list(engine.stream(good.ids, max_new_tokens=3))
    done = {id(c.request): c for c in engine.generate([*LONG[:2], good, *LONG[2:]], batch_size=2)}
    assert done[id(good)].tokens == want and done[id(good)].figures.kv_bytes < 10**6
    words = "4096 learned positions" if learned else "4096 positions" if policy == "full" else "1048576"
    for request in LONG:
        assert words in done[id(request)].error and done[id(request)].finish_reason == "error"
        assert words in refused(engine.stream, request.ids, max_new_tokens=request.max_new_tokens)
        assert words in refused(engine.batch(1, 50).add, request)
        assert words in refused(Conversation(engine).stream, request.ids, request.max_new_tokens)
    assert words in refused(next, engine.generate(iter([good]), 1, HUGE))
    assert words in refused(Needs.of, engine.sizing, 10**12)
    assert engine.refusal(Request([1] * 10, 4096 - 10)) is None
    if policy != "full" and not learned:
        assert engine.sizing.refusal([1] * 10, MOST_TOKENS - 10, seen=10**9) is None


@pytest.mark.parametrize("how", [(), ("--squeeze",)], ids=["full", "squeeze"])
def test_one_line_that_asks_for_too_much(capsys, tmp_path, how):
    """It is a bad line like others: the job is as long as the others are."""
    lines = [{"prompt_ids": [5], "max_new_tokens": 10**12}, {"prompt_ids": [5] * 9}, {"prompt_ids": [5] * (1 << 20)}]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert generate.main([*paths, "--max-new-tokens", "3", "--ignore-eos", "--json", *how]) == 2
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["max_length"] == 12 and result["done"] == 1 and list(result["bad_lines"]) == ["1", "3"]
    assert generate.main([*paths[:3], str(tmp_path / "other"), "--max-length", str(10**12), *how]) == 2
    assert not (tmp_path / "other").exists()
    assert "a max-length of 1000000000000 tokens exceeds" in capsys.readouterr().err
    assert err.count("\n") == 2 and err.count("positions" if not how else "exceed the 1048576") == 2


def test_a_job_beyond_the_positions_is_told_once(capsys, tmp_path):
    (tmp_path / "in").write_text('{"prompt_ids": [5]}\n{"prompt_ids": [5, 6]}\n')
    for policy in ("h2o", "streaming"):
        paths = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / f"out-{policy}"), "--max-new-tokens", "3"]
        assert generate.main([*paths, "--policy", policy, "--budget", "32", "--max-length", "2049", "--json"]) == 0
        err = capsys.readouterr().err
        assert err.count("2049 tokens are more than the 2048 positions") == err.count("\n") == (policy == "h2o")


@pytest.mark.parametrize("policy", token_policies.TOKEN_POLICIES)
@pytest.mark.parametrize("form", [{}, dict(sliding_window=16, windowed=(0, 2))], ids=["plain", "windows"])
def test_a_plan_longer_than_the_sequence(policy, form):
    """It is cut to what can be used, whatever runs; the figures say so, and the tokens are those of the whole plan."""
    model, ids = random_model(**form), random_ids(20)
    longest = [min(26, 16) if form and layer in (0, 2) else 26 for layer in range(4)]
    engine, few = Engine(model, policy, plan=[10**9, 2**62, 26, 27]), Engine(model, policy, plan=[26] * 4)
    want = list(few.stream(ids, max_new_tokens=6))
    stream = engine.stream(ids, max_new_tokens=6)
    assert list(stream) == want
    figures = stream.completion.figures
    assert figures.plan == longest and figures.budget_slots == sum(longest) // 4
    assert figures.kv_bytes == sum(longest) * 2 * 2 * 12 * 8 == figures.kv_bytes_full
    done: list[Completion] = list(engine.generate([Request(ids, 6), Request(ids[:3], 5)], batch_size=1))
    assert [c.tokens for c in done if c.request.ids is ids] == [want] and done[0].figures.plan == longest
    assert Needs.of(engine.sizing, 26).row == Needs.of(few.sizing, 26).row
    talk = Conversation(Engine(random_model(max_positions=64, **form), policy, plan=[10**9] * 4))
    stream = talk.stream(ids, 6)
    assert list(stream) == want and max(stream.completion.figures.plan) == 64
    if policy != "full":
        assert len(list(talk.stream(random_ids(60), 6))) == 6
