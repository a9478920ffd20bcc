"""One model over several ranks equals one rank: plans, tokens, files. Ranks are processes that meet over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import families
import pytest
import test_families
import torch
from conftest import ROOT, random_ids
from test_decoder import StandIn
from test_engine import BOUNDED, teacher_forced
from torch import multiprocessing

import checkpoint
import parallel
from benchmark.subjects import make
from codes import Codes
from config import ModelConfig
from conversation import Conversation
from engine import Engine, Request
from errors import UserError
from formats import FORMATS
from promptcache import PromptCache
from sampling import GREEDY, Sampling
from scripts.scale import LLAMA_2_70B

SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
SIZES = {"num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96}


def wider(case: families.Case) -> families.Case:
    """With heads and columns that divide by four ranks; key-value heads, where there are fewer, by two alone."""
    sizes = {name: value for name, value in SIZES.items() if case.config.get(name) is not None}
    groups = {6: 8, 3: 4}  # of key-value heads that would not divide
    heads = {name: case.config.get(name) for name in ("num_key_value_heads", "num_kv_heads")}
    sizes |= {name: groups[count] for name, count in heads.items() if count in groups}
    return replace(case, config=case.config | sizes)


CASES = [wider(case) for case in families.CASES]


def ranks(world: int, call, *args) -> list:
    """What `call(*args)` gives on each of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=rank, args=(n, world, port, results, call, args)) for n in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    errors = [value for value in found.values() if isinstance(value, str) and value.startswith("failed")]
    assert not errors, errors[0]
    return [found[n] for n in range(world)]


