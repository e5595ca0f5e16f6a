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
import zlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from ray.util import metrics
from starlette._utils import get_route_path
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Match

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
LATENCIES = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
# Bodies that may be arriving at once, for each request that may be processed.
ARRIVING = 4
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-z:.%]+\])(:\d{1,5})?", re.IGNORECASE | re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)
_EXPOSED = "x-request-id, retry-after, inference-header-content-length"


class Problem(Exception):
    """What a caller is told, as RFC 9457 has it.

    after: seconds until it is worth trying again. headers: of the response. more: further members of the body.
    """

    def __init__(
        self, status: int, detail: str, after: int | None = None, headers: dict[str, str] | None = None, **more: Any
    ) -> None:
        detail = detail.encode(errors="replace").decode()  # of half characters, which JSON cannot hold
        super().__init__(detail)
        self.status, self.detail, self.after, self.more = status, detail, after, more
        self.own = headers or {}

    def body(self, path: str, request: str) -> dict[str, Any]:
        body = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        body |= {"detail": self.detail, "instance": f"urn:request:{request}", **self.more}
        # Where clients of the two protocols look for it.
        if path.startswith("/v2/"):
            body["error"] = self.detail
        elif path.startswith(("/v1/chat/", "/v1/models")):
            kind = "invalid_request_error" if self.status < 500 else "server_error"
            body["error"] = {"message": self.detail, "type": kind, "param": None, "code": self.status}
        return body

    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/problem+json", **self.own}
        if self.after is not None:
            headers["retry-after"] = str(self.after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def too_large(most: int) -> Problem:
    return Problem(413, f"at most {most:,} bytes are read")


def server_error() -> Problem:
    return Problem(500, "an error of this server's own: its log has it, by the request's id")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """ASGI middleware.

    keys: digests of those that may ask; without any, only this machine may. max_bytes: of a request's body, also when
    it is unpacked. deadline: seconds for the body to arrive and the answer to be sent. max_concurrent: requests
    processed at once; further ones are refused immediately rather than answered too late. A request counts once its
    body has arrived, so that slow senders hold up nobody. routes: of the application. allowed_origins: sites besides
    this server's own whose pages may call it. root_path: path below which a proxy publishes it, and which it may have
    removed.
    """

    def __init__(
        self,
        app: Any,
        keys: Sequence[bytes],
        max_bytes: int,
        deadline: float,
        max_concurrent: int,
        routes: Sequence[BaseRoute] = (),
        allowed_origins: Sequence[str] = (),
        root_path: str = "",
    ) -> None:
        self.app, self.keys, self.max_bytes, self.deadline = app, keys, max_bytes, deadline
        self.max_concurrent, self.allowed_origins, self.root_path = max_concurrent, set(allowed_origins), root_path
        self.routes = routes
        self.paths = {getattr(route, "path", "") for route in routes}
        self.arriving: set[_Call] = set()
        self.processed: set[_Call] = set()
        tags = ("route", "status")
        self.requests = metrics.Counter("shardsight_requests", "Requests answered", tag_keys=tags)
        self.seconds = metrics.Histogram(
            "shardsight_request_seconds", "From a request's head to its answer's end", LATENCIES, tag_keys=("route",)
        )
        self.waiting = metrics.Gauge("shardsight_requests_inside", "Requests that are processed")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, scope = self._rooted(scope)
        call = _Call(scope, path, receive, send, self.max_bytes)
        try:
            async with asyncio.timeout(self.deadline):
                await self._answer(scope, call)
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
            await call.refuse(server_error())
        finally:
            self.arriving.discard(call)
            self.processed.discard(call)
            self.waiting.set(len(self.processed))
            self._record(scope, call)

    async def _answer(self, scope: Scope, call: "_Call") -> None:
        self._check_origin(call)
        self._check_caller(scope, call)
        call.check_body()
        if scope["method"] == "OPTIONS":
            await call.answer(204, self._options(scope, call))
            return
        if scope["method"] == "POST":
            self._check_load(self.processed, self.max_concurrent)
            self._check_load(self.arriving, ARRIVING * self.max_concurrent)
            self.arriving.add(call)
            call.arrived = self._process
        # As GET: what a body would be is left out in sending.
        scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        await self.app(scope, call.receive, call.send)

    def _rooted(self, scope: Scope) -> tuple[str, Scope]:
        """The path that the application knows, and the scope with the path that callers know."""
        path = get_route_path(scope)  # without the route_prefix of Serve's configuration
        root = self.root_path or scope.get("root_path", "")
        if f"{path}/".startswith(f"{self.root_path}/"):  # the proxy in front has left it there
            path = path[len(self.root_path) :]
        return path, {**scope, "root_path": root, "path": root + path}

    def _check_load(self, calls: set["_Call"], most: int) -> None:
        if len(calls) >= most:
            raise Problem(429, f"{most} requests are being processed already: try again later", after=1)

    def _process(self, call: "_Call") -> None:
        """Called once a body has arrived. Raises Problem."""
        self.arriving.discard(call)
        self._check_load(self.processed, self.max_concurrent)
        self.processed.add(call)
        self.waiting.set(len(self.processed))

    def _check_origin(self, call: "_Call") -> None:
        """Raises Problem, unless a page of this server or of an allowed site asks, or no page at all."""
        host, origin = call.headers.get("host", ""), call.headers.get("origin", "")
        if host and not _HOST.fullmatch(host):
            raise Problem(400, f"the Host header {host[:100]!r} is not HOST or HOST:PORT")
        if not origin:
            return
        try:
            site = urlsplit(origin).netloc
        except ValueError:
            raise Problem(400, f"the Origin header {origin[:100]!r} is not SCHEME://HOST") from None
        if origin.lower() in self.allowed_origins:
            call.origin = origin
        elif not site or site.lower() != host.lower():
            raise Problem(403, "another site's page may not call this server: list the site in allowed_origins")

    def _check_caller(self, scope: Scope, call: "_Call") -> None:
        headers, path = call.headers, call.path
        if scope["method"] == "OPTIONS" or (path or "/") in OPEN or path.startswith(OPEN_BELOW):
            return
        if self.keys:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            # All of them are compared, so that the time tells nothing.
            if not sum(hmac.compare_digest(digest(given), key) for key in self.keys):
                raise Problem(401, "a valid key is missing: send it as 'Authorization: Bearer KEY'")
        elif not _is_here(scope, headers.get("host", "")):
            raise Problem(401, "this server has no keys and answers its own machine alone: set SHARDSIGHT_API_KEYS")

    def _options(self, scope: Scope, call: "_Call") -> dict[str, str]:
        """Headers that say what may be asked of a path, also by an allowed site's pages (CORS). Raises Problem."""
        matching = [route for route in self.routes if route.matches(scope)[0] != Match.NONE]
        if not matching and call.path != "*":
            raise Problem(404, "nothing is served here")
        methods = {method for route in matching for method in getattr(route, "methods", None) or ("GET",)}
        methods |= {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
        allowed = ", ".join(sorted(methods))
        if call.origin is None or "access-control-request-method" not in call.headers:
            return {"allow": allowed}
        asked = call.headers.get("access-control-request-headers", "")
        headers = {"access-control-allow-methods": allowed, "access-control-max-age": "600"}
        return headers | ({"access-control-allow-headers": asked} if asked else {})

    def _record(self, scope: Scope, call: "_Call") -> None:
        route = call.path if call.path in self.paths else "other"
        seconds = time.perf_counter() - call.started
        self.requests.inc(tags={"route": route, "status": str(call.status)})
        self.seconds.observe(seconds, tags={"route": route})
        line = {"request": call.id, "method": scope["method"], "path": call.path[:200], "status": call.status}
        line |= {"seconds": round(seconds, 4), "bytes": call.received, "client": (scope.get("client") or ["?"])[0]}
        log.info(json.dumps(line))


class _Call:
    """One request, whose body is counted and unpacked as it comes and whose response gets our headers.

    arrived: to be called once the body is there. origin: the allowed site whose page asks, if one does. whole: the body
    has arrived.
    """

    def __init__(self, scope: Scope, path: str, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send, self.max_bytes, self.path = receive, send, max_bytes, path
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self.started = time.perf_counter()
        self.received, self.status, self.whole = 0, 0, False
        self.without_body = scope["method"] == "HEAD"
        self.origin: str | None = None
        self.unpack: _Unpacker | None = None
        self.arrived: Callable[[_Call], None] = lambda call: None

    def check_body(self) -> None:
        """By what the headers announce of it. Raises Problem."""
        length = self.headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal():
            raise Problem(400, f"the Content-Length header {length[:100]!r} is not a number of bytes")
        if not _LENGTH.fullmatch(length) or int(length) > self.max_bytes:
            raise too_large(self.max_bytes)
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate"):
            self.unpack = _Unpacker(self.max_bytes)
        elif coding not in ("", "identity"):
            raise Problem(
                415,
                f"a body packed with {coding[:40]!r} is not read: send it as it is, or with gzip or deflate",
                headers={"accept-encoding": "gzip, deflate"},
            )

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            body, more = message.get("body", b""), bool(message.get("more_body"))
            self.received += len(body)
            if self.received > self.max_bytes:
                raise too_large(self.max_bytes)
            if self.unpack:
                message = {**message, "body": self.unpack(body, more)}
            if not more and not self.whole:
                self.whole = True
                self.arrived(self)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            # Serve's proxy adds the request's id.
            message["headers"] = [*message["headers"], *_raw(HEADERS | self._own_headers())]
        elif self.without_body and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    def _own_headers(self) -> dict[str, str]:
        headers = {}
        if not self.whole and (self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers):
            headers["connection"] = "close"  # nobody reads what is still to come
        if self.origin is not None:
            headers |= {"access-control-allow-origin": self.origin, "vary": "origin"}
            headers |= {"access-control-expose-headers": _EXPOSED, "cross-origin-resource-policy": "cross-origin"}
        return headers

    async def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": _raw(headers)})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, problem: Problem) -> None:
        """Nothing, where the response has begun: its end will be missing, which tells the client."""
        if self.status:
            return
        body = json.dumps(problem.body(self.path, self.id)).encode()
        await self.answer(problem.status, problem.headers() | {"content-length": str(len(body))}, body)


class _Unpacker:
    """Unpacks a body of gzip or deflate as it comes, of at most so many bytes. Raises Problem."""

    def __init__(self, most: int) -> None:
        self.most, self.unpacked = most, 0
        self.stream = self._stream()

    def __call__(self, data: bytes, more: bool) -> bytes:
        found = b""
        try:
            while data:
                if self.stream.eof:  # of one of several that are joined
                    self.stream = self._stream()
                part = self.stream.decompress(data, self.most - self.unpacked + 1)
                self.unpacked += len(part)
                if self.unpacked > self.most:
                    raise too_large(self.most)
                found, data = found + part, self.stream.unused_data
        except zlib.error:
            raise Problem(400, "the body is not packed as its Content-Encoding header says") from None
        if not more and not self.stream.eof:
            raise Problem(400, "the packed body ends too early")
        return found

    @staticmethod
    def _stream() -> Any:
        return zlib.decompressobj(32 + zlib.MAX_WBITS)  # either header


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """As ASGI has them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


class ProxyProblems:
    """ASGI middleware around Serve's proxy, which does some things that callers are not to meet.

    It answers with nothing at all for a Gateway that has died, and in words of its own for one that is not there: here
    it is a problem as any other. It reads a body as fast as it comes, however long, until the Gateway's refusal is
    back: MOST_BYTES is the end. It fails at headers that are not UTF-8: they are left out.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["headers"] = [header for header in scope["headers"] if all(map(_is_utf8, header))]
        started, received = False, 0
        theirs: int | None = None  # the status of what is not passed on

        async def counted() -> Message:
            nonlocal received, theirs
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                theirs = theirs or 413
                return {"type": "http.disconnect"}
            return message

        async def passed_on(message: Message) -> None:
            nonlocal started, theirs
            if message["type"] == "http.response.start":
                ours = any(name.lower() == b"x-frame-options" for name, _ in message["headers"])
                if message["status"] >= 400 and not ours:
                    theirs = theirs or message["status"]
                started = theirs is None
            if theirs is None:
                await send(message)

        await self.app(scope, counted, passed_on)
        if not started:
            for message in _in_our_words(scope, theirs):
                await send(message)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


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


def proxy_middleware() -> list[Middleware]:
    """What Serve's proxies call at their start: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(ProxyProblems)]


def _is_here(scope: Scope, host: str) -> bool:
    """Whether the caller is on this machine, and means it: a name that a foreign site lets point here does not."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return ipaddress.ip_address((scope.get("client") or [""])[0]).is_loopback and (
            name == "localhost" or ipaddress.ip_address(name).is_loopback
        )
    except ValueError:
        return False
