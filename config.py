"""What a model computes: `ModelConfig`, and how each family's Hugging Face config.json is read into one.

Nothing that changes the result is ignored: it is a field, or an error of one line. What a config.json leaves out is
what the family's class in transformers has (tests/test_config.py compares them, field by field).
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import quantized
from errors import UserError, cut, shown

ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
MIXERS = ("full_attention", "linear_attention")


class Kind(NamedTuple):
    """What a field may hold. `words` complete the sentence "it must be ..."; `null` is whether it may be null."""

    words: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value
    null: bool = False

    def checked(self, name: str, value: Any) -> Any:
        """The value as ModelConfig holds it. UserError unless it fits."""
        if value is None and self.null:
            return None
        if not self.fits(value):
            raise UserError(f"config.json: {name} must be {self.words}, not {shown(value)}")
        return self.read(value)

    @property
    def or_null(self) -> "Kind":
        return self._replace(words=f"{self.words} or null", null=True)


def _whole(most: int, least: int = 1) -> Kind:
    fits = lambda value: type(value) is int and least <= value <= most  # noqa: E731
    return Kind(f"an integer from {least} to {most}", fits)


def _number(least: float, most: float) -> Kind:
    fits = lambda value: type(value) in (int, float) and least <= value <= most  # noqa: E731
    return Kind(f"a number from {least:g} to {most:g}", fits, float)


def _one_of(values: Any) -> Kind:
    known = {(type(value), value) for value in values}
    fits = lambda value: type(value) in (str, int, bool) and (type(value), value) in known  # noqa: E731
    return Kind(f"one of {', '.join(map(str, values))}", fits)


def _list(each: Kind) -> Kind:
    fits = lambda value: isinstance(value, list) and all(map(each.fits, value))  # noqa: E731
    return Kind(f"a list, each {each.words}", fits, lambda value: [each.read(one) for one in value])


# The limits are far beyond any model, and low enough that no tensor has more than 2**60 elements.
_SIZE, _COUNT, _LENGTH = _whole(2**22), _whole(2**12), _whole(2**31 - 1)
_POSITIVE, _FACTOR = _number(1e-30, 1e30), _number(1e-6, 1e6)
_SHARE = Kind("a number above 0, up to 1", lambda value: type(value) in (int, float) and 0 < value <= 1, float)
_YES_NO = Kind("true or false", lambda value: type(value) is bool)
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_DTYPE = Kind(
    f"one of {', '.join(DTYPES)}",
    lambda value: isinstance(value, str) and value.removeprefix("torch.") in DTYPES,
    lambda value: DTYPES[value.removeprefix("torch.")],
)
# Every field that is read from a config.json or from the rotary parameters in it, under llama's name if it has one.
FIELDS: dict[str, Kind] = {
    "vocab_size": _whole(2**28),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT.or_null,  # null: as many as there are attention heads
    "head_dim": _whole(2**16).or_null,  # null: hidden_size shared among the heads
    "hidden_act": _one_of(ACTIVATIONS),
    "max_position_embeddings": _LENGTH,
    "rms_norm_eps": _number(1e-30, 1),
    "tie_word_embeddings": _YES_NO,
    "dtype": _DTYPE.or_null,
    "attention_bias": _YES_NO,
    "attention_out_bias": _YES_NO,
    "mlp_bias": _YES_NO,
    # sliding windows
    "sliding_window": _LENGTH.or_null,  # null: none
    "use_sliding_window": _YES_NO,
    "max_window_layers": _whole(2**31 - 1, least=0),
    "layer_types": _list(_one_of(LAYER_TYPES)).or_null,
    "sliding_window_pattern": _LENGTH,
    "layers_block_type": _list(_one_of(("attention", "full_attention", "mamba", "linear_attention"))).or_null,
    "position_embedding_type": _one_of(("rope", "nope")).or_null,  # null: nope
    # rotary
    "rope_parameters": _OBJECT.or_null,
    "rope_scaling": _OBJECT.or_null,
    "rope_type": _one_of((*ROPE_TYPES, "su")),
    "rope_theta": _number(1e-6, 1e15),
    "rope_local_base_freq": _number(1e-6, 1e15),
    "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _LENGTH.or_null,
    "factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "short_factor": _list(_FACTOR),
    "long_factor": _list(_FACTOR),
    "attention_factor": _FACTOR.or_null,
    "beta_fast": _FACTOR.or_null,
    "beta_slow": _FACTOR.or_null,
    "mscale": _number(0, 1e6).or_null,  # 0, of either, as null: not given
    "mscale_all_dim": _number(0, 1e6).or_null,
    "truncate": _YES_NO,
    "llama_4_scaling_beta": _number(0, 1e6).or_null,
    "no_rope_layers": _list(_one_of((0, 1))).or_null,  # 1: with rotary, by its name the opposite
    "no_rope_layer_interval": _LENGTH,
    # one family's own
    "num_local_experts": _whole(2**12, least=0),
    "num_experts_per_tok": _COUNT,
    "swiglu_limit": _POSITIVE,
    "norm_topk_prob": _YES_NO,
    "moe_intermediate_size": _SIZE,
    "decoder_sparse_step": _LENGTH,
    "mlp_only_layers": _list(_whole(2**31 - 1, least=0)).or_null,
    "embedding_multiplier": _POSITIVE,
    "attention_multiplier": _POSITIVE,
    "residual_multiplier": _POSITIVE,
    "logits_scaling": _POSITIVE,
    "attn_logit_softcapping": _POSITIVE.or_null,  # null: none
    "final_logit_softcapping": _POSITIVE.or_null,
    "query_pre_attn_scalar": _LENGTH,
    "use_parallel_residual": _YES_NO,
    "new_decoder_architecture": _YES_NO.or_null,  # null, here and below: false
    "multi_query": _YES_NO.or_null,
    "parallel_attn": _YES_NO.or_null,
    "bias": _YES_NO.or_null,
    "num_ln_in_parallel_attn": _one_of((1, 2)).or_null,
    "enable_bias": _YES_NO,
    "shared_expert_intermediate_size": _SIZE,
    # layers of linear attention
    "mixers": _list(_one_of(MIXERS)).or_null,
    "full_attention_interval": _LENGTH,
    "linear_conv_kernel_dim": _COUNT,
    "linear_key_head_dim": _COUNT,
    "linear_value_head_dim": _COUNT,
    "linear_num_key_heads": _COUNT,
    "linear_num_value_heads": _COUNT,
}
# What only one value of is supported, or null.
ONLY = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "clip_qkv": None,
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "use_bidirectional_attention": False,
    "swiglu_alpha": 1.702,
}
# Fields that say nothing of what a model computes.
HARMLESS = re.compile(
    "_.*|model_type|architectures|auto_map|transformers_version|torch_dtype|dtype|use_cache|gradient_checkpointing"
    "|pretraining_tp|torchscript|.*token_(id|index)|.*_token|.*dropout.*|.*drop|initializer_.*|init_.*|.*_init|output_.*"
    "|.*loss.*|ep_size|.*_config|id2label|label2id|problem_type|tokenizer_class|return_dict|use_mamba_kernels"
)
ALTERNATING = ("gemma2", "gemma3_text", "olmo3", "gpt_oss")  # never without a window
PARTIAL = (
    "gpt_neox",
    "phi3",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)  # those of whose heads a part may be turned


# Of several modalities -> its text model, unless told.
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
WRAPPERS |= {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


class Family(NamedTuple):
    """How a family's config.json is read."""

    defaults: dict[str, Any]  # what its class in transformers has; no other field is read
    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda conf: {}  # all of that -> fields of ModelConfig
    names: dict[str, tuple[str, ...]] = {}  # its own names, where it has any; of several the last one counts
    windows: Callable[[dict[str, Any]], Iterable[int]] = lambda conf: ()  # the layers with one, if there is a window
    ropes: tuple[str, ...] = ROPE_TYPES


