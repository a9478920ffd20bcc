"""Every family and form against transformers: logits, greedy tokens, importance. See families.py for the cases."""

import functools
import re

import families
import pytest
import torch
from conftest import after_prompts, appended, begun, quick
from families import BY_NAME, CASES, FAMILIES, LENGTH, LONGROPE, NEAR, NEW, PROMPT, YARN, Case
from naive import NaiveCache
from test_engine import teacher_forced
from torch import Tensor

import checkpoint
from config import ModelConfig
from config import parameters as counted
from engine import Engine, Request
from formats import FORMATS
from model import Transformer
from policies.layers import LAYER_POLICIES
from policies.tokens import TOKEN_POLICIES

TOLERANCE = 1e-4  # of the largest logit, in fp32
LENGTHS = [PROMPT, PROMPT - 7]  # prompts of the two rows of a padded batch
BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
TELLING = ("mistral", "gemma2", "phi3-short", "opt")  # for new policies: windows, soft caps, scaled and unrotated keys
IDS = families.token_ids(2, LENGTH)

each_case = pytest.mark.parametrize("case", quick(*(c for c in CASES if c.name not in NEAR), of=CASES), ids=str)
each_family = pytest.mark.parametrize("case", quick(*(c for c in FAMILIES if c.name not in NEAR), of=FAMILIES), ids=str)


def each_policy(cases: list[Case]):
    """Every bounded policy with every case; most pairs of a later policy and a case without its own rules are slow."""
    pairs = [
        pytest.param(
            policy,
            case,
            id=f"{policy}-{case}",
            marks=()
            if (policy in ("streaming", "h2o") and case.name not in NEAR) or case.name in TELLING
            else pytest.mark.slow,
        )
        for policy in BOUNDED
        for case in cases
    ]
    return pytest.mark.parametrize(("policy", "case"), pairs)


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_logits(case: Case, theirs, our_logits):
    assert difference(our_logits(case), theirs(case)(IDS).logits) < TOLERANCE


def logits_of_rows(model) -> list[torch.Tensor]:
    """Each row alone and as long as its request: some frequencies depend on that."""
    expected = []
    for row, n in enumerate(LENGTHS):
        model(IDS[:1, :1])  # else transformers keeps those of the longest sequence that it has seen
        expected.append(model(IDS[row : row + 1, : n + NEW]).logits[0])
    return expected


@each_case
def test_decode_logits(case: Case, theirs, ours):
    """Teacher-forced, in a right-padded batch."""
    expected = logits_of_rows(theirs(case))
    requests = [Request(IDS[row, :n].tolist(), NEW) for row, n in enumerate(LENGTHS)]
    decoder = begun(full_engine(ours(case)), requests).decoder
    for step in range(NEW):
        here = [n + step for n in LENGTHS]
        decoder.tokens.copy_(IDS[range(2), here])
        wanted = torch.stack([logits[n] for logits, n in zip(expected, here, strict=True)])
        assert difference(decoder.logits(), wanted) < TOLERANCE, f"step {step}"


@each_case
def test_logits_of_a_later_turn(case: Case, theirs, ours):
    """Several tokens at once behind a right-padded batch."""
    expected = torch.stack([logits[-NEW:-1] for logits in logits_of_rows(theirs(case))])
    requests = [Request(IDS[row, :n].tolist(), NEW) for row, n in enumerate(LENGTHS)]
    decoder = begun(full_engine(ours(case)), requests).decoder
    here = torch.stack([torch.arange(n, n + NEW - 1) for n in LENGTHS])
    logits = ours(case).logits(appended(decoder, IDS.gather(1, here)))
    assert difference(logits, expected) < TOLERANCE


@pytest.mark.parametrize("case", quick(*(c for c in FAMILIES if c.name not in NEAR), of=CASES), ids=str)
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
    [
        pytest.param(
            case,
            name,
            id=f"{case}-{name}",
            marks=() if case in FAMILIES and case.name not in NEAR else pytest.mark.slow,
        )
        for case in CASES
        for name in families.tensor_names(case)
    ],
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


TURNED = [case for case in CASES if case.name not in ("opt", "opt-no-bias", "granitemoehybrid-nope")]


