"""A server over several ranks: all do what the first one's clients want, and end together."""

import gc
import json
import os
import re
import signal
import subprocess
import time
from queue import SimpleQueue
from weakref import WeakSet

import httpx
import pytest
from serving_tools import FAST, chat_folder, serving, until
from test_parallel import torchrun

import parallel
import serve
from promptcache import PromptCache

TALK = [{"role": "user", "content": "hello"}]


def test_a_follower_does_what_the_leader_does(monkeypatch, tmp_path):
    """Within one process, each with a whole model: answers, kept conversations, what is cancelled, the end."""
    folder, told, make_server = chat_folder(tmp_path), SimpleQueue(), serve.make_server

    def as_rank(rank: int, asked: serve.Serving, line):
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "shard", lambda: parallel.Shard(rank, 2))
            patch.setattr(parallel, "line", lambda: line)
            return make_server(asked)

    monkeypatch.setattr(serve, "make_server", lambda asked: as_rank(0, asked, told.put))
    argv = ["--checkpoint", str(folder), "--keep", "1"]
    _, follower = as_rank(1, serve.Serving(serve.parse([*FAST, "--no-page", *argv])), lambda _: told.get())
    answers = []
    follower_made = follower.heard
    follower.heard = lambda news: (answers.extend(own for own in news if own.end), follower_made(news))
    follower.start()
    with serving(*argv) as live:
        sampled = {"prompt": ["def", "class A"], "max_tokens": 9, "temperature": 0.8, "seed": 4, "stop": ["\n\n"]}
        texts = [each["text"] for each in live.http.post("/v1/completions", json=sampled).json()["choices"]]
        messages = TALK
        for turn in range(3):
            chat = live.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5}).json()
            assert (chat["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == (turn > 0)
            answer = chat["choices"][0]["message"]["content"]
            texts.append(answer)
            messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "and"}]
        streamed = {"prompt": "x", "max_tokens": 200, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=streamed) as response:
            next(response.iter_lines())
        until(lambda: not follower.running)
        texts.append(live.http.post("/v1/completions", json={"prompt": "y"}).json()["choices"][0]["text"])
        until(lambda: len(answers) >= len(texts))
        seeded = [own.text for own in answers[:2]]
        assert sorted(seeded) == sorted(texts[:2])
        assert [len(own.text) > 0 for own in answers] == [len(text) > 0 for text in texts]
        until(lambda: len(follower.kept) <= 2)  # the latest, and one that the next orders will drop
        assert not follower.asked
    follower.wait()


def test_caches_that_nobody_needs_are_gone_at_once(monkeypatch, tmp_path):
    """Not only when Python looks for cycles, which may be long after memory is short."""
    made = WeakSet()

    def tracked(*args) -> PromptCache:
        made.add(cache := PromptCache(*args))
        return cache

    monkeypatch.setattr("engine.PromptCache", tracked)
    gc.disable()
    try:
        with serving("--checkpoint", str(chat_folder(tmp_path)), "--keep", "2") as live:
            for turn in range(5):
                messages = [{"role": "user", "content": f"hello {turn}"}]
                live.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3})
                assert made
            until(lambda: len(made) == 2)
    finally:
        gc.enable()


def test_what_a_server_on_several_ranks_does_not_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parallel, "started", lambda: 2)
    with pytest.raises(serve.UserError, match="--cache-dir is for a server on one rank"):
        serve.Serving(serve.parse([*FAST, "--cache-dir", str(tmp_path)]))


def answered(url: str) -> list:
    """What a server says to some requests, without what differs from run to run."""
    found, messages = [], TALK
    with httpx.Client(base_url=url, timeout=60) as http:
        for more in ({"prompt": ["def main", "class A"]}, {"prompt": "for", "temperature": 0.9, "seed": 5}):
            body = {"max_tokens": 20, "temperature": 0} | more
            found.append(http.post("/v1/completions", json=body).json()["choices"])
        for _ in range(3):
            body = {"messages": messages, "max_tokens": 9, "temperature": 0}
            chat = http.post("/v1/chat/completions", json=body).json()
            found.append((chat["choices"], chat["usage"]))
            said = {"role": "assistant", "content": chat["choices"][0]["message"]["content"]}
            messages = [*messages, said, {"role": "user", "content": "and"}]
        body = {"prompt": "import", "max_tokens": 6, "lane": "squeezed", "stream": True, "watch": True}
        lines = http.post("/v1/completions", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        caches = [event["cache"] for event in events if "cache" in event]
        found.append([caches[-1][name] for name in ("plan", "seen", "kv_bytes", "kv_bytes_full")])
    return found


@pytest.mark.slow
def test_two_ranks_serve_what_one_serves(tmp_path):
    folder = chat_folder(tmp_path)
    argv = ["--checkpoint", str(folder), "--policy", "h2o", "--layers", "perturbation", "--budget", "64"]
    argv += ["--max-length", "256", "--batch-size", "2", "--port", "0", "--dtype", "float64", "--quiet"]
    with serving(*argv[:-1], "--page") as live:
        want = answered(live.url)
    for victim in (None, 1):
        process = torchrun(*argv, program="serve.py")
        url = re.search(r"http://[^,\s]+", process.stdout.readline())[0]
        assert answered(url) == want
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        started = time.monotonic()
        if victim is None:
            process.terminate()
        else:
            os.kill(int(children[victim]), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - started < 30
        ours = [line for line in said.splitlines() if line.startswith("serve.py: ")]
        lost = ["serve.py: error: another rank was ended, and all others with it; start them again"]
        assert ours == (lost if victim else [])
