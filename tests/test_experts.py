"""Mixtures: all ways through the experts give the same, read no more than they need, and do not wait."""

import math
import re
from collections import Counter
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from conftest import random_model
from simulated import moved, simulated
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import fused
from model import Experts
from weights import quantize

DIM, COLUMNS, EXPERTS, TOP = 32, 48, 8, 3


def experts(dtype: torch.dtype = torch.float64, weights: str = "auto", **changes) -> Experts:
    shape = dict(n_layers=1, dim=DIM, ffn_dim=COLUMNS, experts=EXPERTS, experts_per_token=TOP)
    model = random_model(torch.float64, **shape | changes)
    quantize(model, weights)
    return model.layers[0].feed_forward.to(dtype) if weights == "auto" else model.layers[0].feed_forward


def tokens(rows: int, length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The first ones choose alike, so that some experts have many rows and some may have none."""
    x = torch.randn(rows, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x.flatten(0, 1)[: rows * length // 2] = x[0, 0]
    return x.to(dtype)


def by_definition(module: Experts, x: torch.Tensor) -> torch.Tensor:
    """Each token by itself through each expert that it chose."""
    w13, w2 = (part.weight.double().unflatten(0, (EXPERTS, -1)) for part in (module.w13, module.w2))
    b13, b2, b = (0.0 if part.bias is None else part.bias.double() for part in (module.w13, module.w2, module.router))
    b13, b2 = (each.view(EXPERTS, -1) if module.w2.bias is not None else [0.0] * EXPERTS for each in (b13, b2))
    out = torch.zeros_like(x.double()).flatten(0, 1)
    for row, token in enumerate(x.double().flatten(0, 1)):
        shares, chosen = (module.router.weight.double() @ token + b).softmax(-1).topk(TOP)
        for share, expert in zip(shares / shares.sum() if module.norm else shares, chosen, strict=True):
            gate, up = (w13[expert] @ token + b13[expert]).chunk(2)
            if module.limit:
                gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit) + 1
            out[row] += share * (w2[expert] @ (torch.nn.functional.silu(gate) * up) + b2[expert])
    return out.view_as(x)


FORMS = {
    "normed": {},
    "as they are": dict(router_norm=False),
    "biased": dict(ffn_bias=True, router_bias=True, activation_limit=0.9),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 1), (1, 30), (3, 11)], ids=str)
def test_all_ways_are_the_definition(size, form, monkeypatch):
    """A few rows, many, and prompts; PyTorch's product of groups, the loop, and, where that waits, all experts."""
    module, x = experts(**FORMS[form]), tokens(*size)
    want = by_definition(module, x)
    torch.testing.assert_close(module(x), want)
    single = experts(torch.float32, **FORMS[form])
    assert fused(single.w13.stack) and fused(single.w2.stack) and not fused(module.w13.stack)
    torch.testing.assert_close(single(x.float()).double(), want, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("kernels.fused", lambda stack: False)
    torch.testing.assert_close(single(x.float()).double(), want, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("kernels.Linear.waits", True)
    torch.testing.assert_close(module(x), want)


def test_where_pytorch_has_a_product_of_groups():
    for dtype, rows, columns, has in [
        (torch.bfloat16, 16, 24, True),
        (torch.float16, 16, 24, True),
        (torch.float32, 16, 20, True),
        (torch.bfloat16, 16, 20, False),  # rows of 40 bytes
        (torch.bfloat16, 20, 16, False),
        (torch.float64, 16, 16, False),
    ]:
        assert fused(torch.zeros(3, rows, columns, dtype=dtype)) == has


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_codes_of_a_prompt(bits: str):
    """In groups as one by one."""
    module, x = experts(weights=bits), tokens(2, 9)
    alone = torch.cat([module(token) for token in x.view(-1, 1, 1, DIM)])
    torch.testing.assert_close(module(x), alone.view_as(x))


@pytest.mark.parametrize("has", [True, False], ids=["fused", "loop"])
def test_prompts_do_not_wait(has: bool):
    """Where PyTorch has a product of groups; else each layer waits once. A step of many rows never does."""
    module, prompt, step = experts(), tokens(1, 20), tokens(16, 1)
    want = module(prompt), module(step)
    with simulated() as device, patch("kernels.fused", lambda stack: has and stack.is_cuda):
        there, x, rows = moved(module), prompt.to("cuda"), step.to("cuda")
        with patch("kernels.grouped_product", host_product) if has else nullcontext():
            device.waits, device.forbidden = Counter(), has
            out = there(x)
            assert sum(device.waits.values()) == (0 if has else 1)
            device.forbidden = True
            many = there(rows)
        device.forbidden = False
        torch.testing.assert_close((out.cpu(), many.cpu()), want)


def host_product(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Groups on the simulated device, where nothing may come to the host."""
    number = torch.searchsorted(ends.long(), torch.arange(len(x), device=x.device), right=True)
    return (stack[number] @ x[..., None]).squeeze(-1)


class Reads(TorchDispatchMode):
    """Counts bytes of the modules' weights that operations read: of an index what it picks, else all."""

    def __init__(self, *modules: torch.nn.Module):
        super().__init__()
        self.storages = {module.weight.untyped_storage().data_ptr() for module in modules}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        whole = [t for t in tensors if t.untyped_storage().data_ptr() in self.storages]
        views = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() in self.storages
        if whole and not views:
            self.bytes += out.nbytes if function.overloadpacket == torch.ops.aten.index else whole[0].nbytes
        return out


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_reads_what_it_chose(rows: int):
    """The counter counts all experts where all run."""
    module = experts(torch.float32)
    one = 3 * DIM * COLUMNS * 4
    with Reads(module.w13, module.w2) as reads:
        module(tokens(rows, 1, torch.float32))
    assert reads.bytes == rows * TOP * one
    with Reads(module.w13, module.w2) as reads, patch("kernels.Linear.waits", True):
        module(tokens(rows + 2, 1, torch.float32))
    assert reads.bytes == EXPERTS * one


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_step_reads_in_place(dtype):
    """The generated loops copy no expert: no buffer is as large as a part of one."""
    torch._dynamo.reset()
    module, x = experts(dtype), tokens(1, 1, dtype)
    with torch.inference_mode():
        out, [code] = run_and_get_code(torch.compile(module, fullgraph=True, dynamic=False), x)
        torch.testing.assert_close(out, module(x), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    sizes = [map(int, re.findall(r"\d+", size)) for size in re.findall(r"empty_strided_cpu\(\(([\d, ]+)", code)]
    assert sizes and max(map(math.prod, sizes)) < DIM * COLUMNS
    assert "addmm" not in code and "bmm" not in code
