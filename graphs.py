"""How the code of a step runs: as it stands or compiled, its calls bound to their graphs, the whole step captured."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
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
    # Every policy, and every kind of model, adds its own graphs to the same code: the default limit allows 8 in all.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    return torch.compile(function, fullgraph=True, backend=_inductor)


def compiled_graphs() -> int:
    """How many graphs have been compiled so far, by anybody."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


_calls: ContextVar[list | None] = ContextVar("calls", default=None)  # of graphs: what ran, its inputs, its outputs


def _inductor(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable:
    """torch.compile's own backend, whose graphs tell a `Bound` that listens what they were called with."""
    from torch._inductor.compile_fx import compile_fx  # seconds that only who compiles should wait

    run = compile_fx(graph, examples)

    def call(*inputs: Any) -> Sequence[Tensor]:
        outputs = run(*inputs)
        if (calls := _calls.get()) is not None:
            calls.append((run, inputs, outputs))
        return outputs

    return call


class Bound:
    """A function with all its arguments but the second: `Bound(f, a, *rest)(x)` is f(a, x, *rest), x of one shape.

    From its second call on, a compiled one goes straight to the graph that its first call ran. Dynamo, whose guards and
    bytecode take as long as everything else in a small model's block on a CPU, has no part in it. As in a captured
    graph, all tensors but x have to stay where they were.
    """

    def __init__(self, function: Callable[..., Tensor], first: Any, *rest: Any):
        self.function, self.first, self.rest = function, first, rest
        self.graph: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.graph is not None:
            return self.graph(*self.before, x, *self.after)[0]
        listening = _calls.set([])
        try:
            out = self.function(self.first, x, *self.rest)
            calls = _calls.get()
        finally:
            _calls.reset(listening)
        if len(calls) == 1:  # else it is not compiled
            [(graph, inputs, outputs)] = calls
            at = [number for number, value in enumerate(inputs) if value is x]
            if len(at) == 1 and len(outputs) == 1 and outputs[0] is out:
                self.graph, self.before, self.after = graph, inputs[: at[0]], inputs[at[0] + 1 :]
        return out
