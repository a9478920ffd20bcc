"""Batches of requests of any length, and rows that take a new request when theirs ends, against single streams."""

from collections.abc import Sequence
from itertools import count, islice

import pytest
from conftest import BY_LENGTH, quick, random_ids, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Completion, Engine, Request
from policies.layers import LAYER_POLICIES
from policies.tokens import TOKEN_POLICIES
from sampling import GREEDY, Sampling

BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
LENGTHS = [5, 700, 1, 64, 333, 2, 17, 128]
PLAN = [7, 12, 30, 9]
SAMPLED = [Sampling(0.9, seed=1), Sampling(1.3, top_k=7, seed=2), Sampling(0.8, top_p=0.7, seed=3)]
MODEL = random_model()
SHORT = Request(random_ids(9), 4)


KNOWN: dict[tuple, list[int]] = {}


def alone(request: Request, policy: str, plan: Sequence[int], model=MODEL) -> list[int]:
    key = (*request.ids, request.max_new_tokens, request.sampling, *request.eos_ids, policy, *plan, id(model))
    if key not in KNOWN:
        stream = Engine(model, policy, plan=plan).stream(
            request.ids, request.sampling, request.max_new_tokens, request.eos_ids
        )
        KNOWN[key] = list(stream)
    return KNOWN[key]


def check(done: list[Completion], requests: Sequence[Request], policy: str, plan: Sequence[int], model=MODEL) -> None:
    """Every request once, with the tokens that it gets alone; the figures count all of them."""
    assert sorted(id(completion.request) for completion in done) == sorted(map(id, requests))
    for completion in done:
        assert completion.tokens == alone(completion.request, policy, plan, model)
        assert completion.finish_reason == ("eos" if completion.tokens[-1] in completion.request.eos_ids else "length")
    figures = done[0].figures
    assert all(completion.figures is figures for completion in done)
    assert figures.prefill_tokens == sum(len(request.ids) for request in requests)
    assert figures.decode_tokens == sum(len(completion.tokens) - 1 for completion in done)


