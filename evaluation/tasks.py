"""What a task is, and running tasks over cells: in batches, each result written as it is made, resumable."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from errors import UserError, cut, place
from evaluation.cells import FULL, Batch, Cell, check
from files import MOST_BYTES, NATURAL, POSITIVE, Lines, accessing, append, check_output, checked, exclusive, parse_json
from model import Transformer

RESULT = {  # what every line says
    "task": str,
    "row": NATURAL,
    "policy": str,
    "layers": str,
    "p": (None, float),
    "budget": (None, float),
    "kv_share": float,
}


@dataclass(frozen=True)
class Row:
    """A prompt, what should follow it, and what else its results are to say.

    question: what is asked about the prompt once that is compressed; in other rows the prompt holds it.
    """

    number: int
    ids: list[int]
    expected: Any
    about: dict = field(default_factory=dict)
    question: list[int] = field(default_factory=list)

    def asked_later(self, count: int) -> "Row":
        """The same with the last `count` tokens of the prompt as a question."""
        return replace(self, ids=self.ids[:-count], question=self.ids[-count:])


class Task(Protocol):
    name: str
    new: int  # tokens after the prompt
    metric: str  # the number of a result that counts most
    rows: list[Row]

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        """What comes of each row under `cell`, as JSON; numbers under the names of metrics."""


class Log:
    """A jsonl file with one line per result. Its first line holds the settings that the results depend on.

    needed: for each task the fields of a result that the summary reads, and their kinds (`files.checked`). layers: how
    many the model has, as a signal and a plan must. UserError if the file is there and `resume` is not asked for, if
    its settings are others, if a line is no result, or if another run writes to it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict,
        resume: bool,
        needed: Mapping[str, Mapping[str, Any]] | None = None,
        layers: int | None = None,
    ):
        self.path, self.needed, self.layers, self.records, self.unwritten = path, needed or {}, layers, {}, []
        header = json.dumps({"settings": settings}) + "\n"
        with accessing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path, "--out")
        if not resume and path.exists() and path.stat().st_size:
            raise UserError(f"{place(path)} holds results; go on with --resume, or give another --out")
        self.file = exclusive(path)
        try:
            whole = self._read(json.loads(header)["settings"], header.encode())
        except UserError:
            self.close()
            raise
        self.file.truncate(whole)  # without a line that an interruption has cut off
        if not whole:
            append(self.file, header.encode(), path)

    def _read(self, settings: dict, header: bytes) -> int:
        """Take in the results that are there; the bytes that they and the settings take."""
        whole, lines = 0, {}
        for number, raw, size, _ in Lines(self.path, MOST_BYTES):
            where = f"{place(self.path)} line {number} is no result (give another --out)"
            if raw is None:
                raise UserError(f"{where}: it is {size / 2**20:,.0f} MiB long")
            if not raw.endswith(b"\n"):
                if number == 1 and not header.startswith(raw):
                    raise UserError(f"{where}: the settings of a run are the first line of its results")
                break
            record = parse_json(raw, where)
            if number == 1:
                first = checked(record, {"settings": dict}, where)["settings"]
                names = settings | first
                if differ := [cut(name) for name in names if (name, first.get(name)) != (name, settings.get(name))]:
                    wrong = cut(", ".join(differ))
                    raise UserError(f"{place(self.path)} was made with other settings ({wrong}); give another --out")
            else:
                checked(record, RESULT, where)
                checked(record, self.needed.get(record["task"], {}), where)
                if record["policy"] == FULL.policy:
                    checked(record, {"signal": [float]}, where)
                if "plan" in record:
                    checked(record, {"plan": [POSITIVE]}, where)
                for name in ("signal", "plan"):
                    if self.layers is not None and name in record and len(record[name]) != self.layers:
                        raise UserError(f"{where}: its {name} has {len(record[name])} layers, the model {self.layers}")
                if (earlier := lines.setdefault(self._key(record), number)) != number:
                    raise UserError(f"{where}: it is the result of line {earlier} again")
                self._keep(record)
            whole += size
        return whole

    @staticmethod
    def _key(record: dict) -> tuple:
        return (record["task"], record["row"], *(record[name] for name in asdict(FULL)))

    def _keep(self, record: dict) -> None:
        """What the summary needs: a slow suite has half a million results, and texts are the most of them."""
        self.records[self._key(record)] = {name: v for name, v in record.items() if not isinstance(v, str)}

    def has(self, task: Task, row: Row, cell: Cell) -> bool:
        return self._key({"task": task.name, "row": row.number, **asdict(cell)}) in self.records

    def add(self, record: dict) -> None:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                row = f"{record['task']}, row {record['row']}, {record['policy']} x {record['layers']}"
                raise UserError(f"{row}: {name} is {value}; the model's numbers overflow, so try another --dtype")
        self.unwritten.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._keep(record)

    def flush(self) -> None:
        """To the disk, all that was added, or nothing of it."""
        append(self.file, b"".join(self.unwritten), self.path)
        self.unwritten = []

    def close(self) -> None:
        """Let others write to it."""
        self.file.close()

    def of(self, task: Task, cell: Cell) -> list[dict]:
        """The results of every row, in order."""
        return [self.records[self._key({"task": task.name, "row": row.number, **asdict(cell)})] for row in task.rows]


def batches(rows: Iterable[Row], size: int, slack: float = 0.1) -> Iterator[list[Row]]:
    """Rows of about the same length (within `slack` of the longest), `size` at most, longest first.

    A batch has one budget and one plan, so a row should not get those of a much longer one. Questions of a batch have
    the same length: they go through the model together.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.question), -len(row.ids))):
        other = batch and len(row.question) != len(batch[0].question)
        if batch and (other or len(batch) == size or len(row.ids) < (1 - slack) * len(batch[0].ids)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_all(model: Transformer, tasks: Sequence[Task], cells: Sequence[Cell], size: int) -> None:
    """UserError, before anything has run, if a row is too long for the model or a budget too small for a policy."""
    for task in tasks:
        for rows in batches(task.rows, size):
            for cell in cells:
                check(model, cell, rows[0].ids, len(rows[0].question) + task.new)


def run(
    model: Transformer, tasks: Sequence[Task], cells: Sequence[Cell], log: Log, size: int, compile: bool = False
) -> None:
    """Fill the log with what it lacks. Batches are always whole ones: a resumed run gives the same numbers."""
    work = [(task, rows) for task in tasks for rows in batches(task.rows, size)]
    with tqdm(total=sum(len(rows) for _, rows in work) * len(cells), unit="result", smoothing=0.05) as bar:
        for task, rows in work:
            missing = [cell for cell in cells if not all(log.has(task, row, cell) for row in rows)]
            bar.set_description(task.name)
            bar.update(len(rows) * (len(cells) - len(missing)))
            if not missing:
                continue
            new = len(rows[0].question) + task.new
            batch = Batch(model, missing, [row.ids for row in rows], new, compile)
            for cell in missing:
                for index, (row, result) in enumerate(zip(rows, task.results(batch, cell, rows), strict=True)):
                    record = {"task": task.name, "row": row.number, **asdict(cell), **row.about, **result}
                    record["kv_share"] = batch.kv_share
                    if index == 0:
                        record["plan"] = batch.plan
                    if cell == FULL:
                        record["signal"] = [round(signal, 5) for signal in batch.signals[index].tolist()]
                    if not log.has(task, row, cell):
                        log.add(record)
                log.flush()
                bar.update(len(rows))
