"""The benchmark: its limits against independent counts, its peer, its JSON, and one clear line for what is wrong."""

import json
import os
import random
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import bench
from benchmark import picture, roofline, stages, subjects
from benchmark.race import Contestant, Run, Sizes, attempt, race, turn
from config import ModelConfig
from engine import Engine, Request
from kernels import Linear
from kvcache import LayerCache
from model import Transformer
from needs import Needs

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = {  # as published with the checkpoints
    "smollm-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_248_023_552,
    "llama-3.1-8b": 8_030_261_248,
}
SMALL = "--device cpu --shape tiny --prompt 40 --new 6 --rounds 1 --batches 1,3".split()


@pytest.fixture(scope="module")
def tiny() -> subjects.Subject:
    return subjects.make("tiny", "cpu", torch.float32)


def requests(subject: subjects.Subject, batch: int, prompt: int, new: int) -> list[Request]:
    return stages.alike(subject, batch, Sizes("tiny", prompt, new))


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_sizes(name):
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_hf(subjects.SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", subjects.SHAPES)
def test_the_peer_has_the_same_weights_and_no_copy(name, tmp_path):
    small = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, vocab_size=101, head_dim=8)
    small |= dict(moe_intermediate_size=40, num_experts=9)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(subjects.SHAPES[name] | small | dict(num_attention_heads=6, num_key_value_heads=2)))
    subject = subjects.make(str(file), "cpu", torch.float32)  # in float64 transformers' rotary angles are still float32
    ids = torch.tensor(subject.prompts(2, 30))
    hf = subject.transformers.hf
    with torch.inference_mode():
        logits, own = hf(ids).logits, subject.model(ids)
    assert (logits - own).abs().max() < 1e-5 * own.abs().max()
    ours, theirs = subject.model.layers[1].attention.wqkv.weight, hf.model.layers[1].self_attn.k_proj.weight
    assert ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()


def test_all_contestants_give_the_same_tokens(tiny, uncompiled):
    wanted, peer = requests(tiny, 2, 20, 9), tiny.transformers
    runs = [run(wanted) for run in (peer.generate, peer.eager, peer.static)]
    runs += [stages.generated(Engine(tiny.model), wanted)]
    assert all(run.tokens == runs[0].tokens and run.prefill_s > 0 and run.step_s > 0 for run in runs)
    assert len(set(map(tuple, runs[0].tokens))) == 2 and all(len(row) == 9 for row in runs[0].tokens)


