"""How the code of a step runs: as it stands or compiled, its calls bound to their graphs, the whole step captured."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model import Block, Transformer


class Code:
    """What runs a step: the one block of every layer, and the head; compiled, and captured, if that is wanted."""

    def __init__(self, compile: bool, device: torch.device):
        self.block = compiled(Block.decode) if compile else Block.decode
        self.logits = compiled(Transformer.logits) if compile else Transformer.logits
        self.compiled = compile
        # step -> what runs it again with the same buffers
        self.capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
        if compile and device.type == "cuda":
            self.capture = CudaGraphs()

    def bound(self, function: Callable[..., Tensor], first: Any, *rest: Any) -> Callable[[Tensor], Tensor]:
        """x -> function(first, x, *rest)."""
        return Bound(function, first, *rest) if self.compiled else lambda x: function(first, x, *rest)


class CudaGraphs:
    """Captures steps by hand, all in one memory pool."""

    def __init__(self):
        # One stream for all captures: cuBLAS keeps a workspace for every stream that it has worked on.
        self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):  # what is compiled or chosen at first use must not be captured
            step()
            step()
        torch.cuda.current_stream().wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
            step()
        return graph.replay


def compiled(function: Callable) -> Callable:
    """The function through Inductor, as one graph for each kind of input; where it cannot be one, an error."""
    return torch.compile(function, fullgraph=True)


def compiled_graphs() -> int:
    """How many graphs this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds, and without it nothing was compiled
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


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
        with _heard() as calls:
            # Every policy, and every kind of model, adds its own graphs to the same code: the default limit allows 8 in
            # all. Dynamo's settings are those of the thread that compiles.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
            out = self.function(self.first, x, *self.rest)
        if len(calls) == 1:
            [(code, inputs, outputs)] = calls
            at = [number for number, value in enumerate(inputs) if value is x]
            if len(at) == 1 and len(outputs) == 1 and outputs[0] is out:
                self.code, self.before, self.after = code, inputs[: at[0]], inputs[at[0] + 1 :]
        return out


_listening = threading.RLock()  # held by the thread whose calls are heard


@contextmanager
def _heard() -> Iterator[list[tuple[Callable, list, Sequence]]]:
    """What Inductor's graphs run in this thread while it is open: each call's code, inputs and outputs.

    One thread at a time: the others wait. They may run code that is compiled already meanwhile.
    """
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
