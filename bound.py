"""Calls that go past Dynamo, and what else reaches into PyTorch's private parts: all of it stands here.

`Bound` is written for the releases from FIRST to LAST. In another one it is a plain call of the compiled function: the
same results, more time for each call.
"""

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

FIRST, LAST = (2, 11), (2, 13)
# Every policy, and every kind of model, adds its own graphs to the same code; Dynamo's default allows 8 in all.
RECOMPILE_LIMIT = 128
# Releases that let a function have its own limit get it so (`compiled` in graphs.py), in others each call sets it.
LIMITED = {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in signature(torch.compile).parameters else {}


def known(version: str) -> bool:
    """Whether a release of PyTorch, such as "2.13.0+cpu", is one of those that this was written for."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and FIRST <= tuple(map(int, numbers.groups())) <= LAST


class Bound:
    """A compiled function with all its arguments but the second: x -> function(first, x, *rest), x of one shape.

    Later calls go straight to the code from Inductor that the first call ran. They skip Dynamo's guards and
    AOTAutograd's wrappers, which take longer than a small model's block on a CPU. As in a captured graph, all tensors
    but x have to stay where they were.
    """

    def __init__(self, function: Callable[..., Tensor], first: Any, *rest: Any):
        self.function, self.first, self.rest = function, first, rest
        self.code: Callable[[list], Sequence[Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.code:
            return self.code([*self.before, x, *self.after])[0]
        with nullcontext() if LIMITED else _limited(), _heard() as calls:
            out = self.function(self.first, x, *self.rest)
        if len(calls) == 1:
            [(code, inputs, outputs)] = calls
            at = [number for number, value in enumerate(inputs) if value is x]
            if len(at) == 1 and len(outputs) == 1 and outputs[0] is out:
                self.code, self.before, self.after = code, inputs[: at[0]], inputs[at[0] + 1 :]
        return out


def _limited() -> AbstractContextManager:
    limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    return torch._dynamo.config.patch(recompile_limit=limit)


_listening = threading.RLock()  # held by the thread whose calls are heard


@contextmanager
def _heard() -> Iterator[list[tuple[Callable, list, Sequence]]]:
    """What Inductor's graphs run in this thread while it is open: each call's code, inputs and outputs.

    One thread at a time: the others wait. They may run code that is compiled already meanwhile.
    """
    if not known(torch.__version__):
        yield []
        return
    from torch._inductor.output_code import CompiledFxGraph  # takes seconds, so only where something is compiled

    _probe_here()
    with _listening:
        calls, call, thread = [], CompiledFxGraph.__call__, threading.get_ident()

        def listening(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Sequence[Any]:
            if threading.get_ident() != thread:
                return call(graph, inputs)
            held = list(inputs)  # the code empties its own
            outputs = call(graph, inputs)
            calls.append((graph.current_callable, held, outputs))
            return outputs

        CompiledFxGraph.__call__ = listening
        try:
            yield calls
        finally:
            CompiledFxGraph.__call__ = call


def _probe_here() -> None:
    """Whether code for the processor's instructions can be loaded is tried in this process.

    Inductor starts a Python for each kind of instructions that the processor reports, at every start: over a second.
    Loading the same file here runs none of its code.
    """
    from torch._inductor.cpu_vec_isa import VecISA

    name = "_probe_load"
    if hasattr(VecISA, name):  # else it is one of the releases that name it otherwise
        setattr(VecISA, name, lambda isa, path: _loads(path))


def _loads(path: str) -> bool:
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let one graph serve all lengths of this dimension from the start."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_graphs() -> int:
    """How many graphs this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds, and without it nothing was compiled
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


@torch.library.custom_op("squeeze_fast::int8_product", mutates_args=())
def int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [R, in] times codes [out, in] in int8, each row with its scale [out], on a CPU; x and scale in bfloat16.

    An operation of its own, since Inductor's lowering of PyTorch's fails where an operand does not lie in memory yet.
    """
    return torch._weight_int8pack_mm(x, codes, scale)


@int8_product.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(codes))


def int4_pack(codes: Tensor) -> Tensor:
    """Codes [out, in] from 0 to 15, out a multiple of 64, in the order of `int4_product`: uint8 [out, in / 2]."""
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def int4_product(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    """x [R, in] in bfloat16 times the matrix (code - 8) * scale + offset, on a CPU.

    pairs [in / group, out, 2] in bfloat16: the scale and offset of each group of columns.
    """
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)


@lru_cache
def int4_block() -> int | None:
    """How many rows of a matrix `int4_pack` takes at once: of each column, the codes of the first half of them lie in
    the low bits of as many bytes, those of the others in the high bits. Another order than that: None.
    """
    codes = (torch.arange(128 * 8) % 251 % 16).view(128, 8)
    for block in (64, 32):
        halves = int4_pack(codes).view(-1, 8, block // 2)
        if torch.equal(torch.cat((halves & 15, halves >> 4), dim=-1).mT.flatten(0, 1), codes):
            return block
    return None
