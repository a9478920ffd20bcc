"""Loading: every form of a checkpoint gives the same model, and whatever is wrong with one is said in one line."""

import fnmatch
import json
import os
import re
import shutil
import struct
import time
import weakref
from pathlib import Path

import families
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import config
from checkpoint import Stored, load, resolve, to_hf


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """name of a case -> its checkpoint in one file, to be read only"""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = families.make_checkpoint(families.BY_NAME[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(written("llama-tied"), tmp_path / "spoiled")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shard(folder: Path, suffix: str, save, count: int = 3) -> None:
    """Write the tensors of model.safetensors into `count` files with an index."""
    names = sorted(tensors := weights(folder))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-{i % count + 1:05}-of-{count:05}.{suffix}" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save({name: tensors[name].clone() for name in names if weight_map[name] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def as_bin(folder: Path) -> None:
    """One pytorch_model.bin, which holds tied weights twice."""
    tensors = weights(folder)
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FORMS = {
    "shards": lambda folder: shard(folder, "safetensors", save_file),
    "bin": as_bin,
    "bin-shards": lambda folder: shard(folder, "bin", torch.save),
}


def bin_of(change, legacy: bool = False):
    """pytorch_model.bin with what `change` makes of the tensors; `legacy`: in the format before torch 1.6."""

    def write(folder: Path) -> None:
        content = change(weights(folder))
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        (folder / "model.safetensors").unlink()

    return write


def parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}


def with_gradients(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def twice(folder: Path) -> None:
    """Two shards, of which the one that sorts last holds other values of all that the first one holds."""
    tensors = weights(folder)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    first = sorted(tensors)[: len(tensors) // 2]
    save_file({name: tensors[name] for name in first}, folder / shards[0])
    save_file({name: t + 1 if name in first else t for name, t in tensors.items()}, folder / shards[1])
    weight_map = {name: shards[name not in first] for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


FORMS |= {
    "bin of parameters": bin_of(parameters),
    "bin with gradients": bin_of(with_gradients),
    "bin of torch 1.5": bin_of(dict, legacy=True),
    "bin of torch 1.5, parameters": bin_of(parameters, legacy=True),
    "a tensor in two shards": twice,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_model(form: str, written, folder):
    expected = load(written("llama-tied"))[0].state_dict()
    FORMS[form](folder)
    loaded = load(folder)[0].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(expected[name]) for name in expected)
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in load(folder)[0].parameters())


def test_shards_by_transformers(written, tmp_path):
    families.make_checkpoint(families.BY_NAME["qwen3"], tmp_path, shards=4)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected, loaded = (load(path)[0].state_dict() for path in (written("qwen3"), tmp_path))
    assert all(loaded[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-dense"])
def test_stacked_experts(name: str, suffix: str, written, tmp_path):
    """As transformers 5 writes them if it is asked to: what each expert by itself gives."""
    families.random_model(families.BY_NAME[name]).save_pretrained(tmp_path, save_original_format=False)
    stacks = {key: t for key, t in weights(tmp_path).items() if key.endswith(("experts.gate_up_proj", "down_proj"))}
    assert stacks and all(tensor.ndim == 3 for tensor in stacks.values())
    if suffix == "bin":
        torch.save(weights(tmp_path), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    for how in ({}, {"weights": "int8"}, {"dtype": "bf16"}):
        expected, loaded = (load(path, **how)[0].state_dict() for path in (written(name), tmp_path))
        assert loaded.keys() == expected.keys() and all(loaded[key].equal(expected[key]) for key in expected)


def text_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By its own names, if it is that of several modalities."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.UNUSED)}
    for outer, plain in checkpoint.INSIDE.items():
        own = {plain + name.removeprefix(outer) if name.startswith(outer) else name: own[name] for name in own}
    return own


@pytest.mark.parametrize("case", families.CASES, ids=str)
def test_to_hf_inverts_load(case, written, tmp_path):
    loaded, config = load(written(case.name))
    tensors, expected = to_hf(loaded.state_dict(), config), text_model(weights(written(case.name)))
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)
    save_file(tensors, tmp_path / "model.safetensors")


def test_model_is_ready_to_run(written):
    loaded, config = load(written("qwen2"), dtype=torch.bfloat16)
    assert config is loaded.config
    assert config.dtype == torch.bfloat16
    assert not loaded.training
    for parameter in loaded.parameters():
        assert (parameter.dtype, parameter.device.type) == (torch.bfloat16, "cpu")
        assert not parameter.requires_grad
        assert parameter.is_contiguous()


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "float64"])
def test_dtype_names(name: str, written):
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(name) or getattr(torch, name)
    assert load(written("llama-gqa"), dtype=name)[0].dtype == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_auto_dtype_is_the_configs(key: str, folder):
    families.change_config(folder, lambda raw: {k: v for k, v in raw.items() if k != "dtype"} | {key: "bfloat16"})
    assert load(folder)[0].dtype == torch.bfloat16


def test_a_dtype_that_nobody_names_is_the_tensors(folder):
    """As transformers loads it: gpt-oss and others name none."""
    families.change_config(folder, lambda raw: {k: v for k, v in raw.items() if k != "dtype"})
    assert load(folder)[0].dtype == torch.float32
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load(folder)[0].dtype == families.load_reference(folder, "auto").dtype == torch.bfloat16


def test_config_is_read_as_by_transformers(written):
    """Of two rope types the newer name counts; a window of null is none."""
    raw = json.loads((written("qwen2") / "config.json").read_text()) | {"rope_parameters": None}
    raw |= {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}
    raw |= {"layer_types": None, "max_window_layers": 0, "sliding_window": None, "use_sliding_window": True}
    read = config.ModelConfig.from_hf(raw)
    assert (read.rope["rope_type"], read.sliding_window) == ("default", None)


def test_every_family_has_a_table():
    assert checkpoint.WEIGHTS.keys() == config.FAMILIES.keys()


def test_harmless_tensors_are_ignored(folder):
    tensors = weights(folder)
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    load(folder)


def test_files_of_older_writers(written, tmp_path):
    """Without the outermost name (OPT), and with masks that were once stored (GPT-NeoX)."""
    for name, change in {
        "opt": lambda tensors: {key.removeprefix("model."): tensor for key, tensor in tensors.items()},
        "gpt_neox": lambda tensors: tensors | {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)},
    }.items():
        older = shutil.copytree(written(name), tmp_path / name)
        save_file(change(weights(older)), older / "model.safetensors")
        expected, loaded = (load(path)[0].state_dict() for path in (written(name), older))
        assert all(loaded[key].equal(expected[key]) for key in expected)


def test_one_tensor_at_a_time(written, monkeypatch):
    """What has been read from the files is let go before the next tensor is read."""
    alive, most, read = weakref.WeakSet(), [], Stored.read

    def watched(stored: Stored, *part) -> torch.Tensor:
        tensor = read(stored, *part)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Stored, "read", watched)
    load(written("llama-gqa"))
    assert len(most) == 21
    assert max(most) <= 2  # the last one until the next takes its name


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "mistral3-ministral"])
def test_text_model_of_several_modalities(name, written, tmp_path, capsys):
    """By both names that its tensors have; what is not used is named, and what is not known is an error."""
    folder = shutil.copytree(written(name), tmp_path / "other")
    tensors, (model, config) = weights(folder), load(folder)
    newer = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    newer |= {part: f"model.{part}" for part in ("vision_tower.", "multi_modal_projector.")}
    for old, new in newer.items():
        tensors = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}
    assert tensors.keys().isdisjoint(weights(folder))
    save_file(tensors, folder / "model.safetensors")
    assert all(map(torch.equal, model.parameters(), load(folder)[0].parameters()))
    unused = [n for n in tensors if "language_model" not in n and "lm_head" not in n]
    parts = {n.split(".")[1]: None for n in unused}
    assert checkpoint.main([str(folder)]) == 0
    assert f"not used {', '.join(parts)} ({len(unused)} tensors)\n" in capsys.readouterr().out
    families.change_config(folder, lambda raw: {n: v for n, v in raw.items() if n != "tie_word_embeddings"})
    assert load(folder)[1] == config  # the files tell
    save_file(tensors | {"model.audio_tower.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 not known: model.audio_tower.weight"):
        load(folder)
    families.change_config(folder, lambda raw: raw | {"text_config": [1]})
    with pytest.raises(ValueError, match=r"text_config must be an object, not \[1\]"):
        load(folder)


def test_report(written, folder, capsys, monkeypatch):
    """What is in there and what fits, without a weight being read; what does not match is one line and code 2."""
    with monkeypatch.context() as patch:
        patch.setattr(Stored, "read", pytest.fail)
        assert checkpoint.main([str(written("gemma2")), "--tokens", "50", "--memory", "0.001", "--budget", "0.1"]) == 0
    out = capsys.readouterr().out
    # 3 layers, windows of 20 in two of them; a token of a layer is 2 * 2 * 10 * 4 bytes.
    parameters = sum(tensor.numel() for tensor in weights(written("gemma2")).values())
    left = int(0.001 * 2**30) - 4 * parameters
    assert "gemma2, 3 layers, 2 of them with a window of 20" in out
    assert "reach    128 positions\n" in out
    assert "reach    128 positions (32 extended by rope type yarn)\n" in checkpoint.report(written("qwen3-yarn"))
    assert ", 7 experts of which a token takes 3\n" in checkpoint.report(written("qwen3_moe"))
    assert f"{parameters:,} parameters" in out and "480 bytes per token" in out
    assert f"{left // (90 * 160):,} sequences of 50 tokens full, {left // (15 * 160):,} squeezed" in out
    tensors_with(lambda tensors: tensors.pop(UP))(folder)
    assert checkpoint.main([str(folder)]) == 2
    assert checkpoint.main([str(written("gemma2")), "--budget", "1.5"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[0].endswith(f"1 missing: {UP}") and len(err.splitlines()) == 2


# What is wrong, how to bring it about, and what the one line must name.


def config_with(**changes):
    return lambda folder: families.change_config(folder, lambda raw: raw | changes)


def tensors_with(change):
    def spoil(folder: Path) -> None:
        tensors = weights(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def put(name: str, change):
    return tensors_with(lambda tensors: tensors.update({name: change(tensors.get(name))}))


def with_value(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def truncate(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def then(*steps):
    return lambda folder: [step(folder) for step in steps]


def lose_shard(folder: Path) -> None:
    FORMS["shards"](folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


INDEX = "model.safetensors.index.json"


def index_with(change):
    """Shards, and an index with what `change` made of its weight_map."""

    def spoil(folder: Path) -> None:
        FORMS["shards"](folder)
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def listed_as(name: str):
    """A shard under another name, in the index too."""

    def change(weight_map: dict[str, str]) -> None:
        for tensor, shard in weight_map.items():
            weight_map[tensor] = name if "00002" in shard else shard

    return index_with(change)


def linked_away(folder: Path) -> None:
    FORMS["shards"](folder)
    shard = folder / "model-00002-of-00003.safetensors"
    elsewhere = shard.rename(folder.parent / shard.name)
    shard.symlink_to(elsewhere)


def odd_bin(value, legacy: bool = False):
    return bin_of(lambda tensors: tensors | {UP: value(tensors[UP])}, legacy)


def raw_safetensors(header, data: bytes = b"", length: int | None = None):
    """A file of exactly this header; `length` is what it says of its header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    return lambda folder: (folder / "model.safetensors").write_bytes(start + text + data)


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), end: int = 8, start: int = 0) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def of_dtype(dtype: torch.dtype):
    return put(UP, lambda old: old.to(dtype))


A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
ROPE = {"rope_theta": 10000.0}
BROKEN = {
    "model type": (
        config_with(model_type="bert"),
        "model_type 'bert' is not supported: its fields are known, .* nearest supported one is",
    ),
    "no model type": (config_with(model_type=None), "model_type None"),
    "rope type": (config_with(rope_parameters=ROPE | {"rope_type": "spiral"}), "rope type 'spiral'.*llama3"),
    "older rope type": (config_with(rope_parameters=None, rope_scaling={"type": "spiral"}), "rope type 'spiral'"),
    "rope without factor": (config_with(rope_parameters=ROPE | {"rope_type": "linear"}), "factor.*None"),
    "partial rotary": (config_with(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "activation": (config_with(hidden_act="mish"), "hidden_act must be one of silu.*'mish'"),
    "quantization": (config_with(quantization_config={"quant_method": "hqq"}), "quantized.*hqq"),
    "only said to be quantized": (config_with(quantization_config={"quant_method": "awq"}), "awq.*no tensor ends in"),
    "dtype in config": (config_with(dtype="int8"), "dtype must be one of float16.*'int8'"),
    "heads": (config_with(num_attention_heads=5), "5 attention heads.*2 key-value"),
    "size": (config_with(hidden_size="48"), "hidden_size.*'48'"),
    "list in config": (config_with(rope_parameters=[1]), "config.json"),
    "broken config": (write("config.json", '{"model_type": '), "config.json.*Expecting value"),
    "config is no object": (write("config.json", "[]"), "config.json.*not a JSON object"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "truncated": (truncate("model.safetensors"), "model.safetensors cannot be read"),
    "not safetensors": (write("model.safetensors", "version https://git-lfs"), "model.safetensors cannot be read"),
    "empty file": (write("model.safetensors", ""), "model.safetensors cannot be read"),
    "truncated bin": (then(as_bin, truncate("pytorch_model.bin")), "pytorch_model.bin cannot be read"),
    "bin of something": (
        then(as_bin, lambda folder: torch.save([1], folder / "pytorch_model.bin")),
        "pytorch_model.bin cannot be read",
    ),
    "bin with code": (
        then(as_bin, lambda folder: torch.save({"x": Path("x")}, folder / "pytorch_model.bin")),
        "pytorch_model.bin cannot be read.*[Ww]eights.only",
    ),
    "lost shard": (lose_shard, "index.json lists model-00002-of-00003.safetensors, missing"),
    "truncated shard": (then(FORMS["shards"], truncate("model-00003-of-00003.safetensors")), "model-00003-of-00003"),
    "broken index": (then(FORMS["shards"], write("model.safetensors.index.json", "{")), "index.json: not JSON"),
    "index without map": (then(FORMS["shards"], write("model.safetensors.index.json", "{}")), "index.json.*weight_map"),
    "missing": (tensors_with(lambda tensors: tensors.pop(UP)), f"1 missing: {UP}$"),
    "unknown": (put("model.extra", lambda _: torch.ones(3)), "1 not known: model.extra$"),
    "more layers than config": (
        config_with(num_hidden_layers=1),
        r"9 not known: model\.layers\.1\.\S+, .* and 6 more$",
    ),
    "fewer layers than config": (config_with(num_hidden_layers=3), r"9 missing: model\.layers\.2\.\S+, .* and 6 more$"),
    "bias that config denies": (put(UP.replace("weight", "bias"), lambda _: torch.ones(88)), "up_proj.bias"),
    "shape": (put(UP, lambda old: old[:-1].clone()), rf"{UP} \[87, 48\] instead of \[88, 48\]"),
    "shape of a vector": (put(NORM, lambda old: old[None].clone()), rf"{NORM} \[1, 48\] instead of \[48\]"),
    "fused shape": (config_with(num_key_value_heads=3), r"k_proj.weight \[16, 48\] instead of \[24, 48\]"),
    "nan": (put(UP, with_value(float("nan"))), f"{UP} holds NaN"),
    "infinite": (put(NORM, with_value(float("-inf"))), f"{NORM} holds NaN or inf"),
    "integers": (put(UP, lambda old: old.to(torch.int8)), f"{UP} is torch.int8"),
    "float8": (of_dtype(torch.float8_e4m3fn), f"{UP} is torch.float8_e4m3fn; only floating"),
    "booleans": (of_dtype(torch.bool), f"{UP} is torch.bool"),
    "long integers": (of_dtype(torch.int64), f"{UP} is torch.int64"),
    "complex": (of_dtype(torch.complex64), f"{UP} is torch.complex64"),
    "name twice": (raw_safetensors(f"{{{A},{A}}}".encode(), bytes(8)), "model.safetensors cannot.*holds 'a' more than"),
    "offsets that overlap": (raw_safetensors({"a": entry(), "b": entry()}, bytes(8)), "cannot be read.*offset"),
    "offsets beyond": (raw_safetensors({"a": entry(end=16)}, bytes(8)), "cannot be read"),
    "shape beyond": (raw_safetensors({"a": entry(shape=(2**62, 4))}, bytes(8)), "cannot be read.*overflow"),
    "negative shape": (raw_safetensors({"a": entry(shape=(-1,))}, bytes(8)), "cannot be read"),
    "header too long": (raw_safetensors(b'{"a":', length=10**12), "cannot be read.*too large"),
    "header of 2 ** 64": (raw_safetensors(b"{}", length=2**64 - 1), "cannot be read"),
    "header is a list": (raw_safetensors(b"[" * 9999), "cannot be read"),
    "unknown dtype": (raw_safetensors({"a": entry("Q4")}, bytes(8)), "cannot be read.*Q4"),
    "no tensors": (raw_safetensors(b"{}"), "2 layers, but only 0 tensors"),
    "control characters": (put("\x1b[2J\nextra", lambda _: torch.ones(3)), r"not known: \\x1b\[2J extra$"),
    "long name": (put("n" * 9999, lambda _: torch.ones(3)), r"not known: n{77}\.\.\.$"),
    "weights are a folder": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "model.safetensors is no regular file",
    ),
    "weights are a pipe": (
        lambda folder: ((folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")),
        "model.safetensors is no regular file",
    ),
    "absolute shard": (listed_as("/etc/x.safetensors"), "index.json lists '/etc/x.safetensors', which is no"),
    "shard above": (listed_as("../x.safetensors"), r"lists '\.\./x.safetensors', which is no \.safetensors file in"),
    "shard around": (listed_as("x/../../x.safetensors"), r"lists 'x/\.\./\.\./x.safetensors', which is no"),
    "pickle as shard": (listed_as("x.bin"), r"lists 'x.bin', which is no \.safetensors file"),
    "number as shard": (listed_as(5), r"lists 5, which is no"),
    "nul in shard": (listed_as("x\0.safetensors"), "cannot|lists"),
    "long shard": (listed_as("x" * 999 + ".safetensors"), "."),
    "shard with escapes": (listed_as("\x1b[2J.safetensors"), r"lists \\x1b\[2J.safetensors, missing"),
    "linked away": (linked_away, "lists 'model-00002-of-00003.safetensors', a link out of that folder"),
    "empty map": (then(FORMS["shards"], write(INDEX, '{"weight_map": {}}')), "no weight_map"),
    "list as map": (then(FORMS["shards"], write(INDEX, '{"weight_map": []}')), "no weight_map"),
    "not in index": (index_with(lambda names: names.pop(UP)), f"index.json does not list {UP}, which its files hold"),
    "in another shard": (
        index_with(lambda names: names.update({UP: next(shard for shard in names.values() if shard != names[UP])})),
        f"1 missing: {UP}$",
    ),
    "no names in bin": (bin_of(lambda tensors: dict(enumerate(tensors.values()))), "cannot be read: 0 is no name"),
    "state_dict in bin": (bin_of(lambda tensors: {"state_dict": tensors}), "'state_dict' is no tensor but.*dict'"),
    "epoch in bin": (bin_of(lambda tensors: tensors | {"epoch": 3}), "'epoch' is no tensor but.*int'"),
    "epoch in older bin": (bin_of(lambda tensors: tensors | {"epoch": 3}, True), "'epoch' is no tensor but.*int'"),
    "list in bin": (bin_of(lambda tensors: list(tensors.values())), "holds no tensors by name but.*list'"),
    "sparse in bin": (odd_bin(lambda tensor: tensor.to_sparse()), "up_proj.weight' is sparse, nested, quantized or"),
    "rows in bin": (odd_bin(lambda tensor: tensor.to_sparse_csr()), "up_proj.weight' is sparse, nested, quantized or"),
    "meta in bin": (odd_bin(lambda tensor: tensor.to("meta")), "up_proj.weight' is .*without values"),
    "quantized in bin": (
        odd_bin(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
        "up_proj.weight' is sparse, nested, quantized or",
    ),
    "complex in bin": (odd_bin(lambda tensor: tensor.to(torch.complex64)), f"{UP} is torch.complex64"),
    "code in older bin": (
        bin_of(lambda tensors: {"x": Path("x")}, legacy=True),
        "pytorch_model.bin cannot be read: weights-only loading refuses it: Unsupported",
    ),
    "truncated older bin": (
        then(bin_of(dict, legacy=True), truncate("pytorch_model.bin")),
        "pytorch_model.bin cannot be read",
    ),
    "text as bin": (
        then(as_bin, write("pytorch_model.bin", "version https://git-lfs")),
        "pytorch_model.bin cannot be read: weights-only loading refuses it: .",
    ),
    "another head": (
        put("lm_head.weight", lambda _: torch.ones(101, 48)),
        "tie_word_embeddings.*lm_head.weight differs",
    ),
}


def the_line(*args, **kwargs) -> str:
    """What `load` complains of, in one line."""
    with pytest.raises(ValueError) as caught:
        load(*args, **kwargs)
    assert "\n" not in (line := str(caught.value))
    return line


@pytest.mark.parametrize(("spoil", "names"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint(spoil, names: str, folder):
    spoil(folder)
    line = the_line(folder)
    assert re.search(names, line), line


def test_names_that_become_one(written, tmp_path):
    """OPT's tensors with and without the outermost name, in one file."""
    folder = shutil.copytree(written("opt"), tmp_path / "both")
    name = "model.decoder.embed_positions.weight"
    tensors_with(lambda tensors: tensors.update({name.removeprefix("model."): tensors[name] + 1}))(folder)
    assert re.search(r"decoder\.\S+ and \S*decoder\.\S+ are the same tensor", the_line(folder))


def test_index_lists_more_than_the_files_hold(written, tmp_path):
    """The hub's converter takes a second name of a tied tensor out of the files, and leaves it in the index."""
    folder = shutil.copytree(written("llama-tied"), tmp_path / "converted")
    index_with(lambda names: names.update({"lm_head.weight": names[UP]}))(folder)
    assert load(folder)[1].tie_embeddings


def test_tied_tensor_under_its_other_name(written, tmp_path):
    """safetensors' own save_model keeps one of two names, the one that sorts first; transformers reads both."""
    for name in ("llama-tied", "opt", "gemma2"):
        model, config = load(written(name))
        folder = shutil.copytree(written(name), tmp_path / name)
        embed = checkpoint.WEIGHTS[config.model_type](config)["embed"][0] + ".weight"
        tensors_with(lambda tensors, embed=embed: tensors.update({"lm_head.weight": tensors.pop(embed)}))(folder)
        assert torch.equal(load(folder)[0].embed.weight, model.embed.weight)


def test_hub_cache_links(written, tmp_path):
    """The hub's cache keeps files beside its snapshots and links to them; so did its older downloads to a folder."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(written("llama-gqa"), snapshot)
    FORMS["shards"](snapshot)
    (blobs := snapshot.parent.parent / "blobs").mkdir()
    for number, file in enumerate([*snapshot.iterdir()]):
        file.rename(blobs / f"{number:064}")
        file.symlink_to(Path("..", "..", "blobs", f"{number:064}"))
    (link := tmp_path / "link").symlink_to(snapshot)
    (local := tmp_path / "local").mkdir()
    for file in snapshot.iterdir():
        (local / file.name).symlink_to(file.resolve())
    for folder in (snapshot, link, local):
        assert load(folder)[1].vocab_size == 101


HUGE = [10**12, 10**18, 2**31 - 1, 4096, 10**5]


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "qwen3_moe-dense", "opt", "falcon-grouped", "smollm3"])
def test_sizes_that_the_files_do_not_have(name: str, written, tmp_path):
    """One line at once, whatever size config.json says, and no model of that size is built."""
    folder = shutil.copytree(written(name), tmp_path / "huge")
    raw = json.loads((folder / "config.json").read_text())
    sizes = {"num_hidden_layers", "vocab_size", "hidden_size", "num_local_experts", "ffn_hidden_size", "ffn_dim"}
    sizes |= {
        "intermediate_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "head_dim",
        "num_kv_heads",
        "num_key_value_heads",
    }
    if name == "opt":
        sizes |= {"max_position_embeddings"}
    for field in sizes & raw.keys():
        for size in HUGE:
            small = {"no_rope_layers": None, "layer_types": None} if name == "smollm3" else {}
            (folder / "config.json").write_text(json.dumps(raw | small | {field: size}))
            start = time.process_time()
            assert len(the_line(folder)) < 500
            assert time.process_time() - start < 2, (field, size)


def test_overflow_of_fp16(folder):
    put(UP, with_value(7e4))(folder)
    load(folder, dtype="bf16")
    assert f"{UP} overflows torch.float16" in the_line(folder, dtype="fp16")
    put(UP, with_value(float("inf")))(folder)
    assert f"{UP} holds NaN or infinite" in the_line(folder, dtype="fp16")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "cpu:1", ""])
def test_device_that_is_not_there(device: str, folder):
    assert re.search(f"device '{device}' is not available; there is cpu", the_line(folder, device=device))


@pytest.mark.parametrize("dtype", ["int8", "double", torch.int8, ""])
def test_unknown_dtype(dtype, folder):
    assert re.search(f"dtype '{dtype}' is not supported; use auto, bfloat16", the_line(folder, dtype=dtype))


# Where a checkpoint is.


@pytest.mark.parametrize(
    "path", ["/missing/folder", "./missing", "../missing", "~/missing", "~nobody-here/x", "a/b/c", "a b", "x/"]
)
def test_missing_folder(path: str, monkeypatch):
    """What cannot be a hub id is never asked for there."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    assert the_line(path) == f"checkpoint folder {path} does not exist"


def test_folder_that_is_none(tmp_path):
    assert the_line(tmp_path) == f"checkpoint folder {tmp_path} is empty"
    (tmp_path / "config.json").write_text("{}")
    assert "config.json is a file" in the_line(tmp_path / "config.json")


def test_existing_folder_goes_before_the_hub(written, tmp_path, monkeypatch):
    shutil.copytree(written("llama-gqa"), tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    assert resolve("org/name") == Path("org/name")


SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt"]
SMALL += ["chat_template.jinja", "README.md"]
OTHERS = ["original/params.json", "onnx/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "x.gguf"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("weight_files", "wanted"),
    [
        (["model.safetensors", *OTHERS], ["model.safetensors"]),
        (["model.safetensors.index.json", *SHARDS, *OTHERS], ["model.safetensors.index.json", *SHARDS]),
        (OTHERS, ["pytorch_model.bin"]),
    ],
    ids=["single", "shards", "bin"],
)
def test_hub_gives_one_copy(weight_files, wanted, tmp_path, monkeypatch):
    """Of a repository only config, tokenizer and one copy of the weights are fetched."""
    index = json.dumps({"weight_map": {str(i): shard for i, shard in enumerate(SHARDS)}})

    def snapshot_download(repo: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo == "org/name"
        for file in SMALL + weight_files:
            allowed = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text(index if file.endswith("index.json") else "{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/name") == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*SMALL[:-1], *wanted])


def test_hub_offline(written, tmp_path, monkeypatch):
    """Without a network a cached checkpoint loads, and another one is an error of one line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    shutil.copytree(written("llama-gqa"), repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load("org/name")[1].vocab_size == 101
    assert the_line("org/other").startswith("org/other is no folder here, and the hub did not give it: ")
    assert the_line("org/a--b").startswith("org/a--b is no folder here, and the hub did not give it: ")
