"""The page, in a real headless browser, before a server without a model."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "serving" / "page.html"
LAYERS, HEADS, SLOT_BYTES = 6, 3, 1024
LANES = ["squeezed", "uniform", "full"]
LONG = "\n".join(f"Line {n} of a log that says: the sea was calm and the boat was full." for n in range(12))


# ---- a server that does what serve.py does, without a model


def kept(lane: str, prompt: int, seen: int) -> list[list[list[int]]]:
    """Runs of each layer: full keeps all, uniform the last third, squeezed more in later layers, some in one head."""
    if lane == "full":
        return [[[0, seen, HEADS]]] * LAYERS
    sizes = [prompt // 3] * LAYERS if lane == "uniform" else [(2 + 2 * layer) * prompt // 18 for layer in range(LAYERS)]
    return [[[0, 1, HEADS], [seen - size, 2, 1], [seen - size + 2, size - 2, HEADS]] for size in sizes]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status: int, value: dict | bytes, kind: str = "application/json") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.answer(
            status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        )

    def allowed(self) -> bool:
        key = self.server.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.refuse(401, "give the API key")
            return False
        return True

    def do_GET(self):
        if self.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.allowed():
            self.answer(200, {"object": "list", "data": [{"id": "a-model", "object": "model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        if not self.allowed():
            return
        chat = "chat" in self.path
        if chat and not self.server.template:
            return self.refuse(400, "the checkpoint has no chat template; use /v1/completions")
        if asked["max_tokens"] > 500:
            return self.refuse(400, "40 prompt + 501 new tokens exceed max-length 500")
        text = asked["messages"][-1]["content"] if chat else asked["prompt"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in self.server.events(asked, text, chat):
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left.append(asked["lane"])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.template, self.pause, self.says = None, True, 0.01, [" word"] * 12
        self.asked, self.left = [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def events(self, asked: dict, text: str, chat: bool):
        lane, words = asked["lane"], re.findall(r"\s*\S+", text)
        for count, said in enumerate([*self.says, None]):
            seen = len(words) + count
            runs = kept(lane, len(words), seen)
            plan = [sum(run[1] for run in layer) for layer in runs]
            cache = {"prompt_tokens": len(words), "seen": seen, "plan": plan, "heads": HEADS, "kept": runs}
            cache |= {
                "kv_bytes": sum(plan) * SLOT_BYTES,
                "kv_bytes_full": LAYERS * seen * SLOT_BYTES,
                "ms": 10.0 * count,
            }
            cache |= {"tokens_per_s": 42.0 if count else None} | ({"word": [said or ""]} if count else {"words": words})
            delta = {"delta": {"content": said} if said else {}} if chat else {"text": said or ""}
            yield {"choices": [{"index": 0, "finish_reason": None if said else "stop", **delta}], "cache": cache}
            time.sleep(self.pause)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tab(browser, server):
    """The page, at the width of a desk. No error of its script goes unseen."""
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.set_default_timeout(10_000)
    tab.goto(server.url)
    yield tab
    tab.close()
    assert not faults


def send(tab, text: str = LONG) -> None:
    tab.get_by_label("Message").fill(text)
    tab.keyboard.press("Enter")


def ended(tab) -> None:
    tab.locator("#log[aria-busy=false]").wait_for()


def picture(tab, view: int = 0) -> str:
    """The pixels of a view's canvas, once nothing fades any more."""
    before = None
    while (now := tab.locator("canvas").nth(view).evaluate("(canvas) => canvas.toDataURL()")) != before:
        before = now
        tab.wait_for_timeout(150)
    return now


def choose(tab, lane: str) -> None:
    tab.locator(f"input[value={lane}]").check(force=True)


def fits(tab) -> bool:
    return tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.slow
