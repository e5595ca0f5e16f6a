"""A cluster of Ray nodes with a network namespace each, an S3 server in another, and jobs submitted to it."""

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.service import within
from tests.conftest import BIN, ROOT, S3_KEY, S3_SECRET
from tests.namespaces import Machine, Network, network

OBJECTS, SMALL = 300 << 20, 80 << 20  # bytes of a node's object store; the least that Ray takes is 75 MiB
# Ray Data keeps a job's blocks within half of even the smallest store, so these go to the disk from an eighth on.
SPILLING = {"RAY_object_spilling_threshold": "0.125", "RAY_min_spilling_size": "0"}
NODE = {  # as cluster.yaml's nodes have it, and no reports to Ray's makers
    **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"},
    "OMP_NUM_THREADS": "",
}


class Submitted:
    """A job on its way. log: what `ray job submit` says, which is what the job says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, decoded: Path) -> None:
        self.process, self.log, self.decoded, self.began = process, log, decoded, time.monotonic()

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def code(self, timeout: float = 600) -> int:
        """The job's exit code, once it has ended; -1 if nobody knows, as its node died."""
        self.process.wait(timeout)
        if re.search("Job '.*' succeeded", self.said()):
            return 0
        found = re.findall(r"exit code (\d+)", self.said())
        return int(found[-1]) if found else -1


class Nodes:
    """workers: by name. environment: of Ray's processes. A head that runs no work, as in cluster.yaml."""

    def __init__(self, net: Network, environment: dict[str, str]) -> None:
        self.net, self.workers, self.jobs = net, dict[str, Machine](), 0
        self.environment = NODE | environment
        self.store = net.machine("s3")
        self.bucket = self.store.folder / "s3" / "bucket"
        self.bucket.mkdir(parents=True)
        keys = ("--auth-key", f"{S3_KEY},{S3_SECRET}", "--addr", f"{self.store.address}:9000")
        self.store.run(BIN / "rclone", "serve", "s3", *keys, "--dir-cache-time", "50ms", "/tmp/s3")
        self.head = net.machine("head")
        self.address = f"http://{self.head.address}:8265"
        self._start(self.head, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        within(120, lambda: self.ray("job", "list").returncode == 0, lambda: (self.head.folder / "log").read_text())

    def ray(self, *command: str) -> subprocess.CompletedProcess[str]:
        command = (str(BIN / "ray"), *command, "--address", self.address)
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | self.environment)

    def _start(self, machine: Machine, *options: str, small: bool = False) -> None:
        memory = f"--object-store-memory={(SMALL if small else OBJECTS)}"
        own = (f"--node-ip-address={machine.address}", memory, "--block")
        machine.run("ray", "start", *own, *options, env=self.environment | (SPILLING if small else {}))

    def join(self, name: str, cpus: int = 2, resources: dict[str, float] | None = None, small: bool = False) -> None:
        """Another worker, from a machine that was never there before. small: it has little memory for objects."""
        machine = self.workers[name] = self.net.machine(name)
        self._start(machine, *self._worker(cpus, resources), small=small)

    def _worker(self, cpus: int, resources: dict[str, float] | None) -> list[str]:
        return [
            f"--address={self.head.address}:6379",
            f"--num-cpus={cpus}",
            f"--resources={json.dumps(resources or {})}",
        ]

    def restart(self, name: str) -> None:
        """What the machine ran is gone, and it joins again."""
        self.workers[name].kill()
        self._start(self.workers[name], *self._worker(2, None))

    def kill(self, name: str) -> None:
        self.workers.pop(name).kill()

    def alive(self) -> set[str]:
        """The addresses of the nodes that Ray takes for alive."""
        said = self.ray("list", "nodes", "--format", "json", "--filter", "state=ALIVE", "--limit", "1000").stdout
        return {node["node_ip"] for node in json.loads(said[said.index("[") :])} if "[" in said else set()

    def settle(self) -> None:
        """Wait until the head and all workers, and no others, are there."""
        expected = {machine.address for machine in (self.head, *self.workers.values())}
        within(120, lambda: self.alive() == expected, self.alive)

    def submit(self, *arguments: Any, options: tuple[str, ...] = (), module: str = "tests.chaos.counted") -> Submitted:
        """`ray job submit`, with the store's credentials in the job's runtime environment."""
        self.jobs += 1
        notes, log = f"decoded-{self.jobs}", self.net.folder / f"job-{self.jobs}.log"
        (self.net.shared / notes).touch()
        variables = {"AWS_ENDPOINT_URL": f"http://{self.store.address}:9000", "AWS_DEFAULT_REGION": "us-east-1"}
        variables |= {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET}
        variables |= {"COUNTED": f"/tmp/shared/{notes}"}
        to = [
            "--address",
            self.address,
            "--working-dir",
            ".",
            "--runtime-env-json",
            json.dumps({"env_vars": variables}),
        ]
        command = [BIN / "ray", "job", "submit", *to, *options, "--", "python", "-m", module, *map(str, arguments)]
        with log.open("wb") as said:
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | self.environment)
        return Submitted(process, log, self.net.shared / notes)

    def files(self, out: str) -> int:
        """How many files of results an output in the bucket has so far."""
        return len(list((self.bucket / out / "results").glob("*.parquet")))


@contextmanager
def nodes(folder: Path, **environment: str) -> Iterator[Nodes]:
    """environment: of Ray's processes on all machines."""
    with network(folder) as net:
        yield Nodes(net, environment)
