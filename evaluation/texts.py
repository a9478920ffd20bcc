"""Texts that are read, and that facts are hidden in: a UTF-8 file, or documents of a jsonl file.

A line of a jsonl file is a document if it has one of the fields in FIELDS; LongBench's news writes NEWLINE_CHAR for a
line break. Nothing is ever read across two documents.
"""

from pathlib import Path

from errors import UserError, cut, place
from evaluation.standard import MOST_DATA
from files import checked, parse_json, read_bytes, read_text

FIELDS = ("context", "article", "text", "document")
LINE_BREAK = "NEWLINE_CHAR"


def documents(path: str, skip: int = 0) -> list[str]:
    """The texts of a file, but for the first `skip`. UserError, one line, if there is none."""
    if Path(path).suffix != ".jsonl":
        texts = [read_text(path)]
    else:
        texts = []
        for number, line in enumerate(read_bytes(path, MOST_DATA).splitlines(), 1):
            if line.strip():
                where = f"{place(path)} line {number}"
                record = parse_json(line, where)
                name = next((name for name in FIELDS if name in record), None)
                if name is None:
                    has = cut(", ".join(record))
                    raise UserError(f"{where} has the fields {has}; a document is in one of {', '.join(FIELDS)}")
                texts.append(checked(record, {name: str}, where)[name].replace(LINE_BREAK, "\n"))
    if len(texts) <= skip:
        few = f"{place(path)} holds {len(texts)} {'text' if len(texts) == 1 else 'texts'}"
        raise UserError(f"{few}; --skip {skip} leaves none")
    return texts[skip:]