def test_a_prompt_is_sent_its_answer_streams_and_the_cache_moves(tab, server):
    server.pause = 0.2
    empty = picture(tab)
    send(tab)
    answer = tab.locator(".answer p")
    tab.locator(".answer p", has_text="word word").wait_for()
    early, drawn = answer.inner_text(), tab.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    ended(tab)
    assert answer.inner_text() == (" word" * 12).strip()
    assert len(early) < len(answer.inner_text()) and len({empty, drawn, picture(tab)}) == 3
    path, asked = server.asked[0]
    assert path == "/v1/chat/completions" and asked["lane"] == "squeezed" and asked["stream"] and asked["watch"]
    assert asked["max_tokens"] == 128 and asked["temperature"] == 0 and asked["model"] == "a-model"
    words, gone = tab.locator(".words span:not(.said-from)"), tab.locator(".words .w0")
    assert words.all_inner_texts()[0] == "Line" and gone.count() > 20 and words.count() == len(LONG.split()) + 12
    assert "%" in tab.locator(".bytes").inner_text() and "42.0 tokens/s" in tab.locator(".rate").inner_text()
    send(tab, "And then?")
    ended(tab)
    assert [message["role"] for message in server.asked[1][1]["messages"]] == ["user", "assistant", "user"]
    tab.get_by_role("button", name="New chat").click()
    assert not tab.locator(".answer").count() and picture(tab) == empty


