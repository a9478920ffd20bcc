"""The race: its page from tiny traces, in a real headless browser too; and recording one."""

import json
import re
from pathlib import Path

import pytest
import race
import torch
from conftest import random_ids
from test_page import check_whole, fits, picture

from benchmark import traces
from checkpoint import EMBEDDED
from engine import Engine, Request

ROOT = Path(__file__).resolve().parent.parent


def tiny_trace(device: str = "a machine") -> dict:
    """Two contestants: one holds all, the other evicts."""
    words, said = [" </script>", *(f" w{n}" for n in range(19))], [" so", " it", " is"]
    layers, prompt = 4, len(words)
    full = [[layer, 1, 0, prompt, 2] for layer in range(layers)] + [[]]
    full += [[n for layer in range(layers) for n in (layer, 1, prompt + at, 1, 2)] for at in range(2)]
    less = full[:3] + [[*full[3], 0, 1, 3, 12, 0, 1, 2, 0, 9, 0, 12, 2, 1]] + full[4:]
    common = {"about": "a cache", "words": said, "slot_bytes": 512, "peak_bytes": None, "first_token_s": 0.05}
    common |= {"tokens_per_s": 50.0, "compile_s": 0.0, "read_ms": [10.0, 20.0, 30.0, 40.0], "kv_bytes": 4 * 23 * 512}
    about = dict(device=device, threads=1, date="2026-01-01", torch="2", transformers="5", command="python race.py")
    return about | {
        "checkpoint": "tiny", "dtype": "float32", "runs": 1, "prompt_tokens": prompt, "heads": 2, "words": words,
        "contestants": [
            common | {"name": "full", "plan": None, "times_ms": [50.0, 300.0, 600.0], "frames": full},
            common | {"name": "squeezed", "plan": [23] * layers, "times_ms": [50.0, 150.0, 250.0], "frames": less},
        ],
    }  # fmt: skip


@pytest.fixture
def raced(tmp_path, capsys) -> Path:
    traces = [tmp_path / "race_a.json", tmp_path / "race_b.json"]
    for path in traces:
        path.write_text(json.dumps(tiny_trace(path.stem)))
    assert race.main(["--from", *map(str, traces), "--out", str(tmp_path / "race.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'race.html'}\n"
    return tmp_path / "race.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_race_plays_from_disk_and_ends_with_its_table(browser, raced, width):
    tab = browser.new_page(viewport={"width": width, "height": 800})
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.set_default_timeout(10_000)
    tab.goto(raced.as_uri())
    start, result = picture(tab), tab.locator("#result")
    assert not result.is_visible() and fits(tab) and tab.locator(".view").count() == 2
    assert not tab.locator(".w0").count()
    tab.get_by_role("button", name="Play").click()
    result.wait_for(state="visible")
    assert tab.locator("#rows tr").count() == 2 and "0.05 s" in result.inner_text() and fits(tab)
    assert [each.inner_text() for each in tab.locator(".said").all()] == [" so it is"] * 2 or ["so it is"] * 2
    assert tab.locator(".view").nth(1).locator(".w4, .w5, .w6").count() > 10 and picture(tab) != start
    assert tab.locator(".view").nth(0).locator(".w4, .w5, .w6").count() == 0
    tab.get_by_label("Time").fill("0")  # backwards
    assert picture(tab) == start and not result.is_visible()
    tab.get_by_label("Time").fill("0.28")
    assert [each.inner_text().strip() for each in tab.locator(".said").all()] == ["so", "so it is"]
    tab.get_by_label("recorded on").select_option(index=1)
    assert "race_b" in tab.locator("#origin").text_content() and not faults
    tab.close()


def test_the_race_is_whole_and_needs_nothing_from_elsewhere(raced):
    check_whole(text := raced.read_text())
    assert "<!-- style -->" not in text and "<!-- script -->" not in text


def test_the_race_holds_the_traces_as_they_are(raced):
    data = re.search(r'<script type="application/json" id="traces">(.*?)</script>', raced.read_text(), re.S)[1]
    assert json.loads(data) == [tiny_trace("race_a"), tiny_trace("race_b")]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("words", None, "'words' is missing"), ("heads", "2", "'heads' must be"), ("contestants", [{}], "'contestants'")],
)
def test_a_trace_that_is_none_is_one_line(tmp_path, capsys, key, value, said):
    trace = tiny_trace() | {key: value}
    if value is None:
        del trace[key]
    (tmp_path / "race_a.json").write_text(json.dumps(trace))
    assert race.main(["--from", str(tmp_path / "race_a.json"), "--out", str(tmp_path / "race.html")]) == 2
    assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "race.html").exists()


