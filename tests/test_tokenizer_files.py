"""Combinations of tokenizer files, generated: ids and text equal those of transformers' AutoTokenizer.

Exceptions, where transformers has no opinion or contradicts itself:
- BPE dropout: its classes with a vocabulary of their own turn it off, its general one does not. Here it is always off,
  so the reference is the folder without it.
- vocab.json and merges.txt: a listed token gets another id there than the list says if the ids leave a gap. Here it is
  an error (test_tokenizer.py), so that the lists generated here have none.
- a tokenizer.json with the class LlamaTokenizer or GPT2Tokenizer: transformers takes only vocab and merges from it and
  builds the rest anew. Here the file counts (test_published_forms has those families as they are published).
- tokenizer.model: transformers converts it, which needs protobuf; the reference is sentencepiece (test_tokenizer.py).
- added_tokens.json: transformers reads it before it knows all special tokens, and so takes a name that only
  special_tokens_map.json lists as additional, or that has an unusual part such as image_token, for an ordinary or a
  normalized token. Here it is special. The lists generated here hold no such name.
- clean_up_tokenization_spaces: it is for WordPiece, and is not done here.
"""

import json
import random
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from conftest import quick
from test_tokenizer import convert_pieces, corpus, save_vocab_merges, train_bytes, train_pieces, write
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from tokenizer import load

FORMS = ("bytes", "pieces", "metaspace", "unigram", "GPT2Tokenizer", "Qwen2Tokenizer")
NAMES = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<PAD>", "quick", "<image>"]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
SEEDS = range(300)


def texts(rng: random.Random) -> list[str]:
    parts = [
        *NAMES,
        *NAMES,
        " ",
        "  ",
        "\n",
        "Hello",
        "the quick brown",
        "a",
        "x<",
        "Zażółć",
        "你好",
        "\U0001f600",
        "QUICK",
    ]
    return ["", "Hello, world! quick", *("".join(rng.choices(parts, k=rng.randrange(1, 9))) for _ in range(10))]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tokenizer.json of each form, with nothing added."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "tokenizer.model").write_bytes(train_pieces())
    pieces = convert_pieces(folder).to_str()
    metaspace = tokenizers.Tokenizer.from_str(pieces)
    metaspace.normalizer = None
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "\u2581")])
    unigram.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(corpus(), trainer)
    made = {
        "bytes": train_bytes().to_str(),
        "pieces": pieces,
        "metaspace": metaspace.to_str(),
        "unigram": unigram.to_str(),
    }
    bare = {}
    for form, text in made.items():
        data = json.loads(text)
        bare[form] = json.dumps(data | {"added_tokens": [], "post_processor": None})
    return bare


def token(rng: random.Random, name: str) -> dict[str, Any]:
    return {"content": name} | {flag: rng.random() < (0.7 if flag == "special" else 0.25) for flag in FLAGS}


def named(rng: random.Random) -> dict[str, Any]:
    """What tokenizer_config.json calls the special tokens."""
    config: dict[str, Any] = {}
    for part in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token"):
        if (choice := rng.randrange(4)) == 1 and part != "image_token":
            config[part] = None
        elif choice:
            config[part] = rng.choice(NAMES)
            if choice == 3 and part in ("bos_token", "eos_token"):
                config[part] = {"__type": "AddedToken"} | token(rng, config[part])
    return config


