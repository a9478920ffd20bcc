"""Chat templates: a conversation as the token ids that a model was trained to continue.

A template is a Jinja program that comes with the weights and writes a conversation as text, the names of special tokens
included. `load(folder)` takes the first of these that the folder holds:

    chat_template.jinja       the template itself
    tokenizer_config.json     "chat_template": a string, or a list of {"name", "template"}, of which "default" counts
    chat_template.json        {"chat_template": ...}

What a template sees (variables, filters, tags) and the text it gives are those of transformers' `apply_chat_template`,
and so are the ids. The one difference is meant: the name of a special token in a message is text, never that token.
(What the tokenizer's files do not call special, such as "<think>" in Qwen 3, is that token in a message too.)
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from errors import UserError
from tokenizer import Tokenizer, broken, read_json, read_settings, special_tokens

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

# Two characters that Unicode keeps for a program's own use; they are taken out of all messages.
_SEAM = "\ufdd0"  # within the name of a special token, which it keeps from being parsed
_ANSWER = "\ufdd1"  # stands for the latest answer


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's template and its tokenizer. Every error in rendering is a UserError of one line."""

    template: jinja2.Template
    tokenizer: Tokenizer
    variables: dict[str, str]  # bos_token, eos_token, ... as text

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a whole conversation, BOS and the beginning of the assistant's answer included."""
        return self._encode(self._render(self._shown(messages)))

    def next_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids that follow the latest answer, messages[-2]: what ends it, the new message, the next answer's beginning.

        The answer's own ids, without an end-of-sequence token, are before them in the cache as the model gave them, so
        a template that rewrites earlier turns (Qwen 3 takes the thoughts out) rewrites nothing here.
        """
        shown = self._shown(messages)
        assert shown[-2]["role"] == "assistant"
        shown[-2]["content"] = _ANSWER
        text = self._render(shown)
        if _ANSWER not in text:
            raise UserError("the chat template does not show earlier answers, so a conversation cannot go on with it")
        return self._encode(text.rpartition(_ANSWER)[2], continues=True)

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template gets them: a seam after the first letter of each special token's name."""
        names = "|".join(map(re.escape, self.tokenizer.special_ids)) or "(?!)"
        first_letter = re.compile(f"(?={names})(.)", re.DOTALL)  # also where names overlap
        plain = [message | {"content": re.sub(f"[{_SEAM}{_ANSWER}]", "", message["content"])} for message in messages]
        return [message | {"content": first_letter.sub(rf"\1{_SEAM}", message["content"])} for message in plain]

    def _render(self, messages: list[Message]) -> str:
        try:
            return self.template.render(
                self.variables, messages=messages, add_generation_prompt=True, tools=None, documents=None
            )
        except _Refused as error:
            raise UserError(f"the chat template refuses these messages: {_line(error)}") from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise UserError(f"the chat template failed: {type(error).__name__}: {_line(error)}") from None

    def _encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a rendered text. Between two seams each piece stands alone, so that no name spans a seam."""
        pieces = text.split(_SEAM)
        return [i for n, piece in enumerate(pieces) for i in self._encode_piece(piece, continues or n > 0)]

    def _encode_piece(self, text: str, continues: bool) -> list[int]:
        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text, special=False, parse_special=True)

        if continues and self.tokenizer.drops_space:
            # Sentencepiece would put a space before the text, were it not for a line break, which joins with nothing.
            start, ids = encode("\n"), encode("\n" + text)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return encode(text)


def load(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template in `folder`, or None if there is none; UserError if it is broken."""
    path, source = _find(folder)
    if source is None:
        return None
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise UserError(f"{path}: chat_template must be a text or a list with one named 'default'")
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{path}: line {error.lineno} of the chat template: {_line(error)}") from None
    return ChatTemplate(template, tokenizer, special_tokens(folder))


def _find(folder: Path) -> tuple[Path, Any]:
    """The file that holds the template, and the template, None if no file does."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise broken(path, error) from None
    path, source = folder / "tokenizer_config.json", read_settings(folder).get("chat_template")
    if source is None:
        path = folder / "chat_template.json"
        source = read_json(path).get("chat_template")
    return path, source


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: transformers 5.23, utils/chat_template_utils.py."""
    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now, "namespace": _Namespace}
    return environment


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks an answer for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without names like __call__, with which a template could get around the sandbox."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no place for the name {name!r}")
        super().__setitem__(name, value)


class _Refused(Exception):
    """What a template says in raise_exception."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