# Learned positions are a tensor like others.
@pytest.mark.parametrize("case", TURNED, ids=str)
def test_rotary_matters(case: Case, theirs, our_logits, monkeypatch):
    """Without rotary embedding, and where there is rope scaling without that, the logits differ."""
    model = theirs(case)
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    others = []
    if isinstance(rotary.rope_type, str):
        plain, _ = rotary.compute_default_rope_parameters(rotary.config)
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
    with families.ResidualStream(theirs(case), case.branch) as stream:
        theirs(case)(ids, attention_mask=real.long())
    # Rotary frequencies are those of the length that transformers saw.
    requests = [Request(IDS[row, :n].tolist(), PROMPT - n) for row, n in enumerate(lengths)]
    _, signals = after_prompts(ours(case), requests, full_engine(ours(case)).sizing.policies(PROMPT))
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
def test_bf16_error(case: Case, tmp_path):
    """In bf16 we stay as close to fp32 as transformers does. Of mixtures over several models: where two experts are
    nearly as good, either may take the other one, which is much of a single model's error.
    """
    ids, squares = IDS[:, :PROMPT], torch.zeros(2)
    for seed in range(4 if "num_experts_per_tok" in case.config else 1):
        folder = families.make_checkpoint(case, tmp_path / str(seed), seed=seed)
        exact = families.load_reference(folder)(ids).logits
        models = checkpoint.load(folder, dtype="bf16")[0], families.load_reference(folder, torch.bfloat16)
        both = models[0](ids), models[1](ids).logits
        squares += torch.stack([(logits.float() - exact).square().mean() for logits in both])
    error, accepted = squares.sqrt().tolist()
    assert 0 < error <= 1.5 * accepted


@pytest.mark.parametrize("form", quick("dense", of=FORMATS))
@each_policy([*FAMILIES, BY_NAME["phi3-short"], BY_NAME["falcon-grouped"]])
def test_few_slots_equal_naive_eviction(case: Case, policy: str, form: str, folder):
    """Under the family's own windows, scales and positions; prompt and cache longer than some windows."""
    model = checkpoint.load(folder(case), dtype="float64")[0]
    ids = IDS[0, : PROMPT + 12].tolist()
    plan = [8, 13, 9, 30][: model.config.n_layers]
    got = teacher_forced(Engine(model, policy, plan=plan, cache_format=form), ids[:PROMPT], ids[PROMPT:])
    naive = NaiveCache(model, policy, plan, length=len(ids) + 1, int8=form == "int8")
    want = torch.stack([naive.prompt(ids[:PROMPT]), *(naive.feed(token) for token in ids[PROMPT:])])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@each_policy(FAMILIES)
def test_enough_slots_equal_full(case: Case, policy: str, ours):
    ids = IDS[0, : PROMPT + 16].tolist()
    want = teacher_forced(Engine(ours(case)), ids[:PROMPT], ids[PROMPT:])
    for layers in ("uniform", "squeeze") if policy == "h2o" else ("squeeze",):
        got = teacher_forced(Engine(ours(case), policy, layers, budget=1), ids[:PROMPT], ids[PROMPT:])
        assert difference(got, want) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYER_POLICIES)
@pytest.mark.parametrize("policy", BOUNDED)
@each_family
def test_every_pair_of_policies(case: Case, policy: str, layers: str, folder):
    """With enough slots it equals full, with few the naive cache under the plan that came out."""
    model = checkpoint.load(folder(case), dtype="float64")[0]
    ids = IDS[0, : PROMPT + 8].tolist()
    want = teacher_forced(Engine(model), ids[:PROMPT], ids[PROMPT:])
    got = teacher_forced(Engine(model, policy, layers, budget=1), ids[:PROMPT], ids[PROMPT:])
    torch.testing.assert_close(got, want)
    few = Engine(model, policy, layers, budget=9)
    stream = few.stream(ids[:PROMPT], max_new_tokens=9)
    list(stream)
    naive = NaiveCache(model, policy, stream.completion.figures.plan, length=len(ids) + 1)
    want = torch.stack([naive.prompt(ids[:PROMPT]), *(naive.feed(token) for token in ids[PROMPT:])])
    torch.testing.assert_close(teacher_forced(few, ids[:PROMPT], ids[PROMPT:]), want, rtol=0, atol=1e-10)


def test_two_engines(ours):
    """Two models in one process, decoding by turns, do not disturb each other."""
    engines = [Engine(ours(BY_NAME[name])) for name in ("llama-llama3", "qwen3")]
    prompt = IDS[0, :PROMPT].tolist()
    alone = [list(engine.stream(prompt, max_new_tokens=20)) for engine in engines]
    together = zip(*(engine.stream(prompt, max_new_tokens=20) for engine in engines), strict=True)
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert alone[0] != alone[1]


