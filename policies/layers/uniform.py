"""Uniform: the same number of slots for every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from policies.layers.base import LayerPolicy, Plan, fit


@dataclass(frozen=True)
class Uniform(LayerPolicy):
    """Exactly `budget` slots each; what a smaller cap strands goes evenly to the layers with room."""

    name: ClassVar[str] = "uniform"
    reads_prompt: ClassVar[bool] = False

    def allocate(self, evidence: Sequence[Any], budget: int, caps: Sequence[int], floor: int) -> Plan:
        return Plan(fit([budget] * len(caps), budget, caps, floor, granule=1))
