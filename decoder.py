"""A batch in its decode phase, and a store of idle ones whose captured graphs serve again."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from bound import mark_dynamic
from graphs import Code
from kvcache import KVCache, LayerCache, Memory, Recurrent
from model import Chunk, Slots, Transformer
from policies.tokens import TokenPolicy
from prefill import Part
from promptcache import PromptCache
from sampling import Sampler, Sampling

APPEND_CHUNK = 256  # tokens of a later turn that go through the model at once


class Decoder:
    """A batch of B rows under one plan. All that a step reads and writes keeps its shape and address.

    tokens [B]: the last token of each row, not yet fed, NOT_FINITE if its logits gave none (sampling.py); seen [B]: how
    many have been. rotary: the frequencies of each layer, as of `Transformer.rotary_of`. No step waits for the device.
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
        self.model, self.cache, self.rotary, self.sampler = model, cache, rotary, sampler
        self.tokens = torch.zeros(cache.batch, dtype=torch.int64, device=cache.device)
        self.seen = torch.zeros_like(self.tokens)
        self.slots = [Slots(layer, self.seen, policy) for layer, policy in zip(cache.layers, policies, strict=True)]
        # A row that goes through generated loops alone stays wide between them: it would be widened for each of them.
        alone = code.compiled and cache.batch == 1 and cache.device.type == "cpu" and model.dtype == torch.bfloat16
        self.stream = torch.float32 if alone else model.dtype
        blocks = zip(model.layers, rotary, self.slots, strict=True)
        self.blocks = [code.bound(code.block, block, *own) for block, *own in blocks]
        self.head = code.bound(code.logits, model)
        if code.compiled and len({*cache.plan} - {0}) > 1:
            # One graph for all lengths from the start. Where all are equal a static one is faster.
            for arena in (arena for layer in cache.layers if layer.slots for arena in layer.parts()):
                mark_dynamic(arena, 2)
        started = time.perf_counter()
        self.replay = code.capture(self._step) if code.capture else self._step
        self.capture_s = time.perf_counter() - started if code.capture else 0.0

    def begin(
        self,
        rows: Tensor,
        lengths: Tensor,
        layers: Sequence[Sequence[Part]],
        logits: Tensor,
        samplings: Sequence[Sampling],
        rotary: Sequence[Tensor],
    ) -> None:
        """rows [R] get new requests: of each layer what it keeps of their prompts, and logits [R, vocab] that follow.

        lengths [R]: of the prompts. rotary: what their keys are turned by.
        """
        for layer, parts in zip(self.cache.layers, layers, strict=True):
            for part, prompt in parts:
                layer.fill(rows[part], prompt.held if layer.slots else prompt)
        self._enter(rows, lengths, logits, samplings, rotary)

    def begin_behind(self, row: Tensor, behind: "Behind", logits: Tensor, sampling: Sampling) -> None:
        """row [1] goes on with what was appended to a prompt cache; logits [1, vocab] follow it."""
        for layer, own in zip(self.cache.layers, behind.held(), strict=True):
            layer.fill(row, own)
        self._enter(row, behind.seen, logits, [sampling], behind.rotary)

    def _enter(
        self,
        rows: Tensor,
        lengths: Tensor,
        logits: Tensor,
        samplings: Sequence[Sampling],
        rotary: Sequence[Tensor],
    ) -> None:
        for frequencies, own in zip(self.rotary, rotary, strict=True):
            if own.dim() > 1:  # else they are everybody's
                frequencies[rows] = own
        self.sampler.set(rows, samplings)
        self.seen[rows] = lengths
        self.tokens[rows] = self.sampler(logits, rows)

    def step(self) -> None:
        """Run `tokens` through the model, put the next ones in their place and advance `seen`."""
        self.replay()

    def _step(self) -> None:
        self.tokens.copy_(self.sampler(self.logits()))

    def logits(self) -> Tensor:
        """Feed `tokens` and return the logits [B, vocab] of what follows."""
        x = self.model.embedded(self.tokens.clamp(min=0)[:, None], self.seen[:, None])  # NOT_FINITE is no id
        x = x.to(self.stream)
        for block in self.blocks:
            x = block(x)
        self.seen += 1
        return self.head(x[:, 0])

    def ask(self) -> Callable[[], list[int]]:
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

    def append(self, ids: Tensor) -> Iterator[Tensor]:
        """Feed ids [B, T], which follow what was seen: as of the function."""
        return append(self.model, self.slots, self.rotary, self.seen, ids)

    def of_row(self, row: int) -> list[LayerCache | Recurrent]:
        """A copy of what a row's filled slots hold."""
        return self.cache.of_row(row, int(self.seen[row]))


