"""Whom we are compared with, on the same weights. A new peer is one entry of PEERS."""

from collections.abc import Callable

from benchmark.race import Contestant
from benchmark.subjects import Subject

PEERS: dict[str, Callable[[Subject], Contestant]] = {
    "generate": lambda subject: Contestant("transformers generate", subject.transformers.generate),
    "eager": lambda subject: Contestant("transformers eager", subject.transformers.eager),
    "static": lambda subject: Contestant("transformers static, compiled", subject.transformers.static, clean=False),
    "llama.cpp": lambda subject: Contestant("llama.cpp", subject.llama_cpp.generate),
}
