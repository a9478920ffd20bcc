"""Every family and form against transformers: logits, greedy tokens, importance. See families.py for the cases."""

import functools

import families
import pytest
import torch
from families import CASES, FAMILIES, LENGTH, NEW, PROMPT, Case
from naive import NaiveCache
from test_engine import teacher_forced
from torch import Tensor

import checkpoint
from engine import Engine, Request
from policies.tokens import TOKEN_POLICIES

TOLERANCE = 1e-4  # of the largest logit, in fp32
LENGTHS = [PROMPT, PROMPT - 7]  # prompts of the two rows of a padded batch
BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
IDS = families.token_ids(2, LENGTH)

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_family = pytest.mark.parametrize("case", FAMILIES, ids=str)


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return functools.cache(lambda case: families.make_checkpoint(case, tmp_path_factory.mktemp(case.name)))


@pytest.fixture(scope="session")
def theirs(folder):
    """case -> transformers' model"""
    return functools.cache(lambda case: families.load_reference(folder(case)))


@pytest.fixture(scope="session")
def ours(folder):
    """case -> our model"""
    return functools.cache(lambda case: checkpoint.load(folder(case))[0])


@pytest.fixture(scope="session")
def our_logits(ours):
    """case -> our logits of IDS"""
    return functools.cache(lambda case: ours(case)(IDS))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a share of the largest value of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()


def full_engine(model) -> Engine:
    """An engine that keeps all of a request; beyond the model's positions only a bounded policy may run on."""
    if model.config.max_positions < LENGTH:
        return Engine(model, policy="window", plan=[LENGTH] * model.config.n_layers)
    return Engine(model)


@each_case
def test_prefill_logits(case: Case, theirs, our_logits):
    assert difference(our_logits(case), theirs(case)(IDS).logits) < TOLERANCE


@each_case
def test_decode_logits(case: Case, theirs, ours):
    """Teacher-forced, in a right-padded batch."""
    expected = theirs(case)(IDS).logits
    requests = [Request(IDS[row, :n].tolist(), NEW) for row, n in enumerate(LENGTHS)]
    decoder, _ = full_engine(ours(case))._start(requests)
    for step in range(NEW):
        here = torch.tensor(LENGTHS) + step
        decoder.tokens.copy_(IDS[range(2), here])
        assert difference(decoder.logits(), expected[range(2), here]) < TOLERANCE, f"step {step}"


@each_case
def test_greedy_tokens(case: Case, folder):
    """In fp64, where no two logits are nearly the same."""
    reference = families.load_reference(folder(case), torch.float64)
    engine = full_engine(checkpoint.load(folder(case), dtype="float64")[0])
    tokens = list(engine.stream(IDS[0, :PROMPT].tolist(), max_new_tokens=NEW))
    # transformers may turn to other frequencies on the way, ours are fixed by the length
    if "dynamic" in case.name or "long" in case.name:
        expected = IDS[:1].clone()
        for position in range(PROMPT, LENGTH):
            expected[0, position] = reference(expected).logits[0, position - 1].argmax()
    else:
        expected = reference.generate(IDS[:1, :PROMPT], max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert tokens == expected[0, PROMPT:].tolist()
    assert len(set(tokens)) > 3


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in families.tensor_names(case)],
)
def test_every_tensor_matters(case: Case, name: str, theirs, our_logits):
    """Without it in transformers' model the logits differ: the comparison would notice if we left it out."""
    tensor = theirs(case).get_parameter(name)
    kept = tensor.clone()
    try:
        tensor.zero_()
        assert difference(our_logits(case), theirs(case)(IDS).logits) > 10 * TOLERANCE
    finally:
        tensor.copy_(kept)


@each_case
def test_rotary_matters(case: Case, theirs, our_logits, monkeypatch):
    """Without rotary embedding, and where there is rope scaling without that, the logits differ."""
    model = theirs(case)
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        pytest.skip("learned positions: a tensor like others")
    others = []
    if isinstance(rotary.rope_type, str):
        plain, _ = rotary.compute_default_rope_parameters(model.config)
        others = [plain] if rotary.rope_type != "default" else []
        monkeypatch.setattr(rotary, "rope_type", "default")
    for name in [name for name in rotary._buffers if name.endswith("inv_freq") and "original" not in name]:
        for frequencies in [torch.zeros_like(rotary._buffers[name]), *others]:
            with monkeypatch.context() as patch:
                patch.setitem(rotary._buffers, name, frequencies)
                assert difference(our_logits(case), model(IDS).logits) > 10 * TOLERANCE