@each_family
def test_batch_equals_single(case: Case, folder):
    """Four rows under one plan: with experts, as many that each step runs all of them instead of the chosen ones."""
    model = checkpoint.load(folder(case), dtype="float64")[0]
    engine = Engine(model, "h2o", plan=[12] * model.config.n_layers)
    requests = [Request(families.token_ids(1, n, seed=n)[0].tolist(), 12) for n in (3, 30, 11, 21)]
    singles = [list(engine.stream(request.ids, max_new_tokens=12)) for request in requests]
    together = {id(completion.request): completion.tokens for completion in engine.generate(requests)}
    assert [together[id(request)] for request in requests] == singles


def test_windows_cap_plans_and_figures(ours):
    """Slots, and the bytes of the full cache for comparison, are those of the window; a short request has none."""
    model = ours(BY_NAME["qwen3-layer-types"])  # windows of 9 and none
    ids = IDS[0, :PROMPT].tolist()
    token_bytes = 2 * 2 * 10 * 4  # K and V, heads, head_dim, float32
    for policy, settings, new, plan, full in [
        ("full", {}, 6, [9, 30], 39),
        ("window", {"budget": 12}, 6, [9, 15], 39),
        ("h2o", {"plan": [40, 20]}, 6, [9, 20], 39),
        ("streaming", {"layers": "squeeze", "budget": 6}, 6, None, 39),
    ]:
        stream = Engine(model, policy, **settings).stream(ids, max_new_tokens=new)
        list(stream)
        figures = stream.completion.figures
        assert figures.kv_bytes_full == full * token_bytes
        assert plan is None or figures.plan == plan
        assert figures.plan[0] <= 9 and figures.kv_bytes == sum(figures.plan) * token_bytes
    short = Engine(model)
    assert short.sizing.policies(9) == [short.policy] * 2 and short.sizing.policies(10)[0] != short.policy


@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_learned_positions_are_a_limit(policy: str, ours):
    model = ours(BY_NAME["opt"])
    engine = Engine(model, policy)
    with pytest.raises(ValueError, match=r"^100 prompt \+ 29 new tokens exceed the model's 128 learned positions"):
        engine.stream([1] * 100, max_new_tokens=29)
    # A row that has ended runs on beside the other, past the last position.
    requests = [Request([1] * 126, 2), Request([1] * 5, 123)]
    assert [len(completion.tokens) for completion in engine.generate(requests)] == [2, 123]


def test_long_prompts_go_in_chunks(ours, theirs, monkeypatch):
    """Windows and soft caps, with chunks of queries shorter and longer than the window."""
    for chunk in (7, 33):
        monkeypatch.setattr("model.PROMPT_CHUNK", chunk)
        for name in ("mistral", "gemma2"):
            case = BY_NAME[name]
            assert difference(ours(case)(IDS), theirs(case)(IDS).logits) < TOLERANCE


