"""Layer policies against slow oracles: all labelings for 3-means, all kinds of completions for the upper bounds."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.layers import LAYER_POLICIES, make
from policies.layers.base import fit, granule_size
from policies.layers.mix import Mix
from policies.layers.perturbation import Perturbation, sizes_of
from policies.layers.pyramid import Pyramid
from policies.layers.squeeze import Squeeze, three_means
from policies.layers.uniform import Uniform

POLICIES = [Uniform(), Squeeze(), Squeeze(p=0.05), Squeeze(p=1), Pyramid(), Pyramid(beta=3), Mix(), Mix(0.05, 0.9)]
POLICIES += [Perturbation(), Perturbation("none")]
quick = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def sizes(draw, min_layers=1, max_layers=12, equal_caps=None):
    """A budget, caps and a floor that it covers."""
    layers = draw(st.integers(min_layers, max_layers))
    budget = draw(st.integers(1, 24) | st.integers(1, 300))
    cap = st.integers(1, 3 * budget) | st.just(budget) | st.just(20 * budget)
    equal_caps = draw(st.booleans()) if equal_caps is None else equal_caps
    caps = [draw(cap)] * layers if equal_caps else draw(st.lists(cap, min_size=layers, max_size=layers))
    floor = draw(st.integers(1, budget) | st.just(budget))
    return budget, caps, floor


def signals_of(layers):
    """Any values, or few of them: ties, clean clusters, equally good clusterings."""
    few = st.sampled_from([0.1, 0.2, 0.25, 0.3]) | st.floats(-1, 1)
    pools = st.lists(few, min_size=1, max_size=5).map(st.sampled_from) | st.just(few)
    return pools.flatmap(lambda value: st.lists(value, min_size=layers, max_size=layers))


def evidence_of(policy, size, seen=None):
    """Of all layers, or of the first ones: signals, or curves that mostly fall, steep or flat, many of them equal."""
    budget, caps, floor = size
    seen = len(caps) if seen is None else seen
    if not isinstance(policy, Perturbation):
        return signals_of(seen)
    few = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1e6]) | st.floats(0, 1)

    def curve(cap):
        count = len(sizes_of(budget, cap, floor))
        falling = st.lists(few, min_size=count, max_size=count).map(lambda values: sorted(values, reverse=True))
        return falling | st.lists(few, min_size=count, max_size=count)

    same = curve(caps[0]).map(lambda values: [values[-len(sizes_of(budget, cap, floor)) :] for cap in caps[:seen]])
    own = st.tuples(*map(curve, caps[:seen])).map(list)
    return (same | own) if len(set(caps)) == 1 else own


def error_of(values, labels):
    """Squared distance to the means of the clusters, exactly."""
    error = Fraction(0)
    for label in set(labels):
        cluster = [value for value, own in zip(values, labels, strict=True) if own == label]
        mean = sum(cluster) / len(cluster)
        error += sum((value - mean) ** 2 for value in cluster)
    return error


def check_plan(policy, signals, budget, caps, floor):
    slots = policy.allocate(signals, budget, caps, floor).slots
    total = min(budget * len(caps), sum(caps))
    uniform = policy == Uniform() or (isinstance(policy, Squeeze) and len(set(signals)) < 3)
    granule = 1 if uniform else granule_size(budget, caps, floor)
    assert len(slots) == len(caps)
    assert total - granule < sum(slots) <= total
    for own, cap in zip(slots, caps, strict=True):
        assert min(floor, cap) <= own <= cap
        assert own % granule == 0 or own == cap


# --- plans of all policies ---


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32])
def test_sums_floors_and_caps_over_a_grid(policy, layers):
    signals = [((7 * layer) % layers) / layers for layer in range(layers)]
    for budget, floor, cap in product([1, 5, 16, 50, 127, 128, 1000], [1, 5, 37, 128], [3, 40, 128, 1003, 4000]):
        for caps in ([cap] * layers, [cap if layer % 3 else 2 * cap + 1 for layer in range(layers)]):
            if budget * layers >= sum(min(floor, cap) for cap in caps):
                evidence = signals
                if isinstance(policy, Perturbation):
                    evidence = [
                        [s / size for size in sizes_of(budget, cap, floor)]
                        for s, cap in zip(signals, caps, strict=True)
                    ]
                check_plan(policy, evidence, budget, caps, floor)


@quick
@given(sizes(), st.data(), st.sampled_from(POLICIES))
def test_sums_floors_and_caps(size, data, policy):
    budget, caps, floor = size
    check_plan(policy, data.draw(evidence_of(policy, size)), budget, caps, floor)


@quick
@given(sizes(equal_caps=True), st.data())
def test_a_larger_wish_never_gets_less(size, data):
    budget, caps, floor = size
    wish = st.floats(0, 4 * budget) | st.sampled_from([0, budget / 2, budget, 2 * budget])
    wishes = data.draw(st.lists(wish, min_size=len(caps), max_size=len(caps)))
    slots, granule = fit(wishes, budget, caps, floor), granule_size(budget, caps, floor)
    for (wish, own), (other_wish, other) in product(zip(wishes, slots, strict=True), repeat=2):
        assert own >= other or wish <= other_wish
        assert abs(own - other) <= granule or wish != other_wish


@quick
@given(sizes(), st.data())
def test_stranded_slots_go_evenly(size, data):
    """No layer with room is shifted two granules less than one that could give: caps and floors are shared by all."""
    budget, caps, floor = size
    wishes = data.draw(st.lists(st.floats(0, 4 * budget), min_size=len(caps), max_size=len(caps)))
    slots, granule = fit(wishes, budget, caps, floor), granule_size(budget, caps, floor)
    shift = [own - wish for own, wish in zip(slots, wishes, strict=True)]
    gives = [shift[i] for i, cap in enumerate(caps) if slots[i] >= min(floor, cap) + 2 * granule]
    takes = [shift[i] for i, cap in enumerate(caps) if slots[i] <= cap - granule]
    assert not gives or not takes or max(gives) < min(takes) + 2 * granule


def test_integers_by_hand():
    assert fit([10, 20, 30], 20, [99] * 3, 1) == [10, 20, 30]  # granule 2
    assert fit([13.5, 20.5, 26], 20, [99] * 3, 1) == [14, 20, 26]  # the largest remainder first
    assert fit([17] * 3, 17, [99] * 3, 1) == [18, 16, 16]  # less than a granule is left over
    assert fit([21, 21, 18], 20, [99] * 3, 1) == [22, 20, 18]  # ties by layer index
    assert fit([10, 20, 30], 20, [99, 99, 25], 1) == [12, 22, 25]  # 5 stranded, and a cap may have any length
    assert fit([2, 20, 38], 20, [99] * 3, 9) == [10, 16, 34]  # a floor of 9 is 10 in granules
    assert fit([2, 20, 38], 20, [6, 99, 99], 9) == [6, 18, 36]  # a layer with a small cap needs no more
    assert fit([60, 0, 0], 20, [99] * 3, 20) == [20, 20, 20]
    assert fit([60, 0, 0], 21, [99] * 3, 21) == [21, 21, 21]  # granule 2 does not fit the floor, so 1
    assert fit([100] * 3, 100, [7, 8, 9], 50) == [7, 8, 9]


def test_granule():
    sizes = {1: 1, 15: 1, 16: 2, 50: 6, 127: 15, 128: 16, 5000: 16}
    assert {budget: granule_size(budget, [9999] * 4, 1) for budget in sizes} == sizes
    assert granule_size(130, [999] * 4, 129) == 2  # 16 -> 144, 8 -> 136, 4 -> 132, 2 -> 130
    assert granule_size(50, [999] * 4, 50) == 1


# --- uniform and pyramid ---


@quick
@given(sizes(equal_caps=True))
def test_uniform_is_exact(size):
    budget, caps, floor = size
    assert Uniform().allocate([], budget, caps, floor).slots == [min(budget, cap) for cap in caps]
    assert Uniform().allocate([], budget, caps, floor).groups is None


def test_uniform_hands_stranded_slots_on():
    assert Uniform().allocate([], 100, [40, 200, 40, 200], 5).slots == [40, 160, 40, 160]
    assert Uniform().allocate([], 100, [40, 120, 40, 999], 5).slots == [40, 120, 40, 200]
    assert Uniform().allocate([], 100, [99, 200, 200, 200], 5).slots == [99, 101, 100, 100]
    assert Uniform().allocate([], 1000, [900] + [9999] * 20, 5).slots == [900] + [1005] * 20


def test_pyramid():
    assert Pyramid().allocate([], 320, [9999] * 3, 5).slots == [624, 320, 16]
    assert Pyramid(beta=2).allocate([], 320, [9999] * 5, 5).slots == [480, 400, 320, 240, 160]
    assert Pyramid().allocate([], 50, [999], 5).slots == [50 // 6 * 6]
    assert Pyramid(beta=1).allocate([], 320, [999] * 4, 5).slots == [320] * 4
    slots = Pyramid().allocate([], 300, [9999] * 32, 5).slots
    assert slots == sorted(slots, reverse=True)


# --- squeeze ---


@settings(quick, max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=7) | st.lists(st.floats(0, 1), min_size=3, max_size=5))
def test_three_means_equal_brute_force_over_all_labelings(signals):
    values = [Fraction(signal) for signal in signals]
    if len(set(values)) < 3:
        return
    errors = {labels: error_of(values, labels) for labels in product(range(3), repeat=len(values))}
    least = min(errors.values())
    best = [labels for labels, error in errors.items() if error == least]
    groups = three_means(signals)
    assert errors[tuple(groups)] == least
    means = [[value for value, own in zip(values, groups, strict=True) if own == group] for group in range(3)]
    means = [sum(cluster) / len(cluster) for cluster in means]
    assert means == sorted(means)
    if len(best) == 6:  # one clustering and the permutations of its names
        assert tuple(groups) in best
    for (value, own), (other_value, other) in product(zip(values, groups, strict=True), repeat=2):
        assert own == other or value != other_value


def test_three_means_by_hand():
    assert three_means([0.9, 0.1, 0.5, 0.91, 0.12]) == [2, 0, 1, 2, 0]
    assert three_means([0, 1, 2, 3]) == [0, 1, 2, 2]  # equally good pairs of cuts: the lowest
    assert three_means([1e-300, 2e-300, 1, 3e-300, 0]) == [0, 1, 2, 1, 0]  # squares that a float cannot hold
    assert three_means([1 + 1e-15, 1, 1 + 2e-15, 1]) == [1, 0, 2, 0]
    assert three_means([0.5, 0.5, 0.5]) == [0, 0, 0]
    assert three_means([0.7, 0.5, 0.7]) == [1, 0, 1]
    assert three_means([0.7]) == [0]


def test_squeeze_by_the_formula():
    plan = Squeeze(p=0.5).allocate([0.1, 0.9, 0.5, 0.91, 0.11, 0.92, 0.12, 0.93], 320, [9999] * 8, 5)
    assert plan.groups == [0, 2, 1, 2, 0, 2, 0, 2]
    assert plan.slots == [480, 160, 480, 160, 480, 160, 480, 160]
    # Full layers take what the window layers cannot use; the squeezed one among them has its share of it.
    plan = Squeeze(p=0.5).allocate([0.1, 0.1, 0.5, 0.9], 300, [64, 64, 9999, 9999], 5)
    assert plan.slots == [64, 64, 640, 432]


@quick
@given(sizes(min_layers=3, equal_caps=True), st.data())
def test_squeeze_follows_its_groups(size, data):
    budget, caps, floor = size
    signals = data.draw(signals_of(len(caps)))
    plan = Squeeze(p=0.4).allocate(signals, budget, caps, floor)
    if len(set(signals)) < 3:
        assert plan.slots == Uniform().allocate(signals, budget, caps, floor).slots
        assert plan.groups == [sorted(set(signals)).index(signal) for signal in signals]
        return
    assert set(plan.groups) == {0, 1, 2}
    squeezed = [own for own, group in zip(plan.slots, plan.groups, strict=True) if group == 2]
    others = [own for own, group in zip(plan.slots, plan.groups, strict=True) if group < 2]
    granule = granule_size(budget, caps, floor)
    assert max(squeezed) - min(squeezed) <= granule and max(others) - min(others) <= granule
    assert max(squeezed) <= min(others)
    share = 0.4 * budget
    if floor <= share - granule and max(others) <= caps[0] - granule:
        assert all(abs(own - share) < granule for own in squeezed)


@quick
@given(sizes(min_layers=3, equal_caps=True), st.data())
def test_permuted_layers_permute_the_plan(size, data):
    """But for the granules left over, which go to the first layers of a group."""
    budget, caps, floor = size
    layers = len(caps)
    signals = data.draw(st.lists(st.floats(0, 1), min_size=layers, max_size=layers, unique=True))
    order = data.draw(st.permutations(range(layers)))
    plan = Squeeze().allocate(signals, budget, caps, floor)
    moved = Squeeze().allocate([signals[layer] for layer in order], budget, caps, floor)
    assert moved.groups == [plan.groups[layer] for layer in order]
    assert sorted(zip(moved.slots, (group == 2 for group in moved.groups), strict=True)) == sorted(
        zip(plan.slots, (group == 2 for group in plan.groups), strict=True)
    )
    granule = granule_size(budget, caps, floor)
    assert all(abs(own - plan.slots[layer]) <= granule for own, layer in zip(moved.slots, order, strict=True))


# --- mix ---


def test_mix_by_hand():
    """Squeeze says 480 and 160 here, uniform 320."""
    signals = [0.1, 0.9, 0.5, 0.91, 0.11, 0.92, 0.12, 0.93]
    plan = Mix(p=0.5, share=0.2).allocate(signals, 320, [9999] * 8, 5)
    assert plan.slots == [352, 288] * 4
    assert Mix(p=0.5, share=0.6).allocate(signals, 320, [9999] * 8, 5).slots == [416, 224] * 4


@quick
@given(st.data(), st.floats(0.05, 1), st.floats(0, 1) | st.sampled_from([0, 1]))
def test_mix_blends_uniform_and_squeeze(data, p, share):
    signals = data.draw(signals_of(data.draw(st.integers(3, 12))))
    budget, caps = 1000, [99999] * len(signals)
    squeeze, mix = (policy.allocate(signals, budget, caps, 1) for policy in (Squeeze(p), Mix(p, share)))
    assert mix.groups is None  # they are squeeze's, in everything that reports them
    for own, squeezed in zip(mix.slots, squeeze.slots, strict=True):
        assert abs(own - ((1 - share) * budget + share * squeezed)) < 2 * 16  # a granule each


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.2"])
def test_share_outside_its_range(share):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], not "):
        Mix(share=share)


# --- upper bounds ---


def completions(data, policy, size, seen):
    """Ways the remaining evidence can come out, most of them meant to break a bound."""
    budget, caps, floor = size
    missing = len(caps) - len(seen)
    if isinstance(policy, Perturbation):
        counts = [len(sizes_of(budget, cap, floor)) for cap in caps[len(seen) :]]
        yield data.draw(evidence_of(policy, size))[len(seen) :]
        yield [[0.0] * count for count in counts]
        yield [[1e9 * (count - n) for n in range(count)] for count in counts]
        yield [[1e9, *[0.0] * (count - 1)] for count in counts]
        yield [[1e9] * (count - 1) + [0.0] for count in counts]
        return
    low, high = min(seen, default=0), max(seen, default=0)
    yield data.draw(signals_of(missing))
    yield data.draw(st.lists(st.sampled_from(seen or [0.5]), min_size=missing, max_size=missing))
    for level in {low - 1, high + 1, 1000, -1000, *seen}:
        yield [level] * missing
        yield [level + 1e-6 * layer for layer in range(missing)]
        for split in range(1, missing):
            yield [level] * split + [1000] * (missing - split)


@settings(quick, max_examples=200)
@given(sizes(min_layers=2, max_layers=9), st.data(), st.sampled_from([*POLICIES, Squeeze(0.3), Squeeze(0.6)]))
def test_no_completion_exceeds_the_upper_bound(size, data, policy):
    budget, caps, floor = size
    layers = len(caps)
    seen = data.draw(evidence_of(policy, size, data.draw(st.integers(0, layers) | st.integers(layers // 2, layers))))
    bounds = policy.upper_bound(seen, layers, budget, caps, floor)
    assert len(bounds) == len(seen)
    for rest in completions(data, policy, size, seen):
        slots = policy.allocate(seen + rest, budget, caps, floor).slots
        assert all(own <= bound <= cap for own, bound, cap in zip(slots, bounds, caps, strict=False))
        if len(seen) == layers or not policy.reads_prompt:
            assert bounds == slots[: len(seen)]


@quick
@given(sizes(min_layers=2, max_layers=9), st.data(), st.sampled_from(POLICIES))
def test_upper_bounds_never_grow(size, data, policy):
    budget, caps, floor = size
    signals = data.draw(evidence_of(policy, size))
    bounds = list(caps)
    for seen in range(1, len(caps) + 1):
        tighter = policy.upper_bound(signals[:seen], len(caps), budget, caps, floor)
        assert all(new <= old for new, old in zip(tighter, bounds[: seen - 1] + [caps[seen - 1]], strict=True))
        bounds = tighter
    assert bounds == policy.allocate(signals, budget, caps, floor).slots


@quick
@given(sizes(min_layers=2, max_layers=9), st.data(), st.sampled_from(POLICIES))
def test_no_more_slots_wait_than_it_says(size, data, policy):
    budget, caps, floor = size
    signals = data.draw(evidence_of(policy, size))
    most = policy.most_waiting(budget, caps, floor)
    assert most <= sum(caps)
    for seen in range(1, len(caps)):
        assert sum(policy.upper_bound(signals[:seen], len(caps), budget, caps, floor)) <= most


@quick
@given(sizes(min_layers=4, max_layers=40), st.floats(0.2, 1), st.data())
def test_upper_bound_of_squeeze_is_reached(size, p, data):
    """j low signals in two clusters, all others squeezed: the highest of them end less than two granules below."""
    budget, caps, _ = size
    low = data.draw(st.integers(2, len(caps) - 1))
    signals = [0.1] + [0.2] * (low - 1) + [0.21] * (len(caps) - low)
    bounds = Squeeze(p).upper_bound(signals[: data.draw(st.integers(low, len(caps)))], len(caps), budget, caps, 1)
    slots = Squeeze(p).allocate(signals, budget, caps, 1).slots
    granule = granule_size(budget, caps, 1)
    assert all(own <= bound < own + 2 * granule for own, bound in zip(slots[1:low], bounds[1:low], strict=True))
    assert all(own <= bound for own, bound in zip(slots, bounds, strict=False))


def test_upper_bounds_of_squeeze_by_hand():
    """p * b + L * b * (1 - p) / j = 80 + 960 / j slots and a granule of 16; ties count as lower."""
    bounds = Squeeze(p=0.25).upper_bound
    assert bounds([0.5, 0.1, 0.3], 4, 320, [9999] * 4, 5) == [416, 1056, 576]
    assert bounds([0.5, 0.1, 0.5], 4, 320, [9999] * 4, 5) == [416, 1056, 416]
    assert bounds([0.5, 0.1, 0.3], 4, 320, [500] * 4, 5) == [416, 500, 500]
    # A floor of 160 for the two layers above costs 160 slots; a cap of 100 strands 460 of 560, a third of it for each.
    assert bounds([0.1, 0.3], 4, 320, [9999] * 4, 160) == [816, 496]
    assert bounds([0.1, 0.3], 4, 320, [100, 9999, 9999, 9999], 5) == [100, 720]


def test_upper_bounds_of_squeeze_bound_the_peak():
    """Equal caps, worst order: all layers together hold at most L * b * (p + (1 - p) * (1 + 1/2 + ... + 1/L)) slots."""
    layers, budget, p = 32, 1600, 0.35
    signals = [layer / 100 for layer in range(layers)]
    harmonic = sum(1 / rank for rank in range(1, layers + 1))
    for seen in range(layers):
        bounds = Squeeze(p).upper_bound(signals[:seen], layers, budget, [64000] * layers, 5)
        assert sum(bounds) <= layers * (budget * (p + (1 - p) * harmonic) + 16)
        assert bounds == sorted(bounds, reverse=True)
    assert Squeeze(p).most_waiting(budget, [64000] * layers, 5) == sum(bounds)


# --- errors ---


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_budget_below_the_floor(policy):
    signals = [0.1, 0.5, 0.9, 0.3]
    if isinstance(policy, Perturbation):
        signals = [[signal, 0.0] * 10 for signal in signals]  # of which the last ones count
    with pytest.raises(ValueError, match="budget of 11 slots.* the 12 .*raise --budget to at least 12"):
        policy.allocate(signals, 11, [99] * 4, 12)
    with pytest.raises(ValueError, match="budget of 11 slots"):
        policy.upper_bound(signals[:2], 4, 11, [99] * 4, 12)
    assert policy.allocate(signals, 12, [99] * 4, 12).slots == [12] * 4
    # Layers with smaller caps need less, and what they leave serves the others.
    assert policy.allocate(signals, 11, [8, 12, 12, 12], 12).slots == [8, 12, 12, 12]
    with pytest.raises(ValueError, match="at least 11"):
        policy.allocate(signals, 10, [8, 12, 12, 12], 12)


@pytest.mark.parametrize("p", [0, -0.1, 1.1, float("nan"), float("inf"), True, "0.4", None])
def test_p_outside_its_range(p):
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], not "):
        Squeeze(p=p)


@pytest.mark.parametrize("beta", [0, 0.9, float("nan"), float("inf"), True, "20"])
def test_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match="beta must be a number of at least 1, not "):
        Pyramid(beta=beta)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_signals_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=f"layer 1 is {bad}"):
        Squeeze().allocate([0.1, bad, 0.2], 50, [99] * 3, 5)
    with pytest.raises(ValueError, match=f"layer 1 is {bad}"):
        Squeeze().upper_bound([0.1, bad], 3, 50, [99] * 3, 5)


def test_registry():
    assert list(LAYER_POLICIES) == ["uniform", "perturbation", "squeeze", "mix", "pyramid"]
    assert all(make(name).name == name for name in LAYER_POLICIES)
    assert make("squeeze", p=0.5) == Squeeze(0.5) != make("squeeze")
    with pytest.raises(ValueError, match="'squeez'; known: uniform, perturbation, squeeze, mix, pyramid"):
        make("squeez")
    with pytest.raises(ValueError, match="'uniform' has no option 'p'; it has: none"):
        make("uniform", p=0.3)
    with pytest.raises(ValueError, match="'squeeze' has no option 'beta'; it has: p"):
        make("squeeze", beta=3)
