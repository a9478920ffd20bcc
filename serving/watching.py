"""What a page shows of a row's cache while an answer is made: which tokens each layer still holds."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine import Batch
from parallel import shard
from request import Completion
from tokenizer import Tokenizer

SECONDS = 0.1  # between two events of an answer


class Watch:
    """Events of one answer, made in the engine thread. before: ids of the tokens in the cache that it goes on from,
    None for those that nobody knows. Of several ranks it shows the heads of the first one.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int | None] = ()):
        self.tokenizer, self.before = tokenizer, before
        self.names = {number: name for name, number in tokenizer.special_ids.items()}
        self.began = time.perf_counter()
        self.first_token = self.latest = 0.0
        self.told = 0  # tokens of the answer
        self.kept: list[list[list[int]]] = []

    def event(self, batch: Batch, rows: int, completion: Completion) -> dict[str, Any] | None:
        """After a step in which the completion got a token or ended; None if the latest one is too recent."""
        now, request = time.perf_counter(), completion.request
        if self.latest and now - self.latest < SECONDS and not completion.finish_reason:
            return None
        tokens, prompt, heads = completion.tokens, request.seen + len(request.ids), batch.engine.model.config.n_kv_heads
        seen = prompt + max(0, len(tokens) - 1)  # the last one has not been fed
        if completion.finish_reason is None:
            self.kept = [runs(own, seen, heads) for own in batch.held(completion)]
        elif completion.cache and completion.cache.placed:
            self.kept = [runs(own, seen, heads) for own in completion.cache.placed]
        figures, spent, own = batch.figures, now - self.first_token, shard()
        event = {
            "prompt_tokens": prompt,
            "seen": seen,
            "plan": figures.plan,
            "heads": heads,
            "kept": self.kept,
            "kv_bytes": figures.kv_bytes * own.world // rows,
            "kv_bytes_full": batch.engine.sizing.full_bytes(seen) * own.world // own.sharers,
            "tokens_per_s": round((len(tokens) - 1) / spent, 2) if self.latest and len(tokens) > 1 else None,
            "ms": round(1000 * (now - self.began)),
        }
        if not self.latest:
            self.first_token = now
            event["words"] = self.words([*self.before, *request.ids])
        event["word"] = self.words(tokens[self.told :])
        self.latest, self.told = now, len(tokens)
        return event

    def words(self, ids: Sequence[int | None]) -> list[str]:
        """The text of each token; a special one's name; nothing for one that is not known."""
        text, names = self.tokenizer.token_bytes, self.names
        return ["" if i is None else names.get(i) or text(i).decode("utf-8", "replace") for i in ids]


def runs(positions: Tensor, seen: int, heads: int) -> list[list[int]]:
    """Of positions [1 or K, n]: runs [first, length, heads that hold it] of tokens that equally many heads hold."""
    each = heads // len(positions)
    count = each * torch.bincount(positions[(positions >= 0) & (positions < seen)], minlength=seen)
    values, lengths = count.unique_consecutive(return_counts=True)
    first = lengths.cumsum(0) - lengths
    rows = zip(first.tolist(), lengths.tolist(), values.tolist(), strict=True)
    return [[start, length, held] for start, length, held in rows if held]
