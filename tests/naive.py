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


def rotate(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = position * frequencies
    first, second = x[:half], x[half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


class NaiveCache:
    """Feeds one token at a time through `model`; `prompt` attends to everything and evicts only at its end."""

    def __init__(self, model: Transformer, policy: str, plan: list[int], sinks: int = 4):
        self.model, self.policy, self.plan, self.sinks = model, policy, plan, sinks
        c = model.config
        self.frequencies = c.rope["rope_theta"] ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        self.lists = [[[] for _ in range(c.n_kv_heads)] for _ in range(c.n_layers)]
        self.seen = 0

    def prompt(self, ids: list[int]) -> Tensor:
        for token in ids:
            logits = self._feed(token, evicting=False)
        for layer, slots in enumerate(self.plan):
            for entries in self.lists[layer]:
                while len(entries) > slots and self.policy != "full":
                    entries.remove(victim(entries, self.policy, slots, self.seen - 1, self.sinks))
        return logits

    def feed(self, token: int) -> Tensor:
        """The logits [vocab] after one more token."""
        return self._feed(token, evicting=self.policy != "full")

    def _feed(self, token: int, evicting: bool) -> Tensor:
        model, c, t = self.model, self.model.config, self.seen
        x = model.embed.weight[token]
        for block, lists, slots in zip(model.layers, self.lists, self.plan, strict=True):
            attention = block.attention
            heads = (attention.wqkv.weight @ norm(x, block.attention_norm.weight, c.norm_eps)).view(-1, c.head_dim)
            q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads])
            out = []
            for kv_head, entries in enumerate(lists):
                if evicting and len(entries) == slots:
                    entries.remove(victim(entries, self.policy, slots, t, self.sinks))
                entries.append(Entry(t, k[kv_head], v[kv_head]))
                inside = self.policy == "streaming" and evicting
                places = range(len(entries)) if inside else [entry.position for entry in entries]
                keys = torch.stack(
                    [rotate(e.k, place, self.frequencies) for e, place in zip(entries, places, strict=True)]
                )
                values = torch.stack([e.v for e in entries])
                for query in q.view(c.n_kv_heads, -1, c.head_dim)[kv_head]:
                    turned = rotate(query, places[-1], self.frequencies)
                    probs = (keys @ turned / c.head_dim**0.5).softmax(0)
                    out.append(probs @ values)
                    for entry, prob in zip(entries, probs.tolist(), strict=True):
                        entry.score += prob
            x = x + attention.wo.weight @ torch.cat(out)
            gate, up = (block.feed_forward.w13.weight @ norm(x, block.ffn_norm.weight, c.norm_eps)).chunk(2)
            x = x + block.feed_forward.w2.weight @ (torch.nn.functional.silu(gate) * up)
        self.seen += 1
        return model.head.weight @ norm(x, model.norm.weight, c.norm_eps)
