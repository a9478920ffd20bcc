"""The slow, obvious cache: Python lists that grow and evict by definition. The oracle of the engine.

Every layer and key-value head keeps a list of entries in order of position. Before a new token is added to a full list
one entry is evicted. Streaming turns all keys to their positions inside the list, as the reference implementation does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model import Transformer


@dataclass
class Entry:
    position: int
    k: Tensor  # [D], not rotated
    v: Tensor
    score: float = 0.0


def victim(entries: list[Entry], policy: str, slots: int, newest: int, sinks: int) -> Entry:
    """The entry to evict from a full list when the newest position is `newest`."""
    if policy == "window":
        return entries[0]
    if policy == "streaming":
        return entries[sinks]
    recent = slots // 2
    old = [entry for entry in entries if entry.position <= newest - recent]
    return min(old, key=lambda entry: (entry.score, entry.position))


def rotate(x: Tensor, position: int, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    half = len(frequencies)
    angle = position * frequencies
    first, second, rest = x[:half], x[half : 2 * half], x[2 * half :]
    turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))
    return torch.cat((scale * turned, rest))


class NaiveCache:
    """Feeds one token at a time through `model`; `prompt` attends to everything and evicts only at its end.

    A layer's window goes before the policy: what has left it is dropped first. Norms, projections and feed-forward are
    the model's own.
    """

    def __init__(self, model: Transformer, policy: str, plan: list[int], sinks: int = 4, length: int = 10**9):
        self.model, self.sinks, self.scored = model, sinks, policy == "h2o"
        c = model.config
        self.windows = [c.window(layer) or length for layer in range(c.n_layers)]
        windowed = [window < length for window in self.windows]
        # Sinks leave a window, so that streaming is the plain window there.
        self.policies = ["window" if policy == "streaming" and short else policy for short in windowed]
        self.plan = [min(slots, window) for slots, window in zip(plan, self.windows, strict=True)]
        self.rotary = model.rotary(1)
        self.lists = [[[] for _ in range(c.n_kv_heads)] for _ in range(c.n_layers)]
        self.seen = 0

    def prompt(self, ids: list[int]) -> Tensor:
        for token in ids:
            logits = self._feed(token, evicting=False)
        self._shrink()
        return logits

    def append(self, ids: list[int], chunk: int) -> Tensor:
        """A later turn: policies that score evict at the end of each chunk, the others with each token."""
        for start in range(0, len(ids), chunk):
            for token in ids[start : start + chunk]:
                logits = self._feed(token, evicting=not self.scored)
            self._shrink()
        return logits

    def _shrink(self) -> None:
        for policy, slots, lists in zip(self.policies, self.plan, self.lists, strict=True):
            for entries in lists:
                while len(entries) > slots and policy != "full":
                    entries.remove(victim(entries, policy, slots, self.seen - 1, self.sinks))

    def feed(self, token: int) -> Tensor:
        """The logits [vocab] after one more token."""
        return self._feed(token, evicting=True)

    def _feed(self, token: int, evicting: bool) -> Tensor:
        model, t = self.model, self.seen
        x = model.embedded(torch.tensor([[token]]), torch.tensor([[t]]))
        for layer, block in enumerate(model.layers):
            policy, slots, frequencies = self.policies[layer], self.plan[layer], self.rotary[layer]
            attention, normed = block.attention, block.attention_norm(x)
            scale = attention.rope_scale
            q, k, v = (part[0, :, 0] for part in attention.project(normed))
            out = []
            for kv_head, entries in enumerate(self.lists[layer]):
                entries[:] = [entry for entry in entries if t - entry.position < self.windows[layer]]
                if evicting and len(entries) == slots and policy != "full":
                    entries.remove(victim(entries, policy, slots, t, self.sinks))
                entries.append(Entry(t, k[kv_head], v[kv_head]))
                inside = policy == "streaming" and evicting
                places = range(len(entries)) if inside else [entry.position for entry in entries]
                turned = [rotate(e.k, place, frequencies, scale) for e, place in zip(entries, places, strict=True)]
                keys, values = torch.stack(turned), torch.stack([entry.v for entry in entries])
                for query in q.view(len(k), -1, q.shape[-1])[kv_head]:
                    scores = keys @ rotate(query, places[-1], frequencies, scale) * attention.scale
                    if attention.softcap:
                        scores = attention.softcap * (scores / attention.softcap).tanh()
                    probs = scores.softmax(0)
                    out.append(probs @ values)
                    for entry, prob in zip(entries, probs.tolist(), strict=True):
                        entry.score += prob
            added = attention.wo(torch.cat(out)[None, None])
            x = block.feed(x, normed, block.post_attention_norm(added) * block.residual_scale)
        self.seen += 1
        return model.logits(x[0, 0])
