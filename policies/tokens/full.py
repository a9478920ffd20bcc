"""Full: every token of the request is kept. The yardstick."""

from dataclasses import dataclass
from typing import ClassVar

from policies.tokens.base import TokenPolicy


@dataclass(frozen=True)
class Full(TokenPolicy):
    name: ClassVar[str] = "full"
    bounded: ClassVar[bool] = False
