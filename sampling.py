"""From logits to the next token, on the device and without waiting for it."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How one request picks its tokens. temperature 0 is greedy; top_k None and top_p 1 do not restrict.

    Equal seeds give equal tokens for a request, whatever its neighbours in the batch do; None draws a fresh seed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be in (0, 1], not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), not {self.seed}")

    @property
    def restricted(self) -> bool:
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


GREEDY = Sampling()


class Sampler:
    """Picks one token per row of a batch, each row by its own settings and random numbers.

    They stand in buffers on the device: a captured step serves other requests later. `samplings` has one for each row
    to begin with; `allowed` names those that may come later (None: any), so that no step computes what nobody asks for.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        device: torch.device | str = "cpu",
        allowed: Sequence[Sampling] | None = (),
    ):
        known = None if allowed is None else [*samplings, *allowed]
        self.greedy = known is not None and all(sampling.temperature == 0 for sampling in known)
        self.restricted = known is None or any(sampling.restricted for sampling in known)
        rows = len(samplings)
        self.temperature = torch.zeros(rows, 1, device=device)
        self.top_p = torch.ones(rows, 1, device=device)
        self.top_k, self.seed, self.drawn = (
            torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in ("top_k", "seed", "drawn")
        )
        self.set(torch.arange(rows, device=device), samplings)

    def set(self, rows: Tensor, samplings: Sequence[Sampling]) -> None:
        """From now on rows [R] are other requests'."""
        for buffer, values in (
            (self.temperature, [sampling.temperature for sampling in samplings]),
            (self.top_p, [sampling.top_p for sampling in samplings]),
            (self.top_k, [sampling.top_k or 2**31 for sampling in samplings]),
            (self.seed, [secrets.randbits(63) if s.seed is None else s.seed for s in samplings]),
        ):
            buffer[rows] = torch.tensor(values, dtype=buffer.dtype)[:, None].to(buffer.device)
        self.drawn[rows] = 0

    def __call__(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """logits [R, vocab] of some rows, by default of all -> token ids [R]."""
        best = logits.argmax(-1)
        if self.greedy:
            return best
        temperature = self.temperature[rows]
        cold = temperature == 0
        logits = logits.float() / temperature.masked_fill(cold, 1)
        if self.restricted:
            logits = restrict(logits, self.top_k[rows], self.top_p[rows])
        # argmax(p / e) with e ~ Exp(1) draws from p; `multinomial` would wait for the device and cannot be captured.
        e = exponential(self.seed[rows], self.drawn[rows], logits.shape[-1])
        self.drawn[rows] += 1
        return torch.where(cold[:, 0], best, (logits.softmax(-1) / e).argmax(-1))


def exponential(seed: Tensor, count: Tensor, size: int) -> Tensor:
    """Draws [B, size] from Exp(1) that depend on seed [B, 1] and count [B, 1] alone, whatever else runs."""
    index = torch.arange(size, device=seed.device)
    bits = scrambled(scrambled(seed + GOLDEN * count) + GOLDEN * index)
    uniform = ((bits >> 40 & 0xFFFFFF).float() + 0.5) * 2**-24
    return -uniform.log()


GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def scrambled(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in wrapping int64."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)


def restrict(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside of each row's top_k [B, 1] and then of the smallest set that holds top_p [B, 1] of what is left."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, float("-inf"))  # the first always stays
    return torch.empty_like(logits).scatter_(-1, order, ordered)
