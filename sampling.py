"""From logits to the next token, on the device and without waiting for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be in (0, 1], not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {self.seed}")


GREEDY = Sampling()


class Sampler:
    """Picks one token per row of a batch, each row by its own settings and random stream."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device | str):
        self.greedy = all(row.temperature == 0 for row in rows)
        if self.greedy:
            return
        self.temperature = torch.tensor([row.temperature for row in rows], device=device)[:, None]
        self.top_k = torch.tensor([row.top_k or 2**31 for row in rows], device=device)[:, None]
        self.top_p = torch.tensor([row.top_p for row in rows], device=device)[:, None]
        self.restricted = any(row.top_k is not None or row.top_p < 1 for row in rows)
        self.generators = [torch.Generator(device) for _ in rows]
        for generator, row in zip(self.generators, rows, strict=True):
            generator.seed() if row.seed is None else generator.manual_seed(row.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, vocab] -> token ids [B]."""
        best = logits.argmax(-1)
        if self.greedy:
            return best
        cold = self.temperature == 0
        logits = logits.float() / self.temperature.masked_fill(cold, 1)
        if self.restricted:
            logits = restrict(logits, self.top_k, self.top_p)
        # argmax(p / e) with e ~ Exp(1) draws from p; `multinomial` would synchronise and cannot be captured.
        noise = torch.stack([torch.empty_like(logits[0]).exponential_(generator=g) for g in self.generators])
        drawn = (logits.softmax(-1) / noise).argmax(-1)
        return torch.where(cold[:, 0], best, drawn)


def restrict(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside of each row's top_k [B, 1] and then of the smallest set that holds top_p [B, 1] of what is left."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, float("-inf"))  # the first always stays
    return torch.empty_like(logits).scatter_(-1, order, ordered)
