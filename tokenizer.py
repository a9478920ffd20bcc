"""Text to token ids and back, for the tokenizer files that come with a model's weights.

`load(folder)` takes the first of these that the folder holds:

    tokenizer.json               Hugging Face `tokenizers`
    vocab.json and merges.txt    byte-level BPE (GPT-2, OPT, Qwen)
    tekken.json                  Mistral's own
    tokenizer.model              sentencepiece (Llama 2, Mistral), or tiktoken lines "base64 rank" (Llama 3)

A GGUF file stands for a folder; its metadata hold byte-level BPE or sentencepiece.

Decoding is the same for all of them: every id stands for a string of bytes, and a text is those bytes joined and
read as UTF-8, each invalid stretch as U+FFFD. A stream of ids therefore needs an incremental UTF-8 decoder and
nothing else: what `TextStream` hands out, joined, is exactly `Tokenizer.decode` of all ids, at a fixed cost a token.
"""

import base64
import codecs
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import files
import gguf_file
from child import Child, Overrun
from errors import UserError, place, shown, visible

MOST_BYTES = 64 << 20  # of a file with a vocabulary; the largest that are published have half of it
MOST_SPECIAL = 1 << 16  # tokens of a tekken.json; those that are published have 1000
MOST_GROWTH = 64  # times that normalizing may lengthen a text
TRY_SECONDS, TRY_MIB = 10, 1536  # for a trial of a tokenizer

# The alphabet of byte-level BPE: printable Latin-1 stands for itself, every other byte for a letter from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))}
_BYTE_SPACE, _PIECE_SPACE = "\u0120", "\u2581"  # how byte-level BPE and sentencepiece spell a space

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = _WORDS % ""  # digits one by one
LLAMA3_WORDS = _WORDS % "{1,3}"

# Llama 3 has 256 special tokens after its ranks; those it does not name are reserved.
_LLAMA3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA3_FREE = [n for n in range(256) if n not in _LLAMA3_NAMED]
_LLAMA3_SPECIAL = _LLAMA3_NAMED | {n: f"reserved_special_token_{i}" for i, n in enumerate(_LLAMA3_FREE)}


