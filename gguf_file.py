"""A GGUF file, the format of llama.cpp, read as if it were a Hugging Face folder.

`read_json(file / "config.json")` says what the file's metadata say, in the words of a config.json, so that
`ModelConfig.from_hf` stays the only reader; `tokenizer_config.json` likewise, chat template included. `tensors(file)`
lists the weights, and `names(file)` says which of them make up which of our parameters. `byte_level(file)` and
`sentencepiece(file)` build the tokenizer.

The package `gguf` parses the files and dequantizes their tensors. What llama.cpp's converter did to a family's weights
on their way into the file (`Architecture`) is undone here.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from errors import UserError, cut, place, reason, shown

if TYPE_CHECKING:
    import torch

# Our module -> the file's modules that are fused into it, in this order, weight and bias alike. {l} is the layer, {e}
# every expert in turn.
NAMES = {
    "embed": ["token_embd"],
    "layers.{l}.attention_norm": ["blk.{l}.attn_norm"],
    "layers.{l}.attention.wqkv": ["blk.{l}.attn_q", "blk.{l}.attn_k", "blk.{l}.attn_v"],
    "layers.{l}.attention.q_norm": ["blk.{l}.attn_q_norm"],
    "layers.{l}.attention.k_norm": ["blk.{l}.attn_k_norm"],
    "layers.{l}.attention.wo": ["blk.{l}.attn_output"],
    "layers.{l}.post_attention_norm": ["blk.{l}.post_attention_norm"],
    "layers.{l}.ffn_norm": ["blk.{l}.ffn_norm"],
    "layers.{l}.feed_forward.w13": ["blk.{l}.ffn_gate", "blk.{l}.ffn_up"],
    "layers.{l}.feed_forward.w2": ["blk.{l}.ffn_down"],
    "layers.{l}.post_ffn_norm": ["blk.{l}.post_ffw_norm"],
    "norm": ["output_norm"],
    "head": ["output"],
}
FUSED = NAMES | {
    "layers.{l}.attention.wqkv": ["blk.{l}.attn_qkv"],
    "layers.{l}.feed_forward.w13": ["blk.{l}.ffn_up"],  # of phi3 both halves, of others there is only one
}
FALCON_TWO_NORMS = FUSED | {
    "layers.{l}.attention_norm": ["blk.{l}.attn_norm_2"],
    "layers.{l}.ffn_norm": ["blk.{l}.attn_norm"],
}
EXPERTS = NAMES | {
    "layers.{l}.feed_forward.router": ["blk.{l}.ffn_gate_inp"],
    "layers.{l}.feed_forward.w13": ["blk.{l}.ffn_gate_exps.{e}", "blk.{l}.ffn_up_exps.{e}"],
    "layers.{l}.feed_forward.w2": ["blk.{l}.ffn_down_exps.{e}"],
}


FALCON_WORDS = {
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "layer_norm_epsilon",
}


class Architecture(NamedTuple):
    """What the converter of llama.cpp does with a family, and what its own code says where the metadata are silent."""

    model_type: str  # in config.json
    names: dict[str, list[str]] = NAMES
    paired: bool = False  # rows of queries and keys that turn together lie side by side, not half a head apart
    norm_shift: float = 0.0  # added to the weights of all norms
    words: dict[str, str] = {}  # what its config.json calls llama's fields
    more: Callable[["Header"], dict[str, Any]] = lambda header: {}  # further fields of config.json


ARCHITECTURES = {
    "llama": Architecture("llama", paired=True, more=lambda header: _llama(header)),
    "mixtral": Architecture("mixtral", EXPERTS, paired=True, more=lambda header: _mixtral(header)),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", more=lambda header: {"attention_bias": header.has("blk.0.attn_q.bias")}),
    "smollm3": Architecture("smollm3", paired=True, more=lambda header: _llama(header) | {"no_rope_layer_interval": 4}),
    "granite": Architecture("granite", paired=True, more=lambda header: _llama(header) | _granite(header)),
    "phi3": Architecture("phi3", FUSED, more=lambda header: _phi3(header)),
    "gemma2": Architecture("gemma2", norm_shift=1.0, more=lambda header: _gemma(header, 46, 2)),
    "gemma3": Architecture(
        "gemma3_text",
        norm_shift=1.0,
        more=lambda header: _gemma(header, 62, 6) | {"rope_local_base_freq": header.get("rope.freq_base_swa", 1e4)},
    ),
    "olmo2": Architecture("olmo2", more=lambda header: {"attention_bias": header.has("blk.0.attn_q.bias")}),
    "olmo2 with windows": Architecture("olmo3", more=lambda header: _olmo3(header)),
    "qwen3moe": Architecture("qwen3_moe", EXPERTS, more=lambda header: _experts(header, True)),
    "olmoe": Architecture("olmoe", EXPERTS, more=lambda header: _experts(header, False)),
    "falcon": Architecture("falcon", FUSED, words=FALCON_WORDS, more=lambda header: _falcon(header)),
    "falcon with two norms": Architecture(
        "falcon", FALCON_TWO_NORMS, words=FALCON_WORDS, more=lambda header: _falcon(header)
    ),
    "gptneox": Architecture(
        "gpt_neox",
        FUSED,
        words={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        more=lambda header: {
            "use_parallel_residual": header.get("use_parallel_residual", True),
            "attention_bias": header.has("blk.0.attn_qkv.bias"),
        },
    ),
}
YARN = {  # fields of config.json -> keys of the header
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale_all_dim": "yarn_log_multiplier",
}
PATTERN = "attention.sliding_window_pattern"
ROPE = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # told in config.json
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
WHAT = {str: "a text", int: "an integer", bool: "true or false", list: "a list"}
CHUNK = 1 << 18  # elements that are dequantized at a time: what the package makes of them fits into a processor's cache


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: list[int]
    kind: int  # gguf.GGMLQuantizationType
    offset: int  # of its first byte in the file
    paired_heads: int = 0
    norm_shift: float = 0.0

    def read(self) -> "torch.Tensor":
        """Its values in float32, as transformers has them. The file is mapped anew for each tensor."""
        import gguf
        import torch  # takes a second, which who only wants the tokenizer does not wait for

        columns = self.shape[-1]
        rows = prod(self.shape) // max(columns, 1)
        bytes_per_row = _row_bytes(columns, self.kind)
        values = torch.empty(rows, columns)
        step = max(1, CHUNK // max(columns, 1))
        with _parsing(self.file):
            # Slices of a memmap take longer than those of an array, and the package goes 16 rows at a time: of one row
            # it makes one piece. Together three times as fast.
            data = np.asarray(np.memmap(self.file, mode="r", offset=self.offset, shape=(rows, bytes_per_row)))
            for start in range(0, rows, step):
                chunk, part = data[start : start + step].reshape(1, -1), values.numpy()[start : start + step]
                part[:] = gguf.dequantize(chunk, gguf.GGMLQuantizationType(self.kind)).reshape(part.shape)
        values = values.view(self.shape)
        if self.paired_heads:
            halves = values.unflatten(0, (self.paired_heads, -1, 2)).transpose(1, 2)
            values = halves.reshape(self.shape)
        return values - self.norm_shift if self.norm_shift else values


class Header(NamedTuple):
    """Everything in a file, or in all its shards, but the weights themselves."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def get(self, name: str, default: Any = None) -> Any:
        """Metadata of the architecture."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{name}", default)

    def tokenizer(self, name: str, kind: type, default: Any = None) -> Any:
        """Metadata of the tokenizer, of this type."""
        value = self.metadata.get(f"tokenizer.{name}", default)
        if value is not None and type(value) is not kind:
            raise UserError(f"{place(self.path)}: tokenizer.{name} must be {WHAT[kind]}, not {shown(value)}")
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    @property
    def architecture(self) -> Architecture:
        name = self.metadata.get("general.architecture")
        if name == "llama" and self.get("expert_count"):
            name = "mixtral"
        if name == "falcon" and self.has("blk.0.attn_norm_2.weight"):
            name = "falcon with two norms"
        if name == "olmo2" and self.get("attention.sliding_window"):
            name = "olmo2 with windows"
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(sorted(name for name in ARCHITECTURES if name != "mixtral" and " " not in name))
            raise UserError(f"{place(self.path)}: GGUF architecture {shown(name)} is not supported; supported: {known}")
        return ARCHITECTURES[name]


def is_gguf(path: Path) -> bool:
    """Whether `path` is such a file rather than a folder."""
    return path.suffix == ".gguf" and path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """What a folder in place of the file `path.parent` would have in its file `path.name`; else an empty object."""
    views = {"config.json": _config, "tokenizer_config.json": _tokenizer_config}
    return views[path.name](_header(path.parent)) if path.name in views else {}


def names(path: Path) -> dict[str, list[str]]:
    """Our module -> the file's modules that are fused into it."""
    return _header(path).architecture.names


