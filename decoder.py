"""A batch in its decode phase, and a store of idle ones whose captured graphs serve again."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from graphs import Code
from kvcache import KVCache, Memory, Prompt
from model import Block, Transformer
from policies.tokens import TokenPolicy
from sampling import Sampler, Sampling

APPEND_CHUNK = 256  # tokens of a later turn that go through the model at once


class Decoder:
    """A batch of B rows under one plan. All that a step reads and writes keeps its shape and address.

    tokens [B]: the last token of each row, not yet fed, NOT_FINITE if its logits gave none (sampling.py); seen [B]: how
    many have been. No step waits for the device.
    """

    def __init__(
        self,
        model: Transformer,
        code: Code,
        cache: KVCache,
        rotary: list[Tensor],
        policies: Sequence[TokenPolicy],
        sampler: Sampler,
    ):
        self.model, self.code, self.cache, self.rotary = model, code, cache, rotary
        self.policies, self.sampler = policies, sampler
        batch, device = cache.batch, cache.device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        seen = [self.seen] * len(model.layers)
        # what `Block.decode` and `Block.append` take in each layer, but for x
        self.layers = list(zip(model.layers, rotary, cache.layers, seen, policies, strict=True))
        self.blocks = [code.bound(code.block, *own) for own in self.layers]
        self.head = code.bound(code.logits, model)
        if code.compiled and len(set(cache.plan)) > 1:
            # One graph for all lengths from the start. Where all are equal a static one is faster.
            for arena in (arena for layer in cache.layers for arena in layer.parts()):
                torch._dynamo.maybe_mark_dynamic(arena, 2)
        self.replay, self.capture_s = None, 0.0
        if code.capture:
            started = time.perf_counter()
            # The warm-up feeds positions 0, 1, 2 of all rows. In these slots prompts may wait for their place.
            held = [part[:, :, :3] for layer in cache.layers for part in layer.stored.parts()]
            held = [(part, part.clone()) for part in held]
            self.replay = code.capture(self._step)
            for part, before in held:
                part.copy_(before)
            self.capture_s = time.perf_counter() - started

    def keeper(self, rows: Tensor, lengths: Tensor) -> Callable[[int, Tensor | None, Prompt], None]:
        """What takes each layer's part of prompts of `lengths` [R] into the cache, for rows [R]."""

        def keep(layer: int, _: Tensor | None, prompt: Prompt) -> None:
            kept = self.policies[layer].select(lengths, prompt.length, self.cache.plan[layer], prompt.scores)
            self.cache.fill(layer, rows, prompt, kept)

        return keep

    def begin(
        self,
        rows: Tensor,
        lengths: Tensor,
        logits: Tensor,
        samplings: Sequence[Sampling],
        rotary: Sequence[Tensor],
    ) -> None:
        """rows [R] have new requests: their prompts of `lengths` [R] are in the cache, logits [R, vocab] follow.

        rotary: the frequencies of each layer that their keys are turned by, as of `Transformer.rotary_of`.
        """
        for frequencies, own in zip(self.rotary, rotary, strict=True):
            if own.dim() > 1:  # else they are everybody's
                frequencies[rows] = own
        self.sampler.set(rows, samplings)
        self.seen[rows] = lengths
        self.tokens[rows] = self.sampler(logits, rows)

    def step(self) -> None:
        """Run `tokens` through the model, put the next ones in their place and advance `seen`."""
        (self.replay or self._step)()

    def _step(self) -> None:
        self.tokens.copy_(self.sampler(self.logits()))

    def logits(self) -> Tensor:
        """Feed `tokens` and return the logits [B, vocab] of what follows."""
        x = self.model.embedded(self.tokens.clamp(min=0)[:, None], self.seen[:, None])  # NOT_FINITE is no id
        for block in self.blocks:
            x = block(x)
        self.seen += 1
        return self.head(x[:, 0])

    def read(self) -> Callable[[], list[int]]:
        """Ask for `tokens` as they are after all that has been started. Who calls the answer waits for it."""
        if self.tokens.device.type != "cuda":
            tokens = self.tokens.tolist()
            return lambda: tokens
        host = torch.empty_like(self.tokens, device="cpu", pin_memory=True)
        host.copy_(self.tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[int]:
            done.synchronize()
            return host.tolist()

        return wait

    def append(self, ids: Tensor) -> Tensor:
        """Feed ids [B, T], which follow what was seen, and return x [B, T, C] after the last block.

        In chunks. For policies that place a token by its position it is the same as T steps; those that score decide at
        the end of each chunk what goes.
        """
        sinks, parts = max(policy.sinks for policy in self.policies), []
        while ids.shape[1]:
            alone = int(self.seen.min()) < sinks  # sinks have to be in the cache before a chunk can turn them
            size = 1 if alone else min(APPEND_CHUNK, ids.shape[1])
            parts.append(self._feed(ids[:, :size], Block.decode if alone else Block.append))
            ids = ids[:, size:]
        return torch.cat(parts, dim=1)

    def _feed(self, ids: Tensor, run: Callable) -> Tensor:
        """ids [B, T] through all blocks by `run`, which is Block.decode (T = 1) or Block.append."""
        positions = self.seen[:, None] + torch.arange(ids.shape[1], device=ids.device)
        x = self.model.embedded(ids, positions)
        for block, *rest in self.layers:
            x = run(block, x, *rest)
        self.seen += ids.shape[1]
        return x


class Store:
    """Idle decoders by plan, batch size and kind of sampling, the last used one last. Captured graphs are used again.

    All of them share one memory, so one runs at a time. While it is lent, the next caller gets a temporary decoder.
    """

    SIZE = 8

    def __init__(self):
        self.idle: OrderedDict[Hashable, Decoder] = OrderedDict()
        self.memory, self._lent = Memory(), Lock()

    @property
    def busy(self) -> bool:
        return self._lent.locked()

    @contextmanager
    def lend(self, size: int) -> Iterator[Memory]:
        """Memory for a K arena of `size` elements, and what goes with it."""
        if not self._lent.acquire(blocking=False):  # also by another thread
            yield Memory()
            return
        try:
            if not self.memory.fits("k", size):  # let go of the smaller one before the larger one is made
                self.idle.clear()
                self.memory = Memory()
            yield self.memory
        except Exception:  # nobody knows what state they are in, and memory may be what was short
            self.idle.clear()
            self.memory = Memory()
            raise
        finally:
            self._lent.release()

    def decoder(self, key: Hashable, memory: Memory, make: Callable[[], Decoder]) -> tuple[Decoder, bool]:
        """A decoder for `key` in the memory that was lent, or any other, and whether it was made for this."""
        if memory is not self.memory:
            return make(), True
        if made := key not in self.idle:
            self.idle[key] = make()
            if len(self.idle) > self.SIZE:
                self.idle.popitem(last=False)
        self.idle.move_to_end(key)
        return self.idle[key], made
