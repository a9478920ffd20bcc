"""How the code of a step runs: as it stands or compiled, its calls bound to their graphs, the whole step captured."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bound import LIMITED, Bound
from model import Block, Transformer

# What a loop over a matrix reads again and again, such as a norm's output, is computed once; a product and a sum may be
# one instruction.
INDUCTOR = {"realize_reads_threshold": 0, "cpp.enable_floating_point_contract_flag": "fast"}


class Code:
    """What runs a step: the one block of every layer, and the head; compiled, and captured, if that is wanted."""

    def __init__(self, compile: bool, device: torch.device):
        self.block = compiled(Block.forward) if compile else Block.forward
        self.logits = compiled(Transformer.logits) if compile else Transformer.logits
        self.compiled = compile
        # step -> what runs it again with the same buffers
        self.capture = CudaGraphs() if compile and device.type == "cuda" else None

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
        # What other threads do meanwhile must not fail: another engine's, and NCCL's own, which looks after its calls.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
            step()
        return graph.replay


def compiled(function: Callable) -> Callable:
    """The function through Inductor, as one graph for each kind of input; where it cannot be one, an error.

    PyTorch loads its compiler at the first call: a request's first token, which needs no step, does not wait for it.
    """
    made = cache(lambda: torch.compile(function, fullgraph=True, options=INDUCTOR, **LIMITED))
    return lambda *inputs: made()(*inputs)