def settings(rng: random.Random, first: int | None) -> tuple[dict, dict | None, dict | None]:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json. Listed ids begin with `first`."""
    config = named(rng)
    for side in ("bos", "eos"):
        if (choice := rng.randrange(3)) < 2:
            config[f"add_{side}_token"] = bool(choice)
    extra = rng.sample(NAMES, rng.randrange(4))
    if choice := rng.randrange(4):
        key = "additional_special_tokens" if choice == 1 else "extra_special_tokens"
        config[key] = {f"x{n}_token": name for n, name in enumerate(extra)} if choice == 3 else extra
    listed = rng.sample([name for name in NAMES if name != "quick" or first is None], rng.randrange(1, 5))
    numbered = dict(enumerate(listed, first or 0))
    special_map = added = None
    if (choice := rng.randrange(4)) == 0:
        config["added_tokens_decoder"] = {str(i): token(rng, name) for i, name in numbered.items()}
    elif choice == 1:
        added = {name: i for i, name in numbered.items()}
    if rng.randrange(3) == 0:
        special_map = {"eos_token": rng.choice(NAMES), "bos_token": token(rng, rng.choice(NAMES))}
        if rng.randrange(2):
            special_map["additional_special_tokens"] = rng.sample(NAMES, 2)
    if added:
        unseen = [value for part, value in config.items() if part == "image_token" or isinstance(value, dict)]
        unseen += (special_map or {}).get("additional_special_tokens", [])
        added = {name: i for name, i in added.items() if name not in str(unseen)}
    return config, special_map, added


def make(folder: Path, form: str, rng: random.Random, bases: dict[str, str]) -> None:
    """Files of this form in `folder`."""
    folder.mkdir()
    if form.endswith("Tokenizer"):
        backend = tokenizers.Tokenizer.from_str(bases["bytes"])
        config, special_map, added = settings(rng, first=backend.get_vocab_size())
        if "added_tokens_decoder" in config:
            entries = {entry["content"]: entry for entry in config["added_tokens_decoder"].values()}
            config["added_tokens_decoder"] = {str(i): entries[name] for name, i in numbered(backend, entries).items()}
        if added:
            added = numbered(backend, added)
        save_vocab_merges(folder, backend, tokenizer_class=form, **config)
    else:
        backend = tokenizers.Tokenizer.from_str(bases[form])
        if form == "bytes":
            backend.normalizer = rng.choice([None, normalizers.NFC(), normalizers.Lowercase()])
            if rng.randrange(3) == 0:
                backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        for name in rng.sample(NAMES, rng.randrange(6)):
            backend.add_tokens([AddedToken(**token(rng, name))])
        ends = [(name, backend.token_to_id(name)) for name in ("<s>", "<|im_end|>") if backend.token_to_id(name)]
        letters = processors.ByteLevel(trim_offsets=False)
        if ends and (choice := rng.randrange(4)):
            single = [f"{ends[0][0]} $A", f"$A {ends[-1][0]}", f"{ends[0][0]} $A {ends[-1][0]}"][choice - 1]
            template = processors.TemplateProcessing(single=single, special_tokens=ends)
            backend.post_processor = rng.choice([template, processors.Sequence([letters, template])])
        elif rng.randrange(2):
            backend.post_processor = letters
        first = rng.choice([None, backend.get_vocab_size(), 7])
        config, special_map, added = settings(rng, first)
        backend.save(str(folder / "tokenizer.json"))
        kind = rng.choice(["PreTrainedTokenizerFast", "TokenizersBackend"])
        write(folder, "tokenizer_config.json", config | {"tokenizer_class": kind})
    for name, value in (("special_tokens_map.json", special_map), ("added_tokens.json", added)):
        if value is not None:
            write(folder, name, value)


def numbered(backend: tokenizers.Tokenizer, names: Iterable[str]) -> dict[str, int]:
    """Ids without a gap: those in the vocabulary, then the numbers after it."""
    known = {name: backend.token_to_id(name) for name in names}
    new = [name for name, i in known.items() if i is None]
    return {name: i for name, i in known.items() if i is not None} | dict(
        zip(new, count(backend.get_vocab_size()), strict=False)
    )


@pytest.mark.parametrize("seed", quick(*range(36), of=SEEDS))
def test_ids_and_text_equal_transformers(seed: int, bases: dict[str, str], tmp_path: Path) -> None:
    rng, form = random.Random(seed), FORMS[seed % len(FORMS)]
    folder = tmp_path / "made"
    make(folder, form, rng, bases)
    ours, theirs = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in texts(rng):
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs.encode(text), text
        assert ours.encode(text, special=False, parse_special=True) == theirs.encode(text, add_special_tokens=False)
        plain = ours.encode(text, special=False)
        assert plain == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        for some in (ids, plain):
            assert ours.decode(some) == theirs.decode(some, skip_special_tokens=True), (text, some)


@pytest.mark.parametrize("form", ["bytes", "metaspace"])
def test_dropout_is_off(bases: dict[str, str], form: str, tmp_path: Path) -> None:
    data, text = json.loads(bases[form]), "The quick brown"
    ids = load(write(tmp_path, "tokenizer.json", data)).encode(text)
    data["model"]["dropout"] = 0.5
    assert len({tuple(tokenizers.Tokenizer.from_str(json.dumps(data)).encode(text).ids) for _ in range(30)}) > 1
    tokenizer = load(write(tmp_path, "tokenizer.json", data))
    assert all(tokenizer.encode(text) == ids for _ in range(30))
