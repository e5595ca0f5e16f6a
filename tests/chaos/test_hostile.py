"""What the service is sent by those who mean it ill: mutated pictures and bodies, bombs, slow senders, addresses."""

import base64
import io
import json
import random
import socket
import struct
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.chaos.service import Crowd, Service, pictures, running, within
from tests.conftest import BIN, Listener
from tests.test_annotate import chunk, encoded, huge_png

pytestmark = pytest.mark.slow
DEADLINE = 20
CORPUS = 2400


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    """Where nobody is to come."""
    listener = Listener(200)
    yield listener
    listener.close()


@pytest.fixture(scope="module")
def store(listener: Listener) -> Iterator[Listener]:
    """A store that sends all who ask it to the listener."""
    store = Listener(307, location=listener.url + "/stolen")
    yield store
    store.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, store: Listener) -> Iterator[Service]:
    storage = {"endpoint_url": store.url, "key": "key", "secret": "secret"}
    limits = {"max_bytes": 4 << 20, "deadline": DEADLINE, "allowed_prefixes": ["s3://served/public/"]}
    with running(tmp_path_factory.mktemp("hostile"), **limits, storage=storage) as service:
        yield service


def test_a_mutated_corpus(service: Service, jpegs: list[bytes]) -> None:
    """Pictures of all formats with bytes changed, cut and spliced, and bodies of all endpoints: no 500, no hang, and
    no growth from the first half to the second."""
    rng = random.Random(2026)
    corpus = list(_mutated(rng, jpegs))

    def send(one: tuple[str, dict[str, Any]]) -> int:
        path, asked = one
        return httpx.post(service.url + path, **asked, timeout=3 * DEADLINE).status_code

    half = len(corpus) // 2
    said: Counter[int] = Counter()
    sizes = []
    with ThreadPoolExecutor(16) as pool:
        for part in (corpus[:half], corpus[half:]):
            said.update(pool.map(send, part))
            sizes.append(service.memory())
    print(f"{len(corpus)} bodies: {dict(said)}, memory {sizes[0]} MB, then {sizes[1]} MB")
    assert len(corpus) >= 2000 and all(status < 500 for status in said), said
    assert said[200] > 100 and said[422] > 100
    assert sizes[1] < 1.1 * sizes[0], sizes


def _mutated(rng: random.Random, jpegs: list[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    formats = ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM", "TGA", "ICO", "AVIF"]
    seeds = [*jpegs[:6], *(encoded(kind, (120, 90)) for kind in formats)]
    good = base64.b64encode(jpegs[0]).decode()
    chat = {"role": "user", "content": [{"type": "text", "text": "caption en"}]}
    chat["content"].append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{good}"}})  # type: ignore
    talk = {"model": "paligemma", "messages": [chat], "max_tokens": 4}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [good]}
    for number in range(CORPUS):
        which = number % 8
        if which < 5:
            data = _mutate(rng, seeds[rng.randrange(len(seeds))], seeds)
            form = {"conf": rng.choice(["0.1", "0", "1"])}
            yield "/v1/annotate", {"files": {"image": ("a", data)}, "data": form}
        elif which == 5:
            body = _twisted(
                rng, {"image": f"data:image/jpeg;base64,{good}", "conf": 0.2, "classes": [1], "prompt": "ocr"}
            )
            yield "/v1/annotate", {"content": body, "headers": {"content-type": "application/json"}}
        elif which == 6:
            yield (
                "/v1/chat/completions",
                {"content": _twisted(rng, talk), "headers": {"content-type": "application/json"}},
            )
        else:
            body = _twisted(rng, {"inputs": [tensor], "parameters": {"conf": 0.3}})
            length = rng.choice([str(len(body)), "0", "-1", "x", str(len(body) + 9), str(len(body) // 2)])
            yield (
                "/v2/models/yolo/infer",
                {"content": body, "headers": {"inference-header-content-length": length} if rng.random() < 0.5 else {}},
            )


def _mutate(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 32])):
        kind, at = rng.randrange(6), rng.randrange(len(changed)) if changed else 0
        if not changed:
            break
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 200)]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.randrange(1, 200))
        elif kind == 4:  # of the head, where sizes are
            changed[rng.randrange(min(64, len(changed)))] = rng.choice([0, 1, 127, 128, 255])
        else:
            other = seeds[rng.randrange(len(seeds))]
            changed[at:] = other[rng.randrange(len(other)) :]
    return bytes(changed)


def _twisted(rng: random.Random, body: Any) -> bytes:
    """JSON with one of its values replaced by something that does not belong there, or no JSON."""
    body = json.loads(json.dumps(body))
    strange: list[Any] = [None, True, -1, 1e308, 10**40, "", "\ud800", "\x00", [], {}, [[[[]]]], {"a": {"b": {}}}]
    strange += ["a" * 70_000, float("nan"), float("inf"), "s3://served/public/../x", "data:,", "data:;base64,AAAA", 0.5]
    spots: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            spots.append((value, key))
            collect(value[key])

    collect(body)
    for _ in range(rng.choice([1, 1, 2])):
        holder, key = spots[rng.randrange(len(spots))]
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder.pop(key, None)
            holder[rng.choice(["", "x", "__class__", "conf", "image", "n", "stream"])] = rng.choice(strange)
        else:
            holder[key] = rng.choice(strange)
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(12)
    if kind == 0:
        text = text[: rng.randrange(len(text))]
    elif kind == 1:
        text = "[" * 50_000
    data = text.encode("utf-8", "surrogatepass")
    return _mutate(rng, data, [data]) if kind == 2 else data


