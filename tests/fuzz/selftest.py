"""A program that commits each fault that the suite looks for: is it seen?"""

import ctypes
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

from .odd import Input

NAMES = ("untidy", "traceback", "hang", "memory", "crash", "NaN in JSON", "nonsense", "written outside")
NAMES += ("one line", "same result", "other result")
OUTSIDE = Path(__file__).parent / "outside"
RESULT = '{"tokens": [%s], "text": "x", "finish_reason": "eos", "prompt_tokens": 3, "max_new_tokens": 4}'


def plain(name: str, folder: Path) -> Input:
    return Input("fuzz.selftest", ["same result"], vocab=100)


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    return replace(given, argv=[name], about=name)


def main() -> int:
    match sys.argv[1]:
        case "untidy":
            print("one", "two", sep="\n", file=sys.stderr)
            return 2
        case "traceback":
            raise KeyError("a fault of ours")
        case "hang":
            while True:
                pass
        case "memory":
            held = [bytearray(b"x" * (64 << 20)) for _ in range(200)]
            print(len(held))
        case "crash":
            ctypes.string_at(0)
        case "NaN in JSON":
            print(RESULT % "NaN")
        case "nonsense":
            print(RESULT % 100)
        case "written outside":
            OUTSIDE.write_text("x")
        case "one line":
            os.write(2, b"fuzz.selftest: error: 5 is not 6; give another\n")
            return 2
        case "same result":
            print(RESULT % 5)
        case "other result":
            print(RESULT % 6)
    return 0
