"""Tiny random checkpoints of every family and form, written by transformers: what the tests compare with.

To add a family: add its cases to `CASES`. Sizes are small and mostly no powers of two, so that nothing fits by chance.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, logging

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

    def __str__(self) -> str:
        return self.name


def case(name: str, older: bool = False, rope: dict[str, Any] | None = None, **changes) -> Case:
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
    return Case(name, config | changes, older)


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
    case("mistral", sliding_window=LENGTH),
    case("mistral-no-window", sliding_window=None, head_dim=10, num_key_value_heads=3),
    case("mistral-older", older=True, sliding_window=4096),
    case("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
    case("qwen2-older", older=True, tie_word_embeddings=True, use_sliding_window=False, sliding_window=16),
    case("qwen3", head_dim=10, num_key_value_heads=3),
    case("qwen3-biases", head_dim=16, attention_bias=True),
]
BY_NAME = {case.name: case for case in CASES}
FAMILIES = [case for case in CASES if case.name in ("llama-gqa", "mistral", "qwen2", "qwen3")]


def make_checkpoint(case: Case, folder: Path, shards: int = 1, seed: int = 0) -> Path:
    """Write `case` as a Hugging Face folder, in one file or about `shards` of them."""
    model = random_model(case, seed)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1)
    if case.older:
        change_config(folder, older_form)
    return folder


def random_model(case: Case, seed: int = 0) -> PreTrainedModel:
    """transformers' model with every parameter redrawn: its own defaults, many of them 0 and 1, hide mistakes."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name:
            drawn = 0.5 * noise
        elif parameter.ndim == 2:
            drawn = 1.5 * noise * parameter.shape[1] ** -0.5
        else:
            drawn = 0.3 * noise + (0 if name.endswith("bias") else 1)
        parameter.data.copy_(drawn)
    return model


def tensor_names(case: Case) -> list[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config))
    return [name for name, _ in model.named_parameters()]


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def token_ids(rows: int, length: int, vocab_size: int = 101, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def change_config(folder: Path, change) -> None:
    """Rewrite config.json as what `change` makes of it."""
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def older_form(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it, without what it left to be derived."""
    rope = raw.pop("rope_parameters")
    kind = rope.pop("rope_type")
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype"), "rope_scaling": None}
    if kind != "default":
        raw["rope_scaling"] = {"rope_type" if kind == "llama3" else "type": kind, **rope}
    derived = {"num_key_value_heads": raw["num_attention_heads"]}
    derived["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    return {name: value for name, value in raw.items() if derived.get(name) != value}


class ResidualStream:
    """The input of every layer and what its attention adds, recorded on transformers' own model by hooks.

    `attention` is the name of the attention module in a layer.
    """

    def __init__(self, layers: nn.ModuleList, attention: str = "self_attn"):
        self.inputs: list[torch.Tensor] = []
        self.added: list[torch.Tensor] = []
        self._hooks = []
        for layer in layers:
            self._hooks.append(layer.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0])))
            hook = getattr(layer, attention).register_forward_hook
            self._hooks.append(hook(lambda _, args, output: self.added.append(output[0])))

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