class Behind:
    """A row by itself that goes on from a prompt cache, until it enters a decoder.

    seen [1]: tokens so far. Its slots are those of the decoder's plan.
    """

    def __init__(self, decoder: Decoder, past: PromptCache):
        model, own = decoder.model, decoder.cache
        form = (model.dtype, own.device, bool(own.state), None, own.format, own.recurrent)
        cache = KVCache(own.plan, 1, model.config.n_kv_heads, model.config.head_dim, *form)
        row = torch.zeros(1, dtype=torch.int64, device=own.device)
        for layer, kept in zip(cache.layers, past.layers, strict=True):
            layer.fill(row, kept)
        self.model, self.seen, self.cache = model, row + past.seen, cache
        self.rotary = model.rotary_of([past.about.length])
        policies = (slots.policy for slots in decoder.slots)
        self.slots = [Slots(layer, self.seen, policy) for layer, policy in zip(cache.layers, policies, strict=True)]

    def append(self, ids: Tensor) -> Iterator[Tensor]:
        """Feed ids [1, T]: as of the function."""
        return append(self.model, self.slots, self.rotary, self.seen, ids)

    def held(self) -> list[LayerCache | Recurrent]:
        """What the filled slots hold."""
        return self.cache.of_row(0, int(self.seen))


def append(
    model: Transformer, slots: Sequence[Slots], rotary: Sequence[Tensor], seen: Tensor, ids: Tensor
) -> Iterator[Tensor]:
    """Feed ids [B, T], which follow the `seen` [B] tokens, in chunks; yields x [B, t, C] after the last block for each.

    For policies that place a token by its position it is the same as T steps; those that score decide at the end of
    each chunk what goes.
    """
    sinks = max(own.policy.sinks for own in slots)
    while ids.shape[1]:
        alone = int(seen.min()) < sinks  # sinks have to be in the cache before a chunk can turn them
        chunk = ids[:, : 1 if alone else APPEND_CHUNK]
        x = model.embedded(chunk, seen[:, None] + torch.arange(chunk.shape[1], device=ids.device))
        for block, frequencies, own in zip(model.layers, rotary, slots, strict=True):
            x = block(x, frequencies, own if alone else Chunk(*own))
        seen += chunk.shape[1]
        ids = ids[:, chunk.shape[1] :]
        yield x


class Store:
    """Idle decoders by what they are for, the last used one last, so that captured graphs serve again.

    All of them share one memory, so one runs at a time. While one is lent, others get a temporary decoder.
    """

    SIZE = 8

    def __init__(self):
        self.idle: OrderedDict[Hashable, Decoder] = OrderedDict()
        self.memory, self._lent = Memory(), Lock()

    @property
    def busy(self) -> bool:
        return self._lent.locked()

    @contextmanager
    def lend(
        self, key: Hashable, sizes: Mapping[str, int], make: Callable[[Memory], Decoder]
    ) -> Iterator[tuple[Decoder, bool]]:
        """A decoder for `key`, whose arenas of these names have so many elements, and whether it was made for this."""
        if not self._lent.acquire(blocking=False):  # also by another thread
            yield make(Memory()), True
            return
        try:
            fits = all(map(self.memory.fits, sizes, sizes.values()))
            if not fits:  # let go of the smaller one before the larger one is made
                self._clear()
            if made := key not in self.idle:
                self.idle[key] = make(self.memory)
                if len(self.idle) > self.SIZE:
                    self.idle.popitem(last=False)
            self.idle.move_to_end(key)
            yield self.idle[key], made
        except Exception:  # nobody knows what state they are in, and memory may be what was short
            self._clear()
            raise
        finally:
            self._lent.release()

    def _clear(self) -> None:
        self.idle.clear()
        self.memory = Memory()
