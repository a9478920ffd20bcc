"""Files of data: lines of a job, its job.json and output, plans, prompts, what evaluate.py and bench.py go on with."""

import json
import random
from dataclasses import replace
from pathlib import Path

from .bases import TEXT, VOCAB, text
from .odd import DEEP, TEXTS, VALUES, Input, Raw, change, changed_bytes, changed_json, dumped, shortened

NAMES = ("lines", "lines", "state", "results", "plan", "prompt", "standard", "log", "bench")
FIELDS = "id prompt prompt_ids max_new_tokens temperature seed stop top_k top_p special parse_special odd".split()
LINES = [
    {"id": "a", "prompt": "Hello, world"},
    {"id": 2, "prompt_ids": [5, 6, 7, 8, 9], "max_new_tokens": 3, "temperature": 0.7, "seed": 3},
    {"id": "c", "prompt": "The end of caf\u00e9", "temperature": 0, "max_new_tokens": 5},
    {"prompt": "no id"},
]
STANDARD = {
    "input": "Which?",
    "context": TEXT[:300],
    "answers": ["x", "the"],
    "dataset": "hotpotqa",
    "all_classes": None,
}
EVALUATE = """--policies streaming --layers squeeze --budgets 0.5 --batch 2 --length 32 --lengths 32 --read 4
--texts 2 --needles 2 --out out --dtype fp32""".split()


def plain(name: str, folder: Path) -> Input:
    checkpoint = ["--checkpoint", str(text(folder))]
    cache = "--policy streaming --layers squeeze --budget 0.6 --max-new-tokens 4 --seed 1 --json".split()
    if name in ("lines", "state", "results"):
        write_lines(folder / "input.jsonl", LINES)
        argv = [*checkpoint, *cache, *"--input input.jsonl --output output.jsonl --batch-size 2".split()]
        return Input("generate.py", [*argv, *["--resume"] * (name != "lines")], VOCAB, outputs=("output.jsonl",))
    if name == "plan":
        (folder / "plan.json").write_text(json.dumps({"plan": [9, 14], "policy": "streaming", "layers": "squeeze"}))
        argv = [*checkpoint, *"--policy streaming --plan plan.json --prompt-file prompt.txt --max-new-tokens 4".split()]
        (folder / "prompt.txt").write_text(TEXT[:90], encoding="utf-8")
        return Input("generate.py", [*argv, "--json"], VOCAB)
    if name == "prompt":
        return Input("generate.py", [*checkpoint, *cache, "--prompt", "-"], VOCAB, TEXT[:90].encode())
    if name == "standard":
        write_lines(folder / "hotpotqa.jsonl", [STANDARD, STANDARD | {"answers": ["12345"]}])
        return Input("evaluate.py", [*checkpoint, *EVALUATE, "--files", "hotpotqa.jsonl"], VOCAB, outputs=("out",))
    if name == "log":
        (folder / "text.txt").write_text(TEXT * 4, encoding="utf-8")
        argv = [*checkpoint, *EVALUATE, "--tasks", "fidelity", "--text", "text.txt", "--resume"]
        return Input("evaluate.py", argv, VOCAB, outputs=("out",))
    argv = "--stage decode --shape tiny --prompt 8 --new 4 --rounds 1 --peer eager --out out.json --plot plot.png"
    return Input("bench.py", [*argv.split(), "--stage", "throughput"], VOCAB, outputs=("out.json",))


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    argv, stdin = given.argv, given.stdin
    if name in RESUMED:
        go_on(folder, done, RESUMED[name])
    if name == "lines":
        about = odd_line(rng, folder / "input.jsonl", LINES, FIELDS)
    elif name == "state":
        path = folder / "output.jsonl.job.json"
        data, about = changed_json(rng, json.loads(path.read_text()), [])
        path.write_bytes(data)
    elif name == "results":
        about = odd_line(rng, folder / "output.jsonl", None, ["id", "text", "tokens"])
    elif name == "plan":
        about = odd_plan(rng, folder / "plan.json")
    elif name == "prompt":
        argv, stdin, about = odd_prompt(rng, argv, stdin)
    elif name == "standard":
        fields = [*STANDARD, "outputs", "document", "summary", "answer_prefix", "article", "highlights"]
        about = odd_line(rng, folder / "hotpotqa.jsonl", None, fields)
        if rng.random() < 0.3:
            other = rng.choice(
                ["niah_1.jsonl", "xsum.jsonl", "trec.jsonl", "validation.jsonl", "x.zip", "a\x1b[2J.jsonl"]
            )
            (folder / "hotpotqa.jsonl").rename(folder / other)
            argv, about = [*argv[:-1], other], f"{about} in {other!r}"
    elif name == "log":
        about = odd_line(
            rng, folder / "out" / "predictions.jsonl", None, ["settings", "task", "row", "policy", "budget"]
        )
    else:
        path = folder / "out.json"
        said = json.loads(path.read_text())
        said["stages"]["prefill"] = said["stages"]["throughput"]  # one that stays
        data, about = changed_json(rng, said, ["stages"])
        path.write_bytes(data)
    return replace(given, argv=argv, stdin=stdin, about=f"{name}: {about}")


