"""The slow, obvious cache: Python lists that grow and evict by definition. The oracle of the engine.

Every layer and key-value head keeps a list of entries in order of position. Before a new token is added to a full list
one entry is evicted. Layers of linear attention keep no entries but their state, as `NaiveDelta` does. Streaming turns
all keys to their positions inside the list, as the reference implementation does.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from config import ACTIVATIONS
from deltanet import DeltaNet
from model import Attention, Block, Transformer

EVICTING = ("h2o", "h2o-mean", "tova")  # they score all the time
FROZEN = ("snapkv", "dropkv", "knorm", "keydiff")  # they score the prompt once; then a ring runs over half the slots


def added_to(x: Tensor, added: Tensor, normed: Tensor, block: Block) -> Tensor:
    """The residual stream behind a block whose attention read `normed` and adds that."""
    return block.feed(x, normed, x + block.post_attention_norm(added) * block.residual_scale)


@dataclass
class Entry:
    position: int
    k: Tensor  # [D], not rotated
    v: Tensor
    received: list[float] = field(default_factory=list)  # from each query since its own, summed over the group's heads
    missed: list[float] = field(default_factory=list)  # the error that its loss alone would have made for each query
    latest: float = 0.0  # from the latest query, summed over all heads of the layer
    turned: Tensor | None = None  # an int8 cache: the key as it is stored, rotated to its position


def victim(entries: list[Entry], policy: str, slots: int, newest: int, sinks: int) -> Entry:
    """The entry to evict from a full list when the newest position is `newest`."""
    if policy == "window":
        return entries[0]
    if policy == "streaming":
        return entries[sinks]
    score = {
        "h2o": lambda entry: sum(entry.received),
        "h2o-mean": lambda entry: sum(entry.received) / len(entry.received),
        "tova": lambda entry: entry.latest,
    }[policy]
    recent = 1 if policy == "tova" else slots // 2
    old = [entry for entry in entries if entry.position <= newest - recent]
    return min(old, key=lambda entry: (score(entry), entry.position))


def scores_of_prompt(entries: list[Entry], policy: str, recent: int, keys: Tensor) -> list[float]:
    """The scores by which the frozen policies choose; keys [S, D] are rotated."""
    if policy == "dropkv":
        return [sum(entry.missed[-recent:]) for entry in entries]
    if policy == "knorm":
        return [-key.norm().float().item() for key in keys]
    if policy == "keydiff":
        mean = sum(key / key.norm() for key in keys) / len(keys)
        return [-(key @ mean / key.norm() / mean.norm()).item() for key in keys]
    last = [0.0, 0.0, *(sum(entry.received[-recent:]) for entry in entries), 0.0, 0.0]
    return [sum(last[i : i + 5]) / 5 for i in range(len(entries))]


def int8(x: Tensor) -> Tensor:
    """x [D] as a slot of 8 bits gives it back: whole numbers times a scale of 16 bits."""
    scale = torch.tensor(max(x.abs().tolist()) / 127).bfloat16().item()
    return torch.tensor([min(max(round(number / scale), -127), 127) * scale for number in x.tolist()], dtype=x.dtype)


def rotate(x: Tensor, position: Tensor, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """x [..., D] at positions [...]"""
    half = len(frequencies)
    angle = position[..., None] * frequencies
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
    return torch.cat((scale * turned, rest), -1)


def attended(
    query: Tensor, keys: Tensor, values: Tensor, entries: list[Entry], attention: Attention, head: int
) -> Tensor:
    """What a head's query reads; each entry's account of what it received, and of the error its loss would make."""
    scores = keys @ query * attention.scale
    if attention.softcap:
        scores = attention.softcap * (scores / attention.softcap).tanh()
    sink = scores[:0] if attention.sink_logits is None else attention.sink_logits[head : head + 1]
    probs = torch.cat((scores, sink)).softmax(0)[: len(entries)]
    out = probs @ values
    for entry, prob in zip(entries, probs.tolist(), strict=True):
        entry.received[-1] += prob
        error = (entry.v - out).square().sum().item()
        entry.missed[-1] += (prob / max(1 - prob, 1e-6)) ** 2 * error
    return out


class NaiveDelta:
    """A layer of linear attention: the gated delta rule head by head and token by token, as it is defined."""

    def __init__(self, net: DeltaNet):
        self.net, d = net, net.sizes
        self.before: list[Tensor] = []  # of each token, what goes into the convolution
        self.memory = [net.norm.new_zeros(d.key_dim, d.value_dim) for _ in range(d.value_heads)]

    def feed(self, x: Tensor) -> Tensor:
        """x [1, 1, C] -> [1, 1, C]."""
        net, d = self.net, self.net.sizes
        row = net.wqkvz(x)[0, 0]
        self.before.append(row[: d.channels])
        taps = reversed(net.conv[:, 0].unbind(1))  # the last one is of the newest token
        mixed = sum(tap * token for tap, token in zip(taps, reversed(self.before), strict=False))
        q, k, v = ACTIVATIONS[net.config.activation](mixed).split([d.key_heads * d.key_dim] * 2 + [net.values])
        out = []
        for head in range(d.value_heads):
            own = head // (d.value_heads // d.key_heads)
            query, key = (part.view(d.key_heads, -1)[own] for part in (q, k))
            query, key = (part / (part.square().sum() + 1e-6).sqrt() for part in (query, key))
            value, gate = (part.view(d.value_heads, -1)[head] for part in (v, row[d.channels :]))
            rate, fall = net.wba(x)[0, 0].view(2, -1)[:, head]
            kept = (-net.a_log[head].exp() * (1 + (fall + net.dt_bias[head]).exp()).log()).exp()
            memory = kept * self.memory[head]
            memory = memory + torch.outer(key, rate.sigmoid() * (value - key @ memory))
            self.memory[head], read = memory, query @ memory / d.key_dim**0.5
            read = read / (read.square().mean() + net.config.norm_eps).sqrt() * net.norm
            out.append(read * gate * gate.sigmoid())
        return net.wo(torch.cat(out)[None, None])


class NaiveCache:
    """Feeds one token at a time through `model`; `prompt` attends to everything and evicts only at its end.

    A layer's window goes before the policy: what has left it is dropped first. Norms, projections and feed-forward are
    the model's own.
    """

    def __init__(
        self,
        model: Transformer,
        policy: str,
        plan: list[int],
        sinks: int = 4,
        length: int = 10**9,
        recent: int = 64,
        int8: bool = False,
    ):
        self.model, self.sinks, self.recent, self.scored = model, sinks, recent, policy in EVICTING
        self.int8, self.storing = int8, False  # the prompt is read in full precision, and stored at its end
        c = model.config
        self.windows = [c.window(layer) or length for layer in range(c.n_layers)]
        windowed = [window < length for window in self.windows]
        # Sinks and frozen tokens leave a window, so that these policies are the plain window there.
        plain = policy == "streaming" or policy in FROZEN
        self.policies = ["window" if plain and short else policy for short in windowed]
        self.plan = [min(slots, window) for slots, window in zip(plan, self.windows, strict=True)]
        self.rotary = model.rotary(1)
        heads = [0 if layer in c.linear else c.n_kv_heads for layer in range(c.n_layers)]
        self.linear = {layer: NaiveDelta(model.layers[layer].attention) for layer in c.linear}
        self.lists = [[[] for _ in range(count)] for count in heads]
        self.doomed = [[[] for _ in range(count)] for count in heads]  # go before the ring's, in order
        self.seen = 0

    def prompt(self, ids: list[int]) -> Tensor:
        for token in ids:
            logits = self._feed(token, evicting=False)
        for layer, (policy, lists) in enumerate(zip(self.policies, self.lists, strict=True)):
            for head, entries in enumerate(lists):
                if policy in FROZEN:
                    self.doomed[layer][head] = self._freeze(entries, layer)
        self._shrink()
        if self.int8:
            self.storing = True
            for layer, lists in enumerate(self.lists):
                for entry in (entry for entries in lists for entry in entries):
                    self._store(entry, layer)
        return logits

    def _store(self, entry: Entry, layer: int) -> None:
        entry.v = int8(entry.v)
        if self.policies[layer] == "streaming" and entry.position < self.sinks:
            entry.k = int8(entry.k)
        else:
            place, scale = torch.tensor(entry.position), self.model.layers[layer].attention.rope_scale
            entry.turned = int8(rotate(entry.k, place, self.rotary[layer], scale))

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

    def _freeze(self, entries: list[Entry], layer: int) -> list[Entry]:
        """Of all but the last ones, the lowest score goes, until the list fits. Returns those that will go next."""
        scale = self.model.layers[layer].attention.rope_scale
        positions = torch.tensor([entry.position for entry in entries])
        keys = rotate(torch.stack([entry.k for entry in entries]), positions, self.rotary[layer], scale)
        scores = scores_of_prompt(entries, self.policies[layer], self.recent, keys)
        slots, half = self.plan[layer], max(self.plan[layer] // 2, 1)
        last = min(self.recent, half)
        order = sorted(entries[:-last], key=lambda entry: (scores[entry.position], entry.position))
        for entry in order[: (gone := max(len(entries) - slots, 0))]:
            entries.remove(entry)
        return order[gone : gone + half - last] if len(entries) == slots else []

    def feed(self, token: int) -> Tensor:
        """The logits [vocab] after one more token."""
        return self._feed(token, evicting=True)

    def _make_room(self, layer: int, kv_head: int, evicting: bool) -> None:
        """What has left the window goes, and then what the policy evicts if the slots are full."""
        policy, slots, entries = self.policies[layer], self.plan[layer], self.lists[layer][kv_head]
        entries[:] = [entry for entry in entries if self.seen - entry.position < self.windows[layer]]
        if evicting and len(entries) == slots and policy in FROZEN:
            doomed = self.doomed[layer][kv_head]
            entries.remove(doomed.pop(0) if doomed else entries[-max(slots // 2, 1)])
        elif evicting and len(entries) == slots and policy != "full":
            entries.remove(victim(entries, policy, slots, self.seen, self.sinks))

    def _feed(self, token: int, evicting: bool) -> Tensor:
        model, t = self.model, self.seen
        x = model.embedded(torch.tensor([[token]]), torch.tensor([[t]]))
        for layer, block in enumerate(model.layers):
            policy, slots, frequencies = self.policies[layer], self.plan[layer], self.rotary[layer]
            attention, normed = block.attention, block.attention_norm(x)
            if layer in self.linear:
                x = added_to(x, self.linear[layer].feed(normed), normed, block)
                continue
            scale = attention.rope_scale
            *projected, gate = attention.project(normed)
            q, k, v = (part[0, :, 0] for part in projected)
            out = []
            for kv_head, entries in enumerate(self.lists[layer]):
                self._make_room(layer, kv_head, evicting)
                entries.append(Entry(t, k[kv_head], v[kv_head]))
                inside = policy == "streaming" and evicting
                if self.storing:  # what is stored rotated stays so; then the sinks move towards it
                    self._store(entries[-1], layer)
                    gap = max(0, t + 1 - slots) * inside
                    places = torch.tensor([entry.position + gap * (entry.turned is None) for entry in entries])
                else:
                    places = torch.tensor([i if inside else entry.position for i, entry in enumerate(entries)])
                keys = rotate(torch.stack([entry.k for entry in entries]), places, frequencies, scale)
                keys = [key if entry.turned is None else entry.turned for key, entry in zip(keys, entries, strict=True)]
                keys = torch.stack(keys)
                values = torch.stack([entry.v for entry in entries])
                for entry in entries:
                    entry.received.append(0.0)
                    entry.missed.append(0.0)
                for query in q.view(len(k), -1, q.shape[-1])[kv_head]:
                    place = torch.tensor(t) if self.storing else places[-1]
                    query = rotate(query, place, frequencies, scale)
                    if model.config.query_scaling:
                        growth, length = model.config.query_scaling
                        query = query * (1 + growth * math.log(1 + t // length))
                    out.append(attended(query, keys, values, entries, attention, len(out)))
            if policy == "tova":  # every head keeps the same positions
                for same in zip(*self.lists[layer], strict=True):
                    for entry in same:
                        entry.latest = sum(other.received[-1] for other in same)
            heads = torch.cat(out)[None, None]
            added = attention.wo(heads / (1 + (-gate).exp()) if attention.gate_size else heads)
            x = added_to(x, added, normed, block)
        self.seen += 1
        return model.logits(x[0, 0])
