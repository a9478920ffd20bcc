"""Reading what users give and writing what they ask for: every failure is one line, and no file is ever half written.

Inputs are read up to a limit, so that a device that never ends is an error and not all of memory. Outputs are written
beside their place and renamed into it.
"""

import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from errors import UserError, cut, place, reason, shown

MIB = 1 << 20
MOST_BYTES = 256 * MIB  # of an input that is read as a whole
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
    with accessing(path):
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"{place(path)} is a folder; name a file")
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise UserError(f"{place(path)} is no regular file; name a file that ends")
        with open(path, "rb") as file:
            data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{place(path)} holds more than {most // MIB} MiB, the most that is read; shorten it")
    return data


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


def parse_json(data: bytes | str, where: str, kind: type | tuple[type, ...] = dict, deepest: int = DEEPEST) -> Any:
    """The value in a JSON text, of one of these kinds (dict, list, ...).

    UserError, which begins with `where` if that is not empty: not JSON, another kind, NaN or Infinity (also as 1e999),
    an integer of more than 400 digits, or lists and objects more than `deepest` in each other.
    """

    def refuse(text: str) -> NoReturn:
        raise UserError(f"{begin}{cut(text)} is not a finite number")

    def real(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(text)

    def whole(text: str) -> int:
        return int(text) if len(text) <= DIGITS else refuse(text)

    begin = f"{where}: " if where else ""
    text = data if isinstance(data, str) else decoded(data, where or "it")
    if _depth(text) > deepest:
        raise UserError(f"{begin}lists and objects are more than {deepest} deep in each other")
    try:
        value = json.loads(text, parse_float=real, parse_int=whole, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{begin}not JSON ({error})") from None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        wanted = " or ".join(JSON_NAMES.get(each, each.__name__) for each in kinds)
        raise UserError(f"{begin}not {wanted} but {shown(value)}")
    return value


JSON_NAMES = {dict: "a JSON object", list: "a JSON list", str: "a text", int: "an integer"}
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
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".new", dir=path.parent)
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


def check_output(path: Path | str, name: str) -> None:
    """UserError unless a regular file can be there: `name` is the flag that asks for it."""
    path = Path(path)
    with accessing(path):
        if not path.parent.is_dir():
            raise UserError(f"{name} {place(path)}: that folder does not exist; make it first")
        if path.is_dir():
            raise UserError(f"{name} {place(path)} is a folder; name a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{name} {place(path)} is no regular file; name one")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{name} {place(path)} cannot be written; check its permissions")


def check_apart(outputs: Mapping[str, Path | str], inputs: Mapping[str, Path | str]) -> None:
    """UserError if a path that a run writes is another path of the run. Keys are the flags that name them."""
    named = list(outputs.items())
    for index, (flag, path) in enumerate(named):
        for other, taken in [*named[:index], *inputs.items()]:
            if same_file(path, taken):
                raise UserError(f"{flag} {place(path)} is also {other}; give it a place of its own")


def same_file(one: Path | str, other: Path | str) -> bool:
    """Whether two paths, which need not exist, lead to one file."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
