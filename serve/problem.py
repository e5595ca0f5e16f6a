"""Refusals and failures as RFC 9457, problem details for HTTP APIs, has them."""

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

MAX_BODY_BYTES = 64 << 20  # of any request; Arguments.max_bytes can only be less


class Problem(Exception):
    """A response that is not a success. retry_after: seconds. more: further members of the body."""

    def __init__(
        self,
        status: int,
        detail: str,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        detail = detail.encode(errors="replace").decode()  # lone surrogates, which UTF-8 cannot hold
        super().__init__(detail)
        self.status, self.detail, self.more = status, detail, more
        self.headers = {"content-type": "application/problem+json", **(headers or {})}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def response(self, path: str, request_id: str) -> Response:
        """path: of the request, within the application."""
        body = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        body |= {"detail": self.detail, "instance": f"urn:request:{request_id}", **self.more}
        # Clients of the two protocols read the message from `error`.
        if path.startswith("/v2/"):
            body["error"] = self.detail
        elif path.startswith(("/v1/chat/", "/v1/models")):
            kind = "invalid_request_error" if self.status < 500 else "server_error"
            body["error"] = {"message": self.detail, "type": kind, "param": None, "code": self.status}
        return Response(json.dumps(body), self.status, self.headers)


def too_large(limit: int) -> Problem:
    return Problem(413, f"the body is too large: at most {limit:,} bytes are read")


def server_error() -> Problem:
    return Problem(500, "the server failed; its log has the error under this request's id")
