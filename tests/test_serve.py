"""The service with both of the demo's models, asked by the clients that people use."""

import asyncio
import base64
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from serve import chat
from tests.conftest import PHOTOGRAPHS, S3, WEIGHTS, free_port, rows_of
from tests.test_annotate import mixed_inputs

PROMPTS = ["caption en", "detect circle ; star", "segment star"]


@pytest.fixture(scope="module")
def inputs(jpegs: list[bytes]) -> list[tuple[str, bytes]]:
    """Names and encoded pictures, good and bad."""
    found = [(name, data) for name, data, _ in mixed_inputs(jpegs)]
    found += [(f"scene {n}.jpg", data) for n, data in enumerate(jpegs[4:16])]
    return found + [(path.name, path.read_bytes()) for path in PHOTOGRAPHS]


@pytest.fixture(scope="module")
def rows(one_ray: str, inputs: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job says of them, by name. Before the service takes its share of two cores."""
    from shardsight.cli import annotate

    folder = tmp_path_factory.mktemp("job")
    (folder / "in").mkdir()
    for name, data in inputs:
        (folder / "in" / name).write_bytes(data)
    arguments = [folder / "in", "--output", folder / "out", "--max-error-rate", 1, "--precision", "fp32"]
    arguments += ["--yolo", WEIGHTS / "detect.pt", "--paligemma", WEIGHTS / "paligemma"]
    assert annotate([*map(str, arguments), *(part for prompt in PROMPTS for part in ("--prompt", prompt))]) == 0
    return {Path(row["id"]).name: row for row in rows_of(folder / "out")}


@pytest.fixture(scope="module")
def service(one_ray: str, rows: dict[str, Any], s3: S3) -> Iterator[str]:
    """Its address."""
    from ray import serve

    from serve.app import Arguments, app

    port = free_port()
    storage = dict(pair.split("=", 1) for pair in s3.options()[1::2])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(
        yolo=str(WEIGHTS / "detect.pt"),
        paligemma=[str(WEIGHTS / "paligemma")],
        precision="fp32",
        max_bytes=4 << 20,
        allowed_prefixes=["s3://served/public"],
        storage=storage,
    )
    serve.run(app(arguments), name="shardsight")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def ask(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=120) as client:
        yield client


def data_uri(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def test_same_row_as_the_job(ask: httpx.Client, inputs: list[tuple[str, bytes]], rows: dict[str, Any]) -> None:
    """Whether a picture comes through the job or over HTTP, good or bad, its row is the same."""

    def over_http(one: tuple[str, bytes]) -> dict[str, Any]:
        response = ask.post("/v1/annotate", files={"image": one}, data={"prompt": PROMPTS})
        body: dict[str, Any] = response.json()
        return body if response.status_code == 200 else body["row"]

    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(over_http, inputs))
    assert len(served) == len(rows) == len(inputs)
    for (name, _), row in zip(inputs, served, strict=True):
        mine = {"id": row["id"], "uri": row["uri"]}  # the name as the client wrote it, a quote as %22
        assert_alike(row, rows[name] | mine, off=1e-4)


def assert_alike(row: dict[str, Any], other: dict[str, Any], off: float) -> None:
    """Equal, but for the scores of PaliGemma's tokens, which vary a little with what else is in the batch: by `off`."""
    scores = [[one.pop("score") for one in _scored(of["answers"])] for of in (row, other)]
    assert row == other, row["id"]
    assert scores[0] == pytest.approx(scores[1], rel=0, abs=off), row["id"]


def _scored(answers: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [one for answer in answers or [] for one in (answer, *(answer["detections"] or []))]


def test_openai_client(service: str, jpegs: list[bytes]) -> None:
    client = openai.OpenAI(base_url=f"{service}/v1", api_key="none")
    (model,) = client.models.list()
    content: Any = [
        {"type": "text", "text": "caption en"},
        {"type": "image_url", "image_url": {"url": data_uri(jpegs[0])}},
    ]
    asked: Any = {"model": model.id, "messages": [{"role": "user", "content": content}], "max_tokens": 24}
    whole = client.chat.completions.create(**asked, logprobs=True)
    (choice,) = whole.choices
    assert choice.finish_reason in ("stop", "length") and whole.usage and choice.logprobs
    assert whole.usage.completion_tokens == len(choice.logprobs.content or []) <= 24
    assert whole.usage.prompt_tokens > 196
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == choice.message.content and sum(map(bool, deltas)) > 1
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="choose from paligemma"):
        client.chat.completions.create(**asked | {"model": "gpt-4o"})
    with pytest.raises(openai.BadRequestError, match="one text and one picture"):
        client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": content[:1]}]})


def test_langchain(service: str, jpegs: list[bytes]) -> None:
    chat = ChatOpenAI(base_url=f"{service}/v1", api_key="none", model="paligemma", max_tokens=8)  # type: ignore
    picture = {"type": "image_url", "image_url": {"url": data_uri(jpegs[1])}}
    message = HumanMessage(content=[{"type": "text", "text": "caption en"}, picture])
    assert chat.invoke([message]).content == "".join(str(chunk.content) for chunk in chat.stream([message]))


def test_triton_client(service: str, ask: httpx.Client, jpegs: list[bytes]) -> None:
    """Its binary tensors, and JSON."""
    client = triton.InferenceServerClient(service.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("yolo")
    assert client.get_model_metadata("yolo")["inputs"][0]["datatype"] == "BYTES"
    rows = [ask.post("/v1/annotate", files={"image": data}).json() for data in jpegs[:3]]
    for binary in (True, False):
        tensor = triton.InferInput("image", [3], "BYTES")
        pictures = jpegs[:3] if binary else [base64.b64encode(data) for data in jpegs[:3]]
        tensor.set_data_from_numpy(np.array(pictures, object), binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("image", "boxes", "labels")]
        found = client.infer("yolo", [tensor], outputs=outputs)
        boxes = [[one[side] for side in ("x1", "y1", "x2", "y2")] for row in rows for one in row["detections"]]
        np.testing.assert_allclose(found.as_numpy("boxes"), boxes, rtol=1e-6)
        labels = [one.decode() if isinstance(one, bytes) else one for one in found.as_numpy("labels")]
        assert labels == [one["label"] for row in rows for one in row["detections"]]
        assert found.as_numpy("image").tolist() == [n for n, row in enumerate(rows) for _ in row["detections"]]
    with pytest.raises(triton.InferenceServerException, match="conf"):
        client.infer("yolo", [tensor], parameters={"conf": 7})


def test_curl_and_json(service: str, ask: httpx.Client, jpegs: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    command = ["curl", "--silent", "--fail", "--form", f"image=@{tmp_path}/a.jpg", "--form", "conf=0.5"]
    said = subprocess.run([*command, f"{service}/v1/annotate"], capture_output=True, check=True).stdout
    row = ask.post("/v1/annotate", json={"image": data_uri(jpegs[0]), "conf": 0.5}).json()
    assert json.loads(said)["detections"] == row["detections"] and row["detections"]
    none = ask.post("/v1/annotate", json={"image": data_uri(jpegs[0]), "conf": 0.5, "classes": []}).json()
    assert none["detections"] == []
    few = ask.post("/v1/annotate", files={"image": jpegs[0]}, data={"classes": "2,3", "max_det": "1"}).json()
    assert len(few["detections"]) <= 1 and {one["class_id"] for one in few["detections"]} <= {2, 3}


def test_regions(ask: httpx.Client, jpegs: list[bytes]) -> None:
    asked = {"on": "regions", "prompt": "ocr", "max_tokens": "4"}
    row = ask.post("/v1/annotate", files={"image": jpegs[0]}, data=asked).json()
    assert row["detections"] and all(isinstance(one["text"], str) for one in row["detections"])


def test_a_name_that_is_no_text(ask: httpx.Client, jpegs: list[bytes]) -> None:
    """Half of a character, by an encoding that has such: it is replaced, and harms nobody whose batch it is in."""
    head = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a+2AA-.jpg"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}
    response = ask.post("/v1/annotate", content=head + jpegs[0] + b"\r\n--b--\r\n", headers=kind)
    assert response.status_code == 200 and response.json()["id"] == "a?.jpg"
    more = b'\r\n--b\r\ncontent-disposition: form-data; name="+2AA-"\r\n\r\n1\r\n--b--\r\n'
    response = ask.post("/v1/annotate", content=head + jpegs[0] + more, headers=kind)
    assert response.status_code == 422


def test_regions_of_an_empty_picture(ask: httpx.Client) -> None:
    """There is nothing to ask about, which is no failure."""
    response = ask.post("/v1/annotate", json={"image": chat.EXAMPLE, "on": "regions", "prompt": "ocr"})
    assert response.status_code == 200 and response.json()["detections"] == []


def test_pictures_of_a_store(ask: httpx.Client, s3: S3, jpegs: list[bytes]) -> None:
    """Under the allowed prefix alone; a name that climbs out of it is not asked for."""
    bucket = s3.bucket("served")
    for folder in ("public", "private", "public-not"):
        (bucket / folder).mkdir(exist_ok=True)
        (bucket / folder / "a.jpg").write_bytes(jpegs[0])
    good = ask.post("/v1/annotate", json={"image": "s3://served/public/a.jpg"}).json()
    assert good["id"] == "s3://served/public/a.jpg" and good["detections"]
    for name in ("private/a.jpg", "public-not/a.jpg", "public/../private/a.jpg", "public/none.jpg", "public"):
        refused = ask.post("/v1/annotate", json={"image": f"s3://served/{name}"})
        assert refused.status_code == 422 and "row" not in refused.json(), name


@pytest.mark.parametrize(
    "request_, status, words",
    [
        ({"files": {"image": b"no picture"}}, 415, "no picture format"),
        ({"files": {"image": b""}}, 422, "no bytes"),
        ({"files": {"image": bytes(5 << 20)}}, 413, "at most"),
        ({"files": {"picture": b"x"}}, 422, "a file named 'image'"),
        ({"files": {"image": b"x"}, "data": {"conf": "2"}}, 422, "conf"),
        ({"files": {"image": b"x"}, "data": {"confidence": "0.2"}}, 422, "confidence"),
        ({"files": {"image": b"x"}, "data": {"classes": str(2**63)}}, 422, "classes"),
        ({"files": {"image": b"x"}, "data": {"prompt": "detect"}}, 422, "lacks its rest"),
        ({"content": b"x"}, 415, "multipart/form-data"),
        ({"json": {}}, 422, "image"),
        ({"json": {"image": "data:image/png;base64,%%%"}}, 422, "data uri"),
        ({"json": {"image": "file:///etc/passwd"}}, 422, "data: uri"),
        ({"json": {"image": "http://169.254.169.254/latest/meta-data"}}, 422, "data: uri"),
        ({"json": {"image": "s3://elsewhere/a.jpg"}}, 422, "allows"),
        ({"files": {"image": b"x"}, "headers": {"origin": "https://elsewhere.example"}}, 403, "another site"),
        ({"files": {"image": b"x"}, "headers": {"host": "elsewhere.example"}}, 401, "SHARDSIGHT_API_KEYS"),
    ],
)
def test_refusals(ask: httpx.Client, request_: dict[str, Any], status: int, words: str) -> None:
    """Each is a problem of RFC 9457 that says in a sentence what is wrong, and tells nothing of the inside."""
    response = ask.post("/v1/annotate", **request_)
    problem = response.json()
    assert response.status_code == problem["status"] == status, problem
    assert response.headers["content-type"] == "application/problem+json"
    assert words in problem["detail"] and problem["title"] and "Traceback" not in response.text
    assert problem["instance"] == f"urn:request:{response.headers['x-request-id']}"


def test_what_every_response_carries(ask: httpx.Client) -> None:
    for path in ("/", "/docs", "/healthz", "/page/page.js", "/nowhere"):
        response = ask.get(path, headers={"x-request-id": "mine-7"})
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "access-control-allow-origin" not in response.headers
        assert response.headers["x-request-id"] == "mine-7"
        assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "") or path == "/page/page.js"


async def _through(guard: Any, headers: dict[str, str], body: list[bytes], more: bool = True) -> list[Any]:
    """What an ASGI server would be sent; `body` comes in these parts, and with `more` its end never does."""
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts[-1:] = [one | {"more_body": more} for one in parts[-1:]]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0) if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/annotate", "headers": raw, "client": ("10.0.0.1", 1)}
    await guard(scope, receive, send)
    return sent


async def _swallow(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads all of the body."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _guard(app: Any = _swallow, **changed: Any) -> Any:
    from serve.guard import Guard, digest

    limits: dict[str, Any] = {"keys": [digest("one"), digest("two")], "max_bytes": 100, "deadline": 5.0, "room": 2}
    return Guard(app, **limits | {"routes": []} | changed)


@pytest.mark.parametrize("given, status", [("Bearer two", 408), ("Bearer three", 401), ("Basic two", 401), ("", 401)])
def test_keys(given: str, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """With the right one, the request goes on (to where its body does not end); no key is ever logged."""
    caplog.set_level("DEBUG")
    sent = asyncio.run(_through(_guard(deadline=0.2), {"authorization": given, "host": "a"}, [b"x"]))
    assert sent[0]["status"] == status
    assert "two" not in caplog.text and "three" not in caplog.text


def test_endless_bodies_and_slow_senders() -> None:
    key = {"authorization": "Bearer one", "host": "a"}
    endless = asyncio.run(_through(_guard(), key | {"transfer-encoding": "chunked"}, [bytes(60)] * 1000))
    assert endless[0]["status"] == 413 and _closes(endless)
    announced = asyncio.run(_through(_guard(), key | {"content-length": "101"}, []))
    assert announced[0]["status"] == 413 and _closes(announced)
    assert asyncio.run(_through(_guard(deadline=0.2), key, [b"a"]))[0]["status"] == 408


def test_what_is_not_read_is_not_waited_for() -> None:
    """An answer before the body's end closes the connection: its rest would be read and thrown away."""

    async def hasty(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 415, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    key = {"authorization": "Bearer one", "host": "a"}
    assert _closes(asyncio.run(_through(_guard(hasty), key | {"transfer-encoding": "chunked"}, [b"a"])))
    assert _closes(asyncio.run(_through(_guard(hasty), key | {"content-length": "9"}, [b"a"])))
    assert not _closes(asyncio.run(_through(_guard(hasty), key, [b"a"], more=False)))


def _closes(sent: list[Any]) -> bool:
    return (b"connection", b"close") in sent[0]["headers"]


def test_an_error_of_ours_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a 500 with the request's id; not in plain words, which Outside would take for a Door that has died."""
    from serve.app import Arguments, Door

    async def fails(*_: Any) -> Any:
        raise ZeroDivisionError("of the inside")

    (plain, *_) = Door.func_or_class.__bases__  # type: ignore[union-attr]  # without what makes it a replica
    door = plain(Arguments(), {}, [], {})
    monkeypatch.setattr(door, "row", fails)
    transport = httpx.ASGITransport(door.__serve_build_asgi_app__())

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/v1/annotate", json={"image": chat.EXAMPLE})

    response = asyncio.run(ask())
    assert response.status_code == response.json()["status"] == 500 and "inside" not in response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_what_has_no_room_is_told_so_at_once() -> None:
    async def all_at_once() -> list[int]:
        guard = _guard(deadline=1.0)
        key = {"authorization": "Bearer one", "host": "a"}
        sent = await asyncio.gather(*(_through(guard, key, [b"x"]) for _ in range(5)))
        assert guard.inside == 0
        return sorted(each[0]["status"] for each in sent)

    assert asyncio.run(all_at_once()) == [408, 408, 429, 429, 429]


def test_late_work_is_cancelled() -> None:
    cancelled = []

    async def forever(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    guard = _guard(forever, deadline=0.2)
    parts = [{"type": "http.request", "body": b"x", "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("::1", 1)}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 504 and cancelled


@pytest.mark.parametrize("says, status", [(None, 503), (503, 503), (404, 404), (413, 413)])
def test_what_the_proxy_says_of_a_door_that_is_not_there(says: int | None, status: int) -> None:
    """Nothing, or plain words of its own; and it is read from without an end. Callers get a problem all the same."""
    from serve.guard import MOST_BYTES, Outside

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if says == 413:
            while (await receive())["type"] != "http.disconnect":
                pass
        elif says:
            kind = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": says, "headers": kind})
            await send({"type": "http.response.body", "body": b"ActorDiedError: pid=7, ip=10.0.0.1"})

    parts = [bytes(1 << 20)] * ((MOST_BYTES >> 20) + 8)
    start, body = asyncio.run(_through(Outside(proxy), {"x-request-id": "mine"}, parts))
    problem = json.loads(body["body"])
    assert start["status"] == problem["status"] == status and problem["instance"] == "urn:request:mine"
    assert "pid" not in problem["detail"] and dict(start["headers"])[b"content-type"] == b"application/problem+json"
