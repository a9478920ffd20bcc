"""Every flag of every command line with odd values and odd files, alone and with others. The parsers know the flags."""

import argparse
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

from .bases import TEXT, VOCAB, copied, text
from .jobs import EVALUATE, LINES, write_lines
from .odd import TEXTS, Input, program, shortened

NAMES = ("generate", "generate", "job", "talk", "evaluate", "evaluate", "checkpoint", "bench")
WITHOUT = {"--compile", "--help"}  # take minutes
PROMPT = ["--prompt", "Once upon a time"]
BRING = {"--prompt", "--prompt-file", "--prompt-ids", "--interactive", "--input"}  # flags that bring other prompts
WITHOUT_PAIRS = 0.7  # share of the inputs that have one odd flag


def plain(name: str, folder: Path) -> Input:
    copied(text(folder), folder)
    (folder / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    (folder / "prompt.txt").write_text(TEXT[:60], encoding="utf-8")
    write_lines(folder / "input.jsonl", LINES)
    few = "--checkpoint model --max-new-tokens 4 --device cpu".split()
    if name == "generate":
        return Input("generate.py", [*few, "--json", *PROMPT], VOCAB, outputs=("saved",))
    if name == "job":
        argv = "--json --input input.jsonl --output output.jsonl --seed 1 --batch-size 2".split()
        return Input("generate.py", [*few, *argv], VOCAB, outputs=("output.jsonl",))
    if name == "talk":
        return Input("generate.py", [*few, "--interactive"], VOCAB, "Hello\n\u4f60\u597d\n".encode())
    if name == "evaluate":
        argv = "--checkpoint model --device cpu --tasks fidelity --text text.txt".split()
        return Input("evaluate.py", [*argv, *EVALUATE], VOCAB, outputs=("out",))
    if name == "checkpoint":
        return Input("checkpoint.py", ["model"], VOCAB)
    argv = "--stage decode --shape tiny --prompt 8 --new 4 --rounds 1 --peer eager".split()
    return Input("bench.py", argv, VOCAB, outputs=("out.json",))


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    count = 1 if rng.random() < WITHOUT_PAIRS else rng.choice([2, 2, 3, 5])
    odd: list[str] = []
    if name == "checkpoint" and rng.random() < 0.2:
        return replace(given, argv=(argv := [rng.choice(TEXTS)]), about=f"{name}: {shortened(argv[0])!r}")
    for option in rng.choices(options(given.program), k=count):
        odd.append(rng.choice(option.option_strings))
        if option.nargs != 0:
            values = [*TEXTS, *(str(each) for each in option.choices or [])]
            value = rng.choice([*values, *USUAL.get(option.dest, []) * 4])
            odd = [*odd[:-1], f"{odd[-1]}={value}"] if rng.random() < 0.3 else [*odd, value]
    argv = given.argv
    if name == "generate" and {each.partition("=")[0] for each in odd} & BRING:
        argv = argv[: -len(PROMPT)]
    about = " ".join(repr(shortened(each, 30)) if not each.startswith("--") else shortened(each, 40) for each in odd)
    return replace(given, argv=[*argv, *odd], about=f"{name}: {about}")


USUAL = {  # values that are right more often, so that runs get further
    "policy": "full window streaming h2o h2o-mean tova snapkv knorm keydiff streaming:sinks=2 snapkv:recent=4".split(),
    "layers": "uniform squeeze mix pyramid squeeze:p=0.5".split(),
    "budget": ["0.5", "9", "0.01", "1"],
    "temperature": ["0.7", "1e30"],
    "top_p": ["0.9", "1e-300"],
    "save_plan": ["saved", "text.txt", "output.jsonl", "input.jsonl", "output.jsonl.job.json", "model/config.json"],
    "output": ["output.jsonl", "input.jsonl", "text.txt", "/dev/full", "/dev/stdout", "/dev/null", "."],
    "input": ["input.jsonl", "output.jsonl", "/dev/zero", "/dev/stdin"],
    "prompt_file": ["prompt.txt", "/dev/zero", "/dev/urandom", "model", "text.txt"],
    "plan": ["/dev/zero", "text.txt", "input.jsonl"],
    "text": ["text.txt", "/dev/zero", "prompt.txt"],
    "prompt_ids": ["1,2,3", "2047", "2048"],
    "out": ["text.txt", "out.json", "out/x", "/dev/full"],
    "shape": ["tiny", "tiny:bf16", "model/config.json", "embedded:fp16", "tiny:int8"],
    "files": ["input.jsonl", "text.txt", "model", "."],
}


@cache
def options(name: str) -> list[argparse.Action]:
    """What the program's parser takes, `WITHOUT` some."""

    class Found(BaseException):
        pass

    def found(parser: argparse.ArgumentParser, *_):
        raise Found(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", found):
        try:
            program(name).main()
        except Found as caught:
            actions = caught.args[0]._actions
    return [each for each in actions if each.option_strings and not WITHOUT & {*each.option_strings}]
