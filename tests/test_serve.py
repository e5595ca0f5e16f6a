"""The service with both of the demo's models, asked by the clients that people use."""

import asyncio
import base64
import copy
import gzip
import io
import json
import os
import signal
import socket
import subprocess
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote

import av
import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from PIL import Image

from serve.arguments import EXAMPLE, Arguments, Options, VideoOptions, options
from serve.guard import Guard, ProxyProblems, _Unpacker, digest
from serve.pictures import Pictures, decode_base64
from serve.problem import MAX_BODY_BYTES, Problem
from serve.videos import Video, read
from shardsight.decode.frames import Load
from shardsight.decode.video import Sampling
from shardsight.errors import UsageError
from shardsight.models.info import ModelDied
from shardsight.object_stores import NoAccess, Rejected, Unavailable
from shardsight.row import Failure
from shardsight.storage import Storage
from tests.chaos.service import within
from tests.clips import encode, panned
from tests.conftest import PHOTOGRAPHS, S3, WEIGHTS, free_port, rows_of
from tests.test_annotate import mixed_inputs

FRONTEND = "https://frontend.example"
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


EVERY = 3  # frames of the clip


@pytest.fixture(scope="module")
def clip(jpegs: list[bytes]) -> bytes:
    """24 frames, of which every third is annotated."""
    return encode(panned(np.asarray(Image.open(io.BytesIO(jpegs[0])).convert("RGB")), 24))


