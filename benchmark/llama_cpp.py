"""llama.cpp on the GGUF file that our model was read from, through llama-cpp-python, if that is installed."""

import math
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmark import roofline
from benchmark.race import Run
from child import Child
from config import ModelConfig
from engine import Request
from errors import UserError

SECONDS, MIB = 3600, 1 << 20  # of a turn; of memory: no limit that it could reach


class LlamaCpp:
    """It has as many threads as PyTorch, in a process of its own. file: None, if there is none."""

    def __init__(self, file: Path | None, config: ModelConfig):
        self.file, self.config = file, config

    @cached_property
    def child(self) -> Child:
        if self.file is None:
            raise UserError("llama.cpp reads GGUF files; this model is none")
        if find_spec("llama_cpp") is None:
            raise UserError("llama_cpp is not installed: pip install llama-cpp-python")
        return Child("benchmark.llama_process:answer", SECONDS, MIB)

    def generate(self, requests: list[Request]) -> Run:
        """Requests that are all alike in length, from an empty cache."""
        return self._turn(requests, 0, requests[0].max_new_tokens)

    def going_on(self, steps: int) -> Callable[[list[Request]], Run]:
        """Each turn makes so many tokens more; the first one reads the prompts."""
        made = 0

        def generate(requests: list[Request]) -> Run:
            nonlocal made
            made += steps
            return self._turn(requests, made - steps, steps)

        return generate

    def _turn(self, requests: list[Request], made: int, new: int) -> Run:
        prompt, c = len(requests[0].ids), self.config
        request = {"file": str(self.file), "threads": torch.get_num_threads(), "rows": len(requests), "new": new}
        request |= {"length": requests[0].length, "prompts": [] if made else [own.ids for own in requests]}
        try:
            told = self.child.ask(request)
        except UserError as error:
            raise UserError(f"llama.cpp {error}" if "llama" not in str(error) else str(error)) from error
        seconds = (math.nan if told[name] is None else told[name] for name in ("prefill_s", "step_s"))
        length, slot = prompt + requests[0].max_new_tokens, 4 * c.n_kv_heads * c.head_dim  # K and V in float16
        slots = roofline.valid_slots([length] * c.n_layers, prompt + made, new)
        kv_bytes = len(requests) * c.n_layers * length * slot
        return Run(told["tokens"], *seconds, slots=slots, kv_bytes=kv_bytes, slot_bytes=slot)