# ---- recording


def replayed(frames: list[list[int]], layers: int, length: int):
    """How many heads hold each token, as the page works it out, after each frame."""
    held = torch.zeros(layers, length, dtype=torch.int64)
    for frame in frames:
        numbers = iter(frame)
        for layer in numbers:
            for _ in range(next(numbers)):
                first, count, heads = next(numbers), next(numbers), next(numbers)
                held[layer, first : first + count] = heads
        yield held.clone()


@pytest.mark.parametrize(
    "cache",
    [{}, {"policy": "streaming", "budget": 0.3}, {"policy": "dropkv", "layers": "perturbation", "budget": 0.3}],
    ids=lambda cache: cache.get("policy", "full"),
)
def test_a_trace_is_what_the_layers_hold(model, cache):
    engine, ids, new, count = Engine(model, **cache), random_ids(60), 12, 9
    layers, heads, length, seen = 4, 2, len(ids) + new, len(ids) + count - 1
    found = [*replayed(traces.observed(engine, ids, new, count), layers, length)]
    read, steps = found[layers - 1], found[layers:]
    with engine.batch(1, length) as batch:
        completion = batch.add(Request(ids, new, watched=True))
        for step in steps:
            batch.step()
            assert batch.collect() == [completion]
            held = batch.held(completion)
            assert [traces.holders(own, heads, length).tolist() for own in held] == step.tolist()
    assert len(steps) == count and torch.equal(read, steps[0])
    evicted = (steps[-1][:, : len(ids)] == 0).any()
    assert evicted if cache else (steps[-1][:, :seen] == heads).all() and not steps[-1][:, seen:].any()
    for layer in range(layers):  # none holds anything before it has read the prompt
        assert not found[layer][layer + 1 :].any() and found[layer][layer].any()


def test_runs_are_as_few_as_they_can_be():
    before, after = torch.tensor([0, 0, 2, 2, 1, 1, 0]), torch.tensor([0, 2, 2, 1, 2, 2, 0])
    assert traces.changes(before, after) == [1, 1, 2, 3, 1, 1, 4, 2, 2] and traces.changes(after, after) == []


@pytest.mark.slow
def test_recording_the_embedded_model(tmp_path):
    """All of it: three processes, the trace, the page."""
    (tmp_path / "prompt.txt").write_text("def add(a, b):\n    return a + b\n\n" * 12)
    out, page = tmp_path / "race_cpu.json", tmp_path / "race.html"
    argv = ["--record", str(out), "--checkpoint", str(EMBEDDED), "--prompt-file", str(tmp_path / "prompt.txt")]
    assert race.main([*argv, "--max-new-tokens", "16", "--out", str(page)]) == 0
    trace = json.loads(out.read_text())
    assert [own["name"] for own in trace["contestants"]] == ["transformers", "full cache", "squeezed to 20%"]
    peer, full, small = trace["contestants"]
    assert peer["words"] == full["words"] and len(small["words"]) == 16 and full["plan"][0] > small["plan"][0]
    assert small["kv_bytes"] < 0.3 * full["kv_bytes"] and min(own["peak_bytes"] for own in (peer, full, small)) > 0
    length = trace["prompt_tokens"] + 16
    last = [list(replayed(own["frames"], len(own["read_ms"]), length))[-1] for own in (peer, full, small)]
    assert torch.equal(last[0], last[1])
    assert last[2].sum() < 0.3 * last[0].sum()
    for own in trace["contestants"]:
        moments = own["read_ms"] + own["times_ms"]
        assert moments == sorted(moments) and moments[0] > 0


def test_the_committed_traces_can_be_shown(tmp_path):
    files = sorted((ROOT / "results").glob("race_*.json"))
    assert files and all(file.stat().st_size < 2_000_000 for file in files)
    assert race.main(["--out", str(tmp_path / "race.html")]) == 0
    for trace in map(race.read_trace, map(str, files)):
        peer, full, small = trace["contestants"]
        assert peer["words"][:8] == full["words"][:8] and small["kv_bytes"] < 0.25 * full["kv_bytes"]