@each_case
@pytest.mark.parametrize("lengths", [[PROMPT], LENGTHS], ids=["single", "padded"])
def test_importance(case: Case, lengths: list[int], theirs, ours):
    """The signals are those of hooks on transformers' residual stream."""
    rows = len(lengths)
    real = torch.arange(PROMPT) < torch.tensor(lengths)[:, None]
    ids = IDS[:rows, :PROMPT] * real
    engine = full_engine(ours(case))
    with families.ResidualStream(theirs(case), case.branch) as stream:
        theirs(case)(ids, attention_mask=real.long())
    rotary = ours(case).rotary(PROMPT)  # of the length that transformers saw
    _, prefilled = engine._prefill(ids, torch.tensor(lengths), rotary, engine._policies(PROMPT))
    signals = torch.stack([layer.signal for layer in prefilled])
    torch.testing.assert_close(signals, stream.importance(lengths), atol=1e-5, rtol=0)
    assert signals.max() < 0.99  # attention does change the residual stream


@each_family
def test_importance_of_a_batch(case: Case, theirs, ours):
    """The figures hold the mean over rows."""
    requests = [Request(IDS[row, :n].tolist(), NEW) for row, n in enumerate(LENGTHS)]
    completion = next(Engine(ours(case)).generate(requests))
    with families.ResidualStream(theirs(case), case.branch) as stream:
        theirs(case)(IDS[:, :PROMPT])
    expected = stream.importance(LENGTHS).mean(1)
    torch.testing.assert_close(torch.tensor(completion.figures.importance), expected, atol=1e-5, rtol=0)


@each_family
def test_bf16_error(case: Case, folder, theirs):
    """In bf16 we stay as close to fp32 as transformers does."""
    ids = IDS[:, :PROMPT]
    exact = theirs(case)(ids).logits
    reference = families.load_reference(folder(case), torch.bfloat16)
    model, _ = checkpoint.load(folder(case), dtype="bf16")
    error, accepted = (
        (logits.float() - exact).square().mean().sqrt() for logits in (model(ids), reference(ids).logits)
    )
    assert 0 < error <= 1.5 * accepted


@each_family
@pytest.mark.parametrize("policy", BOUNDED)
def test_few_slots_equal_naive_eviction(case: Case, policy: str, folder):
    """Under the family's own windows, scales and positions; prompt and cache longer than some windows."""
    model = checkpoint.load(folder(case), dtype="float64")[0]
    ids = IDS[0, : PROMPT + 20].tolist()
    plan = [8, 13, 9, 30][: model.config.n_layers]
    got = teacher_forced(Engine(model, policy, plan=plan), ids[:PROMPT], ids[PROMPT:])
    naive = NaiveCache(model, policy, plan, length=len(ids) + 1)
    want = torch.stack([naive.prompt(ids[:PROMPT]), *(naive.feed(token) for token in ids[PROMPT:])])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@each_family
@pytest.mark.parametrize("policy", BOUNDED)
def test_enough_slots_equal_full(case: Case, policy: str, ours):
    ids = IDS[0].tolist()
    want = teacher_forced(Engine(ours(case)), ids[:PROMPT], ids[PROMPT:])
    got = teacher_forced(Engine(ours(case), policy, "squeeze", budget=1), ids[:PROMPT], ids[PROMPT:])
    assert difference(got, want) < TOLERANCE


def test_two_engines(ours):
    """Two models in one process, decoding by turns, do not disturb each other."""
    engines = [Engine(ours(families.BY_NAME[name])) for name in ("llama-llama3", "qwen3")]
    prompt = IDS[0, :PROMPT].tolist()
    alone = [list(engine.stream(prompt, max_new_tokens=20)) for engine in engines]
    together = zip(*(engine.stream(prompt, max_new_tokens=20) for engine in engines), strict=True)
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert alone[0] != alone[1]
