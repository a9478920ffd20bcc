"""Errors of the API, in OpenAI's form."""

from collections.abc import Mapping

from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # the others are the client's or the server's


class ApiError(Exception):
    """An answer that is an error: its status, one line, the field that is at fault, and a code if OpenAI has one."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)
