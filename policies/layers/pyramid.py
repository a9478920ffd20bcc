"""Pyramid: fewer slots the higher the layer (PyramidKV, arXiv 2406.02069)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError, shown
from policies.layers.base import LayerPolicy, Plan, fit


@dataclass(frozen=True)
class Pyramid(LayerPolicy):
    """Linear from `2 * budget - last` slots at layer 0 down to `last = budget / beta` at the last one."""

    beta: float = 20
    name: ClassVar[str] = "pyramid"
    reads_prompt: ClassVar[bool] = False

    def __post_init__(self):
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 1 <= self.beta < 2**63:
            raise UserError(f"beta must be a number of at least 1, not {shown(self.beta)}, and below 2**63")

    def allocate(self, evidence: Sequence[Any], budget: int, caps: Sequence[int], floor: int) -> Plan:
        layers = len(caps)
        slant = budget - budget / self.beta  # from the middle to either end
        wishes = [budget + slant * (layers - 1 - 2 * layer) / max(layers - 1, 1) for layer in range(layers)]
        return Plan(fit(wishes, budget, caps, floor))
