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
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from checkpoint import HUB_ID
from errors import UserError
from evaluation.cells import Batch, Cell
from evaluation.tasks import Row
from files import parse_json
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
FORMATS = {  # field -> type, by which a file's first row is told apart
    "longbench": {"context": str, "input": str, "answers": list},
    "ruler": {"input": str, "outputs": list},
    **{name: {text: str, summary: str} for name, (text, summary, _) in SUMMARIES.items()},
}
FIRST_LINE = {"trec", "triviaqa", "samsum"}  # LongBench counts only the first line of what is said


class Standard:
    """One file as a task. UserError, one line with file and row, for what is not in the published format."""

    def __init__(self, name: str, lines: Sequence[bytes], tokenizer: Tokenizer, eos_ids: Collection[int], limit: int):
        records = [_parsed(line, f"{name} row {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not records:
            raise UserError(f"{name} has no rows")
        self.kind = next((kind for kind, fields in FORMATS.items() if fields.keys() <= records[0].keys()), None)
        if self.kind is None:
            known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in FORMATS.items())
            raise UserError(f"{name} row 1 has the fields {', '.join(records[0])}; known formats: {known}")
        for n, record in enumerate(records, 1):
            _check(record, FORMATS[self.kind], f"{name} row {n}")
        path = Path(name)
        own = path.parent.name if path.stem in ("validation", "test", "train") else path.stem
        self.dataset = records[0].get("dataset", own) if self.kind == "longbench" else own
        prompt, answers, self.new, self.metric = self._format(name)
        self.name, self.tokenizer, self.eos_ids = f"{self.kind}: {self.dataset}", tokenizer, eos_ids
        if limit <= self.new:
            raise UserError(f"{name}: {limit} positions leave no room for a prompt and {self.new} new tokens")
        self.rows = []
        for n, record in enumerate(records):
            ids = middle_cut(tokenizer.encode(prompt(record)), limit - self.new)
            self.rows.append(Row(n, ids, answers(record)))
        self.classes = [record.get("all_classes") or [] for record in records]

    def _format(self, name: str) -> tuple[Callable, Callable, int, str]:
        """How a record becomes a prompt and its answers; how many tokens to generate; the metric."""
        if self.kind in SUMMARIES:
            text, summary, new = SUMMARIES[self.kind]
            return lambda record: record[text] + "\n\nTL;DR:", lambda record: [record[summary]], new, "rouge_l"
        if self.kind == "ruler":
            task = next((task for task in RULER if self.dataset.startswith(task)), None)
            if task is None:
                raise UserError(f"{name}: {self.dataset} is no RULER task; their names begin with {', '.join(RULER)}")
            return lambda r: r["input"] + r.get("answer_prefix", ""), lambda record: record["outputs"], *RULER[task]
        own = LONGBENCH.get(str(self.dataset).removesuffix("_e"))
        if own is None:
            raise UserError(f"{name}: dataset {self.dataset} is not among {', '.join(LONGBENCH)} (English ones only)")
        return lambda r: own["prompt"].format(**r), lambda record: record["answers"], own["new"], own["metric"]

    def results(self, batch: Batch, cell: Cell, rows: Sequence[Row]) -> list[dict]:
        metric, results = METRICS[self.metric], []
        for tokens, row in zip(batch.greedy(cell, self.eos_ids), rows, strict=True):
            said = self.tokenizer.decode(tokens)
            counted = said.lstrip("\n").split("\n")[0] if self.dataset.removesuffix("_e") in FIRST_LINE else said
            score = metric(counted, row.expected, self.classes[row.number])
            results.append({"prediction": said, "expected": row.expected, self.metric: score})
        return results


def read(source: str) -> Iterator[tuple[str, list[bytes]]]:
    """Name and lines of every jsonl: a file, a folder, a zip, or a dataset of the hub (its jsonl and zip files)."""
    path = Path(source).expanduser()
    if not path.exists() and path.suffix not in (".jsonl", ".zip") and HUB_ID.fullmatch(source):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(source, repo_type="dataset", allow_patterns=["*.jsonl", "*.zip"]))
        except Exception as error:  # the client's own, its http library's, the operating system's
            raise UserError(f"{source} is no file here, and the hub did not give it: {error}") from error
    if not path.exists():
        raise UserError(f"{source} does not exist")
    files = sorted(path.rglob("*.jsonl")) + sorted(path.rglob("*.zip")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{source} holds no .jsonl file")
    for file in files:
        if file.suffix != ".zip":
            yield str(file), file.read_bytes().splitlines()
            continue
        with zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".jsonl")):
                yield name, archive.read(name).splitlines()


def middle_cut(ids: list[int], limit: int) -> list[int]:
    """The first and the last half of `limit` tokens of what is longer."""
    return ids if len(ids) <= limit else ids[: limit - limit // 2] + ids[len(ids) - limit // 2 :]


def _parsed(line: bytes, where: str) -> dict:
    return parse_json(line, where)


def _check(record: dict, fields: dict[str, type], where: str) -> None:
    for field, kind in fields.items():
        if field not in record:
            raise UserError(f"{where} lacks the field {field!r}")
        value = record[field]
        if not isinstance(value, kind) or kind is list and not (value and all(isinstance(v, str) for v in value)):
            wanted = "text" if kind is str else "a list of texts"
            raise UserError(f"{where}: the field {field!r} must be {wanted}, not {json.dumps(value)[:60]}")


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
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return max(scorer.score(answer, said)["rougeL"].fmeasure for answer in answers)


def edit_similarity(said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Of the first line that is neither a comment nor a fence."""
    from rapidfuzz.fuzz import ratio

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