def rank(number: int, world: int, port: int, results, call, args) -> None:
    import traceback

    torch.set_num_threads(1)
    where = {"RANK": number, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    try:
        with parallel.ranks("cpu"):
            results.put((number, call(*args)))
    except BaseException:
        results.put((number, "failed: " + traceback.format_exc()))


def answers(jobs: list[tuple], scratch: Path) -> list:
    """Of each job (folder, policy, settings, weights): plan and tokens of all ways to run it."""
    return [answer(Path(folder), policy, dict(how), weights, scratch) for folder, policy, how, weights in jobs]


def answer(folder: Path, policy: str, how: dict, weights: str, scratch: Path) -> dict:
    dtype, captured = how.pop("dtype", "float64"), how.pop("captured", False)
    model, _ = checkpoint.load(folder, dtype=dtype, weights=weights)
    engine = Engine(model, policy, **how)
    graphs = StandIn(engine) if captured else None
    ids = random_ids(29)
    stream = engine.stream(ids, max_new_tokens=14, keep="prompt")
    tokens, plan = list(stream), stream.completion.figures.plan
    cache = stream.completion.cache
    cache.save(scratch / "a.safetensors")
    if parallel.shard().world > 1:
        torch.distributed.barrier()  # the first one has written
    engine.plan = plan if policy != "full" else None
    loaded = PromptCache.load(scratch / "a.safetensors", engine)
    assert list(engine.stream([], max_new_tokens=14, past=loaded)) == tokens
    requests = [Request(random_ids(n, n), new, sampling) for n, new, sampling in REFILLED]
    done = {id(completion.request): completion.tokens for completion in engine.generate(requests, 2)}
    talk = Conversation(engine)
    turns = [list(talk.stream(random_ids(n, n), 5)) for n in (9, 17)]
    if captured:
        sums = sum("allreduce" in str(function) for function, *_ in graphs.tape.operations)
        assert sums == (2 * model.config.n_layers if parallel.shard().world > 1 else 0)
    return {"plan": plan, "tokens": tokens, "batch": [done[id(request)] for request in requests], "turns": turns}


REFILLED = [(20, 6, SAMPLED), (3, 5, GREEDY), (27, 4, GREEDY)]
SQUEEZED = {"layers": "perturbation", "budget": 12}


def compare(worlds, jobs: list[tuple], tmp_path: Path) -> None:
    want = answers(jobs, tmp_path)
    for world in worlds:
        for number, found in enumerate(ranks(world, answers, jobs, tmp_path)):
            for job, one, other in zip(jobs, want, found, strict=True):
                assert other == one, (world, number, job[1:])


def folder_of(case: families.Case, tmp_path: Path) -> str:
    return str(families.make_checkpoint(case, tmp_path / str(case)))


BY_NAME = {case.name: case for case in CASES}


def test_two_ranks_equal_one(tmp_path):
    """Windows, heads that differ from key-value heads, policies that look at one head and at all, both formats.

    Also captured steps, of which the sums over ranks are a part (test_decoder.py).
    """
    llama, gemma = (
        folder_of(next(c for c in CASES if c.name.startswith(name)), tmp_path) for name in ("llama", "gemma3")
    )
    jobs = [
        (llama, "full", {}, "auto"),
        (llama, "tova", SQUEEZED | {"cache_format": "int8"}, "auto"),
        (llama, "dropkv", SQUEEZED, "int8"),
        (llama, "snapkv", SQUEEZED | {"captured": True}, "auto"),
        (gemma, "h2o", SQUEEZED, "auto"),
    ]
    compare([2], jobs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family(case, world, tmp_path):
    """And what does not divide is refused in one line, by all ranks alike."""
    folder = folder_of(case, tmp_path)
    config, _ = checkpoint.outline(folder)
    try:
        config.of_rank(world)
    except UserError as error:
        assert "ranks" in str(error)
        pytest.skip(str(error))
    compare(
        [world], [(folder, policy, SQUEEZED, "auto") for policy in BOUNDED] + [(folder, "full", {}, "auto")], tmp_path
    )


def logits(folders: list[str]) -> list[list]:
    """Of each model in float32, those of some steps under a policy, fed the same tokens."""
    found = []
    for folder in folders:
        model, _ = checkpoint.load(folder, dtype="float32")
        engine = Engine(model, "h2o", plan=[9, 14, 11][: model.config.n_layers])
        found.append(teacher_forced(engine, random_ids(29), random_ids(20, 2)).tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_float32_is_as_near_as_it_can_be(world, tmp_path):
    """Sums over ranks add in another order."""
    folders = []
    for case in CASES:
        try:
            ModelConfig.from_hf(json.loads(json.dumps(case.config))).of_rank(world)
        except UserError:  # its heads do not divide
            continue
        folders.append(folder_of(case, tmp_path))
    want = logits(folders)
    for found in ranks(world, logits, folders):
        for folder, *each in zip(folders, want, found, strict=True):
            one, other = map(torch.tensor, each)
            assert (other - one).abs().max() < 1e-4 * one.abs().max(), folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("form", FORMATS)
def test_weights_and_formats(weights, form, world, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 128}  # parts of whole groups
    folder = folder_of(families.Case("llama", BY_NAME["llama-gqa"].config | sizes), tmp_path)
    jobs = [(folder, policy, SQUEEZED | {"cache_format": form}, weights) for policy in ("h2o", "streaming")]
    compare([world], jobs, tmp_path)


@pytest.mark.slow
def test_compiled(tmp_path):
    """The sums over ranks are a part of the compiled step."""
    folder = folder_of(BY_NAME["llama-gqa"], tmp_path)
    compare([2], [(folder, policy, SQUEEZED | {"compile": True}, "auto") for policy in ("h2o", "dropkv")], tmp_path)


# ---- parts


def test_the_parts_of_all_ranks_are_the_whole():
    """Of every parameter of every family: each row and column is one rank's, that of a shared head several ones'."""
    for case in CASES:
        config = ModelConfig.from_hf(json.loads(json.dumps(case.config)) | {"dtype": "float32"})
        for world in (2, 3, 4, 8):
            try:
                local = config.of_rank(world)
            except UserError:
                continue
            with torch.device("meta"):
                whole, part = checkpoint.Transformer(config), checkpoint.Transformer(local)
            sharers = max(1, world // config.n_kv_heads)
            for name, parameter in whole.named_parameters():
                seen = torch.zeros(parameter.shape)
                for number in range(world):
                    own = parallel.cut_of(name, config, parallel.Shard(number, world))
                    marks = own.of(torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape))
                    assert marks.shape == part.get_parameter(name).shape, (case.name, name, world)
                    if not own.muted:
                        seen.view(-1)[marks.long().flatten()] += 1
                cut = parallel.cut_of(name, config, parallel.Shard(1, world))
                expected = {world} if cut == parallel.WHOLE else {1}
                if name.endswith(("wqkv.weight", "wqkv.bias", "k_norm.weight")) and cut != parallel.WHOLE:
                    expected |= {sharers}
                assert set(seen.unique().tolist()) <= expected, (case.name, name, world)


def test_interleaved_rows_are_those_of_our_layout():
    """What is cut in the files' order is what is cut in ours."""
    for heads, kv_heads in ((8, 8), (8, 2), (8, 1)):
        config = ModelConfig("falcon", 9, 16, 1, heads, kv_heads, 2, 8, 9)
        rows = (heads + 2 * kv_heads) * 2
        ours = torch.arange(rows * 3.0).view(rows, 3)
        form = checkpoint.parts_of_head("a.query_key_value.weight", config)
        theirs = torch.cat(checkpoint.by_head(ours, *form), dim=1).flatten(0, 1)
        for world in (2, 4, 8):
            for number in range(world):
                own = parallel.Shard(number, world)
                want = parallel.cut_of("layers.0.attention.wqkv.weight", config, own).of(ours)
                local = config.of_rank(world)
                found = torch.empty_like(want)
                checkpoint.put(
                    parallel.cut_by_kv_head(config, own).of(theirs), found, "a.query_key_value.weight", local
                )
                assert found.equal(want), (heads, kv_heads, world, number)


def test_codes_are_cut_in_whole_groups():
    codes = Codes.of(torch.randn(6, 96), 4)
    part = codes.cut(None, (32, 96))
    assert part.numbers().equal(codes.numbers()[:, 32:])
    assert codes.cut(((1, 2), (4, 6)), None).numbers().equal(codes.numbers()[[1, 4, 5]])
    with pytest.raises(UserError, match="no whole groups of 32; use fewer ranks"):
        codes.cut(None, (48, 96))
    assert Codes.of(torch.ones(2, 8), 8).cut(None, (2, 4)).numbers().shape == (2, 2)


@pytest.mark.parametrize("world", ["0", "x", "-1", "1.5", "99999999"])
def test_a_senseless_number_of_ranks_is_one_line(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match="WORLD_SIZE"), parallel.ranks("cpu"):
        pass


def test_ranks_that_do_not_come(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start all of them with torchrun"), parallel.ranks("cpu"):
        pass
    assert parallel.shard() == parallel.ALONE


# ---- memory and command line


def loaded(folder: str) -> tuple[int, int]:
    """How many bytes loading takes at the most, and those of the parameters."""
    checkpoint.outline(folder)  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = peak()
    model, _ = checkpoint.load(folder)
    return peak() - before, sum(parameter.nbytes for parameter in model.parameters())


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
def test_a_rank_reads_its_part_alone(tmp_path):
    case = families.Case(
        "llama", BY_NAME["llama-gqa"].config | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    )
    folder = folder_of(case, tmp_path)
    largest = 4 * 1024 * 4096
    for most, parameters in ranks(2, loaded, folder):
        assert parameters < most <= 1.1 * (parameters + largest)


def torchrun(*args: str, count: int = 2, program: str = "generate.py", **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / program), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """A prompt, a conversation, a job of which a rank is killed, and its rest on one rank."""
    asked = ["--squeeze", "--budget", "40", "--dtype", "float64", "--max-new-tokens", "12"]

    def alone(*args: str, **how) -> str:
        done = subprocess.run([sys.executable, "generate.py", *args], cwd=ROOT, capture_output=True, text=True, **how)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out, _ = (process := torchrun(*asked, "--json", "--prompt", "def main():")).communicate()
    one, two = json.loads(alone(*asked, "--json", "--prompt", "def main():")), json.loads(out)
    assert process.returncode == 0 and two["ranks"] == 2
    for name in ("tokens", "text", "plan", "kv_bytes", "kv_bytes_full", "prompt_tokens"):
        assert one[name] == two[name], name
    out, _ = torchrun(*asked, "--interactive", stdin=subprocess.PIPE).communicate("hello\nand then\n")
    assert out == alone(*asked, "--interactive", input="hello\nand then\n")
    lines = [{"id": n, "prompt_ids": random_ids(5 + n % 40, n), "temperature": n % 2} for n in range(80)]
    source, wanted, found = (tmp_path / name for name in ("in", "wanted", "found"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ["--input", str(source), "--batch-size", "4", "--seed", "5", *asked, "--output"]
    alone(*job, str(wanted))
    process = torchrun(*job, str(found))
    while not (found.exists() and found.stat().st_size):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 30 and process.returncode
    ours = [line for line in said.splitlines() if line.startswith("generate.py: ")]
    assert ours == ["generate.py: error: another rank was ended, and all others with it; start them again"]
    assert 0 < len(found.read_text().splitlines()) < len(lines)
    alone(*job, str(found), "--resume")
    assert sorted(found.read_text().splitlines()) == sorted(wanted.read_text().splitlines())


@pytest.mark.slow
def test_an_evaluation(tmp_path):
    """Every number is that of one rank; what was cut off goes on."""
    asked = ["--policies", "h2o,snapkv", "--budgets", "0.3", "--texts", "3", "--length", "128", "--read", "8"]
    asked += ["--tasks", "fidelity,passkey", "--lengths", "128", "--needles", "2", "--dtype", "float64", "--out"]
    subprocess.run([sys.executable, "evaluate.py", *asked, str(tmp_path / "one")], cwd=ROOT, check=True)
    process = torchrun(*asked, str(tmp_path / "two"), program="evaluate.py")
    assert process.communicate()[0] and process.returncode == 0
    one, two = (tmp_path / name / "predictions.jsonl" for name in ("one", "two"))
    lines = one.read_text().splitlines()
    assert two.read_text().splitlines() == lines
    two.write_text("".join(f"{line}\n" for line in lines[:7]))
    process = torchrun(*asked, str(tmp_path / "two"), "--resume", program="evaluate.py")
    assert process.communicate()[0] and process.returncode == 0
    assert sorted(two.read_text().splitlines()) == sorted(lines)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_a_benchmark(tmp_path):
    asked = ["--stage", "throughput", "--shape", "tiny", "--prompt", "64", "--new", "8", "--batches", "2"]
    asked += ["--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "found.json")]
    out, _ = (process := torchrun(*asked, program="bench.py")).communicate()
    assert process.returncode == 0
    stage = json.loads(out.splitlines()[-1])["stages"]["throughput"]
    assert stage == json.loads((tmp_path / "found.json").read_text())["stages"]["throughput"]
    assert stage["ranks"] == 2 and all(row["tokens_per_s"] > 0 for row in stage["rows"])
    _, said = (process := torchrun(*asked, "--peer", "eager", program="bench.py")).communicate()
    assert process.returncode and "bench.py: error: --peer runs on one rank; start it without torchrun" in said


def random_weights(shape: str) -> float:
    model = make(shape, "cpu", torch.float64).model
    return list(Engine(model).stream(random_ids(20), max_new_tokens=12))


@pytest.mark.slow
def test_a_measured_model_is_the_same_on_any_ranks():
    assert ranks(2, random_weights, "tiny") == [random_weights("tiny")] * 2


# ---- large shapes, of which no weights are read


LARGE = {
    "Llama-2-70B": LLAMA_2_70B,
    "Mixtral-8x7B": test_families.LARGE["mistralai/Mixtral-8x7B-v0.1"][0] | {"dtype": "bfloat16"},
    "Falcon-40B": dict(
        model_type="falcon",
        vocab_size=65024,
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
        max_position_embeddings=2048,
        dtype="bfloat16",
    ),
}


def hollow(raw: dict, folder: Path) -> Path:
    """A checkpoint of this shape whose files have headers and, where the numbers would be, holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        model = checkpoint.Transformer(ModelConfig.from_hf(raw)).to(torch.bfloat16)
    shards, size = [{}], 0
    for name, tensor in checkpoint.to_hf(model.state_dict(), model.config).items():
        if size > 4e9:
            shards, size = [*shards, {}], 0
        offsets = [size, size + 2 * tensor.numel()]
        shards[-1][name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        size = offsets[1]
    for number, header in enumerate(shards):
        text = json.dumps(header).encode()
        with open(folder / f"{number}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(own["data_offsets"][1] for own in header.values()))
    where = {name: f"{number}.safetensors" for number, header in enumerate(shards) for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("name", LARGE)
def test_what_each_of_eight_ranks_holds(name, tmp_path, capsys):
    folder, gib = hollow(LARGE[name], tmp_path / name), []
    for ranks in (1, 8):
        assert checkpoint.main([str(folder), "--ranks", str(ranks), "--tokens", "1024"]) == 0
        weights = capsys.readouterr().out.split("weights")[1]
        gib.append(float(weights.split(" parameters, ")[1].split(" GiB")[0]))
    config = ModelConfig.from_hf(LARGE[name])
    whole = config.vocab_size * config.dim * 2 * (1 if config.tie_embeddings else 2) / 2**30
    assert gib[1] - whole == pytest.approx((gib[0] - whole) / 8, rel=0.01)
    assert checkpoint.main([str(folder), "--ranks", "7"]) == 2
    assert "do not divide by 7 ranks" in capsys.readouterr().err
