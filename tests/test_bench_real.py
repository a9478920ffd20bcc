"""The benchmark on a real model: the files it writes, llama.cpp as a peer, turns that go on, its rows and its table."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import render_readme
import torch
from gguf import GGMLQuantizationType as Kind

import bench
import checkpoint
from benchmark import llama_cpp, real, roofline, stages, subjects
from benchmark.race import Contestant, Sizes, race
from engine import Engine

ROOT = Path(__file__).resolve().parent.parent
LAYERS, DIM, FFN, VOCABULARY, HEADS, KV_HEADS = 2, 64, 96, 96, 4, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A random Llama in a GGUF file with matrices of 8 bits."""
    path, rng = tmp_path_factory.mktemp("real") / "tiny.Q8_0.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    sizes = dict(context_length=256, embedding_length=DIM, feed_forward_length=FFN, head_count=HEADS)
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_block_count(LAYERS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    narrow = DIM * KV_HEADS // HEADS
    shapes = {"attn_q": (DIM, DIM), "attn_k": (narrow, DIM), "attn_v": (narrow, DIM), "attn_output": (DIM, DIM)}
    shapes |= {"ffn_gate": (FFN, DIM), "ffn_up": (FFN, DIM), "ffn_down": (DIM, FFN)}
    matrices = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in (matrices | {"token_embd": (VOCABULARY, DIM), "output": (VOCABULARY, DIM)}).items():
        numbers = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    for name in [f"blk.{layer}.{norm}_norm" for layer in range(LAYERS) for norm in ("attn", "ffn")] + ["output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(DIM, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def subject(source) -> subjects.Subject:
    return subjects.make(str(real.written(source, "F32")), "cpu", torch.float32)


@pytest.fixture
def faked(monkeypatch):
    """A llama.cpp that takes 0.5 s for prompts and 0.01 s a step, and what it was asked."""
    asked = []

    def ask(request):
        asked.append(request)
        first = 0.5 if request["prompts"] else None
        return dict(tokens=[[1] * request["new"]] * request["rows"], prefill_s=first, step_s=0.01)

    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: name)
    monkeypatch.setattr(llama_cpp, "Child", lambda *limits: SimpleNamespace(ask=ask))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("gc.collect", lambda: None)  # takes seconds beside transformers
    return asked


def test_a_file_of_each_precision_holds_the_same_model(source):
    files = {kind: real.written(source, kind) for kind in real.PRECISIONS}
    stored = {kind: {t.name: t for t in gguf.GGUFReader(file).tensors} for kind, file in files.items()}
    for kind, tensors in stored.items():
        assert {t.tensor_type for t in tensors.values() if len(t.shape) > 1} == {Kind[kind]}
        assert {t.tensor_type for t in tensors.values() if len(t.shape) == 1} == {Kind.F32}
    whole, half = (checkpoint.load(files[kind])[0] for kind in ("F32", "BF16"))
    assert whole.dtype == torch.float32 and half.dtype == torch.bfloat16
    for (name, own), other in zip(checkpoint.load(source)[0].named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, other), name
    assert checkpoint.outline(files["Q4_0"]) == checkpoint.outline(source)
    before = os.stat(files["F32"])
    assert os.stat(real.written(source, "F32")) == before and len(list(source.parent.iterdir())) == 1 + len(files)


def test_llama_cpp_writes_our_tokens(subject):
    pytest.importorskip("llama_cpp")
    wanted = stages.alike(subject, 2, Sizes("", 20, 9))
    ours, theirs = stages.generated(Engine(subject.model), wanted), subject.llama_cpp.generate(wanted)
    assert theirs.tokens == ours.tokens and len(set(map(tuple, ours.tokens))) == 2
    assert theirs.prefill_s > 0 and theirs.step_s > 0
    go_on = subject.llama_cpp.going_on(3)
    turns = [go_on(wanted).tokens for _ in range(3)]
    assert [sum(row, []) for row in zip(*turns, strict=True)] == ours.tokens
    assert subject.llama_cpp.generate(wanted).tokens == ours.tokens  # from an empty cache again


def test_a_model_that_llama_cpp_does_not_read_is_a_row(subject, tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    peer = llama_cpp.LlamaCpp(tmp_path / "broken.gguf", subject.model.config)
    [row] = race(
        subject, [Contestant("llama.cpp", peer.generate)], stages.alike(subject, 1, Sizes("", 4, 2)), Sizes("")
    )
    assert row["failed"].startswith("llama.cpp") and "\n" not in row["failed"]


def test_a_missing_peer_is_said_to_be_missing(subject, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    wanted = stages.alike(subject, 1, Sizes("", 8, 4))
    no_file = subjects.Subject(subject.raw, subject.model)
    for own, words in ((subject, "not installed: pip install llama-cpp-python"), (no_file, "reads GGUF files")):
        peer, full = race(
            own, [bench.PEERS["llama.cpp"](own), stages.ours(own, "full", compile=False)], wanted, Sizes("", rounds=1)
        )
        assert words in peer["failed"] and full["tokens_per_s"] > 0


def test_turns_go_on_from_each_other(subject):
    wanted, engine = stages.alike(subject, 2, Sizes("", 20, 12)), Engine(subject.model, "streaming", budget=16)
    whole = stages.generated(engine, wanted)
    with stages.ExitStack() as until:
        go_on = stages.going_on(engine, 4, until)
        turns = [go_on(wanted) for _ in range(3)]
    assert [sum(row, []) for row in zip(*(turn.tokens for turn in turns), strict=True)] == whole.tokens
    assert turns[0].prefill_s > 0 and all(turn.prefill_s != turn.prefill_s and turn.step_s > 0 for turn in turns[1:])
    assert turns[1].slots == LAYERS * 16 and turns[1].kv_bytes == whole.kv_bytes


def test_bytes_of_a_step_are_those_that_are_stored(subject):
    """Of a cache of 8 bits, and of weights of 8 bits with a scale for each row."""
    run = stages.generated(
        Engine(subject.model, "streaming", budget=16, cache_format="int8"), stages.alike(subject, 2, Sizes("", 20, 4))
    )
    weights = sum(p.nbytes for p in subject.model.parameters()) - VOCABULARY * DIM * 4
    rows = 2 * DIM * 4
    assert roofline.step_bytes(subject.model, 2, run.slots, run.slot_bytes) == weights + rows + run.kv_bytes

    part, whole = subject.model.layers[0].feed_forward, roofline.step_bytes(subject.model, 1, 0)
    old, elements = part.w2.weight, roofline.matrix_elements(subject.model.config)
    del part.w2.weight
    part.w2.register_buffer("weight", old.to(torch.int8))
    part.w2.register_buffer("scale", torch.ones(DIM))
    assert roofline.step_bytes(subject.model, 1, 0) == whole - 3 * old.numel() + 4 * DIM
    assert roofline.matrix_elements(subject.model.config) == elements


@pytest.fixture
def measured(source, faked, monkeypatch, tmp_path, capsys) -> dict:
    """The stage on the small model, at small sizes."""
    sizes = dict(SHORT=8, LONG=24, NEW=16, STEPS=4, ROWS=2, PROMPT=20, ANSWER=16, ROW_STEPS=4)
    for name, value in (sizes | dict(CONTEXTS=dict.fromkeys(real.CONTEXTS, (8, 24, 40)))).items():
        monkeypatch.setattr(real, name, value)
    args = ["--real", str(source), "--device", "cpu", "--rounds", "1", "--plot", str(tmp_path / "p.png")]
    assert bench.main([*args, "--out", str(tmp_path / "r.json")]) == 0, capsys.readouterr().err
    assert (tmp_path / "p.png").stat().st_size > 1000
    told = json.loads((tmp_path / "r.json").read_text())
    assert told == json.loads(capsys.readouterr().out.splitlines()[-1])
    return told["stages"]["real"]


def test_rows_of_the_real_model(measured, faked):
    rows = [row for row in measured["rows"] if "failed" not in row]
    assert {row["precision"] for row in measured["rows"] if "precision" in row} >= {"float32", "bf16"}
    long = ("decode", "float32", 24)
    assert (
        [row["what"] for row in rows if (row["job"], row["precision"], row.get("prompt_tokens")) == long]
        == "llama.cpp; full; dropkv x perturbation 20%; streaming x uniform 20%; dropkv x uniform 20%; \
streaming x random plan 20%".split("; ")
    )
    for row in (row for row in rows if row["job"] in ("decode", "rows") and row["what"] != "llama.cpp"):
        assert row["times"].get("llama.cpp", row["tokens_per_s"] / (100 * row["batch"])) == pytest.approx(
            row["tokens_per_s"] / (100 * row["batch"]), rel=1e-3
        )
        assert row["of_roofline"] > 0
        assert row["first_token_ms"] > 0  # of the turn that read the prompts
    peers = [row for row in rows if row["job"] in ("decode", "rows") and row["what"] == "llama.cpp"]
    assert peers and all((row["first_token_ms"], row["ms_per_step"]) == (500, 10) for row in peers)
    equal, random = (
        next(row for row in rows if row["what"] == f"streaming x {plan} 20%") for plan in ("uniform", "random plan")
    )
    assert equal["kv_bytes"] == random["kv_bytes"]
    dense, small = (
        next(row for row in rows if (row["what"], row["precision"], row["job"]) == (f"full{form}", "bf16", "rows"))
        for form in ("", ", int8 cache")
    )
    assert small["kv_bytes"] < 0.6 * dense["kv_bytes"]
    [shares] = [row for row in rows if row["job"] == "evidence"]
    assert all(0 < shares[f"{name}_share"] < 1 for name in ("importance", "evidence", "scores"))
    assert {request["threads"] for request in faked} == {torch.get_num_threads()}


def test_the_table_has_goals_beside_figures(measured):
    present = [row for row in measured["rows"] if row.get("precision") != "4 bit"]
    lines = [line.strip("| ").split(" | ") for line in render_readme.real_table(present).splitlines()[2:]]
    table = {what: rest for what, *rest in lines if rest}
    row = next(row for row in measured["rows"] if row["what"] == "full" and row["job"] == "decode")
    own, ratio = f"{row['tokens_per_s']:.1f}", f"{row['tokens_per_s'] / 100:.2f}"
    assert table["decode, 8 tokens, float32"] == [own, "100.0", ratio, "1.2"]
    assert table["decode, 8 tokens, 4 bit"] == ["-", "-", "-", "1"]  # a row that is not there
    assert table["share of the copy rate in a step, 8 tokens, float32"] == [
        "-",
        "-",
        f"{row['of_roofline']:.0%}",
        "85%",
    ]
    assert lines[-1][0].startswith("Failed: ") == any("failed" in row for row in present)
    evidence = next(row for row in measured["rows"] if row.get("job") == "evidence")
    share = evidence["importance_share"] + evidence["evidence_share"]
    assert table["importance and evidence of 24 tokens, share of prefill"][2] == f"{share:.1%}"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--real", "nowhere.gguf"], "there is no nowhere.gguf; get it with python scripts/get_model.py smollm2"),
        (["--real", "--stage", "decode"], "--stage does not go with it"),
        (["--real", "--peer", "eager"], "--peer does not go with it"),
        (["--weights", "int3"], "invalid choice: 'int3'"),
    ],
    ids=" ".join,
)
def test_bad_input(capsys, args, words):
    assert bench.main(["--device", "cpu", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err.splitlines()[-1]
