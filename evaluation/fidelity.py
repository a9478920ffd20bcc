"""Fidelity: how far is the next token's distribution from what the full cache says? Teacher-forced, on any text.

Each row is a context, which is prefilled, and tokens that are then fed one by one through the cache under test, with
its evictions. After each of them, in fp32: KL(full || cache), whether the most likely token is the same, and the loss
of the token that really follows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from errors import UserError
from evaluation.cells import FULL, Batch, Cell
from evaluation.tasks import Row


class Fidelity:
    name, metrics = "fidelity", ("kl", "agree", "loss")

    def __init__(self, texts: Sequence[Sequence[int]], context: int, new: int, count: int):
        """`count` pieces: evenly spread over a single text, else one from the beginning of each that is long enough.

        UserError if there is none.
        """
        self.new, size = new, context + new + 1
        usable = [text for text in texts if len(text) >= size]
        if not usable:
            longest = f"the longest text has {max(map(len, texts))} tokens"
            raise UserError(f"{longest}; --length {context} and --read {new} need more")
        if len(texts) == 1:
            starts = [n * (len(texts[0]) - size) // max(count - 1, 1) for n in range(count)]
            pieces = [list(texts[0][start : start + size]) for start in starts]
        else:
            pieces = [list(text[:size]) for text in usable[:count]]
            if len(pieces) < count:
                raise UserError(f"only {len(pieces)} texts have {size} tokens; take --texts {len(pieces)} or fewer")
        self.rows = [Row(n, piece[:context], piece[context:]) for n, piece in enumerate(pieces)]
        self._rows: Sequence[Row] | None = None  # those that `_full` [T, B, vocab] belongs to

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        ids = torch.tensor([row.expected for row in rows], device=batch.lengths.device)
        if self._rows is not rows:
            self._full = [logits.float().log_softmax(-1) for logits in batch.forced(FULL, ids[:, :-1])]
            self._rows = rows
        measured = []
        for step, logits in enumerate(batch.forced(cell, ids[:, :-1])):
            measured.append(compare(self._full[step], logits.float().log_softmax(-1), ids[:, step + 1]))
        means = torch.stack(measured).mean(0)  # [3, B]
        return [dict(zip(self.metrics, row, strict=True)) for row in means.T.tolist()]


def compare(full: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    """Log probabilities [B, vocab] twice, and what follows [B] -> the metrics [3, B]; KL and loss are in nats."""
    kl = (full.exp() * (full - other)).sum(-1)
    agree = full.argmax(-1) == other.argmax(-1)
    return torch.stack((kl, agree.to(kl.dtype), -other.gather(1, truth[:, None])[:, 0]))
