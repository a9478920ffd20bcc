"""The transformer: one file for every family, steered by the fields of `ModelConfig` (config.py).

Shapes, here and in kvcache.py, prefill.py, decoder.py and policies/tokens:

    B  rows of the batch           H  query heads                    D  head dimension
    S  prompt length (padded)      K  key-value heads                C  model dimension
    T  tokens in this call         G  = H // K query heads a group   N  slots of one layer's cache

What a block's tokens attend to is an argument, never a member: each other (`Causal`), a prompt that is being read
(prefill.py), or a layer's slots (`Slots`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ACTIVATIONS, ModelConfig
from deltanet import DeltaNet
from kernels import Linear, softcapped, softmaxed
from kvcache import LayerCache, Recurrent
from parallel import of_group, shard, summed

PROMPT_CHUNK = 512  # prompt queries whose attention rows exist at the same time, where they have to
FEED_CHUNK = 2048  # tokens of a prompt that go through a feed-forward part at once: more take memory, not less time


class Transformer(nn.Module):
    """Embedding, blocks, head. The loop over blocks is the caller's: see `forward` for the plain one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        if config.position_offset is not None:
            self.positions = nn.Embedding(config.max_positions + config.position_offset, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Where the head shares the embedding's matrix it does so again, after that one has been replaced."""
        if self.config.tie_embeddings and isinstance(self.head, Linear):
            self.head.weight = self.embed.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [B, T] at positions [B or 1, T] -> x [B, T, C]."""
        x = self.embed(ids).to(self.dtype)
        if self.config.embed_scale is not None:  # rounded to the model's dtype, as in the original
            x = x * torch.full((), self.config.embed_scale, dtype=x.dtype, device=x.device)
        if self.config.position_offset is not None:  # a finished row of a batch runs on: any position does
            x = x + self.positions(positions.clamp(max=self.config.max_positions - 1) + self.config.position_offset)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x [..., C] -> logits [..., vocab]."""
        logits = self.head(self.norm(x))
        return softcapped(logits / self.config.logit_divisor, self.config.logit_softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> logits [B, S, vocab], without a cache."""
        x = self.embedded(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        for block, rotary in zip(self.layers, self.rotary(ids.shape[1]), strict=True):
            x = block(x, rotary, Causal())
        return self.logits(x)

    def rotary(self, length: int) -> list[Tensor]:
        """Inverse frequencies [R / 2] of each layer for a request of `length` tokens in all; R is what is turned."""
        c = self.config
        everywhere = rotary_frequencies(c, c.rope, length, self.dtype, self.device)
        local = rotary_frequencies(c, c.local_rope, length, self.dtype, self.device) if c.local_rope else everywhere
        each = [local if layer in c.windowed else everywhere for layer in range(c.n_layers)]
        return [frequencies[:0] if layer in c.unturned else frequencies for layer, frequencies in enumerate(each)]

    def rotary_of(self, lengths: Sequence[int]) -> list[Tensor]:
        """The same for a batch of requests of these lengths: [B, 1, 1, R / 2], or [R / 2] where no length matters."""
        if not self.config.rope_by_length:
            return self.rotary(1)
        each = [self.rotary(length) for length in lengths]
        return [torch.stack(rows)[:, None, None] for rows in zip(*each, strict=True)]


def rotary_frequencies(
    config: ModelConfig, rope: dict[str, Any], length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Inverse frequencies [R / 2] in fp32, fp64 if `dtype` is that. linear: arXiv 2306.15595; longrope: arXiv
    2402.13753; yarn: arXiv 2309.00071; dynamic NTK and llama3 as published with the models. Only dynamic NTK and
    longrope depend on the length.
    """
    dim = 0 if config.position_offset is not None else config.rotary_dim or config.head_dim
    wide = torch.promote_types(dtype, torch.float32)
    base, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0)
    if kind == "dynamic":
        stretch = factor * max(length, config.max_positions) / config.max_positions - (factor - 1)
        base *= stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=device, dtype=wide) / max(dim, 1)
    frequencies = 1.0 / base**exponents
    if kind == "linear":
        return frequencies / factor
    if kind == "llama3":  # long wavelengths are stretched by `factor`, short ones kept, those between blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / factor)
    if kind == "yarn":  # the same, but blended over the elements of a head, evenly between two of them
        trained, fast, slow = rope["original_max_position_embeddings"], rope["beta_fast"], rope["beta_slow"]
        first, last = (dim * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (fast, slow))
        if rope["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        steps = torch.arange(dim // 2, device=device, dtype=wide)
        stretched = ((steps - first) / (last - first or 1e-3)).clamp(0, 1)
        return frequencies * (1 - stretched + stretched / factor)
    if kind == "longrope":
        factors = rope["long_factor" if length > rope["original_max_position_embeddings"] else "short_factor"]
        return frequencies / torch.tensor(factors, device=device, dtype=wide)
    return frequencies


class Block(nn.Module):
    """Attention and feed-forward on the residual stream. A norm that a family does not have is an identity."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.parallel, self.shared_norm = config.parallel, config.shared_norm
        self.residual_scale = config.residual_scale
        pre, post = config.pre_norms, config.post_norms
        self.attention_norm = make_norm(config) if pre else nn.Identity()
        self.attention = DeltaNet(config) if layer in config.linear else Attention(config, layer)
        self.post_attention_norm = make_norm(config) if post else nn.Identity()
        self.ffn_norm = make_norm(config) if pre and not config.shared_norm else nn.Identity()
        experts, columns = config.feed(layer)
        self.feed_forward = Experts(config) if experts else FeedForward(config, columns)
        self.post_ffn_norm = make_norm(config) if post else nn.Identity()

    def forward(self, x: Tensor, rotary: Tensor, cache: "Causal | Slots") -> Tensor:
        """x [B, T, C] -> x. `cache` says where the tokens are and what they attend to, and may keep some of it."""
        normed = self.attention_norm(x)
        after = x + self.branch(self.attention(normed, rotary, cache))
        cache.moved(x, after)
        return self.feed(x, normed, after)

    def branch(self, out: Tensor) -> Tensor:
        """What attention's output adds to the residual stream, both [..., C]."""
        return self.scaled(self.post_attention_norm(out))

    def scaled(self, out: Tensor) -> Tensor:
        return out if self.residual_scale == 1 else out * self.residual_scale

    def feed(self, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        """What follows attention, which read `normed` and made `after` of x, all [B, T, C]."""
        if not self.shared_norm:
            normed = self.ffn_norm(x if self.parallel else after)
        if x.shape[1] <= FEED_CHUNK:
            fed = self.feed_forward(normed)
        else:
            fed = torch.cat([self.feed_forward(part) for part in normed.split(FEED_CHUNK, dim=1)], dim=1)
        return after + self.scaled(self.post_ffn_norm(fed))


class Causal:
    """What the tokens of a block attend to where there is no cache: themselves and those before."""

    def positions(self, x: Tensor) -> Tensor:
        """Of tokens x [B, T, C]: [B or 1, T]."""
        return torch.arange(x.shape[1], device=x.device)[None]

    def attend(self, attention: "Attention", q: Tensor, k: Tensor, v: Tensor, k_raw: Tensor, rotary: Tensor) -> Tensor:
        """What the heads read [B, H, T, D]. q, k are rotated, k_raw [B, K, T, D] are the keys before."""
        return attention.over_prompt(q, k, v)

    def recur(self, linear: DeltaNet, x: Tensor) -> Tensor:
        """What a layer of linear attention makes of x [B, T, C]."""
        return linear.run(x)[0]

    def gated(self, gate: Tensor) -> None:
        """Told what the heads' output is multiplied by, [B, T, H * D]."""

    def moved(self, before: Tensor, after: Tensor) -> None:
        """Told the residual stream [B, T, C] before and after the attention branch."""


class Slots(NamedTuple):
    """One layer's cache as the next token of each row attends to it: slots, token policy, and `seen` [B] tokens before.

    It holds nothing that has left a sliding window: the policy sees to that (`TokenPolicy.within_window`).
    """

    layer: LayerCache | Recurrent
    seen: Tensor
    policy: Any

    def positions(self, x: Tensor) -> Tensor:
        """As of `Causal`."""
        return self.seen[:, None]

    def attend(self, attention: "Attention", q: Tensor, k: Tensor, v: Tensor, k_raw: Tensor, rotary: Tensor) -> Tensor:
        """As of `Causal`. Writes the cache in place."""
        (layer, seen, policy), position = self, self.seen[:, None]
        if policy.sinks:  # the first tokens are kept unrotated
            k = torch.where((position < policy.sinks)[:, None, :, None], k_raw, k)
        slot = policy.slot(seen, layer)
        layer.write(slot, k, v)
        sinks = attention.sinks(policy.sinks, layer, position, rotary, k.dtype)
        out, probs = layer.attend(q, seen + 1, attention.scale, attention.softcap, sinks, attention.sink_logits)
        policy.observe(layer, slot, seen, of_group(probs) if policy.scored else probs)
        return out

    def recur(self, linear: DeltaNet, x: Tensor) -> Tensor:
        """As of `Causal`. Changes the state in place."""
        out, after = linear.run(x, self.layer)
        self.layer.become(after)
        return out

    def gated(self, gate: Tensor) -> None:
        """Nobody asks."""

    def moved(self, before: Tensor, after: Tensor) -> None:
        """Nobody asks."""


class Chunk(Slots):
    """The same for tokens that come several at once, as those of a later turn do. Sinks have to be in the cache."""

    __slots__ = ()

    def positions(self, x: Tensor) -> Tensor:
        """As of `Causal`."""
        return self.seen[:, None] + torch.arange(x.shape[1], device=x.device)

    def attend(self, attention: "Attention", q: Tensor, k: Tensor, v: Tensor, k_raw: Tensor, rotary: Tensor) -> Tensor:
        """As of `Causal`. Policies that score decide at the end of the chunk what stays."""
        layer, seen, policy = self
        behind = layer.followed_by(k, v)
        sinks = attention.sinks(policy.sinks, layer, self.positions(v[:, 0]), rotary, k.dtype)
        visible = policy.visible(seen, q.shape[2], layer)
        form = (attention.scale, attention.softcap, sinks, attention.sink_logits)
        out, probs = layer.look(q, behind, visible, *form)
        layer.absorb(policy.absorb(layer, seen, of_group(probs) if policy.scored else probs), behind)
        return out


class Attention(nn.Module):
    """Grouped-query attention.

    Two things are called sinks. `sink_logits` [H] are parameters: of each head a logit that takes part in every softmax
    and reads nothing (gpt-oss). What `sinks` gives are tokens: the first ones of a prompt, which the policy streaming
    keeps, because models without such parameters put there the attention that is to read nothing.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.window, self.softcap = config.window(layer), config.attention_softcap
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.rope_scale = config.rope_of(layer).get("attention_factor", 1.0)
        self.q_size, self.kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.gate_size = self.q_size if config.attention_gate else 0
        self.wqkv = Linear(config.dim, self.q_size + self.gate_size + 2 * self.kv_size, bias=config.qkv_bias)
        self.wo = Linear(self.q_size, config.dim, bias=config.output_bias)
        self.query_scaling = config.query_scaling
        self.sink_logits = nn.Parameter(torch.zeros(self.heads)) if config.attention_sinks else None
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            whole = self.qk_norm == "projection"
            self.q_norm = make_norm(config, self.q_size if whole else self.head_dim, whole)
            self.k_norm = make_norm(config, self.kv_size if whole else self.head_dim, whole)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k, v [B, K, T, D], not rotated yet, and what gates the heads [B, T, H * D]."""
        q, gate, k, v = self.wqkv(x).split([self.q_size, self.gate_size, self.kv_size, self.kv_size], dim=-1)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        q, k = (self.q_norm(q), self.k_norm(k)) if self.qk_norm == "head" else (q, k)
        return q, k, v, gate

    def turn(self, x: Tensor, positions: Tensor, rotary: Tensor) -> Tensor:
        """x [B, heads, T, D], rotated to positions that broadcast to [B, heads, T]; rotary as of `rotary_of`."""
        return rotate(x, *rotary_angles(positions, rotary, self.rope_scale))

    def forward(self, x: Tensor, rotary: Tensor, cache: Causal | Slots) -> Tensor:
        """x [B, T, C] -> output [B, T, C]."""
        q, k_raw, v, gate = self.project(x)
        positions = cache.positions(x)[:, None]
        angles = rotary_angles(positions, rotary, self.rope_scale)
        q, k = rotate(q, *angles), rotate(k_raw, *angles)
        if self.query_scaling:
            growth, length = self.query_scaling
            q = q * (1 + growth * (1 + positions // length).to(rotary.dtype).log())[..., None].to(q.dtype)
        heads = cache.attend(self, q, k, v, k_raw, rotary).transpose(1, 2).flatten(2)
        if self.gate_size:
            cache.gated(gate := gate.sigmoid())
            heads = heads * gate
        return self.out(heads)

    def out(self, heads: Tensor) -> Tensor:
        """What all heads of all ranks read, [..., H * D] here -> [..., C]."""
        return summed(self.wo(heads))

    def over_prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of a whole prompt [B, H, S, D]. Right padding needs no mask: a token never looks ahead.

        Without window and soft cap it is one fused call with no mask; else the queries come in chunks, each with the
        keys that it can see.
        """
        length = q.shape[2]
        if self.softcap is None and (self.window is None or length <= self.window):
            if q.is_cuda and q.dtype == torch.float32:  # its one fused kernel there wants as many keys as queries
                k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
            return self._fused(q, k, v)
        chunks = []
        for start in range(0, length, PROMPT_CHUNK):
            end = min(start + PROMPT_CHUNK, length)
            if self.softcap is None:
                keys, mask = self.visible(start, end, q.device)
                chunk = self._fused(q[:, :, start:end], k[:, :, keys], v[:, :, keys], mask)
            else:
                keys, probs = self.prompt_probs(q, k, start, end)
                chunk = (probs.to(v.dtype) @ v[:, :, None, keys]).flatten(1, 2)
            chunks.append(chunk)
        return torch.cat(chunks, dim=2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """One call of PyTorch's attention of q [B, H, T, D] over k, v [B, K or H, M, D]; mask [T, M]: None: causal.

        A head's sink logit enters as the logit of one more key, in front: q and k get a further element, which is the
        sink logit in every query, 1 in that key and 0 in the others. Its value is 0. A query in front keeps what is
        causal so. 8 elements are added, because fused kernels on a GPU want multiples of that.
        """
        added = 0 if self.sink_logits is None else 8
        if added:
            q, k, v = (F.pad(part, (0, added, 1, 0)) for part in (q, k, v))
            q[..., -1], k[:, :, 0, -1] = (self.sink_logits / self.scale)[:, None], 1
            mask = None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
        causal = mask is None
        grouped = not causal or k.shape[1] != self.heads
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=self.scale, enable_gqa=grouped)
        return out[:, :, 1:, :-added] if added else out

    def prompt_probs(self, q: Tensor, k: Tensor, start: int, end: int) -> tuple[slice, Tensor]:
        """What the queries start..end of a prompt attend to: the keys they can see at all, and the share of each.

        q [B, H, S, D], k [B, K, S, D]; shares [B, K, G, end - start, keys] in fp32.
        """
        keys, mask = self.visible(start, end, q.device)
        logits = self.logits(q[:, :, start:end], k[:, :, keys])
        return keys, softmaxed(logits.masked_fill(~mask, float("-inf")), self.sink_logits)

    def group_probs(self, q: Tensor, k: Tensor, start: int, end: int) -> tuple[slice, Tensor]:
        """The same with the query heads of all ranks that hold the same key-value heads."""
        keys, probs = self.prompt_probs(q, k, start, end)
        return keys, of_group(probs)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B, H, T, D], k [B, K, M, D] -> what the softmax is taken of beside the sink logits, nothing masked:
        [B, K, G, T, M] in fp32.
        """
        logits = q.unflatten(1, (self.kv_heads, -1)) * self.scale @ k[:, :, None].mT
        return softcapped(logits.to(torch.promote_types(q.dtype, torch.float32)), self.softcap)

    def visible(self, start: int, end: int, device: torch.device) -> tuple[slice, Tensor]:
        """The keys that any of the queries start..end can see, and which of them each one can: [queries, keys]."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
        return slice(first, end), (distance >= 0) & (distance < (self.window or end))

    def sinks(
        self, count: int, layer: LayerCache, positions: Tensor, rotary: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """The keys of the first `count` slots as each of the tokens at `positions` [B, T] sees them: [B, K, T, n, D].

        They are stored unrotated, and turned to their position inside the cache when a token comes: what was evicted
        between them and the others leaves no gap (StreamingLLM, arXiv 2309.17453).
        """
        count = min(count, layer.slots)
        if not count:
            return None
        gap = (positions + 1 - layer.slots).clamp(min=0)
        turned = gap[:, None, :, None] + torch.arange(count, device=positions.device)
        keys = layer.stored.leading_keys(count, dtype)[:, :, None].expand(-1, -1, positions.shape[1], -1, -1)
        return self.turn(keys, turned, rotary.unsqueeze(-2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, columns: int):
        super().__init__()
        self.activation, self.limit, self.gate = config.activation, config.activation_limit, config.ffn_gate
        width = (2 if self.gate else 1) * columns  # gate and up, fused; without a gate only up
        self.w13 = Linear(config.dim, width, bias=config.ffn_bias)
        self.w2 = Linear(columns, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w13(x)
        hidden = gated(hidden, self.activation, self.limit) if self.gate else ACTIVATIONS[self.activation](hidden)
        return summed(self.w2(hidden))


class Experts(nn.Module):
    """Each token goes through the `top` of E gated feed-forward networks that a router likes best (arXiv 2401.04088),
    and in some families through a shared one, whose part a router of its own says.

    The experts' matrices are stacked by rows, and their biases alike: w13 [E * 2F, C], w2 [E * C, F].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.experts, self.top, self.norm = config.experts, config.experts_per_token, config.router_norm
        self.activation, self.limit = config.activation, config.activation_limit
        self.router = Linear(config.dim, self.experts, bias=config.router_bias)
        self.w13 = Linear(config.dim, self.experts * 2 * config.ffn_dim, config.ffn_bias, self.experts)
        self.w2 = Linear(config.ffn_dim, self.experts * config.dim, config.ffn_bias, self.experts)
        self.shared = FeedForward(config, config.shared_dim) if config.shared_dim else None
        self.shared_router = Linear(config.dim, 1, bias=False) if config.shared_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> output [B, T, C]. A decode step has static shapes and never waits for the device; a prompt
        does so once where there is no product of groups (kernels.py).
        """
        rows = x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        shares, chosen = self.router(rows).to(wide).softmax(-1).topk(self.top)  # [B * T, top]
        if self.norm:
            shares = shares / shares.sum(-1, keepdim=True)
        # By group a row costs more, but an expert that several chose is read once: on a GPU it pays sooner.
        few = max(self.top, self.experts // 2) if x.is_cuda and not self.waits else self.experts
        if x.shape[1] == 1 and chosen.numel() <= few:  # few rows read what each one chose, in place
            hidden = self._gated(self.w13.chosen(chosen, rows[:, None]), chosen)
            out = self._biased(self.w2, self.w2.chosen(chosen, hidden), chosen)
        elif x.shape[1] > 1 or not self.waits:
            out = self._grouped(rows, chosen)
        else:  # many rows need most experts anyway: all of them, those not chosen with share 0
            hidden = gated(self.w13(rows).unflatten(1, (self.experts, -1)), self.activation, self.limit)
            out = self._biased(self.w2, self.w2.each(hidden), slice(None))
            shares = torch.zeros_like(shares[:, :1]).expand(-1, self.experts).scatter(1, chosen, shares)
        out = summed((out * shares[..., None]).sum(1)).view_as(x)
        if self.shared is not None:
            out = out + self.shared_router(x).to(wide).sigmoid() * self.shared(x)
        return out.to(x.dtype)

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in `_grouped`, which a decode step must not."""
        return self.w13.waits or self.w2.waits

    def _grouped(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """rows [R, C] through the experts [R, top] that each one chose -> [R, top, C]. Each expert runs once."""
        order = chosen.flatten().argsort()
        own, numbers = chosen.flatten()[order], torch.arange(self.experts, device=rows.device)
        ends = torch.searchsorted(own, numbers, right=True, out_int32=True)
        if self.waits:
            ends = ends.tolist()
        hidden = self._gated(self.w13.grouped(rows[order // self.top], ends), own)
        out = self._biased(self.w2, self.w2.grouped(hidden, ends), own)
        return out[order.argsort()].unflatten(0, chosen.shape)

    def _gated(self, x: Tensor, experts: Tensor) -> Tensor:
        x = self._biased(self.w13, x, experts)  # what it was before is let go
        return gated(x, self.activation, self.limit)

    def _biased(self, stack: nn.Module, x: Tensor, experts: Tensor | slice) -> Tensor:
        """What the matrices of these experts gave, x [..., out], with their biases if they have any."""
        return x if stack.bias is None else x + stack.bias.view(self.experts, -1)[experts]


def gated(x: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """x [..., 2F] -> [..., F]. limit: as of `ModelConfig.activation_limit`."""
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
    return ACTIVATIONS[activation](gate) * up


def make_norm(config: ModelConfig, size: int | None = None, split: bool = False) -> nn.Module:
    """split: each rank has a part of what is normed."""
    size = size or config.dim
    if config.norm == "layer":
        return nn.LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, config.norm_shift, split)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, shift: float = 0.0, split: bool = False):
        super().__init__()
        self.eps, self.shift, self.split = eps, shift, split
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().mean(-1, keepdim=True)
        if self.split and shard().world > 1:
            square = summed(square) / shard().world
        wide = wide * torch.rsqrt(square + self.eps)
        return (wide * (self.weight.to(wide.dtype) + self.shift)).to(x.dtype)


def rotary_angles(positions: Tensor, rotary: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos, sin [..., R / 2] of positions [...], times `scale`. Computed, not read from a table that ends."""
    turns = positions[..., None].to(rotary.dtype) * rotary
    cos, sin = turns.cos(), turns.sin()
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first R elements of x [B, heads, T, D] in the halves layout.

    cos, sin broadcast to [B, heads, T, R / 2]; with R = 0 (learned positions) nothing turns.
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(cos.dtype), second.to(cos.dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)
