"""Machines of a test's own: network namespaces on a bridge, each with its own address, processes and /tmp.

A machine can be cut off and come back, have slow links, and die with all of its processes. Needs root, `ip` and `tc`
(Debian: apt-get install iproute2).
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import BIN

PREFIX = "shards"


def lacking() -> str:
    """What machines need and this one lacks, as one sentence; empty if there is nothing."""
    if os.geteuid():
        return "network namespaces need root: run this as root"
    missing = [name for name in ("ip", "tc") if not shutil.which(name)]
    return f"{' and '.join(missing)} are missing: apt-get install iproute2" if missing else ""


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


class Machine:
    """A namespace. address: its own. folder: its /tmp, in which `shared` is the one folder that all machines have."""

    def __init__(self, name: str, address: str, link: str, folder: Path, shared: Path) -> None:
        self.name, self.address, self.link, self.folder, self.shared = name, address, link, folder, shared
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process on the machine; what it says is in its /tmp/log."""
        for name in ("shared", "nodes"):
            (self.folder / name).mkdir(exist_ok=True)
        # Its processes see no others: Ray looks for a node on the same machine among all processes.
        alone = ["ip", "netns", "exec", self.name, "unshare", "--pid", "--fork", "--mount-proc"]
        mount = 'mount --bind "$1" "$2/shared" && mount --rbind "$2" /tmp && shift 2 && exec "$@"'
        inside = ["sh", "-c", mount, "sh", str(self.shared), str(self.folder), *map(str, command)]
        # Ray's folder is not /tmp/ray, by which its processes could be taken for those of another cluster.
        own = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/tmp", "RAY_TMPDIR": "/tmp/nodes"}
        with (self.folder / "log").open("ab") as log:
            environment = own | (env or {})
            process = subprocess.Popen([*alone, *inside], stdout=log, stderr=log, env=environment, cwd="/")
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name, check=False).split()]

    def runs(self, name: str) -> bool:
        """Whether one of its processes has this name."""
        for pid in self.pids():
            with suppress(OSError):  # it has ended
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    return True
        return False

    def kill(self) -> None:
        """As when it loses its power: every process at once."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        for process in self.started:
            process.wait()

    def cut(self) -> None:
        """No packet comes or goes, and nobody is told."""
        ip("link", "set", self.link, "down")

    def restore(self) -> None:
        ip("link", "set", self.link, "up")

    def limit(self, megabits: float) -> None:
        """The rate at which the machine sends, a second, until `unlimit`. Kernels without netem can do no delays."""
        rate = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms"]
        self._tc("replace", "dev", "eth0", "root", "tbf", *rate)

    def unlimit(self) -> None:
        self._tc("delete", "dev", "eth0", "root")

    def _tc(self, *arguments: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, "tc", "qdisc", *arguments], check=True)


class Network:
    """A bridge of this process, with an address for the test itself, and the machines on it."""

    def __init__(self, folder: Path) -> None:
        self.id, self.folder, self.shared = f"{PREFIX}{os.getpid()}", folder, folder / "shared"
        self.shared.mkdir(parents=True)
        self.net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.machines: list[Machine] = []
        ip("link", "add", f"br{os.getpid()}", "type", "bridge")
        ip("address", "add", f"{self.net}.1/24", "dev", f"br{os.getpid()}")
        ip("link", "set", f"br{os.getpid()}", "up")

    def machine(self, name: str) -> Machine:
        """A new machine. name: for its folder and its namespace."""
        number = len(self.machines) + 2
        space, link = f"{self.id}-{number}-{name}", f"v{os.getpid()}-{number}"
        folder = self.folder / f"{number}-{name}"
        folder.mkdir()
        machine = Machine(space, f"{self.net}.{number}", link, folder, self.shared)
        self.machines.append(machine)
        ip("netns", "add", space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", f"br{os.getpid()}", "up")
        ip("-n", space, "address", "add", f"{machine.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        ip("-n", space, "route", "add", "default", "via", f"{self.net}.1")  # by which Ray finds a machine's own address
        return machine

    def remove(self) -> None:
        for machine in self.machines:
            machine.kill()
            ip("netns", "delete", machine.name, check=False)
            ip("link", "delete", machine.link, check=False)
        ip("link", "delete", f"br{os.getpid()}", check=False)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Removed at the end, with every process; and so is what a test that was killed itself left behind."""
    _remove_dead()
    made = Network(folder)
    try:
        yield made
    finally:
        made.remove()


def _remove_dead() -> None:
    spaces = [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(PREFIX)]
    for space in spaces:
        pid = space.removeprefix(PREFIX).partition("-")[0]
        if not psutil.pid_exists(int(pid)):
            Machine(space, "", "", Path(), Path()).kill()
            ip("netns", "delete", space, check=False)
            ip("link", "delete", f"br{pid}", check=False)