@pytest.fixture(scope="module")
def clip_rows(one_ray: str, clip: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the job says of the clip, tracked and with captions."""
    from shardsight.cli import annotate

    folder = tmp_path_factory.mktemp("clip")
    (folder / "clip.mp4").write_bytes(clip)
    arguments = [folder / "clip.mp4", "--output", folder / "out", "--precision", "fp32", "--every", EVERY]
    arguments += ["--yolo", WEIGHTS / "detect.pt", "--track", "botsort", "--paligemma", WEIGHTS / "paligemma"]
    assert annotate(list(map(str, arguments))) == 0
    return sorted(rows_of(folder / "out"), key=lambda row: row["frame_index"])


@pytest.fixture(scope="module")
def service(one_ray: str, rows: dict[str, Any], clip_rows: list[dict[str, Any]], s3: S3) -> Iterator[str]:
    """Its address."""
    from ray import serve

    from serve.app import app

    port = free_port()
    storage = dict(pair.split("=", 1) for pair in s3.options()[1::2])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(
        yolo=str(WEIGHTS / "detect.pt"),
        paligemma=[str(WEIGHTS / "paligemma")],
        precision="fp32",
        max_bytes=4 << 20,
        max_video_bytes=6 << 20,
        max_frames=100,
        allowed_prefixes=["s3://served/public"],
        allowed_origins=[FRONTEND],
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
    said = choice.message.content or ""
    word = said.split()[-1]
    for streamed in (False, True):  # the answer ends before the text, of which not even a part is sent
        stopped = client.chat.completions.create(**asked, stop=[word, "never said"], stream=streamed)
        parts = [one.choices[0] for one in (stopped if streamed else [stopped])]
        texts = [(part.delta if streamed else part.message).content or "" for part in parts]
        assert "".join(texts) == said[: said.index(word)].strip() and parts[-1].finish_reason == "stop"
    drawn = [client.chat.completions.create(**asked, temperature=1.5, seed=7) for _ in range(3)]
    assert len({one.choices[0].message.content for one in drawn}) == 1
    narrow = client.chat.completions.create(**asked, temperature=1.5, top_p=0)  # the likeliest token alone
    assert narrow.choices[0].message.content == said


# What changes no answer, or asks for nothing.
NOTHING = {"user": "a", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "n": 1, "tools": []}
NOTHING |= {"presence_penalty": 0, "response_format": {"type": "text"}, "stop": None, "top_logprobs": None}
UNSUPPORTED: list[dict[str, Any]] = [
    {"n": 2},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"tool_choice": "required"},
    {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_object"}},
    {"logit_bias": {"5": 100}},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.1},
    {"top_logprobs": 3, "logprobs": True},
    {"store": True},
    {"modalities": ["audio"]},
    {"reasoning_effort": "high"},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": ""},
    {"seed": 2**63},
    {"top_p": 1.1},
    {"max_tokens": 257},
    {"max_completion_tokens": 257},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"other": True}, "stream": True},
    {"top_k": 5},
    {"top_k": 5, "stream": True},
]


def test_parameters_that_change_no_answer(ask: httpx.Client, jpegs: list[bytes]) -> None:
    plain, more = (ask.post("/v1/chat/completions", json=_question(jpegs) | more).json() for more in ({}, NOTHING))
    assert plain["choices"] == more["choices"]


@pytest.mark.parametrize("more", UNSUPPORTED, ids=lambda more: ", ".join(f"{k}={v}"[:30] for k, v in more.items()))
def test_parameters_that_cannot_be_honoured(ask: httpx.Client, jpegs: list[bytes], more: dict[str, Any]) -> None:
    """Each is refused by name, streaming or not: who sent it would take an answer for one that heeds it."""
    response = ask.post("/v1/chat/completions", json=_question(jpegs) | more)
    assert response.status_code == 400 and next(iter(more)) in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda user, parts: [{"role": "system", "content": "Answer in French."}, user], "no system messages"),
        (lambda user, parts: [{"role": "developer", "content": "Be brief."}, user], "no developer messages"),
        (lambda user, parts: [user, {"role": "assistant", "content": "a star"}, user], "no assistant messages"),
        (lambda user, parts: [user, user], "without a history"),
        (lambda user, parts: [user | {"content": [*parts, parts[0]]}], "one text and one picture"),
        (lambda user, parts: [user | {"content": [*parts, parts[1]]}], "one text and one picture"),
        (lambda user, parts: [user | {"content": "a star?"}], "one text and one picture"),
        (lambda user, parts: [user | {"name": "Ada"}], "name"),
        (lambda user, parts: [user | {"content": [*parts, {"type": "input_audio", "input_audio": {}}]}], "type"),
        (lambda user, parts: [user | {"content": [parts[0], _with_detail(parts[1])]}], "detail"),
    ],
)
def test_messages_that_paligemma_cannot_follow(ask: httpx.Client, jpegs: list[bytes], change: Any, words: str) -> None:
    asked = _question(jpegs)
    (user,) = asked["messages"]
    response = ask.post("/v1/chat/completions", json=asked | {"messages": change(user, user["content"])})
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text


def _question(jpegs: list[bytes]) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": data_uri(jpegs[0])}}
    content = [{"type": "text", "text": "caption en"}, picture]
    return {"model": "paligemma", "messages": [{"role": "user", "content": content}], "max_tokens": 8}


def _with_detail(part: dict[str, Any]) -> dict[str, Any]:
    return part | {"image_url": part["image_url"] | {"detail": "high"}}


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
    with pytest.raises(triton.InferenceServerException, match="priority: not supported"):
        client.infer("yolo", [tensor], priority=1)
    with pytest.raises(triton.InferenceServerException, match="classification: not supported"):
        client.infer("yolo", [tensor], outputs=[triton.InferRequestedOutput("boxes", class_count=2)])
    packed = client.infer("yolo", [tensor], outputs=outputs, request_compression_algorithm="gzip")
    np.testing.assert_array_equal(packed.as_numpy("boxes"), found.as_numpy("boxes"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [7]}]}, "cannot be read"),
        ({"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [7]}]}, "not image of UINT8"),
        ({"sequence": 1}, "sequence: unknown"),
        ({"parameters": {"imgsz": 320}}, "imgsz: not supported: choose from conf"),
        ({"outputs": [{"name": "masks"}]}, "no output masks"),
    ],
)
def test_inference_requests_that_are_refused(
    ask: httpx.Client, jpegs: list[bytes], change: dict[str, Any], words: str
) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(jpegs[0]).decode()]}
    response = ask.post("/v2/models/yolo/infer", json={"inputs": [tensor]} | change)
    assert response.status_code == 400 and words in response.json()["error"]
    asked = ask.post("/v2/models/yolo/infer?conf=0.9", json={"inputs": [tensor]})
    assert asked.status_code == 400 and "query" in asked.json()["error"]
    for length in ("-1", "x", "9" * 5000, "9"):
        response = ask.post("/v2/models/yolo/infer", content=b"{}", headers={"inference-header-content-length": length})
        assert response.status_code == 400 and "inference-header-content-length" in response.json()["error"]


def test_a_model_that_fails_is_replaced(
    service: str, ask: httpx.Client, jpegs: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does after a fault. Until another replica answers, load balancers are told that it is not ready; and
    clients, that they may try again. Under a path of its own, so that Serve's route_prefix is tried too."""
    from ray import serve

    from serve.app import YoloReplica, app

    fails = tmp_path / "fails"

    class Failing(YoloReplica):
        def compute(self, packed: Any, thresholds: Any) -> Any:
            if fails.exists():
                raise ModelDied("the GPU has failed")
            return super().compute(packed, thresholds)

    monkeypatch.setattr("serve.app.YoloReplica", Failing)
    serve.run(app(Arguments(yolo=str(WEIGHTS / "detect.pt"))), name="failing", route_prefix="/failing")
    try:

        def ready() -> list[int]:
            paths = ("/v2/health/ready", "/v2/models/yolo/ready", "/healthz")
            return [ask.get(f"/failing{path}").status_code for path in paths]

        def annotate() -> httpx.Response:
            return ask.post("/failing/v1/annotate", files={"image": jpegs[0]})

        assert ready() == [200, 200, 200] and annotate().status_code == 200
        fails.touch()
        response = annotate()
        assert response.status_code == 503 and response.headers["retry-after"] and "try again" in response.text
        assert ready() == [503, 503, 200]
        fails.unlink()
        assert annotate().status_code == 503  # it is not asked again
        within(90, lambda: annotate().status_code == 200)
        assert ready() == [200, 200, 200]
        assert ask.get("/v2/health/ready").status_code == 200
        assert ask.get("/failing/openapi.json").json()["servers"] == [{"url": "/failing"}]
    finally:
        serve.delete("failing")


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


def test_the_forms_in_which_pictures_are_sent(ask: httpx.Client, jpegs: list[bytes]) -> None:
    """Each gives the same detections."""
    plain = base64.b64encode(jpegs[0]).decode()
    lines = "\r\n".join(plain[at : at + 76] for at in range(0, len(plain), 76))
    texts = [lines, plain.replace("+", "-").replace("/", "_"), plain.rstrip("="), f" {plain}\n", quote(plain, safe="")]
    uris = [f"data:image/jpeg;base64,{text}" for text in texts] + [f"DATA:;BASE64,{plain}"]
    found = [ask.post("/v1/annotate", json={"image": uri, "conf": 0.5}) for uri in uris]
    kinds = ["image/jpeg", "image/png", "application/octet-stream", "image/jpeg; charset=binary"]
    found += [ask.post("/v1/annotate?conf=0.5", content=jpegs[0], headers={"content-type": kind}) for kind in kinds]
    body = json.dumps({"image": data_uri(jpegs[0])}).encode()
    packed = {"gzip": gzip.compress(body), "deflate": zlib.compress(body), "identity": body}
    for coding, content in packed.items():
        headers = {"content-type": "application/json", "content-encoding": coding}
        found.append(ask.post("/v1/annotate", params={"conf": 0.5}, content=content, headers=headers))
    found.append(ask.post("/v1/annotate?conf=0.5", files={"image": jpegs[0]}))
    assert {response.status_code for response in found} == {200}, [response.text[:200] for response in found]
    first, *rest = [response.json()["detections"] for response in found]
    assert first and all(one == first for one in rest)


@given(st.binary(max_size=200), st.sampled_from(["", "\n", "\r\n", " "]), st.booleans(), st.booleans())
def test_base64_of_all_kinds(data: bytes, gap: str, safe: bool, padded: bool) -> None:
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    assert decode_base64(gap.join(text[at : at + 7] for at in range(0, len(text), 7))) == data


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4), st.sampled_from([16, 0]))
def test_packed_bodies_in_parts(data: bytes, cuts: list[int], header: int) -> None:
    """However they are cut on their way, and however many are joined."""
    packer = zlib.compressobj(wbits=header + zlib.MAX_WBITS)
    packed = packer.compress(data) + packer.flush() + gzip.compress(data)
    unpack, edges = _Unpacker(600), [0, *sorted(min(cut, len(packed)) for cut in cuts), len(packed)]
    parts = [packed[start:end] for start, end in pairwise(edges)]
    found = b"".join(unpack(part, number < len(parts) - 1) for number, part in enumerate(parts))
    assert found == data + data


