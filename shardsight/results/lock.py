"""One run at a time for an output: on disks by a lock of the kernel's, in stores by an object that is renewed.

Whoever writes for a run of a store checks first that the run still holds its output: a run that was paused, or cut off
from the store, for longer than LIVES heartbeats is taken for dead, and another may have begun.
"""

import fcntl
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from shardsight.storage import Storage, StorageError, explain, is_remote
from shardsight.stores import Changed, MissingObject, Rejected

HEARTBEAT = 2.0  # seconds between the renewals of a lock in a store
LIVES = 3  # heartbeats without a renewal, after which a run is taken for dead


class Busy(StorageError):
    """Another run is writing to the same output."""


class Lost(StorageError):
    """The run no longer holds its output."""


@dataclass(frozen=True)
class Claim:
    """That a run holds an output in a store. It travels to each process that writes for the run.

    out: the output. name: of the run. conditional: whether the store honours conditional writes; the lock is then one
    object, else each run has an object of its own.
    """

    out: str
    name: str
    conditional: bool

    @property
    def lock(self) -> str:
        """The uri of the lock, where the store honours conditional writes."""
        return f"{self.out.rstrip('/')}/.lock"

    @property
    def folder(self) -> str:
        """Of the runs' objects, where it does not."""
        return f"{self.out.rstrip('/')}/lock"

    @property
    def own(self) -> str:
        return f"{self.folder}/{self.name}"

    def check(self, storage: Storage) -> None:
        """Raises Lost. One request: a GET of the lock, or a listing that holds this run's object alone."""
        if self.conditional:
            state = _state(storage, self.lock) or {}
            held = state.get("name") == self.name and state["state"] == "holding"
        else:
            uris = [entry.uri for entry in storage.walk(self.folder)]
            others = (_state(storage, uri) for uri in uris if uri != self.own)
            held = self.own in uris and not any(other and other["state"] == "holding" for other in others)
        if not held:
            raise Lost(
                f"this run was paused or cut off from the store, and lost its lock on {self.out}: "
                "start it again once no other run writes there"
            )