def test_a_peer_takes_prompts_of_any_lengths(tiny):
    wanted = [Request(*tiny.prompts(1, prompt), new) for prompt, new in ((9, 4), (20, 6), (13, 6))]
    ours = stages.generated(Engine(tiny.model), wanted).tokens
    theirs = stages.in_batches(Contestant("x", tiny.transformers.generate), 2, wanted).tokens
    assert all(own == their[: len(own)] for own, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_random_weights_of_few_bits(kind):
    """They are measured; transformers, which has no such weights, is a row that says so."""
    subject, sizes = subjects.make("tiny", "cpu", torch.float32, kind), Sizes("tiny", 12, 3, rounds=1, batches=(1,))
    assert not any(isinstance(module, Linear) for module in subject.model.modules())
    engines = [stages.ours(subject, "full", compile=False)]
    *peers, full = stages.beside_peers(subject, engines, sizes, "full", "tokens_per_s")
    assert full["tokens_per_s"] > 0 and full["of_roofline"] > 0
    assert len(peers) == 2 and all("ours are codes of 8 or 4 bits" in peer["failed"] for peer in peers)


def test_bytes_of_a_step_are_weights_and_filled_slots(tiny):
    run = stages.generated(Engine(tiny.model, "streaming", "squeeze", 12), requests(tiny, 3, 40, 4))
    weights = sum(t.nbytes for name, t in tiny.model.state_dict().items() if name != "embed.weight")
    rows = 3 * 64 * 4  # of the embedding
    assert roofline.step_bytes(tiny.model, 3, run.slots) == weights + rows + run.kv_bytes

    embedded = subjects.make("embedded", "cpu", torch.float32).model  # its tied table is read as the head
    stored = sum(tensor.nbytes for tensor in load_file(subjects.EMBEDDED / "model.safetensors").values())
    assert roofline.step_bytes(embedded, 1, 0) == stored + 128 * 4


def test_filled_slots_are_those_that_attention_is_told(tiny, monkeypatch):
    told = []
    attend = LayerCache.attend

    def telling(layer, q, valid, *rest):
        told.append(min(int(valid[0]), layer.slots))
        return attend(layer, q, valid, *rest)

    monkeypatch.setattr(LayerCache, "attend", telling)
    plan = [6, 9, 12, 40]
    run = stages.generated(Engine(tiny.model, "window", plan=plan), requests(tiny, 1, 7, 6))
    assert len(told) == 5 * len(plan) and run.slots == sum(told) / 5


@pytest.mark.parametrize("shape", ["tiny", "embedded"])
def test_operations_are_those_that_torch_counts(shape):
    model = (subject := subjects.make(shape, "cpu", torch.float32)).model
    config, batch, slots = model.config, 2, 10

    def counted(new: int) -> int:
        engine = Engine(model, "window", plan=[slots] * config.n_layers)
        with FlopCounterMode(display=False) as counter:
            stages.generated(engine, requests(subject, batch, 30, new))
        return counter.get_total_flops()

    attention = 4 * batch * config.n_layers * slots * config.n_heads * config.head_dim
    assert counted(3) - counted(2) == 2 * batch * roofline.matrix_elements(config) + attention
    pairs = batch * config.n_layers * config.n_heads * 30 * 31 / 2  # torch does not count the fused attention
    assert counted(1) == roofline.prefill_operations(model, batch, 30) - 4 * pairs * config.head_dim


def test_turns_make_rows_and_who_fails_is_out(tiny, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)  # takes seconds beside transformers
    calls, number = [], count(1)

    def run(name: str, *errors: Exception) -> Run:
        calls.append(name)
        if len(errors) >= calls.count(name):
            raise errors[calls.count(name) - 1]
        return Run([[1] * 6], 0.5, float(next(number)), compile_s=float(calls.count(name)))

    made = {"a": (), "b": (KeyError("no\nway"),), "c": ()}
    contestants = [Contestant(name, lambda _, name=name: run(name, *made[name])) for name in made]
    a, b, c = race(tiny, contestants, requests(tiny, 1, 40, 6), Sizes("tiny", rounds=2), ["c"])
    assert calls == list("abcacac") and b["failed"] == "'no\\nway'" and b["times"] == {}
    assert a["compile_s"] == 1 and (a["ms_per_step_min"], a["ms_per_step"], a["ms_per_step_max"]) == (3e3, 4e3, 5e3)
    assert a["tokens_per_s"] == 1 / 4 and a["times"] == {"c": 5 / 4} and a["prompt_tokens_per_s"] == 80
    assert a["of_roofline"] == a["roofline_ms"] / 4e3 and a["peak_bytes"] is None


def test_reasons():
    def fails(error: Exception, cause: Exception | None = None) -> None:
        raise error from cause

    out_of_memory = torch.OutOfMemoryError("of 80 GiB")
    for error, cause, reason in (
        (out_of_memory, None, "out of memory"),
        (RuntimeError("capture ended"), out_of_memory, "out of memory"),
        (RuntimeError("raised:\nx\ny"), None, "raised: x"),
        (RuntimeError("one\ntwo"), None, "one"),
        (OSError(), None, "OSError"),
    ):
        assert attempt(lambda error=error, cause=cause: fails(error, cause)) == reason


def test_random_plans():
    plans = [stages.random_plan(random.Random(seed), 8, 40) for seed in range(20)]
    assert all(sum(plan) == 320 and min(plan) >= 8 for plan in plans) and len(set(map(tuple, plans))) == 20


def test_jobs_are_chosen_in_their_order():
    def jobs(*args: str) -> list[tuple]:
        return [(stage, *sizes[:4]) for stage, sizes in bench.chosen(bench.parse(["--device", "cpu", *args]))]

    assert {stage for stage, *_ in jobs()} == set(bench.STAGES)
    assert jobs("--stage", "switch", "--stage", "decode", "--shape", "tiny", "--shape", "embedded", "--new", "3") == [
        ("decode", "tiny", 256, 3, (1,)),
        ("decode", "embedded", 256, 3, (1,)),
        ("switch", "tiny", 512, 3, (1,)),
        ("switch", "embedded", 512, 3, (1,)),
    ]


def run_json(capsys, *args: str) -> dict:
    assert bench.main([*SMALL, *args]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]


def test_decode_and_prefill_rows(capsys, uncompiled):
    every = (word for name in ("generate", "eager", "static") for word in ("--peer", name))
    measured = run_json(capsys, "--stage", "decode", "--stage", "prefill", *every)
    decode, prefill = measured["decode"], measured["prefill"]
    assert decode["copy_bytes_per_s"] > 0 and decode["matmul_operations_per_s"]["float32"] > 0
    assert {"device", "date", "torch", "command", "seconds"} <= set(decode)
    assert len(decode["rows"]) == 2 * (3 + 4) and len(prefill["rows"]) == 2 * (3 + 6)
    for row in decode["rows"] + prefill["rows"]:
        assert (row["shape"], row["dtype"]) == ("tiny", "float32") and "failed" not in row, row
        assert len(row["times"]) == 4 and row["times"].get(row["what"], 1) == 1
    for row in decode["rows"]:
        assert row["ms_per_step_min"] <= row["ms_per_step"] <= row["ms_per_step_max"] and row["of_roofline"] > 0
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"], rel=1e-3)
    assert all("ms_per_step" not in row and row["of_matmul_rate"] > 0 for row in prefill["rows"])


def test_rows_take_the_next_of_many_requests(capsys, uncompiled):
    rows = run_json(capsys, "--batches", "5", "--stage", "batching")["batching"]["rows"]
    names = ["squeeze, 2 rows", "full, 2 rows", "transformers generate, batches of 2"]
    assert [(row["what"], row["batch"]) for row in rows] == [(name, 5) for name in names]
    assert rows[1]["kv_bytes"] > 3 * rows[0]["kv_bytes"] and list(rows[0]["times"]) == names[1:]
    assert all(row["tokens_per_s_with_prefill"] > 0 and "ms_per_step" not in row for row in rows)


def test_late_turns_take_the_same_memory(capsys, uncompiled):
    rows = run_json(capsys, "--batches", "4", "--budget", "24", "--stage", "chat")["chat"]["rows"]
    assert [row["what"] for row in rows] == ["turns before: 1", "turns before: 4"]
    assert rows[0]["kv_bytes"] == rows[1]["kv_bytes"] == 4 * 24 * 2 * 2 * 16 * 4
    assert rows[0]["roofline_ms"] == rows[1]["roofline_ms"] and rows[1]["times"] != {}


def test_throughput_marks_what_does_not_fit(tiny, monkeypatch, tmp_path):
    """Memory as on a GPU: a little less is usable than there is."""
    monkeypatch.setattr("gc.collect", lambda: None)  # takes seconds beside transformers
    real, needs = stages.generated, Needs.of(Engine(tiny.model).sizing, 46, 40)
    monkeypatch.setattr(stages, "Engine", lambda *args, compile=False, **options: Engine(*args, **options))

    def generated(engine, wanted) -> Run:
        if len(wanted) > 6 and engine.policy.name == "full":
            raise torch.OutOfMemoryError
        return real(engine, wanted)

    monkeypatch.setattr(stages, "generated", generated)
    sizes = Sizes("tiny", 40, 6, batches=(1, 3, 9), rounds=1, memory=needs.total(9))
    rows = list(stages.throughput(tiny, sizes))
    points = {what: {r["batch"]: r.get("failed") for r in rows if r["what"] == what} for what in ("full", "squeeze")}
    assert points["full"] == {1: None, 3: None, 6: None, 7: "out of memory", 8: "out of memory", 9: "out of memory"}
    assert all(failed is None for failed in points["squeeze"].values()) and max(points["squeeze"]) > 9
    picture.draw([row | dict(shape="tiny", dtype="float32") for row in rows], tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_the_peak_on_cuda_is_that_of_the_turn(monkeypatch):
    weights = SimpleNamespace(parameters=lambda: [torch.zeros(5)], config=None)
    cuda = dict(reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 100, max_memory_allocated=lambda: 170)
    for name, call in cuda.items():
        monkeypatch.setattr(torch.cuda, name, call)
    subject = SimpleNamespace(device="cuda", model=weights)
    for clean, peak in ((True, 20 + 70), (False, 0)):
        contestant = Contestant("x", lambda wanted: Run([]), clean)
        assert turn(subject, contestant, []).peak_bytes == peak


def test_stages_go_into_one_file(capsys, uncompiled, tmp_path):
    out = ["--out", str(tmp_path / "r.json"), "--new", "2"]
    assert set(run_json(capsys, "--stage", "prefill", *out)) == {"prefill"}
    assert set(run_json(capsys, "--stage", "switch", *out)) == {"prefill", "switch"}
    assert set(json.loads((tmp_path / "r.json").read_text())["stages"]) == {"prefill", "switch"}


def test_each_row_is_written_at_once(capsys, monkeypatch, tmp_path):
    file, found = tmp_path / "r.json", []

    def rows(subject, sizes):
        for what in ("first", "second", "third"):
            known = json.loads(file.read_text())["stages"] if file.exists() else {}
            found.append([row["what"] for stage in known.values() for row in stage["rows"]])
            yield {"what": what}

    monkeypatch.setitem(bench.STAGES, "switch", rows)
    run_json(capsys, "--stage", "switch", "--out", str(file))
    assert found == [[], ["first"], ["first", "second"]]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_an_error_of_a_stage_is_a_row(capsys, monkeypatch):
    def broken(subject, sizes):
        yield {"what": "first"}
        raise RuntimeError("no\nmore")

    monkeypatch.setitem(bench.STAGES, "switch", broken)
    rows = run_json(capsys, "--stage", "switch")["switch"]["rows"]
    assert [(row["what"], row.get("failed")) for row in rows] == [("first", None), ("switch", "no")]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stage", "dance"], "invalid choice: 'dance'"),
        (["--shape", "gpt-5"], "shape 'gpt-5' is neither a file nor one of embedded, tiny"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--shape", "README.md"], "not JSON"),
        (["--prompt", "0"], "'0' is no positive integer"),
        (["--batches", "1,x"], "'x' is no positive integer"),
        (["--budget", "1.5"], "budget must be a fraction in (0, 1] or an integer"),
        (["--stage", "prefill", "--plot", "x.png"], "--plot belongs to --stage throughput or to --real"),
        (["--plot", "x.txt"], "pictures are .png, .svg or .pdf files"),
        (["--peer", "fast"], "invalid choice: 'fast'"),
        (["--out", "nowhere/x.json"], "folder does not exist"),
        (["--stage", "decode", "--shape", "tiny", "--prompt", "20000"], "exceed the 16384 positions of tiny"),
    ],
    ids=" ".join,
)
def test_bad_input(capsys, monkeypatch, args, words):
    monkeypatch.chdir(ROOT)
    assert bench.main(["--device", "cpu", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("bench.py: error: ") and words in err.splitlines()[-1]


SUITE = ROOT / "scripts" / "gpu_suite.sh"


def suite(*args: str | Path, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable} | env
    return subprocess.run(["bash", SUITE, *args], capture_output=True, text=True, timeout=1500, env=env)


def test_the_gpu_suite_says_how_it_is_called(tmp_path):
    for args in ((), (tmp_path, "switch", "dance")):
        done = suite(*args)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "'dance'" in done.stderr and "usage: scripts/gpu_suite.sh OUTDIR" in suite().stderr


def test_a_stage_that_fails_does_not_end_the_suite(tmp_path):
    python = tmp_path / "python"
    cases = '-c*) echo cpu;; *test_gpu* | *"stage prefill"*) echo bad >&2; exit 3;; *) echo "$@"'
    python.write_text(f'#!/bin/sh\ncase "$*" in {cases};; esac\n')
    python.chmod(0o755)
    done = suite(tmp_path / "out", PYTHON=str(python))
    assert done.returncode == 1 and done.stderr == "gpu_suite.sh: failed: tests prefill\n"
    said = {log.name: log.read_text() for log in (tmp_path / "out").iterdir()}
    assert set(said) == {"tests.log", "switch.log", "prefill.log", "decode.log"}
    assert (
        said["prefill.log"] == "bad\n"
        and "--stage switch" in said["switch.log"]
        and "--batches 1" in said["decode.log"]
    )


@pytest.mark.slow
def test_the_gpu_suite_runs_without_a_gpu(tmp_path):
    named = "decode16 static throughput throughput_llama2 long batching chat int8 int4 cache8 mixture"
    stages = f"tests switch prefill decode {named}".split()
    done = suite(tmp_path, *stages)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.name: json.loads(file.read_text())["stages"] for file in tmp_path.glob("bench_*.json")}
    assert set(files.pop("bench_cpu.json")) == set(bench.STAGES)
    assert {name: [*stages] for name, stages in files.items()} == {
        "bench_cpu_16.json": ["decode"],
        "bench_cpu_static.json": ["decode"],
        "bench_cpu_long.json": ["throughput"],
        "bench_cpu_llama2.json": ["throughput"],
        "bench_cpu_int8.json": ["decode"],
        "bench_cpu_int4.json": ["decode"],
        "bench_cpu_cache8.json": ["throughput"],
        "bench_cpu_mixture.json": ["decode"],
        "bench_cpu_mixture_16.json": ["decode"],
    }
    assert all((tmp_path / f"{stage}.log").stat().st_size for stage in stages)
