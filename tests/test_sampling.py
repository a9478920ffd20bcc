import pytest
import torch
from conftest import quick
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from errors import UserError
from sampling import GREEDY, NOT_FINITE, Sampler, Sampling, exponential_of, pick, restrict

VOCABS = [128_256, 262_144]
# With these seeds one of the first numbers drawn, of 24 bits, would be all ones, at a place below 128,256 and 262,144.
SEEDS = [26, 254, 391, 486, 537, 693], [204, 285, 394, 472, 806, 836]
SETTINGS = [
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=40, top_p=0.9),
    dict(top_p=0.9, temperature=0.7),
    dict(top_p=0.3, temperature=1.5),
    dict(top_p=1e-300, temperature=2.0),
    dict(top_k=2**63, top_p=0.5),
    dict(temperature=0.01),  # where most probabilities are 0 in fp32
    dict(temperature=1e-45),
]


@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_restriction_equals_transformers(top_k, top_p):
    logits = torch.randn(3, 50, dtype=torch.float64) * 3
    want = logits
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = restrict(logits, torch.full((3, 1), top_k or 2**31), torch.full((3, 1), top_p))
    assert torch.equal(got, want)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])
    sampler = Sampler([Sampling(temperature=0.7, top_k=4, seed=3)], "cpu")
    counts = torch.bincount(torch.cat([sampler(logits) for _ in range(8_000)]), minlength=5) / 8_000
    want = TopKLogitsWarper(4)(None, TemperatureLogitsWarper(0.7)(None, logits)).softmax(-1)[0]
    assert (counts - want).abs().max() < 0.02 and counts[4] == 0


def test_rows_keep_to_their_own_settings():
    logits = torch.randn(1, 40).expand(3, 40)
    rows = [GREEDY, Sampling(temperature=5.0, seed=1), Sampling(temperature=5.0, top_k=1, seed=2)]
    sampler = Sampler(rows, "cpu")
    drawn = torch.stack([sampler(logits) for _ in range(30)])
    best = logits[0].argmax()
    assert (drawn[:, 0] == best).all() and (drawn[:, 2] == best).all() and len(drawn[:, 1].unique()) > 5


