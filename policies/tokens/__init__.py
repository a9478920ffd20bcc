"""Token axis: which prompt tokens a layer keeps, and which slot the next token takes.

A policy is a small frozen dataclass that is its own configuration. To add one: write a file here with a subclass of
`TokenPolicy`, and add it to `TOKEN_POLICIES`. Shapes as in model.py.
"""

from typing import Any

from policies import options
from policies.tokens.base import TokenPolicy
from policies.tokens.dropkv import DropKV
from policies.tokens.full import Full
from policies.tokens.h2o import H2O, H2OMean
from policies.tokens.keydiff import KeyDiff
from policies.tokens.knorm import KNorm
from policies.tokens.snapkv import SnapKV
from policies.tokens.streaming import Streaming
from policies.tokens.tova import TOVA
from policies.tokens.window import Window

TOKEN_POLICIES: dict[str, type[TokenPolicy]] = {
    policy.name: policy for policy in (Full, Window, Streaming, H2O, H2OMean, TOVA, SnapKV, DropKV, KNorm, KeyDiff)
}


def make(word: str, **given: Any) -> TokenPolicy:
    """The policy of that name, or of a word such as `snapkv:recent=32`, configured: see options.py."""
    return options.make("policy", TOKEN_POLICIES, word, given)


__all__ = [
    "TOKEN_POLICIES",
    "TOVA",
    "DropKV",
    "Full",
    "H2O",
    "H2OMean",
    "KNorm",
    "KeyDiff",
    "SnapKV",
    "Streaming",
    "TokenPolicy",
    "Window",
    "make",
]