@pytest.mark.slow
def test_the_switch_asks_another_cache_the_same(tab, server):
    send(tab)
    ended(tab)
    shown = {"squeezed": picture(tab)}
    for lane in ("uniform", "full"):
        choose(tab, lane)
        tab.get_by_role("button", name=f"Ask {lane}").click()
        ended(tab)
        shown[lane] = picture(tab)
        assert tab.locator(".view h2").all_inner_texts() == [lane]
    assert [asked["lane"] for _, asked in server.asked] == LANES and len(set(shown.values())) == 3
    assert len({json.dumps(asked["messages"]) for _, asked in server.asked}) == 1
    assert not tab.locator(".words .w0").count()  # the full cache
    choose(tab, "squeezed")
    assert picture(tab) == shown["squeezed"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_side_by_side(tab, server, width):
    tab.set_viewport_size({"width": width, "height": 800})
    choose(tab, "together")
    send(tab)
    ended(tab)
    assert sorted(asked["lane"] for _, asked in server.asked) == sorted(LANES)
    assert tab.locator(".view h2").all_inner_texts() == LANES and tab.locator(".answer").count() == 3
    tops = {round(view.bounding_box()["y"]) for view in tab.locator(".view").all()}
    assert len(tops) == (1 if width == 1280 else 3) and fits(tab)
    assert len({picture(tab, view) for view in range(3)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_ends_the_answer_and_the_request(tab, server, how):
    server.pause, server.says = 0.05, [" word"] * 2000
    send(tab)
    tab.locator(".answer p", has_text="word word").wait_for()
    tab.keyboard.press(how) if how == "Escape" else tab.get_by_role("button", name="Stop").click()
    ended(tab)
    assert "stopped" in tab.locator(".answer").inner_text() and "word" in tab.locator(".answer p").inner_text()
    for _ in range(100):
        if server.left:
            break
        time.sleep(0.05)
    assert server.left == ["squeezed"] and tab.get_by_label("Message").evaluate("(m) => m === document.activeElement")


@pytest.mark.slow
def test_all_of_it_works_by_keyboard_and_focus_can_be_seen(tab, server):
    reached = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        focus = "(() => { const e = document.activeElement; return [e.id || e.value || e.className || e.tagName,"
        focus += " getComputedStyle(e.matches('.lanes input') ? e.nextElementSibling : e).outlineWidth]; })()"
        name, outline = tab.evaluate(focus)
        if name != "BODY":
            reached.append(name)
            assert outline == "2px", name
    assert {"message", "send", "new", "max-tokens", "temperature", "squeezed", "log", "CANVAS"} <= set(reached)
    tab.locator("input[value=squeezed]").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".view h2").all_inner_texts() == ["uniform"]
    tab.get_by_label("Message").focus()
    tab.keyboard.type("one two")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type(LONG.replace("\n", " "))
    tab.keyboard.press("Enter")
    ended(tab)
    assert server.asked[0][1]["messages"][0]["content"].startswith("one two\nLine 0")
    tab.locator("canvas").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    assert tab.locator(".readout").inner_text() == "layer 1, token 2 “Line”: evicted"


@pytest.mark.slow
def test_an_error_is_one_line(tab, server):
    tab.get_by_label("max tokens").fill("501")
    send(tab)
    ended(tab)
    assert tab.get_by_role("alert").inner_text() == "40 prompt + 501 new tokens exceed max-length 500"
    tab.get_by_label("max tokens").fill("5")
    send(tab, "again")
    ended(tab)
    assert tab.get_by_role("alert").inner_text() == "" and len(server.asked[1][1]["messages"]) == 1
    server.says = [" word", None]
    server.events = lambda *_: iter([{"error": {"message": "the logits are not finite"}}])
    send(tab, "again")
    ended(tab)
    assert tab.get_by_role("alert").inner_text() == "the logits are not finite"


@pytest.mark.slow
def test_without_a_chat_template_the_text_is_continued(tab, server):
    server.template = False
    send(tab, "Once")
    ended(tab)
    send(tab, "Then")
    ended(tab)
    asked = [(path, body.get("prompt")) for path, body in server.asked]
    assert asked[1:] == [("/v1/completions", "Once"), ("/v1/completions", f"Once{' word' * 12}\nThen")]
    assert "no chat template" in tab.locator("#plain").inner_text()


@pytest.mark.slow
def test_a_key_is_asked_for_only_when_the_server_does(browser, tab, server):
    stored = "JSON.stringify([sessionStorage.length, localStorage.length])"
    send(tab, "one")
    ended(tab)
    assert not tab.locator("#key").is_visible() and tab.evaluate(stored) == "[0,0]"
    server.key = "secret"
    send(tab, "two")
    ended(tab)
    assert tab.get_by_role("alert").inner_text() == "give the API key"
    tab.get_by_label("API key").fill("secret")
    tab.keyboard.press("Enter")
    ended(tab)
    assert tab.locator(".answer").count() == 2 and tab.evaluate(stored) == "[1,0]"


@pytest.mark.slow
def test_what_a_model_says_is_never_markup(tab, server):
    server.says = ["<img src=x onerror=alert(1)>", "<script>alert(2)</script>"]
    send(tab, "<b>bold</b> " + LONG)
    ended(tab)
    assert tab.locator(".answer p").inner_text() == "".join(server.says)
    assert not tab.locator("img, main b:not(.bytes b):not(.rate b), main script").count()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_its_text_can_be_read(tab, server, width, scheme):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    assert fits(tab)
    send(tab, LONG + "x" * 500)
    ended(tab)
    assert fits(tab)
    colors = "(e) => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    for place in (".bytes", ".readout", ".answer h3", ".answer p", "#model", ".legend", ".small", ".view h2"):
        found = tab.locator(place).first.evaluate(colors)
        assert contrast(*found) > 4.5, place


def contrast(*colors: str) -> float:
    """As WCAG has it."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_the_real_server_understands_the_page(browser):
    """The embedded model, which has no chat template: three caches at the same prompt."""
    pytest.importorskip("serving.app", reason="needs requirements-serve.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve.py"), "--squeeze", "--budget", "0.3", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": 800})
            for _ in range(120):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.5)
            tab.goto(f"http://127.0.0.1:{port}/")
            choose(tab, "together")
            tab.get_by_label("max tokens").fill("24")
            send(tab, "\n".join(f"def f{n}(a, b):\n    return a + b * {n}" for n in range(12)))
            tab.locator(".answer p").nth(2).wait_for()
            tab.locator("#log[aria-busy=false]").wait_for(timeout=60_000)
            gone = [view.locator(".w0, .w1, .w2, .w3").count() for view in tab.locator(".view").all()]
            answers = tab.locator(".answer p").all_inner_texts()
            assert tab.get_by_role("alert").inner_text() == "" and len(answers) == 3 and all(answers)
            assert gone[0] > 20 and gone[1] > 20 and gone[2] == 0 and tab.locator("#plain").is_visible()
            shares = [int(re.search(r"(\d+)%", text)[1]) for text in tab.locator(".bytes").all_inner_texts()]
            assert shares[2] == 100 and 20 < shares[0] < 40 and 20 < shares[1] < 40
            tab.close()
        finally:
            process.terminate()


class Checker(HTMLParser):
    """Whether what is opened is closed, and no id is given twice."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def check_whole(text: str) -> None:
    """HTML that is whole and needs nothing from elsewhere, and never makes markup of text."""
    checker = Checker()
    checker.feed(text)
    assert not checker.open and len(set(checker.ids)) == len(checker.ids) > 10
    assert all(reference.startswith("data:") for reference in checker.references), checker.references
    assert not re.findall(r"https?://|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert "default-src 'none'" in text


def test_the_page_is_whole_and_needs_nothing_from_elsewhere():
    check_whole(PAGE.read_text())
