"""Many clients at a time against serve.py, and the same requests as a job. Writes results/serve_load.json.

    python scripts/load_test.py                              2,000 requests of 32 clients, 8 rows, the embedded model
    python scripts/load_test.py --requests 200 --out /tmp/load.json

The requests run as a job (generate.py --input) and through servers, whole and streamed, in turn: the same model, plan,
rows and threads, greedy, in float32. Every answer has to be the job's, and those of a sample what they are in one row
alone. Last a SIGTERM comes in the middle: whatever the server had accepted has to be answered. Exit code 1 if anything
is lost or wrong.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.record import origin  # noqa: E402
from checkpoint import EMBEDDED  # noqa: E402
from commandline import Parser, guarded, positive  # noqa: E402
from errors import UserError, optional  # noqa: E402
from files import read_text, write_json  # noqa: E402

PROMPT, NEW = (4, 160), (4, 64)  # tokens, at the least and at the most
SAMPLE = 100  # requests that also run alone


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(EMBEDDED))
    parser.add_argument("--requests", type=positive, default=2000, metavar="N")
    parser.add_argument("--clients", type=positive, default=32, metavar="N")
    parser.add_argument("--rows", type=positive, default=8, metavar="N")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--threads", type=positive, default=1, metavar="N")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "results" / "serve_load.json"), metavar="F")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        return Load(args, Path(folder)).run()


class Load:
    """The requests, and what becomes of them in each way to run them."""

    def __init__(self, args: Any, folder: Path):
        self.args, self.folder = args, folder
        self.lines = requests(args.checkpoint, args.requests)
        self.plan = folder / "plan.json"
        self.input = self._written("requests.jsonl", self.lines)
        self.cache = ["--checkpoint", args.checkpoint, "--policy", "dropkv", "--dtype", "fp32"]
        self.cache += ["--max-length", str(PROMPT[1] + NEW[1]), "--threads", str(args.threads)]
        self.cache += ["--compile" if args.compile else "--no-compile"]

    def run(self) -> int:
        first = ["--budget", "0.4", "--layers", "perturbation", "--save-plan", str(self.plan)]
        sample = self._written("sample.jsonl", self.lines[:SAMPLE])
        self._job("first", sample, self.args.rows, first)
        self.cache += ["--plan", str(self.plan)]
        alone, _ = self._job("alone", sample, 1)
        rates: dict[str, list[float]] = {"a job": [], "served, whole": [], "served, streamed": []}
        found: dict[str, dict[str, Any]] = {}
        for number in range(self.args.rounds):
            self.right, rate = self._job(f"job{number}", self.input, self.args.rows)
            rates["a job"].append(rate)
            for what in list(rates)[1:]:
                found[what] = self._served(what.endswith("streamed"), found.get(what))
                rates[what].append(found[what]["tokens_per_s"])
        rows = [{"what": what, "tokens_per_s": round(median(each), 1)} for what, each in rates.items()]
        for row, each in zip(rows, rates.values(), strict=True):
            row["all"] = [round(rate, 1) for rate in each]
            shares = [rate / job for rate, job in zip(each, rates["a job"], strict=True)]
            row["share_of_job"] = round(median(shares), 3)
            row |= {name: value for name, value in found.get(row["what"], {}).items() if name != "tokens_per_s"}
        differ = sum(self.right[line] != text for line, text in alone.items())
        rows.append({"what": "alone in one row", "requests": len(alone), "wrong": differ})
        rows.append({"what": "SIGTERM in the middle", **self._ended()})
        about = {"requests": len(self.lines), "clients": self.args.clients, "batch_size": self.args.rows}
        about |= {"compiled": self.args.compile, "plan": json.loads(self.plan.read_text())["plan"]}
        versions = {name: optional(name).__version__ for name in ("starlette", "uvicorn", "pydantic")}
        write_json(self.args.out, {**origin(), **versions, **about, "rows": rows}, indent=1)
        for row in rows:
            print(row)
        return int(any(row.get("lost") or row.get("wrong") for row in rows))

    def _written(self, name: str, lines: list[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def _job(self, name: str, source: Path, rows: int, more: list[str] | None = None) -> tuple[dict[int, str], float]:
        """Text by id, and new tokens/s."""
        output = self.folder / f"{name}.jsonl"
        command = [
            sys.executable,
            "generate.py",
            "--input",
            str(source),
            "--output",
            str(output),
            "--json",
            *self.cache,
        ]
        done = subprocess.run(
            [*command, "--batch-size", str(rows), *(more or ())], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(done.stderr.strip()[-500:])
        results = map(json.loads, output.read_text().splitlines())
        return {result["id"]: result["text"] for result in results}, json.loads(done.stdout)["tokens_per_s"]

    @contextmanager
    def _server(self, told: bool = False) -> Iterator[tuple[subprocess.Popen, str]]:
        """The process and its address. It has to end well. told: somebody else tells it to."""
        command = [sys.executable, "serve.py", "--port", "0", "--quiet", "--no-page", "--queue", str(self.args.clients)]
        command += ["--batch-size", str(self.args.rows), *self.cache]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                address = process.stdout.readline().partition("http://")[2].partition(",")[0]
                if not address:
                    raise UserError("the server does not start")
                yield process, address
                if not told:
                    process.send_signal(signal.SIGTERM)
                if process.wait(60):
                    raise UserError(f"the server ended with {process.returncode}")
            finally:
                process.kill()

    def _served(self, stream: bool, before: dict[str, Any] | None) -> dict[str, Any]:
        """One server, all requests: tokens/s, what was lost or wrong, and the server's memory on the way."""
        with self._server() as (process, address):
            clients = Clients(address, self.args.clients, self.lines, stream, process.pid)
            seconds = asyncio.run(clients.run())
        found = {"tokens_per_s": clients.tokens / seconds}
        found["lost"] = len(self.lines) - len(clients.texts) + (before or {"lost": 0})["lost"]
        wrong = sum(self.right[line] != text for line, text in clients.texts.items())
        found["wrong"] = wrong + (before or {"wrong": 0})["wrong"]
        quarters = [clients.memory[n * len(clients.memory) // 4 :][:1] for n in range(4)]
        found["server_mib"] = [round(kib / 1024, 1) for [kib] in [*quarters, clients.memory[-1:]]]
        return found

    def _ended(self) -> dict[str, Any]:
        """SIGTERM after a tenth: everything that was sent before gets its answer, what comes later is refused."""
        with self._server(told=True) as (process, address):
            clients = Clients(address, self.args.clients, self.lines, None, process.pid)
            clients.end_after = len(self.lines) // 10
            asyncio.run(clients.run())
        wrong = sum(self.right[line] != text for line, text in clients.texts.items())
        own = {"answered": len(clients.texts), "in_flight": clients.in_flight, "refused": clients.refused}
        return own | {"lost": clients.torn, "wrong": wrong}


class Clients:
    """Clients that send one request after the other, each over its own connection.

    stream: None for every other one. end_after: how many answers until the server, `pid`, is told to end.
    """

    def __init__(self, address: str, count: int, lines: list[dict[str, Any]], stream: bool | None, pid: int):
        self.address, self.count, self.stream, self.pid = address, count, stream, pid
        self.left = iter(lines)
        self.texts: dict[int, str] = {}
        self.memory: list[int] = []
        self.tokens = self.refused = self.torn = self.in_flight = self.running = 0
        self.end_after: int | None = None
        self.told = False

    async def run(self) -> float:
        """Seconds."""
        watch, began = asyncio.create_task(self._watch()), time.perf_counter()
        await asyncio.gather(*(self._client() for _ in range(self.count)))
        watch.cancel()
        self.memory.append(resident(self.pid))
        return time.perf_counter() - began

    async def _watch(self) -> None:
        while True:
            self.memory.append(resident(self.pid))
            await asyncio.sleep(0.5)

    async def _client(self) -> None:
        host, port = self.address.split(":")
        reader = writer = None
        for line in self.left:
            if self.end_after is not None and len(self.texts) >= self.end_after and not self.told:
                self.told, self.in_flight = True, self.running
                os.kill(self.pid, signal.SIGTERM)
            late = self.told
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection(host, int(port))
                self.running += 1
                stream = line["id"] % 2 == 1 if self.stream is None else self.stream
                status, text, tokens = await asked(reader, writer, line, stream)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                self.refused += late
                self.torn += not late
                writer = None
                continue
            finally:
                self.running -= writer is not None
            if status == 200:
                self.texts[line["id"]] = text
                self.tokens += tokens
            elif status == 503:
                self.refused += 1
                writer = None
            else:
                self.torn += 1
        if writer:
            writer.close()


async def asked(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: dict[str, Any], stream: bool
) -> tuple[int, str, int]:
    """Status, text, and how many tokens it has."""
    body = {"prompt": line["prompt_ids"], "max_tokens": line["max_new_tokens"], "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next((int(each.split(":")[1]) for each in headers if each.startswith("content-length")), None)
    if length is None:
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readline()
        answer = b"".join(parts).decode()
    else:
        answer = (await reader.readexactly(length)).decode()
    if (code := int(status.split()[1])) != 200:
        return code, answer, 0
    if not stream:
        found = json.loads(answer)
        return code, found["choices"][0]["text"], found["usage"]["completion_tokens"]
    events = [event.removeprefix("data: ") for event in answer.split("\n\n") if event]
    if events[-1] != "[DONE]":
        raise ValueError("a stream that was cut off")
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    return code, text, chunks[-1]["usage"]["completion_tokens"]


def resident(pid: int) -> int:
    """KiB of a process's memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines() if Path(f"/proc/{pid}").exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def requests(checkpoint: str, count: int) -> list[dict[str, Any]]:
    """Pieces of this project's own text, of mixed length, the same every time."""
    import tokenizer

    draw, text = random.Random(0), "".join(read_text(file) for file in sorted(ROOT.glob("policies/*/*.py")))
    ids, lines = tokenizer.load(Path(checkpoint)).encode(text), []
    for number in range(count):
        start, length = draw.randrange(len(ids) - PROMPT[1]), draw.randint(*PROMPT)
        new = draw.randint(*NEW)
        lines.append({"id": number, "prompt_ids": ids[start : start + length], "max_new_tokens": new})
    return lines


if __name__ == "__main__":
    sys.exit(guarded("load_test.py", main))
