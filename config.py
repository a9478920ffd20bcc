"""What a model computes: `ModelConfig`, and how each family's Hugging Face config.json is read into one.

Nothing that changes the result is ignored: it is a field, or an error of one line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from errors import UserError


class Family(NamedTuple):
    """What a family says where its config.json is silent, or in words of its own."""

    defaults: dict[str, Any] = {}  # under the names of config.json
    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda conf: {}  # config.json -> fields of ModelConfig
    windows: str | None = None  # the layers that a sliding window is for: "all", or "by layer"
    ffn_times: int | None = None  # the feed-forward size in times of the model's, where config.json names none


# A family is listed here or it is not supported.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(dict(num_key_value_heads=8, sliding_window=4096), windows="all"),
    "mixtral": Family(
        dict(num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-5, num_local_experts=8, num_experts_per_tok=2),
        lambda conf: dict(experts=conf["num_local_experts"], experts_per_token=conf["num_experts_per_tok"]),
        windows="all",
    ),
    "qwen2": Family(
        dict(sliding_window=4096, use_sliding_window=False, max_window_layers=28),
        lambda conf: dict(qkv_bias=True, output_bias=False),
        windows="by layer",
    ),
    "qwen3": Family(
        dict(head_dim=128, sliding_window=4096, use_sliding_window=False, max_window_layers=28),
        lambda conf: dict(qk_norm="head"),
        windows="by layer",
    ),
    "smollm3": Family(
        dict(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True, use_sliding_window=False)
        | dict(max_position_embeddings=32768, no_rope_layer_interval=4),
        lambda conf: dict(unturned=_unturned(conf)),
        windows="by layer",
    ),
    "granite": Family(
        dict(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0),
        lambda conf: dict(
            embed_scale=conf["embedding_multiplier"],
            attention_scale=conf["attention_multiplier"],
            residual_scale=conf["residual_multiplier"],
            logit_divisor=conf["logits_scaling"],
        ),
    ),
    "phi3": Family(
        dict(rms_norm_eps=1e-5, partial_rotary_factor=1.0, original_max_position_embeddings=4096), windows="all"
    ),
    "gemma2": Family(
        dict(
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=8192,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            sliding_window_pattern=2,
            tie_word_embeddings=True,
        ),
        lambda conf: _gemma(conf) | dict(attention_softcap=conf["attn_logit_softcapping"]),
        windows="by layer",
    ),
    "gemma3_text": Family(
        dict(
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=131072,
            query_pre_attn_scalar=256,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            sliding_window=4096,
            sliding_window_pattern=6,
            tie_word_embeddings=True,
        ),
        lambda conf: _gemma(conf) | dict(qk_norm="head"),
        windows="by layer",
    ),
    "olmo2": Family(dict(rms_norm_eps=1e-5), lambda conf: dict(pre_norms=False, post_norms=True, qk_norm="projection")),
    "gpt_neox": Family(
        dict(attention_bias=True, hidden_act="gelu", mlp_bias=True, partial_rotary_factor=0.25, rms_norm_eps=1e-5),
        lambda conf: dict(norm="layer", ffn_gate=False, parallel=conf.get("use_parallel_residual", True)),
    ),
    "falcon": Family(
        dict(hidden_act="gelu", rms_norm_eps=1e-5, tie_word_embeddings=True),
        lambda conf: _falcon(conf),
        ffn_times=4,
    ),
    "opt": Family(
        dict(hidden_act="relu", enable_bias=True, rms_norm_eps=1e-5, tie_word_embeddings=True),
        lambda conf: dict(norm="layer", ffn_gate=False, position_offset=2),
    ),
}


# What some families call it -> its names in llama's config.json. Where both stand, the former counts.
ALIASES = {
    "activation": ["hidden_act"],
    "activation_function": ["hidden_act"],
    "hidden_activation": ["hidden_act"],
    "bias": ["attention_bias", "mlp_bias"],
    "enable_bias": ["attention_bias", "mlp_bias"],
    "ffn_dim": ["intermediate_size"],
    "ffn_hidden_size": ["intermediate_size"],
    "num_kv_heads": ["num_key_value_heads"],
    "layer_norm_eps": ["rms_norm_eps"],
    "layer_norm_epsilon": ["rms_norm_eps"],
    "rotary_emb_base": ["rope_theta"],
    "rotary_pct": ["partial_rotary_factor"],
}
# What only one value of is supported.
ONLY = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "clip_qkv": None,
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "use_bidirectional_attention": False,
}
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")  # null: none; else: the default
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "longrope")


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
    sliding_window: int | None = None
    windowed: tuple[int, ...] = ()  # the layers that have it
    # feed-forward
    ffn_bias: bool = False
    ffn_gate: bool = True
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    # rotary
    rotary_dim: int | None = None  # how much of a head is turned; None: all
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    local_rope: dict[str, Any] | None = None  # another one for the layers with a window
    unturned: tuple[int, ...] = ()  # the layers without any
    dtype: torch.dtype = torch.float32

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a token of `layer` may attend to; None: all before it."""
        return self.sliding_window if layer in self.windowed else None

    @property
    def rope_by_length(self) -> bool:
        """Whether the rotary frequencies of a request depend on how long it is."""
        ropes = (self.rope, self.local_rope or self.rope)
        return any(r["rope_type"] == "dynamic" or r.get("short_factor") != r.get("long_factor") for r in ropes)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json (`raw`). UserError names what is unsupported, missing or senseless."""
        model_type = raw.get("model_type")
        if model_type not in FAMILIES:
            raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise UserError(f"quantized checkpoints ({method}) are not supported; use the unquantized weights")
        family = FAMILIES[model_type]
        conf = family.defaults | {k: v for k, v in raw.items() if v is not None or k in NULLABLE}
        conf |= {name: conf[alias] for alias, names in ALIASES.items() if alias in conf for name in names}
        for name, only in (ONLY | {"word_embed_proj_dim": conf.get("hidden_size")}).items():
            if conf.get(name, only) != only:
                raise UserError(f"{name} {conf[name]!r} is not supported for {model_type}; only {only} is")
        if family.ffn_times and isinstance(conf.get("hidden_size"), int):
            conf.setdefault("intermediate_size", family.ffn_times * conf["hidden_size"])
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        optional = ("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok")
        for name in needed + tuple(k for k in optional if k in conf):
            if not isinstance(conf.get(name), int) or conf[name] < 1:
                raise UserError(f"config.json: {name} must be a positive integer, not {conf.get(name)!r}")
        dim, heads = conf["hidden_size"], conf["num_attention_heads"]
        kv_heads = conf.get("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(f"config.json: {heads} attention heads do not divide by {kv_heads} key-value heads")
        if "head_dim" not in conf and dim % heads:
            raise UserError(f"config.json: hidden_size {dim} does not divide by {heads} attention heads")
        head_dim = conf.get("head_dim", dim // heads)
        if (activation := conf.get("hidden_act", "silu")) not in ACTIVATIONS:
            raise UserError(f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        windowed = _windowed(conf, family.windows)
        rope, local_rope, rotary_dim = _ropes(conf, head_dim)
        fields = dict(
            model_type=model_type,
            vocab_size=conf["vocab_size"],
            dim=dim,
            n_layers=conf["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_dim=conf["intermediate_size"],
            max_positions=conf.get("max_position_embeddings", 2048),
            activation=activation,
            tie_embeddings=conf.get("tie_word_embeddings", False),
            norm_eps=conf.get("rms_norm_eps", 1e-6),
            qkv_bias=conf.get("attention_bias", False),
            output_bias=conf.get("attention_bias", False),
            sliding_window=conf["sliding_window"] if windowed else None,
            windowed=windowed,
            ffn_bias=conf.get("mlp_bias", False),
            rotary_dim=rotary_dim,
            rope=rope,
            local_rope=local_rope,
            dtype=_dtype(conf),
        )
        return cls(**(fields | family.fields(conf)))


def _gemma(conf: dict[str, Any]) -> dict[str, Any]:
    return dict(
        norm_shift=1.0,
        post_norms=True,
        attention_scale=conf["query_pre_attn_scalar"] ** -0.5,
        embed_scale=conf["hidden_size"] ** 0.5,
        logit_softcap=conf.get("final_logit_softcapping"),
    )


def _unturned(conf: dict[str, Any]) -> tuple[int, ...]:
    layers, period = range(conf["num_hidden_layers"]), conf["no_rope_layer_interval"]
    turned = conf.get("no_rope_layers", [(layer + 1) % period for layer in layers])  # by its name the opposite
    if len(turned) != len(layers):
        raise UserError(f"config.json: no_rope_layers must be {len(layers)} numbers, not {turned}")
    return tuple(layer for layer in layers if not turned[layer])


def _falcon(conf: dict[str, Any]) -> dict[str, Any]:
    """Two generations: the newer one (40B) has groups of query heads, and mostly a second norm in front of the
    feed-forward part. Of the older one most have a single key-value head.
    """
    newer = conf.get("new_decoder_architecture", False)
    parallel = newer or conf.get("parallel_attn", True)
    shared = parallel and conf.get("num_ln_in_parallel_attn", 2 if newer else 1) == 1
    one_head = conf.get("multi_query", True) and not newer
    heads = {"n_kv_heads": 1} if one_head else {}
    return dict(norm="layer", ffn_gate=False, parallel=parallel, shared_norm=shared) | heads


def _windowed(conf: dict[str, Any], which: str | None) -> tuple[int, ...]:
    """The layers that have a sliding window."""
    window, layers = conf.get("sliding_window"), range(conf["num_hidden_layers"])
    if window is None and "rope_local_base_freq" in conf:
        raise UserError(f"{conf['model_type']} without a sliding_window is not supported")
    if which is None or window is None or not conf.get("use_sliding_window", True):
        return ()
    if type(window) is not int or window < 1:
        raise UserError(f"config.json: sliding_window must be a positive integer, not {window!r}")
    if which == "all":
        return tuple(layers)
    if (kinds := conf.get("layer_types")) is not None:
        known = ("sliding_attention", "full_attention")
        if len(kinds) != len(layers) or not set(kinds) <= set(known):
            raise UserError(f"config.json: layer_types must be {len(layers)} of {' or '.join(known)}, not {kinds}")
        return tuple(layer for layer in layers if kinds[layer] == "sliding_attention")
    if (period := conf.get("sliding_window_pattern")) is not None:  # every so manyth layer has none
        return tuple(layer for layer in layers if (layer + 1) % period)
    if "max_window_layers" not in conf:
        raise UserError(f"config.json: {conf['model_type']} with a sliding_window needs layer_types")
    return tuple(layers[conf["max_window_layers"] :])


def _ropes(conf: dict[str, Any], head_dim: int) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """Rotary parameters, those of layers with a window if they have their own, and the size of what is turned."""
    found = conf.get("rope_parameters") or {}
    kinds = [found.get("full_attention"), found.get("sliding_attention")]
    local = {"rope_theta": conf["rope_local_base_freq"]} if "rope_local_base_freq" in conf else None
    if any(kinds):
        found, local = kinds[0] or {}, {**(local or {}), **(kinds[1] or {})}
    older = {"rope_theta": conf.get("rope_theta", 10000.0), **(conf.get("rope_scaling") or {})}
    partial = found.get("partial_rotary_factor", conf.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and "partial_rotary_factor" not in FAMILIES[conf["model_type"]].defaults:
        raise UserError(f"partial_rotary_factor {partial} is not supported for {conf['model_type']}; only 1.0 is")
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UserError(f"config.json: the rotary part of a head must be even, not {rotary_dim} of {head_dim}")
    return _rope(conf, older | found, rotary_dim), _rope(conf, local, rotary_dim) if local else None, rotary_dim


def _rope(conf: dict[str, Any], rope: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
    """`rope` in one form, checked."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope = rope | {"rope_type": (kind := {"su": "longrope"}.get(kind, kind))}
    if kind not in ROPE_TYPES:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    wanted = {"linear": ["factor"], "dynamic": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    for name in wanted.get(kind, []):
        if not isinstance(rope.get(name), (int, float)) or rope[name] <= 0:
            raise UserError(f"config.json: rope type {kind!r} needs a positive {name}, not {rope.get(name)!r}")
    if kind in ("llama3", "longrope"):
        trained, name = conf.get("max_position_embeddings", 2048), "original_max_position_embeddings"
        rope[name] = conf.get(name, rope.get(name, trained))
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if not isinstance(rope.get(name), list) or len(rope[name]) != rotary_dim // 2:
                raise UserError(f"config.json: rope type {kind!r} needs a list of {rotary_dim // 2} as {name}")
        factor = rope.get("factor") or trained / rope["original_max_position_embeddings"]
        grown = 1 + math.log(max(factor, 1)) / math.log(rope["original_max_position_embeddings"])
        rope["attention_factor"] = rope.get("attention_factor") or math.sqrt(grown)
    return rope


def _dtype(conf: dict[str, Any]) -> torch.dtype:
    name = str(conf.get("dtype", conf.get("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise UserError(f"config.json: dtype {name!r} is not supported; use float16, bfloat16, float32 or float64")
    return getattr(torch, name)
