"""StreamingLLM (arXiv 2309.17453): a few first tokens as attention sinks, and a window over the rest.

Positions are those inside the cache. Keys of the window are rotated at their absolute position, which already gives
the right distances; only the sinks' keys have to be turned each step, by max(0, seen - slots) positions. They are
therefore stored unrotated (`TokenPolicy.sinks`), and attention turns a fresh copy.
"""

from dataclasses import dataclass
from typing import ClassVar

from errors import UserError, shown
from policies.tokens.base import TokenPolicy


@dataclass(frozen=True)
class Streaming(TokenPolicy):
    name: ClassVar[str] = "streaming"
    sinks: int = 4

    def __post_init__(self):
        if type(self.sinks) is not int or self.sinks < 1:
            raise UserError(
                f"sinks must be an integer of at least 1, not {shown(self.sinks)}; without sinks use window"
            )

    @property
    def floor(self) -> int:
        return self.sinks + 1
