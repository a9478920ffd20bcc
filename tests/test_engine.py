"""The engine against its oracles: a naive cache, recomputing without a cache, eager, and single runs."""

import random

import pytest
import torch
from conftest import BY_LENGTH, after_prompts, begun, quick, random_ids, random_model
from naive import FROZEN, NaiveCache

from decoder import Decoder
from engine import Engine, Request
from formats import FORMATS, encoded
from kernels import decoded
from kvcache import KVCache
from policies.tokens import TOKEN_POLICIES, make
from sampling import GREEDY, Sampler, Sampling

NEW = 32
BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
PLAN = [7, 12, 30, 9]  # filled at different steps, odd and even
PROMPTS = {"shorter than every layer": 3, "between": 10, "longer": 41}


def run(engine: Engine, ids: list[int], new: int = NEW) -> list[int]:
    return list(engine.stream(ids, max_new_tokens=new))


def teacher_forced(engine: Engine, ids: list[int], following: list[int]) -> torch.Tensor:
    """Logits [1 + len(following), vocab] after the prompt and after each following token, through the real cache."""
    with torch.inference_mode():
        request = Request(ids, max_new_tokens=len(following) + 1)
        decoder = begun(engine, [request]).decoder
        rows = [after_prompts(engine.model, [request], engine.sizing.policies(request.length))[0]]
        for token in following:
            decoder.tokens.fill_(token)
            rows.append(decoder.logits())
    return torch.cat(rows)


def recomputed(model, ids: list[int], new: int) -> list[int]:
    ids = list(ids)
    for _ in range(new):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[-new:]


