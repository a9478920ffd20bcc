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
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from errors import UserError, cut, optional, place
from evaluation.cells import Batch, Cell
from evaluation.tasks import Row
from evaluation.texts import records
from files import Kind, accessing, checked
from tokenizer import Tokenizer

LONGBENCH = json.loads((Path(__file__).parent / "longbench.json").read_text())["datasets"]
RULER = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # tokens to generate, by how the task's name begins
SUMMARIES = {"xsum": ("document", "summary", 64), "cnn_dailymail": ("article", "highlights", 128)}
FORMATS: dict[str, dict[str, Kind]] = {  # field -> kind, by which a file's first row is told apart
    "longbench": {"context": str, "input": str, "answers": [str]},
    "ruler": {"input": str, "outputs": [str]},
    **{name: {text: str, summary: str} for name, (text, summary, _) in SUMMARIES.items()},
}
MORE = {"dataset": str, "answer_prefix": str, "all_classes": (None, [str])}  # kinds of fields that a row may have
FIRST_LINE = {"trec", "triviaqa", "samsum"}  # LongBench counts only the first line of what is said
Parts = Callable[[dict], tuple[str, str, list[str]]]


class Standard:
    """One file as a task. UserError, one line with file and row, for what is not in the published format."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        limit: int,
        rows: int | None = None,
        unseen: bool = False,
    ):
        """rows: of the file, how many are read; limit: tokens of a prompt and its answer.

        unseen: the question is read when the text has been compressed; UserError for what does not part them.
        """
        given = records(path, rows)
        if not given:
            raise UserError(f"{place(path)} has no rows")
        where, one = given[0]
        kind = next((kind for kind, fields in FORMATS.items() if fields.keys() <= one.keys()), None)
        if kind is None:
            known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in FORMATS.items())
            raise UserError(f"{where} has the fields {cut(', '.join(one))}; known formats: {known}")
        for where, record in given:
            _check(record, FORMATS[kind], where)
        own = path.parent.name if path.stem in ("validation", "test", "train") else path.stem
        self.dataset = one.get("dataset", own) if kind == "longbench" else own
        parts, self.new, metric = form(kind, self.dataset, place(path))
        self.name, self.tokenizer, self.eos_ids = f"{kind}: {self.dataset}{' unseen' * unseen}", tokenizer, eos_ids
        self.metrics, self.rows = (metric,), []
        self.classes = [record.get("all_classes") or [] for _, record in given]
        for n, (where, record) in enumerate(given):
            text, question, answers = parts(record)
            if unseen and not (text and question):
                raise UserError(f"{where}: the format does not part text and question; leave --unseen away for it")
            asked = tokenizer.encode(question, special=False) if unseen else []
            if (room := limit - self.new - len(asked)) < 1:
                later = f"{len(asked)} tokens of a question and {self.new} new ones"
                raise UserError(f"{where}: {later} leave no room for a prompt in {limit} positions")
            ids = tokenizer.encode(text if unseen else text + question)
            self.rows.append(Row(n, middle_cut(ids, room), answers, question=asked))

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        [metric], results = self.metrics, []
        greedy = batch.greedy(cell, self.eos_ids, [row.question for row in rows])
        for tokens, row in zip(greedy, rows, strict=True):
            said = self.tokenizer.decode(tokens)
            counted = said.lstrip("\n").split("\n")[0] if self.dataset.removesuffix("_e") in FIRST_LINE else said
            value = score(metric, counted, row.expected, self.classes[row.number])
            results.append({"prediction": said, "expected": row.expected, metric: value})
        return results


def form(kind: str, dataset: str, name: str) -> tuple[Parts, int, str]:
    """How a record becomes text, question and answers; how many tokens to generate; the metric.

    Where a format does not part text and question, all is the question.
    """
    if kind in SUMMARIES:
        text, summary, new = SUMMARIES[kind]
        return lambda record: (record[text], "\n\nTL;DR:", [record[summary]]), new, "rouge_l"
    if kind == "ruler":
        task = next((task for task in RULER if dataset.startswith(task)), None)
        if task is None:
            raise UserError(f"{name}: {cut(dataset)} is no RULER task; their names begin with {', '.join(RULER)}")
        return ruler_parts, RULER[task], "match_part" if task == "qa" else "match_all"
    own = LONGBENCH.get(dataset.removesuffix("_e"))
    if own is None:
        known = f"{', '.join(LONGBENCH)} (English ones only)"
        raise UserError(f"{name}: dataset {cut(dataset)} is not among {known}")
    before, _, behind = own["prompt"].partition("{context}")

    def parts(record: dict) -> tuple[str, str, list[str]]:
        if "{input}" in before:
            return "", own["prompt"].format(**record), record["answers"]
        return before.format(**record) + record["context"], behind.format(**record), record["answers"]

    return parts, own["new"], own["metric"]


def ruler_parts(record: dict) -> tuple[str, str, list[str]]:
    """The last line of a RULER row asks."""
    text, line_break, question = record["input"].rpartition("\n")
    return text, line_break + question + record.get("answer_prefix", ""), record["outputs"]


def paths(source: str) -> list[Path]:
    """A file, or the jsonl files of a folder."""
    path = Path(source).expanduser()
    with accessing(path):
        if not path.exists():
            raise UserError(f"{place(source)} does not exist")
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{place(source)} holds no .jsonl file")
    return files


def middle_cut(ids: list[int], limit: int) -> list[int]:
    """The first and the last half of `limit` tokens of what is longer."""
    return ids if len(ids) <= limit else ids[: limit - limit // 2] + ids[len(ids) - limit // 2 :]


def _check(record: dict, fields: dict[str, Kind], where: str) -> None:
    checked(record, fields | {name: kind for name, kind in MORE.items() if name in record}, where)
    if empty := [name for name, kind in fields.items() if kind == [str] and not record[name]]:
        raise UserError(f"{where}: {empty[0]!r} is empty; a row needs an answer")


def score(metric: str, said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best of the answers counts; where all of them are asked for, their mean."""
    values = [METRICS[metric](said, answer, classes) for answer in answers]
    return sum(values) / len(values) if metric == "match_all" else max(values)


def f1(said: str, answer: str, classes: Sequence[str]) -> float:
    """Overlap of words, without punctuation and articles (SQuAD's F1)."""

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    got, wanted = words(said), words(answer)
    same = (Counter(got) & Counter(wanted)).total()
    return 2 * same / (len(got) + len(wanted)) if same else 0.0


def rouge_l(said: str, answer: str, classes: Sequence[str]) -> float:
    scorer = optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return scorer.score(answer, said)["rougeL"].fmeasure


def edit_similarity(said: str, answer: str, classes: Sequence[str]) -> float:
    """Of the first line that is neither a comment nor a fence."""
    lines = said.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return optional("rapidfuzz.fuzz").ratio(code, answer) / 100


def classification(said: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes named, if the right one is among them."""
    named = [c for c in classes if c in said and not (c in answer and c != answer)]
    return 1 / len(named) if answer in named else 0.0


def number(said: str, answer: str, classes: Sequence[str]) -> float:
    """Share of the numbers named that are the answer's."""
    named = re.findall(r"\d+", said)
    return sum(n in re.findall(r"\d+", answer)[:1] for n in named) / max(len(named), 1)


def match(said: str, answer: str, classes: Sequence[str]) -> float:
    return float(answer.lower() in said.lower())


METRICS = {metric.__name__: metric for metric in (f1, rouge_l, edit_similarity, classification, number)}
METRICS |= {"match_all": match, "match_part": match}
