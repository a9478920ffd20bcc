"""Tiny random checkpoints of every family and form, written by transformers: what the tests compare with.

To add a family: add its cases to `CASES`. Sizes are small and mostly no powers of two, so that nothing fits by chance.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, logging

from config import text_part

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # at these sizes threads only wait for each other

PROMPT, NEW = 24, 64  # tokens of a test request; some cases have limits in relation to their sum
LENGTH = PROMPT + NEW


@dataclass(frozen=True, eq=False)
class Case:
    """A model_type with the arguments of its transformers config."""

    name: str
    config: dict[str, Any]
    older: bool = False  # config.json in the form of transformers 4
    branch: str = "self_attn"  # what in a layer gives that which attention adds to the residual stream

    def __str__(self) -> str:
        return self.name


def case(
    name: str, older: bool = False, rope: dict[str, Any] | None = None, branch: str = "self_attn", **changes
) -> Case:
    """Changes of None leave the setting out. Sizes of a text_config are those of the other cases."""
    config: dict[str, Any] = dict(
        model_type=name.split("-")[0],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0, **(rope or {})},
    )
    config = {name: value for name, value in (config | changes).items() if value is not None or name in NULLS}
    return Case(name, config, older, branch)


def wrapped(name: str, text: Case, vision: dict[str, Any], **changes: Any) -> Case:
    """A model of several modalities around the text model of another case."""
    vision = vision | dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = dict(text_config=text.config, vision_config=vision | dict(image_size=16, patch_size=8))
    config |= dict(model_type=name.split("-")[0], tie_word_embeddings=text.config["tie_word_embeddings"])
    return Case(name, config | changes, branch=text.branch)


NULLS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
LINEAR = {"rope_type": "linear", "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {  # theta and original length so that of 4 frequencies some are kept, blended and stretched
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {  # Phi-4-mini's form: with partial rotary, of a head of 8 (or 16) 6 (or 12) elements turn
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 2.5, 6.0],
}
YARN = {  # of 4 frequencies one is kept, one stretched, two are blended; factor 4 by the length of 32
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 32,
}
GEMMA = dict(branch="post_attention_layernorm", num_hidden_layers=3, head_dim=10, tie_word_embeddings=True)
GEMMA |= dict(query_pre_attn_scalar=7, sliding_window=20, pad_token_id=None)
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 1.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
GRANITE_HYBRID = dict(pad_token_id=None, layer_types=["attention"] * 2, num_local_experts=0, mamba_n_heads=4)
GRANITE_HYBRID |= dict(embedding_multiplier=1.7, attention_multiplier=0.3, residual_multiplier=0.6, logits_scaling=3.0)
GRANITE_HYBRID |= dict(intermediate_size=None, shared_intermediate_size=88)
NEOX = dict(branch="attention", num_key_value_heads=None)
FALCON = dict(branch="self_attention", num_key_value_heads=None, intermediate_size=None, tie_word_embeddings=True)
OPT = dict(num_key_value_heads=None, intermediate_size=None, rope_parameters=None, ffn_dim=88, tie_word_embeddings=True)
QWEN3_MOE = dict(head_dim=10, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=40)
GPT_OSS = dict(head_dim=12, num_local_experts=5, num_experts_per_tok=2, sliding_window=20, pad_token_id=None)
GPT_OSS |= dict(swiglu_limit=0.8)  # low enough to be reached
OLMOE = dict(pad_token_id=None, intermediate_size=40, num_experts=7, num_experts_per_tok=3)
DELTA = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=10)
DELTA |= dict(linear_value_head_dim=14)
QWEN3_NEXT = QWEN3_MOE | DELTA | dict(shared_expert_intermediate_size=30, num_hidden_layers=3)
VISUAL = {"depth": 1, "num_heads": 2, "out_hidden_size": 48}
CASES = [
    case("llama-gqa"),
    case("llama-mha", num_key_value_heads=6),
    case("llama-mqa-gelu", num_key_value_heads=1, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-2),
    case("llama-tied", tie_word_embeddings=True),
    case("llama-biases", attention_bias=True, mlp_bias=True),
    case("llama-head-dim", head_dim=12),
    case("llama-linear", rope=LINEAR),
    case("llama-dynamic", rope=DYNAMIC, max_position_embeddings=40),
    case("llama-llama3", rope=LLAMA3),
    case("llama-older", older=True, num_key_value_heads=6),
    case("llama-older-linear", older=True, rope=LINEAR, tie_word_embeddings=True),
    case("llama-older-llama3", older=True, rope=LLAMA3),
    case("mistral", sliding_window=20),
    case("mistral-no-window", sliding_window=None, head_dim=10, num_key_value_heads=3),
    case("mistral-older", older=True, sliding_window=4096),
    case("ministral3", rope=YARN | {"llama_4_scaling_beta": 0.3}, pad_token_id=None, sliding_window=20, head_dim=16),
    case(
        "ministral3-mscale",
        rope=YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.5},
        pad_token_id=None,
        head_dim=16,
    ),
    case("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1),
    case("qwen2-older", older=True, tie_word_embeddings=True, use_sliding_window=False, sliding_window=16),
    case("qwen3", head_dim=10, num_key_value_heads=3),
    case("qwen3-biases", head_dim=16, attention_bias=True),
    case(
        "qwen3-layer-types",
        head_dim=10,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
    case("qwen3-yarn", older=True, rope=YARN, head_dim=16),
    case("gpt_oss", **GPT_OSS, rope=YARN | {"rope_theta": 150.0, "truncate": False}),
    case(
        "gpt_oss-no-bias",
        **GPT_OSS | dict(num_local_experts=3, num_experts_per_tok=1, num_key_value_heads=3),
        older=True,
        rope=LINEAR,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=False,
    ),
    case("gpt_neox", **NEOX, rope={"partial_rotary_factor": 0.25}),
    case("gpt_neox-sequential", **NEOX, use_parallel_residual=False, rope={"partial_rotary_factor": 0.5}),
    case("gpt_neox-no-bias", **NEOX, attention_bias=False, hidden_act="gelu_fast", tie_word_embeddings=True),
    case(
        "gpt_neox-yarn",
        **NEOX,
        hidden_size=96,
        rope=YARN | {"partial_rotary_factor": 0.5, "truncate": False, "mscale": 0.707, "mscale_all_dim": 0.3},
    ),
    case("falcon", **FALCON, multi_query=True),
    case("falcon-grouped", **FALCON, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=88),
    case("falcon-one-norm", **FALCON, new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1),
    case("falcon-sequential", **FALCON, multi_query=False, parallel_attn=False, bias=True),
    case("phi3", sliding_window=20, max_position_embeddings=4096, pad_token_id=None),
    case("phi3-short", rope=LONGROPE, original_max_position_embeddings=100, pad_token_id=None),
    case("phi3-long", rope=LONGROPE, original_max_position_embeddings=23, pad_token_id=None),
    case("mixtral", num_local_experts=5, num_experts_per_tok=2),
    case("mixtral-window", num_local_experts=3, num_experts_per_tok=1, sliding_window=20, head_dim=10),
    case("qwen3_moe", **QWEN3_MOE, norm_topk_prob=True),
    case(
        "qwen3_moe-dense",
        **QWEN3_MOE,
        mlp_only_layers=[0],
        use_sliding_window=True,
        sliding_window=20,
        attention_bias=True,
    ),
    case("qwen3_next", **QWEN3_NEXT, layer_types=["full_attention", "linear_attention", "full_attention"]),
    case(
        "qwen3_next-dense",
        **QWEN3_NEXT,
        mlp_only_layers=[0],
        norm_topk_prob=False,
        full_attention_interval=2,
        attention_bias=True,
    ),
    case("qwen3_5_text", **DELTA, num_hidden_layers=3, full_attention_interval=2, tie_word_embeddings=True),
    case(
        "qwen3_5_text-short",
        **DELTA | dict(linear_num_value_heads=2, linear_conv_kernel_dim=2),
        rope={"partial_rotary_factor": 0.5},
        num_hidden_layers=3,
        full_attention_interval=3,
        hidden_act="gelu",
        attention_bias=True,
    ),
    case("opt", **OPT, pad_token_id=None),
    case("opt-no-bias", **OPT, pad_token_id=None, enable_bias=False, activation_function="gelu"),
    case("qwen3_5_moe_text", **QWEN3_NEXT, full_attention_interval=2),
    wrapped("qwen3_5", case("qwen3_5_text", **DELTA, num_hidden_layers=2, full_attention_interval=2), VISUAL),
    case("seed_oss", head_dim=10, num_key_value_heads=3, pad_token_id=None),
    case("seed_oss-biases", attention_out_bias=True, mlp_bias=True, pad_token_id=None),
    case("smollm3", num_hidden_layers=3, no_rope_layer_interval=2, pad_token_id=None, tie_word_embeddings=True),
    case(
        "smollm3-window",
        pad_token_id=None,
        no_rope_layers=[0, 1],
        use_sliding_window=True,
        sliding_window=20,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
    ),
    case(
        "granite",
        pad_token_id=None,
        embedding_multiplier=1.7,
        attention_multiplier=0.3,
        residual_multiplier=0.6,
        logits_scaling=3.0,
    ),
    case("granitemoehybrid", **GRANITE_HYBRID, position_embedding_type="rope"),
    case("granitemoehybrid-nope", **GRANITE_HYBRID, position_embedding_type="nope", hidden_act="gelu"),
    case("olmo2", branch="post_attention_layernorm", pad_token_id=None),
    case("olmo2-biases", branch="post_attention_layernorm", attention_bias=True, num_key_value_heads=6),
    case(  # yarn of the layers without a window only
        "olmo3",
        branch="post_attention_layernorm",
        pad_token_id=None,
        num_hidden_layers=3,
        sliding_window=20,
        head_dim=16,
        rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    case("gemma", head_dim=10, tie_word_embeddings=True, pad_token_id=None),
    case("olmoe", **OLMOE),
    case("olmoe-normed", **OLMOE, norm_topk_prob=True, attention_bias=True, num_key_value_heads=6),
    case("gemma2", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    case("gemma2-no-caps", **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    case("gemma3_text", **GEMMA, sliding_window_pattern=2, rope_parameters=GEMMA3_ROPE),
    wrapped("gemma3", case("gemma3_text", **GEMMA, rope_parameters=GEMMA3_ROPE), {"model_type": "siglip_vision_model"}),
    wrapped("mistral3", case("mistral", sliding_window=20), {"model_type": "pixtral", "head_dim": 8}),
    wrapped(
        "mistral3-ministral",
        case("ministral3", rope=YARN | {"llama_4_scaling_beta": 0.3}, head_dim=16, tie_word_embeddings=True),
        {"model_type": "pixtral", "head_dim": 8},
    ),
    case("gemma3_text-older", older=True, **GEMMA, sliding_window_pattern=2, rope_parameters=GEMMA3_ROPE),
]
BY_NAME = {case.name: case for case in CASES}
# One of each family.
FAMILIES = list({text_part(case.config)["model_type"]: case for case in reversed(CASES)}.values())[::-1]
# Those that have nothing to themselves but how they are read: the logits of a prompt tell; their other tests are slow.
NEAR = ("gemma", "seed_oss", "seed_oss-biases", "granitemoehybrid-nope", "ministral3-mscale")
NEAR += ("qwen3_next-dense", "qwen3_5_text", "qwen3_5_text-short", "qwen3_5_moe_text")
NEAR += tuple(case.name for case in CASES if "text_config" in case.config)


# What the checkpoints of a model_type are called.
MODELS = {
    "llama": "Llama 2, 3, 3.1, 3.2",
    "mistral": "Mistral; of Mistral Small 3.1 and 3.2 the text model",
    "ministral3": "Ministral 3 (the text model)",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 (mixtures)",
    "seed_oss": "Seed-OSS",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_text": "Qwen3.5 (dense; the text model)",
    "qwen3_5_moe_text": "Qwen3.5 (mixtures; the text model)",
    "smollm3": "SmolLM3",
    "granite": "Granite 3 (dense)",
    "granitemoehybrid": "Granite 4 (dense)",
    "gpt_oss": "gpt-oss",
    "gpt_neox": "GPT-NeoX, Pythia",
    "falcon": "Falcon 7B, 40B, 180B",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    "opt": "OPT (without 350m)",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "gemma": "Gemma 1",
    "olmoe": "OLMoE",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (270m, 1B; of larger ones the text model)",
}


def make_checkpoint(case: Case, folder: Path, shards: int = 1, seed: int = 0) -> Path:
    """Write `case` as a Hugging Face folder, in one file or about `shards` of them."""
    model = random_model(case, seed)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1)
    if case.older:
        change_config(folder, older_form)
    return folder


def transformers_class(config: dict[str, Any]) -> Any:
    return AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM


def random_model(case: Case, seed: int = 0) -> PreTrainedModel:
    """transformers' model with every parameter redrawn: its own defaults, many of them 0 and 1, hide mistakes."""
    model = transformers_class(case.config).from_config(AutoConfig.for_model(**case.config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name:
            drawn = (
                0.1 if case.config["tie_word_embeddings"] else 0.5
            ) * noise  # tied and wide: a token follows itself
        elif name.endswith("A_log"):  # decays from 0.5 to 1, so that what was long ago matters
            drawn = noise - 2
        elif parameter.ndim > 1:
            drawn = 1.5 * noise * parameter.shape[-1] ** -0.5
        else:
            drawn = 0.3 * noise + (0 if name.endswith("bias") else 1)
        parameter.data.copy_(drawn)
    return model


def tensor_names(case: Case) -> list[str]:
    with torch.device("meta"):
        model = transformers_class(case.config).from_config(AutoConfig.for_model(**case.config))
    # Without rotary a key's bias adds the same to all scores of a query: it has no effect.
    useless = {"opt": "k_proj.bias", "smollm3-window": "layers.0.self_attn.k_proj.bias"}.get(case.name, "-")
    others = ("model.vision_tower.", "model.multi_modal_projector.", "model.visual.")
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not (name.endswith(useless) or name.startswith(others))]


def load_reference(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    file = folder / "config.json"  # beside a GGUF file there is none
    kind = transformers_class(json.loads(file.read_text())) if file.exists() else AutoModelForCausalLM
    return kind.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **options
    ).eval()


def token_ids(rows: int, length: int, vocab_size: int = 101, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def change_config(folder: Path, change) -> None:
    """Rewrite config.json as what `change` makes of it."""
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def older_form(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it, without what it left to be derived."""
    rope = raw.pop("rope_parameters")
    if "full_attention" in rope:  # gemma3
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        raw.pop("layer_types")
        raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern", 2)
    kind = rope.pop("rope_type")
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype"), "rope_scaling": None}
    if kind != "default":
        raw["rope_scaling"] = {
            "type" if raw["model_type"] == "llama" and kind == "linear" else "rope_type": kind,
            **rope,
        }
    derived = {"num_key_value_heads": raw["num_attention_heads"]}
    derived["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    return {name: value for name, value in raw.items() if derived.get(name) != value}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    text = getattr(model.base_model, "language_model", model)
    return next(module for module in text.modules() if isinstance(module, nn.ModuleList))


class ResidualStream:
    """The input of every layer and what its attention adds, recorded on transformers' own model by hooks.

    `branch` is the name of the module in a layer that gives what is added.
    """

    def __init__(self, model: PreTrainedModel, branch: str):
        self.scale = getattr(model.config, "residual_multiplier", 1.0)
        self.inputs: list[torch.Tensor] = []
        self.added: list[torch.Tensor] = []
        self._hooks = []
        for layer in layers_of(model):
            self._hooks.append(layer.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0])))
            mixer = layer.linear_attn if hasattr(layer, "linear_attn") else getattr(layer, branch)
            self._hooks.append(mixer.register_forward_hook(self._record))

    def _record(self, _, args, output) -> None:
        self.added.append(self.scale * (output[0] if isinstance(output, tuple) else output))

    def __enter__(self) -> "ResidualStream":
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def importance(self, lengths: list[int]) -> torch.Tensor:
        """[layers, rows]: per row the mean over its own tokens of cos(x, x + a)."""
        means = [
            [
                torch.cosine_similarity(x[row, :n], x[row, :n] + a[row, :n], dim=-1).mean()
                for row, n in enumerate(lengths)
            ]
            for x, a in zip(self.inputs, self.added, strict=True)
        ]
        return torch.tensor(means)
