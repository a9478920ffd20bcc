"""The embedded checkpoint is a working instrument, and its recipe runs and resumes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import demo
import pytest
from tokenizers import Tokenizer

import checkpoint
import generate
from engine import Engine, Request
from evaluation import tiny_data as data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny():
    model, _ = checkpoint.load(generate.EMBEDDED)
    tokenizer = Tokenizer.from_file(str(generate.EMBEDDED / "tokenizer.json"))
    source = "".join(data.read(file) for file in data.source_files()[1])
    return model, tokenizer, tokenizer.encode(source).ids


def recall(tiny, count: int, length: int = 1024, **settings) -> float:
    """Share of `count` unseen documents whose question is continued with the right two words."""
    model, tokenizer, filler = tiny
    rng, hits = random.Random(11), 0
    for _ in range(count // 8):
        prompts = [data.recall_prompt(rng, lambda text: tokenizer.encode(text).ids, filler, length) for _ in range(8)]
        requests = [Request(ids, max_new_tokens=len(answer)) for ids, answer in prompts]
        expected = {id(request): answer for request, (_, answer) in zip(requests, prompts, strict=True)}
        for completion in Engine(model, **settings).generate(requests):
            hits += completion.tokens == expected[id(completion.request)]
    return hits / count


def test_recalls_and_forgets_what_is_dropped(tiny):
    assert recall(tiny, 8) >= 0.7
    assert recall(tiny, 16, policy="window", budget=0.1) <= 0.35


def test_weights_fit_the_limit():
    assert (generate.EMBEDDED / "model.safetensors").stat().st_size <= 16e6


def test_the_demo_shows_its_point(capsys):
    def answer(*args: str) -> str:
        assert generate.main(["--json", "--max-new-tokens", "4", *args]) == 0
        return " ".join(json.loads(capsys.readouterr().out)["text"].split()[:2])

    full, squeezed, uniform = (answer(*args) for args in demo.RUNS.values())
    assert full == squeezed == "lantern violin" != uniform


def test_questions_are_single_tokens(tiny):
    _, tokenizer, _ = tiny
    for word in data.KEYS + data.VALUES:
        assert len(tokenizer.encode(f" {word}").ids) == 1, word
    assert len(set(data.KEYS + data.VALUES)) == len(data.KEYS) + len(data.VALUES)


@pytest.mark.slow
def test_the_recipe_runs_resumes_and_exports(tmp_path):
    def train(tokens: int) -> dict:
        run, out = tmp_path / "run", tmp_path / "out"
        command = [sys.executable, ROOT / "scripts" / "train_tiny.py", "--run", run, "--out", out, "--tokens", tokens]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return json.loads((run / "log.txt").read_text().splitlines()[-1])

    first, second = train(20_000), train(60_000)
    assert 20_000 <= first["tokens"] < second["tokens"] and first["step"] < second["step"]
    assert second["loss"]["code"] < first["loss"]["code"]
    model, config = checkpoint.load(tmp_path / "out")
    assert config.n_layers == 8 and "| 1024 |" in (tmp_path / "out" / "README.md").read_text()
