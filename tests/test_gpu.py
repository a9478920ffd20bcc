"""What needs a GPU: the same oracles on CUDA. Run with -m gpu (scripts/gpu_suite.sh does)."""

import gc
import json
import socket
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, begun, linear_model, random_ids, random_model
from test_engine import BOUNDED, NEW, PLAN, run, teacher_forced
from test_prefill import DEEP, LONG, ORDERS, SHARE, P, all_at_once, signals

import checkpoint
import generate
import parallel
from conversation import Conversation
from engine import Engine, Request
from formats import FORMATS
from policies.layers.squeeze import Squeeze
from promptcache import PromptCache
from sampling import GREEDY, Sampling
from weights import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

POLICIES = sorted(["full", *BOUNDED], key=["h2o", "streaming", "full"].__contains__, reverse=True)
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
REFILLED = [(20, 6, SAMPLED), (3, 5, GREEDY), (41, 4, GREEDY), (11, 9, SAMPLED), (30, 3, GREEDY)]


def counted(engine: Engine) -> list[int]:
    """How often each captured step has been replayed so far, one entry a capture."""
    replays, capture = [], engine.code.capture

    def counting(step):
        replay, number = capture(step), len(replays)
        replays.append(0)

        def play() -> None:
            replays[number] += 1
            replay()

        return play

    engine.code.capture = counting
    return replays


