"""Matrices in 8 and 4 bits: every form equals the numbers that its codes stand for, alone and in a model."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import quick, random_ids, random_model
from safetensors.torch import save_file
from simulated import moved, simulated
from test_graphs import FORMS

import bound
import checkpoint
import codes as codes_file
import weights
from codes import Codes
from engine import Engine, Request
from errors import UserError
from kernels import Linear
from model import Transformer
from needs import Needs
from weights import Packed, Table, Words, bits_of, held_bytes, holds, module_of, own_groups, quantize

CASES = [(bits, form, experts) for bits, form in ((8, Words), (4, Words), (4, Packed)) for experts in (1, 3)]
WIDE = dict(dim=64, ffn_dim=128, n_heads=4, head_dim=16, n_kv_heads=2, vocab_size=128)  # fits PyTorch's product


def quantized(model: Transformer, kind: str) -> tuple[Transformer, Transformer]:
    """The model with matrices of codes, and one of the numbers that they stand for. Both have their own tensors."""
    small, exact = copy.deepcopy(model), copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if bits := bits_of(model, name, kind):
            exact.get_parameter(name).copy_(Codes.of(parameter, bits).numbers())
    exact.tie()
    quantize(small, kind)
    return small, exact


def matrix(rows: int, columns: int, dtype=torch.float64) -> torch.Tensor:
    """With a row of zeros, one that is hardly any, one of one sign, and one with an outlier."""
    made = torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(3))
    made[0], made[1], made[2] = 0, made[1] * 1e-20, made[2].abs() + 1
    made[3, 5] = 40
    return made


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.09)])
def test_codes_are_near(bits, most):
    made = matrix(64, 128)
    codes = Codes.of(made, bits)
    assert codes.q.min() >= (-127 if bits == 8 else 0) and codes.q.max() <= (127 if bits == 8 else 15)
    error = (codes.numbers() - made).norm(dim=1) / made.norm(dim=1).clamp(min=1e-30)
    assert error[4:].max() < most and error[0] == 0


def test_ranges_are_cut_where_that_makes_the_rest_finer(monkeypatch):
    made = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3))
    made[:, 7] = 6
    cut = (Codes.of(made, 8).numbers() - made).square().sum()
    monkeypatch.setattr(codes_file, "CLIPPED", (1.0,))
    assert cut < 0.995 * (Codes.of(made, 8).numbers() - made).square().sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_those_of_the_numbers(case):
    bits, form, experts = case
    codes = Codes.of(matrix(64 * experts, 96), bits)
    module, numbers = form(codes, experts), codes.numbers().double()
    module.bias = torch.nn.Parameter(torch.randn(64 * experts, dtype=torch.float64), requires_grad=False)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 96, dtype=torch.float64)
        torch.testing.assert_close(module(x), x @ numbers.T + module.bias)
        torch.testing.assert_close(module.expert(experts - 1, x), x @ numbers[-64:].T)
        for dtype, most in ((torch.float32, 6e-3), (torch.bfloat16, 2e-2)):
            error = module(x.to(dtype)).double() - module(x)
            assert error.norm() < most * module(x).norm() and module(x.to(dtype)).dtype == dtype
    stack, x = numbers.unflatten(0, (experts, -1)), torch.randn(2, experts, 96, dtype=torch.float64)
    torch.testing.assert_close(module.each(x), torch.einsum("rei,eoi->reo", x, stack))
    picked = torch.tensor([[0, experts - 1], [experts - 1, 0]])
    torch.testing.assert_close(module.chosen(picked, x[:, :1]), (stack[picked] @ x[:, :1, :, None]).squeeze(-1))
    assert held_bytes(codes.q.shape, bits, own_groups(96, bits)) == sum(
        p.nbytes for p in form(codes, experts).parameters()
    )
    if experts == 1:
        ids = torch.tensor([[3, 63], [0, 31]])
        assert torch.equal(module.rows(ids), codes.numbers()[ids])


@pytest.mark.parametrize(("bits", "groups"), [(8, 3), (4, 1), (4, 6), (4, 12)])
def test_groups_of_files(bits, groups):
    """Codes with other groups than ours."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randint(-128 if bits == 8 else 0, 128 if bits == 8 else 16, (40, 96), generator=generator)
    scale, zero = (torch.randint(1, 16, (40, groups), generator=generator).float() for _ in range(2))
    codes = Codes(q.to(torch.int8 if bits == 8 else torch.uint8), scale / 64, zero * (bits == 4))
    assert holds(bits, 96, codes.scale, codes.zero, torch.float32)
    module, numbers, x = Words(codes), codes.numbers().double(), torch.randn(2, 96, dtype=torch.float64)
    assert held_bytes(q.shape, bits, groups) == sum(parameter.nbytes for parameter in module.parameters())
    torch.testing.assert_close(module(x), x @ numbers.T)
    torch.testing.assert_close(module.loop(x[0], *(part for part in module.one(0))), numbers @ x[0])
    assert torch.equal(module.rows(torch.arange(40)).double(), numbers)


