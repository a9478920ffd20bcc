"""Sliding window: the last `slots` tokens (Longformer, arXiv 2004.05150). Positions are absolute."""

from dataclasses import dataclass
from typing import ClassVar

from policies.tokens.base import TokenPolicy


@dataclass(frozen=True)
class Window(TokenPolicy):
    name: ClassVar[str] = "window"
