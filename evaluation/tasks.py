"""What a task is, and running tasks over cells: in batches, each result written as it is made, resumable."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from errors import UserError
from evaluation.cells import FULL, Batch, Cell, check
from model import Transformer


@dataclass(frozen=True)
class Row:
    """A prompt, what should follow it, and what else its results are to say."""

    number: int
    ids: list[int]
    expected: Any
    about: dict = field(default_factory=dict)


class Task(Protocol):
    name: str
    new: int  # tokens after the prompt
    metric: str  # the number of a result that counts most
    rows: list[Row]

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        """What comes of each row under `cell`, as JSON; numbers under the names of metrics."""


class Log:
    """A jsonl file with one line per result. Its first line holds the settings that the results depend on.

    UserError if the file is there and `resume` is not asked for, or if its settings are others.
    """

    def __init__(self, path: Path, settings: dict, resume: bool):
        self.records: dict[tuple, dict] = {}
        settings = json.loads(json.dumps({"settings": settings}))
        if path.exists() and path.stat().st_size:
            if not resume:
                raise UserError(f"{path} holds results; go on with --resume, or give another --out")
            whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            first, *records = map(json.loads, whole)
            if first != settings:
                differ = [name for name, value in settings["settings"].items() if first["settings"].get(name) != value]
                raise UserError(f"{path} was made with other settings ({', '.join(differ)}); give another --out")
            for record in records:
                self._keep(record)
            path.write_bytes(b"".join(whole))  # without a line that an interruption has cut off
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n")
        self.file = path.open("a", encoding="utf-8")

    @staticmethod
    def _key(record: dict) -> tuple:
        return (record["task"], record["row"], *(record[name] for name in asdict(FULL)))

    def _keep(self, record: dict) -> None:
        """What the summary needs: a slow suite has half a million results, and texts are the most of them."""
        self.records[self._key(record)] = {name: v for name, v in record.items() if not isinstance(v, str)}

    def has(self, task: Task, row: Row, cell: Cell) -> bool:
        return self._key({"task": task.name, "row": row.number, **asdict(cell)}) in self.records

    def add(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self._keep(record)

    def of(self, task: Task, cell: Cell) -> list[dict]:
        """The results of every row, in order."""
        return [self.records[self._key({"task": task.name, "row": row.number, **asdict(cell)})] for row in task.rows]


def batches(rows: Iterable[Row], size: int, slack: float = 0.1) -> Iterator[list[Row]]:
    """Rows of about the same length (within `slack` of the longest), `size` at most, longest first.

    A batch has one budget and one plan, so a row should not get those of a much longer one.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and (len(batch) == size or len(row.ids) < (1 - slack) * len(batch[0].ids)):
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
                check(model, cell, rows[0].ids, task.new)


def run(model: Transformer, tasks: Sequence[Task], cells: Sequence[Cell], log: Log, size: int) -> None:
    """Fill the log with what it lacks. Batches are always whole ones: a resumed run gives the same numbers."""
    work = [(task, rows) for task in tasks for rows in batches(task.rows, size)]
    with tqdm(total=sum(len(rows) for _, rows in work) * len(cells), unit="result", smoothing=0.05) as bar:
        for task, rows in work:
            for policy in dict.fromkeys(cell.policy for cell in cells):
                own = [cell for cell in cells if cell.policy == policy]
                missing = [cell for cell in own if not all(log.has(task, row, cell) for row in rows)]
                bar.set_description(f"{task.name}, {policy}")
                bar.update(len(rows) * (len(own) - len(missing)))
                if not missing:
                    continue
                batch = Batch(model, missing, [row.ids for row in rows], task.new)
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
                    log.file.flush()
                    bar.update(len(rows))
