"""Checkpoints that people load today, by the fields of their config.json: read as transformers reads them.

test_published_configs.py has odd spellings of one field; here are whole models, with their sizes. The number of
parameters, which is what transformers makes of them, shows that all of a model is counted.
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


def yarn(factor: float, trained: int, **more: Any) -> dict[str, Any]:
    return dict(rope_type="yarn", factor=factor, original_max_position_embeddings=trained) | more


def qwen3(layers: int, *sizes: int, **more: Any) -> dict[str, Any]:
    read = dict(model_type="qwen3", head_dim=128, attention_bias=False, max_position_embeddings=40960)
    read |= dict(max_window_layers=layers, sliding_window=None, use_sliding_window=False, tie_word_embeddings=False)
    read |= dict(vocab_size=151936, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, eos_token_id=151645)
    return OTHER | sized(layers, *sizes) | read | more


def mixture(*sizes: int, **more: Any) -> dict[str, Any]:
    read = dict(model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, mlp_only_layers=[])
    read |= dict(decoder_sparse_step=1, output_router_logits=False, router_aux_loss_coef=0.001, rope_theta=1000000.0)
    return qwen3(*sizes) | read | more


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


def olmo3(layers: int, *sizes: int) -> dict[str, Any]:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    read = dict(attention_bias=False, layer_types=kinds * (layers // 4), max_position_embeddings=65536)
    read |= dict(rms_norm_eps=1e-06, rope_theta=500000, sliding_window=4096, tie_word_embeddings=False)
    scaling = yarn(8.0, 8192, attention_factor=1.2079441541679836, beta_fast=32, beta_slow=1)
    read |= dict(rope_scaling=scaling, vocab_size=100278, eos_token_id=100257, pad_token_id=100277)
    return OTHER | sized(layers, *sizes) | read | dict(model_type="olmo3")


def olmoe(**more: Any) -> dict[str, Any]:
    read = dict(attention_bias=False, clip_qkv=None, max_position_embeddings=4096, norm_topk_prob=False)
    read |= dict(num_experts=64, num_experts_per_tok=8, output_router_logits=False, rms_norm_eps=1e-05)
    read |= dict(rope_scaling=None, rope_theta=10000.0, router_aux_loss_coef=0.01, tie_word_embeddings=False)
    return OTHER | sized(16, 2048, 1024, 16, 16) | read | dict(model_type="olmoe", vocab_size=50304) | more


def granite(layers: int, dim: int, ffn: int, *heads: int, **factors: float) -> dict[str, Any]:
    state = dict(mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_state=256)
    state |= dict(mamba_expand=2, mamba_n_groups=1, mamba_n_heads=2 * dim // 64, mamba_proj_bias=False)
    none = dict(num_local_experts=0, num_experts_per_tok=0, output_router_logits=False, router_aux_loss_coef=0.01)
    read = dict(attention_bias=False, layer_types=["attention"] * layers, max_position_embeddings=131072)
    read |= dict(normalization_function="rmsnorm", position_embedding_type="rope", rms_norm_eps=1e-05)
    read |= dict(rope_scaling=None, rope_theta=10000000, shared_intermediate_size=ffn, tie_word_embeddings=True)
    read |= dict(embedding_multiplier=12, model_type="granitemoehybrid", vocab_size=100352, init_method="mup")
    return OTHER | sized(layers, dim, ffn, *heads) | state | none | read | factors


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    packed = dict(modules_to_not_convert=["model.layers.*.self_attn", "lm_head"], quant_method="mxfp4")
    read = dict(attention_bias=True, experts_per_token=4, head_dim=64, initial_context_length=4096)
    read |= dict(layer_types=["sliding_attention", "full_attention"] * (layers // 2), max_position_embeddings=131072)
    read |= dict(num_experts_per_tok=4, num_local_experts=experts, rms_norm_eps=1e-05, rope_theta=150000)
    read |= dict(rope_scaling=yarn(32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False), sliding_window=128)
    read |= dict(output_router_logits=False, router_aux_loss_coef=0.9, swiglu_limit=7.0, tie_word_embeddings=False)
    read |= dict(quantization_config=packed, vocab_size=201088, eos_token_id=200002, model_type="gpt_oss")
    without = {name: value for name, value in OTHER.items() if name != "torch_dtype"}
    return without | sized(layers, 2880, 2880, 64, 8) | read


def gemma3(*sizes: int, **more: Any) -> dict[str, Any]:
    """Most of the text is what the class has anyway."""
    text = sized(*sizes, model_type="gemma3_text", rope_scaling={"factor": 8.0, "rope_type": "linear"})
    seen = dict(hidden_size=1152, image_size=896, model_type="siglip_vision_model", patch_size=14)
    other = dict(boi_token_index=255999, eoi_token_index=256000, eos_token_id=[1, 106], mm_tokens_per_image=256)
    other |= dict(image_token_index=262144, initializer_range=0.02, torch_dtype="bfloat16", vision_config=seen)
    return other | dict(model_type="gemma3", text_config=text | dict(sliding_window=1024) | more)


def mistral3(text: dict[str, Any]) -> dict[str, Any]:
    seen = dict(head_dim=64, hidden_size=1024, image_size=1540, model_type="pixtral", patch_size=14)
    other = dict(image_token_index=10, multimodal_projector_bias=False, projector_hidden_act="gelu")
    other |= dict(spatial_merge_size=2, torch_dtype="bfloat16", vision_config=seen, vision_feature_layer=-1)
    tied = dict(tie_word_embeddings=text["tie_word_embeddings"])
    return other | dict(model_type="mistral3", text_config=text) | tied


def ministral3(*sizes: int, theta: float = 1e6, tied: bool = False) -> dict[str, Any]:
    turns = yarn(16.0, 16384, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    turns |= dict(llama_4_scaling_beta=0.1, rope_theta=theta, type="yarn")
    read = dict(head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-05, rope_parameters=turns)
    read |= dict(sliding_window=None, tie_word_embeddings=tied, vocab_size=131072, model_type="ministral3")
    plain = {name: value for name, value in OTHER.items() if name != "torch_dtype"}
    return mistral3(plain | sized(*sizes) | read)


CODER = dict(qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0, rope_theta=10000000)
CODER |= dict(max_position_embeddings=262144, router_aux_loss_coef=0.0)
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
    "DeepSeek-R1-0528-Qwen3-8B": (
        8.191,
        qwen3(36, 4096, 12288, 32, 8, max_position_embeddings=131072)
        | dict(rope_scaling=yarn(4.0, 32768, attn_factor=0.8782488562869419)),
    ),
    "Qwen3-8B by its card beyond 32k": (8.191, qwen3(36, 4096, 12288, 32, 8, rope_scaling=yarn(4.0, 32768))),
    "Qwen3-30B-A3B": (30.532, mixture(48, 2048, 6144, 32, 4, moe_intermediate_size=768)),
    "Qwen3-30B-A3B-Instruct-2507": (
        30.532,
        mixture(48, 2048, 6144, 32, 4, moe_intermediate_size=768, max_position_embeddings=262144)
        | dict(rope_theta=10000000),
    ),
    "Qwen3-Coder-30B-A3B-Instruct": (30.532, mixture(48, 2048, 5472, 32, 4, moe_intermediate_size=768) | CODER),
    "Qwen3-235B-A22B": (235.094, mixture(94, 4096, 12288, 64, 4, moe_intermediate_size=1536)),
    "Qwen3-235B-A22B-Thinking-2507": (
        235.094,
        mixture(94, 4096, 12288, 64, 4, moe_intermediate_size=1536, max_position_embeddings=262144)
        | dict(rope_theta=5000000),
    ),
    "Qwen3-Coder-480B-A35B-Instruct": (
        480.155,
        mixture(62, 6144, 8192, 96, 8, moe_intermediate_size=2560) | CODER | dict(num_experts=160),
    ),
    "Olmo-3-1025-7B": (7.298, olmo3(32, 4096, 11008, 32, 32)),
    "Olmo-3-1125-32B": (32.234, olmo3(64, 5120, 27648, 40, 8)),
    "OLMoE-1B-7B-0924": (6.919, olmoe()),
    "granite-4.0-350m": (
        0.352,
        granite(28, 1024, 2048, 16, 4, attention_multiplier=0.015625, residual_multiplier=0.263, logits_scaling=4),
    ),
    "granite-4.0-1b": (
        1.632,
        granite(40, 2048, 4096, 16, 4, attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=8),
    ),
    "granite-4.0-micro": (
        3.403,
        granite(40, 2560, 8192, 40, 8, attention_multiplier=0.015625, residual_multiplier=0.22, logits_scaling=10),
    ),
    "gpt-oss-20b": (20.915, gpt_oss(24, 32)),
    "gpt-oss-120b": (116.829, gpt_oss(36, 128)),
    "gemma-3-4b-it": (3.880, gemma3(34, 2560, 10240, 8, 4)),
    "gemma-3-12b-it": (11.766, gemma3(48, 3840, 15360, 16, 8)),
    "gemma-3-27b-it": (27.009, gemma3(62, 5376, 21504, 32, 16, head_dim=128, query_pre_attn_scalar=168)),
    "Mistral-Small-3.1-24B-Instruct-2503": (
        23.572,
        mistral3(mistral(max_position_embeddings=131072, rope_theta=1000000000.0)),
    ),
    "Ministral-3-3B-Base-2512": (3.429, ministral3(26, 3072, 9216, 32, 8, tied=True)),
    "Ministral-3-8B-Base-2512": (8.490, ministral3(34, 4096, 14336, 32, 8)),
    "Ministral-3-14B-Base-2512": (13.506, ministral3(40, 5120, 16384, 32, 8, theta=1e9)),
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