@pytest.mark.parametrize("columns", [8, 40, 56, 88])
def test_odd_columns_in_bytes(columns):
    """PyTorch's product of few rows with bytes would read past the end of these, wrongly or until it crashes."""
    codes = Codes.of(matrix(48, columns), 8)
    module, numbers = Words(codes), codes.numbers()
    for rows in (1, 5):
        x = torch.randn(rows, columns).bfloat16()
        want = x.float() @ numbers.T
        assert (module(x).float() - want).norm() < 2e-2 * want.norm()


HELD = {  # bits, columns, scale, zero, dtype -> whether a form holds them
    (8, 64, (1.0,), (0.0,), torch.float32): True,
    (8, 64, (1.0,), (1.0,), torch.float32): False,
    (8, 64, (1.0,), (-3.0,), torch.float32): False,
    (8, 62, (1.0,), (0.0,), torch.float32): False,
    (4, 64, (1.0, 2.0), (7.5, 15.0), torch.float32): True,
    (4, 64, (1.0, 2.0), (7.5, 16.0), torch.float32): False,
    (4, 64, (1.0, 2.0), (7.51, 8.0), torch.float32): False,
    (4, 64, (1.0, 2.0), (8.0, -1.0), torch.float32): False,
    (4, 24, (1.0, 2.0), (8.0, 8.0), torch.float32): False,
    (4, 64, (float("nan"), 2.0), (8.0, 8.0), torch.float32): False,
    (4, 64, (1.0, float("inf")), (8.0, 8.0), torch.float32): False,
    (4, 64, (-5e3, 1.0), (8.0, 8.0), torch.float16): False,
    (4, 64, (-5e3, 1.0), (8.0, 8.0), torch.bfloat16): True,
}


@pytest.mark.parametrize("case", HELD, ids=str)
def test_what_a_form_holds(case):
    bits, columns, scale, zero, dtype = case
    assert holds(bits, columns, torch.tensor([scale]), torch.tensor([zero]), dtype) == HELD[case]


@pytest.mark.parametrize("case", quick((8, Words, 1), of=CASES), ids=str)
def test_compiled_products_are_the_same(case):
    bits, form, experts = case
    module = form(Codes.of(matrix(64 * experts, 96), bits), experts)
    run = torch.compile(module, fullgraph=True, dynamic=False)
    for rows, dtype, most in ((1, torch.float64, 1e-7), (1, torch.bfloat16, 1e-2), (5, torch.bfloat16, 1e-2)):
        torch._dynamo.reset()
        x = torch.randn(rows, 96, dtype=dtype)
        assert (run(x).double() - module(x.double())).norm() <= most * module(x.double()).norm()


