"""Tokenizer files that make native libraries panic, abort or take all memory: one line, and the process lives on."""

import base64
import json
import os
import random
import resource
import time
from pathlib import Path

import pytest
import tokenizers
from conftest import quick
from test_tokenizer import train_bytes, train_pieces, write
from tokenizers import pre_tokenizers

import tokenizer
from errors import UserError
from tokenizer import load


def charsmap(data: bytes) -> dict:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}}


def replacing(pattern: dict, content: str, times: int = 1, kind: str = "normalizer") -> dict:
    parts = [{"type": "Replace", "pattern": pattern, "content": content}] * times
    return {kind: {"type": "Sequence", f"{kind}s": parts}}


def split(regex: str) -> dict:
    part = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": part}


TEMPLATE = [{"SpecialToken": {"id": "q", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
SMALL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
BAD = {
    "charsmap empty": charsmap(b""),
    "charsmap of 4 GiB": charsmap(b"\xff\xff\xff\xff"),  # aborts
    "charsmap short": charsmap(b"\1"),
    "charsmap out of bounds": charsmap(b"\4\0\0\0\1\2\3\4"),
    "charsmap random": charsmap(b"\0\4\0\0" + random.Random(0).randbytes(1024) + b"abc\0"),
    "charsmap no base64": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "***"}},
    "growing": replacing({"String": "a"}, "a" * 10, 40),  # aborts
    "growing at every place": replacing({"Regex": ""}, "a" * 100),
    "empty match": replacing({"Regex": "(?=.)"}, "xxxxxxxx"),
    "growing decoder": replacing({"String": "a"}, "a" * 10, 12, "decoder"),  # is killed
    "long prepend": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "backtracking": split("(a+)+$"),
    "backtracking normalizer": replacing({"Regex": "(a+)+$"}, "b"),
    "bad regex": split("("),
    "no chunks": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "prefix": {"model": SMALL | {"continuing_subword_prefix": "##"}},
    "long prefix": {"model": SMALL | {"continuing_subword_prefix": "\u00e9\u00e9\u00e9"}},
    "unk": {"model": SMALL | {"unk_token": "<unk>"}},
    "unigram without unk": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
    "unigram beyond": {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}},
    "word level": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "q"}},
    "template": {
        "post_processor": {"type": "TemplateProcessing", "single": TEMPLATE, "pair": [], "special_tokens": {}}
    },
    "stripping decoder": {"decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 5}},
    "unknown part": {"normalizer": {"type": "Odd"}},
    "part that is none": {"pre_tokenizer": [1]},
    "deep": {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 30 + "]}" * 30)} | {"decoder": 5},
}
SOON = ("charsmap of 4 GiB", "charsmap out of bounds", "growing", "growing decoder", "backtracking", "prefix", "unk")


def data_of(backend: tokenizers.Tokenizer) -> dict:
    return json.loads(backend.to_str())


@pytest.mark.parametrize("name", quick(*SOON, of=BAD))
def test_tokenizer_json_that_breaks_the_library(name: str, tmp_path: Path) -> None:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(tmp_path, "tokenizer.json", data_of(train_bytes()) | BAD[name])
    with pytest.raises(UserError) as caught:
        made = load(tmp_path)
        for text in ("a" * 300 + "b", "xyz", "\u4f60"):
            made.decode(made.encode(text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and "tokenizer.json" in str(caught.value)
    assert time.perf_counter() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_parts_after_the_model_are_looked_at_too(tmp_path: Path) -> None:
    data = data_of(train_bytes())
    data |= {"normalizer": data.pop("normalizer"), **BAD["growing"]}
    data["normalizer"] = data.pop("normalizer")
    assert list(data).index("model") < list(data).index("normalizer")
    with pytest.raises(UserError, match="its normalizer may make a text 1e[+]40 times as long"):
        load(write(tmp_path, "tokenizer.json", data))


def test_ordinary_files_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial takes as long as loading."""
    monkeypatch.setattr(tokenizer, "_try", lambda path: pytest.fail("tried"))
    words = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated")
    write(tmp_path, "tokenizer.json", data_of(train_bytes(words)))
    assert load(tmp_path).decode(load(tmp_path).encode("Hello 12345")) == "Hello 12345"


TRIED = [name for name in BAD if "charsmap" in name or "prefix" in name]


REGEXES = ["backtracking normalizer", "empty match"]


@pytest.mark.parametrize("name", [*TRIED, *REGEXES, "no chunks", "template", "stripping decoder", "part that is none"])
def test_risky_files_are_tried(tmp_path: Path, name: str) -> None:
    """What such a file does to the process depends on the memory that is free."""
    assert tokenizer.risky(tmp_path, json.dumps(data_of(train_bytes()) | BAD[name]).encode())


def test_what_is_tried_is_loaded(tmp_path: Path) -> None:
    data = data_of(train_bytes()) | {"normalizer": {"type": "Nmt"}}
    assert tokenizer.risky(tmp_path, json.dumps(data).encode())
    made = load(write(tmp_path, "tokenizer.json", data))
    assert made.decode(made.encode("Hello")) == "Hello"


def test_expression_that_takes_for_ever(tmp_path: Path) -> None:
    """Python's re would hang on it, the library does not: a pattern is run by the library alone."""
    hard = replacing({"Regex": "(?:" * 12 + ".*" + ")*" * 12 + "x"}, "b")
    started = time.perf_counter()
    made = load(write(tmp_path, "tokenizer.json", data_of(train_bytes()) | hard))
    assert made.decode(made.encode("Hello")) == "Hello" and time.perf_counter() - started < 20


def test_files_that_are_too_large(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(tokenizer.MOST_BYTES + 1)
        with pytest.raises(UserError, match=f"{name} holds more than 64 MiB"):
            load(tmp_path)
        os.remove(tmp_path / name)


@pytest.mark.parametrize("seed", quick(*range(3), of=range(60)))
def test_broken_sentencepiece_models(seed: int, tmp_path: Path) -> None:
    """Bytes changed, cut or doubled: an error of one line, or a tokenizer that works."""
    rng, data = random.Random(seed), bytearray(train_pieces())
    for _ in range(rng.randrange(1, 5)):
        at = rng.choice([rng.randrange(len(data)), len(data) - 1 - rng.randrange(min(400, len(data)))])
        change = rng.randrange(3)
        data[at : at + (change > 0)] = [b"", rng.randbytes(1), rng.randbytes(8)][change]
        data = data[: rng.choice([len(data), rng.randrange(1, len(data))])] if change == 0 else data
    (tmp_path / "tokenizer.model").write_bytes(data)
    try:
        made = load(tmp_path)
        made.decode(made.encode("Hello, world! \u4f60"))
    except UserError as error:
        assert "\n" not in str(error) and "tokenizer.model" in str(error)
