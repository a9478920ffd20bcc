"""Later turns on a compressed cache: against the naive cache, single steps, and recomputing; what stays constant."""

import pytest
import torch
from conftest import BY_LENGTH, appended, begun, quick, random_ids, random_model
from naive import NaiveCache

import decoder as decoder_module
from conversation import Conversation
from engine import Engine, Request
from formats import FORMATS
from model import Block
from policies.tokens import TOKEN_POLICIES, make
from prefill import Prompts, finished, read
from sampling import Sampling

BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
UNSCORED = [name for name in BOUNDED if not make(name).scored]
PLAN = [7, 12, 30, 9]
TURNS = [random_ids(count, seed=count) for count in (1, 17, 34, 3, 26)]
SHAPES = {
    "plain": {},
    "window": {"sliding_window": 16, "windowed": (0, 2)},
    "partial rotary, soft caps": {"rotary_dim": 6, "attention_softcap": 3.0},
    "sink logits": {"attention_sinks": True, "sliding_window": 16, "windowed": (1,)},
}


def say(conversation, ids: list[int], new: int = 6, **options) -> list[int]:
    return list(conversation.stream(ids, max_new_tokens=new, **options))


CUTS = [("plain", 1), ("plain", 64), *((shape, 5) for shape in SHAPES)]  # chunks of so many tokens
CUTS = [(*cut, format) for cut in CUTS for format in FORMATS]


