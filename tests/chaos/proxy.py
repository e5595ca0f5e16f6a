"""A proxy before an S3 server that fails some requests in the ways that a busy store does, or is slow."""

import http.client
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>'
FAULTS = ("slow down", "reset before", "reset after", "cut short")


class Proxy(ThreadingHTTPServer):
    """share: of requests that fail, each in one of FAULTS, drawn from `seed`. delays: seconds that requests of a method
    take more. counts: what happened."""

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int, delays: dict[str, float]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.random = urlsplit(target).netloc, share, random.Random(seed)
        self.counts, self.delays = Counter[str](), delays
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that we reset is no news."""


@contextmanager
def proxy(target: str, share: float = 0.0, seed: int = 0, delays: dict[str, float] | None = None) -> Iterator[Proxy]:
    server = Proxy(target, share, seed, delays or {})
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        """Quiet: the counts say what happened."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.delays.get(self.command, 0.0))
        fault = self.server.random.choice(FAULTS) if self.server.random.random() < self.server.share else "none"
        self.server.counts[fault] += 1
        if fault == "slow down":
            self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if fault == "reset before":
            self.reset()
            return
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            # The client signed the proxy's name, which the headers still carry.
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            content = response.read()
        finally:
            upstream.close()
        if fault == "reset after":
            self.reset()
            return
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _OURS]
        if self.command == "HEAD":
            headers += [("Content-Length", response.headers.get("Content-Length", "0"))]
        self.answer(response.status, headers, content, len(content) // 2 if fault == "cut short" else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.reset()

    def reset(self) -> None:
        """Close without the courtesy of an end: the client sees a connection reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


_OURS = ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding")
