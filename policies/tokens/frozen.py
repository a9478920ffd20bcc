"""The base of policies that score the prompt once: the best of it stays for good, a ring holds the latest tokens.

With N slots a prompt keeps its last w = min(recent, N // 2) tokens, and of the rest the N - w that score highest, ties
to the latest. The ring has N // 2 slots: to begin with it holds the last w tokens and the lowest of the others. Each
new token takes the place of the lowest that is left in the ring; when none is left, that of the oldest. So the prompt's
end stays as long as there is something worse, and a long answer keeps N // 2 tokens. The other slots are frozen.

Where a token goes depends on its position alone: the ring's lowest lies where the next token comes, the second lowest
behind it, and so on. After a prompt of fewer than N tokens the free slots are filled first, and what stands in front of
the ring is frozen then, whatever its score.

More slots widen both parts by at most as much, so neither ever loses a token of the prompt to having more. Nothing is
kept per slot while decoding. In a layer with a sliding window a frozen token would leave the window and stay: there
these policies are the plain ring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError, shown
from policies.tokens.base import TokenPolicy


@dataclass(frozen=True)
class Frozen(TokenPolicy):
    """recent: how many of the prompt's last tokens stay whatever they score, with at least twice as many slots."""

    recent: int = 64

    def __post_init__(self):
        if type(self.recent) is not int or not 1 <= self.recent < 2**31:
            raise UserError(f"recent must be an integer of at least 1, not {shown(self.recent)}, and below 2**31")

    def place(self, position: Tensor, slots: int) -> Tensor:
        ring = max(slots // 2, 1)
        frozen = slots - ring
        return torch.where(position < slots, position, frozen + (position - frozen) % ring)

    def select(self, lengths: Tensor, length: int, slots: int, scores: Tensor) -> Tensor:
        position = torch.arange(length, device=scores.device)
        if length <= slots:
            return position.repeat(*scores.shape[:2], 1)
        end = lengths[:, None, None]
        last = max(min(self.recent, slots // 2), 1)
        rank = scores.masked_fill(position >= end - last, float("inf")).masked_fill(position >= end, float("-inf"))
        # Latest first, then a stable sort: the last tokens from the end on, then the others from the highest on.
        best = length - 1 - rank.flip(2).sort(dim=2, descending=True, stable=True).indices[:, :, :slots]
        ring, index = max(slots // 2, 1), torch.arange(slots, device=scores.device)
        # In the ring number `last` is the highest of the others: the tokens that will come take it last.
        behind = (lengths[:, None] + torch.where(index < last, -1 - index, slots - 1 - index)).clamp(min=0)
        place = torch.where((index >= last) & (index < last + slots - ring), index - last, self.place(behind, slots))
        placed = best.scatter(2, place[:, None].expand_as(best), best)
        return torch.where(end < slots, position[:slots], placed)