@pytest.mark.parametrize("prompt", quick(10, 41, of=PROMPTS.values()), ids=PROMPTS)
@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("form", FORMATS)
def test_equals_naive_eviction(model, policy, prompt, form):
    ids, following = random_ids(prompt), random_ids(NEW, seed=3)
    got = teacher_forced(Engine(model, policy, plan=PLAN, cache_format=form), ids, following)
    naive = NaiveCache(model, policy, PLAN, int8=form == "int8")
    want = torch.stack([naive.prompt(ids), *(naive.feed(token) for token in following)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", quick("streaming", "h2o", "snapkv", of=BOUNDED))
def test_greedy_tokens_equal_naive_eviction(model, policy):
    ids = random_ids(33)
    naive = NaiveCache(model, policy, PLAN)
    want = [naive.prompt(ids).argmax().item()]
    while len(want) < NEW:
        want.append(naive.feed(want[-1]).argmax().item())
    assert run(Engine(model, policy, plan=PLAN), ids) == want
    assert run(Engine(model, "full"), ids) != want, "the eviction must matter"


def test_streaming_with_other_sinks_equals_naive(model):
    ids, following = random_ids(20), random_ids(NEW, seed=3)
    plan = [4, 9, 3, 60]
    got = teacher_forced(Engine(model, make("streaming", sinks=2), plan=plan), ids, following)
    naive = NaiveCache(model, "streaming", plan, sinks=2)
    want = torch.stack([naive.prompt(ids), *(naive.feed(token) for token in following)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", FROZEN)
def test_frozen_policies_with_a_shorter_ring_equal_naive(model, policy):
    """Rings that grow from 4 to 9 and 6 slots, one of 1, one in a layer that the prompt does not fill. All wrap."""
    ids, following = random_ids(20), random_ids(NEW, seed=3)
    plan = [2, 19, 26, 13]
    got = teacher_forced(Engine(model, make(policy, recent=4), plan=plan), ids, following)
    naive = NaiveCache(model, policy, plan, recent=4)
    want = torch.stack([naive.prompt(ids), *(naive.feed(token) for token in following)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_full_equals_recomputing(model):
    ids = random_ids(25)
    assert run(Engine(model), ids) == recomputed(model, ids, NEW)


@pytest.mark.parametrize("layers", quick("squeeze", of=["uniform", "squeeze", "pyramid"]))
@pytest.mark.parametrize("policy", BOUNDED)
def test_enough_slots_equal_full(model, policy, layers):
    ids, following = random_ids(25), random_ids(NEW, seed=3)
    want = teacher_forced(Engine(model), ids, following)
    torch.testing.assert_close(teacher_forced(Engine(model, policy, layers, budget=1), ids, following), want)
    few = teacher_forced(Engine(model, policy, layers, budget=12), ids, following)
    assert few.isfinite().all() and (few - want).abs().max() > 1e-3


def test_ragged_batch_has_the_mean_of_single_signals(model):
    prompts = [random_ids(count, seed=count) for count in (2, 31, 8)]
    singles = [next(Engine(model).generate([Request(ids, max_new_tokens=1)])).figures.importance for ids in prompts]
    batch = next(Engine(model).generate([Request(ids, max_new_tokens=1) for ids in prompts])).figures.importance
    torch.testing.assert_close(torch.tensor(batch), torch.tensor(singles).mean(0))


@pytest.mark.parametrize("chosen", [*map(make, BOUNDED), make("snapkv", recent=9)], ids=repr)
def test_fewer_slots_keep_a_subset(chosen):
    torch.manual_seed(0)
    lengths = torch.tensor([50, 23])
    scores = torch.randint(5, (2, 3, 50)).double()  # many ties
    kept = {n: chosen.select(lengths, 50, n, scores).expand(2, 3, -1) for n in range(chosen.floor, 60)}
    for slots, fewer in kept.items():
        for row, length in enumerate(lengths.tolist()):
            for head in range(3):
                real = fewer[row, head, : min(slots, length)].tolist()
                assert len(set(real)) == len(real) == min(slots, length) and max(real) < length
                if slots + 1 in kept:
                    assert set(real) <= set(kept[slots + 1][row, head, : min(slots + 1, length)].tolist())


@pytest.mark.parametrize("policy", BOUNDED)
def test_only_what_decoding_needs_is_stored(model, policy):
    stream = Engine(model, policy, plan=PLAN).stream(random_ids(20), max_new_tokens=12)
    list(stream)
    per_slot = 8 + 8 if policy in ("h2o", "h2o-mean", "tova") else 0  # a score in float64 and a position, per KV head
    assert stream.completion.figures.state_bytes == sum(PLAN) * 2 * per_slot


def compile_and_compare(policy: str) -> None:
    """Compiled equals eager, over two plans of lengths not seen before; the second one compiles nothing."""
    torch._dynamo.reset()
    model = random_model()
    ids, following = random_ids(20), random_ids(30, seed=3)
    graphs = []
    for plan in ([60, 61, 62, 63], [64, 66, 65, 59]) if policy == "full" else (PLAN, [14, 11, 10, 13]):
        eager = teacher_forced(Engine(model, policy, plan=plan), ids, following)
        compiled = teacher_forced(Engine(model, policy, plan=plan, compile=True), ids, following)
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-9)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[0]


def test_compiled_equals_eager():
    compile_and_compare("h2o")


@pytest.mark.slow
@pytest.mark.parametrize("policy", [name for name in TOKEN_POLICIES if name != "h2o"])
def test_compiled_equals_eager_for_the_others(policy):
    compile_and_compare(policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*map(make, BOUNDED), make("snapkv", recent=20)], ids=repr)
def test_plans_do_not_recompile(model, policy):
    torch._dynamo.reset()
    rng = random.Random(4)
    run(Engine(model, policy, plan=[20, 30, 40, 50], compile=True), random_ids(60), 4)
    warm = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            plan = [rng.randrange(6, 100) for _ in range(4)]
            assert run(Engine(model, policy, plan=plan, compile=True), random_ids(60), 4) == run(
                Engine(model, policy, plan=plan), random_ids(60), 4
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == warm


@pytest.mark.slow
@pytest.mark.parametrize("rope", BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_lengths_do_not_recompile(rope):
    """Rows that turn at speeds of their own, refilled, through the graphs of the first batch."""
    torch._dynamo.reset()
    model = random_model(rope=rope, max_positions=32)
    compiled = Engine(model, "streaming", plan=PLAN, compile=True)
    batches = [[Request(random_ids(n, n), 6) for n in lengths] for lengths in ((20, 50), (60, 5, 9, 41), (8, 9, 10))]
    list(compiled.generate(batches[0], 2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for requests in batches:
            want = [(c.request.ids, c.tokens) for c in Engine(model, "streaming", plan=PLAN).generate(requests, 2)]
            assert [(c.request.ids, c.tokens) for c in compiled.generate(requests, 2)] == want


EXPERTS = dict(
    experts=4, experts_per_token=2, ffn_bias=True, router_bias=True, activation_limit=1.0, attention_sinks=True
)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=5, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_a_step_asks_the_device_nothing(policy, shape, sampling):
    """On the meta device, where nothing has a value, whatever waits for one fails."""
    model = random_model(**shape).to("meta")
    engine, c = Engine(model, policy), model.config
    cache = KVCache([9, 12, 9, 9], 3, c.n_kv_heads, c.head_dim, torch.float64, "meta", engine.policy.scored)
    sampler = Sampler([sampling] * 3, "meta")
    decoder = Decoder(model, engine.code, cache, model.rotary(40), engine.sizing.policies(40), sampler)
    decoder.step()
    with pytest.raises(RuntimeError):
        decoder.seen.tolist()


@pytest.mark.parametrize("policy", quick("streaming", "h2o", of=TOKEN_POLICIES))
def test_compiled_equals_eager_in_8_bits(policy):
    model, ids, following = random_model(torch.float32), random_ids(41), random_ids(NEW, seed=3)
    plan = None if policy == "full" else PLAN
    engines = [Engine(model, policy, plan=plan, compile=compiled, cache_format="int8") for compiled in (False, True)]
    one, other = (teacher_forced(engine, ids, following) for engine in engines)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_of_8_bits(dtype):
    """Half a step off at most, and half a percent for the scale; what is not finite stays so; zeros are zeros."""
    for size in (1e-5, 0.01, 1.0, 300.0):
        x = (size * torch.randn(50, 64, dtype=torch.float64)).to(dtype)
        error = (decoded(*encoded(x), torch.float64) - x).abs()
        assert (error <= x.abs().amax(-1, keepdim=True).double() * (0.5 / 127 + 0.005)).all()
        half = (decoded(*encoded(x), dtype) - x).abs().double()
        assert (half <= error + x.abs().double() * 2 * torch.finfo(dtype).eps + 1e-7).all()
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 4, dtype=dtype)
        x[0, 1] = wrong
        whole, scale = encoded(x)
        assert not decoded(whole, scale, dtype)[0].isfinite().any() and decoded(whole, scale, dtype)[1].isfinite().all()
    canonical = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert decoded(*encoded(canonical), dtype).isnan().all()
    assert (decoded(*encoded(torch.zeros(2, 4, dtype=dtype)), dtype) == 0).all()


def test_two_engines_alternate(model):
    ids, other = random_ids(20), random_model(seed=9, n_layers=3)
    alone = [run(Engine(model, "h2o", plan=PLAN), ids), run(Engine(other, "streaming", budget=9), ids)]
    streams = [
        iter(Engine(model, "h2o", plan=PLAN).stream(ids, max_new_tokens=NEW)),
        iter(Engine(other, "streaming", budget=9).stream(ids, max_new_tokens=NEW)),
    ]
    together = [[], []]
    for _ in range(NEW):
        for tokens, stream in zip(together, streams, strict=True):
            tokens.append(next(stream))
    assert together == alone


def test_squeeze_gives_the_squeezed_layers_less(model):
    stream = Engine(model, "window", "squeeze", budget=16).stream(random_ids(60), max_new_tokens=4)
    list(stream)
    figures = stream.completion.figures
    assert sum(figures.plan) == 16 * 4 and len(set(figures.plan)) > 1
    assert figures.kv_bytes == sum(figures.plan) * 2 * 2 * 12 * 8  # K and V, heads, head_dim, float64
    assert figures.kv_bytes_full == 64 * 4 * 2 * 2 * 12 * 8
    for signal, group, slots in zip(figures.importance, figures.groups, figures.plan, strict=True):
        assert (group == 2) == (slots == min(figures.plan)), (signal, group, slots)
    again = Engine(model, "window", plan=figures.plan).stream(random_ids(60), max_new_tokens=4)
    assert list(again) == stream.completion.tokens


def test_finish_reasons(model):
    ids = random_ids(9)
    tokens = run(Engine(model), ids, 12)
    eos = tokens[5]
    stream = Engine(model).stream(ids, max_new_tokens=12, eos_ids={eos})
    assert list(stream) == tokens[: tokens.index(eos) + 1] and stream.completion.finish_reason == "eos"
    stream = Engine(model).stream(ids, max_new_tokens=12, stop=lambda new: len(new) == 3)
    assert list(stream) == tokens[:3] and stream.completion.finish_reason == "stop"
    stream = Engine(model).stream(ids, max_new_tokens=12)
    assert list(stream) == tokens and stream.completion.finish_reason == "length"
    stream = Engine(model).stream(ids, max_new_tokens=12)
    steps = iter(stream)
    assert [next(steps), next(steps)] == tokens[:2]
    stream.close()
    assert stream.completion.finish_reason == "interrupted"


def test_rows_end_on_their_own(model):
    requests = [Request(random_ids(11, seed), max_new_tokens=new) for seed, new in ((1, 9), (2, 3), (3, 6))]
    done = list(Engine(model, "window", plan=PLAN).generate(requests))
    assert [len(completion.tokens) for completion in done] == [3, 6, 9]
    for completion in done:
        assert completion.tokens == run(
            Engine(model, "window", plan=PLAN), completion.request.ids, completion.request.max_new_tokens
        )


def test_seeded_rows_do_not_depend_on_their_neighbours(model):
    sampling = [Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=seed) for seed in (1, 2)]
    ids = random_ids(12)
    singles = [list(Engine(model).stream(ids, s, max_new_tokens=20)) for s in sampling]
    requests = [Request(ids, 20, s) for s in sampling]
    assert [completion.tokens for completion in Engine(model).generate(requests)] == singles
    assert singles[0] != singles[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "full", "budget": 0.5}, "full keeps every token"),
        ({"policy": "window", "budget": 1.5}, "not 1.5"),
        ({"policy": "window", "budget": 0}, "not 0"),
        ({"policy": "window", "budget": -3}, "not -3"),
        ({"policy": "window", "budget": True}, "not True"),
        ({"policy": "window", "budget": float("nan")}, "not nan"),
        ({"policy": "lru"}, "unknown policy 'lru'"),
        ({"layers": "cone"}, "unknown layer policy 'cone'"),
        ({"policy": "window", "plan": [8, 8]}, "2 layers, the model 4"),
    ],
)
def test_settings_that_do_not_fit(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        Engine(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "ids", "new", "words"),
    [
        ({}, [], 4, "prompt is empty"),
        ({}, [1, 97], 4, "97 is outside the vocabulary"),
        ({}, [-1], 4, "-1 is outside"),
        ({}, [1], 0, "at least 1, not 0"),
        ({}, [1] * 4000, 97, "4096 positions"),
        ({"policy": "streaming", "budget": 4}, [1] * 50, 4, "needs at least 5"),
        ({"policy": "streaming", "budget": 0.05}, [1] * 50, 10, "is 3 slots"),
        ({"policy": "streaming", "plan": [5, 5, 5, 4]}, [1] * 50, 4, "layer 3 4 slots"),
        ({"policy": "full", "plan": [54, 54, 53, 54]}, [1] * 50, 4, "layer 2 53 slots"),
    ],
)
def test_requests_that_cannot_run(model, arguments, ids, new, words):
    with pytest.raises(ValueError, match=words):
        Engine(model, **arguments).stream(ids, max_new_tokens=new)


def test_bounded_policies_run_past_the_position_limit():
    model = random_model(max_positions=32)
    assert len(run(Engine(model, "streaming", budget=16), random_ids(30), 40)) == 40


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("policy", BOUNDED)
def test_very_short_requests(model, policy, new):
    assert len(run(Engine(model, policy, "squeeze"), [5], new)) == new
