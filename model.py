"""The transformer: one file for every family, steered by `ModelConfig` fields that come from config.json.

Shapes, here and in kvcache.py, engine.py and policies/tokens:

    B  rows of the batch           H  query heads                    D  head dimension
    S  prompt length (padded)      K  key-value heads                C  model dimension
    T  tokens in this call         G  = H // K query heads a group   N  slots of one layer's cache

`Block.prefill` runs a whole prompt and hands out what the cache needs; `Block.decode` runs one token per row over a
layer's slots. The cache is an argument, never a member.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvcache import LayerCache, attend

# What the families differ in where config.json is silent. A family is listed here or it is not supported.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(head_dim=128, qk_norm=True),
}
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that changes what the model computes. Lengths in tokens, sizes in elements."""

    model_type: str
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json (`raw`). ValueError names what is unsupported, missing or senseless."""
        model_type = raw.get("model_type")
        if model_type not in FAMILIES:
            raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise ValueError(f"quantized checkpoints ({method}) are not supported; use the unquantized weights")
        conf = {**FAMILIES[model_type], **{k: v for k, v in raw.items() if v is not None or k == "sliding_window"}}
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in needed + tuple(k for k in ("num_key_value_heads", "head_dim") if k in conf):
            if not isinstance(conf.get(name), int) or conf[name] < 1:
                raise ValueError(f"config.json: {name} must be a positive integer, not {conf.get(name)!r}")
        dim, heads = conf["hidden_size"], conf["num_attention_heads"]
        kv_heads = conf.get("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: {heads} attention heads do not divide by {kv_heads} key-value heads")
        if "head_dim" not in conf and dim % heads:
            raise ValueError(f"config.json: hidden_size {dim} does not divide by {heads} attention heads")
        if (activation := conf.get("hidden_act", "silu")) not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return cls(
            model_type=model_type,
            vocab_size=conf["vocab_size"],
            dim=dim,
            n_layers=conf["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=conf.get("head_dim", dim // heads),
            ffn_dim=conf["intermediate_size"],
            max_positions=conf.get("max_position_embeddings", 2048),
            norm_eps=conf.get("rms_norm_eps", 1e-6),
            activation=activation,
            tie_embeddings=conf.get("tie_word_embeddings", False),
            qkv_bias=conf.get("qkv_bias", conf.get("attention_bias", False)),
            output_bias=conf.get("attention_bias", False) and model_type != "qwen2",
            ffn_bias=conf.get("mlp_bias", False) and model_type == "llama",
            qk_norm=conf.get("qk_norm", False),
            sliding_window=_sliding_window(conf),
            rope=_rope(conf),
            dtype=_dtype(conf),
        )


def _sliding_window(conf: dict[str, Any]) -> int | None:
    """The window if any layer has one. Qwen's is off unless `use_sliding_window`, then from `max_window_layers` on."""
    if conf["model_type"] == "llama":
        return None
    if conf["model_type"] == "mistral":
        return conf["sliding_window"]
    kinds = conf.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention"] * max(0, conf["num_hidden_layers"] - conf.get("max_window_layers", 28))
    windowed = conf.get("use_sliding_window", False) and "sliding_attention" in kinds
    return conf.get("sliding_window", 4096) if windowed else None


