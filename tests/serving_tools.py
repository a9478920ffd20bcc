"""A live server for tests: in a thread, on a free port of this machine."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace
from typing import Any

import httpx
from openai import OpenAI

import serve
from checkpoint import EMBEDDED
from serving.listening import Listener, listening

TEMPLATE = """{% for m in messages %}# {{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"""
FAST = ("--policy", "dropkv", "--budget", "64", "--max-length", "256", "--batch-size", "2", "--quiet")


def chat_folder(path: Path) -> Path:
    """The embedded model with a chat template."""
    folder = path / "tiny-chat"
    shutil.copytree(EMBEDDED, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def serving(*argv: str) -> Iterator[SimpleNamespace]:
    """url, openai (a client), http (a client), worker, server, and `stop`, which ends it as a signal does."""
    server, worker = serve.make_server(serve.Serving(serve.parse([*FAST, "--no-page", *argv])))
    worker.start()
    with listening("127.0.0.1", 0) as listener:
        listening_on = Listener(server, listener)
        thread = threading.Thread(target=listening_on.serve_until_told, daemon=True)
        thread.start()
        until(lambda: listening_on.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def stop() -> None:
            if not server.draining:
                listening_on.handle_exit(SIGTERM, None)

        with httpx.Client(base_url=url, timeout=30) as http:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
            try:
                yield SimpleNamespace(url=url, http=http, openai=client, worker=worker, server=server, stop=stop)
            finally:
                stop()
                thread.join(20)
                assert not thread.is_alive(), "the server does not end"
                worker.stop()


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never holds"
        time.sleep(0.005)


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def request_bytes(path: str, body: Any, **headers: str) -> bytes:
    """A POST as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}"] if "Transfer-Encoding" not in headers else []
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def events(text: str) -> list[Any]:
    """What a stream of events says; None for its end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]
