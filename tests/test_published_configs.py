"""config.json as well-known models are published with it: each is read, and as transformers reads it.

The other tests would not notice a table that is too strict. Here are nulls, names of older transformers, integers in
place of floats, and fields that say nothing about the model.
"""

import json
from typing import Any

import pytest
from test_config import compared

from config import FAMILIES, text_part

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
MINISTRAL = dict(beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0)
MINISTRAL |= dict(original_max_position_embeddings=16384, rope_theta=1000000.0)
SPREAD = [1 + n / 8 for n in range(48)]


def llama(**more: Any) -> dict[str, Any]:
    """As of Llama 2, 7B."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    sizes |= dict(num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096)
    other = dict(_name_or_path="x", bos_token_id=1, eos_token_id=2, initializer_range=0.02, pretraining_tp=1)
    other |= dict(architectures=["X"], transformers_version="4.31.0.dev0", use_cache=True, pad_token_id=-1)
    read = dict(hidden_act="silu", rms_norm_eps=1e-05, tie_word_embeddings=False, torch_dtype="float16")
    return sizes | other | read | dict(model_type="llama", rope_scaling=None) | more


def llama3(**more: Any) -> dict[str, Any]:
    small = dict(attention_bias=False, attention_dropout=0.0, mlp_bias=False, rope_theta=500000.0)
    return llama(**{**small, "torch_dtype": "bfloat16", "num_key_value_heads": 8, "vocab_size": 128256, **more})


def mistral(**more: Any) -> dict[str, Any]:
    small = dict(intermediate_size=14336, num_key_value_heads=8, rope_theta=10000.0, model_type="mistral")
    return llama(**{**small, "max_position_embeddings": 32768, **more})


def qwen(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
    sizes |= dict(num_key_value_heads=2, max_window_layers=21, vocab_size=151936, max_position_embeddings=32768)
    read = dict(rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, use_sliding_window=False)
    return llama(**{**sizes, **read, "tie_word_embeddings": True, "model_type": "qwen2", **more})


def gemma(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, head_dim=256)
    sizes |= dict(num_key_value_heads=4, vocab_size=256000, max_position_embeddings=8192, query_pre_attn_scalar=256)
    read = dict(attention_bias=False, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096)
    read |= dict(hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-06, rope_theta=10000.0, model_type="gemma2")
    return sizes | read | dict(cache_implementation="hybrid", pad_token_id=0, torch_dtype="float32") | more


def gemma3(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1)
    read = dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=512, rope_scaling=None)
    read |= dict(rope_local_base_freq=10000, rope_theta=1000000, model_type="gemma3_text", vocab_size=262144)
    return gemma(**{**sizes, **read, **more})


def phi3(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=3072, intermediate_size=8192, vocab_size=32064, original_max_position_embeddings=4096)
    other = dict(auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, embd_pdrop=0.0, resid_pdrop=0.0)
    return llama(
        **{**sizes, **other, "rope_theta": 10000.0, "sliding_window": 2047, "model_type": "phi3"}
        | {"attention_bias": False}
        | more
    )


def granite(**more: Any) -> dict[str, Any]:
    factors = dict(attention_multiplier=0.0078125, embedding_multiplier=12, logits_scaling=16, residual_multiplier=0.22)
    return llama3(**{**factors, "model_type": "granite", "rope_theta": 10000000.0, **more})


def qwen_moe(**more: Any) -> dict[str, Any]:
    mixture = dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, moe_intermediate_size=768)
    mixture |= dict(decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001, output_router_logits=False)
    read = dict(model_type="qwen3_moe", head_dim=128, attention_bias=False, sliding_window=None, hidden_size=2048)
    return qwen(**read | dict(num_key_value_heads=4, num_attention_heads=32)) | mixture | more


def linear(**more: Any) -> dict[str, Any]:
    """As of Qwen3-Next, 80B, but for its experts."""
    sizes = dict(hidden_size=2048, intermediate_size=5120, num_hidden_layers=48, num_attention_heads=16, head_dim=256)
    sizes |= dict(num_key_value_heads=2, vocab_size=151936, max_position_embeddings=262144, full_attention_interval=4)
    sizes |= dict(linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128)
    sizes |= dict(linear_num_key_heads=16, linear_num_value_heads=32)
    read = dict(attention_bias=False, hidden_act="silu", rms_norm_eps=1e-06, tie_word_embeddings=False)
    read |= dict(partial_rotary_factor=0.25, rope_theta=10000000, rope_scaling=None, torch_dtype="bfloat16")
    return sizes | read | dict(model_type="qwen3_next", attention_dropout=0.0, use_cache=True) | more


def qwen3_5(**more: Any) -> dict[str, Any]:
    """The text part of Qwen3.5, 27B."""
    sizes = dict(hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24)
    sizes |= dict(num_key_value_heads=4, vocab_size=248320, linear_num_value_heads=48)
    rope = dict(mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default", rope_theta=10000000)
    read = dict(layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 16, attn_output_gate=True)
    read |= dict(rope_parameters=rope | {"partial_rotary_factor": 0.25}, dtype="bfloat16", mtp_num_hidden_layers=1)
    return linear(**sizes | read, model_type="qwen3_5_text", mamba_ssm_dtype="float32", torch_dtype=None) | more


def gpt_oss(**more: Any) -> dict[str, Any]:
    """As of gpt-oss-120b."""
    sizes = dict(hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, num_attention_heads=64, head_dim=64)
    sizes |= dict(num_key_value_heads=8, vocab_size=201088, max_position_embeddings=131072, num_local_experts=128)
    read = dict(attention_bias=True, hidden_act="silu", rms_norm_eps=1e-05, sliding_window=128, swiglu_limit=7.0)
    read |= dict(experts_per_token=4, num_experts_per_tok=4, rope_theta=150000, tie_word_embeddings=False)
    yarn = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
    read |= dict(rope_scaling=yarn | dict(original_max_position_embeddings=4096), initial_context_length=4096)
    other = dict(attention_dropout=0.0, eos_token_id=200002, pad_token_id=199999, router_aux_loss_coef=0.9)
    whole = [f"model.layers.*.{part}" for part in ("self_attn", "mlp.router")] + ["model.embed_tokens", "lm_head"]
    packed = dict(quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=whole))
    kinds = ["sliding_attention", "full_attention"] * ({**sizes, **more}["num_hidden_layers"] // 2)
    return sizes | read | other | packed | dict(model_type="gpt_oss", layer_types=kinds) | more


def neox(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=6, vocab_size=50304)
    read = dict(hidden_act="gelu", layer_norm_eps=1e-05, rotary_emb_base=10000, rotary_pct=0.25)
    read |= dict(tie_word_embeddings=False, use_parallel_residual=True, max_position_embeddings=2048)
    return sizes | read | dict(model_type="gpt_neox", torch_dtype="float16", eos_token_id=0) | more


def falcon(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=4544, num_attention_heads=71, num_hidden_layers=32, vocab_size=65024)
    read = dict(alibi=False, apply_residual_connection_post_layernorm=False, bias=False, layer_norm_epsilon=1e-05)
    read |= dict(multi_query=True, new_decoder_architecture=False, parallel_attn=True, torch_dtype="bfloat16")
    return sizes | read | dict(model_type="falcon", hidden_dropout=0.0, eos_token_id=11) | more


def opt(**more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=768, ffn_dim=3072, num_attention_heads=12, num_hidden_layers=12, vocab_size=50272)
    read = dict(activation_function="relu", do_layer_norm_before=True, word_embed_proj_dim=768, torch_dtype="float16")
    read |= dict(max_position_embeddings=2048, model_type="opt")
    return sizes | read | dict(prefix="</s>", layerdrop=0.0, init_std=0.02, dropout=0.1) | more


PUBLISHED = {
    "llama 1": {name: value for name, value in llama().items() if name != "num_key_value_heads"},
    "llama 2": llama(),
    "codellama": llama(rope_theta=1000000, vocab_size=32016),
    "vicuna 16k": llama(rope_scaling={"factor": 4.0, "type": "linear"}, max_sequence_length=16384),
    "dynamic": llama(rope_scaling={"factor": 2.0, "type": "dynamic"}),
    "llama 3": llama3(eos_token_id=128009),
    "llama 3.1": llama3(rope_scaling=LLAMA3 | {"rope_type": "llama3"}, eos_token_id=[128001, 128008, 128009]),
    "llama 3.2": llama3(head_dim=64, hidden_size=2048, rope_scaling=LLAMA3 | {"rope_type": "llama3", "factor": 32.0}),
    "falcon 3": llama3(
        hidden_size=3072, head_dim=256, num_attention_heads=12, num_key_value_heads=4, activation="swiglu"
    ),
    "smollm2": llama3(is_llama_config=True, rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True)
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "granite code": llama(attention_bias=True, mlp_bias=True, rope_theta=10000000),
    "mistral 0.1": mistral(sliding_window=4096),
    "mistral 0.3": mistral(sliding_window=None, rope_theta=1000000.0, vocab_size=32768),
    "mistral nemo": mistral(sliding_window=None, head_dim=128, hidden_size=5120, max_position_embeddings=1024000),
    "mixtral": mistral(sliding_window=None, num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.02)
    | {"model_type": "mixtral"},
    "qwen 2": qwen(sliding_window=131072, max_window_layers=28),
    "qwen 2.5": qwen(use_mrope=False),
    "qwen 2.5, newer": qwen(sliding_window=None, layer_types=["full_attention"] * 24),
    "qwq": qwen(max_window_layers=64),
    "qwen 3": qwen(model_type="qwen3", head_dim=128, attention_bias=False, sliding_window=None, rope_theta=5000000),
    "qwen 3, 30B": qwen_moe(),
    "qwen 3, 235B": qwen_moe(hidden_size=4096, moe_intermediate_size=1536, num_attention_heads=64),
    "qwen 3 coder, 30B": qwen_moe(rope_theta=10000000, use_qk_norm=True, qkv_bias=False, intermediate_size=5472)
    | dict(shared_expert_intermediate_size=0, max_position_embeddings=262144, max_window_layers=28),
    "qwen 3 next": linear(num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, mlp_only_layers=[])
    | dict(shared_expert_intermediate_size=512, decoder_sparse_step=1, norm_topk_prob=True, router_aux_loss_coef=0.001),
    "qwen 3.5": qwen3_5(),
    "qwen 3.5, 35B": qwen3_5(num_hidden_layers=40, hidden_size=2048, num_attention_heads=16, num_key_value_heads=2)
    | dict(layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10, linear_num_value_heads=32)
    | dict(model_type="qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512)
    | dict(shared_expert_intermediate_size=512, router_aux_loss_coef=0.001),
    "qwen 3.5, whole": dict(model_type="qwen3_5", text_config=qwen3_5(), tie_word_embeddings=False)
    | dict(architectures=["Qwen3_5ForConditionalGeneration"], image_token_id=248056, vision_start_token_id=248053)
    | dict(vision_config=dict(depth=27, hidden_size=1152, model_type="qwen3_5", out_hidden_size=5120)),
    "smollm3": llama3(model_type="smollm3", num_hidden_layers=36, layer_types=["full_attention"] * 36)
    | dict(max_window_layers=28, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, bos_token_id=None)
    | dict(sliding_window=None, use_sliding_window=False),
    "gemma 1": gemma(model_type="gemma", hidden_act="gelu", hidden_activation=None, hidden_size=2048, head_dim=256),
    "seed-oss": llama3(
        model_type="seed_oss",
        attention_bias=True,
        attention_out_bias=False,
        head_dim=128,
        max_position_embeddings=524288,
        num_attention_heads=80,
        rope_scaling={"rope_type": "default"},
        rope_theta=10000000.0,
    ),
    "gemma 2": gemma(hidden_act="gelu_pytorch_tanh"),
    "gemma 2, 27B": gemma(query_pre_attn_scalar=144, head_dim=128, hidden_size=4608, sliding_window_size=4096),
    "gemma 3": gemma3(sliding_window_pattern=6, eos_token_id=[1, 106]),
    "gemma 3, 270M": gemma3(_sliding_window_pattern=6, num_hidden_layers=6, use_bidirectional_attention=False)
    | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "gemma 3, text of 4B": gemma3(rope_scaling={"factor": 8.0, "rope_type": "linear"}, vocab_size=262208),
    "phi 3": phi3(),
    "phi 3, 128k": phi3(
        max_position_embeddings=131072,
        sliding_window=262144,
        rope_scaling={"type": "longrope", "long_factor": SPREAD, "short_factor": [1.05] * 48},
    ),
    "phi 4": phi3(original_max_position_embeddings=16384, max_position_embeddings=16384, sliding_window=None),
    "phi 4 mini": phi3(
        num_attention_heads=24,
        num_key_value_heads=8,
        partial_rotary_factor=0.75,
        max_position_embeddings=131072,
        rope_scaling={"type": "longrope", "long_factor": [1] * 24 + SPREAD[24:], "short_factor": [1] * 48},
        full_attn_mod=1,
        lm_head_bias=False,
        mlp_bias=False,
    ),
    "granite 3": granite(),
    "granite 4, 1B": granite(
        model_type="granitemoehybrid",
        num_hidden_layers=40,
        layer_types=["attention"] * 40,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=4096,
        intermediate_size=4096,
        position_embedding_type="rope",
        normalization_function="rmsnorm",
        mamba_chunk_size=256,
        mamba_conv_bias=True,
        mamba_d_conv=4,
        mamba_d_head=64,
        mamba_d_state=256,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_n_heads=128,
        mamba_proj_bias=False,
        rope_scaling=None,
        init_method="mup",
    ),
    "olmo 2": llama3(model_type="olmo2", rope_theta=500000, rms_norm_eps=1e-06),
    "gemma 3, 4B": dict(
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        initializer_range=0.02,
        mm_tokens_per_image=256,
        model_type="gemma3",
        text_config=dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34)
        | dict(rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024),
        torch_dtype="bfloat16",
        vision_config=dict(hidden_size=1152, image_size=896, intermediate_size=4304, model_type="siglip_vision_model")
        | dict(num_attention_heads=16, num_hidden_layers=27, patch_size=14, vision_use_head=False),
    ),
    "mistral small 3.1": dict(
        architectures=["Mistral3ForConditionalGeneration"],
        image_token_index=10,
        model_type="mistral3",
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        spatial_merge_size=2,
        text_config=mistral(hidden_size=5120, head_dim=128, intermediate_size=32768, num_hidden_layers=40)
        | dict(attention_dropout=0.0, max_position_embeddings=131072, rope_theta=1000000000.0, vocab_size=131072)
        | dict(sliding_window=None),
        torch_dtype="bfloat16",
        vision_config=dict(head_dim=64, hidden_act="silu", hidden_size=1024, image_size=1540, model_type="pixtral")
        | dict(intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14, rope_theta=10000.0),
        vision_feature_layer=-1,
    ),
    "ministral 3": dict(
        architectures=["Mistral3ForConditionalGeneration"],
        dtype="bfloat16",
        image_token_index=10,
        model_type="mistral3",
        text_config=mistral(model_type="ministral3", head_dim=128, hidden_size=3072, intermediate_size=9216)
        | dict(num_hidden_layers=26, max_position_embeddings=262144, sliding_window=None, vocab_size=131072)
        | dict(rope_parameters=MINISTRAL | {"rope_type": "yarn", "type": "yarn"}),
        tie_word_embeddings=True,
        vision_config=dict(head_dim=64, hidden_act="silu", hidden_size=1024, image_size=1540, model_type="pixtral"),
    ),
    "ministral 3, its text model": mistral(
        model_type="ministral3",
        head_dim=128,
        max_position_embeddings=262144,
        rope_parameters=MINISTRAL | {"type": "yarn"},
        vocab_size=131072,
    ),
    "olmo 3": llama3(
        model_type="olmo3",
        rope_theta=500000,
        rms_norm_eps=1e-06,
        max_position_embeddings=65536,
        sliding_window=4096,
        num_key_value_heads=32,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        rope_scaling=dict(attention_factor=1.2079441541679836, beta_fast=32, beta_slow=1, factor=8.0, rope_type="yarn")
        | dict(original_max_position_embeddings=8192),
    ),
    "deepseek's qwen 3": qwen(
        model_type="qwen3",
        head_dim=128,
        max_position_embeddings=131072,
        rope_scaling=dict(attn_factor=0.8782488562869419, factor=4.0, rope_type="yarn")
        | dict(original_max_position_embeddings=32768),
        sliding_window=None,
    ),
    "qwen 3, by its card beyond 32k": qwen(
        model_type="qwen3",
        head_dim=128,
        max_position_embeddings=40960,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    ),
    "gpt-oss 20B": gpt_oss(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss 120B": gpt_oss(),
    "olmoe": llama3(model_type="olmoe", rope_theta=10000.0, rms_norm_eps=1e-05, num_experts=64, num_experts_per_tok=8)
    | dict(intermediate_size=1024, num_key_value_heads=16, num_attention_heads=16, clip_qkv=None, norm_topk_prob=False),
    "pythia": neox(),
    "gpt-neox 20B": neox(hidden_act="gelu_fast", attention_probs_dropout_prob=0, hidden_dropout_prob=0),
    "redpajama": neox(use_parallel_residual=False, rotary_pct=1.0),
    "falcon 7B": falcon(num_kv_heads=71),
    "falcon 40B": falcon(
        num_kv_heads=8, new_decoder_architecture=True, hidden_size=8192, num_attention_heads=128, n_embed=8192
    ),
    "falcon 2": falcon(num_kv_heads=8, new_decoder_architecture=True, hidden_size=4096, num_attention_heads=32)
    | dict(ffn_hidden_size=16384, ff_factor=4, num_ln_in_parallel_attn=1, rope_theta=500042.0, activation="gelu"),
    "opt": opt(),
    "opt 13B": opt(_remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name: str) -> None:
    assert compared(json.loads(json.dumps(PUBLISHED[name]))) == ("same", [])


def test_every_family_is_published() -> None:
    assert {text_part(raw)["model_type"] for raw in PUBLISHED.values()} == FAMILIES.keys()