MODELS = [dict(), dict(tie_embeddings=True), dict(qkv_bias=True, output_bias=True), *FORMS[:-1]]


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: next(iter(changes), "plain"))
def test_models_equal_those_of_the_numbers(changes, kind):
    small, exact = quantized(random_model(n_layers=2, **WIDE | changes), kind)
    ids = torch.tensor([random_ids(20)])
    torch.testing.assert_close(small(ids), exact(ids))
    requests = [Request(random_ids(9 + 5 * row, row), 6) for row in range(2)]
    got, want = (Engine(model, "h2o", plan=[9, 12]) for model in (small, exact))
    tokens = lambda engine: {len(done.request.ids): done.tokens for done in engine.generate(requests)}  # noqa: E731
    assert tokens(got) == tokens(want)
    assert list(got.stream(requests[0].ids, max_new_tokens=6)) == list(want.stream(requests[0].ids, max_new_tokens=6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: next(iter(changes), "plain"))
def test_compiled_models_equal_eager_ones(changes, dtype, kind):
    small, _ = quantized(random_model(n_layers=2, **WIDE | changes), kind)
    if dtype == torch.bfloat16:
        small.to(dtype)
    eager, compiled = (Engine(small, "streaming", plan=[9, 12], compile=flag) for flag in (False, True))
    for rows in (1, 2):
        requests = [Request(random_ids(9, row), 8) for row in range(rows)]
        want, got = ([done.tokens for done in engine.generate(requests)] for engine in (eager, compiled))
        assert [row[0] for row in got] == [row[0] for row in want] if dtype == torch.bfloat16 else got == want


def test_the_form_suits_device_and_shape(monkeypatch):
    codes = Codes.of(matrix(64, 96), 4)
    assert isinstance(module_of(codes), Packed) and isinstance(module_of(Codes.of(matrix(64, 96), 8)), Words)
    assert isinstance(module_of(Codes.of(matrix(40, 96), 4)), Words)  # rows that its blocks do not divide
    assert isinstance(module_of(Codes.of(matrix(192, 96), 4), 2), Words)  # nor those of each expert
    monkeypatch.setattr(weights, "int4_block", lambda: None)  # a processor whose order is not known
    assert isinstance(module_of(codes), Words)


def test_what_stays_as_it_is():
    model = random_model(n_layers=1, **WIDE | dict(experts=4, experts_per_token=2), tie_embeddings=False)
    kinds = {name: (bits_of(model, name, "int8"), bits_of(model, name, "int4")) for name, _ in model.named_parameters()}
    assert kinds["embed.weight"] == (8, 8) and kinds["head.weight"] == (8, 4)
    assert kinds["layers.0.feed_forward.w13.weight"] == (8, 4)
    assert kinds["layers.0.feed_forward.router.weight"] == kinds["norm.weight"] == (None, None)
    assert all(bits_of(model, name, "auto") is None for name in kinds)
    odd = random_model(n_layers=1, ffn_dim=54)
    assert bits_of(odd, "layers.0.feed_forward.w2.weight", "int8") is None  # 54 columns make no whole words
    assert bits_of(odd, "layers.0.attention.wqkv.weight", "int4") == 8  # nor 40 whole groups


@pytest.mark.parametrize("instructions", ("avx2", "default"))
def test_other_processors(instructions):
    """The order of PyTorch's product differs between them; what it gives does not."""
    code = (
        "import torch; from codes import Codes; from weights import module_of; torch.manual_seed(0);"
        "codes = Codes.of(torch.randn(128, 96), 4); module = module_of(codes); x = torch.randn(2, 96).bfloat16();"
        "want = x.float() @ codes.numbers().T; rows = module.rows(torch.tensor([1, 40, 77]));"
        "print(type(module).__name__, float((module(x).float() - want).norm() / want.norm()),"
        "torch.equal(rows, codes.numbers()[[1, 40, 77]]))"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": instructions, "PYTHONPATH": os.getcwd()}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    form, error, same = out.split()
    assert form == ("Words" if instructions == "default" else "Packed") and float(error) < 0.01 and same == "True"


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_on_a_simulated_gpu(kind, monkeypatch):
    monkeypatch.setattr(weights, "int4_block", lambda: None)
    small, _ = quantized(random_model(n_layers=2, **WIDE), kind)
    want = list(Engine(small, "streaming", plan=[9, 12]).stream(random_ids(20), max_new_tokens=6))
    with simulated() as device:
        engine = Engine(moved(small), "streaming", plan=[9, 12])
        assert list(engine.stream(random_ids(20), max_new_tokens=6)) == want
    assert device.waits


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_loaded(tmp_path, kind, tied):
    """From files, in a part of the memory; never as numbers of the whole model."""
    model = random_model(torch.float32, **WIDE, tie_embeddings=tied)
    raw = dict(model_type="llama", vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    raw |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096)
    raw |= dict(rms_norm_eps=model.config.norm_eps, tie_word_embeddings=tied, torch_dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(checkpoint.to_hf(model.state_dict(), model.config), tmp_path / "model.safetensors")
    loaded, config = checkpoint.load(tmp_path, weights=kind)
    small, _ = quantized(model, kind)
    assert config.dtype == torch.float32 and isinstance(loaded.embed, Table) and loaded.dtype == torch.float32
    assert tied == (loaded.head is loaded.embed.matrix) and not any(isinstance(m, Linear) for m in loaded.modules())
    ids = torch.tensor([random_ids(12)])
    assert torch.equal(loaded(ids), small(ids))
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    assert checkpoint.outline(tmp_path, "auto", kind)[1] == size  # by which memory is planned before it is loaded
    assert Needs.of(Engine(loaded).sizing, 20).weights == size
    with pytest.raises(UserError, match="weights must be one of auto, int8, int4, not 'int2'"):
        checkpoint.load(tmp_path, weights="int2")


def test_the_order_is_found_out():
    assert bound.int4_block() in (64, 32)
