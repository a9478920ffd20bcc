"""Quantized Hugging Face folders: packed here, code by code, as each format's own definition says, and loaded."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantized
import weights
from checkpoint import load, main, report
from config import ModelConfig
from errors import UserError
from kernels import Linear
from model import Transformer

Parts = dict[str, Tensor]
Pack = Callable[[int, int, int], tuple[Parts, Tensor]]  # rows, columns, seed -> what the file holds, what it stands for
E4M3 = torch.float8_e4m3fn


def drawn(least: int, most: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(seed))


def scales_like(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (drawn(20, 90, *shape, seed=seed) / 4096).to(dtype)


def packed(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [rows, n] from 0 on -> int32 [rows, n * bits / 32], of whose codes the i-th from the right is order[i]."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    words = torch.zeros(len(codes), codes.shape[1] // each, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place in range(each):
            words[:, word] |= codes[:, word * each + (order or range(each))[place]] << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def values(codes: Tensor, zeros: Tensor | None, scales: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Element by element of a grid: rows[o], columns[i] say which scale and zero point an element has."""
    wide = torch.stack([scales.double()[row] for row in rows])
    wide = torch.stack([wide[:, column] for column in columns], 1)
    if zeros is None:
        return codes.double() * wide
    low = torch.stack([zeros.double()[row] for row in rows])
    return (codes.double() - torch.stack([low[:, column] for column in columns], 1)) * wide