def test_what_a_packed_body_may_hold() -> None:
    """No more than a plain one: a megabyte of it may hold a gigabyte."""
    with pytest.raises(Problem, match="at most 1,000 bytes"):
        _Unpacker(1000)(gzip.compress(bytes(1 << 20)), False)
    with pytest.raises(Problem, match="ends too early"):
        _Unpacker(1000)(gzip.compress(b"abc")[:-4], False)
    with pytest.raises(Problem, match="not packed"):
        _Unpacker(1000)(b"abc", False)


def test_the_servers_settings_are_a_requests_defaults() -> None:
    served = Arguments(yolo="a.pt", conf=0.4, max_tokens=64, prompt="ocr")  # type: ignore[arg-type]
    assert options(served, Options, {}) == Options(conf=0.4, max_tokens=64, prompt=["ocr"])
    assert options(served, Options, {"conf": 0.1, "max_tokens": 8}).conf == 0.1
    with pytest.raises(Problem, match="max_tokens: at most 64"):
        options(served, Options, {"max_tokens": 65})


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
    response = ask.post("/v1/annotate", json={"image": EXAMPLE, "on": "regions", "prompt": "ocr"})
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


def test_prefixes_of_every_store_may_be_allowed() -> None:
    """A refusal names them all."""
    prefixes = ["s3://one/", "gs://two/", "az://three/"]
    assert Arguments(allowed_prefixes=prefixes).allowed_prefixes == prefixes
    with pytest.raises(ValueError, match=r"/pictures: expected an s3://, gs:// or az:// prefix"):
        Arguments(allowed_prefixes=["/pictures"])
    with pytest.raises(Problem) as problem:
        asyncio.run(Pictures(Arguments(allowed_prefixes=prefixes), Storage()).fetch("gs://other/a.jpg"))
    assert "an s3://, gs:// or az:// uri under a prefix that this server allows" in problem.value.detail


