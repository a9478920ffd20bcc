"""Checkpoints that people load today, by the fields of their config.json: read as transformers reads them.

test_published_configs.py has odd spellings of one field; here are whole models, with their sizes. The number of
parameters, which each publisher states, shows that the sizes are those of the checkpoint and that all of it is counted.
"""

import json
from typing import Any

import pytest
import torch
from test_config import differences, senseless, their_config

from config import ModelConfig, parameters

OTHER = dict(attention_dropout=0.0, initializer_range=0.02, use_cache=True, torch_dtype="bfloat16", hidden_act="silu")


def sized(layers: int, dim: int, ffn: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    sizes = dict(num_hidden_layers=layers, hidden_size=dim, intermediate_size=ffn, num_attention_heads=heads)
    return sizes | dict(num_key_value_heads=kv) | more


def qwen3(layers: int, *sizes: int, **more: Any) -> dict[str, Any]:
    read = dict(model_type="qwen3", head_dim=128, attention_bias=False, max_position_embeddings=40960)
    read |= dict(max_window_layers=layers, sliding_window=None, use_sliding_window=False, tie_word_embeddings=False)
    read |= dict(vocab_size=151936, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, eos_token_id=151645)
    return OTHER | sized(layers, *sizes) | read | more


def distilled(*sizes: int, **more: Any) -> dict[str, Any]:
    read = dict(model_type="qwen2", max_position_embeddings=131072, max_window_layers=21, rms_norm_eps=1e-06)
    read |= dict(rope_theta=10000, sliding_window=4096, tie_word_embeddings=False, use_mrope=False, vocab_size=152064)
    return OTHER | sized(*sizes) | read | dict(use_sliding_window=False, eos_token_id=151643) | more


def llama(*sizes: int) -> dict[str, Any]:
    scaling = dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192)
    read = dict(attention_bias=False, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-05, vocab_size=128256)
    read |= dict(rope_scaling=scaling | {"rope_type": "llama3"}, rope_theta=500000.0, tie_word_embeddings=False)
    return OTHER | sized(*sizes) | read | dict(model_type="llama", max_position_embeddings=131072, eos_token_id=128001)


def mistral(**more: Any) -> dict[str, Any]:
    """The text of Mistral Small 3, 24B."""
    read = dict(head_dim=128, rms_norm_eps=1e-05, sliding_window=None, tie_word_embeddings=False, vocab_size=131072)
    return OTHER | sized(40, 5120, 32768, 32, 8) | read | dict(model_type="mistral") | more


PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {  # billions of parameters (of the text model), config.json
    "Qwen3-0.6B": (0.596, qwen3(28, 1024, 3072, 16, 8, tie_word_embeddings=True)),
    "Qwen3-1.7B": (1.721, qwen3(28, 2048, 6144, 16, 8, tie_word_embeddings=True)),
    "Qwen3-4B": (4.022, qwen3(36, 2560, 9728, 32, 8, tie_word_embeddings=True)),
    "Qwen3-4B-Instruct-2507": (
        4.022,
        qwen3(36, 2560, 9728, 32, 8, tie_word_embeddings=True)
        | dict(max_position_embeddings=262144, rope_theta=5000000),
    ),
    "Qwen3-8B": (8.191, qwen3(36, 4096, 12288, 32, 8)),
    "Qwen3-14B": (14.768, qwen3(40, 5120, 17408, 40, 8)),
    "Qwen3-32B": (32.762, qwen3(64, 5120, 25600, 64, 8)),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1.777, distilled(28, 1536, 8960, 12, 2, vocab_size=151936)),
    "DeepSeek-R1-Distill-Qwen-7B": (7.616, distilled(28, 3584, 18944, 28, 4, max_window_layers=28)),
    "DeepSeek-R1-Distill-Qwen-14B": (
        14.770,
        distilled(48, 5120, 13824, 40, 8, max_window_layers=48, rms_norm_eps=1e-05, rope_theta=1000000.0)
        | dict(sliding_window=131072),
    ),
    "DeepSeek-R1-Distill-Qwen-32B": (
        32.764,
        distilled(64, 5120, 27648, 40, 8, max_window_layers=64, rms_norm_eps=1e-05, rope_theta=1000000.0)
        | dict(sliding_window=131072),
    ),
    "DeepSeek-R1-Distill-Llama-8B": (8.030, llama(32, 4096, 14336, 32, 8)),
    "DeepSeek-R1-Distill-Llama-70B": (70.554, llama(80, 8192, 28672, 64, 8)),
    "Mistral-Small-24B-Instruct-2501": (23.572, mistral(max_position_embeddings=32768, rope_theta=100000000.0)),
    "Magistral-Small-2506": (23.572, mistral(max_position_embeddings=40960, rope_theta=1000000000.0)),
    "Devstral-Small-2507": (23.572, mistral(max_position_embeddings=131072, rope_theta=1000000000.0)),
}


def text_of(whole: Any) -> Any:
    """transformers' config of the text model, with what the wrapper around it says of the whole."""
    text = whole.get_text_config()
    if text is not whole:
        text.dtype, text.tie_word_embeddings = text.dtype or whole.dtype, whole.tie_word_embeddings
    return text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint(name: str) -> None:
    billions, raw = PUBLISHED[name]
    ours = ModelConfig.from_hf(json.loads(json.dumps(raw)))
    assert senseless(ours) + differences(ours, text_of(their_config(raw))) == []
    assert ours.dtype == torch.bfloat16 or "torch_dtype" not in raw
    assert round(parameters(ours) / 1e9, 3) == billions
