"""Layer axis: how many KV slots does each layer get?

A policy turns what it measures in each layer of a prompt into wishes, real numbers that sum to `budget * L`, and `fit`
makes them true in integers. To add one: a file here with a subclass of `LayerPolicy`, and an entry in `LAYER_POLICIES`.
"""

from dataclasses import fields

from errors import UserError, shown
from policies.layers.base import LayerPolicy, Plan
from policies.layers.mix import Mix
from policies.layers.perturbation import Perturbation
from policies.layers.pyramid import Pyramid
from policies.layers.squeeze import Squeeze
from policies.layers.uniform import Uniform

LAYER_POLICIES: dict[str, type[LayerPolicy]] = {
    policy.name: policy for policy in (Uniform, Perturbation, Squeeze, Mix, Pyramid)
}


def make(name: str, **options) -> LayerPolicy:
    """The policy of that name, configured. UserError for a name or an option that does not exist."""
    if name not in LAYER_POLICIES:
        raise UserError(f"unknown layer policy {shown(name)}; known: {', '.join(LAYER_POLICIES)}")
    known = [field.name for field in fields(LAYER_POLICIES[name])]
    for option in options:
        if option not in known:
            raise UserError(
                f"layer policy {shown(name)} has no option {shown(option)}; it has: {', '.join(known) or 'none'}"
            )
    return LAYER_POLICIES[name](**options)


__all__ = ["LAYER_POLICIES", "LayerPolicy", "Mix", "Perturbation", "Plan", "Pyramid", "Squeeze", "Uniform", "make"]
