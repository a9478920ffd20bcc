"""transformers on the same weights: its parameters are views of ours."""

import math
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, logging

import checkpoint
from benchmark.timing import Run, peak_bytes, reset_peak
from graphs import compiled_graphs
from model import Transformer


class Peer:
    """raw: the config.json of the model."""

    def __init__(self, model: Transformer, raw: dict[str, Any]):
        logging.set_verbosity_error()
        self.model, self.device = model, model.device
        with torch.device(self.device):  # its own weights, let go in the next lines; buffers are filled here
            hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=model.config.dtype).eval()
        wrong = hf.load_state_dict(checkpoint.to_hf(model.state_dict(), model.config), strict=False, assign=True)
        assert not wrong.unexpected_keys, wrong
        hf.tie_weights()
        hf.requires_grad_(False)
        hf.generation_config.eos_token_id = None
        self.hf = hf
        self.compiled = torch.compile(hf, mode="reduce-overhead" if self.device.type == "cuda" else "default")
        self.caches: dict[tuple[int, int], Any] = {}  # static ones: a new one would be compiled for anew

    def generate(self, prompts: list[list[int]], new: int) -> Run:
        """As a user calls it. Decode time is that of all tokens less that of one."""
        first_s, _ = self._generate(prompts, 1)
        before = reset_peak(self.device.type)
        all_s, tokens = self._generate(prompts, new)
        return self._run(first_s, 0.0, (all_s - first_s) / max(new - 1, 1), tokens, len(prompts[0]) + new, before)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        ids = torch.tensor(prompts, device=self.device)
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
        started = time.perf_counter()
        out = self.hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
        tokens = out[:, ids.shape[1] :].tolist()  # waits for the device
        return time.perf_counter() - started, tokens

    def eager(self, prompts: list[list[int]], new: int) -> Run:
        """The bare loop of forward passes, which never waits for the device, with a growing cache."""
        return self._loop(prompts, new, DynamicCache(config=self.hf.config), self.hf)

    @torch.inference_mode()
    def static(self, prompts: list[list[int]], new: int) -> Run:
        """The same loop with a static cache, its steps compiled. What it takes is not known: it stays between runs."""
        key = (len(prompts), len(prompts[0]) + new)
        if key not in self.caches:
            self.caches = {key: StaticCache(config=self.hf.config, max_cache_len=key[1])}
        self.caches[key].reset()
        return self._loop(prompts, new, self.caches[key], self.compiled)._replace(peak_bytes=None)

    @torch.inference_mode()
    def _loop(self, prompts: list[list[int]], new: int, cache: Any, forward: Any) -> Run:
        length = len(prompts[0]) + new
        before = reset_peak(self.device.type)
        started = time.perf_counter()
        ids = torch.tensor(prompts, device=self.device)
        positions = torch.arange(length, device=self.device)[None]
        options = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = self.hf(ids, position_ids=positions[:, : ids.shape[1]], **options).logits
        made = [logits[:, -1].argmax(-1, keepdim=True)]
        made[0].tolist()
        prefill_s, graphs, started = time.perf_counter() - started, compiled_graphs(), time.perf_counter()
        for position in range(ids.shape[1], length - 1):
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(made[-1], position_ids=positions[:, position : position + 1], **options).logits
            made.append(logits[:, -1].argmax(-1, keepdim=True))  # a copy: the next replay overwrites the logits
        tokens = torch.cat(made, dim=1).tolist()
        decode_s = time.perf_counter() - started
        if compiled_graphs() != graphs:
            return self._run(prefill_s, decode_s, math.nan, tokens, length, before)
        return self._run(prefill_s, 0.0, decode_s / max(new - 1, 1), tokens, length, before)

    def _run(
        self, prefill_s: float, compile_s: float, step_s: float, tokens: list[list[int]], length: int, before: int
    ) -> Run:
        plan = [length] * self.hf.config.num_hidden_layers
        return Run(prefill_s, compile_s, step_s, tokens, plan, None, peak_bytes(self.model, before))
