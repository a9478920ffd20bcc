"""Standard tasks from jsonl files in their published formats, told apart by their fields.

- LongBench (github.com/THUDM/LongBench), the English datasets: input, context, answers, all_classes, dataset. Prompts,
  answer lengths and metrics are its own (`longbench.json`).
- RULER (github.com/NVIDIA/RULER): input, outputs, answer_prefix. The task's name is the file's, or its folder's where
  the file is validation.jsonl.
- Summaries: document, summary (XSUM) or article, highlights (CNN/DailyMail).

A prompt that is too long loses its middle, as LongBench does it. Metrics come from rouge-score and rapidfuzz; ROUGE-L
of rouge-score is not exactly that of the package that LongBench uses.
"""

import json
import lzma
import re
import string
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from checkpoint import HUB_ID
from errors import UserError, cut, optional, place, reason
from evaluation.cells import Batch, Cell
from evaluation.tasks import Row
from files import MOST_BYTES, Kind, accessing, checked, parse_json, read_bytes, read_stream
from tokenizer import Tokenizer

LONGBENCH = json.loads((Path(__file__).parent / "longbench.json").read_text())["datasets"]
RULER = {  # tokens to generate and metric, by how the task's name begins
    "niah": (128, "match_all"),
    "vt": (30, "match_all"),
    "cwe": (120, "match_all"),
    "fwe": (50, "match_all"),
    "qa": (32, "match_part"),
}
SUMMARIES = {"xsum": ("document", "summary", 64), "cnn_dailymail": ("article", "highlights", 128)}
FORMATS: dict[str, dict[str, Kind]] = {  # field -> kind, by which a file's first row is told apart
    "longbench": {"context": str, "input": str, "answers": [str]},
    "ruler": {"input": str, "outputs": [str]},
    **{name: {text: str, summary: str} for name, (text, summary, _) in SUMMARIES.items()},
}
MORE = {"dataset": str, "answer_prefix": str, "all_classes": (None, [str])}  # kinds of fields that a row may have
MOST_DATA = 4 * MOST_BYTES  # of one jsonl file: the largest of LongBench has 60 MB
UNZIPPING = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, NotImplementedError)
FIRST_LINE = {"trec", "triviaqa", "samsum"}  # LongBench counts only the first line of what is said