def tensors(path: Path) -> list[Stored]:
    """All weights in a file and in its further shards; of stacked experts each one."""
    header = _header(path)
    architecture, listed = header.architecture, []
    heads = {".attn_q.": header.get("attention.head_count"), ".attn_k.": _kv_heads(header)}
    for tensor in header.tensors.values():
        if tensor.name in ROPE:
            continue
        module, _, kind = tensor.name.rpartition(".")
        if architecture.paired:
            paired = next((count for part, count in heads.items() if part in tensor.name), 0)
            if paired and tensor.shape[0] % (2 * paired):
                raise UserError(
                    f"{place(path)}: {tensor.shape[0]} rows of {tensor.name} do not divide by {paired} heads"
                )
            tensor = tensor._replace(paired_heads=paired)
        if module.endswith("norm") and kind == "weight":
            tensor = tensor._replace(norm_shift=architecture.norm_shift)
        if module.endswith("_exps"):
            size = prod(tensor.shape[1:-1]) * _row_bytes(tensor.shape[-1], tensor.kind)
            listed += [
                tensor._replace(name=f"{module}.{e}.{kind}", shape=tensor.shape[1:], offset=tensor.offset + e * size)
                for e in range(tensor.shape[0])
            ]
        else:
            listed.append(tensor)
    return listed


