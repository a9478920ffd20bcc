"""llama.cpp reads and writes tokens: what runs in the process of its own that benchmark/llama_cpp.py starts.

In one process with PyTorch, the threads of either's OpenMP would spin while the other works.
"""

import os
import time
from functools import cache, lru_cache
from typing import Any

TOKENS = 2048  # of one call


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """file, threads, rows and length (of prompt and answer) name a context. It reads `prompts`, if there are any, and
    writes `new` tokens a row, greedily; without prompts it goes on from where it is. Seconds are of the clock, without
    the first step of a turn that goes on.
    """
    # libgomp reads these when it is loaded, in the next lines: what suits PyTorch's threads here is not for llama.cpp
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    context = Context.of(request["file"], request["threads"], request["rows"], request["length"])
    started, steps, prefill_s = time.perf_counter(), request["new"] - 1, None
    if request["prompts"]:
        context.read(request["prompts"])
        prefill_s = time.perf_counter() - started
    else:
        context.step()  # not timed: caches and threads get warm again
    started, made = time.perf_counter(), [[token] for token in context.last]
    for _ in range(steps):
        for row, token in zip(made, context.step(), strict=True):
            row.append(token)
    step_s = (time.perf_counter() - started) / steps if steps else None
    return {"tokens": made, "prefill_s": prefill_s, "step_s": step_s}


@cache
def _model(file: str) -> Any:
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    if model is None:
        raise ValueError(f"llama.cpp does not read {file}")
    return model


class Context:
    """A KV cache of `rows` sequences, and the last token of each; as llama.cpp comes: keys and values in float16."""

    def __init__(self, file: str, threads: int, rows: int, length: int):
        import llama_cpp

        self.api, model = llama_cpp, _model(file)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = rows * -(-length // 256) * 256, TOKENS, rows
        settings.n_threads = settings.n_threads_batch = threads
        self.context, self.last, self.seen = llama_cpp.llama_init_from_model(model, settings), [], 0
        self.batch = llama_cpp.llama_batch_init(TOKENS, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    @staticmethod
    @lru_cache(1)  # the one before is freed
    def of(*sizes: Any) -> "Context":
        return Context(*sizes)

    def __del__(self):
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)

    def read(self, prompts: list[list[int]]) -> None:
        """Prompts of one length, from an empty cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        places = [(token, at, row) for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        self.seen = len(prompts[0])
        starts = range(0, len(places), TOKENS)
        self.last = [token for start in starts for token in self._feed(places[start : start + TOKENS])]

    def step(self) -> list[int]:
        self.seen += 1
        self.last = self._feed([(token, self.seen - 1, row) for row, token in enumerate(self.last)])
        return self.last

    def _feed(self, places: list[tuple[int, int, int]]) -> list[int]:
        """Token, position, row of each; the likeliest token after each row's last position."""
        import numpy as np

        batch, asked = self.batch, []
        batch.n_tokens = len(places)
        for index, (token, position, row) in enumerate(places):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = row, position == self.seen - 1
            asked += [index] * batch.logits[index]
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gives {code}")
        logits = (self.api.llama_get_logits_ith(self.context, index) for index in asked)
        return [int(np.ctypeslib.as_array(own, (self.vocabulary,)).argmax()) for own in logits]
