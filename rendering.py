"""Jinja as chat templates expect it. A template is a program from elsewhere, so this runs in a child (child.py)."""

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MOST_BYTES = 50 << 20  # of a rendered conversation
_SET = {"messages", "add_generation_prompt"}  # what no option may set
_compiled: dict[str, tuple[jinja2.Template, set[str]]] = {}  # the latest one, and the options that it reads


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Render `messages` with the template `source`, the `variables` and the `options`.

    If messages is None, only compile the template and check the options. The answer has one of: text; refused, in the
    template's own words; failed; unread, the name of an option, with the names that the template reads; and syntax with
    its line, for a source that is no template.
    """
    try:
        source, options = request["source"], request["options"]
        if source not in _compiled:
            _compiled.clear()
            environment = _environment()
            reads = jinja2.meta.find_undeclared_variables(environment.parse(source)) - _SET
            _compiled[source] = environment.from_string(source), reads
        template, reads = _compiled[source]
        if unread := options.keys() - reads:
            return {"unread": min(unread), "reads": sorted(reads - request["variables"].keys())}
        if request["messages"] is None:
            return {"text": ""}
        messages = [_with_reasoning(message) for message in request["messages"]]
        shown = {"tools": None, "documents": None} | request["variables"] | options
        text = template.render(shown, messages=messages, add_generation_prompt=True)
        if len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
            return {"failed": f"it makes more than {MOST_BYTES >> 20} MB of text"}
        return {"text": text}
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": _line(error), "line": error.lineno}
    except _Refused as error:
        return {"refused": _line(error)}
    except MemoryError:
        return {"failed": "it takes too much memory"}
    except Exception as error:  # a template is a program: it may fail in any way
        return {"failed": f"{type(error).__name__}: {_line(error)}"}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """As transformers does it: what was thought, under both names that templates read it by."""
    names = ("reasoning_content", "thinking", "reasoning")
    thought = next((message[name] for name in names if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}


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
    return " ".join(str(error)[:2000].split())[:300]