def odd_plan(rng: random.Random, path: Path) -> str:
    plans = [
        [9, 14],
        [9],
        [9, 14, 3],
        [1, 1],
        [2, 2],
        [5, 5],
        [9, 10**19],
        [9, 10**400],
        [0, 0],
        [True, 9],
        [9.0, 9],
    ]
    odd = rng.choice([*plans, [10**6, 10**6], ["9", 9], [[9], 9], [9, rng.choice(VALUES)], *VALUES])
    if rng.random() < 0.7:
        path.write_bytes(dumped(rng.choice([odd, {"plan": odd}])).encode("utf-8", "surrogatepass"))
        return shortened(dumped(odd))
    data, about = changed_json(rng, json.loads(path.read_text()))
    path.write_bytes(data)
    return about


def odd_prompt(rng: random.Random, argv: list[str], stdin: bytes) -> tuple[list[str], bytes, str]:
    odd = [b"", b"\n", b"\0", b"\xff\xfe", "\ud800".encode("utf-8", "surrogatepass"), b"x" * 10**4, b"\x80" * 99]
    odd += ["\U0010ffff\u202e\u200d".encode() * 20, "\ufeffx".encode(), "\ufdd0\ufdd1".encode(), b"<s></s>" * 9]
    odd += [b" " * 300, changed_bytes(rng, stdin)[0], b"\x1b[2J" * 10, "e\u0301".encode() * 60]
    ids = ["", ",", "1", "1,2", "-1", "2047", "2048", "99999999999999999999", "9" * 5000, "1.5", "1,,2", "x", "nan"]
    ids += [" 1 , 2 ", "1_0,2", "\u0665", "+1", "1;2", "[1,2]", "0x10", "1," * 600, ",".join("9" * 2000), "\x00"]
    if rng.random() < 0.6:
        stdin = rng.choice(odd)
        return argv, stdin, f"{len(stdin)} bytes {shortened(repr(stdin))}"
    argv = [*argv[: argv.index("--prompt")], "--prompt-ids", rng.choice(ids)]
    return argv, stdin, shortened(argv[-1])


RESUMED = {"state": "output.jsonl", "results": "output.jsonl", "log": "out/predictions.jsonl", "bench": "out.json"}


def go_on(folder: Path, done: Path, name: str) -> None:
    """The files of the run `done`, of a file of lines the first two."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    lines = (done / name).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] if path.suffix == ".jsonl" else lines))
    job = f"{name}.job.json"
    if (done / job).exists():
        (folder / job).write_bytes((done / job).read_bytes())


def odd_line(rng: random.Random, path: Path, lines: list[dict] | None, fields: list[str]) -> str:
    """A line of a jsonl file that is odd, or something odd between the lines."""
    data = path.read_bytes()
    lines = lines or [json.loads(line) for line in data.splitlines()]
    draw = rng.random()
    if draw < 0.12:
        changed, about = changed_bytes(rng, data)
        path.write_bytes(changed)
        return about
    written = [json.dumps(line).encode() for line in lines]
    at = rng.randrange(len(lines))
    if draw < 0.25:
        whole = [b"", b"{}", b"[]", b"null", b"5", b'"x"', b"{", b"\xff", b"\0", b"\xef\xbb\xbf" + written[at], b"# no"]
        whole += [
            b"[" * DEEP,
            written[at] * 2,
            written[at],
            b" " * 10**6,
            b'{"a":' * DEEP,
            written[at].replace(b'"', b"'"),
        ]
        odd = rng.choice(whole)
        written.insert(at, odd)
        about = f"a line {shortened(repr(odd))}"
    else:
        values = [*VALUES, *map(Raw, map(json.dumps, TEXTS[:40])), *ASKS]
        if rng.random() < 0.5:
            key = rng.choice(fields)
            line = lines[at] | {key: rng.choice(values)}
            about = f"{key} = {shortened(dumped(line[key]))}"
        else:
            line, about = change(rng, lines[at], fields)
        written[at] = dumped(line).encode("utf-8", "surrogatepass")
        about = f"line {at + 1}: {about}"
    path.write_bytes(rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\n\n"]).join(written) + b"\n" * (rng.random() < 0.9))
    return about


ASKS = [  # for too much, or next to too much
    *map(
        Raw,
        ["1000000000000", "512", "511", "500", "100", "1e-45", "1e30", "1e300", "2.0", "-1e-9", "18446744073709551615"],
    ),
    Raw("[" + ",".join(["5"] * 300_000) + "]"),
    Raw("[2047]"),
    Raw("[2048]"),
    Raw("[-1]"),
    Raw('"' + "word " * 20_000 + '"'),
    Raw(r'"<s></s>\u0000\ufdd0"'),
]