_HEADS = dict(num_key_value_heads=None, head_dim=None)
_ROPE = dict(rope_theta=1e4, partial_rotary_factor=1.0, rope_parameters=None, rope_scaling=None)
_ROPE |= dict(original_max_position_embeddings=None)
_EACH_LAYER = ("default", "linear", "dynamic", "llama3", "yarn")  # where layers with a window have their own
_BIASES = dict(attention_bias=False, mlp_bias=False)
_LLAMA: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    dtype=None,
    **_HEADS,
    **_ROPE,
)
_QWEN = _LLAMA | dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
_GEMMA = _LLAMA | dict(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    attention_bias=False,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
)
_DELTA = _LLAMA | dict(
    num_attention_heads=16,
    max_position_embeddings=32768,
    head_dim=256,
    attention_bias=False,
    partial_rotary_factor=0.25,
    mixers=None,
    full_attention_interval=4,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
)

# A family is listed here or it is not supported.
FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA | _BIASES),
    "mistral": Family(
        _LLAMA
        | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
        windows=lambda conf: range(conf["num_hidden_layers"]),
    ),
    "ministral3": Family(
        _LLAMA
        | dict(vocab_size=131072, intermediate_size=14336, num_hidden_layers=34, num_key_value_heads=8, head_dim=128)
        | dict(max_position_embeddings=262144, rms_norm_eps=1e-5, sliding_window=None, llama_4_scaling_beta=None)
        | dict(
            rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16384)
            | dict(beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
        ),
        names={"llama_4_scaling_beta": ()},  # it stands among the rotary parameters
        windows=lambda conf: range(conf["num_hidden_layers"]),
    ),
    "mixtral": Family(
        _LLAMA
        | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=None)
        | dict(rope_theta=1e6, rms_norm_eps=1e-5, num_local_experts=8, num_experts_per_tok=2),
        lambda conf: _experts(conf),
        names={"num_local_experts": ("num_local_experts", "num_experts")},
        windows=lambda conf: range(conf["num_hidden_layers"]),
    ),
    "qwen2": Family(
        _QWEN,
        lambda conf: dict(qkv_bias=True, output_bias=False),
        windows=lambda conf: range(conf["max_window_layers"], conf["num_hidden_layers"]),
    ),
    "qwen3": Family(
        _QWEN | dict(head_dim=128, attention_bias=False),
        lambda conf: dict(qk_norm="head"),
        windows=lambda conf: range(conf["max_window_layers"], conf["num_hidden_layers"]),
    ),
    "qwen3_moe": Family(
        {name: value for name, value in _QWEN.items() if name not in ("max_window_layers", "layer_types")}
        | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4)
        | dict(attention_bias=False, num_local_experts=128, num_experts_per_tok=8, norm_topk_prob=False)
        | dict(moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=None),
        lambda conf: _experts(conf) | _dense(conf) | dict(qk_norm="head", ffn_dim=conf["moe_intermediate_size"]),
        names={"num_local_experts": ("num_experts", "num_local_experts")},
        windows=lambda conf: range(conf["num_hidden_layers"]),
    ),
    "seed_oss": Family(
        _LLAMA
        | dict(vocab_size=155136, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=80, head_dim=128)
        | dict(num_key_value_heads=8, max_position_embeddings=524288, attention_bias=True, attention_out_bias=False)
        | dict(mlp_bias=False),
        lambda conf: dict(output_bias=conf["attention_out_bias"]),
    ),
    "qwen3_next": Family(
        _DELTA
        | dict(vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=48)
        | dict(num_key_value_heads=2, num_local_experts=512, num_experts_per_tok=10, norm_topk_prob=True)
        | dict(moe_intermediate_size=512, shared_expert_intermediate_size=512)
        | dict(decoder_sparse_step=1, mlp_only_layers=None),
        lambda conf: (
            _experts(conf)
            | _dense(conf)
            | _delta(conf)
            | dict(ffn_dim=conf["moe_intermediate_size"], shared_dim=conf["shared_expert_intermediate_size"])
        ),
        names={"num_local_experts": ("num_experts",), "mixers": ("layer_types",)},
    ),
    "qwen3_5_text": Family(
        _DELTA
        | dict(vocab_size=248320, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32)
        | dict(num_key_value_heads=4),
        lambda conf: _delta(conf),
        names={"mixers": ("layer_types",)},
    ),
    "qwen3_5_moe_text": Family(
        _DELTA
        | dict(vocab_size=248320, hidden_size=2048, intermediate_size=512, num_hidden_layers=40)
        | dict(num_key_value_heads=2, num_local_experts=256, num_experts_per_tok=8)
        | dict(shared_expert_intermediate_size=512),
        lambda conf: _experts(conf) | _delta(conf) | dict(shared_dim=conf["shared_expert_intermediate_size"]),
        names={
            "num_local_experts": ("num_experts",),
            "intermediate_size": ("moe_intermediate_size",),
            "mixers": ("layer_types",),
        },
    ),
    "smollm3": Family(
        _LLAMA
        | _BIASES
        | dict(vocab_size=128256, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16)
        | dict(num_key_value_heads=4, max_position_embeddings=32768, rope_theta=2e6, tie_word_embeddings=True)
        | dict(use_sliding_window=False, sliding_window=None, layer_types=None)
        | dict(no_rope_layers=None, no_rope_layer_interval=4),
        lambda conf: dict(unturned=_unturned(conf)),
        windows=lambda conf: _unturned(conf),
    ),
    "granite": Family(
        _LLAMA
        | _BIASES
        | dict(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0),
        lambda conf: _granite(conf),
    ),
    "granitemoehybrid": Family(
        _LLAMA
        | dict(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
        | dict(attention_bias=False, intermediate_size=1024, num_local_experts=8)
        | dict(position_embedding_type=None, layers_block_type=None),
        lambda conf: _granite(conf) | _attention_only(conf),
        names={
            "intermediate_size": ("shared_intermediate_size",),
            "layers_block_type": ("layers_block_type", "layer_types"),
        },
    ),
    "phi3": Family(
        _LLAMA
        | dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096)
        | dict(rms_norm_eps=1e-5, original_max_position_embeddings=4096, sliding_window=None),
        windows=lambda conf: range(conf["num_hidden_layers"]),
        ropes=("default", "longrope"),
    ),
    "gemma": Family(
        _LLAMA
        | dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, head_dim=256)
        | dict(num_attention_heads=16, num_key_value_heads=16, hidden_act="gelu_pytorch_tanh", attention_bias=False)
        | dict(max_position_embeddings=8192, tie_word_embeddings=True),
        lambda conf: dict(
            norm_shift=1.0,
            embed_scale=conf["hidden_size"] ** 0.5,
            activation={"gelu": "gelu_pytorch_tanh"}.get(conf["hidden_act"], conf["hidden_act"]),  # an older name
        ),
    ),
    "gemma2": Family(
        _GEMMA
        | dict(vocab_size=256000, max_position_embeddings=8192)
        | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        lambda conf: _gemma(conf) | dict(attention_softcap=conf["attn_logit_softcapping"]),
        names={"hidden_act": ("hidden_activation",)},
        windows=lambda conf: range(0, conf["num_hidden_layers"], 2),
    ),
    "gemma3_text": Family(
        {name: value for name, value in _GEMMA.items() if name != "original_max_position_embeddings"}
        | dict(vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4)
        | dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window_pattern=6),
        lambda conf: _gemma(conf) | dict(attention_softcap=conf["attn_logit_softcapping"], qk_norm="head"),
        names={"hidden_act": ("hidden_activation",)},
        windows=lambda conf: (
            layer for layer in range(conf["num_hidden_layers"]) if (layer + 1) % conf["sliding_window_pattern"]
        ),
        ropes=_EACH_LAYER,
    ),
    "olmo2": Family(
        _LLAMA | dict(vocab_size=50304, rms_norm_eps=1e-5, attention_bias=False),
        lambda conf: dict(pre_norms=False, post_norms=True, qk_norm="projection"),
    ),
    "olmo3": Family(
        {name: value for name, value in _LLAMA.items() if name != "original_max_position_embeddings"}
        | dict(vocab_size=50304, rms_norm_eps=1e-5, attention_bias=False, sliding_window=4096, layer_types=None)
        | dict(rope_theta=5e5, rope_local_base_freq=5e5),
        lambda conf: dict(pre_norms=False, post_norms=True, qk_norm="projection"),
        names={"rope_local_base_freq": ()},
        windows=lambda conf: (layer for layer in range(conf["num_hidden_layers"]) if (layer + 1) % 4),
        ropes=_EACH_LAYER,
    ),
    "gpt_oss": Family(
        _LLAMA
        | dict(vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072)
        | dict(rms_norm_eps=1e-5, attention_bias=True, sliding_window=128, layer_types=None, rope_theta=1.5e5)
        | dict(num_local_experts=128, num_experts_per_tok=4, swiglu_limit=7.0)
        | dict(
            rope_parameters=dict(rope_type="yarn", factor=32.0, truncate=False, original_max_position_embeddings=4096)
        ),
        lambda conf: (
            _experts(conf)
            | dict(attention_sinks=True, router_bias=True, ffn_bias=True)
            | dict(activation="quick_gelu", activation_limit=conf["swiglu_limit"])
        ),
        names={"num_local_experts": ("num_local_experts", "num_experts")},
        windows=lambda conf: range(0, conf["num_hidden_layers"], 2),
    ),
    "olmoe": Family(
        _LLAMA
        | dict(vocab_size=50304, hidden_size=2048, intermediate_size=2048, num_hidden_layers=16)
        | dict(num_attention_heads=16, max_position_embeddings=4096, rms_norm_eps=1e-5, attention_bias=False)
        | dict(num_local_experts=64, num_experts_per_tok=8, norm_topk_prob=False),
        lambda conf: _experts(conf) | dict(qk_norm="projection"),
        names={"num_local_experts": ("num_experts", "num_local_experts")},
    ),
    "gpt_neox": Family(
        {name: value for name, value in _LLAMA.items() if name not in _HEADS}
        | dict(vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64)
        | dict(intermediate_size=24576, hidden_act="gelu", rms_norm_eps=1e-5, partial_rotary_factor=0.25)
        | dict(attention_bias=True, use_parallel_residual=True),
        lambda conf: dict(norm="layer", ffn_gate=False, ffn_bias=True, parallel=conf["use_parallel_residual"]),
        names={
            "rms_norm_eps": ("layer_norm_eps",),
            "rope_theta": ("rotary_emb_base",),
            "partial_rotary_factor": ("rotary_pct",),
        },
    ),
    "falcon": Family(
        {name: value for name, value in _LLAMA.items() if name != "head_dim"}
        | dict(vocab_size=65024, hidden_size=4544, num_attention_heads=71, intermediate_size=None, hidden_act="gelu")
        | dict(rms_norm_eps=1e-5, tie_word_embeddings=True, bias=False, num_ln_in_parallel_attn=None)
        | dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True),
        lambda conf: _falcon(conf),
        names={
            "hidden_size": ("hidden_size", "n_embed"),
            "intermediate_size": ("ffn_hidden_size",),
            "num_key_value_heads": ("num_kv_heads",),
            "hidden_act": ("activation",),
            "rms_norm_eps": ("layer_norm_epsilon",),
        },
    ),
    "opt": Family(
        {name: value for name, value in _LLAMA.items() if name not in {*_HEADS, *_ROPE, "rms_norm_eps"}}
        | dict(vocab_size=50272, hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
        | dict(num_attention_heads=12, hidden_act="relu", tie_word_embeddings=True, enable_bias=True),
        lambda conf: (
            dict(norm="layer", ffn_gate=False, position_offset=2)
            | dict.fromkeys(("qkv_bias", "output_bias", "ffn_bias"), conf["enable_bias"])
        ),
        names={"intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)},
    ),
}


class Delta(NamedTuple):
    """The sizes of layers of linear attention, which have a gated delta rule in attention's place (deltanet.py)."""

    key_heads: int
    value_heads: int  # a multiple of them: each key head serves as many in a row
    key_dim: int
    value_dim: int
    kernel: int  # of the convolution over tokens: how many, the newest included, it looks at

    @property
    def channels(self) -> int:
        """Queries, keys and values of one token, which go through the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class ModelConfig:
    """Everything that changes what the model computes. Lengths in tokens, sizes in elements."""

    model_type: str  # names the table of weights, and nothing else
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_positions: int
    activation: str = "silu"
    tie_embeddings: bool = False
    embed_scale: float | None = None  # embeddings are multiplied by it
    residual_scale: float = 1.0  # what attention and feed-forward add is multiplied by it
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    position_offset: int | None = None  # learned positions: position p is row p + offset; None: rotary
    # norms
    norm: str = "rms"  # or "layer", with a bias
    norm_eps: float = 1e-6
    norm_shift: float = 0.0  # added to RMSNorm's weight
    pre_norms: bool = True  # before attention and feed-forward
    post_norms: bool = False  # after them
    parallel: bool = False  # the feed-forward part reads the layer's input, like attention
    shared_norm: bool = False  # ... and through attention's norm
    # attention
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: str | None = None  # of each "head", or of the whole "projection"
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    query_scaling: tuple[float, int] | None = None  # (b, n): a query at p is multiplied by 1 + b log(1 + p // n)
    attention_gate: bool = False  # what heads read is multiplied by a sigmoid of as many projected numbers
    attention_sinks: bool = False  # a learned logit a head in every softmax, never soft-capped, that reads nothing
    sliding_window: int | None = None
    windowed: tuple[int, ...] = ()  # the layers that have it
    linear: tuple[int, ...] = ()  # the layers of linear attention, which hold no keys and values but a state
    delta: Delta | None = None  # of what sizes
    # feed-forward
    ffn_bias: bool = False
    ffn_gate: bool = True
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    router_bias: bool = False
    activation_limit: float | None = None  # gate is held below it, up within +- it, and 1 is added to up; None: neither
    router_norm: bool = True  # the shares of the chosen experts sum to 1
    shared_dim: int | None = None  # columns of one more expert, which each token goes through
    dense: tuple[int, ...] = ()  # the layers without experts
    dense_dim: int | None = None  # their columns, where `ffn_dim` is those of an expert
    # rotary
    rotary_dim: int | None = None  # how much of a head is turned; None: all
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    local_rope: dict[str, Any] | None = None  # another one for the layers with a window
    unturned: tuple[int, ...] = ()  # the layers without any
    dtype: torch.dtype = torch.float32

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a token of `layer` may attend to; None: all before it."""
        return self.sliding_window if layer in self.windowed else None

    def rope_of(self, layer: int) -> dict[str, Any]:
        return self.local_rope if self.local_rope and layer in self.windowed else self.rope

    def feed(self, layer: int) -> tuple[int, int]:
        """How many experts a layer has, 0 for a plain feed-forward part, and the columns of each."""
        return (0, self.dense_dim or self.ffn_dim) if layer in self.dense else (self.experts, self.ffn_dim)

    def recurrent(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The parts of a row's state in a layer of linear attention: the kind of their numbers, and their shape."""
        if self.delta is None:
            return {}
        d, wide = self.delta, torch.promote_types(dtype, torch.float32)
        memory = (wide, (d.value_heads, d.key_dim, d.value_dim))
        return {"window": (dtype, (d.kernel - 1, d.channels)), "memory": memory}

    def of_rank(self, world: int) -> "ModelConfig":
        """What one of `world` ranks has of it. UserError where heads or columns do not divide by them."""
        if world > 1 and self.linear:
            raise UserError(
                f"{self.model_type} has layers of linear attention, which {world} ranks cannot share; use one"
            )
        heads, kv_heads = self.n_heads, self.n_kv_heads
        columns = {name: own for name in ("ffn_dim", "dense_dim") if (own := getattr(self, name))}
        whole = all(own % world == 0 for own in (heads, *columns.values()))
        if not (whole and (kv_heads % world == 0 or world % kv_heads == 0)):
            feed = " and ".join(map(str, columns.values()))
            has = f"{heads} heads, {kv_heads} key-value heads and {feed} feed-forward columns"
            raise UserError(f"{has} do not divide by {world} ranks; start another number of them")
        scale = self.attention_scale or self.head_dim**-0.5
        own = {"n_heads": heads // world, "n_kv_heads": max(1, kv_heads // world)}
        own |= {name: count // world for name, count in columns.items()}
        return replace(self, **own, attention_scale=scale) if world > 1 else self

    @property
    def reach(self) -> int:
        """The most positions that the model is made for. A scaled rotary's are more than max_positions where that is
        the length before the scaling; with yarn both lengths may be told, and of two kinds of rotary one is not scaled.
        """
        stretched = self.max_positions
        if self.rope["rope_type"] == "yarn":
            stretched = self.rope["original_max_position_embeddings"] * self.rope["factor"]
        elif self.rope["rope_type"] in ("linear", "dynamic") and self.local_rope is None:
            stretched *= self.rope["factor"]
        return max(self.max_positions, min(int(stretched), 2**31 - 1))

    @property
    def rope_by_length(self) -> bool:
        """Whether the rotary frequencies of a request depend on how long it is."""
        ropes = (self.rope, self.local_rope or self.rope)
        return any(r["rope_type"] == "dynamic" or r.get("short_factor") != r.get("long_factor") for r in ropes)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json (`raw`). UserError names what is unsupported, missing or senseless."""
        raw = text_part(raw)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(f"model_type {shown(model_type)} is not supported{_what_it_lacks(raw)}")
        conf = _read(raw, FAMILIES[model_type])
        dim, heads = conf["hidden_size"], conf["num_attention_heads"]
        kv_heads = conf.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"config.json: {heads} attention heads do not divide by {kv_heads} key-value heads")
        if not conf.get("head_dim") and dim % heads:
            raise UserError(f"config.json: hidden_size {dim} does not divide by {heads} attention heads")
        head_dim = conf.get("head_dim") or dim // heads
        windowed = _windowed(conf, FAMILIES[model_type])
        rope, local_rope, rotary_dim = _ropes(conf, head_dim, FAMILIES[model_type])
        fields = dict(
            model_type=model_type,
            vocab_size=conf["vocab_size"],
            dim=dim,
            n_layers=conf["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_dim=conf["intermediate_size"] or 4 * dim,
            max_positions=conf["max_position_embeddings"],
            activation=conf["hidden_act"],
            tie_embeddings=conf["tie_word_embeddings"],
            norm_eps=conf.get("rms_norm_eps", 1e-5),
            qkv_bias=conf.get("attention_bias", False),
            output_bias=conf.get("attention_bias", False),
            sliding_window=conf["sliding_window"] if windowed else None,
            windowed=windowed,
            ffn_bias=conf.get("mlp_bias", False),
            query_scaling=_query_scaling(conf, rope),
            rotary_dim=rotary_dim,
            rope=rope,
            local_rope=local_rope,
            dtype=conf["dtype"] or torch.float32,
        )
        return cls(**(fields | FAMILIES[model_type].fields(conf)))


def _what_it_lacks(raw: dict[str, Any]) -> str:
    """The end of the error for an unknown family: what nobody here reads of its config.json, and whose is most like it.

    A field counts the more, the fewer families read it: one that has experts is nearest to another that has them.
    """
    text = raw.get("text_config")
    raw = text if isinstance(text, dict) else raw
    readers = {family: _names_of(FAMILIES[family]) for family in FAMILIES}
    weights = {name: 1 / sum(name in names for names in readers.values()) for name in set().union(*readers.values())}
    given = {name for name, value in raw.items() if value not in (None, False) and not HARMLESS.fullmatch(name)}
    known = given & weights.keys()
    if not known:
        return f"; supported: {', '.join(FAMILIES)}"

    def likeness(family: str) -> float:
        both, either = (sum(map(weights.get, some)) for some in (known & readers[family], known | readers[family]))
        alike = commonprefix([str(raw.get("model_type")), family])
        return both / either + 0.2 * len(alike) / len(family)

    foreign = [cut(name, 40) for name in raw if name in given - known]
    rest = f" and {len(foreign) - 6} more" if len(foreign) > 6 else ""
    lacks = f"no family reads its {', '.join(foreign[:6])}{rest}" if foreign else "its fields are known, its layers not"
    nearest = max(FAMILIES, key=likeness)
    return f": {lacks}; {f'the nearest supported one is {nearest}' if likeness(nearest) > 0.25 else 'none is like it'}"


def _names_of(family: Family) -> set[str]:
    """What it calls the fields that it reads in a config.json."""
    return {own for name in family.defaults for own in family.names.get(name, (name,))}


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The text model's own config.json, where `raw` is that of a model of several modalities; else `raw`."""
    wrapper = raw.get("model_type")
    if not isinstance(wrapper, str) or wrapper not in WRAPPERS:
        return raw
    text = _OBJECT.checked("text_config", raw.get("text_config"))
    dtype = next((raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None), None)
    shared = {} if dtype is None else {"dtype": dtype}
    shared |= {"quantization_config": raw["quantization_config"]} if "quantization_config" in raw else {}
    tied = raw["tie_word_embeddings"] if raw.get("tie_word_embeddings") is not None else True
    return {"model_type": WRAPPERS[wrapper]} | text | shared | {"tie_word_embeddings": tied}


def _read(raw: dict[str, Any], family: Family) -> dict[str, Any]:
    """All fields of the family under llama's names: those of `raw` checked, the others as in its class."""
    if (settings := raw.get("quantization_config")) is not None:
        quantized.scheme(settings)  # says nothing of what the model computes; refuses what cannot be read
    conf = family.defaults | {"model_type": raw["model_type"]}
    names = {"dtype": ("torch_dtype", "dtype")} | family.names
    for name, default in family.defaults.items():
        kind = FIELDS[name] if default is not None or FIELDS[name].null else FIELDS[name].or_null
        found = [own for own in names.get(name, (name,)) if own in raw]
        if found:
            own = ([own for own in found if raw[own] is not None] or found)[-1]
            conf[name] = kind.checked(own, raw[own])
    if conf.get("rope_parameters") is None:
        conf["rope_parameters"] = family.defaults.get("rope_parameters")
    only = ONLY | ({"word_embed_proj_dim": conf["hidden_size"]} if raw["model_type"] == "opt" else {})
    for name, value in only.items():
        if (found := raw.get(name)) is not None and (type(found), found) != (type(value), value):
            raise UserError(f"{name} {shown(found)} is not supported for {raw['model_type']}; only {value} is")
    return conf


def _experts(conf: dict[str, Any]) -> dict[str, Any]:
    experts, chosen = conf["num_local_experts"], conf["num_experts_per_tok"]
    if chosen > experts:
        raise UserError(f"config.json: num_experts_per_tok must be at most the {experts} experts, not {chosen}")
    return dict(experts=experts, experts_per_token=chosen, router_norm=conf.get("norm_topk_prob", True))


def _dense(conf: dict[str, Any]) -> dict[str, Any]:
    """The layers without experts."""
    named, period = conf["mlp_only_layers"] or [], conf["decoder_sparse_step"]
    dense = tuple(layer for layer in range(conf["num_hidden_layers"]) if layer in named or (layer + 1) % period)
    return dict(dense=dense, dense_dim=conf["intermediate_size"] if dense else None)


def _granite(conf: dict[str, Any]) -> dict[str, Any]:
    return dict(
        embed_scale=conf["embedding_multiplier"],
        attention_scale=conf["attention_multiplier"],
        residual_scale=conf["residual_multiplier"],
        logit_divisor=conf["logits_scaling"],
    )


def _attention_only(conf: dict[str, Any]) -> dict[str, Any]:
    """Of hybrid models: UserError unless each layer is attention and a dense feed-forward part."""
    layers, family = conf["num_hidden_layers"], conf["model_type"]
    kinds = conf["layers_block_type"] or ["mamba"] * layers
    if len(kinds) != layers:
        raise UserError(f"config.json: layer_types must be a list of {layers}, not of {len(kinds)}")
    if others := sum(kind in ("mamba", "linear_attention") for kind in kinds):
        raise UserError(f"{family} with {others} of {layers} layers mamba is not supported; only with attention alone")
    if experts := conf["num_local_experts"]:
        raise UserError(f"{family} with {experts} experts is not supported; only with 0 (num_local_experts)")
    return {} if conf["position_embedding_type"] == "rope" else {"unturned": tuple(range(layers))}


def _delta(conf: dict[str, Any]) -> dict[str, Any]:
    """Layers of linear attention between those of gated attention."""
    layers, kinds, period = conf["num_hidden_layers"], conf["mixers"], conf["full_attention_interval"]
    if kinds is None:
        kinds = ["linear_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
    if len(kinds) != layers:
        raise UserError(f"config.json: layer_types must be a list of {layers}, not of {len(kinds)}")
    linear = tuple(layer for layer in range(layers) if kinds[layer] == "linear_attention")
    if len(linear) == layers:
        raise UserError(f"config.json: none of the {layers} layers has full_attention, which at least one must have")
    heads = conf["linear_num_key_heads"], conf["linear_num_value_heads"]
    if heads[1] % heads[0]:
        raise UserError(f"config.json: linear_num_value_heads {heads[1]} does not divide by {heads[0]} key heads")
    sizes = conf["linear_key_head_dim"], conf["linear_value_head_dim"], conf["linear_conv_kernel_dim"]
    form = dict(norm_shift=1.0, qk_norm="head", attention_gate=True)
    return form | dict(linear=linear, delta=Delta(*heads, *sizes) if linear else None)


def _gemma(conf: dict[str, Any]) -> dict[str, Any]:
    return dict(
        norm_shift=1.0,
        post_norms=True,
        attention_scale=conf["query_pre_attn_scalar"] ** -0.5,
        embed_scale=conf["hidden_size"] ** 0.5,
        logit_softcap=conf["final_logit_softcapping"],
    )


def _unturned(conf: dict[str, Any]) -> tuple[int, ...]:
    """The layers without rotary."""
    layers, period = range(conf["num_hidden_layers"]), conf["no_rope_layer_interval"]
    if (turned := conf["no_rope_layers"]) is None:
        turned = [(layer + 1) % period for layer in layers]
    if len(turned) != len(layers):
        raise UserError(f"config.json: no_rope_layers must be a list of {len(layers)}, not of {len(turned)}")
    return tuple(layer for layer in layers if not turned[layer])


def _falcon(conf: dict[str, Any]) -> dict[str, Any]:
    """Two generations: the newer one (40B) has groups of query heads, and mostly a second norm in front of the
    feed-forward part. Of the older one most have a single key-value head.
    """
    newer, heads = bool(conf["new_decoder_architecture"]), conf["num_attention_heads"]
    parallel = newer or bool(conf["parallel_attn"])
    shared = parallel and (conf["num_ln_in_parallel_attn"] or (2 if newer else 1)) == 1
    kv_heads = conf["num_key_value_heads"] or heads
    if not newer:
        if not conf["multi_query"] and kv_heads != heads:
            raise UserError(f"config.json: num_kv_heads must be {heads} without groups of heads, not {kv_heads}")
        kv_heads = 1 if conf["multi_query"] else heads
    biases = dict.fromkeys(("qkv_bias", "output_bias", "ffn_bias"), bool(conf["bias"]))
    return dict(norm="layer", ffn_gate=False, parallel=parallel, shared_norm=shared, n_kv_heads=kv_heads) | biases


def _windowed(conf: dict[str, Any], family: Family) -> tuple[int, ...]:
    """The layers that have a sliding window."""
    layers, kinds = range(conf["num_hidden_layers"]), conf.get("layer_types")
    window = conf.get("sliding_window") if conf.get("use_sliding_window", True) else None
    if kinds is not None:
        if len(kinds) != len(layers):
            raise UserError(f"config.json: layer_types must be a list of {len(layers)}, not of {len(kinds)}")
        windowed = tuple(layer for layer in layers if kinds[layer] == "sliding_attention")
    elif window is None and conf["model_type"] not in ALTERNATING:
        windowed = ()
    else:
        windowed = tuple(family.windows(conf))
    if windowed and window is None:
        raise UserError(f"config.json: {len(windowed)} layers with sliding attention, but no sliding_window is in use")
    return windowed


def _ropes(
    conf: dict[str, Any], head_dim: int, family: Family
) -> tuple[dict[str, Any], dict[str, Any] | None, int | None]:
    """Rotary parameters, those of layers with a window if they have their own, and the size of what is turned."""
    if "rope_theta" not in conf:  # learned positions
        return {"rope_type": "default", "rope_theta": 1e4}, None, None
    given, scaling = conf["rope_parameters"], conf["rope_scaling"]
    local = None
    if "rope_local_base_freq" in conf:
        given = dict.fromkeys(LAYER_TYPES, {"rope_type": "default"}) if given is None else given
        if unknown := given.keys() - set(LAYER_TYPES):
            raise UserError(
                f"config.json: rope_parameters must be of {' and '.join(LAYER_TYPES)}, not {shown(unknown)}"
            )
        own, others = (FIELDS["rope_parameters"].checked(kind, given.get(kind)) or {} for kind in LAYER_TYPES)
        given = own | (scaling or {})
        local = {"rope_theta": conf["rope_local_base_freq"]} | others
    else:
        given = scaling or given or {}
        if found := given.keys() & set(LAYER_TYPES):
            raise UserError(f"rope_parameters of {min(found)} alone are not supported for {conf['model_type']}")
    shared = {"partial_rotary_factor": conf["partial_rotary_factor"]}
    given = {"rope_theta": conf["rope_theta"]} | shared | given
    partial = FIELDS["partial_rotary_factor"].checked("partial_rotary_factor", given["partial_rotary_factor"])
    if partial != 1 and conf["model_type"] not in PARTIAL:
        raise UserError(f"partial_rotary_factor {partial} is not supported for {conf['model_type']}; only 1.0 is")
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or rotary_dim == 0:
        raise UserError(f"config.json: the rotary part of a head must be even, not {rotary_dim} of {head_dim}")
    if local is not None:  # transformers does not read these there
        for name, only in (("partial_rotary_factor", 1.0), ("truncate", True)):
            if any(rope.get(name, only) != only for rope in (given, local)):
                raise UserError(f"{name} is not supported for {conf['model_type']}; only {only} is")
    return (
        _rope(conf, given, rotary_dim, family),
        None if local is None else _rope(conf, local, rotary_dim, family),
        rotary_dim,
    )


def _rope(conf: dict[str, Any], given: dict[str, Any], rotary_dim: int, family: Family) -> dict[str, Any]:
    """Rotary parameters in one form: what their type needs, and no more."""

    def take(name: str, default: Any = None) -> Any:
        return FIELDS[name].checked(name, given.get(name, default))

    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in family.ropes:
        known = ", ".join(family.ropes)
        raise UserError(f"rope type {shown(kind)} is not supported for {conf['model_type']}; supported: {known}")
    rope = {"rope_type": kind, "rope_theta": take("rope_theta")}
    if kind in ("linear", "dynamic", "llama3"):
        rope["factor"] = take("factor")
    if kind == "dynamic" and rotary_dim < 4:
        raise UserError(f"config.json: rope type 'dynamic' must turn at least 4 elements of a head, not {rotary_dim}")
    if kind in ("llama3", "longrope", "yarn"):
        name = "original_max_position_embeddings"
        rope[name] = trained = conf.get(name) or take(name, conf["max_position_embeddings"])
        if trained is None:
            raise UserError(f"config.json: rope type {kind!r} needs an {name}, not null")
    if kind == "llama3":
        rope |= {name: take(name) for name in ("low_freq_factor", "high_freq_factor")}
        if rope["high_freq_factor"] <= rope["low_freq_factor"]:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            raise UserError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
    if kind == "longrope":
        rope |= _longrope(conf, given, rotary_dim, trained, take)
    if kind == "yarn":
        rope |= _yarn(conf, given, trained, take)
        if rope["rope_theta"] == 1:
            raise UserError("config.json: rope type 'yarn' needs a rope_theta other than 1")
    return rope


def _query_scaling(conf: dict[str, Any], rope: dict[str, Any]) -> tuple[float, int] | None:
    if "llama_4_scaling_beta" not in conf:
        return None
    given, name = conf["rope_scaling"] or conf["rope_parameters"], "original_max_position_embeddings"
    growth = FIELDS["llama_4_scaling_beta"].checked("llama_4_scaling_beta", given.get("llama_4_scaling_beta"))
    length = rope.get(name) or FIELDS[name].checked(name, given.get(name))
    if growth and length is None:
        raise UserError(f"config.json: llama_4_scaling_beta needs an {name}, not null")
    return (growth, length) if growth else None


def _longrope(
    conf: dict[str, Any], given: dict[str, Any], rotary_dim: int, trained: int, take: Callable[[str], Any]
) -> dict[str, Any]:
    """The factors of longrope, and what it multiplies attention's logits with, by how far it goes beyond `trained`."""
    rope = {name: take(name) for name in ("short_factor", "long_factor")}
    for name, factors in rope.items():
        if len(factors) != rotary_dim // 2:
            raise UserError(f"config.json: {name} must be a list of {rotary_dim // 2}, not of {len(factors)}")
    factor = conf["max_position_embeddings"] / trained if given.get("factor") is None else take("factor")
    scale = take("attention_factor")
    if scale is None and factor > 1 and trained == 1:
        raise UserError("config.json: original_max_position_embeddings must be at least 2, not 1")
    scale = scale or (math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0)
    return rope | {"attention_factor": scale}


def _yarn(conf: dict[str, Any], given: dict[str, Any], trained: int, take: Callable[..., Any]) -> dict[str, Any]:
    """The bounds between which yarn blends (in turns within `trained` tokens), and what it scales attention with."""
    factor = conf["max_position_embeddings"] / trained if given.get("factor") is None else take("factor")
    mscale, everywhere = take("mscale"), take("mscale_all_dim")
    grown = math.log(max(factor, 1.0)) / 10
    scale = (1 + mscale * grown) / (1 + everywhere * grown) if mscale and everywhere else 1 + grown
    rope = {"factor": factor, "attention_factor": take("attention_factor") or scale, "truncate": take("truncate", True)}
    return rope | {"beta_fast": take("beta_fast") or 32.0, "beta_slow": take("beta_slow") or 1.0}


def parameters(c: ModelConfig) -> int:
    """How many numbers the weights are."""
    norm = 2 if c.norm == "layer" else 1
    heads, groups = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    projected = (2 if c.attention_gate else 1) * heads + 2 * groups
    attention = c.dim * projected + heads * c.dim + projected * c.qkv_bias + c.dim * c.output_bias
    attention += c.n_heads * c.attention_sinks
    attention += norm * {None: 0, "head": 2 * c.head_dim, "projection": heads + groups}[c.qk_norm]
    ffn = 0
    for experts, columns in map(c.feed, range(c.n_layers)):
        width = (2 if c.ffn_gate else 1) * columns
        ffn += max(1, experts) * (c.dim * (width + columns) + (width + c.dim) * c.ffn_bias)
        ffn += experts * (c.dim + c.router_bias) + (experts > 0) * c.dim * (3 * c.shared_dim + 1 if c.shared_dim else 0)
    norms = norm * c.dim * (c.pre_norms * (2 - c.shared_norm) + 2 * c.post_norms)
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim
    if c.position_offset is not None:
        tables += (c.max_positions + c.position_offset) * c.dim
    linear = 0
    if d := c.delta:
        out = d.value_heads * d.value_dim
        linear = c.dim * (d.channels + 2 * out + 2 * d.value_heads)
        linear += d.channels * d.kernel + 2 * d.value_heads + d.value_dim
    mixers = (c.n_layers - len(c.linear)) * attention + len(c.linear) * linear
    return mixers + c.n_layers * norms + ffn + norm * c.dim + tables
