"""ASGI middleware around the application (Guard), and around Serve's proxy (ProxyProblems).

Guard checks origin, key, size, load and deadline of each request, and gives each response its headers.
"""

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
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from ray.util import metrics
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.arguments import HOST, Arguments
from serve.problem import MAX_BODY_BYTES, Problem, server_error, too_large

log = logging.getLogger("shardsight.access")

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # Swagger UI, at /docs, has inline styles.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}
ANNOTATE = "/v1/annotate"  # takes videos, too
# Served without a key: what a browser loads before a key can be typed in, and health checks.
OPEN = ("/", "/healthz", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready")
OPEN_BELOW = ("/page/", "/viewer/", "/docs/")
LATENCIES = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
ARRIVING = 4  # bodies that may be arriving at once, for each request that may be processed
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")
_EXPOSED = "x-request-id, retry-after, inference-header-content-length"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """Around the application. keys: digests of valid keys; without any, only this machine is served.

    Of `limits` it enforces max_bytes or max_video_bytes, deadline, max_concurrent, allowed_origins and root_path. A
    request counts as processed once its body has arrived, so that slow senders do not block others. routes: of the
    application.
    """

    def __init__(self, app: ASGIApp, limits: Arguments, keys: Sequence[bytes], routes: Sequence[BaseRoute]) -> None:
        self.app, self.limits, self.keys, self.routes = app, limits, keys, routes
        self.paths = {getattr(route, "path", "") for route in routes}
        self.arriving: set[_Call] = set()
        self.processed: set[_Call] = set()
        self.requests = metrics.Counter("shardsight_requests", "Requests answered", tag_keys=("route", "status"))
        self.seconds = metrics.Histogram(
            "shardsight_request_seconds", "From a request's head to its answer's end", LATENCIES, tag_keys=("route",)
        )
        self.waiting = metrics.Gauge("shardsight_requests_inside", "Requests that are processed")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, scope = self._rooted(scope)
        of_video = self.limits.max_video_bytes if path == ANNOTATE else 0
        call = _Call(scope, path, receive, send, max(self.limits.max_bytes, of_video))
        deadline = self.limits.deadline
        try:
            async with asyncio.timeout(deadline):
                await self._answer(scope, call)
        except Problem as problem:
            await call.refuse(problem)
        except TimeoutError:
            late = Problem(504, f"no answer within {deadline:g} s", retry_after=1)
            slow = Problem(408, f"the request did not arrive within {deadline:g} s")
            await call.refuse(late if call.whole else slow)
        except asyncio.CancelledError:
            call.status = 499  # the client has closed the connection
            raise
        except Exception:
            logging.getLogger("shardsight").exception("request %s failed", call.id)
            await call.refuse(server_error())
        finally:
            self.arriving.discard(call)
            self.processed.discard(call)
            self.waiting.set(len(self.processed))
            self._record(call)

    async def _answer(self, scope: Scope, call: "_Call") -> None:
        self._check_origin(call)
        self._check_key(call)
        call.check_body()
        if scope["method"] == "OPTIONS":
            await call.respond(self._options(call))
            return
        if scope["method"] == "POST":
            self._check_load(self.processed, self.limits.max_concurrent)
            self._check_load(self.arriving, ARRIVING * self.limits.max_concurrent)
            self.arriving.add(call)
            call.arrived = self._process
        # HEAD is answered as GET; _Call.send drops the body.
        scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        await self.app(scope, call.receive, call.send)

    def _rooted(self, scope: Scope) -> tuple[str, Scope]:
        """(path within the application, scope with the path that clients see)."""
        root = self.limits.root_path
        path = get_route_path(scope)  # without the route_prefix of Serve's configuration
        if f"{path}/".startswith(f"{root}/"):  # not removed by the proxy in front
            path = path[len(root) :]
        root = root or scope.get("root_path", "")
        return path, {**scope, "root_path": root, "path": root + path}

    def _check_load(self, calls: set["_Call"], limit: int) -> None:
        if len(calls) >= limit:
            raise Problem(429, f"{limit} requests are being processed already: try again later", retry_after=1)

    def _process(self, call: "_Call") -> None:
        """Called once a body has arrived. Raises Problem."""
        self.arriving.discard(call)
        self._check_load(self.processed, self.limits.max_concurrent)
        self.processed.add(call)
        self.waiting.set(len(self.processed))

    def _check_origin(self, call: "_Call") -> None:
        """Raises Problem where a page of another site calls, unless allowed_origins lists the site."""
        host, origin = call.headers.get("host", ""), call.headers.get("origin", "")
        if host and not HOST.fullmatch(host):
            raise Problem(400, f"the Host header {host[:100]!r} is not HOST or HOST:PORT")
        try:
            site = urlsplit(origin).netloc
        except ValueError:
            raise Problem(400, f"the Origin header {origin[:100]!r} is not SCHEME://HOST") from None
        if origin.lower() in self.limits.allowed_origins:
            call.origin = origin
        elif origin and (not site or site.lower() != host.lower()):
            raise Problem(403, "another site's page may not call this server: list the site in allowed_origins")

    def _check_key(self, call: "_Call") -> None:
        """Raises Problem."""
        if call.method == "OPTIONS" or (call.path or "/") in OPEN or call.path.startswith(OPEN_BELOW):
            return
        if self.keys:
            scheme, _, key = call.headers.get("authorization", "").partition(" ")
            key = key.strip() if scheme.lower() == "bearer" else call.headers.get("x-api-key", "")
            # Compared with all keys, so that the time taken does not tell which one matched.
            if not sum(hmac.compare_digest(digest(key), valid) for valid in self.keys):
                raise Problem(401, "a valid key is missing: send it as 'Authorization: Bearer KEY'")
        elif not _is_local(call.client, call.headers.get("host", "")):
            raise Problem(401, "this server has no keys and answers its own machine alone: set SHARDSIGHT_API_KEYS")

    def _options(self, call: "_Call") -> Response:
        """What may be asked of a path, also by pages of an allowed site (CORS preflight). Raises Problem."""
        matching = [route for route in self.routes if route.matches(call.scope)[0] != Match.NONE]
        if not matching and call.path != "*":
            raise Problem(404, "nothing is served here")
        methods = {method for route in matching for method in getattr(route, "methods", None) or ("GET",)}
        methods |= {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
        allowed = ", ".join(sorted(methods))
        if call.origin is None or "access-control-request-method" not in call.headers:
            return Response(status_code=204, headers={"allow": allowed})
        headers = {"access-control-allow-methods": allowed, "access-control-max-age": "600"}
        if asked := call.headers.get("access-control-request-headers"):
            headers["access-control-allow-headers"] = asked
        return Response(status_code=204, headers=headers)

    def _record(self, call: "_Call") -> None:
        route = call.path if call.path in self.paths else "other"
        seconds = time.perf_counter() - call.started
        self.requests.inc(tags={"route": route, "status": str(call.status)})
        self.seconds.observe(seconds, tags={"route": route})
        line = {"request": call.id, "method": call.method, "path": call.path[:200], "status": call.status}
        log.info(json.dumps(line | {"seconds": round(seconds, 4), "bytes": call.received, "client": call.client}))


class _Call:
    """One request: counts and unpacks its body as it arrives, and adds our headers to its response.

    arrived: called once the body has arrived. whole: whether it has. origin: the allowed site whose page calls.
    """

    def __init__(self, scope: Scope, path: str, receive: Receive, send: Send, max_bytes: int) -> None:
        self.scope, self.path, self._receive, self._send, self.max_bytes = scope, path, receive, send, max_bytes
        self.method, self.headers = scope["method"], Headers(scope=scope)
        self.client = (scope.get("client") or ["?"])[0]
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self.started = time.perf_counter()
        self.received, self.status, self.whole = 0, 0, False
        self.origin: str | None = None
        self.unpack: _Unpacker | None = None
        self.arrived: Callable[[_Call], None] = lambda call: None

    def check_body(self) -> None:
        """By the headers Content-Length and Content-Encoding. Raises Problem."""
        length = self.headers.get("content-length", "0")
        if not re.fullmatch("[0-9]+", length):
            raise Problem(400, f"the Content-Length header {length[:100]!r} is not a number of bytes")
        if len(length) > 18 or int(length) > self.max_bytes:
            raise too_large(self.max_bytes)
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate"):
            self.unpack = _Unpacker(self.max_bytes)
        elif coding not in ("", "identity"):
            raise Problem(
                415,
                f"the Content-Encoding {coding[:40]!r} is not supported: send the body plain, or with gzip or deflate",
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
            MutableHeaders(scope=message).update(HEADERS | self._own_headers())  # Serve's proxy adds x-request-id
        elif self.method == "HEAD" and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    def _own_headers(self) -> dict[str, str]:
        headers = {}
        if not self.whole and (self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers):
            headers["connection"] = "close"  # the rest of the body will not be read
        if self.origin is not None:
            headers |= {"access-control-allow-origin": self.origin, "vary": "origin"}
            headers |= {"access-control-expose-headers": _EXPOSED, "cross-origin-resource-policy": "cross-origin"}
        return headers

    async def respond(self, response: Response) -> None:
        await response(self.scope, self.receive, self.send)

    async def refuse(self, problem: Problem) -> None:
        """Once a response has begun, its missing end is what tells the client."""
        if not self.status:
            await self.respond(problem.response(self.path, self.id))


class _Unpacker:
    """Unpacks a body of gzip or deflate as it arrives, up to `limit` bytes. Raises Problem."""

    def __init__(self, limit: int) -> None:
        self.limit, self.unpacked = limit, 0
        self.stream = self._stream()

    def __call__(self, data: bytes, more: bool) -> bytes:
        found = b""
        try:
            while data:
                if self.stream.eof:  # gzip allows several members, one after the other
                    self.stream = self._stream()
                part = self.stream.decompress(data, self.limit - self.unpacked + 1)
                self.unpacked += len(part)
                if self.unpacked > self.limit:
                    raise too_large(self.limit)
                found, data = found + part, self.stream.unused_data
        except zlib.error:
            raise Problem(400, "the body is not packed as its Content-Encoding header says") from None
        if not more and not self.stream.eof:
            raise Problem(400, "the packed body ends too early")
        return found

    @staticmethod
    def _stream() -> Any:
        return zlib.decompressobj(32 + zlib.MAX_WBITS)  # recognises either header


class ProxyProblems:
    """ASGI middleware around Serve's proxy.

    Where a replica of the Gateway is dead or missing, the proxy answers with nothing, or with plain text: clients get
    a Problem instead. The proxy reads a body of any length before it passes the Gateway's refusal on: here it ends at
    MAX_BODY_BYTES. It fails at headers that are not UTF-8: they are dropped.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["headers"] = [header for header in scope["headers"] if all(map(_is_utf8, header))]
        started, received = False, 0
        replaced: int | None = None  # status of the proxy's own answer, which is not passed on

        async def counted() -> Message:
            nonlocal received, replaced
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                replaced = replaced or 413
                return {"type": "http.disconnect"}
            return message

        async def passed_on(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                from_gateway = "x-frame-options" in Headers(raw=message["headers"])
                if message["status"] >= 400 and not from_gateway:
                    replaced = replaced or message["status"]
                started = replaced is None
            if replaced is None:
                await send(message)

        await self.app(scope, counted, passed_on)
        if not started:
            request_id = Headers(scope=scope).get("x-request-id", "")
            response = _proxy_problem(replaced).response(scope["path"], request_id)
            # The connection is closed, as there may be more of a body that is not read.
            response.headers.update(HEADERS | {"x-request-id": request_id, "connection": "close"})
            await response(scope, receive, send)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _proxy_problem(status: int | None) -> Problem:
    if status == 413:
        return too_large(MAX_BODY_BYTES)
    details = {404: "nothing is served here", 408: "the request did not arrive in time"}
    if status in details:
        return Problem(status, details[status])
    return Problem(503, "the service has failed, or is starting: try again", retry_after=5)


def proxy_middleware() -> list[Middleware]:
    """Called by Serve's proxies when they start: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it."""
    return [Middleware(ProxyProblems)]


def _is_local(client: str, host: str) -> bool:
    """Whether the client is on this machine and asks for it by a local name (another site's name may resolve to it)."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return ipaddress.ip_address(client).is_loopback and (
            name == "localhost" or ipaddress.ip_address(name).is_loopback
        )
    except ValueError:
        return False
