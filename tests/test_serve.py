"""serve.py: a live server and its clients. Answers are those of `Engine.stream`; what goes wrong ends nothing else."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from signal import SIGINT, SIGTERM
from threading import Event

import httpx
import openai
import pytest
from serving_tools import TEMPLATE, chat_folder, connected, events, request_bytes, serving, until

import chat
import serve
import tokenizer as tokenizers
from checkpoint import EMBEDDED
from conversation import Conversation
from engine import Engine
from promptcache import PromptCache
from tokenizer import TextStream

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = tokenizers.load(EMBEDDED)
PROMPTS = ["def main", "import os\n", "class A:\n    def __init__(self", "# a comment"]
GREEDY = {"model": "tiny-chat", "temperature": 0}
ASK = {"prompt": "def main", "max_tokens": 4, "temperature": 0}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = chat_folder(tmp_path_factory.mktemp("served"))
    caches = tmp_path_factory.mktemp("caches")
    limits = ("--queue", "6", "--max-body", "1", "--timeout", "20", "--keep", "2")
    with serving("--checkpoint", str(folder), "--cache-dir", str(caches), *limits) as live:
        yield live


@pytest.fixture(autouse=True)
def _all_rows_are_free_again(request):
    """Whatever a test did: nothing of it runs on, and the next request is answered."""
    yield
    if "live" in request.fixturenames:
        live = request.getfixturevalue("live")
        until(lambda: live.worker.running == live.worker.waiting == 0 == live.worker.loads[None])
        until(lambda: not live.server.handled)
        assert live.http.post(PATH, json=ASK).json()["choices"][0]["text"] == alone(live, "def main", 4)


def alone(live, prompt: str | list[int], new: int, eos: bool = True) -> str:
    """The answer that the request gets by itself, under the server's plan."""
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return by_itself(live.worker.engine, tuple(live.worker.plan), tuple(ids), new, eos)


@lru_cache
def by_itself(engine: Engine, plan: tuple[int, ...], ids: tuple[int, ...], new: int, eos: bool) -> str:
    other = Engine(engine.model, engine.policy, plan=plan)
    return TOKENIZER.decode(list(other.stream(ids, max_new_tokens=new, eos_ids=[0] if eos else [])))


def error_of(response: httpx.Response) -> dict:
    """The error of an answer in OpenAI's form."""
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


# ---- answers


def test_completions_whole_and_streamed_are_those_of_the_engine(live):
    for number, prompt in enumerate(PROMPTS):
        new = 3 + 4 * number
        wanted = alone(live, prompt, new)
        whole = live.openai.completions.create(**GREEDY, prompt=prompt, max_tokens=new)
        assert whole.choices[0].text == wanted
        usage = whole.usage
        assert (usage.prompt_tokens, usage.total_tokens) == (
            len(TOKENIZER.encode(prompt)),
            usage.prompt_tokens + usage.completion_tokens,
        )
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(live.openai.completions.create(**GREEDY, prompt=prompt, max_tokens=new, **options))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == wanted
        assert chunks[-1].usage == usage and {chunk.usage for chunk in chunks[:-1]} == {None}
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
            whole.choices[0].finish_reason
        ]
        assert len({chunk.id for chunk in chunks}) == 1 and whole.id.startswith("cmpl-")


def test_many_prompts_are_choices_in_order(live):
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        found = live.openai.completions.create(**GREEDY, prompt=prompt, max_tokens=4)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in found.choices] == [alone(live, each, 4) for each in PROMPTS]
        texts = [""] * 4
        for chunk in live.openai.completions.create(**GREEDY, prompt=prompt, max_tokens=4, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in found.choices]
    assert live.openai.completions.create(**GREEDY, prompt=ids[0], max_tokens=4).choices[0].text == texts[0]


