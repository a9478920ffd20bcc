"""GGUF files, written here by the package's own writer as llama.cpp's converter would write them."""

import json
import re
import shutil
import struct
import time
import weakref
from pathlib import Path
from typing import Any

import families
import get_model
import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from conftest import quick
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from test_tokenizer import TEXTS, one_line_error, train_bytes, train_pieces
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

import chat
import checkpoint
import gguf_file
import tokenizer
from errors import UserError

GEMMA = families.GEMMA | {"query_pre_attn_scalar": 10}
CASES = {
    case.name: case
    for case in [
        *(
            families.BY_NAME[name]
            for name in """llama-gqa llama-tied llama-biases llama-head-dim llama-linear llama-llama3 mistral-no-window
            qwen2-older qwen3 qwen3-biases qwen3-yarn gpt_neox gpt_neox-sequential falcon falcon-grouped falcon-one-norm
            phi3 phi3-short phi3-long mixtral qwen3_moe olmoe granite olmo2 olmo2-biases olmo3""".split()
        ),
        families.case(
            "smollm3", num_hidden_layers=5, no_rope_layer_interval=4, pad_token_id=None, tie_word_embeddings=True
        ),
        families.case("llama-yarn", rope=families.YARN | {"mscale": 1.0, "mscale_all_dim": 0.4}),
        families.case("llama-eps", rms_norm_eps=1e-2),
        families.case("falcon-eps", **families.FALCON, multi_query=True, bias=True, layer_norm_epsilon=1e-2),
        families.case("gpt_neox-eps", **families.NEOX, layer_norm_eps=1e-2, rope={"partial_rotary_factor": 0.5}),
        # The scale of attention is in no metadata: it is the size of a head, but in the largest model of each.
        families.case("gemma2", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        families.case("gemma2-27b", **GEMMA | {"num_hidden_layers": 46, "query_pre_attn_scalar": 8}),
        families.case("gemma3_text", **GEMMA, sliding_window_pattern=2, rope_parameters=families.GEMMA3_ROPE),
        families.case("llama-blocks", hidden_size=192, intermediate_size=256, num_key_value_heads=3),
    ]
}
ROOT = Path(__file__).resolve().parent.parent
# With what transformers takes for granted in a GGUF file: the heads of published models, the period of their windows.
USUAL = {
    case.name: case
    for case in [
        families.case("llama-usual"),
        families.case("qwen2-usual", use_sliding_window=False),
        families.case("qwen3-usual", head_dim=128),
        families.case("phi3-usual", sliding_window=None, pad_token_id=0),
        families.case("gemma2-usual", **families.GEMMA | {"head_dim": 256, "query_pre_attn_scalar": 256}),
        families.case("gemma3_text-usual", **families.GEMMA | {"head_dim": 256, "query_pre_attn_scalar": 256}),
    ]
}
ARCHITECTURE = {"mistral": "llama", "mixtral": "llama", "gpt_neox": "gptneox", "gemma3_text": "gemma3"}
ARCHITECTURE |= {"olmo3": "olmo2", "qwen3_moe": "qwen3moe"}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant:"


def to_gguf(folder: Path, path: Path, kind: Kind = Kind.F32, **changes: Any) -> Path:
    """Write the Hugging Face folder as a GGUF file: names by the package's own map, matrices as `kind`, and what the
    converter of llama.cpp does to each family's weights. Changes of None leave that out of the metadata.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    family = config["model_type"]
    arch = ARCHITECTURE.get(family, family)
    metadata = {**metadata_of(config, arch), **changes}
    known = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config["num_hidden_layers"]
    )
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", arch))
    for name, value in metadata.items():
        add(writer, name.replace("ARCH", arch), value)
    for name, values in {**stacked(tensors, config), **rope_factors(config)}.items():
        module, _, ending = name.rpartition(".")
        ours = name if name.startswith("rope") else f"{known.get_name(module)}.{ending}"
        values = converted(values, ours, config, arch)
        matrix = values.ndim > 1 and not name.startswith("rope")
        writer.add_tensor(ours, gguf.quantize(values, kind) if matrix else values, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_int64(name, value) if value < 0 else writer.add_uint64(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def metadata_of(config: dict[str, Any], arch: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    older = config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    if arch == "falcon":
        kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    eps = config.get("rms_norm_eps") or config.get("layer_norm_eps") or config.get("layer_norm_epsilon")
    norm = "layer_norm" if arch in ("falcon", "gptneox") else "layer_norm_rms"
    metadata = {
        "ARCH.block_count": config["num_hidden_layers"],
        "ARCH.context_length": config.get("max_position_embeddings", 2048),
        "ARCH.embedding_length": config["hidden_size"],
        "ARCH.feed_forward_length": config.get("intermediate_size") or config["ffn_hidden_size"],
        "ARCH.attention.head_count": config["num_attention_heads"],
        "ARCH.attention.head_count_kv": kv_heads,
        f"ARCH.attention.{norm}_epsilon": eps,
        "ARCH.rope.freq_base": float(theta),
        "ARCH.rope.dimension_count": int(dim * rope.get("partial_rotary_factor", 1.0)),
        "ARCH.expert_count": config.get("num_local_experts", config.get("num_experts")),
        "ARCH.expert_feed_forward_length": config.get("moe_intermediate_size"),
        "ARCH.expert_used_count": config.get("num_experts_per_tok"),
        "ARCH.use_parallel_residual": config.get("use_parallel_residual"),
        "ARCH.attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "ARCH.final_logit_softcapping": config.get("final_logit_softcapping"),
        "ARCH.embedding_scale": config.get("embedding_multiplier"),
        "ARCH.attention.scale": config.get("attention_multiplier"),
        "ARCH.residual_scale": config.get("residual_multiplier"),
        "ARCH.logit_scale": config.get("logits_scaling"),
    }
    if "head_dim" in config:
        metadata |= {"ARCH.attention.key_length": dim, "ARCH.attention.value_length": dim}
    if arch in ("gemma2", "gemma3") or config["model_type"] == "olmo3":
        metadata |= {"ARCH.attention.sliding_window": config["sliding_window"]}
    if arch == "gemma3" or config["model_type"] == "olmo3":
        windows = [kind == "sliding_attention" for kind in config["layer_types"]]
        metadata |= {"ARCH.attention.sliding_window_pattern": windows}
        metadata |= {"ARCH.rope.freq_base_swa": config["rope_parameters"]["sliding_attention"]["rope_theta"]}
    kind = rope.get("rope_type") or older.get("rope_type", "default")
    if kind == "linear":
        metadata |= {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        rope = older or rope
        names = {"factor": "factor", "original_max_position_embeddings": "original_context_length"}
        names |= {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "mscale_all_dim": "yarn_log_multiplier"}
        metadata |= {"ARCH.rope.scaling.type": "yarn"}
        metadata |= {f"ARCH.rope.scaling.{key}": rope[name] for name, key in names.items() if name in rope}
    if arch == "phi3":
        original = config.get("original_max_position_embeddings", 4096)
        metadata |= {"ARCH.attention.sliding_window": config.get("sliding_window") or 0}
        metadata |= {"ARCH.rope.scaling.original_context_length": original}
        if kind == "longrope":
            stretched = max(1.0, config["max_position_embeddings"] / original)
            factor = (1 + np.log(stretched) / np.log(original)) ** 0.5
            metadata |= {"ARCH.rope.scaling.attn_factor": float(factor)}
    return metadata


def rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        names = {f"rope_factors_{length}.weight": rope[f"{length}_factor"] for length in ("short", "long")}
        return {name: np.array(factors, np.float32) for name, factors in names.items()}
    if kind == "llama3":
        dim = config["hidden_size"] // config["num_attention_heads"]
        length, low, high = (
            rope[f"{n}"] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        factors = []
        for n in range(0, dim, 2):
            wavelength = 2 * np.pi * rope["rope_theta"] ** (n / dim)
            smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        return {"rope_freqs.weight": np.array(factors, np.float32)}
    return {}


def stacked(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Experts in one tensor."""
    found: dict[str, Any] = {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(w\d|\w+_proj)\.weight", name):
            found.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
        else:
            found[name] = values
    return {n: np.stack([v[e] for e in sorted(v)]) if isinstance(v, dict) else v for n, v in found.items()}


def converted(values: np.ndarray, name: str, config: dict[str, Any], arch: str) -> np.ndarray:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if arch in ("llama", "smollm3", "granite") and (match := re.search(r"attn_([qk])\.", name)):
        count = heads if match[1] == "q" else kv_heads
        values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        values = values + 1
    if "attn_qkv" in name and arch in ("gptneox", "falcon"):
        if arch == "falcon":
            kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
        each = values.reshape(kv_heads, heads // kv_heads + 2, -1, *values.shape[1:])
        parts = [each[:, :-2], each[:, -2], each[:, -1]]
        values = np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
    return np.ascontiguousarray(values)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """name of a case -> its Hugging Face folder, to be read only; the weights are exact in 16 bits and plus 1"""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = families.make_checkpoint((CASES | USUAL)[name], tmp_path_factory.mktemp(name))
            tensors = load_file(made[name] / "model.safetensors")
            rounded = {key: (tensor * 128).round().clamp(-1000, 1000) / 128 for key, tensor in tensors.items()}
            save_file(rounded, made[name] / "model.safetensors", {"format": "pt"})
        return made[name]

    return make


def same(path: Path, folder: Path) -> None:
    (model, config), (expected, told) = checkpoint.load(path, dtype="float32"), checkpoint.load(folder)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert config.rope_by_length == told.rope_by_length
    ids = families.token_ids(2, 40)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), expected(ids), rtol=1e-4, atol=1e-5)
    assert config.max_positions == told.max_positions and config.windowed == told.windowed


@pytest.mark.parametrize("name", quick(*(set(CASES) - {"gemma2-27b"}), of=CASES))
def test_equals_the_folder_it_was_made_of(name: str, written, tmp_path):
    folder = written(name)
    same(to_gguf(folder, tmp_path / "model.gguf"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", USUAL)
def test_equals_transformers_reading_of_the_file(name: str, written, tmp_path):
    changes = {"ARCH.vocab_size": 101, "general.name": name, **vocabulary("gpt2"), "tokenizer.ggml.padding_token_id": 0}
    changes |= {"ARCH.attention.sliding_window_pattern": None, "ARCH.rope.freq_base_swa": None}
    if name.startswith("phi3"):  # of which it reads no window; 0 is none
        changes |= {"ARCH.attention.sliding_window": 0}
    path = to_gguf(written(name), tmp_path / "model.gguf", **changes)
    reference = families.load_reference(tmp_path, gguf_file=path.name)
    ids = families.token_ids(2, 40)
    with torch.inference_mode():
        torch.testing.assert_close(checkpoint.load(path)[0](ids), reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_every_architecture_has_a_case():
    families_tested = {CASES[name].config["model_type"] for name in CASES} - {"mistral"}
    assert families_tested == {architecture.model_type for architecture in gguf_file.ARCHITECTURES.values()}


MADE = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]  # the package can write these


@pytest.mark.parametrize("kind", quick(Kind.F16, Kind.BF16, Kind.Q4_1, of=MADE))
def test_quantized_matrices(kind: Kind, written, tmp_path):
    """The folder gets the values that the blocks hold. Blocks lie within rows, and only rows change their places."""
    folder = shutil.copytree(written("llama-blocks"), tmp_path / "folder")
    path = to_gguf(folder, tmp_path / "model.gguf", kind)
    expected = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
        if tensor.ndim > 1
        else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(expected, folder / "model.safetensors", {"format": "pt"})
    same(path, folder)
    stored = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert checkpoint.load(path)[0].dtype == stored


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes hold scales that are not finite
def test_each_kind_of_block(tmp_path, monkeypatch):
    """Whatever the package dequantizes reads as it says, a few rows at a time; the others are one line."""
    monkeypatch.setattr(gguf_file, "CHUNK", 1000)
    generator, refused = np.random.default_rng(0), set()
    for kind in Kind:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, (7, 512 // min(block, 512) * size), np.uint8)
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("blk.0.x.weight", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            expected = gguf.dequantize(data, kind)
        except NotImplementedError:
            refused.add(kind)
            one_line_error(lambda path=path: gguf_file.tensors(path), kind.name, "gguf", "another quantization")
            continue
        (tensor,) = gguf_file.tensors(path)
        assert tensor.shape == list(expected.shape)
        assert np.array_equal(tensor.read().numpy(), expected, equal_nan=True)
    assert {Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0}.isdisjoint(refused) and Kind.Q8_K in refused


def test_auto_dtype_and_padded_vocabulary(written, tmp_path):
    path = to_gguf(written("llama-gqa"), tmp_path / "model.gguf", **vocabulary("gpt2"))
    assert checkpoint.outline(path)[0].vocab_size == 101 < len(vocabulary("gpt2")["tokenizer.ggml.tokens"])
    assert "llama, 2 layers" in checkpoint.report(path)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_shards(name: str, written, tmp_path):
    whole = to_gguf(written(name), tmp_path / "whole.gguf")
    reader, paths = gguf.GGUFReader(whole), [tmp_path / f"model-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if key.startswith("llama."):
                add(writer, key, field.contents())
        for key, value in (("no", number), ("count", 3), ("tensors.count", len(reader.tensors))):
            writer.add_uint16(f"split.{key}", value)
        for tensor in reader.tensors[number::3]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    same(paths[0], written(name))
    assert "in 3 file(s)" in checkpoint.report(paths[0])
    one_line_error(lambda: checkpoint.load(paths[1]), "shard 2 of 3", "-00001-of-00003.gguf")
    paths[2].unlink()
    gguf_file.read_header.cache_clear()
    one_line_error(lambda: checkpoint.load(paths[0]), "model-00003-of-00003.gguf")


def test_memory_of_one_tensor_at_a_time(written, tmp_path, monkeypatch):
    path, alive = to_gguf(written("llama-gqa"), tmp_path / "model.gguf"), []
    read = gguf_file.Stored.read

    def counted(stored):
        assert not any(each() is not None for each in alive), "an earlier tensor is still there"
        tensor = read(stored)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(gguf_file.Stored, "read", counted)
    checkpoint.load(path)
    assert len(alive) == 21


# Tokenizers


def vocabulary(kind: str, pre: str = "gpt-2") -> dict[str, Any]:
    """The metadata of a tokenizer that is trained here."""
    if kind == "llama":
        model = sentencepiece.SentencePieceProcessor(model_proto=pieces())
        ids = range(model.vocab_size())
        flags = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
        types = [next((kind for kind, is_so in flags.items() if is_so(i)), 1) for i in ids]
        tokens = [model.id_to_piece(i) for i in ids]
        types = [4 if token in USER else kind for token, kind in zip(tokens, types, strict=True)]
        more = {"scores": [model.get_score(i) for i in ids], "unknown_token_id": model.unk_id()}
        tokens = [token.replace("\u2581", " ") if token in USER else token for token in tokens]
    else:
        saved = json.loads(trained(pre).to_str())
        tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
        types = [3 if token in ("<|endoftext|>", "<s>", "</s>") else 4 if token == "<think>" else 1 for token in tokens]
        more = {"merges": [" ".join(merge) for merge in saved["model"]["merges"]], "pre": pre}
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.chat_template": TEMPLATE,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


USER = ["\u2581\u2581", "\u2581\u2581\u2581\u2581", "<tag>"]


def pieces() -> bytes:
    if not hasattr(pieces, "made"):
        pieces.made = train_pieces(user_defined_symbols=USER)
    return pieces.made


SPLITS = {
    "gpt-2": ([], True),
    "smollm": ([pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")], True),  # llama.cpp: each digit, then GPT-2's
    "llama-bpe": ([pre_tokenizers.Split(Regex(tokenizer.LLAMA3_WORDS), "isolated")], False),
    "qwen2": ([pre_tokenizers.Split(Regex(tokenizer.QWEN_WORDS), "isolated")], False),
}


def trained(pre: str) -> tokenizers.Tokenizer:
    if pre not in TRAINED:
        splits, regex = SPLITS[pre]
        TRAINED[pre] = train_bytes(*splits, use_regex=regex)
    return TRAINED[pre]


TRAINED: dict[str, tokenizers.Tokenizer] = {}


def only_tokenizer(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        add(writer, name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level(pre: str, tmp_path):
    backend = trained(pre)
    loaded = tokenizer.load(only_tokenizer(tmp_path / "model.gguf", vocabulary("gpt2", pre)))
    for text in [*TEXTS, "x  12 \n 3", "1234567 don't"]:
        assert loaded.encode(text, special=False) == backend.encode(text).ids or pre in ("qwen2", "llama-bpe")
        assert loaded.decode(loaded.encode(text)) == text or pre == "qwen2"  # which composes characters
    name, bos = "<s>", backend.token_to_id("<s>")
    assert loaded.encode(f"a{name}", parse_special=True, special=False)[-1] == bos
    assert bos not in loaded.encode(f"a{name}", special=False)
    assert (loaded.encode("a")[0] == bos) == (pre == "llama-bpe")  # llama.cpp's default for this kind


def test_words_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    splits = getattr(theirs, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if splits is None:
        pytest.skip("this transformers has no such table")
    assert {pre: splits[pre] for pre in gguf_file.WORDS} == gguf_file.WORDS


def test_sentencepiece(tmp_path):
    """As the model that its tokens, scores and types were taken from."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.model").write_bytes(pieces())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "folder" / "tokenizer_config.json").write_text(json.dumps(named))
    expected = tokenizer.load(tmp_path / "folder")
    loaded = tokenizer.load(only_tokenizer(tmp_path / "model.gguf", vocabulary("llama")))
    texts = [*TEXTS, "a  b    c<tag>d", "unknown \u4e00\u9fa0"]
    for text in texts:
        for options in ({}, {"special": False}, {"parse_special": True}):
            assert loaded.encode(text + "</s>", **options) == expected.encode(text + "</s>", **options)
        ids = expected.encode(text)
        assert loaded.decode(ids) == expected.decode(ids)
    assert loaded.vocab_size == expected.vocab_size and loaded.special_ids == expected.special_ids
    bare = vocabulary("llama") | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    assert tokenizer.load(only_tokenizer(tmp_path / "bare.gguf", bare)).encode("a  b") != expected.encode("a  b")
    assert (
        tokenizer.load(only_tokenizer(tmp_path / "bare.gguf", bare)).decode([*expected.encode("a b", False)]) == " a b"
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_chat_and_ends(kind: str, tmp_path):
    metadata = vocabulary(kind)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.add_bos_token": True}
    path = only_tokenizer(
        tmp_path / "model.gguf",
        metadata | {f"llama.{name}": 1 for name in (*gguf_file.NEEDED, "attention.layer_norm_epsilon")},
    )
    loaded = tokenizer.load(path)
    assert tokenizer.eos_ids(path) == {7, tokens.index("</s>")}
    assert loaded.encode("a")[0] == tokens.index("<s>")
    prompt = chat.load(path, loaded).prompt([{"role": "user", "content": "hi </s>"}])
    assert prompt.count(tokens.index("<s>")) == 2 and prompt.count(tokens.index("</s>")) == 1
    without = {name: value for name, value in metadata.items() if name != "tokenizer.chat_template"}
    bare = only_tokenizer(tmp_path / "bare.gguf", without)
    assert chat.load(bare, loaded) is None
    assert tokenizer.load(only_tokenizer(tmp_path / "none.gguf", {})) is None


# What is wrong with a file is one line


def everything(path: Path) -> None:
    """What the command lines do with a checkpoint."""
    folder = checkpoint.resolve(path)
    loaded = tokenizer.load(folder)
    if loaded is not None:
        chat.load(folder, loaded)
    tokenizer.eos_ids(folder)
    checkpoint.load(folder)


@pytest.mark.parametrize(
    "changes, words",
    {
        "architecture": ({"architecture": "mamba"}, ["'mamba'", "supported: falcon, gemma2"]),
        "layers": ({"ARCH.block_count": 10**12}, ["1000000000000"]),
        "experts": ({"ARCH.expert_count": 10**9, "ARCH.expert_used_count": 1}, ["num_local_experts", "1000000000"]),
        "text": ({"ARCH.embedding_length": "many"}, ["hidden_size", "'many'"]),
        "none": ({"ARCH.attention.head_count": None}, ["attention.head_count"]),
        "zero": ({"ARCH.attention.head_count": 0}, ["num_attention_heads", "0"]),
        "list": ({"ARCH.feed_forward_length": [88, 88]}, ["intermediate_size"]),
        "shape": ({"ARCH.attention.head_count_kv": 3}, ["blk.0.attn_k.weight", "3 heads"]),
        "values": ({"ARCH.attention.value_length": 4}, ["keys and values"]),
        "yarn": (
            {"ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.factor": 4.0, "ARCH.rope.scaling.attn_factor": 1.5},
            ["rope.scaling.attn_factor 1.5", "only 1.0"],
        ),
        "rotary": ({"ARCH.rope.dimension_count": 4}, ["partial_rotary_factor 0.5"]),
        "kind": ({"tokenizer.ggml.model": "rwkv"}, ["'rwkv'", "gpt2 and llama"]),
        "pre": ({"tokenizer.ggml.pre": "viking"}, ["'viking'", "smollm", "llama-bpe"]),
        "tokens": ({"tokenizer.ggml.tokens": [1, 2]}, ["tokenizer.ggml.tokens"]),
        "types": ({"tokenizer.ggml.token_type": [1, 9]}, ["token_type", "1 to 6"]),
        "merges": ({"tokenizer.ggml.merges": ["a b c"]}, ["tokenizer.ggml.merges"]),
        "merge": ({"tokenizer.ggml.merges": ["never seen"]}, ["tokenizer is broken", "never"]),
        "eos": ({"tokenizer.ggml.eos_token_id": 10**6}, ["eos_token_id 1000000"]),
        "template": ({"tokenizer.chat_template": "{% if"}, ["chat template"]),
        "shard": ({"split.count": 2, "split.no": 0}, ["shard 1 of 2"]),
    }.values(),
)
def test_wrong_metadata(changes: dict[str, Any], words: list[str], written, tmp_path):
    path = to_gguf(written("llama-gqa"), tmp_path / "model.gguf", **vocabulary("gpt2") | changes)
    one_line_error(lambda: everything(path), *words)


def test_any_type_of_any_field(written, tmp_path):
    """Loads, or is one line."""
    folder = written("gemma3_text")
    plain = metadata_of(json.loads((folder / "config.json").read_text()), "gemma3")
    tokens = vocabulary("gpt2")
    bare = {name: value for name, value in tokens.items() if "template" not in name}  # which takes long to parse
    for name in plain | tokens:
        others = {} if name in plain else tokens if "template" in name else bare
        for value in (-1, 0, 2**63, float("nan"), "text", True, [1, 2], ["a"]):
            try:
                everything(to_gguf(folder, tmp_path / "model.gguf", **others | {name: value}))
            except UserError as error:
                assert "\n" not in str(error), (name, value)


def test_missing_and_unknown_tensors(written, tmp_path):
    path = to_gguf(written("llama-gqa"), tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    one_line_error(lambda: checkpoint.load(path), "missing: blk.1.ffn_up.weight", "not known: blk.1.ffn_uq.weight")


def test_truncated_and_damaged(written, tmp_path):
    """Every file that ends early is one line; one with changed bytes is that or loads. None takes long."""
    metadata = {name: value for name, value in vocabulary("gpt2").items() if "template" not in name}
    data = to_gguf(written("llama-tied"), tmp_path / "model.gguf", **metadata).read_bytes()
    header = data.index(b"token_embd.weight") + 2000
    path, generator = tmp_path / "spoiled.gguf", np.random.default_rng(0)
    for size in [0, 3, 4, 8, 23, *generator.integers(24, len(data), 60).tolist(), len(data) - 1]:
        path.write_bytes(data[:size])
        one_line_error(lambda: everything(path), "spoiled.gguf", *(["ends before byte"] if size > header else []))
    start, loaded = time.monotonic(), 0
    for position in generator.integers(0, header, 120).tolist():
        spoiled = bytearray(data)
        spoiled[position : position + 8] = struct.pack("<Q", int(generator.integers(0, 2**63)))
        path.write_bytes(spoiled)
        try:
            everything(path)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert loaded < 120 and time.monotonic() - start < 60


def test_no_such_file(tmp_path):
    (tmp_path / "text.gguf").write_text("not a model")
    one_line_error(lambda: everything(tmp_path / "text.gguf"), "text.gguf", "GGUF")
    (tmp_path / "model.gguf").mkdir()
    one_line_error(lambda: everything(tmp_path / "model.gguf"), "is empty")
    (tmp_path / "weights.bin").touch()
    one_line_error(lambda: everything(tmp_path / "weights.bin"), "is a file", ".gguf")
    one_line_error(lambda: everything(tmp_path), "config.json", "model.gguf")


# Real files: scripts/get_model.py gets them


TEXT_FILES = """README.md scripts/article.txt checkpoints/tiny/demo_prompt.txt engine.py
checkpoints/tiny/README.md""".split()


@pytest.fixture(scope="module", params=get_model.MODELS)
def real(request):
    path = get_model.FOLDER / get_model.MODELS[request.param].file
    if not path.exists():
        pytest.skip(f"{path} is not there; python scripts/get_model.py {request.param} gets it")
    return path


@pytest.mark.real
def test_real_logits(real):
    """Beyond Gemma's window of 512 tokens."""
    ids = torch.tensor([tokenizer.load(real).encode((ROOT / "scripts" / "article.txt").read_text())[:640]])
    model, _ = checkpoint.load(real)
    reference = families.load_reference(real.parent, gguf_file=real.name)
    with torch.inference_mode():
        ours, theirs = model(ids), reference(ids).logits
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    print(f"{real.name}: largest difference of a logit {difference:.1e} of the largest logit")
    assert difference < 1e-4


@pytest.mark.real
def test_real_tokens(real):
    theirs = AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name)
    ours = tokenizer.load(real)
    whole = "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXT_FILES)
    texts = [*TEXTS, *(whole[start : start + 700] for start in range(0, len(whole), len(whole) // 50))]
    # Where transformers reads a file otherwise than llama.cpp and the model's own tokenizer do: it does not know how
    # "smollm" cuts digits off the blanks before them; and it merges pairs of blanks where sentencepiece takes the
    # longest run first, which shows from 32 on.
    texts = [re.sub(r"\s+(?=\d)" if "SmolLM2" in real.name else " {32,}", " ", text) for text in texts]
    assert len(texts) > 60
    for text in texts:
        assert ours.encode(text) == theirs(text).input_ids, text
    if theirs.chat_template is None:
        assert chat.load(real, ours) is None
        return
    messages = [("system", "Be brief."), ("user", texts[0]), ("assistant", "Yes."), ("user", "12 or 34?")]
    messages = [{"role": role, "content": content} for role, content in messages]
    for part in (messages[1:2], messages[:2], messages):
        expected = theirs.apply_chat_template(part, add_generation_prompt=True, return_dict=False)
        assert chat.load(real, ours).prompt(part) == expected
