"""Rows that come, go and are cancelled while others run: each gets what it gets alone, no prompt stops the others."""

import gc
import random
import weakref
from contextlib import ExitStack
from itertools import islice
from unittest.mock import patch

import pytest
from conftest import random_ids, random_model

import engine as engine_module
from conversation import Conversation
from decoder import Decoder, Store
from engine import CHUNK, Batch, Engine, Request
from errors import UserError
from formats import FORMATS
from model import Block
from policies.layers.squeeze import Squeeze
from policies.tokens import TOKEN_POLICIES
from prefill import Reading
from request import Completion
from sampling import GREEDY, Sampling
from sizing import Sizing

PLAN = [14, 20, 17, 12]
SAMPLED = Sampling(temperature=1.0, top_k=20, seed=7)
every_policy = pytest.mark.parametrize("policy", TOKEN_POLICIES)


def engine_of(model, policy: str, **more) -> Engine:
    return Engine(model, policy, plan=[300] * model.config.n_layers if policy == "full" else PLAN, **more)


def alone(engine: Engine, request: Request) -> list[int]:
    """Under the same plan, in an engine of its own."""
    own = Engine(engine.model, engine.policy, plan=engine.plan, cache_format=engine.sizing.format)
    return list(own.stream(request.ids, request.sampling, request.max_new_tokens))


def requests_of(count: int, longest: int = 40) -> list[Request]:
    lengths = [1 + 13 * n % longest for n in range(count)]
    return [
        Request(random_ids(length, n), 4 + 5 * n % 11, SAMPLED if n % 3 == 1 else GREEDY)
        for n, length in enumerate(lengths)
    ]


def run(batch: Batch) -> None:
    while batch.busy:
        batch.step()
        batch.collect()


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("form", FORMATS)
@every_policy
def test_added_at_any_time_and_cancelled(model, policy, form, lag):
    """In a random order, with more requests than rows."""
    engine, rng = engine_of(model, policy, cache_format=form), random.Random(3)
    engine.lag = lag
    waiting, given, cancelled, told = requests_of(12), [], set(), []
    with engine.batch(3, 60) as batch:
        while waiting or batch.busy:
            if waiting and rng.random() < 0.3:
                given.append(batch.add(waiting.pop()))
            if given and rng.random() < 0.06:
                cancelled.add(one := rng.choice(given))
                batch.cancel(one)
                assert one.finish_reason
            batch.step()
            told += [completion for completion in batch.collect() if completion.finish_reason]
    assert len(given) == 12 and sorted(map(id, told)) == sorted(map(id, given))  # each end is told once
    assert any(one.finish_reason == "interrupted" for one in cancelled)
    for completion in given:
        want = alone(engine, completion.request)
        if completion.finish_reason == "interrupted":
            want = want[: len(completion.tokens)]
        assert completion.tokens == want


@every_policy
def test_a_long_prompt_is_read_in_chunks(model, policy, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK", 60)
    check_a_long_prompt(engine_of(model, policy), 200, most=60)


@pytest.mark.slow
@every_policy
def test_8000_tokens(policy):
    model = random_model(n_layers=4, n_heads=2, n_kv_heads=1, head_dim=8, dim=16, ffn_dim=16, max_positions=9000)
    check_a_long_prompt(Engine(model, policy, plan=[8100] * 4 if policy == "full" else [200, 90, 150, 64]), 8000, CHUNK)


def check_a_long_prompt(engine: Engine, length: int, most: int) -> None:
    """Others get a token after each part of it; it is tokens x layers that a part may hold."""
    layers, short, long = engine.model.config.n_layers, Request(random_ids(9), 30), Request(random_ids(length, 5), 6)
    read, parts, forward, step = 0, [], Block.forward, Decoder.step

    def reading(block, x, *rest):
        nonlocal read
        read += x.shape[1] if isinstance(rest[-1], Reading) else 0
        return forward(block, x, *rest)

    def stepping(decoder):
        nonlocal read
        parts.append(read)
        read = 0
        step(decoder)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Block, "forward", reading))
        stack.enter_context(patch.object(Decoder, "step", stepping))
        batch = stack.enter_context(engine.batch(2, length + 6))
        first = batch.add(short)
        for _ in range(3):
            batch.step()
            batch.collect()
        parts.clear()
        second = batch.add(long)
        run(batch)
    assert sum(parts) == length * layers and max(parts) <= most * layers and sum(map(bool, parts)) > 3
    assert [first.tokens, second.tokens] == [alone(engine, short), alone(engine, long)]


