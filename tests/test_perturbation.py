"""The perturbation curve against one that computes attention anew for every size; its plans against brute force."""

from functools import partial
from itertools import product

import pytest
import torch
from conftest import after_prompts, quick, random_ids, random_model
from naive import FROZEN

from engine import Engine, Request
from policies.layers.base import granule_size
from policies.layers.perturbation import NEAR, WEIGHTS, WHERE, Perturbation, falling, lower_hull, restricted, sizes_of
from policies.tokens import TOKEN_POLICIES, make
from prefill import plan_for

BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
FORMS = {
    "plain": {},
    "windows": {"sliding_window": 14, "windowed": (0,)},
    "soft caps": {"attention_softcap": 3.0},
    "sink logits": {"attention_sinks": True},
    "post norms": {"post_norms": True, "residual_scale": 0.7, "qk_norm": "head"},
    "post norms alone": {"pre_norms": False, "post_norms": True, "qk_norm": "projection"},
    "parallel": {"parallel": True, "norm": "layer", "ffn_gate": False, "qkv_bias": True, "output_bias": True},
    "learned positions": {"position_offset": 2, "norm": "layer", "ffn_gate": False},
    "gated": {"attention_gate": True},
    "scaled": {"attention_scale": 0.5, "rotary_dim": 6},
}
LENGTHS = [33, 5, 1]


