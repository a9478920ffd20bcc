"""The benchmark: its limits against independent counts, its peer, its JSON, and one clear line for what is wrong."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import bench
from benchmark import attention, roofline, subjects
from benchmark.timing import Run, attempt, race
from config import ModelConfig
from engine import Engine
from kvcache import LayerCache
from model import Transformer

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
    return subjects.make("tiny", "cpu")


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
    file = tmp_path / "config.json"
    file.write_text(json.dumps(subjects.SHAPES[name] | small | dict(num_attention_heads=6, num_key_value_heads=2)))
    subject = subjects.make(f"{file}:float32", "cpu")  # in float64 transformers' rotary angles are still float32
    ids = torch.tensor(subject.prompts(2, 30))
    hf = subject.peer.hf
    with torch.inference_mode():
        logits, own = hf(ids).logits, subject.model(ids)
    assert (logits - own).abs().max() < 1e-5 * own.abs().max()
    ours, theirs = subject.model.layers[1].attention.wqkv.weight, hf.model.layers[1].self_attn.k_proj.weight
    assert ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()


def test_all_contestants_give_the_same_tokens(tiny, uncompiled):
    prompts = tiny.prompts(2, 20)
    runs = [run(prompts, 9) for run in (tiny.peer.generate, tiny.peer.eager, tiny.peer.static)]
    runs += [bench.ours(Engine(tiny.model), prompts, 9)]
    assert all(run.tokens == runs[0].tokens and run.plan == [29] * 4 for run in runs)
    assert len(set(map(tuple, runs[0].tokens))) == 2 and all(len(row) == 9 for row in runs[0].tokens)


def test_bytes_of_a_step_are_weights_and_filled_slots(tiny):
    run = bench.ours(Engine(tiny.model, "streaming", "squeeze", 12), tiny.prompts(3, 40), 4)
    weights = sum(t.nbytes for name, t in tiny.model.state_dict().items() if name != "embed.weight")
    rows = 3 * 64 * 4  # of the embedding
    assert roofline.step_bytes(tiny.model, 3, sum(run.plan)) == weights + rows + run.kv_bytes

    embedded = subjects.make("embedded", "cpu").model  # its tied table is read as the head
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
    bench.ours(Engine(tiny.model, "window", plan=plan), tiny.prompts(1, 7), 6)
    assert len(told) == 5 * len(plan) and roofline.valid_slots(plan, 7, 6) == sum(told) / 5


@pytest.mark.parametrize("shape", ["tiny", "embedded"])
def test_operations_are_those_that_torch_counts(shape):
    subject = subjects.make(shape, "cpu")
    config, batch, slots = subject.config, 2, 10

    def counted(new: int) -> int:
        with FlopCounterMode(display=False) as counter:
            bench.ours(Engine(subject.model, "window", plan=[slots] * config.n_layers), subject.prompts(batch, 30), new)
        return counter.get_total_flops()

    attention = 4 * batch * config.n_layers * slots * config.n_heads * config.head_dim
    assert counted(3) - counted(2) == 2 * batch * roofline.matrix_elements(subject.model) + attention
    pairs = batch * config.n_layers * config.n_heads * 30 * 31 / 2  # torch does not count the fused attention
    assert counted(1) == roofline.prefill_operations(subject.model, batch, 30) - 4 * pairs * config.head_dim


def test_a_contestant_that_fails_is_out_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)  # takes seconds beside transformers
    calls = []

    def run(name: str, *errors: Exception) -> int:
        calls.append(name)
        if len(errors) >= calls.count(name):
            raise errors[calls.count(name) - 1]
        return len(calls)

    contestants = {"a": lambda: run("a"), "b": lambda: run("b", KeyError("no\nway")), "c": lambda: run("c")}
    assert race("", contestants, 2) == {"a": [1, 4, 6], "b": "'no\\nway'", "c": [3, 5, 7]}
    assert race("", {"h": lambda: run("h")}, 2, {"h": lambda: 0}) == {"h": [0, len(calls) - 1, len(calls)]}
    assert attempt(lambda: run("d", torch.OutOfMemoryError("of 80 GiB"))) == "out of memory"

    def capture() -> None:
        try:
            raise torch.OutOfMemoryError
        finally:
            raise RuntimeError("capture ended")

    assert (
        attempt(capture) == "out of memory" and attempt(lambda: run("g", RuntimeError("raised:\nx\ny"))) == "raised: x"
    )
    assert (
        attempt(lambda: run("e", RuntimeError("one\ntwo"))) == "one"
        and attempt(lambda: run("f", OSError())) == "OSError"
    )


def test_random_plans():
    plans = [bench.random_plan(random.Random(seed), 8, 40) for seed in range(20)]
    assert all(sum(plan) == 320 and min(plan) >= 8 for plan in plans) and len(set(map(tuple, plans))) == 20


def test_jobs_are_chosen_in_their_order():
    def jobs(*args: str) -> list[tuple]:
        return [(stage, *sizes[:4]) for stage, sizes in bench.chosen(bench.parse(["--device", "cpu", *args]))]

    assert {stage for stage, *_ in jobs()} == set(bench.STAGES) - {"long", "batching", "attention"}
    assert jobs("--stage", "switch", "--stage", "decode", "--shape", "tiny", "--shape", "embedded", "--new", "3") == [
        ("decode", "tiny", 256, 3, (1,)),
        ("decode", "embedded", 256, 3, (1,)),
        ("switch", "tiny", 512, 3, (1,)),
        ("switch", "embedded", 512, 3, (1,)),
    ]


def run_json(capsys, *args: str) -> dict:
    assert bench.main([*SMALL, *args]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_decode_and_prefill_rows(capsys, uncompiled):
    stages = run_json(capsys, "--stage", "decode", "--stage", "prefill")["stages"]
    decode, prefill = stages["decode"], stages["prefill"]
    assert decode["copy_bytes_per_s"] > 0 and decode["matmul_operations_per_s"]["float32"] > 0
    assert {"device", "date", "torch", "command", "seconds"} <= set(decode)
    assert len(decode["rows"]) == 2 * (3 + 4)
    for row in decode["rows"]:
        assert (row["shape"], row["dtype"]) == ("tiny", "float32") and "failed" not in row, row
        assert row["ms_min"] <= row["ms_per_step"] <= row["ms_max"] and row["of_roofline"] > 0
        assert row["times"][row["what"]] == 1 if "transformers" in row["what"] else len(row["times"]) == 3
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"], rel=1e-3)
    costs = {
        row["what"]: row["of_prefill"] for row in prefill["rows"] if row["what"] in bench.COSTS and row["batch"] == 3
    }
    assert (
        set(costs) == {"importance", "planning", "measuring and planning", "perturbation"} and max(costs.values()) < 1
    )


def test_rows_take_the_next_of_many_requests(capsys, uncompiled):
    args = "--device cpu --shape tiny --prompt 40 --new 6 --batches 5 --stage batching".split()
    assert bench.main(args) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]["batching"]["rows"]
    assert [(row["what"], row["requests"], row["batch"]) for row in rows] == [("full", 5, 2), ("squeeze", 5, 2)]
    assert rows[0]["new_tokens"] == rows[1]["new_tokens"] and 5 * 4 <= rows[0]["new_tokens"] <= 5 * 6
    assert rows[0]["kv_bytes"] > 3 * rows[1]["kv_bytes"] and rows[1]["tokens_per_s"] > 0


def test_who_fails_at_one_batch_is_not_compiled_again_at_the_next(tiny, uncompiled, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)
    calls = []

    def refuses(self, prompts, new) -> Run:
        calls.append(len(prompts))
        raise RuntimeError("backend='x' raised:\nSyntaxError: no")

    monkeypatch.setattr("benchmark.peers.Peer.static", refuses)
    rows = list(bench.decode(tiny, bench.Sizes("tiny", 40, 3, batches=(1, 2), rounds=1, peers=("static", "eager"))))
    failed = [(row["batch"], row["failed"]) for row in rows if "failed" in row]
    assert failed == [(batch, "backend='x' raised: SyntaxError: no") for batch in (1, 2)] and calls == [1]
    assert len(rows) == 2 * (2 + 4)


def test_profiles_before_and_after(tiny, uncompiled, tmp_path):
    file = tmp_path / "p.txt"
    sizes = bench.Sizes("tiny", 40, 6, profile=bench.Report(file))
    for what, compiled in (("profile, eager", False), ("profile, compiled", True)):
        row = bench.profile(tiny, sizes, compiled, steps=2)
        assert row["what"] == what
        assert sum(row["shares"].values()) == pytest.approx(1) and row["shares"]["products, attention"] > 0
        assert row["waits_per_step"] == {}
        assert f"{what}: 2 steps of tiny" in file.read_text()
    assert file.read_text().count("aten::mm ") == 2


def test_a_wait_in_a_step_is_counted(tiny, monkeypatch, tmp_path):
    most = torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda *args: (args[0][0, 0].item(), most(*args))[1])
    sizes = bench.Sizes("tiny", 40, 6, profile=bench.Report(tmp_path / "p.txt"))
    row = bench.profile(tiny, sizes, compiled=False, steps=2)
    assert row["waits_per_step"] == {"aten::item": 1, "aten::_local_scalar_dense": 1}


def test_throughput_marks_what_does_not_fit(tiny, monkeypatch, tmp_path):
    """Memory as on a GPU: 100 bytes, and a little for each slot of a row; a tenth less than it has is usable."""
    monkeypatch.setattr("gc.collect", lambda: None)  # takes seconds beside transformers
    real = bench.ours

    def ours(engine, prompts, new, stop_after=None) -> Run:
        taken = real(engine, prompts, new, stop_after)
        needed = 100 + len(prompts) * sum(taken.plan)
        if needed > 1100:
            raise torch.OutOfMemoryError
        return taken._replace(peak_bytes=needed, step_s=1.0)

    monkeypatch.setattr(bench, "ours", ours)
    monkeypatch.setattr(bench, "rows_at_once", lambda prompt: 1)
    monkeypatch.setattr(bench, "Engine", lambda *args, compile=False: Engine(*args))
    sizes = bench.Sizes("tiny", 40, 6, batches=(1, 3, 30), rounds=1, memory=1100)
    rows = list(bench.throughput(tiny, sizes))
    points = {what: {r["batch"]: r.get("failed") for r in rows if r["what"] == what} for what in ("full", "squeeze")}
    assert points["full"] == {1: None, 3: None, 5: None, 6: "out of memory"}  # 4 layers of 46 slots
    slots = next(row["slots"] for row in rows if row["what"] == "squeeze" and "slots" in row)
    most = 1000 // slots
    assert points["squeeze"] == {1: None, 3: None, most: None, most + most // 8: "out of memory"}
    (summary,) = (row for row in rows if row["what"] == "squeeze, largest batch")
    assert summary["batch"] == most and summary["times"]["full, largest batch"] == most / 5

    monkeypatch.setattr(bench, "rows_at_once", lambda prompt: 4)  # twice as many are too many already
    assert bench.largest_batch(Engine(tiny.model), tiny, sizes) == 8
    monkeypatch.setattr(bench, "largest_batch", lambda *args: 8)  # too high: it goes down until a batch fits
    rows_of_full = [row for row in bench.throughput(tiny, sizes) if row["what"] == "full"]
    assert [row["batch"] for row in rows_of_full if "failed" in row] == [9, 8, 7, 6]

    def broken(engine, prompts, new, stop_after=None) -> Run:
        raise RuntimeError("not for want of memory")

    monkeypatch.setattr(bench, "ours", broken)
    rows_of_full = [row for row in bench.throughput(tiny, sizes) if row["what"] == "full"]
    assert [row["batch"] for row in rows_of_full] == [9, 1, 3]
    named = [row | dict(shape="tiny", dtype="float32") for row in rows]
    bench.plot({"throughput": {"rows": named}}, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_stages_go_into_one_file(capsys, uncompiled, tmp_path):
    out = ["--out", str(tmp_path / "r.json"), "--new", "2"]
    assert set(run_json(capsys, "--stage", "prefill", *out)["stages"]) == {"prefill"}
    assert set(run_json(capsys, "--stage", "switch", *out)["stages"]) == {"prefill", "switch"}
    assert set(json.loads((tmp_path / "r.json").read_text())["stages"]) == {"prefill", "switch"}


def test_each_row_is_written_at_once(capsys, monkeypatch, tmp_path):
    file, found = tmp_path / "r.json", []

    def rows(subject, sizes):
        for what in ("first", "second", "third"):
            stages = json.loads(file.read_text())["stages"] if file.exists() else {}
            found.append([row["what"] for stage in stages.values() for row in stage["rows"]])
            yield {"what": what}

    monkeypatch.setitem(bench.STAGES, "switch", rows)
    run_json(capsys, "--stage", "switch", "--out", str(file))
    assert found == [[], ["first"], ["first", "second"]]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_nothing_stays_after_a_turn_on_cuda(monkeypatch):
    """No cache, no graph, and no pool of graphs: also when the turn fails."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new pool")
    monkeypatch.setattr("gc.collect", lambda: None)
    for outcome in ("done", torch.OutOfMemoryError()):
        monkeypatch.setattr(bench, "ours", Mock(side_effect=[outcome]))
        engine = Mock(device=torch.device("cuda"), store="old", code=Mock())
        assert attempt(lambda engine=engine: bench.alone(engine, [[1]], 1)) in ("done", "out of memory")
        assert not engine.store.idle and engine.code.capture.pool == "new pool"


