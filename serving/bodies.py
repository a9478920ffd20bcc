"""What a client may send, as pydantic models. They are strict: an unknown field or another type is an error.

What OpenAI knows and this server does not do may only have the value that asks for nothing. Each field's description
ends the sentence "FIELD must be ..."; it is what an error says.
"""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from errors import UserError, cut, shown
from files import parse_json
from serving.errors import ApiError

Lane = Literal["full", "uniform", "squeezed"]
CACHE_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$"
STOPS, STOP_LENGTH = 16, 256  # each token of an answer is compared with all of them
Text = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]


def field(must_be: str, default: Any = None, **limits: Any) -> Any:
    return Field(default, description=must_be, **limits)


def only(value: str) -> Any:
    """A field of which no other value is supported."""
    return Field(None, description=f"{value} or left out: this server supports nothing else")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = field("true or false")
    include_obfuscation: Literal[False] | None = only("false")


class Body(Strict):
    """What both calls have in common."""

    model: str | None = field("the name of the model that /v1/models lists")
    max_tokens: int | None = field("an integer of at least 1", ge=1)
    temperature: float | None = field("a number from 0 to 2", ge=0, le=2)
    top_p: float | None = field("a number above 0 and up to 1", gt=0, le=1)
    top_k: int | None = field("an integer of at least 1", ge=1)
    seed: int | None = field("an integer from 0 to 2**63 - 1", ge=0, le=2**63 - 1)
    stop: Text | Annotated[list[Text], Field(max_length=STOPS)] | None = field(
        f"a string of 1 to {STOP_LENGTH} characters, or a list of at most {STOPS} of them"
    )
    stream: bool | None = field("true or false")
    stream_options: StreamOptions | None = field('an object such as {"include_usage": true}')
    ignore_eos: bool | None = field("true or false")
    lane: Lane | None = field("full, uniform or squeezed")
    watch: bool | None = field("true or false")
    save_cache: str | None = field("a name of up to 100 letters, digits, '.', '_' and '-'", pattern=CACHE_NAME)
    load_cache: str | None = field("a name of up to 100 letters, digits, '.', '_' and '-'", pattern=CACHE_NAME)
    user: str | None = field("a string")
    metadata: dict[str, str] | None = field("an object of strings")
    n: Literal[1] | None = only("1")
    presence_penalty: Zero | None = only("0")
    frequency_penalty: Zero | None = only("0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = only("{}")
    service_tier: Literal["auto", "default"] | None = only("auto")


class CompletionBody(Body):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1)]
    ) = field("a string, a list of token ids, or a list of one of these", ...)
    best_of: Literal[1] | None = only("1")
    echo: Literal[False] | None = only("false")
    logprobs: None = only("null")
    suffix: Literal[""] | None = only("null")


class Part(Strict):
    type: Literal["text"] = field("text: this server takes no other parts", ...)
    text: str = field("a string", ...)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"] = field(
        "system, developer, user, assistant or tool", ...
    )
    content: str | Annotated[list[Part], Field(min_length=1)] | None = field(
        "a string, or a list of parts of type text", ...
    )
    reasoning_content: str | None = field("a string")
    tool_calls: list[dict[str, Any]] | None = field("a list of objects")
    tool_call_id: str | None = field("a string")
    name: str | None = field("a string")
    refusal: None = only("null")
    annotations: Nothing | None = only("[]")
    audio: None = only("null")
    function_call: None = only("null")

    @property
    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        parts = self.content if isinstance(self.content, list) else ()
        content = "".join(part.text for part in parts) if parts else self.content
        more = {name: getattr(self, name) for name in ("reasoning_content", "tool_call_id", "name")}
        more["tool_calls"] = [as_object(call) for call in self.tool_calls or ()]
        return {"role": self.role, "content": content} | {name: value for name, value in more.items() if value}


def as_object(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates are written for; OpenAI has them as JSON text."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with suppress(UserError):
            return call | {"function": function | {"arguments": parse_json(function["arguments"], "")}}
    return call


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1)] = field("a list of messages", ...)
    max_completion_tokens: int | None = field("an integer of at least 1", ge=1)
    logprobs: Literal[False] | None = only("false")
    top_logprobs: Literal[0] | None = only("0")
    chat_template_kwargs: dict[str, Any] | None = field("an object with what the chat template reads")
    tools: Nothing | None = field(
        "[] or left out: this server does not read calls out of an answer (chat_template_kwargs can show it tools)"
    )
    tool_choice: Literal["none", "auto"] | None = only("none")
    parallel_tool_calls: bool | None = field("true or false")
    functions: Nothing | None = only("[]")
    function_call: Literal["none", "auto"] | None = only("none")
    response_format: dict[Literal["type"], Literal["text"]] | None = only('{"type": "text"}')
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = only('["text"]')
    store: Literal[False] | None = only("false")
    audio: None = only("null")
    prediction: None = only("null")
    reasoning_effort: str | None = field("a string")
    verbosity: None = only("null")
    web_search_options: None = only("null")

    @property
    def options(self) -> dict[str, Any]:
        """What the chat template reads beside the messages."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})


def parsed(kind: type[Body], data: bytes) -> Body:
    """The body. ApiError for the first thing that is wrong with it."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refused(kind, error.errors(include_url=False, include_context=False)[0]) from None
    except (ValueError, RecursionError):  # an integer of more digits than Python reads
        raise ApiError(400, "the body cannot be read as JSON") from None


def _refused(kind: type[BaseModel], error: dict[str, Any]) -> ApiError:
    what, path, text, value = error["type"], error["loc"], "", error.get("input")
    if what == "json_invalid":
        return ApiError(400, f"the body is no JSON: {cut(error['msg'])}")
    if not path:
        return ApiError(400, f"the body must be a JSON object, not {shown(value)}")
    must_be = ""
    for place, name in enumerate(path):
        if isinstance(name, int):
            text += f"[{name}]"
        elif known := kind.model_fields.get(name):
            text, must_be, kind = f"{text}.{name}".removeprefix("."), known.description, INSIDE.get(name, Strict)
        elif what == "extra_forbidden" and place == len(path) - 1:
            return ApiError(400, f"unknown field {shown(name)}", f"{text}.{cut(name)}".removeprefix("."))
        else:  # from here on it is about one of several kinds of values, the first one as a rule
            what = "kind" if place == len(path) - 1 else "part"
            break
    if what == "missing":
        return ApiError(400, f"{text} is missing: it must be {must_be}", text)
    value = "" if what == "part" else f", not {shown(value)}"
    return ApiError(400, f"{text} must be {must_be}{value}", text)


INSIDE = {"messages": Message, "stream_options": StreamOptions}
