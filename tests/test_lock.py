"""One run at a time: runs that want the same output, and a run that was paused while another took over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from shardsight.object_stores import Unavailable
from shardsight.results import lock as locks
from shardsight.results.lock import Busy, Claim, Lost, lock
from shardsight.results.writer import Results
from shardsight.storage import Storage, StorageError
from tests.conftest import ROOT, S3, S3_KEY, S3_SECRET, place
from tests.test_results import rows

# A run in a process of its own that can be stopped: it holds the lock, and writes whenever it is told to.
RUN = """
import json, sys
from shardsight.results import lock
from shardsight.results.writer import Results
from shardsight.storage import Storage
lock.HEARTBEAT = 1.5
out, options = sys.argv[1], json.loads(sys.argv[2])
with Results(out, Storage(options)).locked() as results:
    print("holds", flush=True)
    for line in sys.stdin:
        try:
            results.save_job({"by": "the paused one"})
            print("written", flush=True)
        except lock.Lost as error:
            print(error, flush=True)
"""


@pytest.fixture(params=["rclone", "moto", "gcs"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, str]:
    """A store, and a prefix in it; rclone's server ignores conditional writes, the others support them."""
    monkeypatch.setattr(locks, "HEARTBEAT", 1.5)
    if request.param == "rclone":
        s3: S3 = request.getfixturevalue("s3")
        s3.bucket("bucket")
        storage = Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET})
    else:
        storage = request.getfixturevalue(request.param)
    out = f"{'gs' if request.param == 'gcs' else 's3'}://bucket/{request.node.originalname}/out"
    storage.write(f"{out}/job.json", b"{}")  # rclone hangs at times where a folder is made and removed at once
    return storage, out


