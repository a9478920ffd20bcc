"""What H2O and TOVA have in common: a score and a position in every slot, and at each step the lowest rank goes.

The victim is never among the last `recent(slots)` positions, the new one included. It is chosen by the scores after
the previous step, ties to the lowest position. Positions are absolute.
"""

from typing import ClassVar

import torch
from torch import Tensor

from policies.tokens.base import TokenPolicy
from policies.tokens.scoring import highest


class Evicting(TokenPolicy):
    """In a layer with a sliding window of `window` the token that has left it is the victim, whatever its rank.

    The prompt's selection prefers tokens inside the window, then one leaves with each step: none is ever seen from
    outside, and no mask is needed.
    """

    scored: ClassVar[bool] = True
    window: ClassVar[int | None] = None

    def recent(self, slots: int) -> int:
        """How many of the latest positions, the new one included, are never evicted."""
        raise NotImplementedError

    def rank(self, score: Tensor, queries: Tensor) -> Tensor:
        """What decides, at least 0, from a token's score and the number of queries since its own, that included."""
        return score

    def rescored(self, score: Tensor, probs: Tensor) -> Tensor:
        """The scores [B, K, M] after T queries with attention probs [B, K, G, T, M]; their own were 0 before."""
        raise NotImplementedError

    def select(self, lengths: Tensor, length: int, slots: int, scores: Tensor) -> Tensor:
        position = torch.arange(length, device=scores.device)
        end = lengths[:, None, None]
        rank = self.rank(scores, end - position).masked_fill(position >= end - self.recent(slots), float("inf"))
        if self.window is not None:
            rank = rank.masked_fill(position < end - self.window, -1)
        return highest(rank, lengths, slots)

    def slot(self, seen: Tensor, layer) -> Tensor:
        slots = layer.slots
        now = seen[:, None, None]
        rank = self.rank(layer.score, now - layer.position)
        rank = rank.masked_fill(layer.position > now - self.recent(slots), float("inf"))
        if self.window is not None:
            rank = rank.masked_fill(layer.position <= now - self.window, -1)
        lowest = rank == rank.amin(2, keepdim=True)
        victim = layer.position.masked_fill(~lowest, torch.iinfo(torch.int64).max).argmin(2)
        return torch.where((seen < slots)[:, None], seen[:, None], victim)

    def observe(self, layer, slot: Tensor, seen: Tensor, probs: Tensor) -> None:
        row = torch.arange(slot.shape[0], device=slot.device)[:, None]
        head = torch.arange(slot.shape[1], device=slot.device)
        layer.position.index_put_((row, head, slot), seen[:, None])
        layer.score.index_put_((row, head, slot), layer.score.new_zeros(()))
        layer.score.copy_(self.rescored(layer.score, probs[:, :, :, None]))

    def visible(self, seen: Tensor, count: int, layer) -> Tensor:
        """Everything there is, and each other: eviction waits until all `count` tokens are in."""
        index = torch.arange(count, device=seen.device)
        query = index[:, None]
        slots = torch.arange(layer.slots, device=seen.device)
        old = (slots < seen[:, None])[:, None, None].expand(*layer.score.shape[:2], count, -1)
        new = (index <= query).expand(*layer.score.shape[:2], -1, -1)
        if self.window is not None:
            old = old & (layer.position[:, :, None] > seen[:, None, None, None] + query - self.window)
            new = new & (index > query - self.window)
        return torch.cat((old, new), dim=3)

    def absorb(self, layer, seen: Tensor, probs: Tensor) -> Tensor:
        count, slots = probs.shape[3], layer.slots
        index = torch.arange(slots + count, device=seen.device)
        new = (seen[:, None] + index[:count])[:, None].expand(-1, layer.score.shape[1], -1)
        position = torch.cat((layer.position, new), dim=2)
        score = self.rescored(torch.cat((layer.score, torch.zeros_like(new, dtype=layer.score.dtype)), dim=2), probs)
        end = (seen + count)[:, None, None]
        rank = self.rank(score, end - position).masked_fill(position >= end - self.recent(slots), float("inf"))
        if self.window is not None:
            rank = rank.masked_fill(position < end - self.window, -1)
        empty = (index >= seen[:, None, None]) & (index < slots)
        order = position.masked_fill(empty, torch.iinfo(torch.int64).max).argsort(dim=2)
        source = order.gather(2, highest(rank.gather(2, order), seen.clamp(max=slots) + count, slots))
        layer.score.copy_(score.gather(2, source))
        layer.position.copy_(position.gather(2, source))
        return source