REFUSED = [
    ("falcon", {"alibi": True}, "alibi True is not supported for falcon; only False is"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported for opt; only True is"),
    ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32 is not supported for opt; only 48 is"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
    ("qwen3_moe", {"num_experts_per_tok": 8}, "num_experts_per_tok must be at most the 7 experts, not 8"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers must be a list, each an integer from 0 to"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer from 1 to"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3_text", {"sliding_window": None}, "2 layers with sliding attention, but no sliding_window"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be an integer from 1 to 2147483647 or null, not 0"),
    ("qwen3-layer-types", {"layer_types": ["full_attention"]}, "layer_types must be a list of 2, not of 1"),
    ("qwen3-layer-types", {"layer_types": ["full_attention", "chunked"]}, "layer_types must be a list, each one of"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
    ("phi3-long", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor must be a list of 3, not of 1"),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "must be even, not 3 of 8"),
    (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"]},
        "1 of 2 layers mamba is not supported",
    ),
    ("granitemoehybrid", {"layer_types": None}, "2 of 2 layers mamba"),
    ("granitemoehybrid", {"layer_types": ["attention"]}, "layer_types must be a list of 2, not of 1"),
    ("granitemoehybrid", {"num_local_experts": 6}, "with 6 experts is not supported; only with 0"),
    ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "needs an original_max_position_embeddings"),
    ("gemma3_text", {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}, "truncate is not supported"),
    ("llama-gqa", {"rope_parameters": YARN | {"rope_theta": 1}}, "'yarn' needs a rope_theta other than 1"),
    ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer from 1 to 4096, not 0"),
    ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok must be at most the 5 experts, not 6"),
    ("llama-gqa", {"quantization_config": {"quant_method": "hqq"}}, "weights quantized by 'hqq' cannot be read"),
]


@pytest.mark.parametrize(
    ("name", "change", "words"), REFUSED, ids=[f"{name}-{words[:25]}" for name, _, words in REFUSED]
)
def test_unsupported_values(name: str, change: dict, words: str):
    config = BY_NAME[name].config
    ModelConfig.from_hf(config)
    with pytest.raises(ValueError, match=re.escape(words)):
        ModelConfig.from_hf(config | change)


PUBLISHED = {  # what the hub's config.json files say, less what has no meaning here -> some of what it must become
    "tiiuae/falcon-7b": (
        dict(model_type="falcon", alibi=False, bias=False, hidden_size=4544, layer_norm_epsilon=1e-5, multi_query=True)
        | dict(new_decoder_architecture=False, num_attention_heads=71, num_hidden_layers=32, parallel_attn=True)
        | dict(apply_residual_connection_post_layernorm=False, vocab_size=65024, torch_dtype="bfloat16"),
        dict(n_kv_heads=1, head_dim=64, ffn_dim=18176, parallel=True, shared_norm=True, tie_embeddings=True),
    ),
    "EleutherAI/pythia-70m": (
        dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=512, intermediate_size=2048, layer_norm_eps=1e-5)
        | dict(max_position_embeddings=2048, num_attention_heads=8, num_hidden_layers=6, rotary_emb_base=500)
        | dict(rotary_pct=0.5, use_parallel_residual=True, vocab_size=50304, tie_word_embeddings=False),
        dict(rotary_dim=32, parallel=True, qkv_bias=True, ffn_bias=True, norm_eps=1e-5, rope_theta=500),
    ),
    "microsoft/Phi-3-mini-128k-instruct": (
        dict(model_type="phi3", hidden_size=3072, intermediate_size=8192, max_position_embeddings=131072)
        | dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, sliding_window=262144)
        | dict(original_max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, vocab_size=32064)
        | dict(rope_scaling={"type": "su", "short_factor": [1.1] * 48, "long_factor": [2.0] * 48}),
        dict(
            rope_type="longrope",
            attention_factor=pytest.approx((1 + 5 / 12) ** 0.5),
            sliding_window=262144,
            rotary_dim=96,
        ),
    ),
    "facebook/opt-125m": (
        dict(model_type="opt", _remove_final_layer_norm=False, activation_function="relu", do_layer_norm_before=True)
        | dict(ffn_dim=3072, hidden_size=768, max_position_embeddings=2048, num_attention_heads=12)
        | dict(num_hidden_layers=12, vocab_size=50272, word_embed_proj_dim=768),
        dict(position_offset=2, qkv_bias=True, output_bias=True, ffn_dim=3072, activation="relu", tie_embeddings=True),
    ),
    "google/gemma-2-2b": (
        dict(model_type="gemma2", hidden_act="gelu", hidden_activation="gelu_pytorch_tanh", hidden_size=2304)
        | dict(head_dim=256, intermediate_size=9216, num_attention_heads=8, num_hidden_layers=4, sliding_window=4096)
        | dict(num_key_value_heads=4, query_pre_attn_scalar=256, vocab_size=256000, final_logit_softcapping=30.0),
        dict(windowed=(0, 2), attention_softcap=50.0, activation="gelu_pytorch_tanh", attention_scale=1 / 16),
    ),
    "google/gemma-3-1b-it": (
        dict(model_type="gemma3_text", attn_logit_softcapping=None, hidden_size=1152, head_dim=256, sliding_window=512)
        | dict(hidden_activation="gelu_pytorch_tanh", intermediate_size=6912, num_attention_heads=4, vocab_size=262144)
        | dict(num_hidden_layers=8, num_key_value_heads=1, rope_local_base_freq=10000, rope_theta=1000000)
        | dict(sliding_window_pattern=6, query_pre_attn_scalar=256, rope_scaling=None),
        dict(windowed=(0, 1, 2, 3, 4, 6, 7), rope_theta=1000000, logit_softcap=None, tie_embeddings=True),
    ),
}