# --- Videos


def test_a_video_that_waits_for_the_model_holds_up_nothing_else(one_ray: str) -> None:
    """While its thread computes for others, the replica answers other calls, and that it is ready."""
    from serve.service import YoloReplica

    replica, loop = YoloReplica({"model": str(WEIGHTS / "detect.pt")}), asyncio.new_event_loop()

    async def video() -> None:
        async for _ in replica.video(Mock(), (0.25, 0.7, 300, None), ("none", {}), False):
            pass

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with replica.lock:  # as while it computes
            waiting = asyncio.run_coroutine_threadsafe(video(), loop)
            asyncio.run_coroutine_threadsafe(replica.ready(), loop).result(timeout=60)
            assert not waiting.done()
        with pytest.raises(UsageError, match="there is no tracker none"):
            waiting.result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def test_a_video_has_the_rows_of_the_job(
    ask: httpx.Client, s3: S3, clip: bytes, clip_rows: list[dict[str, Any]]
) -> None:
    """In each form in which it may be sent, tracked and with an answer about each frame."""
    (s3.bucket("served") / "public").mkdir(exist_ok=True)
    (s3.bucket("served") / "public" / "clip.mp4").write_bytes(clip)
    asked = {"every": EVERY, "track": "botsort", "prompt": "caption en"}
    responses = [
        ask.post("/v1/annotate", files={"video": ("clip.mp4", clip)}, data=asked),
        ask.post("/v1/annotate", json=asked | {"video": data_uri(clip)}),
        ask.post("/v1/annotate", json=asked | {"video": "s3://served/public/clip.mp4"}),
        ask.post("/v1/annotate", params=asked, content=clip, headers={"content-type": "video/mp4"}),
    ]
    names = ["clip.mp4", "data:", "s3://served/public/clip.mp4", "video"]
    assert len(clip_rows) == 24 / EVERY and any(one["track_id"] for row in clip_rows for one in row["detections"])
    for name, response in zip(names, responses, strict=True):
        assert response.status_code == 200, response.text
        for row, theirs in zip(response.json()["rows"], clip_rows, strict=True):
            assert row["id"] == f"{name}@{row['frame_index']}"
            assert_alike(row, copy.deepcopy(theirs) | {"id": row["id"], "uri": name}, off=1e-4)


