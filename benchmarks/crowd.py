"""Locust's clients for benchmarks.service: each asks one thing after the other, once a REST seconds.

For one picture, at /v1/annotate, or for EACH at a time, by the Open Inference Protocol.
"""

import json
import os
import struct
from pathlib import Path

import httpx
from locust import FastHttpUser, constant_throughput, task

REST = float(os.environ["REST"])  # 0: as soon as it is answered
PROMPT = os.environ.get("PROMPT", "")
EACH = int(os.environ.get("EACH", "1"))


def _bodies() -> list[tuple[str, bytes, dict[str, str]]]:
    """(path, body, headers) of each request."""
    pictures = [path.read_bytes() for path in sorted(Path(os.environ["PICTURES"]).iterdir())]
    if EACH > 1:
        groups = [pictures[start : start + EACH] for start in range(0, len(pictures) - EACH + 1, EACH)]
        return [_tensor(group) for group in groups]
    found = []
    for picture in pictures:
        data = {"prompt": PROMPT} if PROMPT else {}
        request = httpx.Request("POST", "http://a", files={"image": picture}, data=data)
        found.append(("/v1/annotate", request.read(), {"content-type": request.headers["content-type"]}))
    return found


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