LARGE = {  # what no small machine holds: published config.json, parameters, bytes of K and V a token in bf16
    "meta-llama/Llama-2-70b-hf": (
        dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=32000)
        | dict(num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=4096),
        68_976_648_192,
        2 * 80 * 8 * 128 * 2,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=32000)
        | dict(num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2)
        | dict(rope_theta=1e6, sliding_window=None, max_position_embeddings=32768, rms_norm_eps=1e-5),
        46_702_792_704,
        2 * 32 * 8 * 128 * 2,
    ),
    "Qwen/Qwen3-30B-A3B": (
        dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, vocab_size=151936)
        | dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8)
        | dict(moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)
        | dict(rope_theta=1e6, max_position_embeddings=40960, max_window_layers=48, sliding_window=None),
        30_532_122_624,
        2 * 48 * 4 * 128 * 2,
    ),
    "Qwen/Qwen3-235B-A22B": (
        dict(model_type="qwen3_moe", hidden_size=4096, intermediate_size=12288, num_hidden_layers=94)
        | dict(num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8)
        | dict(moe_intermediate_size=1536, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)
        | dict(rope_theta=1e6, max_position_embeddings=40960, max_window_layers=94, vocab_size=151936),
        235_093_634_560,
        2 * 94 * 4 * 128 * 2,
    ),
    "openai/gpt-oss-20b": (
        dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, vocab_size=201088)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32, sliding_window=128),
        20_914_757_184,
        2 * 24 * 8 * 64 * 2,
    ),
    "openai/gpt-oss-120b": (
        dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, vocab_size=201088)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=128, sliding_window=128),
        116_829_156_672,
        2 * 36 * 8 * 64 * 2,
    ),
    "allenai/OLMoE-1B-7B-0924": (
        dict(model_type="olmoe", hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, vocab_size=50304)
        | dict(num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, clip_qkv=None)
        | dict(norm_topk_prob=False, rope_theta=1e4, max_position_embeddings=4096, tie_word_embeddings=False),
        6_919_161_856,
        2 * 16 * 16 * 128 * 2,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        dict(model_type="qwen3_next", hidden_size=2048, intermediate_size=5120, num_hidden_layers=48, vocab_size=151936)
        | dict(num_attention_heads=16, num_key_value_heads=2, head_dim=256, num_experts=512, num_experts_per_tok=10)
        | dict(moe_intermediate_size=512, shared_expert_intermediate_size=512, full_attention_interval=4),
        79_674_391_296,
        2 * 12 * 2 * 256 * 2,
    ),
    "EleutherAI/gpt-neox-20b": (
        dict(model_type="gpt_neox", hidden_act="gelu_fast", hidden_size=6144, intermediate_size=24576)
        | dict(num_attention_heads=64, num_hidden_layers=44, rotary_pct=0.25, rotary_emb_base=10000, vocab_size=50432)
        | dict(max_position_embeddings=2048, use_parallel_residual=True, tie_word_embeddings=False),
        20_554_567_680,
        2 * 44 * 64 * 96 * 2,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_shapes(name: str):
    raw, parameters, bytes_per_token = LARGE[name]
    config = ModelConfig.from_hf(raw)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == counted(config)
    cached = config.n_layers - len(config.linear)
    assert 2 * cached * config.n_kv_heads * config.head_dim * 2 == bytes_per_token


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str):
    raw, wanted = PUBLISHED[name]
    config = ModelConfig.from_hf(raw)
    assert {key: vars(config).get(key, config.rope.get(key)) for key in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streaming", "h2o"])
@pytest.mark.parametrize(
    "name",
    ["falcon", "mixtral", "qwen3_moe-dense", "gpt_oss", "qwen3_next", "opt", "gemma3_text", "olmo3", "ministral3"],
)
def test_compiled_decoding(name: str, policy: str, folder):
    """Equals eager, without a graph break (fullgraph); once layers at all kinds of places have been seen nothing
    compiles any more, whatever the plan."""
    torch._dynamo.reset()
    model = checkpoint.load(folder(BY_NAME[name]), dtype="float64")[0]
    prompt, following = IDS[0, :PROMPT].tolist(), IDS[0, PROMPT : PROMPT + 10].tolist()
    for first in (30, 19, 9, 14):
        plan = [first + 3 * layer for layer in range(model.config.n_layers)]
        with torch._dynamo.config.patch(error_on_recompile=first == 14):
            got = teacher_forced(Engine(model, policy, plan=plan, compile=True), prompt, following)
        torch.testing.assert_close(got, teacher_forced(Engine(model, policy, plan=plan), prompt, following))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon", "falcon-grouped", "mixtral", "gpt_oss"])
def test_a_hundred_compiled_steps(name: str, ours):
    """One graph a block form, no graph break (fullgraph), and nothing compiled once the first steps are done."""
    torch._dynamo.reset()
    stream = Engine(ours(BY_NAME[name]), "h2o", plan=[20, 14], compile=True).stream([1, 2, 3], max_new_tokens=103)
    steps, counters = iter(stream), torch._dynamo.utils.counters
    tokens = [next(steps) for _ in range(3)]
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens += list(steps)
    assert counters["stats"]["unique_graphs"] == graphs > 0 and not counters["graph_break"]
    assert tokens == list(Engine(ours(BY_NAME[name]), "h2o", plan=[20, 14]).stream([1, 2, 3], max_new_tokens=103))
