"""Whom we are compared with, on the same weights. A new peer is one entry of PEERS.

It is made at its first turn, so that one that cannot be is a row that says why.
"""

from collections.abc import Callable

from benchmark.race import Contestant
from benchmark.subjects import Subject

PEERS: dict[str, Callable[[Subject], Contestant]] = {
    "generate": lambda subject: Contestant(
        "transformers generate", lambda requests: subject.transformers.generate(requests)
    ),
    "eager": lambda subject: Contestant("transformers eager", lambda requests: subject.transformers.eager(requests)),
    "static": lambda subject: Contestant(
        "transformers static, compiled", lambda requests: subject.transformers.static(requests), clean=False
    ),
    "llama.cpp": lambda subject: Contestant("llama.cpp", lambda requests: subject.llama_cpp.generate(requests)),
}
