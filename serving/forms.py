"""The two calls of the API: from a body to answers, and from answers to the objects that a client gets."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from chat import ChatTemplate
from promptcache import PromptCache
from sampling import Sampling
from serving.bodies import Body, ChatBody, CompletionBody
from serving.conversations import Conversations, Turn, key_of
from serving.errors import ApiError
from serving.watching import Watch
from serving.worker import Answer, Call, Worker
from tokenizer import NONE, TextStream, Tokenizer

NOTHING = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Words:
    """How the checkpoint makes ids of text. template: None if it has none. eos_ids: what ends a text, and a turn."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]
    turn_ids: frozenset[int]


class Form:
    """What the forms have in common. caches: the folder of prompt caches, if there is one."""

    body: ClassVar[type[Body]]
    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    path: ClassVar[str]
    slow: ClassVar[bool] = False  # whether reading even a small body waits for something

    def __init__(self, words: Words, model: str, worker: Worker, kept: Conversations, caches: Path | None):
        self.words, self.model, self.worker, self.kept, self.caches = words, model, worker, kept, caches

    def answers(self, body: Body) -> list[Answer]:
        """The requests of a body. ApiError or UserError for what cannot be made one."""
        raise NotImplementedError

    def answer(self, body: Body, ids: list[int], new: int | None, eos_ids: frozenset[int], **how: Any) -> Answer:
        """how: past, keep and turn."""
        words, past = self.words, how.get("past")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if stops and words.tokenizer is NONE:
            raise ApiError(400, "stop needs a tokenizer, and the checkpoint has none", "stop")
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        before = how.pop("before", None) or [None] * (past.seen if past else 0)
        watch = Watch(words.tokenizer, before) if body.watch else None
        if body.save_cache:
            how["keep"] = "prompt"
        elif watch:
            how["keep"] = "answer"  # which says what is held at the end
        return Answer(
            ids,
            new if new is not None else max(1, self.worker.max_length - len(before) - len(ids)),
            TextStream(words.tokenizer, stops, continues=True),
            body.lane,
            watch,
            sampling=Sampling(float(temperature), body.top_k, float(top_p), body.seed),
            eos_ids=frozenset() if body.ignore_eos else eos_ids,
            **how,
        )

    def past(self, body: Body) -> PromptCache | None:
        """The prompt cache that a body names."""
        for name in ("save_cache", "load_cache"):
            if getattr(body, name) is not None:
                if self.caches is None:
                    raise ApiError(400, "this server keeps no prompt caches (--cache-dir)", name)
                if body.lane is not None:
                    raise ApiError(400, f"{name} is for the server's own cache; it does not go with lane", name)
        if body.load_cache is None:
            return None
        if not (path := self._file(body.load_cache)).exists():
            raise ApiError(400, f"there is no prompt cache {body.load_cache}; save_cache makes one", "load_cache")
        return PromptCache.load(path, self.worker.engine)

    def _file(self, name: str) -> Path:
        return self.caches / f"{name}.safetensors"

    async def finish(self, call: Call, body: Body) -> None:
        """All answers have ended: write or keep what the next calls may go on from. The client learns of it then."""
        if body.save_cache is not None:
            await asyncio.to_thread(call.answers[0].completion.cache.save, self._file(body.save_cache))

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
    cached = sum(answer.request.seen for answer in call.answers)
    prompt = cached + sum(len(answer.request.ids) for answer in call.answers)
    new = sum(answer.tokens for answer in call.answers)
    own = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return own | {"prompt_tokens_details": {"cached_tokens": cached}}


class Completions(Form):
    body, prefix, kind, chunk_kind = CompletionBody, "cmpl", "text_completion", "text_completion"
    path = "/v1/completions"

    def answers(self, body: CompletionBody) -> list[Answer]:
        new, past, asked = 16 if body.max_tokens is None else body.max_tokens, self.past(body), prompts(body.prompt)
        if body.save_cache and len(asked) > 1:
            raise ApiError(400, "save_cache keeps one prompt, so give one", "save_cache")
        return [self.answer(body, self._ids(each, past), new, self.words.eos_ids, past=past) for each in asked]

    def _ids(self, prompt: str | list[int], past: PromptCache | None) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if self.words.tokenizer is NONE:
            raise ApiError(400, "the checkpoint has no tokenizer; give the prompt as token ids", "prompt")
        return self.words.tokenizer.encode(prompt, special=past is None)

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
        for n, message in enumerate(body.messages):
            if message.content is None and not message.tool_calls:
                where = f"messages[{n}].content"
                raise ApiError(400, f"{where} must be a string, not None, in a message without tool_calls", where)
        new = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        messages, options, template = [message.plain for message in body.messages], body.options, self.words.template
        past = self.past(body)
        if past:  # as after an answer that said nothing
            ids = template.next_turn([*NOTHING, *messages], options)
            return [self.answer(body, ids, new, self.words.turn_ids, past=past)]
        own = self.kept.most and body.lane is None
        turn = self.kept.find(messages[:-1], options) if own and messages[-1]["role"] == "user" else None
        keep = "answer" if own else None
        if turn:
            ids = [*turn.unfed, *template.next_turn(messages, options)]
            how = {"past": turn.cache, "before": turn.ids}
            return [self.answer(body, ids, new, self.words.turn_ids, keep=keep, turn=turn, **how)]
        return [self.answer(body, template.prompt(messages, options), new, self.words.turn_ids, keep=keep)]

    async def finish(self, call: Call, body: ChatBody) -> None:
        await super().finish(call, body)
        [answer] = call.answers
        completion, stream = answer.completion, answer.stream
        if body.load_cache is not None or body.save_cache is not None or not (self.kept.most and body.lane is None):
            return
        said = completion.tokens[-1:]
        # A token that ended the answer is not fed: what the next turn begins with closes this one.
        closed = stream.stopped and said[0] in self.words.tokenizer.special_ids.values()
        unfed = [] if closed or completion.finish_reason == "eos" else said
        messages = [message.plain for message in body.messages] + [{"role": "assistant", "content": answer.text}]
        ids = [*(answer.turn.ids if answer.turn else ()), *answer.request.ids, *completion.tokens[:-1]]
        self.kept.keep(Turn(key_of(messages, body.options), completion.cache, unfed, ids), answer.turn)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": REASONS[answer.end.reason]}

    def delta(self, index: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
