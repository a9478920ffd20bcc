"""The OpenAPI document, made from the models that check the bodies."""

from collections.abc import Iterable
from typing import Any

from serving.forms import Form

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSALS = {
    "400": "what cannot run, or is not supported",
    "401": "a wrong API key",
    "404": "another model",
    "408": "a body that comes too slowly",
    "413": "a body that is too large",
    "415": "a body that is no JSON",
    "429": "too many requests wait",
    "500": "a failure of the server",
    "503": "the server is shutting down",
    "504": "a time-out",
}
OTHERS = {
    "/v1/models": "the model",
    "/health": "whether requests are taken, and how many run and wait",
    "/metrics": "metrics for Prometheus",
}


def openapi(model: str, forms: Iterable[Form]) -> dict[str, Any]:
    schemas, paths = {"Error": ERROR}, {}
    for form in forms:
        name = form.body.__name__
        own = form.body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= own.pop("$defs", {})
        own["properties"]["model"] = {"anyOf": [{"enum": [model]}, {"type": "null"}], "default": None}
        schemas[name] = own
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        paths[form.path] = {
            "post": {
                "summary": f"{form.kind}, whole or as server-sent events",
                "requestBody": {"required": True, "content": body},
                "responses": {"200": answers(form)} | {status: refused(why) for status, why in REFUSALS.items()},
            }
        }
    for path, what in OTHERS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        paths[path] = {"get": {"summary": what, "responses": {"200": {"description": what, "content": {kind: {}}}}}}
    info = {"title": "squeeze-fast", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def answers(form: Form) -> dict[str, Any]:
    """What a call that succeeds gets."""
    whole = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "object": {"const": form.kind},
            "choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}},
            "usage": {"type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"]},
        },
    }
    return {"description": "the answer", "content": {"application/json": {"schema": whole}, "text/event-stream": {}}}


def refused(why: str) -> dict[str, Any]:
    return {"description": why, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
