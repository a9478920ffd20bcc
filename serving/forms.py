"""The two calls of the API: from a body to answers, and from answers to the objects that a client gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import uuid4

from chat import ChatTemplate
from sampling import Sampling
from serving.bodies import Body, ChatBody, CompletionBody
from serving.errors import ApiError
from serving.worker import Answer, Call
from tokenizer import NONE, TextStream, Tokenizer

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Words:
    """How the checkpoint makes ids of text. template: None if it has none. eos_ids: what ends a text, and a turn."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]
    turn_ids: frozenset[int]


class Form:
    """What the forms have in common. Usage and choices are those of a call that has ended."""

    body: ClassVar[type[Body]]
    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    path: ClassVar[str]
    slow: ClassVar[bool] = False  # whether reading even a small body waits for something

    def __init__(self, words: Words, model: str, max_length: int):
        self.words, self.model, self.max_length = words, model, max_length

    def answers(self, body: Body) -> list[Answer]:
        """The requests of a body. ApiError or UserError for what cannot be made one."""
        raise NotImplementedError

    def answer(self, body: Body, ids: list[int], new: int | None, eos_ids: frozenset[int]) -> Answer:
        words = self.words
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if stops and words.tokenizer is NONE:
            raise ApiError(400, "stop needs a tokenizer, and the checkpoint has none", "stop")
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        return Answer(
            ids,
            new if new is not None else max(1, self.max_length - len(ids)),
            TextStream(words.tokenizer, stops, continues=True),
            body.lane,
            sampling=Sampling(float(temperature), body.top_k, float(top_p), body.seed),
            eos_ids=frozenset() if body.ignore_eos else eos_ids,
        )

    def head(self, created: int, chunk: bool) -> dict[str, Any]:
        kind = self.chunk_kind if chunk else self.kind
        return {"id": f"{self.prefix}-{uuid4().hex}", "object": kind, "created": created, "model": self.model}

    def whole(self, call: Call, created: int) -> dict[str, Any]:
        choices = [self.choice(index, answer) for index, answer in enumerate(call.answers)]
        return self.head(created, False) | {"choices": choices, "usage": usage(call)}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, index: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
        """A choice of a chunk."""
        raise NotImplementedError


def usage(call: Call) -> dict[str, Any]:
    prompt = sum(len(answer.request.ids) for answer in call.answers)
    new = sum(answer.tokens for answer in call.answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Completions(Form):
    body, prefix, kind, chunk_kind = CompletionBody, "cmpl", "text_completion", "text_completion"
    path = "/v1/completions"

    def answers(self, body: CompletionBody) -> list[Answer]:
        new = 16 if body.max_tokens is None else body.max_tokens
        return [self.answer(body, self._ids(each), new, self.words.eos_ids) for each in prompts(body.prompt)]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if self.words.tokenizer is NONE:
            raise ApiError(400, "the checkpoint has no tokenizer; give the prompt as token ids", "prompt")
        return self.words.tokenizer.encode(prompt)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self.delta(index, answer.text, REASONS[answer.end.reason], False)

    def delta(self, index: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def prompts(prompt: str | list) -> Sequence[str | list[int]]:
    """One for each choice."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


class Chat(Form):
    body, prefix, kind, chunk_kind = ChatBody, "chatcmpl", "chat.completion", "chat.completion.chunk"
    path, slow = "/v1/chat/completions", True  # the template runs in a process of its own

    def answers(self, body: ChatBody) -> list[Answer]:
        if self.words.template is None:
            raise ApiError(400, f"{self.model} has no chat template; use /v1/completions", "messages")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise ApiError(400, "give one of max_tokens and max_completion_tokens", "max_tokens")
        new = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        ids = self.words.template.prompt([message.plain for message in body.messages])
        return [self.answer(body, ids, new, self.words.turn_ids)]

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": REASONS[answer.end.reason]}

    def delta(self, index: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