class Standard:
    """One file as a task. UserError, one line with file and row, for what is not in the published format."""

    def __init__(
        self,
        name: str,
        lines: Sequence[bytes],
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        limit: int,
        unseen: bool = False,
    ):
        """unseen: the question is read when the text has been compressed; UserError for what does not part them."""
        path, name = Path(name), place(name)
        records = [parse_json(line, f"{name} row {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not records:
            raise UserError(f"{name} has no rows")
        self.kind = next((kind for kind, fields in FORMATS.items() if fields.keys() <= records[0].keys()), None)
        if self.kind is None:
            known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in FORMATS.items())
            fields = cut(", ".join(records[0]))
            raise UserError(f"{name} row 1 has the fields {fields}; known formats: {known}")
        for n, record in enumerate(records, 1):
            _check(record, FORMATS[self.kind], f"{name} row {n}")
        own = path.parent.name if path.stem in ("validation", "test", "train") else path.stem
        self.dataset = records[0].get("dataset", own) if self.kind == "longbench" else own
        parts, answers, self.new, self.metric = self._format(name)
        self.name, self.tokenizer, self.eos_ids = f"{self.kind}: {self.dataset}", tokenizer, eos_ids
        self.name += " unseen" * unseen
        if limit <= self.new:
            raise UserError(f"{name}: {limit} positions leave no room for a prompt and {self.new} new tokens")
        self.rows = []
        for n, record in enumerate(records):
            text, question = parts(record)
            if not unseen:
                ids = middle_cut(tokenizer.encode(text + question), limit - self.new)
                self.rows.append(Row(n, ids, answers(record)))
                continue
            where = f"{name} row {n + 1}"
            if not (text and question):
                raise UserError(f"{where}: the format does not part text and question; leave --unseen away for it")
            asked = tokenizer.encode(question, special=False)
            if (room := limit - self.new - len(asked)) < 1:
                raise UserError(f"{where}: a question of {len(asked)} tokens leaves no room in {limit} positions")
            self.rows.append(Row(n, middle_cut(tokenizer.encode(text), room), answers(record), question=asked))
        self.classes = [record.get("all_classes") or [] for record in records]

    def _format(self, name: str) -> tuple[Callable, Callable, int, str]:
        """How a record becomes a prompt, in two parts, and its answers; how many tokens to generate; the metric.

        The second part is the question; where a format does not part them, it is the whole prompt.
        """
        if self.kind in SUMMARIES:
            text, summary, new = SUMMARIES[self.kind]
            return lambda record: (record[text], "\n\nTL;DR:"), lambda record: [record[summary]], new, "rouge_l"
        if self.kind == "ruler":
            task = next((task for task in RULER if self.dataset.startswith(task)), None)
            if task is None:
                raise UserError(
                    f"{name}: {cut(self.dataset)} is no RULER task; their names begin with {', '.join(RULER)}"
                )
            return ruler_parts, lambda record: record["outputs"], *RULER[task]
        own = LONGBENCH.get(self.dataset.removesuffix("_e"))
        if own is None:
            raise UserError(
                f"{name}: dataset {cut(self.dataset)} is not among {', '.join(LONGBENCH)} (English ones only)"
            )
        before, _, behind = own["prompt"].partition("{context}")

        def parts(record: dict) -> tuple[str, str]:
            if "{input}" in before:
                return "", own["prompt"].format(**record)
            return before.format(**record) + record["context"], behind.format(**record)

        return parts, lambda record: record["answers"], own["new"], own["metric"]

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        metric, results = METRICS[self.metric], []
        greedy = batch.greedy(cell, self.eos_ids, [row.question for row in rows])
        for tokens, row in zip(greedy, rows, strict=True):
            said = self.tokenizer.decode(tokens)
            counted = said.lstrip("\n").split("\n")[0] if self.dataset.removesuffix("_e") in FIRST_LINE else said
            score = metric(counted, row.expected, self.classes[row.number])
            results.append({"prediction": said, "expected": row.expected, self.metric: score})
        return results


def ruler_parts(record: dict) -> tuple[str, str]:
    """Text and question of a RULER row: its last line asks."""
    text, line_break, question = record["input"].rpartition("\n")
    return text, line_break + question + record.get("answer_prefix", "")


def paths(source: str) -> list[Path]:
    """The jsonl and zip files of a file, a folder or a dataset of the hub."""
    path = Path(source).expanduser()
    with accessing(path):
        there = path.exists()
    if not there and path.suffix not in (".jsonl", ".zip") and HUB_ID.fullmatch(source):
        from huggingface_hub import snapshot_download

        try:
            path, there = (
                Path(snapshot_download(source, repo_type="dataset", allow_patterns=["*.jsonl", "*.zip"])),
                True,
            )
        except Exception as error:  # the client's own, its http library's, the operating system's
            raise UserError(f"{cut(source)} is no file here, and the hub did not give it: {reason(error)}") from error
    if not there:
        raise UserError(f"{place(source)} does not exist")
    files = sorted(path.rglob("*.jsonl")) + sorted(path.rglob("*.zip")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{place(source)} holds no .jsonl file")
    return files


def read(source: str) -> Iterator[tuple[str, list[bytes]]]:
    """Name and lines of every jsonl in `paths`, in zip files too."""
    for file in paths(source):
        if file.suffix != ".zip":
            yield str(file), read_bytes(file, MOST_DATA).splitlines()
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                for name in sorted(name for name in archive.namelist() if name.endswith(".jsonl")):
                    with archive.open(name) as member:
                        yield name, read_stream(member, f"{place(file)}: {place(name)}", MOST_DATA).splitlines()
        except UNZIPPING as error:
            raise UserError(f"{place(file)} is no zip file that can be read: {reason(error)}") from error


def middle_cut(ids: list[int], limit: int) -> list[int]:
    """The first and the last half of `limit` tokens of what is longer."""
    return ids if len(ids) <= limit else ids[: limit - limit // 2] + ids[len(ids) - limit // 2 :]


def _check(record: dict, fields: dict[str, Kind], where: str) -> None:
    checked(record, fields | {name: kind for name, kind in MORE.items() if name in record}, where)
    if empty := [name for name, kind in fields.items() if kind == [str] and not record[name]]:
        raise UserError(f"{where}: {empty[0]!r} is empty; a row needs an answer")


def f1(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Overlap of words, without punctuation and articles: the best over the answers (SQuAD's F1)."""

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def one(answer: str) -> float:
        got, wanted = words(said), words(answer)
        same = sum((Counter(got) & Counter(wanted)).values())
        return 2 * same / (len(got) + len(wanted)) if same else 0.0

    return max(map(one, answers))


def rouge_l(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    scorer = optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return max(scorer.score(answer, said)["rougeL"].fmeasure for answer in answers)


def edit_similarity(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Of the first line that is neither a comment nor a fence."""
    ratio = optional("rapidfuzz.fuzz").ratio
    lines = said.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(ratio(code, answer) / 100 for answer in answers)


def classification(said: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """One over the number of classes named, if the right one is among them."""

    def one(answer: str) -> float:
        named = [c for c in classes if c in said and not (c in answer and c != answer)]
        return 1 / len(named) if answer in named else 0.0

    return max(map(one, answers))


def number(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the numbers named that are the answer's."""
    named = re.findall(r"\d+", said)
    return max(sum(n in re.findall(r"\d+", answer)[:1] for n in named) / max(len(named), 1) for answer in answers)


def match_all(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


def match_part(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return float(any(answer.lower() in said.lower() for answer in answers))


METRICS = {m.__name__: m for m in (f1, rouge_l, edit_similarity, classification, number, match_all, match_part)}
