"""Reading what users give and writing what they ask for: every failure is one line, and no file is ever half written.

Inputs are read up to a limit, so that a device that never ends is an error and not all of memory. Outputs are written
beside their place and renamed into it, or appended to by one process, a whole line at a time.
"""

import fcntl
import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b, sha256
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from errors import UserError, cut, in_bytes, place, reason, shown

MIB = 1 << 20
MOST_BYTES = 256 * MIB  # of an input that is read as a whole
PROMPT_BYTES = 16 * MIB  # of a prompt, or of a line of a job: some 4 million tokens, which take half a GiB to encode
DEEPEST = 64  # lists and objects in each other that a JSON file of ours, or of a checkpoint, may need
DIGITS = 400  # of an integer in JSON


@contextmanager
def accessing(path: Path | str) -> Iterator[None]:
    """UserError that names `path` for whatever the operating system refuses inside."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"{shown(str(path))} cannot be the name of a file")
    try:
        yield
    except OSError as error:
        raise UserError(f"{place(path)}: {error.strerror or reason(error)}") from error


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """All bytes of a file or of a pipe that ends. UserError: not there, a folder, a device, or more than `most`."""
    with opened(path) as file, accessing(path):
        return read_stream(file, place(path), most)


def opened(path: Path | str) -> BinaryIO:
    """The file or pipe, to be read. UserError: not there, a folder, a device."""
    with accessing(path):
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"{place(path)} is a folder; name a file")
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise UserError(f"{place(path)} is no regular file; name a file that ends")
        return open(path, "rb")  # noqa: SIM115


def read_stream(file: BinaryIO, where: str, most: int = MOST_BYTES) -> bytes:
    """All bytes of an open file. UserError, which begins with `where`, if they are more than `most`."""
    data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{where} holds more than {in_bytes(most)}, the most that is read; shorten it")
    return data


class RawLine(NamedTuple):
    number: int  # from 1
    data: bytes | None  # with its end; None for a line that is longer than what may be held
    size: int
    digest: int  # of its bytes, 64 bits


class Lines:
    """The lines of a file, of which none longer than `most` bytes is held. `sha256` is that of all read so far.

    start: the byte at which the first one begins.
    """

    def __init__(self, path: Path | str, most: int = PROMPT_BYTES, start: int = 0):
        self.path, self.most, self.start, self.sha256 = path, most, start, sha256()

    def __iter__(self) -> Iterator[RawLine]:
        with opened(self.path) as file:
            if self.start:
                file.seek(self.start)
            number = 1
            while part := self._part(file):
                data, size, digest = part, len(part), blake2b(part, digest_size=8)
                while len(part) > self.most and not part.endswith(b"\n"):
                    data, part = None, self._part(file)
                    size += len(part)
                    digest.update(part)
                yield RawLine(number, data, size, int.from_bytes(digest.digest()))
                number += 1

    def _part(self, file: BinaryIO) -> bytes:
        with accessing(self.path):
            part = file.readline(self.most + 1)
        self.sha256.update(part)
        return part


def read_text(path: Path | str, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file; as `read_bytes`."""
    return decoded(read_bytes(path, most), place(path))


def decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte {data[error.start]:#04x} at {error.start}") from None


def read_json(path: Path | str, kind: type | tuple[type, ...] = dict, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file, of one of these kinds. As `parse_json`."""
    return parse_json(read_bytes(path, most), place(path), kind)


def parse_json(data: bytes | str, where: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The value in a JSON text, of one of these kinds (dict, list, ...).

    UserError, which begins with `where` if that is not empty: not JSON, another kind, NaN or Infinity (also as 1e999),
    an integer of more than 400 digits, or lists and objects more than DEEPEST in each other.
    """

    def refuse(text: str) -> NoReturn:
        raise UserError(f"{begin}{cut(text)} is not a finite number")

    def real(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(text)

    def whole(text: str) -> int:
        return int(text) if len(text) <= DIGITS else refuse(text)

    begin = f"{where}: " if where else ""
    text = data if isinstance(data, str) else decoded(data, where or "it")
    if _depth(text) > DEEPEST:
        raise UserError(f"{begin}lists and objects are more than {DEEPEST} deep in each other")
    try:
        value = json.loads(text, parse_float=real, parse_int=whole, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{begin}not JSON ({error})") from None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        wanted = " or ".join(JSON_NAMES.get(each, each.__name__) for each in kinds)
        raise UserError(f"{begin}not {wanted} but {shown(value)}")
    return value


JSON_NAMES = {
    dict: "a JSON object",
    list: "a JSON list",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    None: "null",
}
Kind = (
    Any  # a type or None, a range of integers, [kind] for a list, (kind, kind) for either, {name: kind} for an object
)
NATURAL = range(2**62)
POSITIVE = range(1, 2**62)


def checked(value: dict[str, Any], fields: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """The JSON object. UserError, which begins with `where`, unless each of these fields is there and of its kind."""
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"{where}: {name!r} is missing")
        if not is_a(value[name], kind):
            raise UserError(f"{where}: {name!r} must be {kind_name(kind)}, not {shown(value[name])}")
    return value


def is_a(value: Any, kind: Kind) -> bool:
    """Whether a JSON value is of this kind. An integer is a number too; true is neither."""
    if isinstance(kind, tuple):
        return any(is_a(value, each) for each in kind)
    if isinstance(kind, list):
        return type(value) is list and all(is_a(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        return type(value) is dict and all(name in value and is_a(value[name], each) for name, each in kind.items())
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if kind is float:  # what one can hold: an integer may be larger
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return value is None if kind is None else type(value) is kind


def kind_name(kind: Kind) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(kind_name, kind))
    if isinstance(kind, list):
        return f"a list, each of it {kind_name(kind[0])}"
    if isinstance(kind, dict):
        return f"an object ({', '.join(f'{name}: {kind_name(each)}' for name, each in kind.items())})"
    return f"an integer of at least {kind.start}" if isinstance(kind, range) else JSON_NAMES[kind]


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _depth(text: str) -> int:
    """How deep lists and objects are in each other, brackets in strings apart. The parser itself would recurse."""
    deepest = depth = 0
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def write_json(path: Path | str, value: Any, indent: int | None = None) -> None:
    """A JSON file, replaced whole. Numbers that are not finite are a fault of ours: ValueError."""
    write_whole(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_whole(path: Path | str, content: str | bytes | Callable[[Any], None]) -> None:
    """Replace a file by this content, or by what the callable writes. At any moment it is the old or the new one."""
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    with accessing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".new", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            with suppress(OSError):
                mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
                os.chmod(name, stat.S_IMODE(mode))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def exclusive(path: Path | str) -> FileIO:
    """The file, made if it is not there, to be read and appended to by nobody else. UserError if somebody else does."""
    with accessing(path):
        file = open(path, "ab+", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{place(path)} is being written by another run") from None
    return file


def append(file: FileIO, data: bytes, path: Path | str) -> None:
    """Add all of `data` to an exclusive file, or nothing and a UserError."""
    about = os.fstat(file.fileno())
    if not about.st_nlink:
        raise UserError(f"{place(path)} was removed while it was written; run it again")
    try:
        with accessing(path):
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
    except UserError:
        file.truncate(about.st_size)
        raise


def check_output(path: Path | str, name: str) -> None:
    """UserError unless a regular file can be there: `name` is the flag that asks for it."""
    with accessing(path):
        path = Path(path)
        if not path.parent.is_dir():
            raise UserError(f"{name} {place(path)}: that folder does not exist; make it first")
        if path.is_dir():
            raise UserError(f"{name} {place(path)} is a folder; name a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{name} {place(path)} is no regular file; name one")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{name} {place(path)} cannot be written; check its permissions")
        check_folder(Path(os.path.realpath(path)).parent, name)


def check_folder(path: Path, name: str) -> None:
    """UserError unless files can be made in this folder."""
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{name}: no file can be made in {place(path)}: {error.strerror or reason(error)}") from error


CHECKPOINT_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|.*\.(safetensors|bin)(\.index\.json)?|.*\.gguf"
)


def check_apart(outputs: Mapping[str, Path | str], inputs: Mapping[str, Path | str]) -> None:
    """UserError if a path that a run writes is another path of the run. Keys are the flags that name them.

    An input that is a folder stands for those files in it that make a checkpoint; others may lie beside them. The
    standard streams are paths of every run.
    """
    named = list(outputs.items())
    for path in (*outputs.values(), *inputs.values()):
        with accessing(path):  # it can be a name
            pass
    for index, (flag, path) in enumerate(named):
        for other, taken in [*named[:index], *inputs.items()]:
            if same_file(path, taken):
                raise UserError(f"{flag} {place(path)} is also {other}; give it a place of its own")
        for other, taken in inputs.items():
            parts = Path(taken).iterdir() if os.path.isdir(taken) else ()
            if any(same_file(path, file) for file in parts if CHECKPOINT_FILE.fullmatch(file.name)):
                raise UserError(f"{flag} {place(path)} is a file of {other}; give it a place of its own")
        for stream, number in (("standard input", 0), ("standard output", 1), ("standard error", 2)):
            with suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(number)):
                    raise UserError(f"{flag} {place(path)} is also {stream}; give it a place of its own")


def same_file(one: Path | str, other: Path | str) -> bool:
    """Whether two paths, which need not exist, lead to one file."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
