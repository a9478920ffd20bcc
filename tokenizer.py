"""Text to token ids and back, for the tokenizer files that come with a model's weights.

`load(folder)` takes the first of these that the folder holds:

    tokenizer.json               Hugging Face `tokenizers`
    vocab.json and merges.txt    byte-level BPE (GPT-2, OPT, Qwen)
    tokenizer.model              sentencepiece (Llama 2, Mistral), or tiktoken lines "base64 rank" (Llama 3)

A GGUF file stands for a folder; its metadata hold byte-level BPE or sentencepiece.

Decoding is the same for all of them: every id stands for a string of bytes, and a text is those bytes joined and
read as UTF-8, each invalid stretch as U+FFFD. A stream of ids therefore needs an incremental UTF-8 decoder and
nothing else: what `TextStream` hands out, joined, is exactly `Tokenizer.decode` of all ids, at a fixed cost a token.
"""

import base64
import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import files
import gguf_file
from errors import UserError, place, shown

# The alphabet of byte-level BPE: printable Latin-1 stands for itself, every other byte for a letter from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))}
_BYTE_SPACE, _PIECE_SPACE = "\u0120", "\u2581"  # how byte-level BPE and sentencepiece spell a space

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_WORDS = _WORDS % ""  # digits one by one
_LLAMA3_WORDS = _WORDS % "{1,3}"

# Llama 3 has 256 special tokens after its ranks; those it does not name are reserved.
_LLAMA3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA3_FREE = [n for n in range(256) if n not in _LLAMA3_NAMED]
_LLAMA3_SPECIAL = _LLAMA3_NAMED | {n: f"reserved_special_token_{i}" for i, n in enumerate(_LLAMA3_FREE)}


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer: `split` and `token_bytes` come from the file format, the rest is common to all."""

    split: Callable[[str, bool], list[int]]  # (text, parse_special) -> ids, nothing added at the ends
    token_bytes: Callable[[int], bytes]  # empty for special tokens and for ids past the vocabulary
    vocab_size: int  # one more than the largest id
    drops_space: bool  # decoding removes the space that encoding puts before the first word (sentencepiece)
    prefix: tuple[int, ...]  # the tokenizer's own special tokens, such as BOS
    suffix: tuple[int, ...]
    special_names: tuple[str, ...]  # what `parse_special` decides on

    def encode(self, text: str, special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`, between the tokenizer's own special tokens (BOS, ...) if `special`.

        The names of special tokens in the text, such as "</s>", are ordinary text unless `parse_special`. Which added
        tokens are special is what the tokenizer's files say; the others ("<think>" in Qwen 3) are always parsed.
        """
        text.encode()  # a lone surrogate is no text: one UnicodeEncodeError, a UserError, whatever the form
        ids = self.split(text, parse_special)
        return [*self.prefix, *ids, *self.suffix] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without the special tokens."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_space else text