def test_bombs(service: Service) -> None:
    """Pictures that are small as files and gigantic as pixels are refused without being decoded."""
    before = service.memory()
    for data in (huge_png(), _bomb(30_000, 30_000), _bomb(2_000_000_000, 1), _text_bomb(), _many_frames()):
        response = httpx.post(service.url + "/v1/annotate", files={"image": data}, timeout=3 * DEADLINE)
        assert response.status_code in (200, 413, 415, 422), response.text
    assert service.memory() < before + 256


def _bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels, of which there is a megabyte as it is packed."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(1 << 20)) for _ in range(900)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    """A small picture with a note of a gigabyte."""
    whole = encoded("PNG", (32, 32))
    packer = zlib.compressobj(9)
    note = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()
    return whole[:33] + chunk(b"zTXt", b"a\0\0" + note) + whole[33:]


def _many_frames() -> bytes:
    buffer = io.BytesIO()
    first, *rest = (Image.new("P", (2000, 2000), number) for number in range(60))
    first.save(buffer, "GIF", save_all=True, append_images=rest)
    return buffer.getvalue()


def test_slow_senders(service: Service, jpegs: list[bytes]) -> None:
    """They are turned away when their time is over, and cost nobody else an answer."""
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST /v1/annotate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    senders = [socket.create_connection((host, int(port))) for _ in range(150)]  # more than max_concurrent
    for sender in senders:
        sender.sendall(f"{head}Content-Length: 1000000\r\n\r\n{{".encode())
    ended: list[bytes] = []

    def drip(sender: socket.socket) -> None:
        sender.settimeout(1)
        end = time.monotonic() + 4 * DEADLINE
        while time.monotonic() < end:
            try:
                sender.sendall(b" ")
                said = sender.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                said = b""
            ended.append(said)
            return

    with ThreadPoolExecutor(150) as pool:
        waiting = [pool.submit(drip, sender) for sender in senders]
        with Crowd(4, pictures(jpegs), service.url) as crowd:
            crowd.hear(30, seconds=DEADLINE - 2)  # while they are still at it
            assert not ended
        assert not crowd.failed
        for one in waiting:
            one.result()
    assert len(ended) == 150 and all(said == b"" or b" 408 " in said.split(b"\r\n")[0] for said in ended), ended[:2]
    for sender in senders:
        sender.close()


def test_endless_bodies(service: Service) -> None:
    """Without a length, and with a false one."""
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST /v1/annotate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as sender:
        sender.settimeout(3 * DEADLINE)
        sender.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        try:
            while sent < 200 << 20:
                sender.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
                sent += 1 << 20
        except OSError:
            pass  # it no longer listens
        assert sent < 128 << 20
    for kind, size in (("image/jpeg", 5 << 20), ("video/mp4", 70 << 20)):
        refused = httpx.post(
            service.url + "/v1/annotate", content=bytes(size), headers={"content-type": kind}, timeout=3 * DEADLINE
        )
        assert refused.status_code == 413, kind


def test_nothing_is_fetched(service: Service, listener: Listener, store: Listener) -> None:
    """Neither from an address that a caller names, nor from one to which an allowed store redirects."""
    inside = listener.url.removeprefix("http://")
    names = [listener.url, f"{listener.url}/a.jpg", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd"]
    names += [f"http://served@{inside}/", f"s3://{inside}/a.jpg", "s3://elsewhere/a.jpg", "s3://served/private/a.jpg"]
    names += ["s3://served/public/../private/a.jpg", "s3://served/publicity/a.jpg", "S3://elsewhere/a", "gs://b/a.jpg"]
    names += ["ftp://127.0.0.1/a", "//127.0.0.1/a", "/etc/passwd", "\\\\127.0.0.1\\a", f"s3://served\\@{inside}/a"]
    chat = "/v1/chat/completions"
    for name in names:
        assert httpx.post(service.url + "/v1/annotate", json={"image": name}, timeout=60).status_code == 422, name
        content = [{"type": "text", "text": "ocr"}, {"type": "image_url", "image_url": {"url": name}}]
        asked = {"model": "paligemma", "messages": [{"role": "user", "content": content}]}
        assert httpx.post(service.url + chat, json=asked, timeout=60).status_code == 422, name
    assert not store.heard and not listener.heard
    redirected = httpx.post(
        service.url + "/v1/annotate", json={"image": "s3://served/public/a.jpg"}, timeout=3 * DEADLINE
    )
    assert redirected.status_code == 422 and store.heard and not listener.heard


def test_schemathesis(service: Service, tmp_path: Path) -> None:
    """Requests made from the served document, good and bad: none is answered with a 500."""
    command = [str(BIN / "schemathesis"), "run", f"{service.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--max-examples", "100", "--seed", "5", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-4000:]
    within(60, lambda: httpx.get(f"{service.url}/healthz").status_code == 200)
