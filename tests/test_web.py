"""Pictures at http:// uris, from a real server that does what servers of the web do."""

import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shardsight.row import Failure
from shardsight.sources import Unit, read, web
from shardsight.storage import Storage

Answer = Callable[[http.server.BaseHTTPRequestHandler, int], None]


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def then(first: Answer, times: int, second: Answer) -> Answer:
    return lambda handler, count: (first if count <= times else second)(handler, count)


def drops(body: bytes) -> Answer:
    """Announces more than it sends."""
    return status(200, body, Content_Length=str(2 * len(body)))


def endless(handler: http.server.BaseHTTPRequestHandler, _: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def drips(handler: http.server.BaseHTTPRequestHandler, _: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.02)


def waits(_: http.server.BaseHTTPRequestHandler, __: int) -> None:
    time.sleep(0.5)


PICTURE = status(200, b"picture")
ANSWERS: dict[str, Answer] = {
    "/fine.jpg?size=large": PICTURE,
    "/gone.jpg": status(404),
    "/secret.jpg": status(403),
    "/away.jpg": status(503),
    "/busy.jpg": then(status(503), 2, PICTURE),
    "/throttled.jpg": then(status(429, Retry_After="0"), 1, PICTURE),
    "/broken.jpg": then(status(500), 1, PICTURE),
    "/dropped.jpg": then(drops(b"pic"), 1, PICTURE),
    "/moved.jpg": status(302, Location="/fine.jpg?size=large", Set_Cookie="seen=yes"),
    "/loop.jpg": status(302, Location="/loop.jpg"),
    "/elsewhere.jpg": status(302, Location="file:///etc/passwd"),
    "/endless.jpg": endless,
    "/announced.jpg": status(200, b"", Content_Length=str(1 << 40)),
}
SLOW: dict[str, Answer] = {"/drips.jpg": drips, "/waits.jpg": waits}


class Server:
    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                outer.asked[self.path] += 1
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                with suppress(OSError):  # who asked has heard enough
                    (ANSWERS | SLOW)[self.path](self, outer.asked[self.path])

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """And ~/.netrc with credentials for it, which nobody may send, and short pauses."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(web, "PAUSE", 0.01)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_what_servers_do_costs_one_row_at_most(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit of all kinds: each a picture or an error row of its own; only what can pass is asked for again."""
    monkeypatch.setattr("shardsight.sources.web.MAX_BYTES", 1 << 20)
    monkeypatch.setattr("shardsight.sources.units.MAX_BYTES", 1 << 20)
    files = tuple(server.url + path for path in ANSWERS)
    found = dict(zip(ANSWERS, read(Unit("files", files=files), Storage()), strict=True))
    assert [record.id for record in found.values()] == list(files)
    good = ["/fine.jpg?size=large", "/busy.jpg", "/throttled.jpg", "/broken.jpg", "/dropped.jpg", "/moved.jpg"]
    fine = {path: record.data for path, record in found.items() if not record.failure}
    assert fine == dict.fromkeys(good, b"picture")
    assert {path: record.failure.type for path, record in found.items() if record.failure} == {
        **{"/gone.jpg": "HttpError", "/secret.jpg": "HttpError", "/away.jpg": "HttpError"},
        **{"/loop.jpg": "TooManyRedirects", "/elsewhere.jpg": "UnsupportedUri"},
        **{"/endless.jpg": "TooManyBytes", "/announced.jpg": "TooManyBytes"},
    }
    assert "404" in str(found["/gone.jpg"].failure)
    assert server.asked["/busy.jpg"] == 3 and server.asked["/throttled.jpg"] == server.asked["/dropped.jpg"] == 2
    assert server.asked["/away.jpg"] == web.ATTEMPTS
    assert server.asked["/gone.jpg"] == server.asked["/endless.jpg"] == 1
    assert server.asked["/loop.jpg"] == 6


def test_slow_servers_are_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it without an answer, or with a byte now and then, for ever."""
    monkeypatch.setattr(web, "TIMEOUT", (10.0, 0.1))
    monkeypatch.setattr(web, "MAX_SECONDS", 0.3)
    found = list(read(Unit("files", files=tuple(server.url + path for path in SLOW)), Storage()))
    assert [record.failure and record.failure.type for record in found] == ["HttpTimeout", "HttpTimeout"]
    assert server.asked["/waits.jpg"] == web.ATTEMPTS


def test_nothing_is_sent_but_the_request(server: Server) -> None:
    """No credentials of ~/.netrc, no cookies that an earlier answer has set."""
    for _ in range(2):
        assert web.fetch(f"{server.url}/moved.jpg") == b"picture"
    assert len(server.headers) == 4
    assert not any({"authorization", "cookie", "referer"} & set(headers) for headers in server.headers)


def test_what_cannot_be_reached_is_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    for uri, type in [
        ("http://127.0.0.1:1/x.jpg", "HttpError"),
        ("http://", "UnsupportedUri"),
        ("http://[::1/x.jpg", "UnsupportedUri"),
        ("http://a b\0/x.jpg", "UnsupportedUri"),
        ("http://127.0.0.1:99999/x.jpg", "UnsupportedUri"),
    ]:
        with pytest.raises(Failure) as failure:
            web.fetch(uri)
        assert failure.value.type == type, (uri, failure.value.message)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert web._retry_after("7") == 7.0 and web._retry_after("9" * 30) == web.MAX_PAUSE
    assert web._retry_after("") == web._retry_after("soon") == web._retry_after("Mon, 01 Jan 2024 00:00:00 GMT") == 0.0
    assert web._retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 60
