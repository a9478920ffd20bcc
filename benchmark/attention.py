"""Who computes attention of one new token per row over its slots fastest.

Each contestant is a function of q [B, H, 1, D], k and v [B, K, N, D] and valid [B], which gives [B, H, D].
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmark.roofline import copy_rate
from benchmark.timing import attempt, seconds
from config import ModelConfig
from kvcache import LayerCache, Stored

SLOTS = {"cpu": (128, 1024), "cuda": (1024, 8192)}


def sdpa(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, backend: SDPBackend, masked: bool = False) -> Tensor:
    """The query heads of a group as queries of one head: K and V stay as they are stored."""
    mask = (torch.arange(k.shape[2], device=k.device) < valid[:, None])[:, None, None] if masked else None
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)).squeeze(3), k, v, mask).flatten(1, 2)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]


def bmm(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1)).squeeze(3) * k.shape[-1] ** -0.5
    return ((q @ k.mT).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v).flatten(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return LayerCache(Stored(k, v)).attend(q, valid, k.shape[-1] ** -0.5)[0]


def flex(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, enable_gqa=True)[:, :, 0]


def split_kv(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    from benchmark import split_kv as kernel  # Triton comes with PyTorch for CUDA only

    return kernel.split_kv(q, k, v, valid, k.shape[-1] ** -0.5)[0]


BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKENDS |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
compiled = partial(torch.compile, dynamic=False, fullgraph=True)  # beyond the limit of graphs an error, not eager
CONTESTANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "attend, compiled": compiled(attend),
    "split_kv, with shares": split_kv,
    "sdpa flash, gqa": sdpa_gqa,
    "flex_attention, compiled": compiled(flex),
    "attend": attend,
    "bmm": bmm,
    "bmm, compiled": compiled(bmm),
    **{f"sdpa {name}": partial(sdpa, backend=backend) for name, backend in BACKENDS.items()},
    **{f"sdpa {name}, mask": partial(sdpa, backend=backend, masked=True) for name, backend in BACKENDS.items()},
}


def measure(config: ModelConfig, device: str, batch: int) -> Iterator[dict[str, Any]]:
    """Time and share of the copy rate. Each call reads other keys and values, as each layer of a model does, so that no
    processor cache holds them."""
    group, kind = config.n_heads // config.n_kv_heads, dict(dtype=config.dtype, device=device)
    for slots in SLOTS[device]:
        kv_bytes = 2 * batch * config.n_kv_heads * slots * config.head_dim * config.dtype.itemsize
        caches = max(1, min(64, (256 << 20) // kv_bytes))
        q = torch.randn(batch, config.n_heads, 1, config.head_dim, **kind)
        kv = torch.randn(caches, 2, batch, config.n_kv_heads, slots, config.head_dim, **kind)
        valid = torch.full((batch,), slots, device=device)
        want = bmm(q.double(), *kv[0].double(), valid)
        for name, function in tqdm(CONTESTANTS.items(), f"attention {batch} x {slots}", leave=False):
            result = attempt(partial(_race, function, q, kv, valid, want))
            row = dict(what=name, batch=batch, slots=slots, heads=config.n_heads, group=group)
            if isinstance(result, str):
                yield row | dict(failed=result)
            else:
                error, each = result
                yield row | dict(us=1e6 * each, of_copy_rate=kv_bytes / each / copy_rate(device), error=error)


def _race(function: Callable, q: Tensor, kv: Tensor, valid: Tensor, want: Tensor) -> tuple[float, float]:
    """The largest error, and seconds of a call; on CUDA captured as a graph, so that launches do not count."""
    with torch.inference_mode():
        error = (function(q, *kv[0], valid) - want).abs().max().item()

        def call() -> list[Tensor]:
            return [function(q, k, v, valid) for k, v in kv]

        if not q.is_cuda:
            return error, seconds(call, "cpu") / len(kv)
        for _ in range(2):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return error, seconds(graph.replay, "cuda") / len(kv)
