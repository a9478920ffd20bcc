"""Recall: facts hidden in a long text, one of them asked for at the end, exact match of the whole answer.

With one fact it is the needle in a haystack, with several the multi-key form. The depth of the fact that is asked for
is uniform: row i of n is at (i + 1/2) / n of the text. A fact is a comment line, `# define amber lantern violin`, and
the question is its beginning: any model that can copy from its context can answer, the embedded one was trained to.
"""

import random
from collections.abc import Callable, Sequence

from errors import UserError
from evaluation import tiny_data as data
from evaluation.cells import Batch, Cell
from evaluation.tasks import Row


class Recall:
    metric = "exact"

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        texts: Sequence[Sequence[int]],
        length: int,
        facts: int,
        count: int,
        unseen: bool = False,
        seed: int = 2024,
    ):
        """`count` prompts of `length` tokens, `facts` facts each, between pieces of one of the `texts`.

        unseen: the question is read when the text has been compressed.
        """
        name = f"{'needle' if facts == 1 else 'recall'} {length}"
        rng, self.rows, self.decode = random.Random(f"{name} {seed}"), [], decode
        self.name = f"{name} unseen" if unseen else name
        usable = [text for text in texts if len(text) > length]
        if not usable:
            longest = max(map(len, texts))
            raise UserError(f"the text has {longest} tokens, too few to hide facts among {length} of them")
        for n in range(count):
            depth = (n + 0.5) / count
            ids, asked, answer = data.recall_parts(rng, encode, usable[n % len(usable)], length, facts, depth)
            row = Row(n, [*ids, *asked], answer, {"length": length, "depth": round(depth, 4)})
            self.rows.append(row.asked_later(len(asked)) if unseen else row)
        self.new = max(len(row.expected) for row in self.rows)

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        greedy = batch.greedy(cell, questions=[row.question for row in rows])
        said = [tokens[: len(row.expected)] for tokens, row in zip(greedy, rows, strict=True)]
        return [
            {"prediction": self.decode(tokens), "expected": self.decode(row.expected), "exact": tokens == row.expected}
            for tokens, row in zip(said, rows, strict=True)
        ]