def _rope(conf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form, from `rope_parameters` or from the older `rope_theta` + `rope_scaling`."""
    rope = {"rope_theta": conf.get("rope_theta", 10000.0), **(conf.get("rope_scaling") or {})}
    rope |= conf.get("rope_parameters") or {}
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if (partial := rope.get("partial_rotary_factor", conf.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported for {conf['model_type']}; only 1.0 is")
    wanted = {"linear": ["factor"], "dynamic": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    for name in wanted.get(kind, []):
        if not isinstance(rope.get(name), (int, float)) or rope[name] <= 0:
            raise ValueError(f"config.json: rope type {kind!r} needs a positive {name}, not {rope.get(name)!r}")
    return rope


def _dtype(conf: dict[str, Any]) -> torch.dtype:
    name = str(conf.get("dtype", conf.get("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"config.json: dtype {name!r} is not supported; use float16, bfloat16, float32 or float64")
    return getattr(torch, name)


class PrefilledLayer(NamedTuple):
    """What one layer hands out for a prompt: k, v [B, K, S, D], signal [B], scores [B, K, S] if the policy scores."""

    k: Tensor
    v: Tensor
    signal: Tensor
    scores: Tensor | None


class Transformer(nn.Module):
    """Embedding, blocks, head. The loop over blocks is the caller's: see `forward` for the plain one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., C] -> logits [..., vocab]."""
        return linear(self.norm(x), self.embed.weight if self.config.tie_embeddings else self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> logits [B, S, vocab], without a cache."""
        x, rotary = self.embed(ids), self.rotary(ids.shape[1])
        angles = rotary_angles(torch.arange(ids.shape[1], device=ids.device), rotary)
        for block in self.layers:
            x, _ = block.prefill(x, angles)
        return self.logits(x)

    def rotary(self, length: int) -> Tensor:
        """Inverse frequencies [D / 2] for a request of `length` tokens in all (only dynamic NTK depends on it).

        fp32, fp64 in an fp64 model. linear: arXiv 2306.15595; dynamic NTK and llama3 as published with the models.
        """
        c, rope, weight = self.config, self.config.rope, self.embed.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        base, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0)
        if kind == "dynamic":
            stretch = factor * max(length, c.max_positions) / c.max_positions - (factor - 1)
            base *= stretch ** (c.head_dim / (c.head_dim - 2))
        exponents = torch.arange(0, c.head_dim, 2, device=weight.device, dtype=wide) / c.head_dim
        frequencies = 1.0 / base**exponents
        if kind == "linear":
            return frequencies / factor
        if kind == "llama3":  # long wavelengths are stretched by `factor`, short ones kept, those between blended
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            trained = rope.get("original_max_position_embeddings", c.max_positions)
            turns = trained * frequencies / (2 * torch.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return frequencies * (keep + (1 - keep) / factor)
        return frequencies


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def prefill(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: Tensor | None = None, policy: Any = None):
        """x [B, S, C] -> (x, PrefilledLayer). Rows are padded on the right; `lengths` [B] says how much is real."""
        added, k, v, scores = self.attention.prefill(self.attention_norm(x), angles, lengths, policy)
        after = x + added
        signal = importance(x, after, lengths)
        return after + self.feed_forward(self.ffn_norm(after)), PrefilledLayer(k, v, signal, scores)

    def decode(self, x: Tensor, rotary: Tensor, layer: LayerCache, seen: Tensor, policy: Any) -> Tensor:
        """x [B, 1, C], the token at position `seen` [B] -> x. Writes the layer's cache in place."""
        x = x + self.attention.decode(self.attention_norm(x), rotary, layer, seen, policy)
        return x + self.feed_forward(self.ffn_norm(x))


def importance(before: Tensor, after: Tensor, lengths: Tensor | None = None) -> Tensor:
    """SqueezeAttention's signal (arXiv 2404.04793): mean over a row's own tokens of cos(x, x + attention(x)).

    before, after [B, S, C]: the residual stream on either side of the attention branch. Returns [B], in fp32 (fp64 for
    an fp64 model). High: attention changed little, the layer is less important.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    cosine = F.cosine_similarity(before.to(wide), after.to(wide), dim=-1)
    if lengths is None:
        return cosine.mean(-1)
    real = torch.arange(cosine.shape[1], device=cosine.device) < lengths[:, None]
    return cosine.masked_fill(~real, 0).sum(-1) / lengths


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.wqkv = Linear(config.dim, q_size + 2 * kv_size, bias=config.qkv_bias)
        self.wo = Linear(q_size, config.dim, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k, v [B, K, T, D], not rotated yet."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return (self.q_norm(q), self.k_norm(k), v) if self.q_norm else (q, k, v)

    def prefill(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: Tensor | None, policy: Any):
        q, k_raw, v = self.project(x)
        q, k = rotate(q, *angles), rotate(k_raw, *angles)
        # Right padding needs no mask: a real token never looks ahead.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        scores = None
        if policy is not None:
            scores = policy.score_prompt(q, k, lengths)
            k[:, :, : policy.sinks] = k_raw[:, :, : policy.sinks]
        return self.wo(out.transpose(1, 2).flatten(2)), k, v, scores

    def decode(self, x: Tensor, rotary: Tensor, layer: LayerCache, seen: Tensor, policy: Any) -> Tensor:
        q, k_raw, v = self.project(x)
        here = rotary_angles(seen[:, None, None], rotary)
        q, k = rotate(q, *here), rotate(k_raw, *here)
        sink_keys = None
        if policy.sinks:  # the first tokens are kept unrotated and turned to their position inside the cache
            k = torch.where((seen < policy.sinks)[:, None, None, None], k_raw, k)
        slot = policy.slot(seen, layer)
        layer.write(slot, k, v)
        if policy.sinks:
            slots = layer.k.shape[2]
            sinks = torch.arange(min(policy.sinks, slots), device=x.device)
            turned = sinks + (seen + 1 - slots).clamp(min=0)[:, None, None]
            sink_keys = rotate(layer.k[:, :, : policy.sinks], *rotary_angles(turned, rotary))
        out, probs = attend(q, layer.k, layer.v, valid=seen + 1, leading_keys=sink_keys)
        policy.observe(layer, slot, seen, probs)
        return self.wo(out.flatten(1)[:, None])


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.w13 = Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)  # gate and up, fused
        self.w2 = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(self.activation(gate) * up)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; compiled for a single row on a CPU it is a multiply-and-sum, which becomes part of the generated loops.

    There the library's matrix-vector product costs more in its call than in arithmetic on small models, and reaches
    only a part of the memory bandwidth on large ones.
    """
    if x.is_cuda or x.numel() > x.shape[-1] or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    out = (x.flatten() * weight).sum(-1)
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


def rotary_angles(positions: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [..., D / 2] of positions [...]. Computed, not read from a table that ends."""
    turns = positions[..., None].to(rotary.dtype) * rotary
    return turns.cos(), turns.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [B, heads, T, D] in the halves layout; cos, sin broadcast over heads."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