@pytest.mark.parametrize("cut", quick(("plain", 5, "dense"), ("window", 5, "int8"), of=CUTS), ids=str)
@pytest.mark.parametrize("policy", BOUNDED)
def test_turns_equal_the_naive_cache(policy, cut, monkeypatch):
    """Chunks shorter and longer than layers and windows; a first turn of one token, so that sinks come in late."""
    shape, chunk, form = cut
    monkeypatch.setattr(decoder_module, "APPEND_CHUNK", chunk)
    model = random_model(**SHAPES[shape])
    engine = Engine(model, policy, plan=PLAN, cache_format=form)
    decoder = begun(engine, [Request(TURNS[0], 1)], 4096, endless=True).decoder
    naive = NaiveCache(model, policy, decoder.cache.plan, int8=form == "int8")
    naive.prompt(TURNS[0])
    with torch.inference_mode():
        for turn in TURNS[1:4]:
            got = model.logits(appended(decoder, torch.tensor([turn]))[:, -1])[0]
            torch.testing.assert_close(got, naive.append(turn, chunk), rtol=0, atol=1e-10)
            for token in random_ids(4, seed=5):
                decoder.tokens.fill_(token)
                torch.testing.assert_close(decoder.logits()[0], naive.feed(token), rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", UNSCORED)
def test_chunks_equal_single_steps(model, policy):
    with torch.inference_mode():
        chunks, steps = (begun(Engine(model, policy, plan=PLAN), [Request(TURNS[1], 1)]).decoder for _ in range(2))
        x = appended(chunks, torch.tensor([TURNS[2]]))
        for place, token in enumerate(TURNS[2]):
            steps.tokens.fill_(token)
            torch.testing.assert_close(model.logits(x[:, place]), steps.logits())
        for one, other in zip(chunks.cache.layers, steps.cache.layers, strict=True):
            for own, others in zip(one.parts(), other.parts(), strict=True):
                torch.testing.assert_close(own, others)


@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_rows_of_different_lengths(model, policy):
    """A chunk on top of a ragged batch gives each row what it gets alone."""
    plan = [200] * 4 if policy == "full" else PLAN
    starts, more = [TURNS[1], TURNS[2]], torch.tensor([TURNS[4], TURNS[4][::-1]])
    with torch.inference_mode():
        decoder = begun(Engine(model, policy, plan=plan), [Request(ids, 60) for ids in starts]).decoder
        both = appended(decoder, more)
        for row, ids in enumerate(starts):
            alone = begun(Engine(model, policy, plan=plan), [Request(ids, 60)]).decoder
            torch.testing.assert_close(appended(alone, more[row : row + 1])[0], both[row])


@pytest.mark.parametrize("rope", BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_rows_that_turn_at_different_speeds(rope):
    """A chunk, sinks included, on top of rows shorter and longer than what the model was trained on."""
    model, more = random_model(rope=rope, max_positions=32), torch.tensor([random_ids(9, 5), random_ids(9, 6)])
    requests = [Request(random_ids(12), 9), Request(random_ids(40), 9)]
    with torch.inference_mode():
        both = appended(begun(Engine(model, "streaming", plan=PLAN), requests).decoder, more)
        for row, request in enumerate(requests):
            alone = begun(Engine(model, "streaming", plan=PLAN), [request]).decoder
            torch.testing.assert_close(appended(alone, more[row : row + 1])[0], both[row])


def test_full_equals_recomputing(model):
    conversation = Conversation(Engine(model))
    history = []
    for turn in TURNS:
        history += turn
        for token in say(conversation, turn):
            assert token == model(torch.tensor([history]))[0, -1].argmax()
            history.append(token)
    assert conversation.seen == len(history) - 1


def test_an_end_of_sequence_is_not_fed(model):
    history = TURNS[1] + (answer := say(Conversation(Engine(model)), TURNS[1], 3))
    for eos, fed in (({answer[-1]}, history[:-1]), ((), history)):
        conversation = Conversation(Engine(model))
        assert say(conversation, TURNS[1], 3, eos_ids=eos) == answer
        [token] = say(conversation, TURNS[2], 1)
        assert token == model(torch.tensor([fed + TURNS[2]]))[0, -1].argmax()
        assert conversation.seen == len(fed) + len(TURNS[2])


def test_a_turn_may_be_cut_short(model):
    """Whoever stops reading an answer has what was made so far; the next turn goes on from there."""
    conversation = Conversation(Engine(model))
    stream = conversation.stream(TURNS[1], max_new_tokens=50)
    steps = iter(stream)
    made = [next(steps) for _ in range(3)]
    [token] = say(conversation, TURNS[2], 1)
    assert stream.completion.finish_reason == "interrupted" and stream.completion.tokens == made
    assert token == model(torch.tensor([TURNS[1] + made + TURNS[2]]))[0, -1].argmax()


def test_a_turn_nobody_listens_to_was_never_said(model):
    heard, other = Conversation(Engine(model)), Conversation(Engine(model))
    for conversation in (heard, other):
        say(conversation, TURNS[1])
    other.stream(TURNS[3])
    assert say(other, TURNS[2]) == say(heard, TURNS[2])


@pytest.mark.parametrize("policy", BOUNDED)
def test_memory_and_plan_stay(model, policy):
    conversation = Conversation(Engine(model, policy, "squeeze", budget=24))
    sizes, addresses, full = set(), set(), []
    for number in range(12):
        stream = conversation.stream(random_ids(30, seed=number), max_new_tokens=8)
        list(stream)
        figures = stream.completion.figures
        sizes.add((figures.kv_bytes, figures.state_bytes, tuple(figures.plan), tuple(figures.importance)))
        addresses.add(conversation.batch.decoder.cache.arenas["k"].data_ptr())
        full.append(figures.kv_bytes_full)
    assert len(sizes) == len(addresses) == 1
    assert full == sorted(set(full)) and full[-1] > figures.kv_bytes


def test_a_fraction_is_of_the_position_limit(model):
    stream = Conversation(Engine(model, "window", budget=0.25)).stream(TURNS[0], max_new_tokens=1)
    list(stream)
    assert stream.completion.figures.budget_slots == 1024 and stream.completion.figures.plan == [1024] * 4


def test_sampling_goes_on_from_turn_to_turn(model):
    def talk(seed: int) -> list[int]:
        conversation = Conversation(Engine(model, "window", budget=16), Sampling(temperature=1.0, seed=seed))
        return [token for turn in TURNS[1:3] for token in say(conversation, turn)]

    assert talk(1) == talk(1) != talk(2)


def test_beyond_the_position_limit():
    """A bounded policy goes on; the full cache says in one line that it cannot, and what it has stays usable."""
    model = random_model(max_positions=64)
    bounded = Conversation(Engine(model, "streaming", budget=0.5))
    for turn in TURNS:
        say(bounded, turn, 20)
    assert bounded.seen > 2 * 64
    full = Conversation(Engine(model))
    say(full, TURNS[1], 20)
    with pytest.raises(ValueError, match=r"^36 earlier \+ 35 prompt \+ 6 new tokens exceed the model's 64 positions"):
        full.stream(TURNS[2], max_new_tokens=6)
    assert len(say(full, TURNS[3], 6)) == 6


def test_compiled_turns():
    """A chunk between compiled steps compiles nothing anew."""
    torch._dynamo.reset()
    model = random_model()
    answers = []
    for compiled in (True, False):
        conversation = Conversation(Engine(model, "streaming", plan=PLAN, compile=compiled))
        first = say(conversation, TURNS[2])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        answers.append([first, *(say(conversation, turn) for turn in TURNS[3:])])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert answers[0] == answers[1]


def test_a_turn_that_breaks_off_while_it_is_read(model, monkeypatch):
    """A part of it is in the cache: nobody may go on from there."""
    monkeypatch.setattr(decoder_module, "APPEND_CHUNK", 5)
    conversation, forward, calls = Conversation(Engine(model, "window", plan=PLAN)), Block.forward, []
    say(conversation, TURNS[1])

    def failing(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            say(conversation, TURNS[2])
    with pytest.raises(ValueError, match="cut off while it was read; this conversation cannot go on"):
        say(conversation, TURNS[3])


@pytest.mark.parametrize("rope", BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_a_conversation_turns_by_the_position_limit(rope):
    """However short its first turn is."""
    model = random_model(rope=rope, max_positions=48)
    conversation, most = Conversation(Engine(model)), model.config.reach
    [token] = say(conversation, TURNS[1], 1)
    want = begun(Engine(model), [Request(TURNS[1], 1)], most, endless=True).decoder.tokens
    prompts = Prompts.of(model, [TURNS[1]], [most])
    logits, _ = finished(read(model, prompts, conversation.engine.sizing.policies(most), lambda *_: None))
    assert token == want.item() == logits.argmax().item()
    assert torch.equal(conversation.batch.decoder.rotary[0].flatten(), model.rotary(most)[0])