@pytest.mark.parametrize("layers", ["uniform", "squeeze", "perturbation"])
def test_the_plan_is_made_from_those_that_are_there_first(model, layers):
    requests = requests_of(4)
    want = next(Engine(model, "h2o", layers, 10).generate(requests[:2], max_length=60)).figures
    with Engine(model, "h2o", layers, 10).batch(4, 60) as batch:
        for request in requests[:2]:
            batch.add(request)
        batch.step()
        later = batch.add(requests[2])
        run(batch)
    assert batch.figures.plan == want.plan and batch.figures.importance == want.importance
    assert later.tokens == alone(Engine(model, "h2o", plan=want.plan), requests[2])


def test_rows_go_on_while_nobody_comes(model):
    with engine_of(model, "window").batch(2, 60) as batch:
        assert not batch.busy and batch.free == 2
        batch.step()
        assert batch.collect() == []
        one = batch.add(Request(random_ids(9), 3))
        assert batch.busy and batch.free == 1
        run(batch)
        assert len(one.tokens) == 3 and batch.free == 2 and not batch.busy
        other = batch.add(Request(random_ids(9), 3))
        run(batch)
        assert other.tokens == one.tokens


def test_cancelled_before_and_while_it_is_read(model, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK", 60)
    engine, short = engine_of(model, "h2o"), Request(random_ids(9), 20)
    with engine.batch(2, 220) as batch:
        first = batch.add(short)
        batch.step()
        unread, long = batch.add(Request(random_ids(200), 5)), batch.add(Request(random_ids(200, 1), 5))
        batch.cancel(unread)
        batch.step()
        batch.cancel(long)
        another = batch.add(Request(random_ids(30), 5))
        run(batch)
    assert [one.finish_reason for one in (first, unread, long, another)] == ["length"] + ["interrupted"] * 2 + [
        "length"
    ]
    assert not unread.tokens and not long.tokens
    assert first.tokens == alone(engine, short) and another.tokens == alone(engine, another.request)


def test_what_is_left_is_interrupted(model):
    engine = engine_of(model, "window")
    with engine.batch(1, 60) as batch:
        one, other = batch.add(Request(random_ids(9), 20)), batch.add(Request(random_ids(9), 20))
        for _ in range(4):
            batch.step()
            batch.collect()
        assert engine.store.busy
    assert one.finish_reason == other.finish_reason == "interrupted" and one.tokens and not other.tokens
    assert not engine.store.busy


def test_who_does_not_fit_is_refused(model):
    with engine_of(model, "window").batch(1, 60) as batch:
        for wrong, words in (
            (Request(random_ids(50), 11), r"50 prompt \+ 11 new tokens exceed max-length 60"),
            (Request([], 3), "the prompt is empty"),
            (Request([97], 3), "outside the vocabulary"),
            ("text", "a request must be a Request"),
        ):
            with pytest.raises(UserError, match=words):
                batch.add(wrong)
        assert not batch.busy
    for rows, length in ((0, 60), (1, 0), ("1", 60), (1, 10**12)):
        with pytest.raises(UserError):
            engine_of(model, "window").batch(rows, length)


def counted(stack: ExitStack, owner: type, name: str, counts: dict[str, int]) -> None:
    function = getattr(owner, name)

    def counting(*args, **options):
        counts[name] = counts.get(name, 0) + 1
        return function(*args, **options)

    stack.enter_context(patch.object(owner, name, counting))


def test_each_request_is_checked_sized_and_planned_once(model):
    """A check for each request; one size, one plan and one decoder for all that run together."""
    requests, counts = requests_of(5), {}
    with ExitStack() as stack:
        for owner, name in ((Sizing, "refusal"), (Sizing, "at"), (Squeeze, "allocate"), (Store, "lend")):
            counted(stack, owner, name, counts)
        counted(stack, Completion, "__init__", counts)
        engine, once = Engine(model, "h2o", "squeeze", 10), dict.fromkeys(("at", "allocate", "lend"), 1)
        list(engine.stream(requests[0].ids, max_new_tokens=4))
        assert counts == {**once, "refusal": 1, "__init__": 1}
        for batch_size, given in ((2, requests), (2, iter(requests))):
            counts.clear()
            list(engine.generate(given, batch_size, 60))
            assert counts == {**once, "refusal": 5, "__init__": 5}
        counts.clear()
        conversation = Conversation(engine)
        for _ in range(3):
            list(conversation.stream(random_ids(9), max_new_tokens=4))
        assert counts == {"at": 1, "allocate": 1, "refusal": 3, "__init__": 3}  # its decoder is its own


def test_a_stop_that_raises_ends_its_own_row(model):
    """The others get their token of that step, too, and go on."""
    engine, said = engine_of(model, "h2o"), []

    def stop(tokens: list[int]) -> bool:
        said.append(len(tokens))
        if len(tokens) == 3:
            raise KeyError("of the caller")
        return False

    with engine.batch(3, 60) as batch:
        first, second = batch.add(requests_of(3)[0]), batch.add(Request(random_ids(9), 20, stop=stop))
        third = batch.add(requests_of(3)[2])
        with pytest.raises(KeyError, match="of the caller"):
            run(batch)
        run(batch)
    assert second.finish_reason == "interrupted" and len(second.tokens) == 3 and said == [1, 2, 3]
    assert [one.tokens for one in (first, third)] == [alone(engine, one.request) for one in (first, third)]


def test_a_stop_that_cancels_its_own_row(model):
    with engine_of(model, "window").batch(1, 60) as batch:
        one = batch.add(Request(random_ids(9), 20, stop=lambda tokens: batch.cancel(one)))
        told = []
        while batch.busy:
            batch.step()
            told += batch.collect()
    assert told == [one] and len(one.tokens) == 1 and one.finish_reason == "interrupted"


@pytest.mark.parametrize("at", [0, 2])
def test_a_fault_while_a_prompt_is_read(model, at):
    """Before and after there is a plan: those that were read are interrupted, the others and the next ones go on."""
    engine, forward, calls = engine_of(model, "h2o"), Block.forward, []
    short, long = requests_of(2)[0], Request(random_ids(30), 8)

    def failing(block, x, *rest):
        calls.extend([1] * (x.shape[1] == 30))
        if len(calls) == 2:
            raise MemoryError("in the second block")
        return forward(block, x, *rest)

    with engine.batch(2, 60) as batch:
        first = batch.add(Request(short.ids, 20))
        for _ in range(at):
            batch.step()
            batch.collect()
        failed = batch.add(long)
        with patch.object(Block, "forward", failing), pytest.raises(MemoryError):
            run(batch)
        assert failed.finish_reason == "interrupted" and not failed.tokens
        again = batch.add(long)
        run(batch)
    assert again.tokens == alone(engine, long)
    assert (first.tokens == alone(engine, first.request)) == (at > 0)


def test_a_batch_that_was_left(model, monkeypatch):
    """It holds nothing, does nothing and takes nothing, and what it has lent is free at once."""
    monkeypatch.setattr(engine_module, "CHUNK", 60)
    engine, long = engine_of(model, "h2o"), Request(random_ids(200), 5)
    with engine.batch(2, 220) as batch:
        batch.add(requests_of(1)[0])
        batch.step()
        held = weakref.ref(batch.add(long))
        batch.step()
    gc.disable()
    try:
        assert not batch.busy and batch.collect() == [] and batch.decoder is None and batch.free == 2
        assert held() is None  # no cycle keeps it
    finally:
        gc.enable()
    with engine.batch(2, 220) as other:
        one = other.add(long)
        other.step()
        batch.step()
        with pytest.raises(UserError, match="has been left"):
            batch.add(long)
        run(other)
    assert one.tokens == alone(engine, long)


def test_only_its_own_are_cancelled(model):
    engine = engine_of(model, "window")
    with engine.batch(1, 60) as batch, engine.batch(1, 60) as other:
        one = batch.add(Request(random_ids(9), 5))
        batch.step()
        other.cancel(one)
        run(batch)
        assert one.finish_reason == "length" and not other.busy and batch.free == 1


def test_a_way_of_sampling_that_was_not_named(model):
    """No step computes what it would need."""
    for known, other in (([GREEDY], SAMPLED), ([Sampling(1.0, seed=1)], SAMPLED)):
        with engine_of(model, "window").batch(1, 60, known) as batch:
            with pytest.raises(UserError, match="samplings have none like"):
                batch.add(Request([1], 4, other))
            batch.add(Request([1], 4, known[0]))


def test_who_leaves_a_stream_may_come_back(model):
    stream = engine_of(model, "window").stream(random_ids(9), max_new_tokens=9)
    some = list(islice(stream, 4))
    assert len(some) == 4 and some + list(stream) == stream.completion.tokens and len(stream.completion.tokens) == 9


def test_apart_reads_one_prompt_at_a_time(model):
    rows, forward = [], Block.forward

    def reading(block, x, *rest):
        rows.extend([len(x)] * isinstance(rest[-1], Reading))
        return forward(block, x, *rest)

    with patch.object(Block, "forward", reading):
        list(engine_of(model, "h2o").generate(requests_of(5), 3, 60, apart=True))
    assert rows == [1] * 5 * model.config.n_layers


def test_the_full_cache_that_is_compared_with(model):
    """Of those that run together, at the most: requests that come later and are shorter change nothing."""
    requests = [Request(random_ids(40), 3), Request(random_ids(30), 20), Request(random_ids(2), 2)]
    engine = engine_of(model, "window")
    done = list(engine.generate(requests, 2, 60))
    assert {one.figures.kv_bytes_full for one in done} == {sum(map(engine.sizing.full_bytes, (43, 50)))}