# The special tokens of a tekken.json that does not list them.
_TEKKEN_NAMES = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]
[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]
[TOOL_CONTENT]"""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer: `split` and `token_bytes` come from the file format, the rest is common to all."""

    split: Callable[[str, bool], list[int]]  # (text, parse_special) -> ids, nothing added at the ends
    token_bytes: Callable[[int], bytes]  # empty for special tokens and for ids past the vocabulary
    vocab_size: int  # one more than the largest id
    drops_space: bool  # decoding removes the space that encoding puts before the first word (sentencepiece)
    prefix: tuple[int, ...]  # the tokenizer's own special tokens, such as BOS
    suffix: tuple[int, ...]
    special_ids: dict[str, int]  # by name: what `parse_special` decides on
    bos: int | None = None  # the ids of the bos_token and the eos_token that the settings name
    eos: int | None = None

    def encode(self, text: str, special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`, between the tokenizer's own special tokens (BOS, ...) if `special`.

        The names of special tokens in the text, such as "</s>", are ordinary text unless `parse_special`. Which added
        tokens are special is what the tokenizer's files say; the others ("<think>" in Qwen 3) are always parsed.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{shown(text[error.start])} at {error.start} is half a character, and no text") from None
        ids = self.split(text, parse_special)
        return [*self.prefix, *ids, *self.suffix] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without the special tokens."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_space else text


def _no_text(text: str, parse_special: bool) -> NoReturn:
    raise UserError("the checkpoint has no tokenizer; give prompt_ids")


NONE = Tokenizer(_no_text, lambda token: b"", 0, False, (), (), {})  # where there is none: no id has any text


class TextStream:
    """Text of a growing sequence of ids, up to the first stop string.

    `push(id)` returns the new text that is safe to print: never half a character, and nothing that may yet turn out to
    begin a stop string. Once a stop string is complete, `stopped` is True: the text before it has been returned, the
    stop string and what follows never will be. `flush()` at the end returns what was still held back.

    With several stop strings the one completed first counts, wherever the borders between tokens are; of those
    completed by the same character, the longest. A special token has no text, but a stop string may hold its name.

    With `continues` the ids go on from an earlier text, so that the space before their first word is kept.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), continues: bool = False):
        if isinstance(stops, str) or "" in stops:
            raise UserError(f"stop strings must be a list of non-empty strings, not {shown(stops)}")
        if stops and tokenizer is NONE:
            raise UserError("--stop needs a tokenizer, and the checkpoint has none")
        self.text, self.stopped = "", False  # text: all that has been returned
        self._tokenizer = tokenizer
        self.stops = tuple(stops)
        # What special tokens write here, which is never shown: surrogates, since no UTF-8 gives them.
        named = [name for name in tokenizer.special_ids if any(name in stop for stop in stops)]
        marks = dict(zip(sorted(named, key=len, reverse=True), map(chr, range(0xD800, 0xDFFF)), strict=False))
        names = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        self._marked = tuple(names.sub(lambda name: marks[name[0]], stop) for stop in stops if names.search(stop))
        ids = tokenizer.special_ids.items() if marks else ()
        self._marks = {i: marks.get(name, "\udfff") for name, i in ids}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.drops_space and not continues
        self._held = ""  # printable, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Take the next id, return the text to print."""
        if self.stopped:
            return ""
        mark = self._marks.get(token)
        new = self._release(self._utf8.decode(self._tokenizer.token_bytes(token)) if mark is None else mark)
        self.text += new
        return new

    def ends(self, tokens: Sequence[int]) -> bool:
        """Take the last of the ids; whether a stop string is complete: what a `Request` asks."""
        self.push(tokens[-1])
        return self.stopped

    def flush(self) -> str:
        """Return the text still held back; the sequence has ended."""
        new = "" if self.stopped else self._release(self._utf8.decode(b"", final=True))
        new, self._held = new + self._shown(self._held), ""
        self.text += new
        return new

    def _release(self, text: str) -> str:
        if self._drop_space and self._shown(text):
            text, self._drop_space = text.removeprefix(" "), False
        text, self._held = self._held + text, ""
        shown = self._shown(text)
        at = range(len(text) + 1)  # where each shown character is, and the end
        if len(shown) < len(text):
            at = [place for place, c in enumerate(text) if not "\ud800" <= c <= "\udfff"] + [len(text)]
        found = [(at[n + len(stop) - 1] + 1, at[n]) for stop in self.stops if (n := shown.find(stop)) >= 0]
        found += [(n + len(stop), n) for stop in self._marked if (n := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._shown(text[: min(found)[1]])
        begun = [at[-n - 1] for stop in self.stops for n in range(1, len(stop)) if shown.endswith(stop[:n])]
        begun += [len(text) - n for stop in self._marked for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = min(begun, default=len(text))
        self._held = text[cut:]
        return self._shown(text[:cut])

    def _shown(self, text: str) -> str:
        return re.sub("[\ud800-\udfff]", "", text) if self._marks else text


def load(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder`, or None if there is none; UserError if a file of it is broken."""
    settings = read_settings(folder)
    if gguf_file.is_gguf(folder):
        return _load_gguf(folder, settings)
    if (folder / "tokenizer.json").exists():
        return _load_json(folder / "tokenizer.json", settings)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _load_vocab_merges(folder, settings)
    if (folder / "tekken.json").exists():
        return _load_tekken(folder / "tekken.json", settings)
    if (folder / "tokenizer.model").exists():
        data = files.read_bytes(folder / "tokenizer.model", MOST_BYTES)
        load_model = _load_tiktoken if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data) else _load_sentencepiece
        return load_model(folder / "tokenizer.model", data, settings)
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if (folder / name).exists():
            raise UserError(f"{place(folder / name)}: {other} is missing beside it")
    return None


def eos_ids(folder: Path, tokenizer: Tokenizer | None = None, chat: bool = False) -> frozenset[int]:
    """All end-of-sequence ids: those of generation_config.json if it names any, else those of config.json.

    The tokenizer's eos_token is one more in a chat, which it was made for, and the only one if neither file names any.
    """
    own = [tokenizer.eos] if tokenizer and tokenizer.eos is not None else []
    for name in ("generation_config.json", "config.json"):
        settings = read_json(folder / name)
        value, text = settings.get("eos_token_id"), settings.get("text_config")
        if value is None and isinstance(text, dict):  # of a model of text and images
            value = text.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            text = f"eos_token_id must be an integer from 0 to {2**31 - 1} or a list of such, not {shown(value)}"
            raise UserError(f"{place(folder / name)}: {text}")
        if ids:
            return frozenset([*ids, *own] if chat else ids)
    return frozenset(own)


def _load_gguf(path: Path, settings: dict[str, Any]) -> Tokenizer | None:
    match gguf_file.tokenizer_kind(path):
        case "gpt2":
            return _completed(gguf_file.byte_level(path), path, path, settings)
        case "llama":
            return _load_sentencepiece(path, gguf_file.sentencepiece(path), settings)
    return None


def _load_json(path: Path, settings: dict[str, Any], tried: bool = False) -> Tokenizer:
    import tokenizers

    data = files.read_bytes(path, MOST_BYTES)
    if not tried and risky(path, data):
        _try(path)
    backend = _safely(path, tokenizers.Tokenizer.from_buffer, data)
    return _completed(backend, path, path.parent, settings)


def _completed(backend: Any, path: Path, folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """With the tokens that the settings add to a whole tokenizer of the library, `path`."""
    import tokenizers

    backend.no_truncation()  # a file may carry the settings of a training run
    backend.no_padding()
    if isinstance(backend.model, tokenizers.models.BPE):
        backend.model.dropout = None
    named = _named(settings, _class_tokens(folder, settings))
    present = {i: _flags(token) for i, token in backend.get_added_tokens_decoder().items()}
    _add_tokens(backend, folder, settings, named, present)
    # transformers ignores add_bos_token and add_eos_token beside a tokenizer.json: its post-processor says it all.
    return _wrap(backend, path, named, *_processed_ends(path, backend))


def _safely(path: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function of the library gives. UserError for all that it raises: nothing narrower, and panics."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise broken(path, error) from None
        raise


# The parts of a tokenizer.json, what lists more of them, and the kinds that do no harm whatever the text is.
_PARTS_OF = {
    "normalizer": ("normalizers", "NFC NFD NFKC NFKD Lowercase Strip StripAccents Prepend Replace"),
    "pre_tokenizer": ("pretokenizers", "ByteLevel Split Metaspace Digits Punctuation Whitespace WhitespaceSplit"),
    "post_processor": ("processors", "ByteLevel TemplateProcessing"),
    "decoder": ("decoders", "ByteLevel Replace ByteFallback Fuse Strip Metaspace"),
}


def risky(path: Path, data: bytes) -> bool:
    """Whether something in a tokenizer.json may end or hang a process that loads it. UserError for what surely would.

    The vocabulary, which comes last and is nearly all of the file, is not looked at.
    """
    start, text = data.find(b'"model"'), None
    try:
        text = files.parse_json(data[:start].rstrip().rstrip(b",") + b"}", "")
    except UserError:
        start = -1
    if start < 0 or not set(_PARTS_OF) <= set(text):
        text = files.parse_json(data, place(path))
    risky = bool(
        re.search(rb'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]', data[max(start, 0) :][:4000])
    )
    for name, (more, harmless) in _PARTS_OF.items():
        parts, growth = [text.get(name)], 1.0
        while parts:
            part = parts.pop()
            if not isinstance(part, dict):
                risky |= part is not None
            elif part.get("type") == "Sequence" and isinstance(part.get(more), list):
                parts += part[more]
            else:
                growth *= _growth(part)
                risky |= part.get("type") not in harmless.split() or _odd(part)
        if growth > MOST_GROWTH:
            raise UserError(
                f"{place(path)}: its {name} may make a text {growth:.3g} times as long, more than {MOST_GROWTH}"
            )
    return risky


def _growth(part: dict[str, Any]) -> float:
    """How many times as long a part may make a text."""
    pattern, content = part.get("pattern"), part.get("content")
    if part.get("type") == "Prepend":
        return max(1, len(str(part.get("prepend"))) / 16)
    if part.get("type") != "Replace" or not isinstance(content, str):
        return 1
    found = pattern.get("String") if isinstance(pattern, dict) else None
    if found == "":
        return math.inf
    return (
        max(1, len(content.encode("utf-8", "replace")) / len(found.encode("utf-8", "replace")))
        if found
        else len(content) + 1
    )


def _odd(part: dict[str, Any]) -> bool:
    """Whether a kind that does no harm has a setting that may."""
    if part["type"] == "Replace":  # what a regular expression does shows when it runs; an empty match panics
        return isinstance(part.get("pattern"), dict) and "Regex" in part["pattern"]
    if part["type"] == "Strip" and "content" in part:  # of a decoder
        return part.get("start") not in (0, 1) or part.get("stop") != 0
    if part["type"] == "TemplateProcessing":
        known = part.get("special_tokens")
        sides = [part.get(side) or [] for side in ("single", "pair")]
        if not all(isinstance(side, list) for side in sides):
            return True
        pieces = [piece for side in sides for piece in side]
        if not isinstance(known, dict) or not all(isinstance(piece, dict) for piece in pieces):
            return True
        return any(piece["SpecialToken"].get("id") not in known for piece in pieces if "SpecialToken" in piece)
    return False


def _try(path: Path) -> None:
    """UserError if a process that loads this tokenizer.json and uses it a little fails, or does not live through it."""
    try:
        answer = Child("tokenizer:try_out", TRY_SECONDS, TRY_MIB).ask(str(path))
    except Overrun as error:
        raise UserError(f"{place(path)}: the tokenizer {error}") from None
    if answer is not None:
        raise UserError(answer)


def try_out(name: str) -> str | None:
    """What is wrong with this tokenizer.json; None if it can encode and decode."""
    path = Path(name)
    try:
        tokenizer = _load_json(path, read_settings(path.parent), tried=True)
        for text in (
            "",
            "a",
            "Hello, world!\n\n  12345 \t",
            "".join(map(chr, range(1, 0x3000))),
            "你好 \U0001f600",
            "ab" * 500,
        ):
            tokenizer.decode(tokenizer.encode(text))
    except UserError as error:
        return str(error)
    return None


def _load_vocab_merges(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, path = files.read_json(folder / "vocab.json", most=MOST_BYTES), folder / "merges.txt"
    if any(type(i) is not int for i in vocab.values()):
        raise UserError(f"{place(folder / 'vocab.json')}: the ids must be integers")
    lines = files.read_text(path, MOST_BYTES).split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if bad := [merge for merge in merges if len(merge) != 2]:
        raise UserError(f"{place(path)}: a merge must be two tokens, not {shown(bad[0])}")
    backend = Tokenizer(_safely(path, models.BPE, vocab, merges))
    tokens = _class_tokens(folder, settings) or _CLASS_TOKENS["GPT2"]
    qwen = tokens is _CLASS_TOKENS["Qwen2"]
    letters = pre_tokenizers.ByteLevel(bool(settings.get("add_prefix_space")), use_regex=not qwen)
    if qwen:
        backend.normalizer = normalizers.NFC()
        letters = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), letters])
    backend.pre_tokenizer = letters
    backend.decoder = decoders.ByteLevel()
    named = _named(settings, tokens)
    for i, name in _add_tokens(backend, folder, settings, named, {}).items():
        # transformers takes the id that the library gives. Such a token would be another one than the model's.
        if backend.token_to_id(name) != i:
            got = backend.token_to_id(name)
            raise UserError(f"{place(folder)}: added token {shown(name)} must have id {i}, but gets {got}")
    if qwen:  # whose class adds them once more, without flags
        special = [token for value in settings.get("extra_special_tokens") or [] if (token := _token(value))]
        backend.add_special_tokens([token["content"] for token in [*named.values(), *special]])
    return _wrap(backend, path, named, *_chosen_ends(settings, named, backend.token_to_id))


def _wrap(
    backend: Any, path: Path, named: dict[str, Any], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> Tokenizer:
    """The `Tokenizer` of a `tokenizers.Tokenizer`."""
    # What the decoder makes of tokens shows how they are spelled.
    decode = partial(_safely, path, backend.decoder.decode) if backend.decoder else "".join
    texts = {space: decode([f"{space}a", f"{space}b"]) for space in (_BYTE_SPACE, _PIECE_SPACE)}
    space = next((space for space, text in texts.items() if text.removeprefix(" ") == "a b"), None)
    if space is None:
        raise UserError(f"{place(path)}: the decoder is neither byte-level nor sentencepiece-like")
    bytewise = decode(["<0x41>"]) == "A"
    added = backend.get_added_tokens_decoder()
    lock = Lock()  # whether special tokens are parsed is a state of the backend

    def split(text: str, parse_special: bool) -> list[int]:
        with lock:
            backend.encode_special_tokens = not parse_special
            return _safely(path, backend.encode, text, add_special_tokens=False).ids

    # The library skips a token that was special once, and not one that is special but normalized to another text.
    text_of = partial(_safely, path, backend.decode)
    hidden = {i for i in added if not text_of([i]) and text_of([i], skip_special_tokens=False)}

    def token_bytes(token: int) -> bytes:
        if token in hidden:
            return b""
        piece = backend.id_to_token(token) or ""
        if space == _PIECE_SPACE:
            return _piece_bytes(piece, bytewise)  # added tokens too: Gemma has its runs of spaces as such
        if token in added:
            return piece.encode()
        return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()

    vocab_size = max(backend.get_vocab().values(), default=-1) + 1
    special = {token.content: i for i, token in added.items() if token.special or i in hidden}
    bos, eos = (_id_of(named, side, backend.token_to_id) for side in ("bos", "eos"))
    return Tokenizer(split, token_bytes, vocab_size, texts[space] == "a b", prefix, suffix, special, bos, eos)


def _load_sentencepiece(path: Path, data: bytes, settings: dict[str, Any]) -> Tokenizer:
    import sentencepiece

    # No trial in a child: the library checks what it loads, and none of 600 files with changed bytes ended a process.
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except Exception:  # the library's own, of several kinds
        raise UserError(f"{place(path)}: neither a sentencepiece model nor tiktoken lines") from None
    size = model.vocab_size()
    own = {
        key: model.id_to_piece(i) for key, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())) if i >= 0
    }
    named = _named(settings, own)
    added = {i: _token(model.id_to_piece(i), special=True) for i in range(size) if model.is_control(i)}
    listed, others = _declared(path if gguf_file.is_gguf(path) else path.parent, settings, named)
    added |= {i: token for i, token in listed.items() if i >= size or token["special"]}
    taken = {token["content"] for token in added.values()}
    for token in others:  # a piece of the model, or a new token after all others
        if token["content"] not in taken:
            i = model.piece_to_id(token["content"])
            added[i if model.id_to_piece(i) == token["content"] else max([size - 1, *added]) + 1] = token
    ids = {token["content"]: i for i, token in added.items()}
    parts = _splitter(added.values())

    def split(text: str, parse_special: bool) -> list[int]:
        found = []
        for part, is_token in parts(text, parse_special):
            found += [ids[part]] if is_token else _safely(path, model.encode, part)
        return found

    def token_bytes(token: int) -> bytes:
        if token in added:
            return b"" if added[token]["special"] else added[token]["content"].encode()
        if not 0 <= token < size:
            return b""
        if model.is_unknown(token):
            return model.decode([token]).encode()
        return _piece_bytes(model.id_to_piece(token), model.is_byte(token))

    ends = _chosen_ends({"add_bos_token": "bos_token" in own} | settings, named, ids.get)
    drops_space = model.encode("a", out_type=str)[0].startswith(_PIECE_SPACE)
    special = {name: i for name, i in ids.items() if added[i]["special"]}
    bos, eos = (_id_of(named, side, ids.get) for side in ("bos", "eos"))
    return Tokenizer(split, token_bytes, max([size - 1, *added]) + 1, drops_space, *ends, special, bos, eos)


def _splitter(tokens: Iterable[dict[str, Any]]) -> Callable[[str, bool], Iterator[tuple[str, bool]]]:
    """A function that cuts a text into added tokens (True) and what is between them, heeding their flags."""
    from tokenizers import Tokenizer, models

    backend, lock = Tokenizer(models.WordLevel({"": 0}, "")), Lock()
    backend.add_tokens([_library_token(token | {"normalized": False}) for token in tokens])
    names = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}

    def parts(text: str, parse_special: bool) -> Iterator[tuple[str, bool]]:
        with lock:
            backend.encode_special_tokens = not parse_special
            found = backend.encode(text)
        for i, (start, end) in zip(found.ids, found.offsets, strict=True):
            yield (names[i], True) if i in names else (text[start:end], False)

    return parts


def _load_tiktoken(path: Path, data: bytes, settings: dict[str, Any]) -> Tokenizer:
    ranks = {}
    for n, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{place(path)}: line {n} is not a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or sum(len(token) == 1 for token in ranks) != 256:
        raise UserError(
            f"{place(path)}: ranks must be 0 to {len(ranks) - 1}, once each, and cover the 256 single bytes"
        )
    special = {f"<|{name}|>": len(ranks) + n for n, name in _LLAMA3_SPECIAL.items()}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return _wrap_ranks(path, LLAMA3_WORDS, ranks, special, settings, names)


def _load_tekken(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Mistral's own file: special tokens, and after them as many tokens of the vocabulary as the model has."""
    data = files.read_json(path, most=MOST_BYTES)
    try:
        config, listed = data["config"], data.get("special_tokens")
        words, size, first = (config[name] for name in ("pattern", "default_vocab_size", "default_num_special_tokens"))
        if listed is None:
            listed = [{"rank": i, "token_str": name} for i, name in enumerate(_TEKKEN_NAMES.split())]
        named = {token["token_str"]: token["rank"] for token in listed}
        filled = range(len(named), min(first, MOST_SPECIAL))
        special = named | {f"<SPECIAL_{i}>": i for i in filled}
        vocab = data["vocab"][: size - first]
        ranks = {base64.b64decode(token["token_bytes"], validate=True): first + token["rank"] for token in vocab}
        sound = isinstance(words, str) and all(isinstance(name, str) for name in named)
        sound &= len(ranks) == size - first and list(ranks.values()) == list(range(first, size))
        sound &= len(special) == first and sorted(special.values()) == list(range(first))
        sound &= sum(len(token) == 1 for token in ranks) == 256
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{place(path)}: not a vocabulary of Mistral's, with its pattern, sizes and special tokens")
    return _wrap_ranks(path, words, ranks, special, settings, _CLASS_TOKENS["Tekken"])


def _wrap_ranks(
    path: Path,
    words: str,
    ranks: dict[bytes, int],
    special: dict[str, int],
    settings: dict[str, Any],
    names: dict[str, str],
) -> Tokenizer:
    """The `Tokenizer` of tokens by rank, which are their ids. names: the special tokens that have a part."""
    import tiktoken

    pieces = {rank: token for token, rank in ranks.items()}
    coder = _safely(path, tiktoken.Encoding, path.name, pat_str=words, mergeable_ranks=ranks, special_tokens=special)
    settings = {"add_bos_token": True} | settings
    named = _named(settings, names)
    return Tokenizer(
        lambda text, parse: _safely(
            path, coder.encode, text, allowed_special="all" if parse else set(), disallowed_special=()
        ),
        lambda token: pieces.get(token, b""),
        coder.n_vocab,
        False,
        *_chosen_ends(settings, named, special.get),
        special,
        *(_id_of(named, side, special.get) for side in ("bos", "eos")),
    )


def _piece_bytes(piece: str, bytewise: bool) -> bytes:
    """Bytes of a piece spelled in sentencepiece's way; with `bytewise` those like "<0x0A>" stand for one byte."""
    if bytewise and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_PIECE_SPACE, " ").encode()


