"""One model over several ranks, started by torchrun: each has some of the heads, and of the feed-forward columns.

    torchrun --nproc-per-node 2 generate.py --checkpoint ~/models/Llama-2-70B --squeeze --prompt "Once upon a time"

Megatron-LM's shards (arXiv 1909.08053): what attention and feed-forward parts add to the residual stream is summed over
the ranks, twice a layer; all else is computed by each alone, from equal numbers. So plans and tokens are equal without
being told; `same` notices where they are not. Where there are more ranks than key-value heads, some hold the same one.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from config import ModelConfig
from errors import UserError, shown

SECONDS = 600  # that a rank waits for another before it gives up
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name, up to PyTorch 2.12


@dataclass(frozen=True)
class Shard:
    """This process's part. sharers: how many ranks hold the same key-value head; group: theirs."""

    rank: int = 0
    world: int = 1
    sharers: int = 1
    group: Any = None

    def part(self, total: int) -> tuple[int, int]:
        """Of so many equal things the first and the last + 1 that are this rank's."""
        return self.rank * total // self.world, (self.rank + 1) * total // self.world

    def kv_part(self, heads: int) -> tuple[int, int]:
        """The same of key-value heads."""
        first = self.rank * heads // self.world
        return first, first + max(1, heads // self.world)


class Cut(NamedTuple):
    """The part of a tensor that a rank has: ranges of rows, one after the other, or a range of columns; None: all.

    muted: another rank has it, and this one zeros: what is added once may be in one place only.
    """

    rows: tuple[tuple[int, int], ...] | None = None
    columns: tuple[int, int] | None = None
    muted: bool = False

    def of(self, tensor: Any) -> Tensor:
        """tensor: a Tensor, or anything else that slices give one of."""
        if self.columns is not None:
            return tensor[:, slice(*self.columns)]
        if self.rows is not None:
            parts = [tensor[slice(*own)] for own in self.rows]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = tensor if isinstance(tensor, Tensor) else tensor[:]
        return torch.zeros_like(whole) if self.muted else whole

    def size(self, rows: int) -> int:
        """How many of so many rows it has."""
        return rows if self.rows is None else sum(last - first for first, last in self.rows)

    def within(self, first: int, count: int) -> "Cut":
        """Of a tensor that fills the rows from `first` on."""
        if self.rows is None:
            return self
        own = ((max(a, first) - first, min(b, first + count) - first) for a, b in self.rows)
        return self._replace(rows=tuple((a, b) for a, b in own if a < b))


def cut_of(name: str, config: ModelConfig, own: Shard) -> Cut:
    """Which part of a parameter of the whole model (`config`) a rank has."""
    module, _, kind = name.rpartition(".")
    part = module.rpartition(".")[2]
    if kind == "sink_logits":
        return Cut((own.part(config.n_heads),))
    if own.world == 1 or part not in ("wqkv", "wo", "q_norm", "k_norm", "w13", "w2"):
        return Cut()
    dim, heads, kv_heads = config.head_dim, own.part(config.n_heads), own.kv_part(config.n_kv_heads)
    experts, width = config.feed(int(module.split(".")[1]))
    if part in ("wo", "w2"):
        columns = tuple(dim * head for head in heads) if part == "wo" else own.part(width)
        return Cut(columns=columns) if kind == "weight" else Cut(muted=own.rank > 0)
    if part in ("q_norm", "k_norm"):
        whole = config.qk_norm == "head"
        return Cut() if whole else Cut((tuple(dim * head for head in (heads if part == "q_norm" else kv_heads)),))
    if part == "wqkv":
        starts = (0, config.n_heads, config.n_heads + config.n_kv_heads)
        each = zip(starts, (heads, kv_heads, kv_heads), strict=True)
        return Cut(tuple((dim * (start + a), dim * (start + b)) for start, (a, b) in each))
    a, b = own.part(width)
    blocks = range(max(1, experts) * (2 if config.ffn_gate else 1))
    return Cut(tuple((block * width + a, block * width + b) for block in blocks))


def cut_by_kv_head(config: ModelConfig, own: Shard) -> Cut:
    """The same of rows that hold, for each key-value head in turn, its query heads, its key and its value."""
    group, dim = config.n_heads // config.n_kv_heads, config.head_dim
    (first, last), (a, b) = own.part(config.n_heads), own.kv_part(config.n_kv_heads)
    if own.world <= config.n_kv_heads:
        return Cut(((a * (group + 2) * dim, b * (group + 2) * dim),))
    start = a * (group + 2)
    queries = (start + first - a * group, start + last - a * group)
    return Cut(tuple((dim * x, dim * y) for x, y in (queries, (start + group, start + group + 2))))


ALONE, WHOLE = Shard(), Cut()
_shard = ALONE
_store: Any = None  # what the ranks tell each other without waiting


def shard() -> Shard:
    return _shard


def device(name: str) -> str:
    """What a process takes where all are told `name`: each rank of a machine has a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and started() > 1 else name


def started() -> int:
    """How many ranks torchrun has started. UserError if the environment says nonsense."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not (world.isdecimal() and 0 < int(world) < 2**16):
        raise UserError(f"WORLD_SIZE must be a positive integer, not {shown(world)}")
    return int(world)


def alone(program: str) -> None:
    """UserError where torchrun has started several ranks of a program that runs on one."""
    if started() > 1:
        raise UserError(f"{program} runs on one rank; start it without torchrun")


def beside() -> int:
    """How many ranks share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", started()))


class Lost(RuntimeError):
    """torchrun ends this rank, because another one has ended."""


@contextmanager
def ranks(device: str) -> Iterator[Shard]:
    """Within, this process is one of the ranks that torchrun has started, if it has; only the first one speaks.

    UserError, there or in whichever rank is left, for ranks that do not come, and for one that ends before its time.
    """
    if started() == 1:
        yield ALONE
        return
    _join("nccl" if device.startswith("cuda") else "gloo")
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        with ExitStack() as quiet:
            if shard().rank:
                nobody = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(redirect_stdout(nobody))
                quiet.enter_context(redirect_stderr(nobody))
            yield shard()
    except (KeyboardInterrupt, UserError, RuntimeError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun tells all to end as soon as one has
        _leave(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        stop()


def _leave(error: BaseException) -> None:
    """One rank tells what went wrong, the first one if it is left. UserError for an error that is another rank's."""
    lost = isinstance(error, Lost | dist.DistError) or "gloo" in str(error)
    if shard().rank and not isinstance(error, UserError) and not lost and not isinstance(error, KeyboardInterrupt):
        return  # a fault of ours, with its traceback
    if shard().rank:
        time.sleep(2)
    with suppress(RuntimeError):
        if _store.add("said", 1) > 1:
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    if lost:
        raise UserError("another rank was ended, and all others with it; start them again") from error


def _told_to_end(*_: object) -> NoReturn:
    raise Lost("told to end")


def _join(backend: str) -> None:
    global _shard, _store
    try:
        _store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the other ranks cannot be reached ({error}); start all of them with torchrun") from None
    _shard = Shard(rank, world)


def stop() -> None:
    global _shard
    _shard = ALONE
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def share(kv_heads: int) -> None:
    """Say how many key-value heads the model has, so that the ranks that hold the same one find each other."""
    global _shard
    rank, world = _shard.rank, _shard.world
    sharers, group = max(1, world // kv_heads), _shard.group
    if sharers not in (1, _shard.sharers):
        for first in range(0, world, sharers):
            ranks = list(range(first, first + sharers))
            made = dist.new_group(ranks)  # all ranks take part in making each
            group = made if rank in ranks else group
    _shard = Shard(rank, world, sharers, group)


def summed(x: Tensor) -> Tensor:
    """x of all ranks, added up; the same numbers on each."""
    if _shard.world == 1:
        return x
    x = x.contiguous()
    dist.all_reduce(x)
    return x


def of_group(probs: Tensor) -> Tensor:
    """What a key-value head's queries attend to, [B, K, G, ...], with those of the ranks that hold the same head."""
    if _shard.sharers == 1:
        return probs
    parts = probs.new_empty(_shard.sharers * len(probs), *probs.shape[1:])
    gather(parts, probs.contiguous(), group=_shard.group)
    return parts.unflatten(0, (_shard.sharers, -1)).movedim(0, 2).flatten(2, 3)


def joined(x: Tensor, dim: int) -> Tensor:
    """Key-value heads of all ranks along `dim`, each head once."""
    if _shard.world == 1:
        return x
    parts = x.new_empty(_shard.world * len(x), *x.shape[1:])
    gather(parts, x.contiguous())
    return torch.cat(parts.chunk(_shard.world)[:: _shard.sharers], dim=dim)


def told(values: Any) -> list[Any]:
    """The values of all ranks."""
    found = [None] * _shard.world
    if _shard.world == 1:
        return [values]
    dist.all_gather_object(found, values)
    return found


def agreed(value: Any) -> Any:
    """The first rank's value: of what the ranks find out each for itself, such as free memory or a new seed."""
    if _shard.world == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def line() -> Callable[[Any], Any]:
    """What the first rank gives to it, all get from it, however long that takes. Each call is one of all ranks."""
    if _shard.world == 1:
        return lambda value: value
    patient = dist.new_group(timeout=timedelta(days=30), backend="gloo")

    def passed(value: Any) -> Any:
        told = [value]
        dist.broadcast_object_list(told, src=0, group=patient)
        return told[0]

    return passed


def heard(lines: Iterator[str]) -> Iterator[str]:
    """What the first rank reads, for all, until it ends."""
    passed = line()
    while (told := passed(next(lines, None) if _shard.rank == 0 else None)) is not None:
        yield told


def same(value: Any, what: str) -> None:
    """RuntimeError unless all ranks have this value."""
    if any(other != value for other in told(value)):
        raise RuntimeError(f"the ranks have different {what}, which is a fault of ours")