def gptq(bits: int = 4, group: int = 32, sym: bool = True, version: int = 1, order: str = "none") -> Pack:
    def pack(rows: int, columns: int, seed: int) -> tuple[Parts, Tensor]:
        size, most = columns if group == -1 else group, 2**bits - 1
        groups = -(-columns // size)
        index = [column // size for column in range(columns)]
        if order == "shuffled":
            index = [index[column] for column in torch.randperm(columns, generator=torch.manual_seed(seed)).tolist()]
        codes, scales = drawn(0, most, columns, rows, seed=seed), scales_like(groups, rows, seed=seed)
        zeros = drawn(0, most, groups, rows, seed=seed + 1)
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
        qzeros = packed(zeros, bits)
        if version == 1:  # as a whole: a zero point of 0 borrows from the next one, and gives back when 1 is added
            ones = sum(1 << bits * place for place in range(32 // bits))
            qzeros = (qzeros.long() - ones).to(torch.int32)  # keeps the lowest 32 bits
        parts = {"qweight": packed(codes.T, bits).T.contiguous(), "qzeros": qzeros, "scales": scales}
        if order != "none":
            parts["g_idx"] = torch.tensor(index, dtype=torch.int32)
        return parts, values(codes.T, zeros.T, scales.T, list(range(rows)), index)

    return pack


def awq(group: int = 32) -> Pack:
    def pack(rows: int, columns: int, seed: int) -> tuple[Parts, Tensor]:
        size = columns if group == -1 else group
        codes, zeros = drawn(0, 15, columns, rows, seed=seed), drawn(0, 15, columns // size, rows, seed=seed + 1)
        scales, order = scales_like(columns // size, rows, seed=seed), (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {"qweight": packed(codes, 4, order), "qzeros": packed(zeros, 4, order), "scales": scales}
        index = [column // size for column in range(columns)]
        return parts, values(codes.T, zeros.T, scales.T, list(range(rows)), index)

    return pack


def pack_quantized(bits: int = 4, group: int = 32, sym: bool = True, shuffled: bool = False) -> Pack:
    def pack(rows: int, columns: int, seed: int) -> tuple[Parts, Tensor]:
        size, half = columns if group == -1 else group, 2 ** (bits - 1)
        shape = (rows, columns // size)
        codes = drawn(-half, half - 1, rows, columns, seed=seed)
        scales = scales_like(*shape, seed=seed, dtype=torch.bfloat16)
        zeros = None if sym else drawn(-half, half - 1, *shape, seed=seed + 1)
        index = [column // size for column in range(columns)]
        parts = {"weight_packed": packed(codes + half, bits), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor([rows, columns])
        if zeros is not None:
            parts["weight_zero_point"] = packed((zeros + half).T, bits).T.contiguous()
        if shuffled:
            index = index[::-1]
            parts["weight_g_idx"] = torch.tensor(index, dtype=torch.int32)
        return parts, values(codes, zeros, scales, list(range(rows)), index)

    return pack


def plain(kind: torch.dtype, block: tuple[int, int], flat: int = 0, sym: bool = True, scale: str = "scale") -> Pack:
    """block: rows and columns that share a scale, 0 for all; flat: how many dimensions fewer the scales have."""

    def pack(rows: int, columns: int, seed: int) -> tuple[Parts, Tensor]:
        high, wide = block[0] or rows, block[1] or columns
        shape = (-(-rows // high), -(-columns // wide))
        codes = drawn(-128, 127, rows, columns, seed=seed)
        if kind is E4M3:
            codes = (codes / 7.3).to(E4M3)
        scales = scales_like(*shape, seed=seed, dtype=torch.float32)
        zeros = None if sym else drawn(-128, 127, *shape, seed=seed + 1)
        parts = {"weight": codes.to(kind), f"weight_{scale}": scales.reshape(shape[: 2 - flat])}
        if zeros is not None:
            parts["weight_zero_point"] = zeros.to(kind)
        parts |= {"input_scale": torch.ones(1), "k_scale": torch.ones(1)}  # of activations and of the cache
        own = [row // high for row in range(rows)], [column // wide for column in range(columns)]
        return parts, values(codes, zeros, scales, *own)

    return pack


def gptq_config(**more: Any) -> dict[str, Any]:
    return dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True) | more


def tensors_config(format: str, **weights: Any) -> dict[str, Any]:
    """Of compressed-tensors."""
    usual = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, dynamic=False)
    group = {"targets": ["Linear"], "weights": usual | weights, "input_activations": None, "output_activations": None}
    return dict(quant_method="compressed-tensors", format=format, config_groups={"group_0": group}, ignore=["lm_head"])


BYTES = dict(num_bits=8, strategy="channel", group_size=None)
FP8 = BYTES | {"type": "float"}
# name -> (quantization_config, packer, whether matrices have codes where their groups are all of one size)
FORMS: dict[str, tuple[dict[str, Any], Pack, bool]] = {
    "gptq": (gptq_config(), gptq(), True),
    "gptq-trivial-index": (gptq_config(group_size=64), gptq(group=64, order="sorted"), True),
    "gptq-act-order": (gptq_config(desc_act=True), gptq(order="shuffled", sym=False), False),
    "gptq-128-asymmetric": (gptq_config(group_size=128, sym=False), gptq(group=128, sym=False), True),
    "gptq-channel": (gptq_config(group_size=-1), gptq(group=-1), True),
    "gptq-short-group": (gptq_config(group_size=48, sym=False), gptq(group=48, sym=False), True),
    "gptq-v2": (gptq_config(checkpoint_format="gptq_v2", sym=False), gptq(version=2, sym=False), True),
    "gptq-8-bit": (gptq_config(bits=8), gptq(8), True),
    "gptq-8-bit-asymmetric": (gptq_config(bits=8, sym=False), gptq(8, sym=False), True),
    "awq": (dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"), awq(), True),
    "awq-channel": (dict(quant_method="awq", bits=4, group_size=-1), awq(-1), True),
    "int4": (tensors_config("pack-quantized"), pack_quantized(), True),
    "int4-asymmetric": (tensors_config("pack-quantized", symmetric=False), pack_quantized(sym=False), True),
    "int4-channel": (
        tensors_config("pack-quantized", strategy="channel", group_size=None, symmetric=False),
        pack_quantized(group=-1, sym=False),
        True,
    ),
    "int4-act-order": (tensors_config("pack-quantized", actorder="group"), pack_quantized(shuffled=True), False),
    "int8-packed": (tensors_config("pack-quantized", num_bits=8, symmetric=False), pack_quantized(8, sym=False), True),
    "int8": (tensors_config("int-quantized", **BYTES), plain(torch.int8, (1, 0)), True),
    "int8-flat": (tensors_config("int-quantized", **BYTES), plain(torch.int8, (1, 0), flat=1), True),
    "int8-asymmetric": (
        tensors_config("int-quantized", **BYTES | {"symmetric": False}),
        plain(torch.int8, (1, 0), sym=False),
        True,
    ),
    "int8-tensor": (
        tensors_config("int-quantized", **BYTES | {"strategy": "tensor"}),
        plain(torch.int8, (0, 0), 1),
        True,
    ),
    "int8-block": (
        tensors_config("int-quantized", **BYTES | {"strategy": "block", "block_structure": [16, 32]}),
        plain(torch.int8, (16, 32)),
        True,
    ),
    "float8-channel": (tensors_config("float-quantized", **FP8), plain(E4M3, (1, 0)), False),
    "float8-tensor": (
        tensors_config("float-quantized", **FP8 | {"strategy": "tensor"}),
        plain(E4M3, (0, 0), 2),
        False,
    ),
    "float8-block": (
        tensors_config("float-quantized", **FP8 | {"strategy": "block", "block_structure": [32, 48]}),
        plain(E4M3, (32, 48)),
        False,
    ),
    "fp8": (
        dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]),
        plain(E4M3, (128, 128), scale="scale_inv"),
        False,
    ),
    "fp8-small-blocks": (
        dict(quant_method="fp8", weight_block_size=[48, 32], modules_to_not_convert=["lm_head"]),
        plain(E4M3, (48, 32), scale="scale_inv"),
        False,
    ),
    "fp8-tensor": (
        dict(quant_method="fp8", activation_scheme="static", weight_block_size=None),
        plain(E4M3, (0, 0), 2),
        False,
    ),
}
WIDE = families.case(
    "llama-wide",
    hidden_size=64,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """case -> its checkpoint as floats, to be read only"""
    made = {}

    def make(case: families.Case) -> Path:
        if case not in made:
            made[case] = families.make_checkpoint(case, tmp_path_factory.mktemp(case.name))
        return made[case]

    return make


def quantize(floats: Path, folder: Path, settings: dict[str, Any], pack: Pack) -> tuple[Path, Path]:
    """Every matrix of the layers packed; and a folder with the floats that they stand for."""
    held, meant = {}, {}
    for number, (name, tensor) in enumerate(load_file(floats / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if "layers" not in name and ".h." not in name or tensor.ndim < 2:
            held[name] = meant[name] = tensor
            continue
        parts, meant[name] = pack(*tensor.shape, number)
        held |= {f"{module}.{part}": value.clone() for part, value in parts.items()}
    for path, tensors in ((folder / "quantized", held), (folder / "floats", meant)):
        path.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        shutil.copy(floats / "config.json", path)
    families.change_config(folder / "quantized", lambda raw: raw | {"quantization_config": settings})
    return folder / "quantized", folder / "floats"


def stored(folder: Path, settings: dict[str, Any]) -> list[Any]:
    """What joined makes of a folder's tensors, as in checkpoint.py."""
    import checkpoint

    file = folder / "model.safetensors"
    tensors = [checkpoint.Stored(file, name, list(tensor.shape)) for name, tensor in load_file(file).items()]
    return quantized.joined(tensors, quantized.scheme(settings))


def held(model: Transformer) -> dict[str, weights.Quantized]:
    """The modules that hold codes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, weights.Quantized)}


def numbers(model: Transformer) -> Parts:
    """All parameters as numbers."""
    tensors, modules = model.state_dict(), held(model)
    for name, module in modules.items():
        columns = module.rows(torch.tensor([0])).shape[1]
        for part in module.names:
            del tensors[f"{name}.{part}"]
        unit = torch.eye(columns, dtype=torch.float64)
        products = [module.expert(expert, unit).T for expert in range(len(module.scale))]
        tensors[f"{name}.weight"] = torch.cat(products).to(model.config.dtype)
    return tensors


def assert_same(got: Transformer, expected: Transformer, rtol: float = 2e-7) -> None:
    got, expected = numbers(got), numbers(expected)
    assert got.keys() == expected.keys()
    for key, tensor in got.items():
        torch.testing.assert_close(tensor, expected[key], rtol=rtol, atol=0)


# Zero points of 8 bits have no place in a form.
DEQUANTIZED = ("gptq-8-bit-asymmetric", "int8-packed", "int8-asymmetric")


@pytest.mark.parametrize("name", FORMS)
def test_loads_as_what_it_stands_for(name: str, folders, tmp_path):
    settings, pack, has_codes = FORMS[name]
    packed_folder, floats = quantize(folders(WIDE), tmp_path, settings, pack)
    expected, loaded = (load(path)[0] for path in (floats, packed_folder))
    assert_same(loaded, expected)
    for module, matrix in expected.named_modules():
        if isinstance(matrix, Linear) and module.startswith("layers"):
            columns = matrix.weight.shape[1]
            whole = columns % min(max(settings.get("group_size", 1), 1), columns) == 0
            assert (module in held(loaded)) == (has_codes and whole and name not in DEQUANTIZED), module
    meant = load_file(floats / "model.safetensors")
    for matrix in stored(packed_folder, settings):
        if isinstance(matrix, quantized.Quantized):
            codes = matrix.codes()
            size = min(max(settings.get("group_size", 1), 1), columns := matrix.shape[1])
            assert (codes is not None) == (has_codes and columns % size == 0)
            if codes is not None:
                assert codes.bits == matrix.scheme.bits and codes.q.max() <= (15 if codes.bits == 4 else 127)
                assert codes.scale.shape == codes.zero.shape
                assert all(part.is_contiguous() for part in codes)
                torch.testing.assert_close(codes.numbers(), meant[matrix.name].float(), rtol=2e-7, atol=0)
                assert not settings.get("sym") or (codes.zero == (8 if codes.bits == 4 else 0)).all()


ODD = [
    case for case in families.FAMILIES if case.config["model_type"] in ("phi3", "gpt_neox", "falcon", "opt", "mixtral")
]


@pytest.mark.parametrize("form", ("int8", "int4-channel", "gptq-act-order"))
@pytest.mark.parametrize("case", ODD, ids=str)
def test_fused_interleaved_and_renamed_matrices(case, form, folders, tmp_path):
    settings, pack, has_codes = FORMS[form]
    packed_folder, floats = quantize(folders(case), tmp_path, settings, pack)
    if case.name == "opt":
        file = packed_folder / "model.safetensors"
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    expected, loaded = (load(path)[0] for path in (floats, packed_folder))
    assert_same(loaded, expected)
    assert ("layers.1.attention.wqkv" in held(loaded)) == has_codes


def test_run_and_report(folders, tmp_path):
    settings, pack, _ = FORMS["gptq"]
    packed_folder, floats = quantize(folders(WIDE), tmp_path, settings, pack)
    ids = families.token_ids(1, 20)  # so many are not multiplied in bfloat16
    with torch.inference_mode():
        ours, theirs = load(packed_folder)[0](ids), families.load_reference(floats)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    line = next(line for line in report(packed_folder).splitlines() if line.startswith("tensors"))
    assert line == "tensors  29 in 1 file(s), 14 of them quantized (gptq int4, groups of 32), all match"


@pytest.mark.parametrize(
    ("form", "kind", "bits", "words"),
    [
        ("int4", "auto", {4}, "in 4 bits and float32"),
        ("gptq-8-bit", "auto", {8}, "in 8 bits and float32"),
        ("gptq-8-bit-asymmetric", "auto", set(), "GiB in float32"),
        ("int4", "int8", {8}, "in 8 bits and float32"),
        ("int4-channel", "int4", {4, 8}, "in 4 bits and 8 bits and float32"),
        ("int8", "int4", {4, 8}, "in 4 bits and 8 bits and float32"),
    ],
)
def test_what_is_held_is_what_is_asked_for(form, kind, bits, words, folders, tmp_path, capsys):
    """Stored codes where they have as many bits, made ones where not; and the report counts their bytes."""
    settings, pack, _ = FORMS[form]
    packed_folder, floats = quantize(folders(WIDE), tmp_path, settings, pack)
    model, config = load(packed_folder, weights=kind)
    assert {module.bits for module in held(model).values()} == bits
    stored = form != "gptq-8-bit-asymmetric" and (kind == "auto" or kind[-1] == form[3])
    wqkv, meant = "layers.1.attention.wqkv.weight", numbers(load(floats)[0])
    assert numbers(model)[wqkv].allclose(meant[wqkv], rtol=2e-7, atol=0) == (stored or not bits)
    assert (numbers(model)[wqkv] - meant[wqkv]).norm() < 0.1 * meant[wqkv].norm()
    assert main([str(packed_folder), "--weights", kind, "--tokens", "1", "--memory", "0.001"]) == 0
    out, token = capsys.readouterr().out, config.n_layers * 2 * config.n_kv_heads * config.head_dim * 4
    left = int(0.001 * 2**30) - sum(parameter.nbytes for parameter in model.parameters())
    assert words in out and f"{left // token:,} sequences of 1 tokens full" in out
    count = 0 if stored else 14
    assert (f"{count} dequantized as they are read" in out) == (count > 0)


def test_parts_that_differ_are_dequantized(folders, tmp_path):
    """A matrix of which one part is floats, or has a zero point where it cannot be held."""
    settings, pack, _ = FORMS["int8-asymmetric"]
    packed_folder, floats = quantize(folders(WIDE), tmp_path, settings, pack)
    tensors, meant = (load_file(folder / "model.safetensors") for folder in (packed_folder, floats))
    for name, tensor in tensors.items():
        if name.endswith("zero_point") and "k_proj" not in name:
            module = name.removesuffix(".weight_zero_point")
            meant[f"{module}.weight"] = (tensors[f"{module}.weight"] * tensors[f"{module}.weight_scale"]).double()
            tensor.zero_()
    for part in ("weight", "weight_scale", "weight_zero_point"):
        tensors.pop(f"{UP}.{part}")
    tensors[f"{UP}.weight"] = meant[f"{UP}.weight"]
    save_file(tensors, packed_folder / "model.safetensors")
    save_file(meant, floats / "model.safetensors")
    loaded = load(packed_folder)[0]
    assert_same(loaded, load(floats)[0])
    assert not any(name.endswith("wqkv") for name in held(loaded)) and "layers.1.feed_forward.w13" not in held(loaded)
    assert {"layers.1.attention.wo", "layers.0.feed_forward.w13", "layers.1.feed_forward.w2"} <= held(loaded).keys()


def test_shards_and_half_precision(folders, tmp_path):
    """Parts of one matrix in two files; float16 of config.json is what the matrices become."""
    settings, pack, _ = FORMS["awq"]
    packed_folder, floats = quantize(folders(WIDE), tmp_path, settings, pack)
    tensors = load_file(packed_folder / "model.safetensors")
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = {name: names[name.endswith("scales")] for name in tensors}
    for file in names:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, packed_folder / file)
    (packed_folder / "model.safetensors").unlink()
    (packed_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for folder in (packed_folder, floats):
        families.change_config(folder, lambda raw: raw | {"dtype": "float16"})
    expected, loaded = (load(path)[0] for path in (floats, packed_folder))
    assert held(loaded) and loaded.norm.weight.dtype == torch.float16
    assert_same(loaded, expected, rtol=1e-3)


def test_large_matrices_are_read_in_pieces(monkeypatch, folders, tmp_path):
    settings, pack, _ = FORMS["float8-block"]
    packed_folder, _ = quantize(folders(WIDE), tmp_path, settings, pack)
    matrix = next(tensor for tensor in stored(packed_folder, settings) if isinstance(tensor, quantized.Quantized))
    whole = matrix.read()
    monkeypatch.setattr(quantized, "CHUNK", 300)
    assert matrix.read().equal(whole)


@pytest.mark.parametrize("name", ["gptq-v2", "int4-asymmetric", "int4-channel"])
def test_rows_that_do_not_fill_an_int32(name: str, tmp_path):
    """Zero points are packed along the rows, of which an int32 holds 8."""
    settings, pack, _ = FORMS[name]
    parts, meant = pack(12, 64, 0)
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(stored(tmp_path, settings)[0].read(), meant.float())


def test_biases_of_zeros(folders, tmp_path):
    """Older writers of GPTQ give every module a bias; transformers drops those that a model does not have."""
    settings, pack, _ = FORMS["gptq"]
    packed_folder, floats = quantize(folders(WIDE), tmp_path, settings, pack)
    file, bias = packed_folder / "model.safetensors", "model.layers.1.mlp.up_proj.bias"
    for value in (0.0, 0.1):
        save_file(load_file(file) | {bias: torch.full((192,), value)}, file)
        if value:
            assert f"1 not known: {bias}" in line_of(packed_folder)
        else:
            assert_same(load(packed_folder)[0], load(floats)[0])


# What is wrong with a folder, in one line.

UP = "model.layers.1.mlp.up_proj"


def line_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in (line := str(caught.value))
    return line


def without(part: str):
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def put(part: str, change: Callable[[Tensor], Tensor]):
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"]).contiguous()})


def nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


SPOILED = {
    "no scales": (
        "gptq",
        without("scales"),
        rf"up_proj.qweight \(gptq int4, groups of 32\) is not whole.*: {UP}.scales$",
    ),
    "no zeros": ("awq", without("qzeros"), f"not whole; missing: {UP}.qzeros$"),
    "no codes": ("gptq", without("qweight"), f"1 missing: {UP}.weight; 2 not known: {UP}.qzeros, {UP}.scales$"),
    "no zeros of asymmetric": ("int4-asymmetric", without("weight_zero_point"), f"missing: {UP}.weight_zero_point$"),
    "no scales of bytes": ("int8", without("weight_scale"), f"{UP}.weight is torch.int8; only floating"),
    "no scales of fp8": ("fp8", without("weight_scale_inv"), f"{UP}.weight is torch.float8_e4m3fn; only floating"),
    "shape of codes": (
        "gptq",
        put("qweight", lambda t: t[:, :-8]),
        r"up_proj.scales has the shape \[2, 192\].*\[2, 184\]",
    ),
    "fewer columns": (
        "awq",
        put("qweight", lambda t: t[:-32]),
        r"scales has the shape \[2, 192\] instead of \[1, 192\]",
    ),
    "another width": (
        "int4-channel",
        put("weight_packed", lambda t: t[:, :-1]),
        rf"{UP}.weight \[192, 56\] instead of \[192, 64\]",
    ),
    "vector of codes": ("gptq", put("qweight", torch.Tensor.flatten), r"qweight must be \[rows, columns\]"),
    "shape of zeros": ("gptq", put("qzeros", lambda t: t[:1]), r"qzeros has the shape \[1, 24\] instead of \[2, 24\]"),
    "groups of another size": ("int4", put("weight_scale", lambda t: t[:, :1]), r"\[192, 1\] instead of \[192, 2\]"),
    "scales of rows": ("float8-tensor", put("weight_scale", lambda t: t.expand(192)), r"\[192\] instead of \[1, 1\]"),
    "blocks of another size": ("fp8-small-blocks", put("weight_scale_inv", lambda t: t[:1]), r"\[1, 2\] .* \[4, 2\]"),
    "weight_shape": (
        "int4",
        put("weight_shape", lambda t: t + 8),
        r"weight_shape says \[200, 72\] instead of \[192, 64\]",
    ),
    "index beyond": ("gptq-act-order", put("g_idx", lambda t: t + 1), "g_idx names the groups 1 to 2 of 2"),
    "index below": ("gptq-act-order", put("g_idx", lambda t: t - 1), "g_idx names the groups -1 to 0 of 2"),
    "floats as codes": (
        "gptq",
        put("qweight", torch.Tensor.float),
        f"{UP}.qweight is torch.float32 instead of torch.int32",
    ),
    "integers as scales": ("gptq", put("scales", torch.Tensor.int), f"{UP}.scales is torch.int32 instead of"),
    "bytes as fp8": ("fp8", put("weight", lambda t: t.view(torch.int8)), "weight is torch.int8 instead of .*e4m3fn"),
    "another fp8": ("fp8", put("weight", lambda t: t.view(torch.float8_e5m2)), "is torch.float8_e5m2 instead of"),
    "nan in scales": ("awq", put("scales", nan), f"{UP}.weight holds NaN or infinite"),
    "infinite scales of bytes": ("int8", put("weight_scale", lambda t: t / 0), f"{UP}.weight holds NaN or infinite"),
    "scales beyond bfloat16": (
        "int4",
        put("weight_scale", lambda t: torch.full_like(t.float(), 3.4e38)),
        f"{UP}.weight holds NaN or infinite",
    ),
    "nan in fp8": ("fp8", put("weight", lambda t: t.view(torch.uint8).fill_(127).view(E4M3)), "weight holds NaN"),
    "codes and floats": (
        "gptq",
        lambda tensors: tensors.update({f"{UP}.weight": torch.ones(192, 64)}),
        f"{UP}.weight and {UP}.weight are the same tensor",
    ),
    "another form": (
        "awq",
        lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("qweight")],
        r"config.json says that weights are quantized \(awq int4, groups of 32\), but no tensor ends in qweight",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled(name: str, folders, tmp_path):
    form, spoil, words = SPOILED[name]
    settings, pack, _ = FORMS[form]
    folder, _ = quantize(folders(WIDE), tmp_path, settings, pack)
    spoil(tensors := load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    line = line_of(folder)
    assert re.search(words, line), line
    assert len(line) < 500


# quantization_config as models are published with it.


def published(weights: dict[str, Any], inputs: dict[str, Any] | None, format: str, **more: Any) -> dict[str, Any]:
    """Of compressed-tensors."""
    none = dict(actorder=None, block_structure=None, observer="minmax", observer_kwargs={}, group_size=None)
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": none | weights}
    other = dict(global_compression_ratio=1.89, ignore=["lm_head"], kv_cache_scheme=None, format=format)
    return dict(config_groups={"group_0": group}, quantization_status="compressed", **other) | {
        "quant_method": "compressed-tensors",
        **more,
    }


TOKENS = dict(num_bits=8, type="int", dynamic=True, strategy="token", symmetric=True)
INT4 = dict(num_bits=4, type="int", dynamic=False, strategy="group", symmetric=True, group_size=128)
INT8 = INT4 | dict(num_bits=8, strategy="channel", group_size=None)
TheBloke = dict(bits=4, group_size=128, damp_percent=0.01, desc_act=False, sym=True, true_sequential=True)
TheBloke |= dict(model_name_or_path=None, model_file_base_name="model", quant_method="gptq")
QWEN = dict(
    batch_size=1, bits=4, block_name_to_quantize=None, cache_block_outputs=True, damp_percent=0.01, dataset=None
)
QWEN |= dict(desc_act=False, exllama_config={"version": 1}, group_size=128, max_input_length=None, model_seqlen=None)
QWEN |= dict(module_name_preceding_first_block=None, pad_token_id=None, quant_method="gptq", sym=True, use_exllama=True)
AWQ = dict(bits=4, group_size=128, modules_to_not_convert=None, quant_method="awq", version="gemm", zero_point=True)
PUBLISHED = {
    "TheBloke/Llama-2-7B-Chat-GPTQ": (TheBloke, "gptq int4, groups of 128"),
    "TheBloke, act-order": (TheBloke | dict(desc_act=True, group_size=-1), "gptq int4, by row"),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": (QWEN, "gptq int4, groups of 128"),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8": (QWEN | dict(bits=8), "gptq int8, groups of 128"),
    "of gptqmodel": (
        dict(bits=4, dynamic=None, group_size=32, desc_act=True, static_groups=False, sym=True, lm_head=False)
        | dict(damp_percent=0.0025, true_sequential=True, quant_method="gptq", checkpoint_format="gptq")
        | dict(pack_dtype="int32", meta={"quantizer": ["gptqmodel:1.4.2"]}),
        "gptq int4, groups of 32",
    ),
    "of auto-round": (
        dict(bits=4, group_size=128, sym=True, desc_act=False, damp_percent=0.01, true_sequential=False, iters=200)
        | dict(autoround_version="0.4.5", lr=0.005, nsamples=128, quant_method="gptq"),
        "gptq int4, groups of 128",
    ),
    "Qwen/Qwen2.5-7B-Instruct-AWQ": (AWQ, "awq int4, groups of 128"),
    "older AWQ": (AWQ | dict(version="GEMM", group_size=64, backend="autoawq"), "awq int4, groups of 64"),
    "RedHatAI w4a16": (published(INT4, None, "pack-quantized"), "compressed-tensors int4, groups of 128"),
    "RedHatAI w4a16, actorder": (
        published(INT4 | dict(actorder="weight", symmetric=False), None, "pack-quantized", sparsity_config={}),
        "compressed-tensors int4, groups of 128",
    ),
    "RedHatAI w8a16": (published(INT8, None, "pack-quantized"), "compressed-tensors int8, by row"),
    "RedHatAI w8a8": (
        published(INT8, TOKENS, "int-quantized", sparsity_config={"format": "dense", "sparsity_structure": "2:4"}),
        "compressed-tensors int8, by row",
    ),
    "RedHatAI FP8-dynamic": (
        published(INT8 | {"type": "float"}, TOKENS | {"type": "float"}, "float-quantized", transform_config={}),
        "compressed-tensors fp8, by row",
    ),
    "RedHatAI FP8": (
        published(INT8 | {"type": "float", "strategy": "tensor"}, TOKENS | {"dynamic": False}, "float-quantized"),
        "compressed-tensors fp8, by matrix",
    ),
    "RedHatAI FP8-block": (
        published(
            INT8 | {"type": "float", "strategy": "block", "block_structure": [128, 128]}, TOKENS, "float-quantized"
        ),
        "compressed-tensors fp8, blocks of 128 x 128",
    ),
    "Qwen/Qwen3-8B-FP8": (
        dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
        "fp8 fp8, blocks of 128 x 128",
    ),
    "openai/gpt-oss-20b": (
        dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"]),
        "mxfp4 fp4, groups of 32",
    ),
    "of AutoFP8": (
        dict(activation_scheme="static", ignored_layers=["lm_head"], kv_cache_scheme=None, quant_method="fp8"),
        "fp8 fp8, by matrix",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str):
    settings, words = PUBLISHED[name]
    assert str(quantized.scheme(settings)) == words
    ModelConfig.from_hf(WIDE.config | {"quantization_config": settings})


UNREADABLE = [
    (dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), "'bitsandbytes' cannot be read"),
    (dict(quant_method="torchao", quant_type={"default": {}}), "'torchao' cannot"),
    (dict(quant_method="aqlm", nbits_per_codebook=16), "'aqlm' cannot"),
    (dict(quant_config={"weight_quant_params": {}}, quant_method="hqq"), "'hqq' cannot"),
    (dict(quant_method="quanto", weights="int8"), "'quanto' cannot"),
    (dict(quant_method="modelopt", quant_algo="FP8"), "'modelopt' cannot"),
    ({}, "None cannot be read"),
    ({"quant_method": ["gptq"]}, r"\['gptq'\] cannot be read"),
    ([], r"quantization_config must be an object, not \[\]"),
    ("gptq", "must be an object, not 'gptq'"),
    (TheBloke | dict(bits=3), "'gptq' with bits 3 cannot"),
    (TheBloke | dict(bits=True), "with bits True"),
    (TheBloke | dict(bits=None), "with bits None"),
    (TheBloke | dict(group_size=0), "with group_size 0"),
    (TheBloke | dict(group_size="128"), "with group_size '128'"),
    (TheBloke | dict(is_marlin_format=True), "with is_marlin_format True"),
    (TheBloke | dict(checkpoint_format="marlin"), "with checkpoint_format 'marlin'"),
    (TheBloke | dict(rotation="hadamard"), "with rotation 'hadamard'"),
    (AWQ | dict(version="gemv"), "'awq' with version 'gemv' cannot"),
    (AWQ | dict(bits=8), "'awq' with bits 8"),
    (published(INT4, None, "marlin-24"), "'compressed-tensors' with format 'marlin-24' cannot"),
    (published(INT4 | {"type": "float"}, None, "nvfp4-pack-quantized"), "with format 'nvfp4-pack-quantized'"),
    (published(INT4 | {"num_bits": 3}, None, "pack-quantized"), "with pack-quantized 'int of 3 bits'"),
    (published(INT4 | {"num_bits": 4.0}, None, "pack-quantized"), "with pack-quantized 'int of 4.0 bits'"),
    (published(INT8, None, "float-quantized"), "with float-quantized 'int of 8 bits'"),
    (published(INT4 | {"strategy": "tensor_group"}, None, "pack-quantized"), "with strategy 'tensor_group'"),
    (published(INT4 | {"group_size": None}, None, "pack-quantized"), "with strategy 'group'"),
    (published(INT4, None, "pack-quantized", config_groups={}), "with config_groups {}"),
    (published(INT4, None, "pack-quantized", config_groups={"W8A8": ["Linear"]}), "with config_groups {'W8A8'"),
    (
        published(INT4, None, "pack-quantized", transform_config={"config_groups": {"R1": {}}}),
        "with transform_config {",
    ),
    (
        published(INT4, None, "pack-quantized", sparsity_config={"format": "sparse-24-bitmask"}),
        "with sparsity_config {'format': 'sparse-24-bitmask'}",
    ),
    (published(INT8, None, "int-quantized", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme {'num_bits': 8} is not"),
    (dict(quant_method="fp8", fmt="e5m2"), "'fp8' with fmt 'e5m2'"),
    (dict(quant_method="fp8", weight_block_size=[128]), r"'fp8' with weight_block_size \[128\]"),
]
MIXED = published(INT4, None, "pack-quantized")
MIXED["config_groups"]["group_1"] = published(INT8, None, "int-quantized")["config_groups"]["group_0"]
MIXED["config_groups"]["group_1"]["format"] = "int-quantized"
UNREADABLE.append((MIXED, "with config_groups \\['compressed-tensors int. *"))


@pytest.mark.parametrize(("settings", "words"), UNREADABLE, ids=[words[:40] for _, words in UNREADABLE])
def test_unreadable(settings: Any, words: str):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(WIDE.config | {"quantization_config": settings})
    line = str(caught.value)
    assert re.search(words, line) and len(line) < 500, line
    if "cannot be read" in line:
        assert "gptq of 4 or 8 bits" in line and "GGUF" in line


# mxfp4: the experts of gpt-oss, in the form in which that is published.


OSS = families.case(
    "gpt_oss-mxfp4",
    **families.GPT_OSS | dict(hidden_size=64, intermediate_size=96, head_dim=16, num_local_experts=5),
)


def micro(folder: Path, matrices: tuple[str, ...] = ("gate_up_proj", "down_proj")) -> Path:
    """A tiny gpt-oss whose experts are random codes with random exponents."""
    families.make_checkpoint(OSS, folder)
    tensors = load_file(folder / "model.safetensors")
    for seed, name in enumerate(name for name in list(tensors) if name.endswith(matrices)):
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = drawn(0, 255, experts, rows, columns // 32, 16, seed=seed).to(torch.uint8)
        tensors[f"{name}_scales"] = drawn(122, 125, experts, rows, columns // 32, seed=seed).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = PUBLISHED["openai/gpt-oss-20b"][0]
    families.change_config(folder, lambda raw: raw | {"quantization_config": settings})
    return folder


def test_every_code_and_exponent_of_mxfp4(tmp_path):
    """Of all bytes with all scales that are numbers, by the tables of the format."""
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers += [-number for number in numbers]
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(16, 255, 1)
    scales = torch.arange(255, dtype=torch.uint8).repeat(256, 1)
    save_file({"layer.blocks": blocks, "layer.scales": scales}, tmp_path / "model.safetensors")
    [matrix] = stored(tmp_path, {"quant_method": "mxfp4"})
    read = matrix.read().unflatten(1, (255, 32))
    assert matrix.shape == [256, 255 * 32] and matrix.codes() is None
    want = torch.tensor([[numbers[byte % 16], numbers[byte // 16]] for byte in range(256)], dtype=torch.float64)
    want = want.view(16, 1, 32) * torch.tensor([2.0 ** (scale - 127) for scale in range(255)])[:, None].double()
    assert read.double()[:16].equal(want.float().double()) and read[16:32].equal(read[:16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_as_transformers_has_it(dtype, tmp_path):
    """Weights equal those that it dequantizes, of each expert; logits those of its own model."""
    folder = micro(tmp_path)
    model, theirs = load(folder, dtype=dtype)[0], families.load_reference(folder, dtype)
    for ours, layer in zip(model.layers, families.layers_of(theirs), strict=True):
        want, experts = layer.mlp.experts, ours.feed_forward
        gate_up = torch.cat((want.gate_up_proj[..., ::2], want.gate_up_proj[..., 1::2]), -1)
        assert experts.w13.stack.equal(gate_up.mT) and experts.w2.stack.equal(want.down_proj.mT)
    if dtype == torch.float32:
        ids = families.token_ids(2, 40)
        with torch.inference_mode():
            ours, theirs = model(ids), theirs(ids).logits
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["auto", "int8", "int4"])
def test_what_is_made_of_mxfp4(kind, tmp_path, capsys):
    """Floats, or codes of our own; the report counts the bytes that there are."""
    folder = micro(tmp_path)
    (model, config), exact = load(folder, weights=kind, dtype="float64"), load(folder, dtype="float64")[0]
    assert {module.bits for module in held(model).values()} == {"auto": set(), "int8": {8}, "int4": {4, 8}}[kind]
    w2 = "layers.1.feed_forward.w2.weight"
    error = (numbers(model)[w2] - exact.state_dict()[w2]).norm() / exact.state_dict()[w2].norm()
    assert (error == 0) == (kind == "auto") and error < 0.1
    exact.load_state_dict({name.replace("embed.matrix", "embed"): part for name, part in numbers(model).items()})
    with torch.inference_mode():
        for rows, length in ((1, 20), (1, 1), (3, 1)):  # expert by expert, the chosen ones, all of them
            ids = families.token_ids(rows, length)
            torch.testing.assert_close(model(ids), exact(ids), rtol=1e-5, atol=1e-6)
    assert main([str(folder), "--weights", kind, "--dtype", "float64", "--tokens", "1", "--memory", "0.01"]) == 0
    out, token = capsys.readouterr().out, config.n_layers * 2 * config.n_kv_heads * config.head_dim * 8
    left = int(0.01 * 2**30) - sum(parameter.nbytes for parameter in model.parameters())
    assert f"{left // token:,} sequences of 1 tokens full" in out
    # 2 layers of 5 experts with two matrices and two biases; 4 + 4 + 1 + 2 + 2 others a layer, and 3 beside them.
    count = "tensors  69 in 1 file(s), 20 of them quantized (mxfp4 fp4, groups of 32), 20 dequantized as they are read"
    assert count in out


def test_some_matrices_of_mxfp4_alone(tmp_path):
    """Those without blocks are floats."""
    model = load(micro(tmp_path, ("down_proj",)))[0]
    want = families.random_model(OSS).model.layers[1].mlp.experts.gate_up_proj
    assert model.layers[1].feed_forward.w13.stack[:, 96:].equal(want[..., 1::2].mT)


@pytest.mark.parametrize(
    ("end", "change", "words"),
    [
        ("scales", lambda t: None, r"experts.0.down_proj.blocks \(mxfp4 fp4, groups of 32\) is not whole; missing: "),
        ("scales", lambda t: t[:, :-1], r"down_proj.scales has the shape \[63, 3\] instead of \[64, 3\]"),
        ("scales", lambda t: t.float(), "down_proj.scales is torch.float32 instead of torch.uint8"),
        ("scales", lambda t: torch.full_like(t, 255), "down_proj.weight holds NaN or infinite values"),
        ("blocks", lambda t: t[..., :8], r"down_proj.blocks must be \[rows, groups, 16\], not \[64, 3, 8\]"),
        ("blocks", lambda t: t[:, :, :2], r"scales has the shape \[64, 3\] instead of \[64, 2\]"),
        ("blocks", lambda t: t[:4], "tensors .* missing: .*not known: .*down_proj_blocks"),
    ],
)
def test_spoiled_mxfp4(end, change, words, tmp_path):
    folder = micro(tmp_path)
    tensors, name = load_file(folder / "model.safetensors"), f"model.layers.1.mlp.experts.down_proj_{end}"
    if (changed := change(tensors.pop(name))) is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert re.search(words, line := line_of(folder)), line


# Against the packages themselves.


@pytest.mark.parametrize("shape", [(2, 3), ()], ids=["blocks", "tensor"])
def test_fp8_as_transformers_has_it(shape: tuple[int, ...], tmp_path):
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(theirs, "Fp8Dequantize"):
        pytest.skip("this transformers dequantizes elsewhere")
    weight, scale = torch.randn(256, 384).to(E4M3), torch.rand(shape)
    parts = {"weight": weight, "weight_scale_inv": scale}
    expected = theirs.Fp8Dequantize(None).convert(parts)["weight"]
    expected = expected[0] if isinstance(expected, list) else expected  # before transformers 5.20
    save_file({f"layer.{name}": tensor for name, tensor in parts.items()}, tmp_path / "model.safetensors")
    settings = dict(quant_method="fp8", weight_block_size=[128, 128] if shape else None)
    assert stored(tmp_path, settings)[0].read().equal(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({name for name in FORMS if name[:3] in ("int", "flo")} - {"int8-flat", "int4-act-order"})
)
def test_compressed_tensors_as_its_package_has_it(name: str, tmp_path):
    package = pytest.importorskip("compressed_tensors")
    settings, pack, _ = FORMS[name]
    parts, _ = pack(64, 192, 0)
    group = settings["config_groups"]["group_0"]
    compressor = package.compressors.BaseCompressor.get_value_from_registry(settings["format"])
    scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=group["weights"])
    expected = compressor.decompress(dict(parts), scheme)["weight"].float()
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    read = stored(tmp_path, settings)[0].read()
    torch.testing.assert_close(read.to(parts["weight_scale"].dtype).float(), expected, rtol=0, atol=0)
