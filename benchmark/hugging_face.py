"""transformers on the same weights: its parameters are views of ours."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, StoppingCriteriaList, logging

import checkpoint
from benchmark.race import Run
from bound import compiled_graphs
from engine import Request
from errors import UserError
from model import Transformer
from weights import Quantized


class HuggingFace:
    """Three ways to decode. raw: the config.json of the model."""

    def __init__(self, model: Transformer, raw: dict[str, Any]):
        if any(isinstance(module, Quantized) for module in model.modules()):
            raise UserError("transformers cannot have the same weights: ours are codes of 8 or 4 bits")
        logging.set_verbosity_error()
        self.device = model.device
        with torch.device(self.device):  # its own weights, let go in the next lines; buffers are filled here
            hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=model.config.dtype).eval()
        tensors = checkpoint.to_hf(model.state_dict(), model.config, stacked=True)
        wrong = hf.load_state_dict(tensors, strict=False, assign=True)
        assert not wrong.unexpected_keys, wrong
        hf.tie_weights()
        hf.generation_config.eos_token_id = None
        self.hf = hf
        self.compiled = torch.compile(hf, mode="reduce-overhead" if self.device.type == "cuda" else "default")
        self.caches: dict[tuple[int, int], StaticCache] = {}  # a new one would be compiled for anew

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Run:
        """As a user calls it. Prompts may have any lengths: shorter ones are padded on the left."""
        width, new = max(len(request.ids) for request in requests), max(request.max_new_tokens for request in requests)
        padded = [[0] * (width - len(request.ids)) + request.ids for request in requests]
        mask = [[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in requests]
        first: list[float] = []

        def clock(ids: Tensor, scores: Any) -> Tensor:
            """Called after each token; ends nothing."""
            if not first:
                ids.tolist()  # waits for the device
                first.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        started = time.perf_counter()
        out = self.hf.generate(
            torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            stopping_criteria=StoppingCriteriaList([clock]),
            **dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None),
        )
        tokens = out[:, width:].tolist()  # waits for the device
        return Run(tokens, first[0] - started, (time.perf_counter() - first[0]) / max(new - 1, 1))

    def eager(self, requests: list[Request]) -> Run:
        """The bare loop of forward passes, which never waits for the device, with a growing cache."""
        return self._loop(requests, DynamicCache(config=self.hf.config), self.hf)

    @torch.inference_mode()
    def static(self, requests: list[Request]) -> Run:
        """The same loop with a static cache, which stays between turns, and compiled steps."""
        key = (len(requests), len(requests[0].ids) + requests[0].max_new_tokens)
        if key not in self.caches:
            self.caches = {key: StaticCache(config=self.hf.config, max_cache_len=key[1])}
        self.caches[key].reset()
        return self._loop(requests, self.caches[key], self.compiled)

    @torch.inference_mode()
    def _loop(self, requests: list[Request], cache: Any, forward: Any) -> Run:
        """Of requests that are all alike in length."""
        started, new = time.perf_counter(), requests[0].max_new_tokens
        ids = torch.tensor([request.ids for request in requests], device=self.device)
        positions = torch.arange(ids.shape[1] + new, device=self.device)[None]
        options = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = self.hf(ids, position_ids=positions[:, : ids.shape[1]], **options).logits
        made = [logits[:, -1].argmax(-1, keepdim=True)]
        made[0].tolist()  # waits for the device
        prefill_s, graphs, started = time.perf_counter() - started, compiled_graphs(), time.perf_counter()
        for position in range(ids.shape[1], ids.shape[1] + new - 1):
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(made[-1], position_ids=positions[:, position : position + 1], **options).logits
            made.append(logits[:, -1].argmax(-1, keepdim=True))  # a copy: the next replay overwrites the logits
        tokens = torch.cat(made, dim=1).tolist()
        decode_s = time.perf_counter() - started
        if compiled_graphs() != graphs:
            return Run(tokens, prefill_s, compile_s=decode_s)
        return Run(tokens, prefill_s, decode_s / max(new - 1, 1))
