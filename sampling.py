"""From logits to the next token, on the device and without waiting for it."""

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from errors import UserError, shown
from parallel import agreed


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
        if not (_real(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number of at least 0, not {shown(self.temperature)}")
        if self.top_k is not None and not (_whole(self.top_k) and self.top_k >= 1):
            raise UserError(f"top-k must be an integer of at least 1, not {shown(self.top_k)}")
        if not (_real(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top-p must be in (0, 1], not {shown(self.top_p)}")
        if self.seed is not None and not (_whole(self.seed) and 0 <= self.seed < 2**63):
            raise UserError(f"seed must be an integer in [0, 2**63), not {shown(self.seed)}")

    @property
    def restricted(self) -> bool:
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _real(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


GREEDY = Sampling()
NOT_FINITE = -1  # stands for the token of a row whose logits are not finite
_FLOAT32 = torch.finfo(torch.float32)


def kind_of(samplings: Collection[Sampling] | None) -> tuple[bool, bool]:
    """What a step has to compute for all of them (None: for any): nothing but the best token; top-k and top-p."""
    if samplings is None:
        return False, True
    return all(own.temperature == 0 for own in samplings), any(own.restricted for own in samplings)


def not_finite(dtype: torch.dtype) -> str:
    """What is said of logits that are not finite in this dtype, in one line."""
    name = str(dtype).removeprefix("torch.")
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32", "float32": "float64"}.get(name)
    way = f"try another --dtype, such as {wider}" if wider else "check the weights and config.json"
    return f"the logits are not finite in {name}: a number overflows or the weights are broken; {way}"


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
        self.greedy, self.restricted = kind_of(None if allowed is None else [*samplings, *allowed])
        rows = len(samplings)
        self.temperature = torch.zeros(rows, 1, device=device)
        self.top_p = torch.ones(rows, 1, device=device)
        self.top_k, self.seed, self.drawn = (
            torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in ("top_k", "seed", "drawn")
        )
        self.set(torch.arange(rows, device=device), samplings)

    def suit(self, samplings: Collection[Sampling]) -> None:
        """From now on only these are drawn by, so that no step computes what nobody asks for."""
        self.greedy, self.restricted = kind_of(samplings)

    def set(self, rows: Tensor, samplings: Sequence[Sampling]) -> None:
        """From now on rows [R] are other requests'."""
        for buffer, values in (
            (self.temperature, [_temperature(sampling.temperature) for sampling in samplings]),
            (self.top_p, [_top_p(sampling.top_p) for sampling in samplings]),
            (self.top_k, [min(sampling.top_k or 2**31, 2**31) for sampling in samplings]),
            (self.seed, [_seed(sampling) for sampling in samplings]),
        ):
            buffer[rows] = torch.tensor(values, dtype=buffer.dtype)[:, None].to(buffer.device)
        self.drawn[rows] = 0

    def __call__(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """logits [R, vocab] of some rows, by default of all -> token ids [R].

        NOT_FINITE for a row with a NaN, with +inf or with nothing but -inf: whoever reads the tokens sees it, and no
        step waits for it.
        """
        most, best = logits.max(-1)  # a NaN counts as the largest
        finite = most.isfinite()
        if self.greedy:
            return best.masked_fill(~finite, NOT_FINITE)
        index = torch.arange(logits.shape[-1], device=logits.device)
        drawn = pick(self.probabilities(logits, rows), index, self.seed[rows], self.drawn[rows])
        self.drawn[rows] += 1
        cold = self.temperature[rows, 0] == 0
        return torch.where(cold, best, drawn).masked_fill(~finite, NOT_FINITE)

    def probabilities(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """What is drawn from, fp32 [R, vocab]: 0 for what a row's settings exclude. A greedy row's are not used."""
        temperature = self.temperature[rows]
        # Against the largest one first: divided by a tiny temperature two logits would both be inf.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = (logits - logits.amax(-1, keepdim=True)).float() / temperature.masked_fill(temperature == 0, 1)
        if self.restricted:
            logits = restrict(logits, self.top_k[rows], self.top_p[rows])
        return logits.softmax(-1)


def _seed(sampling: Sampling) -> int:
    """A new one if none is given, and if it matters: all ranks of a model then draw by the first one's."""
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling.seed or 0
    return agreed(secrets.randbits(63))


def _temperature(value: float) -> float:
    """As a float32 that can be divided by: those below and above do what this one does."""
    return min(max(value, _FLOAT32.tiny), _FLOAT32.max) if value else 0.0


def _top_p(value: float) -> float:
    """As a float32: above 0, and out of reach of any rounded sum if it is 1."""
    return max(value, _FLOAT32.tiny) if value <= 1 - _FLOAT32.eps / 2 else 2.0


def pick(probs: Tensor, index: Tensor, seed: Tensor, count: Tensor) -> Tensor:
    """A column for each row of probs [B, n], drawn by them; never one of probability 0 unless all are.

    argmax(p / e) with e ~ Exp(1) draws from p; `multinomial` would wait for the device and cannot be captured. index
    [n]: the token ids of the columns; what a token draws does not depend on which others there are.
    """
    return (probs / exponential(seed, count, index)).argmax(-1)


def exponential(seed: Tensor, count: Tensor, index: Tensor) -> Tensor:
    """Draws [B, n] from Exp(1) that depend on seed [B, 1], count [B, 1] and index [n] alone, whatever else runs."""
    return exponential_of(scrambled(scrambled(seed + GOLDEN * count) + GOLDEN * index))


def exponential_of(bits: Tensor) -> Tensor:
    """Exp(1) from 63 of 64 random bits: within [5e-20, 16.7], never 0 or inf.

    The smallest draw of a row wins it, so small ones are exact to a float32's own precision: `log1p` of a share that
    has all its bits below the first one that is set, where `log` of a share near 1 would know multiples of 6e-8 only.
    """
    share = (bits & 2**63 - 1).float() * 2**-63
    return -torch.log1p(-share.clamp(2**-64, 1 - 2**-24))


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
