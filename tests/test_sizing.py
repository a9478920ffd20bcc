"""Sizes that are computed without a model, against the model's own."""

import pytest
import torch
from families import CASES

from config import ModelConfig, parameters
from model import Transformer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters(case):
    config = ModelConfig.from_hf(case.config)
    with torch.device("meta"):
        model = Transformer(config)
    assert parameters(config) == sum(parameter.numel() for parameter in model.parameters())