@contextmanager
def running(storage: Storage, out: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `out`."""
    command = [sys.executable, "-c", RUN, out, json.dumps(storage.options)]
    run = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert answer(run) == "holds"
        yield run
    finally:
        run.kill()
        run.communicate()


def answer(run: subprocess.Popen[str]) -> str:
    assert run.stdout
    return run.stdout.readline().strip()


def ask(run: subprocess.Popen[str]) -> str:
    assert run.stdin
    print("write", file=run.stdin, flush=True)
    return answer(run)


def locked(storage: Storage, out: str) -> list[bytes]:
    """The contents of the objects that lock an output."""
    uris = [f"{out}/.lock", *Claim(out, "", conditional=False).runs(storage)]
    return [storage.read(uri) for uri in uris if storage.exists(uri)]


def test_of_runs_that_start_together_one_gets_the_lock(output: tuple[Storage, str]) -> None:
    storage, out = output
    outcomes: list[str] = []
    together, release = threading.Barrier(3), threading.Event()

    def run() -> None:
        together.wait()
        try:
            with lock(out, storage):
                outcomes.append("in")
                release.wait(60)
        except Busy:
            outcomes.append("busy")
            release.set() if outcomes.count("busy") == 2 else None

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["busy", "busy", "in"]
    began = time.monotonic()
    with lock(out, storage):  # what the others left behind does not count as a running job
        assert time.monotonic() - began < 60
    assert not storage.is_folder(f"{out}/lock")


@pytest.mark.parametrize("output", ["rclone", "moto"], indirect=True)  # one of each kind of lock
def test_the_lock_of_a_killed_run_is_taken_over(output: tuple[Storage, str]) -> None:
    storage, out = output
    with running(storage, out) as run:
        with pytest.raises(Busy, match="another run is writing"), lock(out, storage):
            pass
        run.kill()
        run.wait()
        with lock(out, storage):
            pass


def test_a_paused_run_learns_that_it_lost_its_lock(output: tuple[Storage, str]) -> None:
    """When a laptop or a virtual machine was suspended, another run may have written in the meantime: rows would be
    there twice, and job.json would be overwritten."""
    storage, out = output
    with running(storage, out) as run:
        assert ask(run) == "written"
        os.kill(run.pid, signal.SIGSTOP)
        with suppress(Busy), lock(out, storage):  # a renewal may have been on its way, which shows that it is alive
            pass
        with Results(out, storage).locked() as results:
            results.save_job({"by": "the other"})
            os.kill(run.pid, signal.SIGCONT)
            assert "lost its lock" in ask(run)
        assert "lost its lock" in ask(run)  # even when the other has ended
        assert storage.read(f"{out}/job.json") == b'{\n  "by": "the other"\n}'
        with pytest.raises(Lost):
            assert results.claim
            Claim(out, "paused", results.claim.conditional).check(storage)


@pytest.mark.parametrize("output", ["rclone", "moto"], indirect=True)  # one of each kind of lock
def test_a_paused_run_goes_on_if_no_other_started(output: tuple[Storage, str]) -> None:
    """A suspended laptop must not end the only job that writes to an output."""
    storage, out = output
    with running(storage, out) as run:
        os.kill(run.pid, signal.SIGSTOP)
        time.sleep(3.5)
        before = locked(storage, out)
        os.kill(run.pid, signal.SIGCONT)
        assert ask(run) == "written"
        while locked(storage, out) == before:  # until it has renewed its lock: it would give way to one that starts
            time.sleep(0.1)
        with pytest.raises(Busy), lock(out, storage):
            pass


class Unanswered(Storage):
    """Its conditional writes succeed, and their responses are lost."""

    def write_if(self, uri: str, data: bytes, tag: str) -> str:
        super().write_if(uri, data, tag)
        raise Unavailable("no response")


@pytest.mark.parametrize("output", ["moto", "gcs"], indirect=True)  # which support conditional writes
def test_a_lost_response_does_not_cost_the_lock(output: tuple[Storage, str]) -> None:
    """A run that stopped renewing after one lost response would be taken for dead while it still writes."""
    storage, out = output
    held = locks._ConditionalLock(Claim(out, "this", conditional=True), storage)
    assert held.acquire()
    for go_on, state in [(lambda: held.renew(storage), "holding"), (held.release, "released")]:
        for _ in range(2):
            with pytest.raises(Unavailable):
                held.renew(Unanswered(storage.options, retry_seconds=0.0))
        before = json.loads(storage.read(f"{out}/.lock"))
        go_on()
        after = json.loads(storage.read(f"{out}/.lock"))
        assert after["state"] == state and after != before


@pytest.mark.parametrize("output", ["moto"], indirect=True)
def test_a_request_that_was_retried_for_long_makes_no_run_look_dead(
    output: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two looks in short succession would take the lock of a run that lives, if the first took a minute."""
    storage, out = output
    holder, other = (locks._ConditionalLock(Claim(out, name, conditional=True), storage) for name in ("one", "two"))
    clock, looks, tag = [0.0], [0], Storage.tag

    def throttled(self: Storage, uri: str) -> str:
        looks[0] += 1
        clock[0] += 60.0 if looks[0] == 1 else 0.0
        if looks[0] == 3:
            holder.renew(storage)
        return tag(self, uri)

    monkeypatch.setattr(locks, "_now", lambda: clock[0])
    assert holder.acquire()
    monkeypatch.setattr(Storage, "tag", throttled)
    assert not other.acquire()


@pytest.mark.parametrize("output", ["rclone"], indirect=True)
def test_a_request_for_another_run_makes_no_run_look_dead(
    output: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each run has an object, the age of one must not count the minute that another's took to be read."""
    storage, out = output
    holder, waiting, other = (locks._ListedLock(Claim(out, name, conditional=False), storage) for name in "abc")
    clock, looks, read = [0.0], [0], Storage.read

    def throttled(self: Storage, uri: str) -> bytes:
        if uri == waiting.claim.uri:
            looks[0] += 1
            if looks[0] == 2:
                clock[0] += 60.0
                holder._write(storage)
        return read(self, uri)

    monkeypatch.setattr(locks, "_now", lambda: clock[0])
    assert holder.acquire()
    waiting._write(storage)
    monkeypatch.setattr(Storage, "read", throttled)
    assert not other.acquire()
    assert storage.exists(holder.claim.uri)


def test_everything_that_writes_checks_the_lock_first(output: tuple[Storage, str]) -> None:
    """Write tasks run in other processes, perhaps on other machines, that were not suspended with the run."""
    storage, out = output
    with Results(out, storage).locked() as results:
        results.write(rows([place("a", 0), place("a", 1)]), 100)
    before = sorted(storage.walk(out))
    error = {"stage": "decode", "type": "X", "message": "m"}
    for write in (
        lambda: results.write(rows([place("a", 2) | {"error": error}]), 100),
        lambda: results.save_job({}),
        lambda: results.drop({"a"}, np.empty(0, "S16")),
        results.clear,
    ):
        with pytest.raises(Lost, match="start it again"):
            write()
    assert sorted(storage.walk(out)) == before


def test_which_stores_support_conditions(s3: S3, moto: Storage, gcs: Storage) -> None:
    s3.bucket("bucket")
    rclone = Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET})
    for storage, out, conditional in [(rclone, "s3", False), (moto, "s3", True), (gcs, "gs", True)]:
        with lock(f"{out}://bucket/honour", storage) as claim:
            assert claim and claim.conditional == conditional


def test_lock_on_disk(tmp_path: Path) -> None:
    with lock(str(tmp_path), Storage()) as claim:
        assert claim is None
        with pytest.raises(Busy), lock(str(tmp_path), Storage()):
            pass
    with lock(str(tmp_path), Storage()):
        pass


def test_an_output_that_cannot_be_locked(tmp_path: Path, moto: Storage) -> None:
    """A lock that may not be written, or is something else, is a wrong request, not a traceback."""
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot be locked .*: choose another --output"), lock(str(tmp_path), moto):
        pass
    moto.write("s3://bucket/copied/.lock", b"")
    with pytest.raises(StorageError, match=r"is not a run's lock .*: remove it"), lock("s3://bucket/copied", moto):
        pass