def test_an_error_of_a_stage_is_a_row(capsys, monkeypatch):
    def broken(subject, sizes):
        yield {"what": "first"}
        raise RuntimeError("no\nmore")

    monkeypatch.setitem(bench.STAGES, "switch", broken)
    rows = run_json(capsys, "--stage", "switch")["stages"]["switch"]["rows"]
    assert [(row["what"], row.get("failed")) for row in rows] == [("first", None), ("switch", "no")]


def test_attention_names_what_a_back_end_refuses(capsys, monkeypatch):
    def refuses(q, k, v, valid):
        raise RuntimeError("no such kernel\nat all")

    names = ("attend", "bmm", "sdpa flash, gqa", "sdpa flash, mask", "sdpa math")
    some = {name: attention.CONTESTANTS[name] for name in names} | {"other": refuses}
    monkeypatch.setattr(attention, "CONTESTANTS", some)
    monkeypatch.setattr(attention, "seconds", lambda call, device: call() and 1.0)
    monkeypatch.setattr(attention, "SLOTS", {"cpu": (16, 50)})
    rows = run_json(capsys, "--stage", "attention")["stages"]["attention"]["rows"]
    assert {row["failed"] for row in rows if row["what"] == "other"} == {"no such kernel"}
    assert all(row["error"] < 1e-5 and row["us"] > 0 for row in rows if row["what"] != "other")
    assert len(rows) == 6 * 2 * len(attention.SLOTS["cpu"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stage", "dance"], "invalid choice: 'dance'"),
        (["--shape", "gpt-5"], "shape 'gpt-5' is neither a file nor one of embedded, tiny"),
        (["--shape", "tiny:int4"], "dtype 'int4'"),
        (["--shape", "README.md"], "not JSON"),
        (["--prompt", "0"], "'0' is no positive integer"),
        (["--batches", "1,x"], "'x' is no positive integer"),
        (["--max-memory", "1"], "needs --device cuda, not 1.0"),
        (["--stage", "decode", "--max-memory", "8"], "--max-memory belongs to --stage throughput or long"),
        (["--stage", "prefill", "--plot", "x.png"], "--plot belongs to --stage throughput or long"),
        (["--stage", "decode", "--peers", "eager,fast"], "'fast' is none of generate, eager, static"),
        (["--stage", "prefill", "--peers", "eager"], "--peers belongs to --stage decode"),
        (["--stage", "prefill", "--profile", "x.txt"], "--profile belongs to --stage decode"),
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
    assert said["prefill.log"] == "bad\n" and "--stage switch" in said["switch.log"] and "--peers" in said["decode.log"]


@pytest.mark.slow
def test_the_gpu_suite_runs_without_a_gpu(tmp_path):
    named = "decode16 static throughput throughput_llama2 long batching compile attention"
    stages = f"tests switch prefill decode {named}".split()
    done = suite(tmp_path, *stages)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.name: json.loads(file.read_text())["stages"] for file in tmp_path.glob("bench_*.json")}
    assert set(files.pop("bench_cpu.json")) == set(bench.STAGES)
    assert {name: [*stages] for name, stages in files.items()} == {
        "bench_cpu_16.json": ["decode"],
        "bench_cpu_static.json": ["decode"],
        "bench_cpu_llama2.json": ["throughput"],
    }
    assert all((tmp_path / f"{stage}.log").stat().st_size for stage in stages)