def test_the_command_line_on_cuda(capsys):
    def tokens(*args: str) -> list[int]:
        assert generate.main(["--json", "--squeeze", "--max-new-tokens", "24", "--ignore-eos", *args]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    assert tokens("--device", "cuda") == tokens("--device", "cpu")


def test_two_plans_take_turns_in_one_memory():
    """No capture but the first of each; graphs of an older plan still read and write the right slots."""
    torch._dynamo.reset()
    model, plans = random_model().cuda(), (PLAN, [14, 8, 10, 26])
    engine = Engine(model, "h2o", compile=True)
    replays = counted(engine)
    for number in range(6):
        engine.plan = plans[number % 2]
        ids = random_ids(10 + 7 * number)
        stream = engine.stream(ids, max_new_tokens=9)
        assert list(stream) == run(Engine(model, "h2o", plan=engine.plan), ids, 9)
        assert (stream.completion.figures.compile_s > 0) == (number < 2)
    assert len(replays) == 2 and min(replays) == 3 * 8


def test_a_larger_arena_ends_all_captures_and_the_next_work():
    """No graph of the engine is left at that moment, so nothing but the engine itself keeps their memory pool open."""
    torch._dynamo.reset()
    model = random_model().cuda()
    engine = Engine(model, "h2o", compile=True)
    replays = counted(engine)
    for number, plan in enumerate((PLAN, [30] * 4, PLAN, [60] * 4)):
        engine.plan = plan
        assert run(engine, random_ids(33), 9) == run(Engine(model, "h2o", plan=plan), random_ids(33), 9)
        assert len(replays) == number + 1 and len(engine.store.idle) == (1, 1, 2, 1)[number]


@pytest.mark.parametrize("order", ORDERS)
def test_a_cut_prompt_takes_less_memory(order):
    """All that is allocated. A plan that is known from the start shows what the activations and one layer take."""
    shape = {"dim": 128, "n_heads": 2, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 128, "max_positions": 2 * LONG}
    model = random_model(torch.float32, n_layers=DEEP, **shape).cuda()
    layer = 2 * 2 * 64 * 4 * LONG  # bytes of K and V
    budget = SHARE * DEEP * layer

    def peak(layers, whole: bool = False) -> int:
        gc.collect()  # what earlier engines held is not freed in the middle of this
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with signals(ORDERS[order](DEEP)), all_at_once() if whole else nullcontext():
            list(Engine(model, "window", layers, SHARE).stream(random_ids(LONG), max_new_tokens=2))
        return torch.cuda.max_memory_allocated() - before

    peak("uniform")  # what libraries allocate once
    known, cut, whole = peak("uniform"), peak(Squeeze(P)), peak(Squeeze(P), whole=True)
    harmonic = sum(1 / rank for rank in range(1, DEEP + 1))
    assert cut < known + (P + (1 - P) * harmonic - 1) * budget + layer
    assert whole > DEEP * layer and whole - cut > 10 * layer


def test_bf16_runs_and_equal_seeds_give_equal_tokens():
    model = random_model(torch.bfloat16).cuda()
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    first, again = (list(Engine(model, "h2o", "squeeze", 16).stream(random_ids(50), sampling, 30)) for _ in range(2))
    assert first == again and len(first) == 30


@pytest.mark.parametrize(
    ("policy", "compiled"),
    [("h2o", True), *((policy, False) for policy in POLICIES)],
    ids=lambda value: {True: "replayed", False: "eager"}.get(value, value),
)
def test_no_step_waits_for_the_device(policy, compiled, sampling=SAMPLED):
    """Replayed as one of them: what waits could not have been captured."""
    model = random_model().cuda()
    engine = Engine(model, policy, plan=[80] * 4 if policy == "full" else PLAN, compile=compiled)
    requests = [Request(random_ids(length, length), 20, sampling) for length in (20, 5)]
    with torch.inference_mode():
        decoder = begun(engine, requests).decoder
        decoder.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            asked = []
            for _ in range(6):
                decoder.step()
                asked.append(decoder.ask())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    want = list(Engine(model, policy, plan=engine.plan).generate(requests))
    rows = {id(completion.request): completion.tokens for completion in want}
    assert [tokens() for tokens in asked] == [
        [rows[id(request)][step + 2] for request in requests] for step in range(len(asked))
    ]


@pytest.mark.parametrize(
    ("policy", "make"),
    [*((policy, random_model) for policy in POLICIES), ("h2o", linear_model)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_replayed_equals_eager(policy, make):
    """A batch whose rows are refilled, and streams, greedy and sampled, twice: from the store. Then a conversation.

    The batch is first: what needs a larger arena than there is ends the captures before it.
    """
    torch._dynamo.reset()
    model = make(max_positions=100).cuda()
    answers = []
    for compiled in (False, True):
        engine = Engine(model, policy, plan=None if policy == "full" else PLAN, compile=compiled)
        assert engine.lag == 2 and (engine.code.capture is not None) == compiled
        replays = counted(engine) if compiled else []
        tokens = []
        for _ in range(2):
            requests = [Request(random_ids(length, length), new, sampling) for length, new, sampling in REFILLED]
            done = {id(completion.request): completion for completion in engine.generate(requests, batch_size=2)}
            tokens += [done[id(request)].tokens for request in requests]
            streams = [list(engine.stream(random_ids(33), sampling, 12)) for sampling in (GREEDY, SAMPLED)]
            assert streams[0] != streams[1]
            tokens += streams
        conversation = Conversation(engine, SAMPLED)
        tokens += [list(conversation.stream(random_ids(count, count), 5)) for count in (9, 17, 4)]
        answers.append(tokens)
        assert len(replays) == (4 if compiled else 0) and all(replays)  # the batch, greedy, sampled, the conversation
    assert answers[0] == answers[1]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_cuda_equals_cpu(policy, compiled, form):
    torch._dynamo.reset()
    model = random_model()
    ids, following = random_ids(41), random_ids(40, seed=3)
    plan = [82] * 4 if policy == "full" else PLAN
    want = teacher_forced(Engine(model, policy, plan=plan, cache_format=form), ids, following)
    engine = Engine(model.cuda(), policy, plan=plan, compile=compiled, cache_format=form)
    torch.testing.assert_close(teacher_forced(engine, ids, following).cpu(), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_linear_attention_on_cuda(compiled):
    """Several chunks of a prompt, and steps behind them."""
    torch._dynamo.reset()
    model, ids, following = linear_model(), random_ids(150), random_ids(20, seed=3)
    want = teacher_forced(Engine(model, "h2o", plan=PLAN), ids, following)
    engine = Engine(model.cuda(), "h2o", plan=PLAN, compile=compiled)
    torch.testing.assert_close(teacher_forced(engine, ids, following).cpu(), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_codes_on_cuda_equal_the_same_codes_on_a_cpu(weights, compiled):
    """Also of several rows, which take another product."""
    torch._dynamo.reset()
    model = random_model(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96).cuda()
    quantize(model, weights)
    ids, following = random_ids(41), random_ids(40, seed=3)
    requests = [Request(random_ids(n, n), 12) for n in (9, 30, 17)]
    found = []
    for device, compiles in (("cuda", compiled), ("cpu", False)):
        engine = Engine(model.to(device), "h2o", plan=PLAN, compile=compiles)
        logits = teacher_forced(engine, ids, following).cpu()
        found.append((logits, sorted(completion.tokens for completion in engine.generate(requests))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)  # numbers of codes are float32
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_cache_on_cuda(policy, tmp_path):
    """Going on from a file, and from an answer that was kept, is as going on without."""
    plan = None if policy == "full" else PLAN
    engine = Engine(random_model(max_positions=100).cuda(), policy, plan=plan)
    stream = engine.stream(random_ids(33), max_new_tokens=12, keep="prompt")
    answer = list(stream)
    stream.completion.cache.save(tmp_path / "a.safetensors")
    assert (
        list(engine.stream([], max_new_tokens=12, past=PromptCache.load(tmp_path / "a.safetensors", engine))) == answer
    )
    kept = engine.stream(random_ids(33), max_new_tokens=5, keep="answer")
    talk, said, more = Conversation(engine), list(kept), random_ids(7, 2)
    assert list(talk.stream(random_ids(33), 5)) == said
    assert list(talk.stream(more, 6)) == list(
        engine.stream([said[-1], *more], max_new_tokens=6, past=kept.completion.cache)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_are_refilled_equal_single_streams(policy):
    """With steps that run ahead; some rows end by an end-of-sequence id at odd moments."""
    model = random_model().cuda()
    plan = [80] * 4 if policy == "full" else PLAN
    requests = [Request(random_ids(n, n), new, sampling, range(8)) for n, new, sampling in REFILLED * 2]
    engine, done = Engine(model, policy, plan=plan), {}
    for completion in engine.generate(requests, batch_size=3):
        done[id(completion.request)] = completion
    for request in requests:
        alone = Engine(model, policy, plan=plan).stream(request.ids, request.sampling, request.max_new_tokens, range(8))
        assert done[id(request)].tokens == list(alone)
        assert done[id(request)].finish_reason == alone.completion.finish_reason


@pytest.mark.parametrize("policy", BOUNDED)
def test_ragged_batch_equals_single(policy):
    model = random_model().cuda()
    prompts = [random_ids(count, seed=count) for count in (2, 31, 8)]
    singles = [run(Engine(model, policy, plan=PLAN), ids) for ids in prompts]
    requests = [Request(ids, max_new_tokens=NEW) for ids in prompts]
    done = {id(completion.request): completion for completion in Engine(model, policy, plan=PLAN).generate(requests)}
    assert [done[id(request)].tokens for request in requests] == singles


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "olmo3", "ministral3"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_family_on_cuda_equals_a_cpu(name, compiled, tmp_path):
    """Sink logits, experts, two kinds of rotary, scaled queries."""
    import families  # takes seconds

    torch._dynamo.reset()
    folder = families.make_checkpoint(families.BY_NAME[name], tmp_path)
    ids, following = (families.token_ids(1, count, seed=count)[0].tolist() for count in (41, 20))
    logits = []
    for device, compiles in (("cuda", compiled), ("cpu", False)):
        model, config = checkpoint.load(folder, device, "float32")
        engine = Engine(model, "h2o", plan=[14, 20, 17][: config.n_layers], compile=compiles)
        logits.append(teacher_forced(engine, ids, following).cpu())
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].abs().max()
    wide = logits[1][0]
    narrow = checkpoint.load(folder, "cuda", "bfloat16")[0](torch.tensor([ids], device="cuda"))[0, -1].float().cpu()
    assert (narrow - wide).abs().median() < 0.05 * wide.abs().max()


@pytest.fixture
def nccl(monkeypatch):
    """A group of one rank, in which every sum over ranks is a call of NCCL that changes nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield lambda: monkeypatch.setattr(parallel, "_shard", parallel.Shard(world=2))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("policy", ["h2o", "streaming"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sums_over_ranks_are_part_of_a_step(policy, compiled, nccl, monkeypatch):
    """Captured with it, and no step waits for one. `told` is not for a group of one that says it is two."""
    torch._dynamo.reset()
    model, sums = random_model().cuda(), []
    want = run(Engine(model, policy, plan=PLAN), random_ids(30))
    nccl()
    monkeypatch.setattr(parallel, "told", lambda value: [value])
    all_reduce = torch.distributed.all_reduce
    if not compiled:  # the compiler has its own call
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: (sums.append(x.shape), all_reduce(x))[1])
    engine = Engine(model, policy, plan=PLAN, compile=compiled)
    replays = counted(engine) if compiled else []
    assert run(engine, random_ids(30)) == want
    assert replays == [NEW - 1] if compiled else len(sums) == 2 * 4 * NEW


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_gpus_equal_one(compiled):
    asked = [str(ROOT / "generate.py"), "--json", "--squeeze", "--max-new-tokens", "24", "--dtype", "float64"]
    asked += ["--device", "cuda"] + ["--compile"] * compiled
    found = []
    for way in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        done = subprocess.run([sys.executable, *way, *asked], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["tokens"])
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_mixture_in_bfloat16(rows: int):
    """Captured steps of one row and of many equal eager ones on the CPU, as far as bfloat16 goes."""
    torch._dynamo.reset()
    shape = dict(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=32, experts=16, experts_per_token=4)
    model = random_model(torch.bfloat16, **shape)
    x = torch.randn(rows, 1, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    module = model.layers[0].feed_forward
    with torch.inference_mode():
        want = module(x)
        there = module.cuda()
        compiled = torch.compile(there, fullgraph=True, dynamic=False)
        for run in (there, compiled):
            torch.testing.assert_close(run(x.cuda()).cpu(), want, atol=3e-2, rtol=3e-2)
        graph = torch.cuda.CUDAGraph()
        given = x.cuda()
        with torch.cuda.graph(graph):
            out = compiled(given)
        given.copy_(x.flip(0))
        graph.replay()
        torch.testing.assert_close(out.cpu(), want.flip(0), atol=3e-2, rtol=3e-2)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10), reason="loop"
)
def test_a_mixtures_prompt_does_not_wait():
    shape = dict(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=32, experts=16, experts_per_token=4)
    module = random_model(torch.bfloat16, **shape).layers[0].feed_forward
    x = torch.randn(1, 50, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = module(x)
        there, given = module.cuda(), x.cuda()
        there(given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = there(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(out.cpu(), want, atol=3e-2, rtol=3e-2)
