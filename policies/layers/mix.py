"""Mix: a share of the slots handed out by squeeze, the rest uniformly.

With few slots adaptive plans can do harm; 20% squeezed and 80% uniform is the careful middle. The wishes
`(1 - share) * b + share * squeeze` are those of squeeze with a milder p: a squeezed layer gets `(1 - share) * b +
share * p * b`, which is `b` times `1 - share * (1 - p)`, and the other layers get what that leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from errors import UserError, shown
from policies.layers.base import Plan
from policies.layers.squeeze import Squeeze


@dataclass(frozen=True)
class Mix(Squeeze):
    """share: of the slots that squeeze hands out, in [0, 1]; p as in squeeze."""

    share: float = 0.2
    name: ClassVar[str] = "mix"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise UserError(f"share must be in [0, 1], not {shown(self.share)}")

    def allocate(self, signals: Sequence[float], budget: int, caps: Sequence[int], floor: int) -> Plan:
        return Plan(self._milder().allocate(signals, budget, caps, floor).slots)

    def upper_bound(
        self, signals_so_far: Sequence[float], num_layers: int, budget: int, caps: Sequence[int], floor: int
    ) -> list[int]:
        return self._milder().upper_bound(signals_so_far, num_layers, budget, caps, floor)

    def _milder(self) -> Squeeze:
        return Squeeze(1 - self.share * (1 - self.p))
