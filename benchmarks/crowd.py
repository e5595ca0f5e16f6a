"""Locust's clients for benchmarks.service: each asks for one picture after the other, once a REST seconds."""

import os
from pathlib import Path

import httpx
from locust import FastHttpUser, constant_throughput, task

REST = float(os.environ["REST"])  # 0: as soon as it is answered
PROMPT = os.environ.get("PROMPT", "")


def _bodies() -> list[tuple[bytes, str]]:
    found = []
    for path in sorted(Path(os.environ["PICTURES"]).iterdir()):
        data = {"prompt": PROMPT} if PROMPT else {}
        request = httpx.Request("POST", "http://a", files={"image": (path.name, path.read_bytes())}, data=data)
        found.append((request.read(), request.headers["content-type"]))
    return found


BODIES = _bodies()


class Client(FastHttpUser):
    wait_time = constant_throughput(1 / REST) if REST else lambda _: 0
    number = 0

    def on_start(self) -> None:
        Client.number += 1
        self.next = Client.number * 7

    @task
    def annotate(self) -> None:
        body, kind = BODIES[self.next % len(BODIES)]
        self.next += 1
        headers = {"content-type": kind}
        with self.client.post("/v1/annotate", data=body, headers=headers, catch_response=True) as response:
            response.request_meta["name"] = str(response.status_code)
            response.success()  # what it is, its name says
