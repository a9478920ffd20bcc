"""Passkey: a number hidden in prose and asked for at the end, of any model that can talk.

"One of the special magic numbers for KEY is: V." (as in RULER's needles, arXiv 2404.06654) stands in a text; V has 7
digits. The question is put through the checkpoint's chat template, with the answer's first words given; without a
template it simply follows the text. The depth is uniform: row i of n hides it at (i + 1/2) / n of the text, at the next
end of a sentence. What counts is the first number that is said: `exact` if it is V, and `digits`, the share of V's
digits that stand in their place.
"""

import random
import re
from collections.abc import Sequence

from chat import ChatTemplate
from errors import UserError
from evaluation.cells import Batch, Cell
from evaluation.tasks import Row
from tokenizer import Tokenizer

DIGITS = 7
KEYS = """amber azure beige birch brass cedar cherry cobalt coral crimson ebony elm emerald fern flax frost gold granite
gray hazel honey indigo iris ivory jade jasper khaki lava lemon lilac lime linen maple marble maroon mint mocha moss
navy oak ocean olive onyx opal orange orchid pearl pewter pine plum poplar quartz raven rose ruby rust sable saffron
sage salmon sand scarlet sepia sienna silver sky slate snow spruce steel stone straw tan teal thistle topaz tulip umber
velvet violet walnut wheat willow wine zinc""".split()
TASK = "A special magic number is hidden within the following text. Make sure to memorize it.\n"
FACT = "One of the special magic numbers for {key} is: {number}."
ASKED = "What is the special magic number for {key} mentioned in the provided text?"
BEGUN = "The special magic number for {key} mentioned in the provided text is"
ENDS = re.compile(r"[.!?]\s|\n")


class Passkey:
    metrics = ("digits", "exact")

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        texts: Sequence[Sequence[int]],
        length: int,
        count: int,
        unseen: bool = False,
    ):
        """`count` prompts of `length` tokens at most, each with a piece of one of the `texts` (token ids).

        unseen: the question is read when the text has been compressed.
        """
        self.name, self.tokenizer, self.template, self.rows = f"passkey {length}", tokenizer, template, []
        rng = random.Random(f"{self.name} 2024")
        self.name += " unseen" * unseen
        usable = [text for text in texts if len(text) >= length]
        if not usable:
            longest = max(map(len, texts))
            raise UserError(f"no text has {length} tokens to hide a number in; the longest has {longest}")
        for n in range(count):
            key, depth = rng.choice(KEYS), (n + 0.5) / count
            number = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
            text = usable[n % len(usable)]
            start = rng.randrange(len(text) - length + 1)
            ids, asked = self._prompt(text[start : start + length], key, number, depth, length)
            ids, question = (ids[:-asked], ids[-asked:]) if unseen else (ids, [])
            self.rows.append(Row(n, ids, number, {"length": length, "depth": round(depth, 4)}, question))
        self.new = max(len(tokenizer.encode(f" {row.expected}.", special=False)) for row in self.rows)

    def _prompt(self, filler: Sequence[int], key: str, number: str, depth: float, length: int) -> tuple[list[int], int]:
        """A prompt of `length` tokens at most, and how many of its last ones are the question."""
        fact, question = FACT.format(key=key, number=number), "\n" + ASKED.format(key=key)
        begun = self.tokenizer.encode((" " if self.template is None else "") + BEGUN.format(key=key), special=False)
        room = length - len(begun) - len(self._said(TASK + f" {fact} {question}"))
        while room > 0:
            context = TASK + hidden(self.tokenizer.decode(filler[:room]), fact, depth)
            ids = [*self._said(context + question), *begun]
            if len(ids) <= length:
                return ids, len(ids) - same_start(ids, self._said(context))
            room -= len(ids) - length
        raise UserError(f"{length} tokens are too few for a hidden number and a question about it; take more")

    def _said(self, text: str) -> list[int]:
        if self.template is None:
            return self.tokenizer.encode(text)
        return self.template.prompt([{"role": "user", "content": text}])

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        said = batch.greedy(cell, questions=[row.question for row in rows])
        return [scored(self.tokenizer.decode(ids), row.expected) for ids, row in zip(said, rows, strict=True)]


def scored(said: str, number: str) -> dict:
    """The first number that is said against the right one: all of it, and digit by digit."""
    found = re.search(r"\d+", said)
    told = found.group() if found else ""
    right = sum(one == other for one, other in zip(told, number, strict=False))
    return {"prediction": said, "expected": number, "exact": told == number, "digits": right / len(number)}


def hidden(text: str, fact: str, depth: float) -> str:
    """The text with the fact behind the first sentence that ends at `depth` or after it, or where there is a space."""
    at = int(depth * len(text))
    found = ENDS.search(text, at)
    end = found.end() if found and found.end() - at < 400 else text.find(" ", at) + 1
    end = end or len(text)
    return f"{text[:end].rstrip(' ')} {fact} {text[end:]}"


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences have in common from the first on."""
    differ = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
