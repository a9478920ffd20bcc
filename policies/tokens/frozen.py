"""The base of policies that score the prompt once: the best of it stays for good, a ring holds the latest tokens.

With N slots the ring has w = min(recent, N // 2) of them, the last ones. The prompt's last w tokens are in it; the
other N - w slots hold those of the rest that score highest, ties to the latest, and are frozen. Then each new token
overwrites the oldest in the ring. After a prompt of fewer than N tokens the free slots are filled first: what stands in
the first N - w is frozen then, whatever its score.

More slots widen the ring by at most as much, so neither part ever loses a token to having more. Nothing is kept per
slot while decoding. In a layer with a sliding window a frozen token would leave the window and stay: there these
policies are the plain ring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError, shown
from policies.tokens.base import TokenPolicy
from policies.tokens.scoring import highest


@dataclass(frozen=True)
class Frozen(TokenPolicy):
    """recent: how many of the latest tokens always stay, in a layer with at least twice as many slots."""

    recent: int = 64

    def __post_init__(self):
        if type(self.recent) is not int or self.recent < 1:
            raise UserError(f"recent must be an integer of at least 1, not {shown(self.recent)}")

    def ring(self, slots: int) -> int:
        return max(min(self.recent, slots // 2), 1)

    def place(self, position: Tensor, slots: int) -> Tensor:
        ring = self.ring(slots)
        frozen = slots - ring
        return torch.where(position < slots, position, frozen + (position - frozen) % ring)

    def select(self, lengths: Tensor, length: int, slots: int, scores: Tensor) -> Tensor:
        ring = self.ring(slots)
        frozen = slots - ring
        position = torch.arange(length, device=scores.device)
        latest = position >= lengths[:, None, None] - ring
        best = highest(scores.masked_fill(latest, float("inf")), lengths, slots)  # the ring's tokens come last
        placed = super().select(lengths, length, slots, None).expand(best.shape)
        return torch.cat((best[:, :, :frozen], placed[:, :, frozen:]), dim=2)