def _config(header: Header) -> dict[str, Any]:
    """The metadata in the words of a config.json."""
    architecture = header.architecture
    eps = header.get("attention.layer_norm_rms_epsilon", header.get("attention.layer_norm_epsilon"))
    missing = [name for name in NEEDED if header.get(name) is None]
    if missing or eps is None:
        raise UserError(
            f"{place(header.path)}: its metadata have no {[*missing, 'attention.layer_norm_rms_epsilon'][0]}"
        )
    types = {tensor.kind for tensor in header.tensors.values()}
    heads, dim = header.get("attention.head_count"), header.get("embedding_length")
    divides = isinstance(dim, int) and isinstance(heads, int) and heads > 0 and dim % heads == 0
    head_dim = header.get("attention.key_length", dim // heads if divides else None)
    config = {
        "model_type": architecture.model_type,
        "dtype": _dtype(types),
        # The tokenizer may have fewer tokens than the model.
        "vocab_size": header.tensors["token_embd.weight"].shape[0] if header.has("token_embd.weight") else None,
        "hidden_size": dim,
        "intermediate_size": header.get("feed_forward_length"),
        "num_hidden_layers": header.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(header),
        "head_dim": head_dim,
        "max_position_embeddings": header.get("context_length"),
        "rms_norm_eps": eps,
        "rope_theta": header.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header),
        "tie_word_embeddings": not header.has("output.weight"),
    }
    ends = [header.tokenizer(f"ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    config["eos_token_id"] = sorted({end for end in ends if end is not None}) or None
    config |= architecture.more(header)
    if header.get("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{place(header.path)}: keys and values of different sizes are not supported")
    turned = header.get("rope.dimension_count")
    if isinstance(turned, int) and isinstance(head_dim, int) and head_dim:
        config["partial_rotary_factor"] = turned / head_dim
    given = {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
    return {architecture.words.get(name, name): value for name, value in given.items()}


def _dtype(types: set[int]) -> str:
    """The type of a whole model's matrices; its norms are float32. What quantized blocks hold is exact in float32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if types <= {kinds.F32, kinds.BF16} and kinds.BF16 in types:
        return "bfloat16"
    return "float16" if types <= {kinds.F32, kinds.F16} and kinds.F16 in types else "float32"


def _kv_heads(header: Header) -> Any:
    return header.get("attention.head_count_kv", header.get("attention.head_count"))


def _rope_scaling(header: Header) -> dict[str, Any] | None:
    kind, factor = header.get("rope.scaling.type", "none"), header.get("rope.scaling.factor")
    if (older := header.get("rope.scale_linear")) is not None:
        kind, factor = "linear", older
    scaling = {"rope_type": kind, "factor": factor} if kind != "none" else None
    if kind == "yarn":
        scaling |= _yarn(header)
    # Llama 3 has its stretched frequencies in a tensor, by whichever formula they were made: each is divided by its
    # factor, at every length.
    files = ("rope_freqs.weight",) * 2 if header.has("rope_freqs.weight") else ROPE[1:]
    if all(map(header.has, files)):
        short, long = (header.tensors[name].read().flatten().tolist() for name in files)
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        scaling["attention_factor"] = header.get("rope.scaling.attn_factor", 1.0)
    return scaling


def _yarn(header: Header) -> dict[str, Any]:
    given = {name: header.get(f"rope.scaling.{key}") for name, key in YARN.items()}
    given["mscale"] = 1.0 if given["mscale_all_dim"] else None  # llama.cpp assumes it
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (value := header.get(f"rope.scaling.{key}", 1.0)) != 1:
            raise UserError(f"{place(header.path)}: rope.scaling.{key} {shown(value)} is not supported; only 1.0 is")
    return {name: value for name, value in given.items() if value is not None}


def _llama(header: Header) -> dict[str, Any]:
    return {"attention_bias": header.has("blk.0.attn_q.bias"), "mlp_bias": header.has("blk.0.ffn_up.bias")}


def _mixtral(header: Header) -> dict[str, Any]:
    experts = {"num_local_experts": header.get("expert_count"), "num_experts_per_tok": header.get("expert_used_count")}
    return experts | {"sliding_window": None}


def _experts(header: Header, normed: bool) -> dict[str, Any]:
    """Whether the shares of the chosen ones sum to 1 is in no metadata of these: llama.cpp knows it of each family."""
    return _mixtral(header) | {
        "norm_topk_prob": normed,
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "attention_bias": header.has("blk.0.attn_q.bias"),
        "clip_qkv": header.get("attention.clamp_kqv"),
    }


def _granite(header: Header) -> dict[str, Any]:
    return {
        "embedding_multiplier": header.get("embedding_scale"),
        "attention_multiplier": header.get("attention.scale"),
        "residual_multiplier": header.get("residual_scale"),
        "logits_scaling": header.get("logit_scale"),
    }


def _phi3(header: Header) -> dict[str, Any]:
    original = header.get("rope.scaling.original_context_length")
    return {"sliding_window": header.get("attention.sliding_window") or None} | (
        {} if original is None else {"original_max_position_embeddings": original}
    )


def _gemma(header: Header, layers_of_27b: int, period: int) -> dict[str, Any]:
    """The scale of attention is in no metadata: llama.cpp tells the model with another one by its layers."""
    heads, dim, layers = (header.get(name) for name in ("attention.head_count", "embedding_length", "block_count"))
    whole = layers == layers_of_27b and isinstance(dim, int) and isinstance(heads, int) and heads
    scalar = dim // heads if whole else header.get("attention.key_length")
    fields = {
        "query_pre_attn_scalar": scalar,
        "sliding_window": header.get("attention.sliding_window"),
        "attn_logit_softcapping": header.get("attn_logit_softcapping"),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
    }
    return fields | (_layer_types(header) or {"sliding_window_pattern": header.get(PATTERN, period)})


def _layer_types(header: Header) -> dict[str, Any]:
    pattern = header.get(PATTERN)
    if not isinstance(pattern, list):
        return {}
    return {"layer_types": [("full_attention", "sliding_attention")[bool(windowed)] for windowed in pattern]}


def _olmo3(header: Header) -> dict[str, Any]:
    """Layers with a window turn without scaling."""
    theta = header.get("rope.freq_base", 10000.0)
    ropes = {"full_attention": theta, "sliding_attention": header.get("rope.freq_base_swa", theta)}
    return _layer_types(header) | {
        "attention_bias": header.has("blk.0.attn_q.bias"),
        "sliding_window": header.get("attention.sliding_window"),
        "rope_parameters": {kind: {"rope_theta": value} for kind, value in ropes.items()},
    }


def _falcon(header: Header) -> dict[str, Any]:
    two_norms, heads = header.has("blk.0.attn_norm_2.weight"), _kv_heads(header)
    newer = two_norms or heads != 1
    return {
        "new_decoder_architecture": newer,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "multi_query": not newer,
        "bias": header.has("blk.0.attn_qkv.bias"),
    }


# Tokenizers. A kind is what llama.cpp calls `pre`: how a text is cut into words before they are merged from bytes.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3, _QWEN2 = f"{_SHORT}|{_WORDS % '{1,3}'}", f"{_SHORT}|{_WORDS % ''}"
_GPT4O, _TEKKEN = _LETTERS % (f"{_SHORT}?", f"{_SHORT}?", "{1,3}"), _LETTERS % ("", "", "")
WORDS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "gpt-4o": _GPT4O,
    "tekken": _TEKKEN,
}
GPT2_WORDS = ("gpt-2", "olmo")  # the library's own
DIGITS_APART = ("smollm", "refact", "starcoder")  # one by one, then as in GPT-2
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")  # a word in the vocabulary stays one
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, as in sentencepiece


def tokenizer_kind(path: Path) -> str | None:
    """What `byte_level` ("gpt2") or `sentencepiece` ("llama") can build, None if the file has no tokenizer."""
    kind = _header(path).tokenizer("ggml.model", str, "none")
    if kind not in ("gpt2", "llama", "none"):
        raise UserError(f"{place(path)}: a tokenizer of the kind {shown(kind)} is not supported; gpt2 and llama are")
    return None if kind == "none" else kind


def byte_level(path: Path) -> Any:
    """The tokenizers.Tokenizer of a file with byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    header = _header(path)
    settings, tokens, types = _tokenizer_config(header), *_vocabulary(header)
    pre, merges = header.tokenizer("ggml.pre", str), header.tokenizer("ggml.merges", list)
    if merges is None or any(type(m) is not str or m.count(" ") != 1 for m in merges):
        raise UserError(f"{place(path)}: tokenizer.ggml.merges must be a list of two tokens each")
    vocabulary, splitter = {token: i for i, token in enumerate(tokens)}, _splitter(path, pre)
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise UserError(f"{place(path)}: the token {shown(twice)} is in the vocabulary twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in WHOLE_WORDS))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{place(path)}: the tokenizer is broken: {reason(error)}") from None
    backend.normalizer = normalizers.NFC() if pre in ("qwen2", "deepseek-r1-qwen") else None
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added])
    ends = [settings.get(f"{side}_token") if settings.get(f"add_{side}_token") else None for side in ("bos", "eos")]
    around = [token for token in (ends[0], "$A", ends[1]) if token is not None]
    if len(around) > 1:
        special = [(token, vocabulary[token]) for token in set(around) - {"$A"}]
        backend.post_processor = processors.TemplateProcessing(single=around, pair=None, special_tokens=special)
    return backend


def _splitter(path: Path, pre: Any) -> Any:
    """How the words of a kind of byte-level BPE are cut, and spelled in its alphabet."""
    from tokenizers import Regex, pre_tokenizers

    gpt2, letters = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex) for regex in (True, False))
    if pre in GPT2_WORDS:
        return gpt2
    if pre in DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre == "falcon":
        thousands = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
        parts = [
            pre_tokenizers.Punctuation("contiguous"),
            gpt2,
            pre_tokenizers.Digits(individual_digits=False),
            thousands,
        ]
        return pre_tokenizers.Sequence(parts)
    if pre in WORDS:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS[pre]), "isolated"), letters])
    known = ", ".join([*GPT2_WORDS, *DIGITS_APART, "falcon", *WORDS])
    raise UserError(f"{place(path)}: tokenizer.ggml.pre {shown(pre)} is not supported; supported: {known}")


