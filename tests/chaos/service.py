"""The service as it is deployed: serve/config.yaml on a cluster of its own, and crowds of clients that ask it."""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.conftest import BIN, ROOT, WEIGHTS, free_port, ray_head


class Service:
    """metrics: where Prometheus is to scrape them."""

    def __init__(self, head: subprocess.Popen[bytes], folder: Path, dashboard: str, url: str, metrics: str) -> None:
        self.head, self.folder, self.dashboard, self.url, self.metrics = head, folder, dashboard, url, metrics

    def deploy(self, **arguments: Any) -> None:
        """serve/config.yaml with these arguments; returns as `serve deploy` does, before it is done."""
        config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        port = int(self.url.rpartition(":")[2])
        config["http_options"] = {"host": "127.0.0.1", "port": port}
        (application,) = config["applications"]
        application["args"] |= {"yolo": str(WEIGHTS / "detect.pt"), "paligemma": str(WEIGHTS / "paligemma")} | arguments
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        subprocess.run([BIN / "serve", "deploy", path, "--address", self.dashboard], check=True, capture_output=True)

    def status(self) -> dict[str, Any]:
        """Of the application, with its deployments; empty where there is none."""
        command = [BIN / "serve", "status", "--address", self.dashboard]
        said = subprocess.run(command, capture_output=True, text=True)
        found: dict[str, Any] = (yaml.safe_load(said.stdout) or {}) if said.returncode == 0 else {}
        return dict(found.get("applications", {}).get("shardsight", {}))

    def wait_until_running(self) -> None:
        within(180, lambda: self.status().get("status") == "RUNNING", self.status)

    def replicas(self, name: str) -> list[psutil.Process]:
        """Processes of a deployment: yolo, paligemma, Gateway."""
        return self._processes(f"ServeReplica:shardsight:{name}")

    def memory(self) -> int:
        """MB of Serve's processes, without what they share: Ray's store of objects, mapped by all of them."""
        found = [process.memory_info() for process in self._processes("Serve|ProxyActor")]
        return sum(one.rss - one.shared >> 20 for one in found)

    def _processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.head.pid).children(recursive=True):
            try:
                if re.search(title, " ".join(process.cmdline())):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def within(seconds: float, true: Callable[[], Any], told: Callable[[], Any] = str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, told()
        time.sleep(0.1)


@contextmanager
def running(folder: Path, **arguments: Any) -> Iterator[Service]:
    """A cluster of two CPUs with the service on it."""
    metrics, url = free_port(), f"http://127.0.0.1:{free_port()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.guard:proxy_middleware")
        with ray_head(f"--metrics-export-port={metrics}") as (head, dashboard):
            service = Service(head, folder, dashboard, url, f"http://127.0.0.1:{metrics}/metrics")
            within(60, lambda: _answers(dashboard), lambda: "the dashboard does not come up")
            service.deploy(**arguments)
            service.wait_until_running()
            yield service


def _answers(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.TransportError:
        return False
    return True


@dataclass(frozen=True)
class Said:
    """An answer, by the clock: time.monotonic(). status: 0 where the connection broke."""

    began: float
    ended: float
    status: int
    text: str


class Crowd:
    """Clients that ask one thing after the other, until the `with` ends. ask: what one asks, by its number."""

    def __init__(self, clients: int, ask: Callable[[httpx.Client, int], httpx.Response], url: str) -> None:
        self.ask, self.url, self.said = ask, url, list[Said]()
        self.home = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Crowd":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.home.set()
        for thread in self.threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.home.is_set():
                began = time.monotonic()
                try:
                    response = self.ask(client, number)
                    status, text = response.status_code, response.text
                except httpx.TransportError as error:
                    status, text = 0, repr(error)
                self.said.append(Said(began, time.monotonic(), status, text))
                number += len(self.threads)

    def hear(self, count: int, seconds: float = 120) -> None:
        """Wait for so many good answers to what is asked from now on."""
        now = time.monotonic()
        within(
            seconds,
            lambda: sum(one.began >= now and one.status == 200 for one in list(self.said)) >= count,
            lambda: [one for one in self.said if one.status != 200][-5:],
        )

    @property
    def failed(self) -> list[Said]:
        return [one for one in self.said if one.status != 200]


def pictures(jpegs: Sequence[bytes], prompt: str = "") -> Callable[[httpx.Client, int], httpx.Response]:
    """Asks for one picture after the other."""

    def ask(client: httpx.Client, number: int) -> httpx.Response:
        data = {"prompt": prompt} if prompt else {}
        return client.post("/v1/annotate", files={"image": jpegs[number % len(jpegs)]}, data=data)

    return ask
