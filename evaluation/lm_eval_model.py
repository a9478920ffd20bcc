"""The engine as a model of EleutherAI's lm-eval, an optional extra: pip install lm_eval.

Contexts are prefilled and cut to the cell's plan; continuations are scored, or generated, through that cache.
"""

from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from evaluation.cells import Batch, Cell
from evaluation.tasks import Row, batches
from model import Transformer
from tokenizer import Tokenizer

MAX_NEW = 256  # of a request that does not say


class EngineLM(TemplateLM):
    """`lm_eval.simple_evaluate(model=EngineLM(...), tasks=[...])`."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        cell: Cell,
        size: int = 16,
        compile: bool = False,
    ):
        super().__init__()
        self.model, self.tokenizer, self.eos_ids, self.cell, self.size = model, tokenizer, eos_ids, cell, size
        self.limit, self.compile = model.config.reach, compile

    @property
    def eot_token_id(self) -> int:
        return min(self.eos_ids, default=0)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string, special=add_special_tokens is not False)

    @torch.inference_mode()
    def loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Of each (texts, context ids, continuation ids): its log-likelihood, and whether greedy decoding gives it."""
        rows = [Row(n, ids[len(more) - self.limit :], more) for n, (_, ids, more) in enumerate(requests)]
        answers: list[Any] = [None] * len(rows)
        for batch in batches(rows, self.size):
            longest = max(len(row.expected) for row in batch)
            ids = torch.tensor([[*row.expected, *[0] * (longest - len(row.expected))] for row in batch])
            prefilled = Batch(self.model, [self.cell], [row.ids for row in batch], longest, self.compile)
            logits = [prefilled.logits, *prefilled.forced(self.cell, ids[:, :-1])]
            scores = torch.stack(logits, dim=1).float().log_softmax(-1).cpu()
            for row, score in zip(batch, scores, strict=True):
                told = torch.tensor(row.expected)
                own = score[: len(told)]
                found = own.gather(1, told[:, None]).sum().item(), bool((own.argmax(-1) == told).all())
                answers[row.number] = found
        return answers

    _loglikelihood_tokens = loglikelihood_tokens  # what lm-eval calls it

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("for perplexity through a small cache run: python evaluate.py --tasks fidelity")

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        settings = [request.args[1] for request in requests]
        news = [setting.get("max_gen_toks", MAX_NEW) for setting in settings]
        for new in set(news):
            own = [n for n, other in enumerate(news) if other == new]
            rows = [Row(n, self.tok_encode(requests[n].args[0])[new - self.limit :], None) for n in own]
            for batch in batches(rows, self.size):
                prefilled = Batch(self.model, [self.cell], [row.ids for row in batch], new, self.compile)
                for row, tokens in zip(batch, prefilled.greedy(self.cell, self.eos_ids), strict=True):
                    text, until = self.tokenizer.decode(tokens), settings[row.number].get("until", [])
                    for stop in [until] if isinstance(until, str) else until:
                        text = text.split(stop)[0] if stop else text
                    answers[row.number] = text
        return answers