def test_videos_and_pictures_at_once(ask: httpx.Client, clip: bytes, jpegs: list[bytes]) -> None:
    """Each has the rows that it has alone, and each video its own identities."""

    def video(tracker: str | None) -> Any:
        data = {"track": tracker} if tracker else {}
        return ask.post("/v1/annotate", files={"video": clip}, data=data).json()["rows"]

    def picture(data: bytes) -> Any:
        return ask.post("/v1/annotate", files={"image": data}).json()

    trackers = ["tracktrack", "bytetrack", None]
    alone = [*map(video, trackers), *map(picture, jpegs[:9])]
    with ThreadPoolExecutor(12) as pool:
        together = [*pool.map(video, trackers), *pool.map(picture, jpegs[:9])]
    assert together == alone
    assert [one["track_id"] for one in alone[0][-1]["detections"]] != [None] * len(alone[2][-1]["detections"])
    assert not any(one["track_id"] for row in alone[2] for one in row["detections"])


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def test_videos_that_are_refused(ask: httpx.Client, clip: bytes, jpegs: list[bytes]) -> None:
    """With the reason; of a damaged one, the rows of what could be decoded come with it."""

    def refused(data: bytes) -> tuple[int, str, Any]:
        body = ask.post("/v1/annotate", files={"video": data}).json()
        return body["status"], body["detail"], body.get("rows")

    assert refused(jpegs[0])[0] == 415
    assert refused(sound())[:2] == (422, "no video among the streams of the file (audio)")
    small = np.zeros((64, 64, 3), np.uint8)
    status, words, _ = refused(encode([small] * 101))
    assert status == 413 and "101 frames" in words and "fps" in words
    whole = encode(panned(np.asarray(Image.open(io.BytesIO(jpegs[0])).convert("RGB")), 24), "mpegts", "mpeg2video")
    status, words, rows = refused(whole[: len(whole) // 2])
    assert status == 422 and words == rows[-1]["error"]["message"]
    assert 1 < len(rows) < 24 and all(row["detections"] and not row["error"] for row in rows[:-1])


def video_of(data: bytes, load: Load | None = None, **limits: Any) -> Video:
    load = load or Load(Storage({}))
    return Video("v", data, load, **{"seconds": 30, "frames": 300, "pixels": 1_000_000} | limits)


class Undecoded(Load):
    def frames(self, record: Any) -> Any:
        raise AssertionError("it was decoded")


def slow_frames(count: int) -> bytes:
    """A frame a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(count):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("format, decoded", [("mp4", False), ("matroska", False), ("avi", True)])
@pytest.mark.parametrize(
    "limits, sampling, type",
    [
        ({"frames": 19}, Sampling(), "TooManyFrames"),
        ({"frames": 4}, Sampling(every=4), "TooManyFrames"),
        ({"seconds": 0.7}, Sampling(), "TooManySeconds"),
        ({"pixels": 64 * 48 - 1}, Sampling(), "TooManyPixels"),
        ({"frames": 20, "seconds": 0.8, "pixels": 64 * 48}, Sampling(), None),
    ],
)
def test_limits_of_a_video(format: str, decoded: bool, limits: Any, sampling: Sampling, type: str | None) -> None:
    """Known before anything is decoded, where the file's packets tell; else while it is decoded."""
    codec = "mpeg4" if format == "avi" else "libx264"
    data = encode([np.zeros((48, 64, 3), np.uint8)] * 20, format, codec)
    kind = Load if decoded or type is None else Undecoded
    video = video_of(data, kind(Storage({}), sampling=sampling), **limits)
    if type is None:
        assert sum(len(table) for table in video.tables()) == 20
        return
    with pytest.raises(Failure) as failure:
        list(video.tables())
    assert failure.value.type == type


def test_hostile_videos() -> None:
    """A hundred streams, a frame that lasts for days, and thousands of frames in a few bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(100)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
            container.mux(stream.encode())
    assert sum(len(table) for table in video_of(file.getvalue()).tables()) == 1
    with pytest.raises(Failure, match="at most 30 s"):
        list(video_of(slow_frames(100), Undecoded(Storage({}))).tables())
    many = encode([np.zeros((16, 16, 3), np.uint8)] * 3000, x264opts="scenecut=0")
    assert len(many) < 200_000
    with pytest.raises(Failure, match="at most 300 of a video"):
        list(video_of(many, Undecoded(Storage({})), seconds=1000).tables())


@dataclass(frozen=True)
class Fatal(Load):
    """Writes the id of its process to a file, and then dies or never ends."""

    pid: str = ""
    dies: bool = False

    def frames(self, record: Any) -> Any:
        Path(self.pid).write_text(str(os.getpid()))
        if self.dies:
            os.kill(os.getpid(), signal.SIGSEGV)
        while True:
            yield from super().frames(record)


def test_a_decoder_that_dies_or_never_ends(one_ray: str, clip: bytes, tmp_path: Path) -> None:
    """Its process alone dies, or is killed with the request that is late."""

    async def rows(dies: bool) -> None:
        load = Fatal(Storage({}), size=1 << 20, pid=str(tmp_path / "pid"), dies=dies)
        async with asyncio.timeout(None if dies else 10):
            async for _ in read(video_of(clip, load, frames=10**9)):
                pass

    with pytest.raises(Failure, match="process that decoded the video died"):
        asyncio.run(rows(dies=True))
    with pytest.raises(TimeoutError):
        asyncio.run(rows(dies=False))
    within(30, lambda: not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists())


def test_more_videos_than_are_processed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond max_videos are told so immediately, and make place again."""
    from serve.service import Gateway

    gateway = Gateway(Arguments(max_videos=2), {}, [], {})

    async def all_at_once() -> list[Any]:
        open_ = asyncio.Event()

        async def frames(*_: Any) -> Any:
            await open_.wait()
            yield Load.table([])

        monkeypatch.setattr(gateway, "_selected", lambda options: {})
        monkeypatch.setattr(gateway, "_video", lambda *_: None)
        monkeypatch.setattr(gateway, "_detected", frames)
        asked = [asyncio.create_task(gateway.rows("v", b"", VideoOptions())) for _ in range(3)]
        await asyncio.sleep(0)
        open_.set()
        return await asyncio.gather(*asked, gateway.rows("v", b"", VideoOptions()), return_exceptions=True)

    found = asyncio.run(all_at_once())
    assert [one.status if isinstance(one, Problem) else one for one in found] == [[], [], 429, []]
    assert gateway.videos == 0


def test_options_of_a_video() -> None:
    """As the job's: conf is lower with a tracker, and a request's sampling takes the place of the server's."""
    served = Arguments(yolo="a.pt", fps=2)  # type: ignore[call-arg]
    assert options(served, VideoOptions, {}).fps == 2
    assert options(served, VideoOptions, {"every": "5"}) == VideoOptions(every=5)
    assert [options(served, VideoOptions, given).thresholds[0] for given in ({}, {"track": "botsort"})] == [0.25, 0.1]
    assert options(served, VideoOptions, {"track": "botsort", "conf": 0.3}).thresholds[0] == 0.3


def test_videos_are_in_the_api_document(ask: httpx.Client) -> None:
    annotate = ask.get("/openapi.json").json()["paths"]["/v1/annotate"]["post"]
    content = annotate["requestBody"]["content"]
    assert {"image", "video", "track", "fps"} <= set(content["multipart/form-data"]["schema"]["properties"])
    assert "video/mp4" in content and {"413", "415", "422", "429", "504"} <= set(annotate["responses"])
    assert "30 s" in annotate["description"] and "100 frames" in annotate["description"]


@pytest.mark.parametrize(
    "error, status",
    [(Unavailable("slow"), 503), (NoAccess("no key"), 503), (Rejected("too long"), 422), (PermissionError(), 422)],
)
def test_errors_of_a_store(error: Exception, status: int) -> None:
    """What may pass may be tried again; a bug of ours is neither the store's fault nor the client's."""
    arguments = Arguments(allowed_prefixes=["s3://served"])
    with pytest.raises(Problem) as problem:
        asyncio.run(Pictures(arguments, Mock(size=Mock(side_effect=error))).fetch("s3://served/a.jpg"))
    assert problem.value.status == status
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Pictures(arguments, Mock(size=Mock(side_effect=ZeroDivisionError))).fetch("s3://served/a.jpg"))


@pytest.mark.parametrize(
    "request_, status, words",
    [
        ({"files": {"image": b"no picture"}}, 415, "no picture format"),
        ({"files": {"image": b""}}, 422, "no bytes"),
        ({"files": {"image": bytes(5 << 20)}}, 413, "at most"),
        ({"files": {"file": b"x"}}, 422, "a file named 'image' or 'video': its file is named 'file'"),
        ({"files": {"x": b""}, "data": {"image": "data:"}}, 422, "send a file"),
        ({"files": {"video": b"x"}}, 415, "no video format"),
        ({"files": {"video": b""}}, 415, "no bytes"),
        ({"files": {"video": bytes(7 << 20)}}, 413, "at most 6,291,456"),
        ({"json": {"video": data_uri(bytes(5 << 20))}}, 413, "at most 6,291,456"),
        ({"json": {"image": data_uri(bytes(4300 << 10))}}, 413, "at most 4,194,304"),
        ({"content": bytes(5 << 20), "headers": {"content-type": "image/jpeg"}}, 413, "at most 4,194,304"),
        ({"files": {"image": ("a.mp4", b"x", "video/mp4")}}, 415, "send it as video"),
        ({"content": b"x", "headers": {"content-type": "video/mp4"}}, 415, "no video format"),
        ({"json": {"video": "s3://elsewhere/a.mp4"}}, 422, "data:video/mp4"),
        ({"json": {"video": "data:", "image": "data:"}}, 422, "video: unknown"),
        ({"files": {"video": b"x"}, "data": {"track": "sort"}}, 422, "no tracker sort: choose from botsort"),
        ({"files": {"video": b"x"}, "data": {"fps": "1", "every": "2"}}, 422, "give one of them"),
        ({"files": {"video": b"x"}, "data": {"fps": "0"}}, 422, "fps: "),
        ({"files": {"image": b"x"}, "data": {"fps": "1"}}, 422, "fps: unknown: choose from conf"),
        ({"content": b"x", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415, "image/jpeg"),
        ({"content": b"x", "headers": {"content-type": "image/jpeg", "content-encoding": "br"}}, 415, "gzip"),
        (
            {"content": b"no gzip", "headers": {"content-type": "image/jpeg", "content-encoding": "gzip"}},
            400,
            "not packed",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"--b", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 422, "lacks a file"),
        ({"content": b"[" * 50_000, "headers": {"content-type": "application/json"}}, 422, "not JSON"),
        ({"json": [1]}, 422, "JSON object"),
        ({"files": {"image": b"x"}, "params": {"conf": [0.1, 0.2]}}, 422, "conf: given 2 times"),
        ({"files": {"image": b"x"}, "params": {"conf": 0.1}, "data": {"conf": "0.1"}}, 422, "in the body"),
        ({"files": {"image": b"x"}, "params": {"imgsz": 320}}, 422, "imgsz: unknown: choose from conf"),
        ({"files": {"image": b"x"}, "data": {"max_tokens": "257"}}, 422, "at most 256"),
        ({"files": {"image": b"x"}, "data": {"conf": "2"}}, 422, "conf"),
        ({"files": {"image": b"x"}, "data": {"confidence": "0.2"}}, 422, "confidence: unknown: choose from conf,"),
        ({"files": {"image": b"x"}, "data": {"classes": str(2**63)}}, 422, "classes"),
        ({"files": {"image": b"x"}, "data": {"prompt": "detect"}}, 422, "lacks its rest"),
        ({"content": b"x"}, 415, "multipart/form-data"),
        ({"json": {}}, 422, "image"),
        ({"json": {"image": "data:image/png;base64,%%%"}}, 422, "data uri"),
        ({"json": {"image": "file:///etc/passwd"}}, 422, "data: uri"),
        ({"json": {"image": "http://169.254.169.254/latest/meta-data"}}, 422, "data: uri"),
        ({"json": {"image": "s3://elsewhere/a.jpg"}}, 422, "allows"),
        ({"files": {"image": b"x"}, "headers": {"origin": "https://elsewhere.example"}}, 403, "another site"),
        ({"files": {"image": b"x"}, "headers": {"origin": "null"}}, 403, "another site"),
        ({"files": {"image": b"x"}, "headers": {"origin": "http://[bad"}}, 400, "Origin"),
        ({"files": {"image": b"x"}, "headers": {"host": "[::1"}}, 400, "Host"),
        ({"files": {"image": b"x"}, "headers": {"host": "a:b"}}, 400, "Host"),
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


def test_load_balancers_ask_with_head(ask: httpx.Client) -> None:
    """What GET would say of it, without the body."""
    for path in ("/", "/healthz", "/v2/health/ready", "/v1/models", "/docs", "/openapi.json", "/page/page.js"):
        head, whole = ask.head(path), ask.get(path)
        assert head.status_code == 200 and not head.content, path
        assert head.headers["content-length"] == str(len(whole.content)), path
    refused = ask.head("/v1/annotate")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    assert ask.options("/v1/annotate").headers["allow"] == "OPTIONS, POST"
    assert ask.options("/healthz").headers["allow"] == "GET, HEAD, OPTIONS"


def test_a_frontend_of_ones_own(ask: httpx.Client, jpegs: list[bytes]) -> None:
    """Its site in allowed_origins, browsers let its pages read answers and refusals; other sites' pages are refused."""
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = ask.options("/v1/annotate", headers=asks | {"origin": FRONTEND})
    assert preflight.status_code == 204 and "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    assert ask.options("/v1/annotate", headers=asks | {"origin": FRONTEND + ".evil"}).status_code == 403
    for picture, status in ((jpegs[0], 200), (b"none", 415), (bytes(5 << 20), 413)):
        response = ask.post("/v1/annotate", files={"image": picture}, headers={"origin": FRONTEND})
        assert response.status_code == status
        for one in (preflight, response):
            assert one.headers["access-control-allow-origin"] == FRONTEND and one.headers["vary"] == "origin"


@pytest.mark.parametrize("path", ["", "/healthz", "/page/page.js", "/page/%00", "/page/" + "a" * 5000, "/%ff", "//a/"])
@pytest.mark.parametrize("name", ["x-request-id", "serve_multiplexed_model_id", "range", "if-modified-since", "cookie"])
def test_requests_that_make_no_sense(service: str, path: str, name: str) -> None:
    """Paths and headers of bytes that are no text, or that mean nothing: never an error of the server's own."""
    host, port = service.removeprefix("http://").split(":")
    for value in (b"\xff\xfe", b"bytes=9-1", b"bytes=" + b"9" * 5000 + b"-"):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"GET {path or '/'} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n{name}: "
            connection.sendall(head.encode() + value + b"\r\n\r\n")
            status = int(connection.makefile("rb").readline().split()[1])
        assert status < 500, value


@pytest.mark.parametrize(
    "asked, prefix, root_path, inside",
    [
        ("/vision/healthz", "/vision", "", "/healthz"),  # Serve's route_prefix
        ("/healthz", "", "/vision", "/healthz"),  # a proxy in front has removed the path
        ("/vision/healthz", "", "/vision", "/healthz"),  # a proxy in front has left it
        ("/vision/healthz", "/vision", "/public", "/healthz"),
        ("/visions", "", "/vision", "/visions"),
        ("/vision", "", "/vision", ""),
    ],
)
def test_under_a_path_behind_a_proxy(asked: str, prefix: str, root_path: str, inside: str) -> None:
    """Keys are asked for by the path within the application, and its links lead to where callers find it."""
    seen: list[Any] = []

    async def looks(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope = {"type": "http", "method": "GET", "path": asked, "root_path": prefix, "headers": [], "client": None}
    guard = _guard(looks, root_path=root_path)
    asyncio.run(guard(scope | {"headers": [(b"authorization", b"Bearer one")]}, None, None))
    root = root_path or prefix
    assert seen[0]["path"] == root + inside and seen[0]["root_path"] == root


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
    limits = Arguments(**{"max_bytes": 100, "max_video_bytes": 100, "deadline": 5.0, "max_concurrent": 2} | changed)
    return Guard(app, limits, [digest("one"), digest("two")], [])


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
    for length in ("abc", "-1", "٣", "1_0", ""):
        assert asyncio.run(_through(_guard(), key | {"content-length": length}, []))[0]["status"] == 400, length
    assert asyncio.run(_through(_guard(), key | {"content-length": "9" * 5000}, []))[0]["status"] == 413
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
    """As a 500 with the request's id."""
    from serve.app import asgi
    from serve.service import Gateway

    async def fails(*_: Any) -> Any:
        raise ZeroDivisionError("of the inside")

    gateway = Gateway(Arguments(), {}, [], {})
    monkeypatch.setattr(gateway, "row", fails)
    transport = httpx.ASGITransport(asgi(gateway))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/v1/annotate", json={"image": EXAMPLE})

    response = asyncio.run(ask())
    assert response.status_code == response.json()["status"] == 500 and "inside" not in response.text
    assert response.headers["content-type"] == "application/problem+json"


KEY = {"authorization": "Bearer one", "host": "a"}


def test_more_requests_than_are_processed() -> None:
    """Those beyond max_concurrent are told so immediately."""

    async def all_at_once() -> list[int]:
        guard = _guard(_late, deadline=1.0)
        sent = await asyncio.gather(*(_through(guard, KEY, [b"x"], more=False) for _ in range(5)))
        assert not guard.processed and not guard.arriving
        return sorted(each[0]["status"] for each in sent)

    assert asyncio.run(all_at_once()) == [429, 429, 429, 504, 504]


def test_slow_senders_hold_up_nobody() -> None:
    """A request counts once its body has arrived; only a crowd of slow senders is told that they are too many."""

    async def among_slow_ones() -> tuple[int, list[int]]:
        guard = _guard(deadline=1.0)
        slow = [asyncio.create_task(_through(guard, KEY, [b"x"])) for _ in range(6)]
        await asyncio.sleep(0)
        whole = await _through(guard, KEY, [b"x"], more=False)
        more = [asyncio.create_task(_through(guard, KEY, [b"x"])) for _ in range(3)]
        sent = await asyncio.gather(*slow, *more)
        return whole[0]["status"], sorted(each[0]["status"] for each in sent)

    status, slow = asyncio.run(among_slow_ones())
    assert status == 200 and slow == [408] * 8 + [429]


async def _late(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers too late."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.Event().wait()


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
def test_what_the_proxy_says_of_a_gateway_that_is_not_there(says: int | None, status: int) -> None:
    """Nothing, or plain words of its own; and it is read from without an end. Callers get a problem all the same."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if says == 413:
            while (await receive())["type"] != "http.disconnect":
                pass
        elif says:
            kind = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": says, "headers": kind})
            await send({"type": "http.response.body", "body": b"ActorDiedError: pid=7, ip=10.0.0.1"})

    parts = [bytes(1 << 20)] * ((MAX_BODY_BYTES >> 20) + 8)
    start, body = asyncio.run(_through(ProxyProblems(proxy), {"x-request-id": "mine"}, parts))
    problem = json.loads(body["body"])
    assert start["status"] == problem["status"] == status and problem["instance"] == "urn:request:mine"
    assert "pid" not in problem["detail"] and dict(start["headers"])[b"content-type"] == b"application/problem+json"


@pytest.mark.parametrize("gpus, memory", [(0.0, 0.9), (0.5, 0.45), (1.0, 0.9), (2.0, 0.9)])
def test_replicas_divide_the_memory_of_a_gpu(gpus: float, memory: float) -> None:
    """Of two that share one, each would else take nine tenths of it, and the second would not start."""
    from serve.app import app

    application = app(Arguments(yolo=str(WEIGHTS / "detect.pt"), paligemma=[str(WEIGHTS / "paligemma")], gpus=gpus))
    handles = application._bound_deployment.init_args[3]
    assert handles["paligemma"]._bound_deployment.init_args[0]["memory"] == pytest.approx(memory)
