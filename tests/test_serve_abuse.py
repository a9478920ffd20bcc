"""serve.py under bad clients, other people's clients, and load. After each, others are answered as before."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serving_tools import chat_folder, connected, request_bytes, serving, until

ROOT = Path(__file__).resolve().parent.parent
PATH = "/v1/completions"
ASK = {"prompt": "def main", "max_tokens": 4, "temperature": 0}
FUZZ = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = chat_folder(tmp_path_factory.mktemp("abused"))
    with serving("--checkpoint", str(folder), "--queue", "200", "--timeout", "30") as live:
        live.wanted = live.http.post(PATH, json=ASK).json()["choices"][0]["text"]
        yield live


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """Its answers are short."""
    folder = chat_folder(tmp_path_factory.mktemp("fuzzed"))
    with serving("--checkpoint", str(folder), "--max-length", "32", "--budget", "16") as brief:
        yield brief


@pytest.fixture(autouse=True)
def _others_go_on(live):
    yield
    until(lambda: live.worker.running == live.worker.waiting == 0)
    assert live.http.post(PATH, json=ASK).json()["choices"][0]["text"] == live.wanted


FUZZED = (PATH, "/v1/chat/completions")


def fuzz(live, path: str, mode: GenerationMode, count: int, checks: list) -> None:
    """Bodies that the server's own schema allows, or that break it."""
    schema = schemathesis.openapi.from_dict(live.http.get("/openapi.json").json())

    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
    def ask(case):
        case.call_and_validate(base_url=live.url, checks=checks, timeout=30)

    ask()


@pytest.mark.parametrize("path", FUZZED)
def test_a_few_requests_of_the_schema(brief, path):
    fuzz(brief, path, GenerationMode.POSITIVE, 5, FUZZ)


@pytest.mark.slow
@pytest.mark.parametrize("path", FUZZED)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_many_requests_of_the_schema(brief, path, mode):
    """Those that break it have to be refused."""
    fuzz(brief, path, mode, 200, [*FUZZ, negative_data_rejection])


def test_readers_that_do_not_read(live):
    """Their answers end, in rows that others get; what they do not take waits in the kernel or goes."""
    body = ASK | {"max_tokens": 60, "ignore_eos": True, "stream": True, "watch": True}
    wires = []
    for _ in range(6):
        host, port = live.url.removeprefix("http://").split(":")
        wire = socket.socket()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.connect((host, int(port)))
        wire.sendall(request_bytes(PATH, body))
        wires.append(wire)
    until(lambda: live.worker.running == 2)
    assert live.http.post(PATH, json=ASK).json()["choices"][0]["text"] == live.wanted
    until(lambda: live.worker.running == live.worker.waiting == 0)
    for wire in wires:
        wire.close()
    until(lambda: not live.server.handled)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_connections_that_say_nothing(live, count):
    wires = [connected(live.url) for _ in range(count)]
    for number, wire in enumerate(wires):
        wire.sendall([b"", b"POST /v1/completions HTTP/1.1\r\nHost: ", request_bytes(PATH, ASK)[:-2]][number % 3])
    began = time.monotonic()
    assert live.http.post(PATH, json=ASK).json()["choices"][0]["text"] == live.wanted
    assert time.monotonic() - began < 10
    for wire in wires:
        wire.close()


@pytest.mark.parametrize(
    "data",
    [b"\x00" * 5000, b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"],
    ids=["zeros", "long path", "negative length"],
)
def test_what_is_no_http(live, data):
    with connected(live.url) as wire:
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: wire.recv(4000), b""))
    assert answer == b"" or b" 40" in answer.splitlines()[0] or b" 41" in answer.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_a_body_of_100_mb(live, known):
    data = json.dumps({"prompt": "x" * (100 << 20)}).encode()
    content = data if known else (data[at : at + 65536] for at in range(0, len(data), 65536))
    headers = {"Content-Type": "application/json"}
    response = live.http.post(PATH, content=content, headers=headers)
    assert response.status_code == 413 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_lm_eval_as_a_client(live):
    for package in ("lm_eval", "tenacity"):  # pip install lm-eval[api]
        pytest.importorskip(package)
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = str(live.worker.make_engine.__self__.folder)
    how = {"tokenizer_backend": "huggingface", "tokenizer": folder, "max_length": 256, "batch_size": 4}
    model = LocalCompletionsAPI(base_url=live.url + PATH, model="tiny-chat", num_concurrent=2, **how)
    prompts = [f"def f{n}(x):\n    return" for n in range(10)]
    asked = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, dict(asked)), n) for n, prompt in enumerate(prompts)]
    found = model.generate_until(requests, disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        own = live.http.post(PATH, json=ASK | {"prompt": prompt, "max_tokens": 12, "stop": "\n\n"})
        assert text == own.json()["choices"][0]["text"]


@pytest.mark.slow
def test_load(tmp_path):
    """scripts/load_test.py, with fewer requests: nothing lost, nothing wrong, memory flat."""
    out = tmp_path / "load.json"
    command = [sys.executable, "scripts/load_test.py", "--requests", "160", "--rounds", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    job, whole, streamed, alone, ended = json.loads(out.read_text())["rows"]
    assert all(row["wrong"] == 0 for row in (whole, streamed, alone, ended))
    assert all(row["lost"] == 0 for row in (whole, streamed, ended))
    assert min(whole["share_of_job"], streamed["share_of_job"]) > 0.5 and job["tokens_per_s"] > 0
    assert ended["answered"] >= 16 and ended["refused"] > 0
    for row in (whole, streamed):
        assert row["server_mib"][-1] < 1.1 * row["server_mib"][1]


@pytest.mark.slow
def test_many_clients_come_and_go(live):
    """Half of them leave in the middle of their answers."""

    def come(number: int) -> str | None:
        if number % 2:
            with connected(live.url) as wire:
                wire.sendall(request_bytes(PATH, ASK | {"max_tokens": 100, "stream": number % 4 == 1}))
                time.sleep(0.01 * (number % 7))
            return None
        return live.http.post(PATH, json=ASK).json()["choices"][0]["text"]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(come, range(200)))
    assert {text for text in found if text is not None} == {live.wanted}
