"""The service as it is deployed: serve/config.yaml on a cluster of its own, and crowds of clients that ask it."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import yaml

from tests.conftest import BIN, ROOT, WEIGHTS, free_port, ray_head


class Deployed:
    """What `serve deploy` and `serve status` do. environment: theirs."""

    def __init__(self, folder: Path, dashboard: str, url: str, **environment: str) -> None:
        self.folder, self.dashboard, self.url, self.environment = folder, dashboard, url, os.environ | environment

    def deploy(self, deployments: Sequence[dict[str, Any]] = (), **arguments: Any) -> None:
        """serve/config.yaml with these arguments; returns as `serve deploy` does, before it is done."""
        config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        config["http_options"] |= {"host": urlsplit(self.url).hostname, "port": urlsplit(self.url).port}
        (application,) = config["applications"]
        application["args"] |= {"yolo": str(WEIGHTS / "detect.pt"), "paligemma": str(WEIGHTS / "paligemma")} | arguments
        application["deployments"] = list(deployments)
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        done = self._serve("deploy", str(path))
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, Any]:
        """Of the application, with its deployments; empty where there is none."""
        said = self._serve("status")
        found: dict[str, Any] = (yaml.safe_load(said.stdout) or {}) if said.returncode == 0 else {}
        return dict(found.get("applications", {}).get("shardsight", {}))

    def _serve(self, *command: str) -> subprocess.CompletedProcess[str]:
        command = (str(BIN / "serve"), *command, "--address", self.dashboard)
        return subprocess.run(command, capture_output=True, text=True, env=self.environment)

    def wait_until_running(self) -> None:
        within(180, lambda: self.status().get("status") == "RUNNING", self.status)


class Service(Deployed):
    """On this machine. metrics: where Prometheus is to scrape them."""

    def __init__(self, head: subprocess.Popen[bytes], folder: Path, dashboard: str, url: str, metrics: str) -> None:
        super().__init__(folder, dashboard, url)
        self.head, self.metrics = head, metrics

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
    """Clients that ask one thing after the other, until the `with` ends. ask: what one asks, by its number.
    key: of the service, theirs."""

    def __init__(
        self, clients: int, ask: Callable[[httpx.Client, int], httpx.Response], url: str, key: str = ""
    ) -> None:
        self.ask, self.url, self.said = ask, url, list[Said]()
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
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
        with httpx.Client(base_url=self.url, timeout=120, headers=self.headers) as client:
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
