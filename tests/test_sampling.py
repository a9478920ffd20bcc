import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sampling import GREEDY, Sampler, Sampling, restrict


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
