"""Calls that go past Dynamo, and what else reaches into PyTorch's private parts: all of it stands here.

`Bound` is written for the releases from FIRST to LAST. In another one it is a plain call of the compiled function: the
same results, more time for each call.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let one graph serve all lengths of this dimension from the start."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_graphs() -> int:
    """How many graphs this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds, and without it nothing was compiled
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0
