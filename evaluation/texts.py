"""Texts that are read, and that numbers are hidden in: a UTF-8 file, documents of a jsonl file, or Python source.

A line of a jsonl file is a document if it has one of the fields in FIELDS; LongBench's news writes NEWLINE_CHAR for a
line break. Nothing is ever read across two documents.
"""

import sysconfig
from pathlib import Path

from errors import UserError, cut, place
from files import MOST_BYTES, checked, parse_json, read_bytes, read_text

MOST_DATA = 4 * MOST_BYTES  # of one jsonl file: the largest of LongBench has 60 MB
FIELDS = ("context", "article", "text", "document")
LINE_BREAK = "NEWLINE_CHAR"
SKIPPED = set(
    "site-packages test tests idlelib lib2to3 ensurepip __pycache__ turtledemo _vendor pydoc_data encodings".split()
)


def records(path: Path | str, most: int | None = None) -> list[tuple[str, dict]]:
    """The objects in the first `most` lines of a jsonl file, each behind what an error about it begins with."""
    lines = enumerate(read_bytes(path, MOST_DATA).splitlines()[:most], 1)
    named = ((f"{place(path)} line {number}", line) for number, line in lines if line.strip())
    return [(where, parse_json(line, where)) for where, line in named]


def documents(path: str, skip: int = 0) -> list[str]:
    """The texts of a file, but for the first `skip`. UserError, one line, if there is none."""
    texts = [document(*each) for each in records(path)] if Path(path).suffix == ".jsonl" else [read_text(path)]
    if len(texts) <= skip:
        raise UserError(f"{place(path)} holds no more than {len(texts)} texts; --skip {skip} leaves none")
    return texts[skip:]


def document(where: str, record: dict) -> str:
    name = next((name for name in FIELDS if name in record), None)
    if name is None:
        has = cut(", ".join(record))
        raise UserError(f"{where} has the fields {has}; a document is in one of {', '.join(FIELDS)}")
    return checked(record, {name: str}, where)[name].replace(LINE_BREAK, "\n")


def python_source() -> str:
    """Every 40th file of the interpreter's own library: the embedded model was trained on the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in sorted(root.rglob("*.py")) if not SKIPPED & {*path.relative_to(root).parts})
    files = [path for path in files if path.stat().st_size > 500][::40]
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
