"""Layer axis: how many KV slots does each layer get?

A policy turns what it measures in each layer of a prompt into wishes, real numbers that sum to `budget * L`, and `fit`
makes them true in integers. To add one: a file here with a subclass of `LayerPolicy`, and an entry in `LAYER_POLICIES`.
"""

from typing import Any

from policies import options
from policies.layers.base import LayerPolicy, Plan
from policies.layers.mix import Mix
from policies.layers.perturbation import Perturbation
from policies.layers.pyramid import Pyramid
from policies.layers.squeeze import Squeeze
from policies.layers.uniform import Uniform

LAYER_POLICIES: dict[str, type[LayerPolicy]] = {
    policy.name: policy for policy in (Uniform, Perturbation, Squeeze, Mix, Pyramid)
}


def make(word: str, **given: Any) -> LayerPolicy:
    """The policy of that name, or of a word such as `squeeze:p=0.4`, configured: see options.py."""
    return options.make("layer policy", LAYER_POLICIES, word, given)


__all__ = ["LAYER_POLICIES", "LayerPolicy", "Mix", "Perturbation", "Plan", "Pyramid", "Squeeze", "Uniform", "make"]
