"""Locust's clients for benchmarks.service: each asks one thing after the other, one request every REST seconds.

By FORM: none, the service's own, one picture at /v1/annotate or EACH at a time by the Open Inference Protocol; files,
EACH in a form, as the peers take them; chat, a picture and PROMPT by OpenAI's protocol, for an answer of TOKENS.
"""

import base64
import json
import os
import struct
from pathlib import Path

import httpx
from locust import FastHttpUser, constant_throughput, task

REST = float(os.environ["REST"])  # 0: as soon as it is answered
FORM = os.environ.get("FORM", "")
PROMPT = os.environ.get("PROMPT", "")
TOKENS = int(os.environ.get("TOKENS", "0"))
EACH = int(os.environ.get("EACH", "1"))


def _bodies() -> list[tuple[str, bytes, dict[str, str]]]:
    """(path, body, headers) of each request."""
    pictures = [path.read_bytes() for path in sorted(Path(os.environ["PICTURES"]).iterdir())]
    groups = [pictures[start : start + EACH] for start in range(0, len(pictures) - EACH + 1, EACH)]
    if FORM == "chat":
        return [_chat(group) for group in groups]
    if FORM == "files":
        return [_files("/predict", group) for group in groups]
    return [_tensor(group) if EACH > 1 else _files("/v1/annotate", group) for group in groups]


def _files(path: str, pictures: list[bytes]) -> tuple[str, bytes, dict[str, str]]:
    data = {"prompt": PROMPT} if PROMPT else {}
    files = [("image", ("picture.jpg", picture)) for picture in pictures]
    request = httpx.Request("POST", "http://a", files=files, data=data)
    return path, request.read(), {"content-type": request.headers["content-type"]}


def _chat(pictures: list[bytes]) -> tuple[str, bytes, dict[str, str]]:
    uris = [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
    content = [{"type": "text", "text": PROMPT}, *({"type": "image_url", "image_url": {"url": uri}} for uri in uris)]
    asked = {"model": "paligemma", "temperature": 0, "max_tokens": TOKENS}
    body = json.dumps(asked | {"messages": [{"role": "user", "content": content}]}).encode()
    return "/v1/chat/completions", body, {"content-type": "application/json"}


def _tensor(pictures: list[bytes]) -> tuple[str, bytes, dict[str, str]]:
    raw = b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(pictures)]}
    outputs = [{"name": name} for name in ("image", "boxes", "scores", "class_ids", "labels")]
    head = json.dumps(
        {"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}], "outputs": outputs}
    ).encode()
    return "/v2/models/yolo/infer", head + raw, {"inference-header-content-length": str(len(head))}


BODIES = _bodies()


class Client(FastHttpUser):
    wait_time = constant_throughput(1 / REST) if REST else lambda _: 0
    network_timeout = connection_timeout = 600.0  # as all are answered, or refused
    number = 0

    def on_start(self) -> None:
        Client.number += 1
        self.next = Client.number * 7

    @task
    def annotate(self) -> None:
        path, body, headers = BODIES[self.next % len(BODIES)]
        self.next += 1
        with self.client.post(path, data=body, headers=headers, catch_response=True) as response:
            response.request_meta["name"] = str(response.status_code)
            response.success()  # what it is, its name says