@contextmanager
def lock(out: str, storage: Storage) -> Iterator[Claim | None]:
    """Keep other runs out of an output folder, which is there, or prefix. Yields what its writers have to check, in a
    store. Raises Busy; what a killed run left behind keeps nobody out.

    On a disk the lock is flock's: a network file system that does not hand it on to its server (NFS mounted with
    `nolock`) keeps out the runs of the same machine only.
    """
    busy = f"another run is writing to {out}: wait for it, or choose another --output"
    if not is_remote(out):
        with open(f"{out}/.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends
            except BlockingIOError:
                raise Busy(busy) from None
            except OSError as error:
                raise StorageError(f"{out} cannot be locked ({error}): choose an --output on another disk") from error
            yield None
        return
    name, stop = uuid.uuid4().hex, threading.Event()
    try:
        claim = Claim(out, name, _honours_conditions(f"{out.rstrip('/')}/.lock-{name}", storage))
    except (OSError, Rejected) as error:
        raise StorageError(explain(out, error)) from error
    holder: _Holder = _OneObject(claim, storage) if claim.conditional else _Objects(claim, storage)
    thread = threading.Thread(target=_keep_alive, args=(holder, replace(storage, retry_seconds=0.0), stop), daemon=True)
    thread.start()
    try:
        if not holder.acquire():
            raise Busy(busy)
        yield claim
    finally:
        stop.set()
        thread.join()
        with suppress(FileNotFoundError, StorageError):  # else it is taken for dead, soon enough
            holder.release()


def _honours_conditions(uri: str, storage: Storage) -> bool:
    """Whether a store refuses to write an object that is in another state than asked for; rclone's, for one, writes."""
    try:
        first = _write_if(storage, uri, {"beats": 1}, "")
        _write_if(storage, uri, {"beats": 2}, first)
        honours = all(_refuses(storage, uri, tag) for tag in ("", first))
    except Rejected:  # by a store that knows no conditions, and says so
        honours = False
    with suppress(FileNotFoundError):
        storage.remove(uri)
    return honours


def _refuses(storage: Storage, uri: str, tag: str) -> bool:
    try:
        storage.write_if(uri, b"{}", tag)
    except Changed:
        return True
    return False


def _write_if(storage: Storage, uri: str, state: dict[str, Any], tag: str) -> str:
    """As Storage.write_if, also where the answer to a write that succeeded is lost. Raises Changed."""
    try:
        return storage.write_if(uri, json.dumps(state).encode(), tag)
    except (Changed, MissingObject) as error:
        with suppress(MissingObject):
            now = storage.tag(uri)  # before the content, so that it is never newer than that
            if _state(storage, uri) == state:
                return now
        raise Changed(str(error)) from error


def _state(storage: Storage, uri: str) -> dict[str, Any] | None:
    """What an object of a lock says; None where there is none."""
    try:
        state: dict[str, Any] = json.loads(storage.read(uri))
        return state
    except FileNotFoundError:
        return None


class _Holder(Protocol):
    def acquire(self) -> bool:
        """Whether this run holds the output now."""
        ...

    def renew(self, storage: Storage) -> None:
        """Show that this run is alive."""
        ...

    def release(self) -> None: ...


def _keep_alive(holder: _Holder, storage: Storage, stop: threading.Event) -> None:
    """A heartbeat that fails is followed by the next: once the store is back, nobody must take the run for dead."""
    while not stop.wait(HEARTBEAT):
        with suppress(Exception):
            holder.renew(storage)


class _OneObject:
    """A lock out of one object, `.lock`, that is written only by who knows its last state; it is left behind.

    A run that finds it held watches for LIVES heartbeats whether it changes, and takes it over if not.
    """

    def __init__(self, claim: Claim, storage: Storage) -> None:
        self.claim, self.storage = claim, storage
        self.beats = 0
        self.tag = ""  # of the object as this run wrote it; empty as long as it has not

    def acquire(self) -> bool:
        seen, since = "", _now()
        while True:
            try:
                tag = self.storage.tag(self.claim.lock)
            except FileNotFoundError:
                tag = ""
            free = not tag or (_state(self.storage, self.claim.lock) or {}).get("state") == "released"
            if free or (tag == seen and _now() - since > LIVES * HEARTBEAT):
                return self._write("holding", tag)
            if seen and tag != seen:
                return False
            seen = tag
            time.sleep(HEARTBEAT / 4)

    def renew(self, storage: Storage) -> None:
        if self.tag:
            self._write("holding", self.tag, storage)

    def release(self) -> None:
        if self.tag:
            self._write("released", self.tag)

    def _write(self, state: str, tag: str, storage: Storage | None = None) -> bool:
        """Whether the object was still as this run knew it."""
        self.beats += 1
        content = {"name": self.claim.name, "state": state, "beats": self.beats}
        try:
            self.tag = _write_if(storage or self.storage, self.claim.lock, content, tag)
        except Changed:
            return False
        return True


class _Objects:
    """A lock out of an object a run, for stores that ignore conditions.

    Each run writes one of its own and renews it. It then looks at the others': a holder that is alive turns it away; of
    two that are only claiming, the one of the higher name withdraws, and the other waits to see it go. An object that
    is not renewed for LIVES heartbeats is a dead run's, and removed.
    """

    def __init__(self, claim: Claim, storage: Storage) -> None:
        self.claim, self.storage = claim, storage
        self.state, self.beats, self.renewed = "claiming", 0, _now()

    def acquire(self) -> bool:
        self._write(self.storage)
        watched: dict[str, tuple[dict[str, Any], float]] = {}
        while others := self._others():
            for uri, state in others.items():
                before, since = watched.get(uri, (None, 0.0))
                if state != before:
                    watched[uri] = state, _now()
                    if before and (state["state"] == "holding" or uri < self.claim.own):
                        return False
                elif _now() - since > LIVES * HEARTBEAT:
                    with suppress(FileNotFoundError):
                        self.storage.remove(uri)
            time.sleep(HEARTBEAT / 4)
        self.state = "holding"
        self._write(self.storage)
        try:
            self.claim.check(self.storage)  # after a pause in the lines above, another may hold it
        except Lost:
            return False
        return True

    def _others(self) -> dict[str, dict[str, Any]]:
        uris = [entry.uri for entry in self.storage.walk(self.claim.folder) if entry.uri != self.claim.own]
        return {uri: state for uri in uris if (state := _state(self.storage, uri))}

    def renew(self, storage: Storage) -> None:
        """After a pause in which another may have seen this run as dead, only if nobody came."""
        begun = _now()
        paused = begun - self.renewed > (LIVES - 1) * HEARTBEAT
        if paused and [entry.uri for entry in storage.walk(self.claim.folder)] != [self.claim.own]:
            return
        self._write(storage)
        self.renewed = begun

    def release(self) -> None:
        self.storage.remove(self.claim.own)

    def _write(self, storage: Storage) -> None:
        self.beats += 1
        storage.write(self.claim.own, json.dumps({"state": self.state, "beats": self.beats}).encode())


def _now() -> float:
    """Seconds, of which those that the machine sleeps are not left out."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