def sentencepiece(path: Path) -> bytes:
    """The sentencepiece model in a file, written as the message ModelProto that it was made of."""
    header = _header(path)
    tokens, types = _vocabulary(header)
    scores = header.tokenizer("ggml.scores", list)
    if scores is None or len(scores) != len(tokens) or not all(isinstance(score, (int, float)) for score in scores):
        raise UserError(f"{place(path)}: tokenizer.ggml.scores must be one number for each of {len(tokens)} tokens")
    ids = [header.tokenizer(f"ggml.{name}_token_id", int) for name in ("unknown", "bos", "eos", "padding")]
    unknown = types.index(UNKNOWN) if UNKNOWN in types else ids[0]
    if unknown is None:
        raise UserError(f"{place(path)}: a sentencepiece vocabulary without an unknown token is not supported")
    ids[0], types = unknown, [*types[:unknown], UNKNOWN, *types[unknown + 1 :]]
    model = bytearray()
    for token, kind, score in zip(tokens, types, scores, strict=True):
        # The converter spells the runs of spaces among them as such.
        spelled = token.replace(" ", "\u2581") if kind == USER_DEFINED else token
        model += _field(1, _field(1, spelled.encode()) + _field(2, float(score)) + _field(3, kind))
    trainer = _field(3, 2) + _field(35, int(BYTE in types))  # BPE; whether bytes stand in for unknown characters
    trainer += b"".join(_field(40 + n, -1 if i is None else i) for n, i in enumerate(ids))
    spaces = [
        header.tokenizer(f"ggml.{n}", bool, d)
        for n, d in (("add_space_prefix", True), ("remove_extra_whitespaces", False))
    ]
    normalizer = _field(1, b"identity") + _field(3, int(spaces[0])) + _field(4, int(spaces[1])) + _field(5, 1)
    return bytes(model) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _vocabulary(header: Header) -> tuple[list[str], list[int]]:
    """The tokens and their types."""
    tokens = header.tokenizer("ggml.tokens", list)
    if not tokens or any(type(token) is not str for token in tokens):
        raise UserError(f"{place(header.path)}: tokenizer.ggml.tokens must be a list of texts")
    types = header.tokenizer("ggml.token_type", list, [NORMAL] * len(tokens))
    if len(types) != len(tokens) or not set(types) <= set(range(NORMAL, BYTE + 1)):
        raise UserError(
            f"{place(header.path)}: tokenizer.ggml.token_type must be 1 to 6 for each of {len(tokens)} tokens"
        )
    return tokens, types