def ragged(policy: str, layers: str, batch: int, new: int, refill: bool) -> None:
    """Greedy and sampled rows; the plan is the layer policy's own for the first batch."""
    lengths = LENGTHS if refill else LENGTHS[:batch]
    requests = [
        Request(random_ids(length, seed=length), new + row % 3, [GREEDY, *SAMPLED][row % 4])
        for row, length in enumerate(lengths)
    ]
    longest = max(lengths)
    engine = Engine(MODEL, policy, layers, None if policy == "full" else max(longest // 10, 8))
    done = list(engine.generate(requests, batch_size=batch))
    plan = done[0].figures.plan
    assert policy == "full" or layers == "uniform" or len(set(plan)) > 1 or longest < 100
    check(done, requests, policy, plan)


@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_ragged_rows_equal_single_streams(policy):
    ragged(policy, "squeeze", batch=3, new=5, refill=True)


@pytest.mark.slow
@pytest.mark.parametrize("refill", [False, True], ids=["one batch", "refilled"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("layers", LAYER_POLICIES)
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_ragged_rows_equal_single_streams_everywhere(policy, layers, batch, refill):
    ragged(policy, layers, batch, new=20, refill=refill)


def schedules(max_size: int = 9):
    """Requests that end at odd moments: by length, or by one of many end-of-sequence ids."""
    request = st.builds(
        lambda length, seed, new, sampling, eos: Request(random_ids(length, seed), new, sampling, range(eos)),
        st.integers(1, 50),
        st.integers(0, 99),
        st.integers(1, 9),
        st.sampled_from([GREEDY, *SAMPLED]),
        st.sampled_from([0, 8, 30]),
    )
    return st.lists(request, min_size=1, max_size=max_size)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    requests=schedules(),
    policy=st.sampled_from(list(TOKEN_POLICIES)),
    batch=st.integers(1, 4),
    lag=st.sampled_from([0, 1, 2]),
    iterable=st.booleans(),
)
def test_any_schedule_gives_what_single_streams_give(requests, policy, batch, lag, iterable):
    plan = [59] * 4 if policy == "full" else PLAN
    engine = Engine(MODEL, policy, plan=plan)
    engine.lag = lag
    for _ in range(2):  # the second time with a decoder that has served before
        done = list(engine.generate(iter(requests) if iterable else requests, batch, max_length=59))
        check(done, requests, policy, plan)


@pytest.mark.parametrize("policy", ["h2o", "streaming", "snapkv", "full"])
def test_refilled_rows_of_a_model_with_windows(policy):
    """All sequences leave the window, as the batch does: so do the single ones."""
    model = random_model(sliding_window=16, windowed=(0, 2))
    plan = [80] * 4 if policy == "full" else PLAN
    requests = [Request(random_ids(length, length), new) for length, new in ((20, 9), (61, 12), (33, 4), (17, 17))]
    check(list(Engine(model, policy, plan=plan).generate(requests, 2)), requests, policy, plan, model)


@pytest.mark.parametrize("layers", ["plan", "squeeze"])
@pytest.mark.parametrize("policy", quick("streaming", of=["streaming", "h2o", "full"]))
@pytest.mark.parametrize("rope", BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_each_row_turns_by_its_own_length(rope, policy, layers):
    """Prompt + new tokens on both sides of 32, in a first batch and in rows that are refilled, on one decoder twice."""
    model = random_model(rope=rope, max_positions=32 if policy != "full" else 80)
    requests = [Request(random_ids(length, length), 9) for length in (40, 12, 3, 61, 23, 24)]
    plan = {"plan": [80] * 4 if policy == "full" else PLAN} if layers == "plan" else {}
    engine = Engine(model, policy, "squeeze", None if plan or policy == "full" else 9, **plan)
    for batch in (3, 2, 2):
        done = list(engine.generate(requests, batch, max_length=80))
        check(done, requests, policy, done[0].figures.plan, model)


def test_rows_of_a_batch_that_goes_on_do_not_wait():
    """A short request behind a long one is done first, and the row that it leaves is taken at once."""
    requests = [Request(random_ids(9, seed), new) for seed, new in ((1, 30), (2, 3), (3, 4), (4, 5))]
    engine = Engine(MODEL, "window", plan=PLAN)
    done = [requests.index(completion.request) for completion in engine.generate(requests, batch_size=2)]
    assert done == [1, 2, 3, 0]


@pytest.mark.parametrize("lag", [0, 2])
def test_an_endless_iterable_is_read_as_rows_get_free(lag):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield Request(random_ids(1 + number % 13, number), 1 + number % 5)

    engine = Engine(MODEL, "h2o", plan=PLAN)
    engine.lag = lag
    assert not read
    for finished, completion in enumerate(islice(engine.generate(endless(), batch_size=3, max_length=20), 40)):
        assert len(read) <= finished + 3
        assert completion.tokens == alone(completion.request, "h2o", PLAN)


BAD = {
    "empty": (Request([], 4), "the prompt is empty"),
    "no tokens": (Request([1], 0), "at least 1, not 0"),
    "unknown id": (Request([1, 97], 4), "token id 97"),
    "too long": (Request([1] * 40, 4), "40 prompt + 4 new tokens exceed max-length 30"),
}


@pytest.mark.parametrize("order", ["bad first", "bad last", "in between", "all bad"])
@pytest.mark.parametrize("iterable", [False, True], ids=["sequence", "iterable"])
def test_requests_that_cannot_run_fail_alone(order, iterable):
    bad = [request for request, _ in BAD.values()]
    good = [Request(random_ids(9, seed), 4) for seed in range(5)] if order != "all bad" else []
    mixed = [request for pair in zip(good, bad, strict=False) for request in pair] + good[len(bad) :]
    requests = {"bad first": bad + good, "bad last": good + bad, "in between": mixed, "all bad": bad}[order]
    done = list(
        Engine(MODEL, "h2o", plan=PLAN).generate(iter(requests) if iterable else requests, batch_size=2, max_length=30)
    )
    failed = {id(completion.request): completion for completion in done if completion.finish_reason == "error"}
    check_good = [completion for completion in done if completion.finish_reason != "error"]
    if good:
        check(check_good, good, "h2o", PLAN)
    assert len(done) == len(requests) and set(failed) == set(map(id, bad))
    for request, words in BAD.values():
        completion = failed[id(request)]
        assert words in completion.error and completion.tokens == [] and completion.figures is None


@pytest.mark.parametrize("good", [0, 3])
def test_refused_requests_come_out_as_they_are_met(good):
    """However many there are: none is kept while the next one is read, be it before the first batch or behind it."""
    read, bad = [], Request([], 4)

    def endless():
        for number in count():
            read.append(number)
            yield Request(random_ids(9, number), 2 + number) if number < good else bad

    completions = Engine(MODEL, "window", plan=PLAN).generate(endless(), batch_size=2, max_length=30)
    for seen, completion in enumerate(islice(completions, 50), 1):
        assert completion.finish_reason == ("error" if completion.request is bad else "length")
        assert len(read) <= seen + 2
    completions.close()


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_a_request_beyond_the_positions_does_not_size_the_arena(policy):
    """Nor does one with an empty prompt, however many tokens it asks for."""
    model = random_model(max_positions=64, position_offset=0)
    bad = [Request([1] * 5000, 4), Request([], 5000)]
    done = list(Engine(model, policy, budget=None if policy == "full" else 0.5).generate([bad[0], SHORT, bad[1]]))
    assert sorted(completion.finish_reason for completion in done) == ["error", "error", "length"]
    [figures] = [completion.figures for completion in done if completion.figures]
    assert figures.plan == [13 if policy == "full" else 6] * 4


def test_a_share_as_budget_is_of_the_longest_row():
    """Alone, the short request would have fewer slots than the policy needs; in this batch it has enough."""
    short, longer = Request([1, 2, 3], 4), Request(random_ids(90), 10)
    with pytest.raises(ValueError, match="budget 0.1 is 0 slots"):
        Engine(MODEL, "streaming", budget=0.1).stream(short.ids, max_new_tokens=4)
    done = list(Engine(MODEL, "streaming", budget=0.1).generate([short, longer]))
    assert done[0].figures.plan == [10] * 4
    check(done, [short, longer], "streaming", [10] * 4)


@pytest.mark.parametrize("arguments", [{}, {"budget": 0.3}, {"budget": 20}, {"plan": PLAN}])
@pytest.mark.parametrize("policy", BOUNDED)
def test_nothing_in_nothing_out(policy, arguments):
    engine = Engine(MODEL, policy, "squeeze", **arguments)
    assert list(engine.generate([])) == []
    assert list(engine.generate(iter([]), batch_size=4, max_length=100)) == []


def test_arguments_that_do_not_fit():
    engine = Engine(MODEL, "streaming", budget=0.1)
    for arguments, words in (
        ({"requests": iter([SHORT]), "max_length": 50}, "need a batch_size and a max_length"),
        ({"requests": iter([SHORT]), "batch_size": 2}, "need a batch_size and a max_length"),
        ({"requests": iter([SHORT]), "batch_size": 0, "max_length": 50}, "batch_size must be at least 1, not 0"),
        ({"requests": [SHORT], "batch_size": -1, "max_length": 50}, "batch_size must be at least 1, not -1"),
        ({"requests": [SHORT]}, "budget 0.1 is 1 slots per layer for 13 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            list(engine.generate(**arguments))
