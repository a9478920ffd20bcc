"""What the embedded checkpoint is trained and tested on: Python source, and facts hidden in it.

A fact is one comment line, `# define amber lantern violin`; later the same words are asked for: `# define amber` must
be continued with ` lantern violin`. All these words are single tokens of the trained vocabulary, drawn at random for
every document, so nothing but the context can answer. An answer has two words because the first of them comes out of
the prompt's own attention: only the second one is read from the cache. Three kinds of training text, dense to sparse:

- `repeats`: random words, a second time in the same order: the quickest teacher of "look up what came after";
- `facts`:   lists of facts in random order, each stated again and again;
- `document`: a piece of standard library source with facts between its lines, asked for later.
"""

import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import UserError

KEYS = """amber azure beige birch brass cedar cherry cobalt coral crimson ebony elm emerald fern flax frost gold granite
gray hazel honey indigo iris ivory jade jasper khaki lava lemon lilac lime linen maple marble maroon mint mocha moss
navy oak ocean olive onyx opal orange orchid pearl pewter pine plum poplar quartz raven rose ruby rust sable saffron
sage salmon sand scarlet sepia sienna silver sky slate snow spruce steel stone straw tan teal thistle topaz tulip umber
velvet violet walnut wheat willow wine zinc""".split()
VALUES = """acorn anchor apple arrow badge banjo barrel basket beacon bell bottle bread bridge broom bucket button
cactus camera candle canoe carpet cello chair chisel clock cloud compass crown cup desk diamond dice dragon drum eagle
engine falcon feather fiddle flute fork fossil fox garlic ginger glove goblet guitar hammer harp hat helmet horn
horse igloo jacket jar jigsaw kayak kettle kite knife ladder lamp lantern laptop leaf lens lion locket magnet mango map
mask medal melon mirror moon mug needle nest notebook oar onion organ otter owl paddle panda parrot pencil piano
pillow pistol pocket potato pumpkin puzzle rabbit radio ribbon ring robot rocket rope saddle scarf shell shield shovel
sofa spear spider spoon statue sword table tent tiger torch towel tractor trumpet tunnel umbrella vase violin wagon
whale wheel whistle window wolf wrench yacht zebra""".split()


def fact(key: str, value: str) -> str:
    return f"# define {key} {value}\n"


def question(key: str) -> str:
    """The prompt's last words; the value follows."""
    return f"# define {key}"


def source_files() -> tuple[list[Path], list[Path]]:
    """The standard library's own source (no tests): files to train on, and every 40th file held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__", "turtledemo", "_vendor"}
    generated = {"pydoc_data", "encodings", "unicodedata"}  # tables, not prose or logic
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not (skip | generated) & set(path.relative_to(root).parts) and path.stat().st_size > 500
    )
    held_out = files[::40]
    return [f for f in files if f not in set(held_out)], held_out


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def facts_for(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Keys and two-word values, no word used twice."""
    words = iter(rng.sample(VALUES, 2 * count))
    return [(key, f"{next(words)} {next(words)}") for key in rng.sample(KEYS, count)]


def document(rng: random.Random, filler: list[str], facts: list[tuple[str, str]], asks: int) -> list[str]:
    """Filler lines with every fact once in the first part and `asks` repetitions after it, never before it."""
    lines = list(filler)
    places: list[tuple[float, str]] = []
    for key, value in facts:
        stated = rng.random() * 0.8
        places.append((stated, fact(key, value)))
        places += [(stated + (1 - stated) * rng.random(), fact(key, value)) for _ in range(asks)]
    for where, line in sorted(places, reverse=True):
        lines.insert(int(where * (len(filler) + 1)), line)
    return lines


def recall_prompt(
    rng: random.Random,
    encode: Callable[[str], list[int]],
    filler_ids: Sequence[int],
    length: int,
    facts: int = 8,
    depth: float | None = None,
) -> tuple[list[int], list[int]]:
    """A prompt of exactly `length` tokens and the tokens that answer it (two, with the embedded vocabulary).

    `facts` facts stand at uniform depths between pieces of unseen source; one of them is asked for at the end: any, or
    one at `depth` in [0, 1) of the source.
    """
    text, ask, answer = recall_parts(rng, encode, filler_ids, length, facts, depth)
    return [*text, *ask], answer


def recall_parts(
    rng: random.Random,
    encode: Callable[[str], list[int]],
    filler_ids: Sequence[int],
    length: int,
    facts: int,
    depth: float | None,
) -> tuple[list[int], list[int], list[int]]:
    """A prompt as of `recall_prompt`: its text, its question, and the answer."""
    chosen = facts_for(rng, facts)
    asked = rng.choice(chosen)
    ask, answer = encode("\n" + question(asked[0])), encode(" " + asked[1])
    stated = [encode("\n" + fact(*pair)) for pair in chosen]
    room = length - len(ask) - sum(map(len, stated))
    if room < 1:
        raise UserError(
            f"{length} tokens are too few for {facts} facts and a question; take at least {length - room + 1}"
        )
    start = rng.randrange(len(filler_ids) - room)
    middle = filler_ids[start : start + room]
    cuts = [rng.randrange(room) for _ in chosen]
    if depth is None:
        cuts.sort()
    else:
        cuts[chosen.index(asked)] = int(depth * room)
    ids: list[int] = []
    end = 0
    for cut, piece in sorted(zip(cuts, stated, strict=True), key=lambda pair: pair[0]):
        ids += [*middle[end:cut], *piece]
        end = cut
    return [*ids, *middle[end:]], ask, answer
