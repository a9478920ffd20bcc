"""The models that are measured: published shapes with random weights, and the embedded checkpoint."""

import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import checkpoint
import gguf_file
import parallel
from checkpoint import EMBEDDED
from config import ModelConfig
from errors import UserError, shown
from files import accessing, read_json
from model import Transformer
from weights import quantize


def _config(model_type: str, vocab: int, dim: int, ffn: int, layers: int, heads: str, limit: int, **more: Any) -> dict:
    """A config.json; heads: "query heads/key-value heads"."""
    queries, keys = map(int, heads.split("/"))
    sizes = dict(vocab_size=vocab, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=queries, num_key_value_heads=keys, max_position_embeddings=limit)
    common = dict(hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False, sliding_window=None)
    return dict(model_type=model_type) | sizes | common | more


LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3_ROPE |= dict(original_max_position_embeddings=8192)
QWEN3 = dict(head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True)
QWEN3_MOE = QWEN3 | dict(tie_word_embeddings=False, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
QWEN3_MOE |= dict(moe_intermediate_size=768)
SHAPES: dict[str, dict[str, Any]] = {  # as in the config.json of the published checkpoints; tiny is for trying out
    "tiny": _config("llama", 512, 64, 160, 4, "4/2", 16384),
    "smollm-135m": _config("llama", 49152, 576, 1536, 30, "9/3", 2048, tie_word_embeddings=True),
    "qwen3-0.6b": _config("qwen3", 151936, 1024, 3072, 28, "16/8", 40960, **QWEN3),
    "llama-2-7b": _config("llama", 32000, 4096, 11008, 32, "32/32", 4096),
    "mistral-7b": _config("mistral", 32768, 4096, 14336, 32, "32/8", 32768, rope_theta=1e6),  # v0.3
    "qwen3-30b-a3b-8l": _config("qwen3_moe", 151936, 2048, 6144, 8, "32/4", 40960, **QWEN3_MOE),  # of 48 layers
    "llama-3.1-8b": _config("llama", 128256, 4096, 14336, 32, "32/8", 131072, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
}


@dataclass(frozen=True)
class Subject:
    """A shape with weights on a device."""

    raw: dict[str, Any]
    model: Transformer
    file: Path | None = None  # the GGUF file that it was read from

    @property
    def device(self) -> str:
        return self.model.device.type

    @cached_property
    def transformers(self) -> Any:
        """transformers on the same weights: a `benchmark.hugging_face.HuggingFace`."""
        from benchmark.hugging_face import HuggingFace  # takes seconds

        return HuggingFace(self.model, self.raw)

    @cached_property
    def llama_cpp(self) -> Any:
        """llama.cpp on the same file: a `benchmark.llama_cpp.LlamaCpp`."""
        from benchmark.llama_cpp import LlamaCpp  # knows what a turn is, as benchmark.race does, which knows this file

        return LlamaCpp(self.file, self.model.config)

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        rng = random.Random(0)
        return [[rng.randrange(1, self.model.config.vocab_size) for _ in range(length)] for _ in range(batch)]


def published(shape: str) -> dict[str, Any]:
    """Its config.json. UserError if there is no such thing."""
    file = EMBEDDED / "config.json" if shape == "embedded" else Path(shape)
    if gguf_file.is_gguf(file):
        return gguf_file.read_json(checkpoint.resolve(file) / "config.json")
    with accessing(file):
        if shape not in SHAPES and not file.is_file():
            raise UserError(f"shape {shown(shape)} is neither a file nor one of embedded, {', '.join(SHAPES)}")
    return SHAPES.get(shape) or read_json(file)


def make(shape: str, device: str, dtype: torch.dtype, weights: str = "auto") -> Subject:
    """The shape with random weights made on the device, or the embedded checkpoint or a GGUF file with its own."""
    raw = published(shape)
    if shape == "embedded" or gguf_file.is_gguf(Path(shape)):
        path = EMBEDDED if shape == "embedded" else Path(shape)
        model, _ = checkpoint.load(path, device, dtype, weights)
        return Subject(raw, model, None if shape == "embedded" else path)
    config, own = replace(ModelConfig.from_hf(raw), dtype=dtype), parallel.shard()
    parallel.share(config.n_kv_heads)
    with torch.device("meta"):
        whole, model = (Transformer(each).to(dtype) for each in (config, config.of_rank(own.world)))
    model.to_empty(device=device).requires_grad_(False).tie()
    generator = torch.Generator(device).manual_seed(0)
    for (name, shape), part in zip(whole.named_parameters(), model.parameters(), strict=True):
        drawn = part if own.world == 1 else torch.empty_like(shape, device=device)  # the same model on any ranks
        if shape.ndim > 1:  # keeps the size of what it is multiplied with
            drawn.normal_(0, shape.shape[-1] ** -0.5, generator=generator)
        else:
            drawn.fill_(0.0 if name.endswith("bias") else 1.0)
        if drawn is not part:
            part.copy_(parallel.cut_of(name, config, own).of(drawn))
    quantize(model, weights)
    return Subject(raw, model.eval())
