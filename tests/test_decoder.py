"""The store of decoders and captured steps, on the CPU: a tape of tensor operations stands in for a CUDA graph."""

import gc

import pytest
import torch
from conftest import BY_LENGTH, quick, random_ids, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conversation import Conversation
from decoder import Store
from engine import Engine, Request
from policies.tokens import TOKEN_POLICIES
from sampling import GREEDY, Sampling
from sizing import CAPTURED_LENGTHS

PLAN, OTHER = [7, 12, 30, 9], [14, 8, 10, 26]
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
IDS = random_ids(33)


class Tape(TorchDispatchMode):
    """Records what a step does to which tensors. To play it is to do that again: no Python of the step runs."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step must not wait for the device"
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for function, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if hasattr(new, "wait"):  # a sum over ranks
                    new.wait()
                elif torch.is_tensor(new) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class StandIn:
    """In place of CudaGraphs: two runs to warm up, and one that is recorded."""

    def __init__(self, engine: Engine):
        self.captures, self.replays, self.engine = 0, 0, engine
        engine.code.capture, engine.sizing.unit = self, CAPTURED_LENGTHS

    def __call__(self, step):
        self.captures += 1
        step()
        step()
        self.tape = tape = Tape()
        with tape:
            step()

        def replay() -> None:
            self.replays += 1
            tape.play()

        return replay


def engine_of(model, policy: str = "h2o", captured: bool = True, **options) -> tuple[Engine, StandIn]:
    engine = Engine(model, policy, **options)
    graphs = StandIn(engine)
    if not captured:
        engine.code.capture, engine.sizing.unit = None, 1
    return engine, graphs


@pytest.fixture(scope="module")
def want(model):
    """Tokens without capture, each from an engine of its own."""
    known = {}

    def tokens(plan: list[int] = PLAN, ids: list[int] = IDS, new: int = 8, sampling: Sampling = GREEDY) -> list[int]:
        key = (*plan, *ids, new, sampling)
        if key not in known:
            known[key] = list(Engine(model, "h2o", plan=plan).stream(ids, sampling, new))
        return known[key]

    return tokens


@pytest.mark.parametrize("policy", quick("full", "streaming", "h2o", "snapkv", of=TOKEN_POLICIES))
def test_replayed_equals_eager(policy):
    """A stream, a sampled one, a batch whose rows are refilled, twice, and a conversation."""
    model, answers = random_model(max_positions=100), []
    for captured in (False, True):
        engine, graphs = engine_of(model, policy, captured, plan=None if policy == "full" else PLAN)
        tokens = [list(engine.stream(IDS, sampling, 12)) for sampling in (GREEDY, SAMPLED, GREEDY)]
        requests = [
            Request(random_ids(length, length), 3 + length % 4, sampling)
            for length, sampling in ((20, SAMPLED), (3, GREEDY), (41, GREEDY), (11, SAMPLED), (30, GREEDY))
        ]
        for _ in range(2):
            done = {id(completion.request): completion.tokens for completion in engine.generate(requests, 2)}
            tokens += [done[id(request)] for request in requests]
        conversation = Conversation(engine, SAMPLED)
        tokens += [list(conversation.stream(random_ids(count, count), 5)) for count in (9, 17, 4)]
        answers.append(tokens)
        assert captured == (graphs.replays > 0)
    assert answers[0] == answers[1]
    assert tokens[0] != tokens[1]
    assert graphs.captures == 4  # greedy, sampled, the batch, the conversation


def test_the_tape_is_what_runs(model):
    """Without its record of the step nothing happens: the stand-in does not fall back to Python."""
    engine, _ = engine_of(model, plan=PLAN)
    engine.code.capture = lambda step: lambda: None
    assert len(set(engine.stream(IDS, max_new_tokens=6))) == 1


def test_a_plan_is_captured_once(model):
    engine, graphs = engine_of(model, plan=PLAN)
    figures = []
    for count in (33, 5, 33, 20):
        stream = engine.stream(random_ids(count), max_new_tokens=4)
        list(stream)
        figures.append(stream.completion.figures)
    assert graphs.captures == 1 and graphs.replays == 4 * 3
    assert figures[0].compile_s > 0 and all(later.compile_s == 0 for later in figures[1:])
    list(engine.generate([Request(IDS, 3)] * 2))
    list(engine.generate([Request(IDS, 3)] * 2))
    assert graphs.captures == 2  # one more for two rows


def test_the_oldest_plan_is_dropped(model, want):
    engine, graphs = engine_of(model)
    plans = [[40 - number, 10, 10, 10 + number] for number in range(Store.SIZE + 1)]

    def captures(plan: list[int]) -> int:
        before, engine.plan = graphs.captures, plan
        assert list(engine.stream(IDS, max_new_tokens=3)) == want(plan, new=3)
        return graphs.captures - before

    assert [captures(plan) for plan in plans[:-1]] == [1] * Store.SIZE
    assert captures(plans[0]) == 0  # now the second one is the oldest
    assert captures(plans[-1]) == 1
    assert captures(plans[0]) == 0 and captures(plans[2]) == 0
    assert captures(plans[1]) == 1
    assert len(engine.store.idle) == Store.SIZE


def test_plans_take_turns_in_one_memory(model, want):
    engine, graphs = engine_of(model)
    addresses = set()
    for number in range(6):
        engine.plan = (PLAN, OTHER)[number % 2]
        ids = random_ids(10 + 7 * number)
        assert list(engine.stream(ids, max_new_tokens=8)) == want(engine.plan, ids)
        addresses |= {decoder.cache.arenas["k"].data_ptr() for decoder in engine.store.idle.values()}
    assert graphs.captures == 2 and len(addresses) == 1


def test_a_bigger_plan_replaces_the_memory(model, want):
    engine, graphs = engine_of(model)
    per_slot = 2 * 2 * 12 * 8  # K and V, heads, head_dim, float64
    plans, kept = [PLAN, OTHER, [30] * 4, PLAN], [1, 2, 1, 2]
    for number, plan in enumerate(plans):
        engine.plan = plan
        stream = engine.stream(IDS, max_new_tokens=8)
        assert list(stream) == want(plan)
        assert stream.completion.figures.kv_bytes == sum(plan) * per_slot
        assert stream.completion.figures.state_bytes == sum(plan) * 2 * (8 + 8)
        assert len(engine.store.idle) == kept[number]
    assert graphs.captures == 4
    storages = {decoder.cache.arenas["k"].untyped_storage().nbytes() for decoder in engine.store.idle.values()}
    assert storages == {120 * per_slot // 2}


def test_streams_at_the_same_time(model, want):
    engine, graphs = engine_of(model, plan=PLAN)
    other = random_ids(12, seed=9)
    streams = [iter(engine.stream(ids, max_new_tokens=8)) for ids in (IDS, other, IDS)]
    together = [[], [], []]
    for _ in range(8):
        for tokens, stream in zip(together, streams, strict=True):
            tokens.append(next(stream))
    assert together == [want(), want(ids=other), want()]
    assert list(engine.stream(other, max_new_tokens=8)) == want(ids=other)
    assert [list(stream) for stream in streams] == [[], [], []]
    before = graphs.captures
    assert list(engine.stream(IDS, max_new_tokens=8)) == want()
    assert graphs.captures == before and not engine.store.busy


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_an_abandoned_stream_gives_its_decoder_back(model, want, how):
    engine, graphs = engine_of(model, plan=PLAN)
    stream = engine.stream(IDS, max_new_tokens=30)
    steps = iter(stream)
    assert [next(steps), next(steps)] == want()[:2]
    assert engine.store.busy
    if how == "closed":
        stream.close()
        assert stream.completion.finish_reason == "interrupted"
    del stream, steps
    gc.collect()
    assert not engine.store.busy
    assert list(engine.stream(IDS, max_new_tokens=8)) == want() and graphs.captures == 1


def test_an_abandoned_batch_gives_its_decoder_back(model, want):
    engine, graphs = engine_of(model, plan=PLAN)
    for _ in range(2):
        done = engine.generate([Request(IDS, new) for new in (2, 30, 30)], batch_size=2)
        assert next(done).tokens == want()[:2]
        done.close()
        assert not engine.store.busy
    assert graphs.captures == 1


def test_an_error_inside_a_step_drops_the_decoder(model, want):
    engine, graphs = engine_of(model, plan=PLAN)

    def failing(new: list[int]) -> bool:
        if len(new) == 3:
            raise RuntimeError("out of luck")
        return False

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of luck"):
            list(engine.stream(IDS, max_new_tokens=8, stop=failing))
        assert not engine.store.busy and not engine.store.idle
    assert list(engine.stream(IDS, max_new_tokens=8)) == want() and graphs.captures == 3


def test_an_error_during_capture_leaves_the_store_usable(model, want):
    engine, graphs = engine_of(model, plan=PLAN)

    def failing(step):
        raise RuntimeError("no graph")

    engine.code.capture = failing
    with pytest.raises(RuntimeError, match="no graph"):
        list(engine.stream(IDS, max_new_tokens=8))
    engine.code.capture = graphs
    assert list(engine.stream(IDS, max_new_tokens=8)) == want() and graphs.captures == 1


@pytest.mark.parametrize("rope", BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_a_reused_decoder_turns_by_the_new_length(rope):
    """The shorter and the longer request turn their keys at different speeds; the graph reads them from a buffer."""
    model = random_model(rope=rope, max_positions=32)
    engine, graphs = engine_of(model, plan=PLAN)
    answers = []
    for count in (9, 60, 9, 100):
        ids = random_ids(count)
        answers.append(list(engine.stream(ids, max_new_tokens=8)))
        assert answers[-1] == list(Engine(model, "h2o", plan=PLAN).stream(ids, max_new_tokens=8))
    assert graphs.captures == 1
    short, long = (model.rotary(length)[0] for length in (17, 108))
    assert not torch.equal(short, long)
    [decoder] = engine.store.idle.values()
    assert all(torch.equal(frequencies[0, 0, 0], long) for frequencies in decoder.rotary)


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_a_lag_changes_neither_tokens_nor_reasons(model, want, lag):
    """Steps run ahead of what has been read; none runs that no row can want."""
    tokens = want(new=12)
    cases = [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "eos_ids": {tokens[5]}},
        {"max_new_tokens": 12, "stop": lambda new: len(new) == 4},
    ]
    for case in cases:
        outcomes, steps = [], []
        for ahead in (0, lag):
            engine, graphs = engine_of(model, plan=PLAN)
            engine.lag = ahead
            stream = engine.stream(IDS, **case)
            outcomes.append((list(stream), stream.completion.finish_reason, stream.completion.figures.decode_tokens))
            steps.append(graphs.replays)
        assert outcomes[0] == outcomes[1]
        made = len(outcomes[0][0])
        assert steps[0] == made - 1
        assert steps[1] == min(made - 1 + lag, case["max_new_tokens"] - 1)


@pytest.mark.parametrize("lag", [0, 2])
def test_no_step_is_run_for_nobody(model, lag):
    """Rows that end by length alone: as many steps as the longest chain of rows needs."""
    engine, graphs = engine_of(model, plan=PLAN)
    engine.lag = lag
    done = list(engine.generate([Request(random_ids(9, seed), new) for seed, new in ((1, 9), (2, 3), (3, 1))]))
    assert sorted(len(completion.tokens) for completion in done) == [1, 3, 9]
    assert graphs.replays == 8


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o"])
def test_what_a_request_leaves_does_not_matter(model, policy):
    """Not even values that are no numbers, as an overflow in half precision would leave them."""
    ids, plan = random_ids(9), [30] * 4
    engine = Engine(model, policy, plan=plan)
    want = list(engine.stream(ids, max_new_tokens=12))
    [decoder] = engine.store.idle.values()
    with torch.inference_mode():
        for name in {"k", "v", "score"} & set(decoder.cache.arenas):
            decoder.cache.arenas[name].fill_(float("nan"))
    assert list(engine.stream(ids, max_new_tokens=12)) == want


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_a_capture_spares_the_prompts_that_wait_in_the_arena(model, policy):
    """The plan is new while they are there already. One engine has no arena from before, the other a larger one."""
    requests = [Request(random_ids(count, count), 12) for count in (70, 33, 9)]
    want = [completion.tokens for completion in Engine(model, policy, "squeeze", 12).generate(requests)]
    for first in ([], [Request(random_ids(90, 7), 12)] * 4):
        engine, graphs = engine_of(model, policy, layers="squeeze", budget=12)
        list(engine.generate(first))
        assert [completion.tokens for completion in engine.generate(requests)] == want
        assert graphs.captures == 1 + bool(first)
