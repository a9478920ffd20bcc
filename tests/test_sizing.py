"""Lengths and sizes that are computed without a model, against the model's own."""

import pytest
import torch
from families import CASES

from config import ModelConfig, parameters
from errors import UserError
from model import Transformer
from policies import tokens
from policies.layers import Uniform
from sizing import Sizing


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters(case):
    config = ModelConfig.from_hf(case.config)
    with torch.device("meta"):
        model = Transformer(config)
    assert parameters(config) == sum(parameter.numel() for parameter in model.parameters())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REACH = {  # of a family with this max_position_embeddings and these rotary parameters
    "plain": ("llama", 2048, {}, 2048),
    "yarn, from the length before": ("qwen3", 40960, YARN, 131072),
    "yarn, from the length after": ("qwen3", 131072, YARN, 131072),
    "yarn, one length": ("qwen3", 4096, {"rope_type": "yarn", "factor": 8}, 32768),
    "yarn, factor by the lengths": ("qwen3", 131072, YARN | {"factor": None}, 131072),
    "linear": ("llama", 4096, {"rope_type": "linear", "factor": 4.0}, 16384),
    "dynamic": ("llama", 2048, {"rope_type": "dynamic", "factor": 2.5}, 5120),
    "linear, of every sixth layer": ("gemma3_text", 131072, {"rope_type": "linear", "factor": 8.0}, 131072),
    "far beyond": ("llama", 2**31 - 1, {"rope_type": "linear", "factor": 1e6}, 2**31 - 1),
    "learned": ("opt", 2048, {}, 2048),
}


@pytest.mark.parametrize("name", REACH)
def test_reach(name):
    """What full answers, and nobody else, ends there; beyond it a line warns of policies that keep early tokens."""
    family, positions, rope, reach = REACH[name]
    config = ModelConfig.from_hf({"model_type": family, "max_position_embeddings": positions, "rope_scaling": rope})
    assert config.reach == reach
    for policy in ("full", "window", "streaming", "h2o", "snapkv"):
        sizing = Sizing(config, tokens.make(policy), Uniform())
        assert sizing.refusal([1] * 9, reach - 9) is None and sizing.beyond(reach) is None
        if policy == "full" or family == "opt":
            assert f"exceed the model's {reach} " in sizing.refusal([1] * 9, reach - 8)
            with pytest.raises(UserError, match=f"exceeds the model's {reach} "):
                sizing.at(reach + 1)
        else:
            said = sizing.beyond(reach + 1) or ""
            assert (f"{reach + 1} tokens are more than the {reach} positions" in said) == (policy in ("h2o", "snapkv"))
