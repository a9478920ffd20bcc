"""The one class of error that a user can put right, and how a value stands in its line."""

import importlib
from collections.abc import Sequence
from numbers import Integral
from types import ModuleType
from typing import Any

LONGEST = 80  # characters of a value in an error


class UserError(ValueError):
    """Something a user can put right: a file, a flag, an option, a request.

    Its text is one line that names the value, the limit and the way out. The command lines print it and exit with code
    2 (commandline.py); every other exception is a fault of this project and keeps its traceback.
    """


def shown(value: Any) -> str:
    """A value as an error shows it: strings quoted, nothing that moves a cursor, at most 80 characters."""
    try:
        text = repr(value)
    except Exception:  # a value of somebody else's class, or an integer with more digits than Python writes
        text = f"<{type(value).__name__}>"
    return cut(text)


def cut(text: str, most: int = LONGEST) -> str:
    """At most 80 characters of a text, or `most`, without control characters."""
    text = visible(text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def in_bytes(amount: float) -> str:
    """An amount of bytes in the unit that suits it."""
    amount = min(amount, 1e100)  # an integer may be too large for a division
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def place(path: Any) -> str:
    """The last 80 characters of a path, which say more than its first ones."""
    text = visible(str(path))
    return text if len(text) <= LONGEST else "..." + text[3 - LONGEST :]


def visible(text: str) -> str:
    """One line of the text: runs of blanks are one blank, what cannot be printed is escaped."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def reason(error: BaseException) -> str:
    """The first line of what an error says, cut like a value, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return cut(lines[0]) if lines else type(error).__name__


def optional(package: str) -> ModuleType:
    """A package that only some runs need. UserError that says how to get it, where it cannot be imported."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:  # the package, or one that it needs itself
        needs = "" if error.name == package.partition(".")[0] else f", which {package} needs"
        raise UserError(f"{error.name} is not installed{needs}: pip install {error.name}") from error


def whole(value: Any, name: str, least: int | None = None) -> int:
    """An integer, of Python or of numpy, of at least `least`. UserError for all else, True and False included."""
    if type(value) is not int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name} must be an integer, not {shown(value)}")
        value = int(value)
    if least is not None and value < least:
        raise UserError(f"{name} must be at least {least}, not {shown(value)}")
    return value


def integers(values: Any, name: str) -> list[int]:
    """The integers in a sequence, a numpy array or a tensor of one dimension; UserError for anything else."""
    if type(values) is list and all(type(value) is int for value in values):
        return values
    if hasattr(values, "tolist"):
        values = values.tolist()  # what is no integer of one dimension gives no integers
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise UserError(f"{name} must be a sequence of integers, not {shown(values)}")
    return [whole(value, f"each of {name}") for value in values]