def _tokenizer_config(header: Header) -> dict[str, Any]:
    """The metadata in the words of a tokenizer_config.json."""
    kind = tokenizer_kind(header.path)
    if kind is None:
        return {}
    tokens, _ = _vocabulary(header)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for side, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := header.tokenizer(f"ggml.{name}_token_id", int)) is None:
            continue
        if not 0 <= token < len(tokens):
            raise UserError(
                f"{place(header.path)}: tokenizer.ggml.{name}_token_id {shown(token)} is none of {len(tokens)} tokens"
            )
        settings[f"{side}_token"] = tokens[token]
    begins = kind == "llama" or header.tokenizer("ggml.pre", str) in WHOLE_WORDS
    for side, default in (("bos", begins), ("eos", False)):
        wanted = header.tokenizer(f"ggml.add_{side}_token", bool, default)
        settings[f"add_{side}_token"] = wanted and f"{side}_token" in settings
    if (template := header.tokenizer("chat_template", str)) is not None:
        settings["chat_template"] = template
    return settings


# Reading


def _header(path: Path) -> Header:
    """What a file and its further shards hold; read once for all who ask."""
    with _parsing(path):
        stat = path.stat()
    return read_header(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def read_header(path: Path, time: int, size: int) -> Header:
    metadata, tensors = _read_file(path)
    shards, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(shards) is not int or type(number) is not int or not 0 <= number < max(shards, 1):
        raise UserError(f"{place(path)}: shard {shown(number)} of {shown(shards)} is none")
    if shards > 1:
        ending = f"-{number + 1:05}-of-{shards:05}.gguf"
        if number or not path.name.endswith(ending):
            raise UserError(
                f"{place(path)} is shard {number + 1} of {shards}; give the one that ends in -00001-of-{shards:05}.gguf"
            )
        for other in range(2, shards + 1):
            file = path.with_name(f"{path.name.removesuffix(ending)}-{other:05}-of-{shards:05}.gguf")
            if not file.is_file():
                raise UserError(f"{place(path)} has {shards} shards, but {cut(file.name)} is not beside it")
            tensors |= _read_file(file)[1]
    return Header(path, metadata, tensors)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    import gguf

    with _parsing(path):
        reader = _reader()(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        found = {
            tensor.name: Stored(
                path, tensor.name, tensor.shape.tolist()[::-1], int(tensor.tensor_type), tensor.data_offset
            )
            for tensor in reader.tensors
        }
        kinds = {tensor.kind: tensor.name for tensor in found.values()}
    for kind, name in kinds.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType(kind))
        except NotImplementedError:
            raise UserError(
                f"{place(path)}: {cut(name)} is {gguf.GGMLQuantizationType(kind).name}, which the package gguf cannot "
                "dequantize; use a file of another quantization"
            ) from None
    return metadata, found


@lru_cache
def _reader() -> type:
    """The package's reader without two of its ways: it takes what lies past a file's end for empty, and it needs ten
    seconds for a vocabulary of 262,144 tokens.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            if (end := int(offset) + int(count) * np.dtype(dtype).itemsize) > len(self.data):
                raise ValueError(f"it ends before byte {end}; get it again")
            if self.byte_order != "I":
                raise ValueError("a file of the other byte order is not supported")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
            kinds = gguf.GGUFValueType
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = kinds(int(self._get(orig_offs, np.uint32)[0]))
            count, offset = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
            if kind in self.gguf_scalar_to_np:
                values = self._get(offset, self.gguf_scalar_to_np[kind], count)
                return 12 + values.nbytes, [values], [0], [kinds.ARRAY, kind]
            if kind != kinds.STRING:
                raise ValueError(f"an array of the type {kind.name} is not supported")
            data, texts = memoryview(self.data), []
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", data, offset)
                texts.append(data[offset + 8 : offset + 8 + length])
                offset += 8 + length
                if offset > len(data):
                    raise ValueError(f"it ends before byte {offset}; get it again")
            return offset - orig_offs, texts, list(range(count)), [kinds.ARRAY, kind]

    return Reader


def _row_bytes(columns: int, kind: int) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    return columns // block * size


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """One line that names `path`, whatever the package raises about its bytes."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # IndexError, KeyError, ValueError, OSError, ...: it checks little itself
        raise UserError(f"{place(path)} cannot be read as GGUF: {reason(error)}") from error