def queries_of(policy: Perturbation, length: int, window: int | None) -> list[int]:
    """The positions that are asked, by the words of the docstring."""
    count = policy.queries
    span = min(length, window or length)
    start = length - -(-3 * span // 4)

    def spread(n: int) -> list[int]:
        return [max(start, start + (i + 1) * (length - start) // n - 1) for i in range(n)]

    if policy.where == "spread":
        return spread(count)
    last = [length - count + i for i in range(count)]
    last = last if policy.where == "last" else last[count // 2 :]
    return [*(spread(count // 2) if policy.where == "both" else []), *(p for p in last if p >= 0)]


def naive_curve(block, attended, policy, token_policy, scores, row: int, sizes: list[int]) -> list[float]:
    """Attention of each query over itself, what is near, and what `select` answers: one softmax for each size."""
    attention, length = block.attention, int(attended.lengths[row])
    own = scores if scores is None else scores[row : row + 1, :, :length]
    x_and_a, curve = attended.after[row], []

    def added(at: int, kept: list[set[int]]) -> torch.Tensor:
        heads = []
        for head, query in enumerate(attended.q[row, :, at]):
            group = head // (attention.heads // attention.kv_heads)
            near = [j for j in kept[group] if j < at and at - j < (attention.window or length)]
            logits = attended.k[row, group, [*near, at]] @ query * attention.scale
            if attention.softcap:
                logits = attention.softcap * (logits / attention.softcap).tanh()
            if attention.sink_logits is not None:
                logits = torch.cat((logits, attention.sink_logits[head : head + 1]))
            shares = logits.softmax(0)[: len(near) + 1]
            heads.append(shares @ attended.v[row, group, [*near, at]])
        out = torch.cat(heads)
        out = attention.wo(out if attended.gate is None else out * attended.gate[row, at])
        return block.post_attention_norm(out) * block.residual_scale

    everything = [set(range(length))] * attention.kv_heads
    for size in sizes:
        kept = token_policy.select(torch.tensor([length]), length, min(size, length), own)[0]
        kept = [set(each.tolist()) for each in kept.expand(attention.kv_heads, -1)]
        errors = []
        for at in queries_of(policy, length, attention.window):
            near = set(range(max(0, at - min(NEAR, size // 2)), at))
            moved = (added(at, everything) - added(at, [own | near for own in kept])).square().sum()
            errors.append((moved / x_and_a[at].square().sum()).item())
        curve.append(sum(errors) / len(errors))
    return curve


GRID = [(name, where, form) for name in BOUNDED for where in WHERE for form in FORMS]


@torch.inference_mode()
@pytest.mark.parametrize(
    "case",
    quick(
        *[("snapkv", "both", form) for form in FORMS],
        ("snapkv", "last", "windows"),
        ("snapkv", "spread", "windows"),
        ("streaming", "both", "plain"),
        ("h2o", "last", "windows"),
        of=GRID,
    ),
    ids="-".join,
)
def test_the_curve_equals_a_naive_one(case):
    """In float64, for a ragged batch, in every form of attention that a family has."""
    name, where, form = case
    model = random_model(n_layers=2, **FORMS[form])
    engine = Engine(model, make(name, recent=6) if name in FROZEN else name)
    requests = [Request(random_ids(length, length), 3) for length in LENGTHS]
    budget, floor, longest = 6, engine.policy.floor, max(LENGTHS) + 3
    policy, got = Perturbation(where=where, queries=8), []
    caps, policies = engine.sizing.caps(longest), engine.sizing.policies(longest)

    def ask(attended, layer):
        block, token_policy = model.layers[layer], policies[layer]
        probs = block.attention.prompt_probs
        scores = token_policy.score_prompt(attended.q, attended.k, attended.v, attended.lengths, probs)
        sizes = sizes_of(budget, caps[layer], floor)
        want = [naive_curve(block, attended, policy, token_policy, scores, row, sizes) for row in range(len(LENGTHS))]
        got.append((policy.measure(attended, budget, caps[layer], floor), torch.tensor(want, dtype=torch.float64)))
        return attended.signal

    after_prompts(model, requests, policies, [partial(ask, layer=layer) for layer in range(2)])
    for curve, want in got:
        torch.testing.assert_close(curve, want, rtol=1e-8, atol=1e-12)
        assert (want[0] > 1e-6).any() and (want[:, -1] < want[:, 0] + 1e-9).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("weights", WEIGHTS)
def test_plans_are_the_best_there_are(weights, seed):
    """Of all plans in integers, for convex curves that are read linearly between their points."""
    generator = torch.Generator().manual_seed(seed)
    budget, low, caps = 7, 2, [20, 20, 9 if seed % 2 else 20]
    own, points = [WEIGHTS[weights]((layer + 1) / 3) for layer in range(3)], []
    for cap in caps:
        sizes, (speed, height) = sizes_of(budget, cap, 1), torch.rand(2, generator=generator).tolist()
        points.append([(size, height * (0.05 + 0.3 * speed) ** (3 * size / cap)) for size in sizes])

    def error(plan):
        total = 0.0
        for layer, slots in enumerate(plan):
            pairs = zip(points[layer], points[layer][1:], strict=False)
            (a, high), (b, deep) = next(pair for pair in pairs if pair[0][0] <= slots <= pair[1][0])
            total += own[layer] * (high + (deep - high) * (slots - a) / (b - a))
        return total

    plans = product(*(range(low, cap + 1) for cap in caps))
    best = min(error(plan) for plan in plans if sum(plan) == 3 * budget)
    curves = [[value for _, value in curve] for curve in points]
    plan = Perturbation(weights).allocate(curves, budget, caps, 1).slots
    assert granule_size(budget, caps, 1) == 1 and sum(plan) == 3 * budget
    assert best - 1e-12 <= error(plan) <= best * (1 + 1e-9) + 1e-12


def test_hull_by_hand():
    corners = lower_hull([(1, 10.0), (2, 9.0), (3, 2.0), (5, 1.0), (6, 1.0)])
    assert corners == [(1, 10.0), (3, 2.0), (5, 1.0), (6, 1.0)]
    assert falling(corners, [1, 3, 5, 6]) == [4.0, 0.5, 0.0] and falling(corners, [1, 2, 4, 6]) == [4.0, 2.25, 0.25]
    assert falling([(6, 1.0)], [6]) == []
    assert restricted([4, 8, 16], [3.0, 4.0, 1.0], 6) == [(6, 3.5), (8, 3.5), (16, 1.0)]
    assert restricted([4, 8, 16], [3.0, 2.0, 1.0], 16) == [(16, 1.0)]
    assert sizes_of(20, 50, 1) == [6, 8, 12, 16, 24, 32, 48, 50] and sizes_of(40, 50, 1) == [12, 16, 24, 32, 48, 50]
    assert sizes_of(2, 9, 5) == [5, 6, 8, 9] and sizes_of(2, 3, 5) == [3] and sizes_of(2, 1, 1) == [1]


def test_the_sizes_of_a_larger_budget_are_the_end_of_those_of_a_smaller():
    for cap, floor in product((1, 5, 40, 1000), (1, 2, 5, 9)):
        most = sizes_of(1, cap, floor)
        for budget in range(1, 1000, 7):
            sizes = sizes_of(budget, cap, floor)
            assert sizes == most[-len(sizes) :] and sizes[0] >= min(floor, cap)


def test_equal_curves_without_weights_are_uniform():
    caps, sizes = [64] * 5, sizes_of(32, 64, 1)
    curves = [[1 - size / 64 for size in sizes]] * 5
    assert Perturbation("none").allocate(curves, 32, caps, 1).slots == [32] * 5
    deep = Perturbation("depth").allocate(curves, 32, caps, 1).slots
    assert deep == sorted(deep) and sum(deep) == 160 and deep[0] < deep[-1]
    assert Perturbation((5, 1, 1, 1, 1)).allocate(curves, 32, caps, 1).slots[0] > 32


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_equal_in_batches_and_alone(policy):
    """The curve of a batch is the mean of its rows': `plan_for`, which reads them one by one, makes the same plan."""
    model = random_model()
    requests = [Request(random_ids(length, length), 9) for length in (90, 33, 61)]
    engine = Engine(model, policy, "perturbation", 20)
    length = 99
    plan, _ = plan_for(engine.model, engine.sizing, requests, length)
    done = list(engine.generate(requests, 3, length))
    assert all(completion.figures.plan == plan.slots for completion in done) and len(set(plan.slots)) > 1
    given = Engine(model, policy, plan=plan.slots)
    for completion in done:
        assert list(given.stream(completion.request.ids, max_new_tokens=9)) == completion.tokens


@pytest.mark.parametrize(
    "options",
    [dict(weights="deep"), dict(weights=(1, -1)), dict(weights=[1]), dict(weights=(True,)), dict(where="first")]
    + [dict(queries=1), dict(queries=True), dict(queries=2.0), dict(weights=None)],
)
def test_options_outside_their_range(options):
    with pytest.raises(ValueError, match="^(weights|where|queries) must be "):
        Perturbation(**options)
