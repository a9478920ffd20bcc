"""The embedded checkpoint is what its card says: small, and it recalls facts from its context."""

import json
import random

import demo

import checkpoint
import generate
import tokenizer as tokenizers
from engine import Engine, Request
from evaluation.texts import python_source

KEYS, VALUES = (
    "amber coral indigo lemon olive ruby teal zinc".split(),
    "acorn banjo cactus dragon falcon guitar".split(),
)
VALUES += "hammer igloo jigsaw kettle lantern magnet needle otter pocket violin".split()
CARD = (generate.EMBEDDED / "README.md").read_text()


def recall(count: int, length: int = 1024, **settings) -> float:
    """Share of `count` stretches of unseen source, 8 facts in each, whose question gets the right two words."""
    model, _ = checkpoint.load(generate.EMBEDDED)
    tokenizer, rng, asked = tokenizers.load(generate.EMBEDDED), random.Random(11), []
    source = tokenizer.encode(python_source(), special=False)
    for _ in range(count):
        words = rng.sample(VALUES, 16)
        facts = [f"\n# define {key} {words[2 * n]} {words[2 * n + 1]}\n" for n, key in enumerate(KEYS)]
        pieces, chosen = [tokenizer.encode(fact, special=False) for fact in facts], rng.randrange(8)
        *question, first, second = tokenizer.encode(facts[chosen].rstrip("\n"), special=False)
        size = (length - len(question) - sum(map(len, pieces))) // 8
        start = rng.randrange(len(source) - 8 * size)
        rng.shuffle(pieces)
        ids = [t for n, piece in enumerate(pieces) for t in [*piece, *source[start + n * size :][:size]]]
        asked.append((Request([*ids, *question], max_new_tokens=2), [first, second]))
    wanted = {id(request): answer for request, answer in asked}
    done = Engine(model, **settings).generate([request for request, _ in asked], batch_size=8)
    return sum(completion.tokens == wanted[id(completion.request)] for completion in done) / count


def test_recalls_and_forgets_what_is_dropped():
    assert recall(16) >= 0.7
    assert recall(16, policy="window", budget=0.1) <= 0.35


def test_weights_are_those_of_the_card():
    model, _ = checkpoint.load(generate.EMBEDDED)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters in float32" in CARD
    assert (generate.EMBEDDED / "model.safetensors").stat().st_size <= 16e6


def test_the_demo_shows_its_point(capsys):
    def answer(*args: str) -> str:
        assert generate.main(["--json", "--max-new-tokens", "4", *args]) == 0
        return " ".join(json.loads(capsys.readouterr().out)["text"].split()[:2])

    full, squeezed, uniform = (answer(*args) for args in demo.runs("streaming").values())
    assert full == squeezed == "lantern violin" != uniform