def _processed_ends(path: Path, backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the post-processor puts before and after a text."""
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0}, "a"))  # which has a token for every text
    if backend.post_processor is not None:
        plain.post_processor = backend.post_processor
    sample = _safely(path, plain.encode, "a")
    start = (sample.special_tokens_mask + [0]).index(0)
    return tuple(sample.ids[:start]), tuple(sample.ids[start + sample.special_tokens_mask.count(0) :])


def _chosen_ends(
    settings: dict[str, Any], named: dict[str, Any], id_of: Callable[[str], int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that add_bos_token and add_eos_token put before and after a text."""
    bos, eos = (_id_of(named, side, id_of) if settings.get(f"add_{side}_token") else None for side in ("bos", "eos"))
    return () if bos is None else (bos,), () if eos is None else (eos,)


def _id_of(named: dict[str, Any], side: str, id_of: Callable[[str], int | None]) -> int | None:
    token = named.get(f"{side}_token")
    return None if token is None else id_of(token["content"])


def special_tokens(folder: Path) -> dict[str, str]:
    """Text of each token that the settings give a part, such as {"bos_token": "<s>"}."""
    settings = read_settings(folder)
    return {key: token["content"] for key, token in _named(settings, _class_tokens(folder, settings)).items()}


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what special_tokens_map.json says on top, as transformers joins them.

    "extra_special_tokens" is a list and "model_specific_special_tokens" an object, whatever they are called there.
    """

    def read(name: str) -> dict[str, Any]:
        found = dict(read_json(folder / name))
        kinds = {"model_specific_special_tokens": dict} | dict.fromkeys(_MORE, (list, dict))
        if wrong := [
            key for key, kind in kinds.items() if found.get(key) is not None and not isinstance(found[key], kind)
        ]:
            value = shown(found[wrong[0]])
            raise UserError(f"{place(folder / name)}: {wrong[0]} must be a list or an object of tokens, not {value}")
        return found

    def tidy() -> None:
        if _MORE[0] in settings and not settings.get(_MORE[1]):
            settings[_MORE[1]] = settings.pop(_MORE[0])
        if isinstance(settings.get(_MORE[1]), dict):
            parts = settings.get("model_specific_special_tokens") or {}
            settings["model_specific_special_tokens"] = parts | settings.pop(_MORE[1])

    settings = read("tokenizer_config.json")
    tidy()
    if "added_tokens_decoder" not in settings:  # else it is the newer form, which has everything
        more, own = read("special_tokens_map.json"), settings.get(_MORE[1])
        settings |= more
        if own is not None:
            settings[_MORE[1]] = own + [token for token in more.get(_MORE[1]) or [] if token not in own]
            settings.pop(_MORE[0], None)
        tidy()
    return settings


_MORE = ("additional_special_tokens", "extra_special_tokens")  # the old name and the new one


# The parts that transformers knows, in its order: tokens that are nowhere else get their ids in that order.
_PARTS = [f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
# What a tokenizer class names when the settings do not.
_CLASS_TOKENS = {
    "GPT2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "Tekken": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}


def _class_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The tokens that the class of the tokenizer names, or, where no file says which one it is, that of the model."""
    kind = settings.get("tokenizer_class")
    if (folder / "tekken.json").exists() and not (folder / "tokenizer.json").exists():
        kind = "Tekken"
    elif kind is None and not (folder / "tokenizer.json").exists():
        model = str(read_json(folder / "config.json").get("model_type"))
        kind = "Qwen2" if model.startswith("qwen") else "GPT2" if model in ("gpt2", "opt") else None
    return next((tokens for name, tokens in _CLASS_TOKENS.items() if str(kind).startswith(name)), {})


def _flags(token: Any) -> dict[str, Any]:
    """An AddedToken of the library as an object of a settings file."""
    return {name: getattr(token, name) for name in ("content", *_FLAGS)}


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _token(value: Any, special: bool | None = None) -> dict[str, Any] | None:
    """The token that a settings file gives as a text or as an object, with its flags; None if it names none."""
    if value is None:
        return None
    token = {"content": value} if isinstance(value, str) else value
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise UserError(
            f"the tokenizer's settings: a token must be a text or an object with its content, not {shown(value)}"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in token["content"]):
        raise UserError(f"the tokenizer's settings: the token {shown(token['content'])} holds half of a surrogate pair")
    if wrong := [name for name in _FLAGS if type(token.get(name, False)) is not bool]:
        raise UserError(
            f"the tokenizer's settings: {wrong[0]} of the token {shown(token['content'])} must be true or false"
        )
    special = bool(token.get("special", isinstance(value, str))) if special is None else special
    flags = {name: token.get(name, False) for name in _FLAGS}
    return flags | {"content": token["content"], "special": special, "normalized": token.get("normalized", not special)}


def _named(settings: dict[str, Any], of_class: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The tokens that have a part, such as eos_token, by that part."""
    settings = of_class | settings
    named = {part: settings.get(part) for part in _PARTS}
    own = [key for key, value in settings.items() if key.endswith("_token") and isinstance(value, (str, dict))]
    named |= {key: settings[key] for key in sorted(own, key=lambda key: isinstance(settings[key], str))}
    named |= settings.get("model_specific_special_tokens") or {}
    return {part: token for part, value in named.items() if (token := _token(value, special=True))}


def _listed(path: Path, settings: dict[str, Any], special: Collection[str]) -> dict[int, dict[str, Any]]:
    """The added tokens by the ids that tokenizer_config.json gives them, or else added_tokens.json."""
    where, listed = "tokenizer_config.json: added_tokens_decoder", settings.get("added_tokens_decoder")
    if listed is None:
        where, names = "added_tokens.json", read_json(path / "added_tokens.json")
        listed = {str(i): {"content": name, "special": name in special} for name, i in names.items()}
    if not isinstance(listed, dict):
        raise UserError(f"{place(path)}: malformed added tokens: {where} must be an object, not {shown(listed)}")
    tokens = {}
    for i, value in listed.items():
        if not re.fullmatch("[0-9]{1,9}", str(i)) or not isinstance(value, dict):
            raise UserError(f"{place(path)}: malformed added tokens: {where} has {shown({i: value})}")
        tokens[int(i)] = _token(value)
    return dict(sorted(tokens.items()))


def _declared(
    folder: Path, settings: dict[str, Any], named: dict[str, dict[str, Any]]
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """The tokens that the settings list, by id, and those that they only name."""
    others = [
        *named.values(),
        *(token for value in settings.get("extra_special_tokens") or [] if (token := _token(value, special=True))),
    ]
    listed = _listed(folder, settings, {token["content"] for token in others})
    parts = {token["content"] for token in named.values()}
    return {
        i: token | {"special": token["special"] or token["content"] in parts} for i, token in listed.items()
    }, others


def _add_tokens(
    backend: Any,
    folder: Path,
    settings: dict[str, Any],
    named: dict[str, dict[str, Any]],
    present: dict[int, dict[str, Any]],
) -> dict[int, str]:
    """Add what the settings list and name to the library's tokenizer, in the order and with the flags of transformers.

    present: what it has already. Returns the listed tokens by the ids that they should have.
    """
    listed, others = _declared(folder, settings, named)
    tokens = listed
    if "added_tokens_decoder" not in settings:  # else what is named and present already keeps its flags
        parts = {token["content"] for token in named.values()}
        again = {i: token | {"special": token["special"] or token["content"] in parts} for i, token in present.items()}
        tokens = dict(sorted((listed | again).items()))
    known = {token["content"] for token in [*present.values(), *tokens.values()]}
    adding = [*tokens.values(), *(token for token in others if token["content"] not in known)]
    backend.add_tokens([_library_token(token) for token in adding])
    return {i: token["content"] for i, token in listed.items()}


def _library_token(token: dict[str, Any]) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token["content"], **{name: token[name] for name in _FLAGS})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if gguf_file.is_gguf(path.parent):
        return gguf_file.read_json(path)
    return files.read_json(path) if path.exists() else {}


def broken(path: Path, error: Exception) -> UserError:
    """The error that says in one line what is wrong with a file."""
    return UserError(f"{place(path)}: {visible(str(error)[:1000])[:200] or type(error).__name__}")
