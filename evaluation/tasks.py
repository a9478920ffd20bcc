"""What a task is, its results in a file, and running tasks over cells, each result written as it is made."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from errors import UserError, cut, place
from evaluation.cells import Batch, Cell, check
from files import MOST_BYTES, NATURAL, POSITIVE, Lines, append, checked, exclusive, parse_json
from model import Transformer
from parallel import agreed, shard

CELL = {"policy": str, "layers": str, "budget": (None, float)}
RESULT = {"task": str, "row": NATURAL, **CELL, "kv_share": float}  # what every line says


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


class Task(Protocol):
    name: str
    new: int  # tokens after the prompt
    metrics: Sequence[str]  # the numbers of a result; the first counts most
    rows: list[Row]

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        """What comes of each row under `cell`, as JSON; numbers under the names of metrics."""


class Results:
    """The numbers of each row of the tasks under each cell, as a log holds them."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = {task.name: task for task in tasks}
        self.records: dict[tuple[str, int, Cell], dict] = {}

    def read(self, path: Path, settings: dict | None = None) -> int:
        """Take in a log; the bytes that its whole lines take. UserError for a line that is no result.

        settings: those of this run, as JSON has them; UserError if the log was made with others.
        """
        end = 0
        for line in Lines(path, MOST_BYTES):
            where = f"{place(path)} line {line.number} is no result (name another file)"
            cut_off = line.data is not None and not line.data.endswith(b"\n")
            if cut_off and line.number > 1:
                break  # by an interruption
            record = parse_json(b"" if cut_off else line.data or b"", where)
            if line.number == 1:
                made = checked(record, {"settings": dict}, where)["settings"]
                given = made if settings is None else settings
                if wrong := [name for name in {**made, **given} if made.get(name, ...) != given.get(name, ...)]:
                    other = f"other settings ({cut(', '.join(wrong))})"
                    raise UserError(f"{place(path)} was made with {other}; name another file")
            else:
                checked(record, RESULT | ({"plan": [POSITIVE]} if "plan" in record else {}), where)
                if task := self.tasks.get(record["task"]):
                    checked(record, dict.fromkeys(task.metrics, (bool, float)), where)
                    self.keep(record, task)
            end += line.size
        return end

    def keep(self, record: dict, task: Task) -> None:
        """Texts are left out: they are the most of it."""
        cell = Cell(*(record[name] for name in CELL))
        self.records[task.name, record["row"], cell] = {
            name: record[name] for name in (*task.metrics, "kv_share", "plan") if name in record
        }

    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for _, _, cell in self.records))

    def has(self, task: Task, row: Row, cell: Cell) -> bool:
        return (task.name, row.number, cell) in self.records

    def of(self, task: Task, cell: Cell) -> list[dict]:
        """The results of every row, in order."""
        return [self.records[task.name, row.number, cell] for row in task.rows]


class Log(Results):
    """A jsonl file with one line per result. Its first line holds the settings that the results depend on. Of several
    ranks the first one reads and writes it.

    UserError if the file is there and `resume` is not asked for, if its settings are others, if a line is no result,
    or if another run writes to it.
    """

    def __init__(self, path: Path, settings: dict, resume: bool, tasks: Sequence[Task]):
        super().__init__(tasks)
        self.path, self.unwritten, self.file = path, b"", None
        if shard().rank == 0:
            self._open(settings, resume)
        self.records = agreed(self.records)

    def _open(self, settings: dict, resume: bool) -> None:
        path = self.path
        header = json.dumps({"settings": settings})
        if not resume and path.exists() and path.stat().st_size:
            raise UserError(f"{place(path)} holds results; go on with --resume, or give another --out")
        self.file = exclusive(path)
        try:
            whole = self.read(path, json.loads(header)["settings"])
        except UserError:
            self.close()
            raise
        self.file.truncate(whole)  # without a line that an interruption has cut off
        if not whole:
            append(self.file, f"{header}\n".encode(), path)

    def add(self, task: Task, row: Row, cell: Cell, result: dict) -> None:
        record = {"task": task.name, "row": row.number, **asdict(cell), **row.about, **result}
        try:
            self.unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        except ValueError as error:
            where = f"{task.name}, row {row.number}, {cell.policy} x {cell.layers}"
            raise UserError(f"{where}: a number overflows, so try another --dtype") from error
        self.keep(record, task)

    def flush(self) -> None:
        """To the disk, all that was added, or nothing of it."""
        if self.file:
            append(self.file, self.unwritten, self.path)
        self.unwritten = b""

    def close(self) -> None:
        """Let others write to it."""
        if self.file:
            self.file.close()


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
    model: Any, tasks: Sequence[Task], cells: Sequence[Cell], log: Log, size: int, batch_of: Callable = Batch
) -> None:
    """Fill the log with what it lacks. Batches are always whole ones: a resumed run gives the same numbers.

    batch_of: `Batch`, or what else runs rows through such a model and has its methods.
    """
    work = [(task, rows) for task in tasks for rows in batches(task.rows, size)]
    with tqdm(total=sum(len(rows) for _, rows in work) * len(cells), unit="result", smoothing=0.05) as bar:
        for task, rows in work:
            missing = [cell for cell in cells if not all(log.has(task, row, cell) for row in rows)]
            bar.set_description(task.name)
            bar.update(len(rows) * (len(cells) - len(missing)))
            if not missing:
                continue
            batch = batch_of(model, missing, [row.ids for row in rows], len(rows[0].question) + task.new)
            for cell in missing:
                for row, result in zip(rows, task.results(batch, cell, rows), strict=True):
                    if not log.has(task, row, cell):
                        plan = {"plan": batch.plan} if row is rows[0] else {}
                        log.add(task, row, cell, {**result, "kv_share": batch.kv_share, **plan})
                log.flush()
                bar.update(len(rows))