class TextStream:
    """Text of a growing sequence of ids, up to the first stop string.

    `push(id)` returns the new text that is safe to print: never half a character, and nothing that may yet turn out to
    begin a stop string. Once a stop string is complete, `stopped` is True: the text before it has been returned, the
    stop string and what follows never will be. `flush()` at the end returns what was still held back.

    With several stop strings the one completed first counts, wherever the borders between tokens are; of those
    completed by the same character, the longest.

    With `continues` the ids go on from an earlier text, so that the space before their first word is kept.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), continues: bool = False):
        if "" in stops:  # also true of a plain string, which would stop at each of its characters
            raise UserError(f"stop strings must be a list of non-empty strings, not {stops!r}")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.drops_space and not continues
        self._held = ""  # printable, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Take the next id, return the text to print."""
        return "" if self.stopped else self._release(self._utf8.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """Return the text still held back; the sequence has ended."""
        text = "" if self.stopped else self._release(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        if self._drop_space and text:
            text, self._drop_space = text.removeprefix(" "), False
        text, self._held = self._held + text, ""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def load(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder`, or None if there is none; UserError if a file of it is broken."""
    settings = read_settings(folder)
    if gguf_file.is_gguf(folder):
        return _load_gguf(folder, settings)
    if (folder / "tokenizer.json").exists():
        return _load_json(folder / "tokenizer.json", settings)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _load_vocab_merges(folder, settings)
    if (folder / "tokenizer.model").exists():
        data = (folder / "tokenizer.model").read_bytes()
        load_model = _load_tiktoken if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data) else _load_sentencepiece
        return load_model(folder / "tokenizer.model", data, settings)
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if (folder / name).exists():
            raise UserError(f"{folder / name}: {other} is missing beside it")
    return None


def eos_ids(folder: Path) -> frozenset[int]:
    """All end-of-sequence ids: those of generation_config.json if it names any, else those of config.json."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            text = f"eos_token_id must be an integer from 0 to {2**31 - 1} or a list of such, not {shown(value)}"
            raise UserError(f"{place(folder / name)}: {text}")
        if ids:
            return frozenset(ids)
    return frozenset()


def _load_gguf(path: Path, settings: dict[str, Any]) -> Tokenizer | None:
    match gguf_file.tokenizer_kind(path):
        case "gpt2":
            return _wrap(gguf_file.byte_level(path), path, settings)
        case "llama":
            return _load_sentencepiece(path, gguf_file.sentencepiece(path), settings)
    return None


def _load_json(path: Path, settings: dict[str, Any]) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise broken(path, error) from None
    backend.no_truncation()  # a file may carry the settings of a training run
    backend.no_padding()
    return _wrap(backend, path, settings)


def _load_vocab_merges(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, path = read_json(folder / "vocab.json"), folder / "merges.txt"
    if any(type(i) is not int for i in vocab.values()):
        raise UserError(f"{folder / 'vocab.json'}: the ids must be integers")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        if bad := [merge for merge in merges if len(merge) != 2]:
            raise UserError(f"a merge must be two tokens, not {bad[0]}")
        backend = Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises nothing narrower
        raise broken(path, error) from None
    qwen = str(settings.get("tokenizer_class")).startswith("Qwen2")  # Qwen 3 too
    letters = pre_tokenizers.ByteLevel(bool(settings.get("add_prefix_space")), use_regex=not qwen)
    if qwen:
        backend.normalizer = normalizers.NFC()
        letters = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"), letters])
    backend.pre_tokenizer = letters
    backend.decoder = decoders.ByteLevel()
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | settings  # as in GPT-2
    for i, (name, special) in _added_tokens(folder, settings, vocab).items():
        backend.add_tokens([AddedToken(name, special=special, normalized=False)])
        if backend.token_to_id(name) != i:
            raise UserError(f"{folder}: added token {name!r} must have id {i}, but gets {backend.token_to_id(name)}")
    return _wrap(backend, path, settings)


def _wrap(backend: Any, path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The `Tokenizer` of a `tokenizers.Tokenizer`."""
    # What the decoder makes of tokens shows how they are spelled.
    decode = backend.decoder.decode if backend.decoder else "".join
    texts = {space: decode([f"{space}a", f"{space}b"]) for space in (_BYTE_SPACE, _PIECE_SPACE)}
    space = next((space for space, text in texts.items() if text.removeprefix(" ") == "a b"), None)
    if space is None:
        raise UserError(f"{path}: the decoder is neither byte-level nor sentencepiece-like")
    bytewise = decode(["<0x41>"]) == "A"
    added = backend.get_added_tokens_decoder()
    lock = Lock()  # whether special tokens are parsed is a state of the backend

    def split(text: str, parse_special: bool) -> list[int]:
        with lock:
            backend.encode_special_tokens = not parse_special
            return backend.encode(text, add_special_tokens=False).ids

    def token_bytes(token: int) -> bytes:
        if token in added and added[token].special:
            return b""
        piece = backend.id_to_token(token) or ""
        if space == _PIECE_SPACE:
            return _piece_bytes(piece, bytewise)  # added tokens too: Gemma has its runs of spaces as such
        if token in added:
            return piece.encode()
        return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()

    sample = backend.encode("a")  # with what the post-processor puts before and after a text
    start = (sample.special_tokens_mask + [0]).index(0)
    end = start + sample.special_tokens_mask.count(0)
    prefix, suffix = _ends(path, settings, backend.token_to_id, (sample.ids[:start], sample.ids[end:]))
    vocab_size = max(backend.get_vocab().values(), default=-1) + 1
    special = tuple(token.content for token in added.values() if token.special)
    return Tokenizer(split, token_bytes, vocab_size, texts[space] == "a b", prefix, suffix, special)


def _load_sentencepiece(path: Path, data: bytes, settings: dict[str, Any]) -> Tokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError:
        raise UserError(f"{path}: neither a sentencepiece model nor tiktoken lines") from None
    size = model.vocab_size()
    folder = path if gguf_file.is_gguf(path) else path.parent
    added = {i: token for i, token in _added_tokens(folder, settings, {}).items() if i >= size}
    parsed = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    parsed |= {name: i for i, (name, _) in added.items()}
    names = re.compile(f"({'|'.join(map(re.escape, sorted(parsed, key=len, reverse=True)))})")

    def split(text: str, parse_special: bool) -> list[int]:
        if not (parse_special and parsed):
            return model.encode(text)
        parts = [part for part in names.split(text) if part]
        return [i for part in parts for i in ([parsed[part]] if part in parsed else model.encode(part))]

    def token_bytes(token: int) -> bytes:
        if token in added:
            name, special = added[token]
            return b"" if special else name.encode()
        if not 0 <= token < size or model.is_control(token):
            return b""
        if model.is_unknown(token):
            return model.decode([token]).encode()
        return _piece_bytes(model.id_to_piece(token), model.is_byte(token))

    bos, eos = (model.id_to_piece(i) if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
    defaults = {"add_bos_token": bos is not None, "bos_token": bos, "eos_token": eos}
    prefix, suffix = _ends(path, defaults | settings, parsed.get)
    drops_space = model.encode("a", out_type=str)[0].startswith(_PIECE_SPACE)
    return Tokenizer(split, token_bytes, max([size - 1, *added]) + 1, drops_space, prefix, suffix, tuple(parsed))


def _load_tiktoken(path: Path, data: bytes, settings: dict[str, Any]) -> Tokenizer:
    import tiktoken

    ranks = {}
    for n, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}: line {n} is not a base64 token and its rank") from None
    pieces = {rank: token for token, rank in ranks.items()}
    if sorted(pieces) != list(range(len(ranks))) or sum(len(token) == 1 for token in ranks) != 256:
        raise UserError(f"{path}: ranks must be 0 to {len(ranks) - 1}, once each, and cover the 256 single bytes")
    special = {f"<|{name}|>": len(ranks) + n for n, name in _LLAMA3_SPECIAL.items()}
    coder = tiktoken.Encoding(path.name, pat_str=_LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special)
    defaults = {"add_bos_token": True, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return Tokenizer(
        lambda text, parse: coder.encode(text, allowed_special="all" if parse else set(), disallowed_special=()),
        lambda token: pieces.get(token, b""),
        coder.n_vocab,
        False,
        *_ends(path, defaults | settings, special.get),
        tuple(special),
    )


def _piece_bytes(piece: str, bytewise: bool) -> bytes:
    """Bytes of a piece spelled in sentencepiece's way; with `bytewise` those like "<0x0A>" stand for one byte."""
    if bytewise and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_PIECE_SPACE, " ").encode()


def _ends(path: Path, settings: dict[str, Any], id_of: Callable[[str], int | None], found: Any = ((), ())) -> list:
    """The special tokens to put before and after a text: as `found` in the tokenizer, unless the settings differ."""
    ends = []
    for side, ids in zip(("bos", "eos"), found, strict=True):
        wanted, name = settings.get(f"add_{side}_token"), _name(settings.get(f"{side}_token"))
        if wanted and not ids:
            ids = [id_of(name) if name else None]
            if None in ids:
                raise UserError(f"{path}: add_{side}_token is set, but {side}_token {name!r} is not in the vocabulary")
        ends.append(() if wanted is False else tuple(ids))
    return ends


def special_tokens(folder: Path) -> dict[str, str]:
    """Text of each token that the settings give a part, such as {"bos_token": "<s>"}."""
    tokens = {key: _name(value) for key, value in read_settings(folder).items() if key.endswith("_token")}
    return {key: name for key, name in tokens.items() if name is not None}


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, without the nulls."""
    files = [read_json(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return {key: value for settings in files for key, value in settings.items() if value is not None}


def _name(token: Any) -> str | None:
    """The text of a token that a settings file gives as a string or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _added_tokens(folder: Path, settings: dict[str, Any], vocab: dict[str, int]) -> dict[int, tuple[str, bool]]:
    """Text of each added token and whether it is special, by id: the listed ones and the special ones in `vocab`."""
    listed = read_json(folder / "added_tokens.json")
    try:
        named = {_name(value) for key, value in settings.items() if key.endswith("_token")}
        named |= set(map(_name, settings.get("additional_special_tokens", ())))
        listed |= {name: i for name, i in vocab.items() if name in named}
        tokens = [(int(i), name, name in named) for name, i in listed.items()]
        for i, token in settings.get("added_tokens_decoder", {}).items():
            tokens.append((int(i), token["content"], bool(token.get("special")) or token["content"] in named))
        return {i: (name, special) for i, name, special in sorted(tokens)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: malformed added tokens ({error!r})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if gguf_file.is_gguf(path.parent):
        return gguf_file.read_json(path)
    return files.read_json(path) if path.exists() else {}


def broken(path: Path, error: Exception) -> UserError:
    """The error that says in one line what is wrong with a file."""
    return UserError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}")
