"""What needs a GPU: the same oracles on CUDA. Run with -m gpu (scripts/gpu_suite.sh does)."""

import json

import pytest
import torch
from conftest import random_ids, random_model
from test_engine import BOUNDED, PLAN, run, teacher_forced

import generate
from engine import Engine, Request
from sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", ["full", *BOUNDED])
def test_cuda_equals_cpu(policy, compiled):
    torch._dynamo.reset()
    model = random_model()
    ids, following = random_ids(41), random_ids(40, seed=3)
    plan = [81] * 4 if policy == "full" else PLAN
    want = teacher_forced(Engine(model, policy, plan=plan), ids, following)
    got = teacher_forced(Engine(model.cuda(), policy, plan=plan, compile=compiled), ids, following)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", BOUNDED)
def test_ragged_batch_equals_single(policy):
    model = random_model().cuda()
    prompts = [random_ids(count, seed=count) for count in (2, 31, 8)]
    singles = [run(Engine(model, policy, plan=PLAN), ids) for ids in prompts]
    requests = [Request(ids, max_new_tokens=40) for ids in prompts]
    done = {id(completion.request): completion for completion in Engine(model, policy, plan=PLAN).generate(requests)}
    assert [done[id(request)].tokens for request in requests] == singles


def test_bf16_runs_and_equal_seeds_give_equal_tokens():
    model = random_model(torch.bfloat16).cuda()
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    first, again = (list(Engine(model, "h2o", "squeeze", 16).stream(random_ids(50), sampling, 30)) for _ in range(2))
    assert first == again and len(first) == 30


def test_the_command_line_on_cuda(capsys):
    def tokens(*args: str) -> list[int]:
        assert generate.main(["--json", "--squeeze", "--max-new-tokens", "24", "--ignore-eos", *args]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    assert tokens("--device", "cuda") == tokens("--device", "cpu")