def test_chat_goes_through_the_template(live):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def f"}]
    template = chat.ChatTemplate(TEMPLATE, TOKENIZER, {})
    wanted = alone(live, template.prompt(messages), 8)
    whole = live.openai.chat.completions.create(**GREEDY, messages=messages, max_completion_tokens=8)
    assert (whole.choices[0].message.content, whole.choices[0].message.role) == (wanted, "assistant")
    parts = [
        messages[0],
        {"role": "user", "content": [{"type": "text", "text": "de"}, {"type": "text", "text": "f f"}]},
    ]
    chunks = list(live.openai.chat.completions.create(**GREEDY, messages=parts, max_tokens=8, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert whole.usage.prompt_tokens == len(template.prompt(messages))
    # What the client returns can be sent again.
    again = [*messages, whole.choices[0].message, {"role": "user", "content": "and g"}]
    live.openai.chat.completions.create(**GREEDY, messages=again, max_tokens=2)


def test_stop_strings_and_reasons(live):
    text = alone(live, "def main", 20)
    stop = text[10:13]
    found = live.openai.completions.create(**GREEDY, prompt="def main", max_tokens=20, stop=["never there", stop])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    chunks = live.openai.completions.create(**GREEDY, prompt="def main", max_tokens=20, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    length = live.openai.completions.create(**GREEDY, prompt="def main", max_tokens=3)
    assert (length.choices[0].finish_reason, length.usage.completion_tokens) == ("length", 3)
    assert len(live.openai.completions.create(**GREEDY, prompt="x").choices[0].text) > 0
    assert live.openai.completions.create(**GREEDY, prompt="x").usage.completion_tokens <= 16


def test_equal_seeds_give_equal_text(live):
    own = {"prompt": "def main", "max_tokens": 6, "temperature": 1.5, "top_p": 0.9}
    texts = [live.http.post(PATH, json={**own, "seed": seed}).json()["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    drawn = {live.http.post(PATH, json={**own, "top_k": 50}).json()["choices"][0]["text"] for _ in range(3)}
    assert len(drawn) > 1
    one = live.http.post(PATH, json={**own, "top_k": 1}).json()["choices"][0]["text"]
    assert one == alone(live, "def main", 6)


def test_requests_at_a_time_get_what_they_get_alone(live):
    asked = [(PROMPTS[n % 4], 3 + 7 * n % 20) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda own: live.openai.completions.create(**GREEDY, prompt=own[0], max_tokens=own[1]), asked)
        assert [each.choices[0].text for each in found] == [alone(live, *own) for own in asked]


def test_what_else_it_serves(live):
    assert [model.id for model in live.openai.models.list()] == ["tiny-chat"]
    assert live.openai.models.retrieve("tiny-chat").id == "tiny-chat"
    assert live.http.get("/health").json()["status"] == "ok"
    text = live.http.get("/metrics").text
    for line in ("squeeze_fast_rows 2.0", 'squeeze_fast_plan_slots{layer="0"} 64.0', "squeeze_fast_queue_length 0.0"):
        assert line in text.splitlines()
    assert 'squeeze_fast_requests_total{endpoint="/v1/completions",outcome="200"}' in text
    document = live.http.get("/openapi.json").json()
    assert "prompt" in document["components"]["schemas"]["CompletionBody"]["required"]
    for path, status in (("/nowhere", 404), ("/v1/models/other", 404), ("/", 404)):
        response = live.http.get(path)
        assert response.status_code == status and error_of(response)
    assert error_of(live.http.get(PATH)) and live.http.get(PATH).status_code == 405


# ---- bad requests


BAD = [  # a change of a good body, the parameter that is named, and a part of the message
    ({"prompt": None}, "prompt", "prompt must be a string"),
    ({"prompt": 5}, "prompt", "not 5"),
    ({"prompt": []}, "prompt", "prompt must be"),
    ({"prompt": [[]]}, "prompt", "prompt must be"),
    ({"prompt": [1, "a"]}, "prompt", "prompt must be"),
    ({"prompt": [True]}, "prompt", "prompt must be"),
    ({"prompt": [5000]}, None, "token id 5000 is outside the vocabulary (0 to 2047)"),
    ({"prompt": [10**30]}, None, "token id 1000"),
    ({"prompt": "x", "max_tokens": 256}, None, "1 prompt + 256 new tokens exceed max-length 256"),
    ({"prompt": "a b " * 2000}, None, "exceed max-length 256"),
    ({"prompt": ["x"] * 9}, "prompt", "9 prompts are more than 2 rows and 6 that may wait"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be an integer of at least 1, not 0"),
    ({"max_tokens": True}, "max_tokens", "not True"),
    ({"max_tokens": 10**400}, None, ""),
    ({"temperature": -1}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "not 'hot'"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_k": 1.5}, "top_k", "not 1.5"),
    ({"seed": 2**63}, "seed", "2**63"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["x" * 300]}, "stop", "1 to 256 characters"),
    ({"stream": 1}, "stream", "not 1"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "unknown field 'other'"),
    ({"watch": True}, "watch", "goes with stream"),
    ({"lane": "full"}, "lane", "--no-page"),
    ({"lane": "fast"}, "lane", "full, uniform or squeezed"),
    ({"save_cache": "../x"}, "save_cache", "letters"),
    ({"n": 2}, "n", "n must be 1"),
    ({"best_of": 2}, "best_of", "best_of must be 1"),
    ({"logprobs": 1}, "logprobs", "logprobs must be null"),
    ({"echo": True}, "echo", "echo must be false"),
    ({"presence_penalty": 0.5}, "presence_penalty", "must be 0"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "must be {}"),
    ({"sufix": "x"}, "sufix", "unknown field 'sufix'"),
    ({"y" * 500: 1}, None, "unknown field 'yyy"),
    ({"model": "gpt-4"}, "model", "there is no model 'gpt-4' here, only 'tiny-chat'"),
]
BAD_CHATS = [
    ({"messages": None}, "messages", "a list of messages"),
    ({"messages": []}, "messages", "a list of messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    (
        {"messages": [{"role": "owner", "content": "x"}]},
        "messages[0].role",
        "system, developer, user, assistant or tool",
    ),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", "unknown field"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "type text"),
    ({"messages": ["x"]}, "messages[0]", "not 'x'"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of"),
    ({"tools": [{"type": "function"}]}, "tools", "chat_template_kwargs can show it tools"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "without tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": "", "tool_calls": 5}]}, "messages[0].tool_calls", "a list of objects"),
    ({"reasoning_effort": "high"}, None, "reads no 'reasoning_effort'; its options are: "),
    ({"reasoning_effort": 3}, "reasoning_effort", "a string"),
    ({"chat_template_kwargs": {"enable_thinkin": True}}, None, "reads no 'enable_thinkin'"),
    ({"chat_template_kwargs": {"messages": []}}, None, "reads no 'messages'"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
    ({"response_format": {"type": "json_object"}}, "response_format", "supports nothing else"),
    ({"max_tokens": None, "max_completion_tokens": 300}, None, "exceed max-length 256"),
]
NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "user": "me",
    "metadata": {"a": "b"},
    "stop": None,
    "seed": None,
    "stream": False,
}


@pytest.mark.parametrize(("change", "param", "part"), BAD, ids=[str(bad[0])[:40] for bad in BAD])
def test_a_bad_field_is_named(live, change, param, part):
    if "max_tokens" in change and change["max_tokens"] == 10**400:
        response = live.http.post(PATH, content=b'{"prompt": "x", "max_tokens": 1' + b"0" * 9000 + b"}", headers=JSON)
    else:
        response = live.http.post(PATH, json=ASK | change)
    assert response.status_code == (404 if change.get("model") else 400)
    error = error_of(response)
    assert part in error["message"] and len(error["message"]) < 500
    assert param is None or error["param"] == param


@pytest.mark.parametrize(("change", "param", "part"), BAD_CHATS, ids=[str(bad[0])[:40] for bad in BAD_CHATS])
def test_a_bad_field_of_a_chat_is_named(live, change, param, part):
    good = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    response = live.http.post("/v1/chat/completions", json=good | change)
    assert response.status_code == 400
    assert part in error_of(response)["message"] and error_of(response)["param"] == param


def test_neutral_values_of_what_is_not_supported(live):
    more = {"best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    assert live.http.post(PATH, json=ASK | NEUTRAL | more).status_code == 200
    more = {"logprobs": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2} | NEUTRAL | more
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"[" * 100_000]
    + [b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "x", "temperature": NaN}'],
    ids=lambda data: data[:20],
)
def test_a_broken_body(live, data):
    response = live.http.post(PATH, content=data, headers=JSON)
    assert response.status_code == 400 and error_of(response)


def test_a_body_must_say_that_it_is_json(live):
    assert live.http.post(PATH, content=json.dumps(ASK)).status_code == 415
    assert error_of(live.http.post(PATH, data=ASK))


@pytest.mark.parametrize("length", ["given", "not given", "too small"])
def test_a_body_that_is_too_large(live, length):
    data = json.dumps({"prompt": "x" * (3 << 20)}).encode()
    if length == "too small":  # what follows the declared length is no request
        with connected(live.url) as wire:
            wire.sendall(request_bytes(PATH, b"{}").replace(b"}", b"}" + b"x" * 5000))
            assert b"400" in wire.recv(1000)
        return
    content = data if length == "given" else iter([data[:1000], data[1000:]])
    response = live.http.post(PATH, content=content, headers=JSON)
    assert response.status_code == 413 and "1 MiB" in error_of(response)["message"]


def test_a_body_that_does_not_come(live, monkeypatch):
    monkeypatch.setattr("serving.app.BODY_SECONDS", 0.2)
    with connected(live.url) as wire:
        wire.sendall(request_bytes(PATH, ASK)[:-3])
        answer = b"".join(iter(lambda: wire.recv(4000), b""))  # until the connection is closed
        assert b"408" in answer.splitlines()[0] and b"did not come in time" in answer


# ---- clients that leave, queues, faults, time, ends


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(live, stream, monkeypatch):
    """Within 2 steps of the engine hearing of it."""
    steps, lane = [], live.worker.lanes[None]
    step, cancel = lane.step, lane.cancel
    monkeypatch.setattr(lane, "step", lambda: (steps.append(lane.batch.free), time.sleep(0.02), step())[2])
    left = []
    monkeypatch.setattr(lane, "cancel", lambda answer: (left.append(len(steps)), cancel(answer)))
    with connected(live.url) as wire:
        wire.sendall(request_bytes(PATH, ASK | {"max_tokens": 240, "ignore_eos": True, "stream": stream}))
        until(lambda: live.worker.running == 1 and len(steps) > 3)
        if stream:
            assert b"200 OK" in wire.recv(100)
    before = len(steps)
    until(lambda: left)
    until(lambda: live.worker.running == 0 and lane.batch.free == 2)
    assert left[0] - before < 20  # hearing of it takes a moment of the event loop, not an answer
    assert len(steps) - left[0] <= 2


def test_a_full_queue_is_a_429(live, monkeypatch):
    """With 2 in rows and 6 that wait."""
    lane, go = live.worker.lanes[None], Event()
    step = lane.step
    monkeypatch.setattr(lane, "step", lambda: (go.wait(20), step())[1])
    with ThreadPoolExecutor(8) as pool:
        accepted = [pool.submit(lambda: httpx.post(live.url + PATH, json=ASK, timeout=30)) for _ in range(8)]
        until(lambda: len(live.server.handled) == 8)
        refused = live.http.post(PATH, json=ASK)
        with pytest.raises(openai.RateLimitError):
            live.openai.completions.create(**GREEDY, prompt="x")
        go.set()
        assert [each.result().status_code for each in accepted] == [200] * 8
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert error_of(refused)["type"] == "rate_limit_error"
    with pytest.raises(openai.BadRequestError):
        live.openai.completions.create(model="tiny-chat", prompt=5)


def test_a_fault_of_one_request_ends_it_alone(live, monkeypatch):
    """Its text cannot be made; the one beside it goes on."""

    class Faulty(TextStream):
        def __init__(self, tokenizer, stops, continues):
            super().__init__(tokenizer, stops, continues)
            self.faulty = stops == ["zz"]

        def ends(self, tokens):
            if self.faulty and len(tokens) == 3:
                raise KeyError("a fault")
            return super().ends(tokens)

    monkeypatch.setattr("serving.forms.TextStream", Faulty)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(lambda: live.http.post(PATH, json=ASK | {"max_tokens": 20}))
        bad = live.http.post(PATH, json=ASK | {"max_tokens": 20, "stop": "zz"})
    assert bad.status_code == 500 and "a fault" in error_of(bad)["message"]
    assert good.result().json()["choices"][0]["text"] == alone(live, "def main", 20)
    streamed = live.http.post(PATH, json=ASK | {"max_tokens": 20, "stop": "zz", "stream": True})
    last = events(streamed.text)[-1]
    assert streamed.status_code == 200 and "a fault" in last["error"]["message"]


@pytest.mark.parametrize("where", ["step", "begin"])
def test_a_step_that_fails(live, where, monkeypatch):
    """Out of memory, say: of a step, all in flight fail; of a prompt that is read, only its own request."""
    lane, failures = live.worker.lanes[None], [1]
    decoder = lane.batch.decoder
    method = getattr(decoder, where)

    def failing(*args):
        if failures and live.worker.running == 2:
            failures.pop()
            raise RuntimeError("can't allocate memory")
        return method(*args)

    with ThreadPoolExecutor(2) as pool:
        body = ASK | {"max_tokens": 60, "ignore_eos": True}
        first = pool.submit(lambda: live.http.post(PATH, json=body))
        until(lambda: live.worker.running == 1)
        monkeypatch.setattr(decoder, where, failing)
        second = live.http.post(PATH, json=body)
        first = first.result()
    assert second.status_code == 500 and "allocate memory" in error_of(second)["message"]
    assert first.status_code == (500 if where == "step" else 200) and not failures


def test_logits_that_are_not_finite(live, monkeypatch):
    decoder = live.worker.lanes[None].batch.decoder
    ask = decoder.ask
    monkeypatch.setattr(decoder, "ask", lambda: lambda: [-1] * len(ask()()))
    response = live.http.post(PATH, json=ASK)
    assert response.status_code == 500 and "not finite in float32" in error_of(response)["message"]
    monkeypatch.undo()


def test_a_request_that_takes_too_long(live, monkeypatch):
    lane = live.worker.lanes[None]
    step = lane.step
    monkeypatch.setattr(lane, "step", lambda: (time.sleep(0.05), step())[1])
    slow = ASK | {"max_tokens": 200, "ignore_eos": True}
    monkeypatch.setattr(live.server, "settings", replace(live.server.settings, timeout=0.3))
    response = live.http.post(PATH, json=slow)
    assert response.status_code == 504 and "--timeout" in error_of(response)["message"]
    streamed = events(live.http.post(PATH, json=slow | {"stream": True}).text)
    assert streamed[-1]["error"]["code"] == "timeout" and len(streamed) > 1


def test_the_end_comes_when_all_is_answered():
    """What was accepted is answered, running or waiting; what comes later gets a 503. The first one made the plan."""
    with serving("--plan-text", "first", "--layers", "perturbation") as live:
        assert live.worker.plan is None
        prompt = "def main(argv):\n    return [x for x in argv if x]\n\n" * 7
        body = ASK | {"prompt": prompt, "max_tokens": 40, "ignore_eos": True}
        with ThreadPoolExecutor(6) as pool:
            accepted = [pool.submit(lambda: httpx.post(live.url + PATH, json=body, timeout=30)) for _ in range(6)]
            until(lambda: len(live.server.handled) == 6)
            live.stop()
            late = live.http.post(PATH, json=body)
            assert late.status_code == 503 and error_of(late)["type"] == "server_error"
            assert live.http.get("/health").status_code == 503
            texts = {each.result().json()["choices"][0]["text"] for each in accepted}
        assert texts == {alone(live, prompt, 40, eos=False)}
        assert sum(live.worker.plan) == 64 * 8 and len(set(live.worker.plan)) > 1
        assert live.worker.source == "the first request"


def test_a_key_and_an_origin():
    with serving("--api-key", "secret", "--cors", "http://page.example") as live:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00e9".encode("latin-1")}):
            for response in (live.http.post(PATH, json=ASK, headers=given), live.http.get("/v1/models", headers=given)):
                assert response.status_code == 401 and error_of(response)["type"] == "authentication_error"
        own = {"Authorization": "Bearer secret", "Origin": "http://page.example"}
        response = live.http.post(PATH, json=ASK, headers=own)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://page.example"
        other = live.http.post(PATH, json=ASK, headers=own | {"Origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers
        assert live.http.get("/health").status_code == 200


# ---- conversations and prompt caches


def metric(live, name: str) -> float:
    return live.server.metrics.registry.get_sample_value(f"squeeze_fast_{name}")


CHATS = "/v1/chat/completions"


def turns_of(live, said: list[str], messages: list | None = None, **more) -> tuple[list, list[str], list[dict]]:
    """A conversation goes on: all its messages, the answers, and the usage of each."""
    messages, texts, usages = list(messages or ()), [], []
    for text in said:
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, "temperature": 0, "max_tokens": 9, **more}
        answer = live.http.post(CHATS, json=body).json()
        messages.append(answer["choices"][0]["message"])
        texts.append(messages[-1]["content"])
        usages.append(answer["usage"])
    return messages, texts, usages


def cached(usage: dict) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def interactive(live, said: list[str], stops: tuple[str, ...] = ()) -> tuple[list[str], list[int]]:
    """The answers that generate.py --interactive gives, under the server's plan, and the tokens before each."""
    engine = live.worker.engine
    conversation = Conversation(Engine(engine.model, engine.policy, plan=live.worker.plan))
    turns, texts, prompts = chat.Turns(TOKENIZER, chat.ChatTemplate(TEMPLATE, TOKENIZER, {})), [], []
    for text in said:
        shown, seen = TextStream(TOKENIZER, stops, continues=True), conversation.seen
        stream = conversation.stream(turns.ids(text), 9, [0], shown.ends)
        list(stream)
        shown.flush()
        turns.add(text, shown.text)
        texts.append(shown.text)
        prompts.append(seen + len(stream.completion.request.ids))
    return texts, prompts


SAID = ["def f(x):", "and then?", "import os, sys", "once more, with feeling"]


@pytest.mark.parametrize("stop", [None, "e"])
def test_a_conversation_goes_on_from_its_kept_cache(live, stop):
    hits = metric(live, "kept_conversation_hits_total")
    _, texts, usages = turns_of(live, SAID, stop=stop)
    assert (texts, [usage["prompt_tokens"] for usage in usages]) == interactive(live, SAID, (stop,) if stop else ())
    ends = [usage["prompt_tokens"] + usage["completion_tokens"] - 1 for usage in usages]
    assert [cached(usage) for usage in usages] == [0, *ends[:-1]]
    assert metric(live, "kept_conversation_hits_total") == hits + 3
    # Other words of the assistant are another conversation, which is read from its beginning.
    changed = [{"role": "user", "content": SAID[0]}, {"role": "assistant", "content": texts[0] + "!"}]
    body = {"messages": [*changed, {"role": "user", "content": SAID[1]}], "temperature": 0, "max_tokens": 9}
    answer = live.http.post(CHATS, json=body).json()
    assert cached(answer["usage"]) == 0
    template = chat.ChatTemplate(TEMPLATE, TOKENIZER, {})
    assert answer["choices"][0]["message"]["content"] == alone(live, template.prompt(body["messages"]), 9)


def test_the_conversation_that_rested_longest_goes(live):
    """Two are kept; a conversation counts once, however many turns it has."""
    first, _, _ = turns_of(live, ["def f(x):", "go on"])
    turns_of(live, ["def g(x):", "go on"])
    first, _, [usage] = turns_of(live, ["and on"], first)
    assert cached(usage) > 0
    turns_of(live, ["def h(x):"])
    assert len(live.server.kept) == 2
    _, _, [usage] = turns_of(live, ["and on"], first)
    assert cached(usage) > 0
    _, _, [usage] = turns_of(live, ["go on"], [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    assert cached(usage) == 0
    streamed = {"messages": [{"role": "user", "content": "s"}], "temperature": 0, "max_tokens": 4, "stream": True}
    chunks = [chunk for chunk in events(live.http.post(CHATS, json=streamed).text) if chunk]
    said = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    streamed["messages"] += [{"role": "assistant", "content": said}, {"role": "user", "content": "t"}]
    answer = live.http.post(CHATS, json=streamed | {"stream": False}).json()
    assert cached(answer["usage"]) > 0


def test_a_saved_prompt_answers_many_questions(live):
    article, questions = "def f(x):\n    return x + 1\n" * 6, ["def g", "class A", "import "]
    saved = live.http.post(PATH, json=ASK | {"prompt": article, "save_cache": "article"}).json()
    seen = saved["usage"]["prompt_tokens"]
    engine = live.worker.engine
    other = Engine(engine.model, engine.policy, plan=live.worker.plan)
    past = PromptCache.load(f"{live.server.settings.cache_dir}/article.safetensors", other)
    bodies = [ASK | {"prompt": question, "load_cache": "article"} for question in [*questions, ""]]
    for body in bodies:
        answer = live.http.post(PATH, json=body).json()
        ids = TOKENIZER.encode(body["prompt"], special=False)
        wanted = list(other.stream(ids, max_new_tokens=4, eos_ids=[0], past=past))
        assert answer["choices"][0]["text"] == TOKENIZER.decode(wanted)
        usage = answer["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]) == (seen, seen + len(ids))
    body = {"messages": [{"role": "user", "content": "x"}], "load_cache": "article", "max_tokens": 3}
    assert live.http.post(CHATS, json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == seen


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"load_cache": "other"}, "there is no prompt cache other"),
        ({"save_cache": "x", "prompt": ["a", "b"]}, "one prompt"),
        ({"load_cache": "broken"}, "broken.safetensors"),
        ({"load_cache": "article", "max_tokens": 200}, "earlier"),
    ],
    ids=str,
)
def test_prompt_caches_that_cannot_be(live, change, part):
    folder = Path(live.server.settings.cache_dir)
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    live.http.post(PATH, json=ASK | {"prompt": "def f(x): return x\n" * 12, "save_cache": "article"})
    response = live.http.post(PATH, json=ASK | change)
    assert response.status_code == 400 and part in error_of(response)["message"]


# ---- what the page uses


def unpacked(event: dict) -> list[dict[int, int]]:
    """Of each layer, how many heads hold a position."""
    return [{first + n: heads for first, count, heads in layer for n in range(count)} for layer in event["kept"]]


@pytest.mark.parametrize("lane", [None, "full", "uniform", "squeezed"])
def test_a_watched_answer_shows_its_cache(paged, lane, monkeypatch):
    monkeypatch.setattr("serving.watching.SECONDS", 0)
    body = ASK | {"prompt": "def f(x):\n    return x + 1\n" * 7, "max_tokens": 6, "stream": True, "watch": True}
    chunks = events(paged.http.post(PATH, json=body | ({"lane": lane} if lane else {})).text)
    seen = [chunk["cache"] for chunk in chunks if chunk and "cache" in chunk]
    ids = TOKENIZER.encode(body["prompt"])
    text = "".join(choice["text"] for chunk in chunks if chunk for choice in chunk["choices"])
    assert "".join(word for event in seen for word in event["word"]) == text
    assert seen[0]["words"] == [TOKENIZER.decode([i]) for i in ids] and "words" not in seen[1]
    for number, event in enumerate(seen):
        assert event["prompt_tokens"] == len(ids) and event["seen"] == len(ids) + min(number, 5)
        for layer, slots in zip(unpacked(event), event["plan"], strict=True):
            assert sum(layer.values()) == 2 * min(slots, event["seen"]) and max(layer) == event["seen"] - 1
        assert event["kv_bytes"] == 2 * 2 * 32 * 4 * sum(event["plan"])
        assert event["kv_bytes_full"] == 2 * 2 * 32 * 4 * 8 * event["seen"]
    plan = seen[0]["plan"]
    if lane in ("full", "uniform"):
        assert plan == [len(ids) + 6 if lane == "full" else 32] * 8
    else:
        assert sum(plan) == 32 * 8 and (lane is None or len(set(plan)) > 1)


def test_a_fault_in_watching_ends_that_answer_alone(paged, monkeypatch):
    def faulty(watch, *args):
        raise KeyError("not seen")

    monkeypatch.setattr("serving.watching.Watch.event", faulty)
    body = ASK | {"max_tokens": 30, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(lambda: paged.http.post(PATH, json=body | {"stream": False}))
        until(lambda: paged.worker.running == 1)
        for lane in ({}, {"lane": "squeezed"}):
            response = paged.http.post(PATH, json=body | {"watch": True} | lane)
            assert response.status_code == 500 and "not seen" in error_of(response)["message"]
        assert good.result().json()["usage"]["completion_tokens"] == 30
    until(lambda: paged.worker.running == 0)


def test_a_lane_gives_what_generate_gives(paged):
    """Its plan is made from its own prompt; several at a time wait for each other, and one that leaves ends nothing."""
    prompt = "def f(x):\n    return x + 1\n" * 7
    model = paged.worker.engine.model
    wanted = TOKENIZER.decode(
        list(Engine(model, "dropkv", "perturbation", 32).stream(TOKENIZER.encode(prompt), max_new_tokens=8))
    )
    body = ASK | {"prompt": prompt, "max_tokens": 8, "lane": "squeezed"}
    with connected(paged.url) as wire:
        wire.sendall(request_bytes(PATH, body | {"max_tokens": 100}))
        until(lambda: paged.worker.running == 1)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda _: paged.http.post(PATH, json=body).json()["choices"][0]["text"], range(3))
        assert set(found) == {wanted}


@pytest.fixture(scope="module")
def paged():
    with serving("--page", "--budget", "32") as live:
        yield live


# ---- the command line


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--port", "70000"], "no port"),
        (["--host", "no.such.host.invalid"], "cannot listen on --host 'no.such.host.invalid'"),
        (["--timeout", "0"], "--timeout must be a positive number"),
        (["--max-body", "nan"], "--max-body must be"),
        (["--max-length", "100000"], "exceeds the model's 2048 positions"),
        (["--plan", "x", "--plan-text", "first"], "give one of --plan and --plan-text"),
        (["--plan-text", "/nowhere"], "/nowhere"),
        (["--max-memory", "0.001"], "out of memory"),
        (["--prompt", "x"], "unrecognized arguments"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(capsys, argv, part):
    assert serve.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and part in err and len(err.splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main([]) == 2
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[SIGTERM], [SIGINT], [SIGTERM, SIGTERM]], ids=str)
def test_signals_end_the_process(tmp_path, signals):
    """The first one when all is answered, with code 0; a second one at once."""
    command = [sys.executable, "serve.py", "--port", "0", "--squeeze", "--save-plan", str(tmp_path / "plan.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        url = line.partition(" on ")[2].partition(",")[0]
        assert str(json.loads((tmp_path / "plan.json").read_text())["plan"]) in line
        with ThreadPoolExecutor(1) as pool:
            body = ASK | {"max_tokens": 400, "ignore_eos": True}
            answer = pool.submit(lambda: httpx.post(url + PATH, json=body, timeout=60))
            until(lambda: httpx.get(url + "/health").json()["rows_in_use"])
            for sign in signals:
                process.send_signal(sign)
                time.sleep(0.2)
            if len(signals) == 1:
                assert answer.result().json()["usage"]["completion_tokens"] == 400
                assert process.wait(20) == 0
                assert process.stderr.read().count("\n") == 1  # the line of the request
            else:
                assert process.wait(2) == 128 + SIGTERM
                assert answer.exception() is not None


@pytest.mark.slow  # test_imports.py shows the same of our own files
def test_generate_imports_nothing_of_it():
    code = "import sys, generate; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"serving", *serve.PACKAGES} & set(done.stdout.split())


THINKING = """{{ tools | tojson if tools }}{{ reasoning_effort }}{% for m in messages %}# {{ m.role }}: {{ m.content }}
{% for call in m.tool_calls or [] %}{{ call.function.arguments.x }}{{ call.id }}{% endfor %}
{{- m.reasoning_content }}{{ m.tool_call_id }}{% endfor %}# assistant:{% if enable_thinking is false %}-{% endif %}"""


def test_what_a_template_reads_comes_with_the_body_or_the_command_line(tmp_path):
    """Thoughts, calls (their arguments as an object, not as the text that OpenAI has) and results too."""
    folder = chat_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(THINKING)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "y"}'}}
    messages = [
        {"role": "user", "content": "def f"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]
    given = {"enable_thinking": False, "tools": [{"a": 1}]}
    with serving("--checkpoint", str(folder), "--keep", "2", "--template-option", "reasoning_effort=low") as live:

        def ask(messages: list[dict], **more) -> tuple[int, int]:
            body = {"messages": messages, "temperature": 0, "max_tokens": 2} | more
            answer = live.http.post(CHATS, json=body).json()
            assert answer["choices"][0]["message"]["content"] == alone(live, TOKENIZER.encode(text, special=False), 2)
            return answer["usage"]["prompt_tokens"], cached(answer["usage"])

        text = "low# user: def f\n# assistant: \nyc1hm# tool: 5\nc1# assistant:"
        ask(messages)
        text = '[{"a": 1}]high' + text.removeprefix("low") + "-"
        ask(messages, chat_template_kwargs=given, reasoning_effort="high")
        ask(messages, chat_template_kwargs=given | {"reasoning_effort": "high"})
        # A kept conversation goes on with its own options only: they stand before its first turn.
        [said], url = turns_of(live, ["def f"])[1], CHATS
        turn = [messages[0], {"role": "assistant", "content": said}, {"role": "user", "content": "x"}]
        body = {"messages": turn, "temperature": 0, "max_tokens": 2, "reasoning_effort": "high"}
        assert cached(live.http.post(url, json=body).json()["usage"]) == 0
        del body["reasoning_effort"]
        assert cached(live.http.post(url, json=body).json()["usage"]) > 0


@pytest.mark.parametrize("option", ["enable_thinkin=1", "enable_thinking", "=1", "a-b=1"])
def test_a_template_option_that_is_none(tmp_path, option):
    with pytest.raises(ValueError, match="reads no 'enable_thinkin'|must be NAME=VALUE"):
        serve.Serving(serve.parse(["--checkpoint", str(chat_folder(tmp_path)), "--template-option", option]))