def test_equal_seeds_give_equal_draws():
    logits = torch.randn(2, 40)
    draws = [Sampler([Sampling(1.0, seed=5), Sampling(1.0, seed=6)], "cpu")(logits).tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    alone = Sampler([Sampling(1.0, seed=6)], "cpu")(logits[1:]).tolist()
    assert alone == draws[0][1:]


def logits_of(vocab: int, spread: float = 4.0) -> torch.Tensor:
    """[1, vocab]; the likely tokens stand anywhere."""
    return torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * spread


def allowed(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Which tokens [vocab] may be drawn: in fp64, less those whose probability is 0 in fp32."""
    scaled = (logits.double() - logits.max()) / sampling.temperature
    kept = TopKLogitsWarper(sampling.top_k)(None, scaled) if sampling.top_k else scaled
    if sampling.top_p < 1:  # rounding may move the end of the nucleus
        kept = TopPLogitsWarper(min(sampling.top_p + 1e-4, 1 - 1e-9))(None, kept)
    return ((kept > float("-inf")) & (kept - kept.logsumexp(-1, keepdim=True) > -104))[0]


def misses(vocab: int, settings: dict, seeds: list[int], calls: int = 1) -> int:
    """Draws of the whole sampler that lie outside."""
    samplings = [Sampling(**{"temperature": 1.0, **settings, "seed": seed}) for seed in seeds]
    logits, sampler = logits_of(vocab), Sampler(samplings)
    tokens = torch.cat([sampler(logits.expand(len(seeds), -1)) for _ in range(calls)])
    return int((~allowed(logits, samplings[0])[tokens]).sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_excluded_token_is_drawn(settings):
    assert misses(VOCABS[0], settings, SEEDS[0]) == 0
    assert misses(VOCABS[1], settings, SEEDS[1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_no_excluded_token_is_drawn_by_many_calls(vocab, settings):
    assert misses(vocab, settings, list(range(20)), calls=10) == 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_no_excluded_token_in_millions_of_draws(vocab, settings):
    """In all 20 million, each among 64 columns at their own places in the vocabulary: of what is kept the likeliest and
    the least likely ones, and else excluded ones. Probabilities and draws are the sampler's own.
    """
    sampling = Sampling(**{"temperature": 1.0, **settings, "seed": 0})
    logits = logits_of(vocab)
    probs, inside = Sampler([sampling]).probabilities(logits)[0], allowed(logits, sampling)
    order = probs.argsort(descending=True, stable=True)
    kept = order[: int((probs > 0).sum())]
    columns = torch.cat((kept[:24], kept[24:][-8:], order[len(kept) :][:: max(1, vocab // 31)]))[:64].sort().values
    rows, count, wrong = 5_000, 0, 0
    for start in range(0, 20_000_000 // (len(VOCABS) * len(SETTINGS)), rows):
        seed = torch.arange(start, start + rows)[:, None]
        tokens = columns[pick(probs[columns].expand(rows, -1), columns, seed, torch.zeros_like(seed))]
        wrong += int((~inside[tokens]).sum())
        count += rows
    assert wrong == 0 and count > 1_100_000


@pytest.mark.parametrize("vocab", VOCABS)
def test_other_columns_do_not_matter(vocab):
    """What the test above rests on: over the whole vocabulary the sampler draws what `pick` does among these."""
    logits, seeds = logits_of(vocab), torch.arange(12)[:, None]
    sampler = Sampler([Sampling(1.0, top_k=30, seed=int(seed)) for seed in seeds])
    probs = sampler.probabilities(logits.expand(12, -1))
    columns = probs[0].nonzero()[:, 0]
    assert len(columns) == 30
    want = columns[pick(probs[:, columns], columns, seeds, torch.zeros_like(seeds))]
    assert torch.equal(sampler(logits.expand(12, -1)), want) and len(want.unique()) > 3


def chi_square(probs: torch.Tensor, exact: torch.Tensor, columns: torch.Tensor, draws: int, rows: int = 500) -> float:
    """By how many standard deviations too much the counts of draws from probs [n] differ from the exact ones."""
    counts = torch.zeros(len(probs))
    for start in range(0, draws, rows):
        seed = torch.arange(start, start + rows)[:, None]
        counts += torch.bincount(pick(probs.expand(rows, -1), columns, seed, seed % 7), minlength=len(probs))
    want = exact * draws
    return float((((counts - want) ** 2 / want).sum() - (len(probs) - 1)) / (2 * (len(probs) - 1)) ** 0.5)


@pytest.mark.parametrize("draws", quick(100_000, of=[100_000, 4_000_000]))
def test_draws_follow_exact_probabilities(draws):
    """1,000 likely tokens of 262,144."""
    logits = torch.full((1, VOCABS[1]), -200.0)
    columns = torch.randperm(VOCABS[1])[:1000].sort().values
    logits[0, columns] = torch.randn(1000)
    probs = Sampler([Sampling(1.0, top_k=1000, seed=0)]).probabilities(logits)[0, columns]
    exact = logits[0, columns].double().softmax(-1)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-5, atol=0)
    assert abs(chi_square(probs, exact, columns, draws)) < 4
    assert chi_square((0.9 * exact + 1e-4).float(), exact, columns, 100_000) > 10, "it must notice"


def every_exponent() -> list[torch.Tensor]:
    """63-bit numbers: those whose 24 leading bits are all different, by where the first of them is."""
    lead = torch.arange(2**23, 2**24)
    return [torch.arange(2**24), *(lead << shift for shift in range(1, 40))]


@pytest.mark.slow
def test_every_exponential_is_positive_and_finite():
    """All values that it can take: so no draw whatsoever gives an excluded token."""
    last = 0.0
    for numbers in every_exponent():
        for bits in numbers.split(2**22):
            e = exponential_of(bits)
            assert e[0] >= last > -1 and (e.diff() >= 0).all() and e[0] > 0 and e[-1] < 17
            last = float(e[-1])


def test_exponentials_at_their_ends():
    bits = [0, 1, 2**39 - 1, 2**62, 2**63 - 1, 2**63 - 2**38, -1, -(2**63), -(2**40)]
    e = exponential_of(torch.tensor(bits))
    assert (e > 0).all() and (e < 17).all()


@pytest.mark.parametrize("settings", [*SETTINGS, dict(top_p=1 - 1e-12), dict(temperature=1e30)], ids=str)
def test_equal_seeds_whatever_the_batch(settings):
    """Alone, or in any row beside neighbours of every kind, which may restrict, be greedy, or have broken logits."""
    own, vocab = Sampling(**{"temperature": 1.0, **settings, "seed": 11}), 1_000
    logits = logits_of(vocab, 1.0)
    alone = Sampler([own])
    want = torch.cat([alone(logits) for _ in range(6)])
    others = [GREEDY, Sampling(2.0, top_k=3, top_p=0.5, seed=1), Sampling(0.5, seed=2)]
    for row in range(4):
        sampler = Sampler([*others[:row], own, *others[row:]])
        beside = logits_of(vocab, 9.0).repeat(4, 1)
        beside[row - 1, 5] = float("nan")
        beside[row] = logits[0]
        assert torch.equal(torch.stack([sampler(beside)[row] for _ in range(6)]), want)


@pytest.mark.parametrize("top_p", [1.0, 1 - 1e-12])
def test_a_sum_that_rounds_up_to_1_excludes_nothing(top_p):
    """Beside a row that is restricted; the likely tokens' probabilities add up to 1 in fp32 before the others come."""
    logits = torch.zeros(2, VOCABS[0])
    logits[:, 100:] = -18.0
    rows = [Sampling(1.0, top_p=top_p, seed=1), Sampling(1.0, top_k=7, seed=1)]
    assert (Sampler(rows).probabilities(logits) > 0).sum(-1).tolist() == [VOCABS[0], 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_limits(dtype, size):
    """Where a setting goes to its end it is greedy, or everything; and so it stays over many draws."""
    logits = (torch.randn(1, 64) * size).to(dtype)
    logits[0, 0] = logits.min()  # what a NaN would give

    def drawn(**settings) -> list[int]:
        sampler = Sampler([Sampling(**{"temperature": 1.0, **settings, "seed": 4})])
        return torch.cat([sampler(logits) for _ in range(60)]).tolist()

    best = [int(logits.argmax())] * 60
    for greedy in (dict(temperature=1e-45), dict(temperature=5e-324), dict(top_p=1e-300), dict(top_k=1)):
        assert drawn(**greedy) == best
    for hot in (1e30, 1e300):
        assert len(set(drawn(temperature=hot))) > 30
        assert set(drawn(temperature=hot, top_k=3)) == set(logits[0].float().topk(3).indices.tolist())
    for everything in (2**31, 2**63 - 1, 2**63, 2**64, 10**30):
        assert drawn(top_k=everything) == drawn(top_p=1 - 1e-12) == drawn()
    logits[0, [7, 9]] = logits.max() * 1.5
    assert set(drawn(temperature=1e-45)) == {7, 9}


def test_logits_that_are_not_finite_give_no_token():
    nan, inf = float("nan"), float("inf")
    rows = torch.randn(6, 10)
    rows[0, 3], rows[1, 0], rows[2, 9], rows[3] = nan, inf, -inf, -inf
    rows[4, 2], rows[4, 5] = nan, inf
    finite = [False, False, True, False, False, True]
    for sampling in (GREEDY, Sampling(1.0, seed=1), Sampling(1.0, top_k=3, top_p=0.9, seed=1)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            tokens = Sampler([sampling] * 6)(rows.to(dtype)).tolist()
            assert [token != NOT_FINITE for token in tokens] == finite
            assert all(0 <= token < 10 for token, good in zip(tokens, finite, strict=True) if good) and tokens[2] != 9


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "seed"])
@pytest.mark.parametrize(
    "value", ["1", b"1", True, float("nan"), float("inf"), -1, 1j, [1], torch.tensor(1), 1 << 5000]
)
def test_types(name, value):
    """One line for each, but for a top-k that is larger than any vocabulary."""
    if name == "top_k" and type(value) is int and value > 0:
        return
    with pytest.raises(UserError, match=f"^{name.replace('_', '-')} must be [^\\n]{{,160}}$"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature .* not -0.1"),
        ({"temperature": float("nan")}, "temperature .* not nan"),
        ({"temperature": float("inf")}, "temperature .* not inf"),
        ({"top_k": 0}, "top-k .* not 0"),
        ({"top_p": 0.0}, r"top-p .* not 0.0"),
        ({"top_p": 1.1}, "top-p .* not 1.1"),
        ({"seed": -1}, "seed .* not -1"),
    ],
)
def test_values_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)
