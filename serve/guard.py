"""Who may ask, how much and for how long; and what every response carries."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from ray.util import metrics
from starlette.middleware import Middleware

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("shardsight.access")

MOST_BYTES = 64 << 20  # of any request's body
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # Swagger's page, at /docs, styles itself and starts itself.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}
# What a browser loads before anyone can type a key, and what asks whether the server lives.
OPEN = ("/", "/healthz", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready")
OPEN_BELOW = ("/page/", "/viewer/", "/docs/")
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")


class Problem(Exception):
    """What a caller is told, as RFC 9457 has it. more: further members. after: seconds until it is worth trying."""

    def __init__(self, status: int, detail: str, after: int | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.after, self.more = status, detail, after, more

    def body(self, path: str, request: str) -> dict[str, Any]:
        body = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        body |= {"detail": self.detail, "instance": f"urn:request:{request}", **self.more}
        # Where clients of the two protocols look for it.
        if path.startswith("/v2/"):
            body["error"] = self.detail
        elif path.startswith(("/v1/chat/", "/v1/models")):
            body["error"] = {"message": self.detail, "type": "invalid_request_error", "code": self.status}
        return body

    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/problem+json"}
        if self.after is not None:
            headers["retry-after"] = str(self.after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def too_large(most: int) -> Problem:
    return Problem(413, f"at most {most:,} bytes are read")


def fault() -> Problem:
    return Problem(500, "an error that is ours: the log of the server has it, by the request's id")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """ASGI middleware.

    keys: digests of those that may ask; without any, only this machine may. max_bytes: of a request's body. deadline:
    seconds, for the body to come and the answer to go. room: requests that are worked on at once; further ones are
    refused at once, so that nobody waits for what will be too late.
    """

    def __init__(
        self, app: Any, keys: Sequence[bytes], max_bytes: int, deadline: float, room: int, routes: Sequence[str]
    ) -> None:
        self.app, self.keys, self.max_bytes, self.deadline, self.room = app, keys, max_bytes, deadline, room
        self.routes = set(routes)
        self.inside = 0
        tags = ("route", "status")
        self.requests = metrics.Counter("shardsight_requests", "Requests answered", tag_keys=tags)
        self.seconds = metrics.Histogram(
            "shardsight_request_seconds", "From a request's head to its answer's end", LATENCIES, tag_keys=("route",)
        )
        self.waiting = metrics.Gauge("shardsight_requests_inside", "Requests that are worked on")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = _Call(scope, receive, send, self.max_bytes)
        counted = False
        try:
            self._admit(scope, call)
            if scope["method"] == "POST":
                if self.inside >= self.room:
                    raise Problem(429, f"{self.room} requests are worked on already: try again later", after=1)
                counted, self.inside = True, self.inside + 1
                self.waiting.set(self.inside)
            async with asyncio.timeout(self.deadline):
                await self.app(scope, call.receive, call.send)
        except Problem as problem:
            await call.refuse(problem)
        except TimeoutError:
            late = Problem(504, f"no answer within {self.deadline:g} s", after=1)
            slow = Problem(408, f"the request did not arrive within {self.deadline:g} s")
            await call.refuse(late if call.whole else slow)
        except asyncio.CancelledError:  # the client has gone
            call.status = 499
            raise
        except Exception:
            logging.getLogger("shardsight").exception("request %s failed", call.id)
            await call.refuse(fault())
        finally:
            if counted:
                self.inside -= 1
                self.waiting.set(self.inside)
            self._note(scope, call)

    def _admit(self, scope: Scope, call: "_Call") -> None:
        headers = call.headers
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin and urlsplit(origin).netloc != host:
            raise Problem(403, "another site's page may not ask this server")
        path = scope["path"]
        if scope["method"] == "OPTIONS" or path in OPEN or path.startswith(OPEN_BELOW):
            return
        if self.keys:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            # All of them are compared, so that the time tells nothing.
            if not sum(hmac.compare_digest(digest(given), key) for key in self.keys):
                raise Problem(401, "a valid key is missing: send it as 'Authorization: Bearer KEY'")
        elif not _is_here(scope, host):
            raise Problem(401, "this server has no keys and answers its own machine alone: set SHARDSIGHT_API_KEYS")
        if int(headers.get("content-length") or 0) > self.max_bytes:
            raise too_large(self.max_bytes)

    def _note(self, scope: Scope, call: "_Call") -> None:
        route = scope["path"] if scope["path"] in self.routes else "other"
        seconds = time.perf_counter() - call.started
        self.requests.inc(tags={"route": route, "status": str(call.status)})
        self.seconds.observe(seconds, tags={"route": route})
        line = {"request": call.id, "method": scope["method"], "path": scope["path"][:200], "status": call.status}
        line |= {"seconds": round(seconds, 4), "bytes": call.received, "client": (scope.get("client") or ["?"])[0]}
        log.info(json.dumps(line))


LATENCIES = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class _Call:
    """One request, whose body is counted as it comes and whose response gets our headers."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send, self.max_bytes, self.path = receive, send, max_bytes, scope["path"]
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self.started = time.perf_counter()
        self.received, self.status, self.whole = 0, 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.whole = not message.get("more_body")
            if self.received > self.max_bytes:
                raise too_large(self.max_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            ours = HEADERS
            if not self.whole and (int(self.headers.get("content-length") or 0) or "transfer-encoding" in self.headers):
                ours = ours | {"connection": "close"}  # nobody reads what is still to come
            message["headers"] = [*message["headers"], *_raw(ours)]  # Serve's proxy adds the request's id
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Nothing, where the response has begun: its end will be missing, which tells the client."""
        if self.status:
            return
        body = json.dumps(problem.body(self.path, self.id)).encode()
        headers = problem.headers() | {"content-length": str(len(body))}
        start = {"type": "http.response.start", "status": problem.status}
        await self.send(start | {"headers": _raw(headers)})
        await self.send({"type": "http.response.body", "body": body})


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """As ASGI has them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


class Outside:
    """ASGI middleware around Serve's proxy.

    That answers for a Door that has died with nothing at all, and for one that is not there in words of its own: here
    it is a problem as any other. And it reads a body as fast as it comes, however long, until the Door's refusal is
    back: MOST_BYTES is the end.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, received = False, 0
        theirs: int | None = None  # the status of what is not passed on

        async def heard() -> Message:
            nonlocal received, theirs
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                theirs = theirs or 413
                return {"type": "http.disconnect"}
            return message

        async def sent(message: Message) -> None:
            nonlocal started, theirs
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                if message["status"] >= 400 and kind.startswith(b"text/plain"):
                    theirs = theirs or message["status"]
                started = theirs is None
            if theirs is None:
                await send(message)

        await self.app(scope, heard, sent)
        if not started:
            for message in _in_our_words(scope, theirs):
                await send(message)


def _in_our_words(scope: Scope, status: int | None) -> list[Message]:
    if status == 404:
        problem = Problem(404, "nothing is served here")
    elif status == 408:
        problem = Problem(408, "the request did not arrive in time")
    elif status == 413:
        problem = too_large(MOST_BYTES)
    else:
        problem = Problem(503, "the service has just failed, or is starting: try again", after=5)
    asked = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    body = json.dumps(problem.body(scope["path"], asked)).encode()
    headers = HEADERS | problem.headers() | {"content-length": str(len(body)), "x-request-id": asked}
    headers["connection"] = "close"  # there may be more to come, that nobody reads
    head = {"type": "http.response.start", "status": problem.status, "headers": _raw(headers)}
    return [head, {"type": "http.response.body", "body": body}]


def outside() -> list[Middleware]:
    """What Serve's proxies call at their start: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Outside)]


def _is_here(scope: Scope, host: str) -> bool:
    """Whether the caller is on this machine, and means it: a name that a foreign site lets point here does not."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address((scope.get("client") or [""])[0]).is_loopback and (
            name == "localhost" or ipaddress.ip_address(name).is_loopback
        )
    except ValueError:
        return False
