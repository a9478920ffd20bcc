"""What a token policy answers. The defaults are a ring over all slots with nothing to remember."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


class TokenPolicy:
    """Shapes: B rows, K key-value heads, S prompt tokens, N slots of a layer. `seen` [B] counts tokens before this one.

    The new token's slot counts among the N. The filled slots are always the first min(seen, N). The prompt goes through
    `score_prompt` and `select`; a token of a decode step through `slot` and `observe`; a later turn of a conversation,
    several tokens at once, through `visible` and `absorb`.
    """

    name: ClassVar[str]
    bounded: ClassVar[bool] = True  # works with fewer slots than tokens
    scored: ClassVar[bool] = False  # keeps a score and a position in every slot
    sinks: int = 0  # leading slots that hold the first tokens for good, with keys turned to in-cache positions
    floor: int = 1  # fewest slots the policy can work in, the new token's included
    queries: int = 0  # prompt queries whose attention `score_prompt` looks at at the same time

    def within_window(self, window: int) -> "TokenPolicy":
        """The policy for a layer that has a sliding window shorter than the request, and no more slots than that.

        What has left the window is never attended to: a token at position p has left when `seen - p >= window`. Here:
        a ring over all slots, which only ever holds the latest tokens. There are no sinks: they leave the window too.
        """
        return TokenPolicy()

    def score_prompt(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        probs: Callable[[Tensor, Tensor, int, int], tuple[slice, Tensor]],
    ) -> Tensor | None:
        """Scores [B, K, S] of the prompt's tokens from q [B, H, S, D] and k, v [B, K, S, D], if the policy wants any.

        probs(q, k, start, end) says which keys the queries start..end can see, and how much each query attends to each
        of them [B, K, G, end - start, keys], under the layer's own scale, soft cap and window.
        """
        return None

    def place(self, position: Tensor, slots: int) -> Tensor:
        """The slot of the token at `position` (same shape), for policies in which nothing else decides it.

        It is `position` itself while that is below `slots`. Here: sinks first, then a ring over the rest.
        """
        ring = max(slots - self.sinks, 1)
        return torch.where(position < slots, position, self.sinks + (position - self.sinks) % ring)

    def slot(self, seen: Tensor, layer) -> Tensor:
        """The slot [B, 1 or K] that the token at position `seen` takes in `layer`; the victim's once it is full."""
        return self.place(seen, layer.slots)[:, None]

    def select(self, lengths: Tensor, length: int, slots: int, scores: Tensor | None) -> Tensor:
        """Which prompt position goes into each slot: [B, 1 or K, n], n the same for all rows.

        A row of `lengths[b]` tokens, padded to `length`, fills its first min(lengths[b], slots) slots; entries behind
        those are any valid position. What fewer slots keep is a subset of what more slots keep. Here: of all that have
        the same place, the latest.
        """
        position = torch.arange(length, device=lengths.device).expand(len(lengths), -1)
        place = self.place(position, slots)
        position = position.masked_fill(position >= lengths[:, None], 0)
        latest = position.new_zeros(len(lengths), slots).scatter_reduce_(1, place, position, "amax")
        return latest[:, None, : position.shape[1]]

    def visible(self, seen: Tensor, count: int, layer) -> Tensor:
        """What each of the `count` tokens that follow may attend to: bool [B, 1 or K, count, N + count].

        Among the layer's N slots and then these tokens themselves. Here: what each would find if they came one by one,
        every one overwriting what is in its place.
        """
        slots, index = layer.slots, torch.arange(count, device=seen.device)
        place = self.place(seen[:, None] + index, slots)
        # Until when a slot keeps what is in it now: the first newcomer that takes it. So too for the newcomers.
        taken = place.new_full((len(seen), slots), count).scatter_reduce_(1, place, index.expand_as(place), "amin")
        taken = taken.masked_fill(torch.arange(slots, device=seen.device) >= seen[:, None], 0)
        later = (place[:, :, None] == place[:, None]) & (index > index[:, None])
        retaken = torch.where(later, index, count).amin(2)
        query = index[:, None]
        return torch.cat((query < taken[:, None], (query >= index) & (query < retaken[:, None])), dim=2)[:, None]

    def absorb(self, layer, seen: Tensor, probs: Tensor) -> Tensor:
        """Which of the layer's N slots and of the tokens that follow them is in each slot afterwards: [B, 1 or K, N].

        probs [B, K, G, count, N + count]: what those tokens attended to. Here: the last one in each place.
        """
        slots, count = layer.slots, probs.shape[3]
        index = torch.arange(count, device=seen.device)
        place = self.place(seen[:, None] + index, slots)
        source = torch.arange(slots, device=seen.device).repeat(len(seen), 1)
        return source.scatter_reduce_(1, place, (slots + index).expand_as(place), "amax")[:, None]

    def observe(self, layer, slot: Tensor, seen: Tensor, probs: Tensor) -> None:
        """Told after each step what the token in `slot` attended to: probs [B, K, G, N]."""
