"""Chat templates: a conversation as the token ids that a model was trained to continue.

A template is a Jinja program that comes with the weights and writes a conversation as text, the names of special tokens
included. It runs in a process of its own (rendering.py). `load(folder)` takes the first of these that the folder holds:

    chat_template.jinja       the template itself
    tokenizer_config.json     "chat_template": a string, or a list of {"name", "template"}, of which "default" counts
    chat_template.json        {"chat_template": ...}

Where tools are given, "tool_use" of that list counts, or additional_chat_templates/tool_use.jinja beside the first.
Options are what a template reads beside the messages: enable_thinking, reasoning_effort, tools, ... A name that it does
not read is an error.

What a template sees (variables, filters, tags) and the text it gives are those of transformers' `apply_chat_template`,
and so are the ids. The one difference is meant: the name of a special token in a message or an option is text, never
that token. (What the tokenizer's files do not call special, such as "<think>" in Qwen 3, is that token there too.)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from child import Child, Overrun
from errors import UserError, place, shown, visible
from files import read_text
from tokenizer import Tokenizer, read_json, read_settings, special_tokens

# {"role": "system" | "user" | "assistant" | "tool" | ..., "content": ...}, and what a template may know beside these,
# such as reasoning_content and tool_calls.
Message = dict[str, Any]

SECONDS, MIB = 4, 768  # of CPU time and of memory for a rendering

# Two characters that Unicode keeps for a program's own use; they are taken out of all messages.
_SEAM = "\ufdd0"  # within the name of a special token, which it keeps from being parsed
_ANSWER = "\ufdd1"  # stands for the latest answer


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's template and its tokenizer. Every error in rendering is a UserError of one line."""

    source: str
    tokenizer: Tokenizer
    variables: dict[str, str]  # bos_token, eos_token, ... as text
    options: Mapping[str, Any] = field(default_factory=dict)  # unless a call gives others
    tool_source: str | None = None  # the template where tools are given, if it is one of its own
    child: Child = field(default_factory=lambda: Child("rendering:render", SECONDS, MIB))

    def prompt(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a whole conversation, BOS and the beginning of the assistant's answer included."""
        return self._encode(self.render(self._shown(messages), options))

    def next_turn(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """Ids that follow the latest answer, messages[-2]: what ends it, the new message, the next answer's beginning.

        The answer's own ids, without an end-of-sequence token, are before them in the cache as the model gave them, so
        a template that rewrites earlier turns (Qwen 3 takes the thoughts out) rewrites nothing here.
        """
        shown = self._shown(messages)
        assert shown[-2]["role"] == "assistant"
        shown[-2] = {"role": "assistant", "content": _ANSWER}
        text = self.render(shown, options)
        if _ANSWER not in text:
            raise UserError("the chat template does not show earlier answers, so a conversation cannot go on with it")
        return self._encode(text.rpartition(_ANSWER)[2], continues=True)

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template gets them: without what is None, as in transformers, and without markers."""
        return self._seamed([{k: v for k, v in message.items() if v is not None} for message in messages])

    def _seamed(self, value: Any) -> Any:
        """A JSON value with a seam after the first letter of each special token's name in its strings."""
        names = "|".join(map(re.escape, self.tokenizer.special_ids)) or "(?!)"
        first_letter = re.compile(f"(?={names})(.)", re.DOTALL)  # also where names overlap

        def seamed(value: Any) -> Any:
            if isinstance(value, str):
                return first_letter.sub(rf"\1{_SEAM}", re.sub(f"[{_SEAM}{_ANSWER}]", "", value))
            if isinstance(value, Mapping):
                return {seamed(name): seamed(each) for name, each in value.items()}
            return [seamed(each) for each in value] if isinstance(value, (list, tuple)) else value

        return seamed(value)

    def render(self, messages: list[Message] | None, options: Mapping[str, Any] | None = None) -> str:
        """The text of these messages; with None only check the template and the options."""
        options = {**self.options, **(options or {})}
        source = self.tool_source if self.tool_source and options.get("tools") is not None else self.source
        given = {"source": source, "variables": self.variables, "options": self._seamed(options)}
        try:
            answer = self.child.ask(given | {"messages": messages})
        except Overrun as error:
            raise UserError(f"the chat template {error}") from None
        if "unread" in answer:
            reads = ", ".join(answer["reads"]) or "none"
            raise UserError(
                f"the chat template reads no {shown(answer['unread'])}; its options are: {visible(reads)[:200]}"
            )
        if "syntax" in answer:
            raise UserError(f"line {answer['line']} of the chat template: {visible(answer['syntax'])}")
        if "refused" in answer:
            raise UserError(f"the chat template refuses these messages: {visible(answer['refused'])}")
        if "failed" in answer:
            raise UserError(f"the chat template failed: {visible(answer['failed'])}")
        return answer["text"]

    def _encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a rendered text. Between two seams each piece stands alone, so that no name spans a seam."""
        pieces = text.split(_SEAM)
        return [i for n, piece in enumerate(pieces) for i in self._encode_piece(piece, continues or n > 0)]

    def _encode_piece(self, text: str, continues: bool) -> list[int]:
        encode = partial(self.tokenizer.encode, special=False, parse_special=True)
        if continues and self.tokenizer.drops_space:
            # Sentencepiece would put a space before the text, were it not for a line break, which joins with nothing.
            start, ids = encode("\n"), encode("\n" + text)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return encode(text)


class Turns:
    """A conversation so far, and the ids of its next turn: through the chat template, or as it stands."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, system: str | None = None):
        self.tokenizer, self.template = tokenizer, template
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.begun = False

    def ids(self, text: str, rendered: bool = False) -> list[int]:
        """What the user says next, which a chat template may have rendered. Nothing is kept of it before `add`."""
        if rendered:
            if self.template is not None:
                raise UserError("what is rendered already does not go with --chat")
            return self.tokenizer.encode(text, special=False, parse_special=True)
        if self.template is None:
            return self.tokenizer.encode("\n" + text, special=False) if self.begun else self.tokenizer.encode(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        return self.template.next_turn(messages) if self.begun else self.template.prompt(messages)

    def add(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.begun = True


def load(folder: Path, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> ChatTemplate | None:
    """The chat template in `folder`, or None if there is none; UserError if it is broken, or reads no such options."""
    path, source = _find(folder)
    if source is None:
        return None
    named = {"default": source}
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    source, tool_source = named.get("default"), named.get("tool_use")
    if path.suffix == ".jinja" and (other := folder / "additional_chat_templates" / "tool_use.jinja").exists():
        tool_source = read_text(other)
    if not isinstance(source, str) or not isinstance(tool_source, str | None):
        raise UserError(f"{place(path)}: chat_template must be a text or a list with one named 'default'")
    template = ChatTemplate(source, tokenizer, special_tokens(folder), options or {}, tool_source)
    try:
        template.render(None)
    except UserError as error:
        raise UserError(f"{place(path)}: {error}") from None
    return template


def _find(folder: Path) -> tuple[Path, Any]:
    """The file that holds the template, and the template, None if no file does."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path, read_text(path)
    path, source = folder / "tokenizer_config.json", read_settings(folder).get("chat_template")
    if source is None:
        path = folder / "chat_template.json"
        source = read_json(path).get("chat_template")
    return path, source
