"""A program that commits each fault that the suite looks for: is it seen?"""

import ctypes
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

from .odd import Input

OUTSIDE = Path(__file__).parent / "outside"
RESULT = '{"tokens": [%s], "text": "x", "finish_reason": "eos", "prompt_tokens": 3, "max_new_tokens": 4}'


def plain(name: str, folder: Path) -> Input:
    return Input("fuzz.selftest", ["same result"], vocab=100)


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    return replace(given, argv=[name], about=name)


def raise_a_fault() -> None:
    raise KeyError("a fault of ours")


def hang() -> None:
    while True:
        pass


FAULTS = {
    "untidy": lambda: print("one", "two", sep="\n", file=sys.stderr),
    "traceback": raise_a_fault,
    "hang": hang,
    "memory": lambda: print(len([bytearray(b"x" * (64 << 20)) for _ in range(200)])),
    "crash": lambda: ctypes.string_at(0),
    "NaN in JSON": lambda: print(RESULT % "NaN"),
    "nonsense": lambda: print(RESULT % 100),
    "written outside": lambda: OUTSIDE.write_text("x"),
    "one line": lambda: os.write(2, b"fuzz.selftest: error: 5 is not 6; give another\n"),
    "same result": lambda: print(RESULT % 5),
    "other result": lambda: print(RESULT % 6),
}


NAMES = tuple(FAULTS)


def main() -> int:
    FAULTS[sys.argv[1]]()
    return 2 if sys.argv[1] in ("untidy", "one line") else 0
