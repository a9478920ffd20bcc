"""Prompts that wait for the plan, inside the arena that the plan will divide.

Until the last layer has been read nobody knows the plan; but all its slots together are known, and so is the most that
each layer read so far can still get (`LayerPolicy.upper_bound`). Each is cut to that, and what is left of it waits in
the arena, layer after layer: layer l's region begins where the bounds of the layers before it end. What would end
behind the arena waits in tensors of its own. As later layers push the bounds down, layers are cut again and their
regions move to the left, until all fit.

Invariant: a bound never rises and is never below the plan. So every move, the last one into the plan's own stretches
included, goes to the left, and ends before the next layer's region begins: in ascending order no layer is overwritten
before it has moved. K and V take one layer's whole prompt, and the arena or all bounds together, whichever is more; to
that comes what the first layer outside leaves free, and one layer's copy while it is cut or moved.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvcache import KVCache, Memory, Prompt


class NotFinite(Exception):
    """No prompt gives finite evidence, so no plan can be made."""


def mean_finite(evidence: Tensor) -> Tensor:
    """The mean [...] over those rows of [R, ...] that are finite; NaN without any. One broken row spoils no plan."""
    rows = evidence.reshape(len(evidence), -1)
    return rows.masked_fill(~rows.isfinite().all(1, keepdim=True), math.nan).nanmean(0).view(evidence.shape[1:])


class Waiting:
    """lengths [R] of the prompts; bounds(evidence so far) are the most slots that each of these layers can get.

    `memory` holds the arenas of `cache`, which is large enough for the plan of R rows. It may be larger: all of it is
    used.
    """

    def __init__(
        self,
        cache: KVCache,
        memory: Memory,
        lengths: Tensor,
        policies: Sequence[Any],
        bounds: Callable[[list[Any]], list[int]],
    ):
        self.arenas, self.format = [memory.whole(name) for name in cache.kv], cache.format
        self.lengths, self.policies, self.upper_bounds = lengths, policies, bounds
        self.evidence: list[Any] = []  # of each layer, the mean over the prompts
        self.prompts: list[Prompt] = []
        self.bounds: list[int] = []  # in slots, as the regions lie
        self.starts: list[int | None] = []  # of the regions, in slots; None: outside

    def keep(self, layer: int, evidence: Tensor, prompt: Prompt) -> None:
        """Take in the next layer: the evidence of it [R, ...], and its prompt."""
        mean = mean_finite(evidence).tolist()  # the layer's one wait for the device, but for what cutting needs
        if not all(map(math.isfinite, mean if isinstance(mean, list) else [mean])):
            raise NotFinite
        prompt.encode(self.format)
        self.evidence.append(mean)
        bounds = self.upper_bounds(self.evidence)
        self.prompts.append(prompt)
        self.bounds.append(bounds[-1])
        self.starts.append(None)
        units = [part.numel() // prompt.size for part in prompt.stored.parts()]  # numbers of one slot of all rows
        room = min(len(arena) // unit for arena, unit in zip(self.arenas, units, strict=True))
        if sum(self.bounds) > room:  # else the others stay as they are
            self.bounds = list(map(min, self.bounds, bounds))
        start = 0
        for i, (prompt, policy, slots) in enumerate(zip(self.prompts, self.policies, self.bounds, strict=False)):
            if cut := slots < prompt.size:  # into tensors of its own
                prompt.cut(policy.select(self.lengths, prompt.length, slots, prompt.scores))
            last = start + prompt.size
            if last <= room and (cut or start != self.starts[i]):
                if not cut and self.starts[i] is not None:  # the old place and the new one may overlap
                    prompt.lift()
                prompt.put([arena[start * n : last * n] for arena, n in zip(self.arenas, units, strict=True)])
                self.starts[i] = start
            start += slots
