"""One run at a time for an output: on a disk by a lock of the kernel, in a store by an object that the run renews.

A run that was paused, or cut off from the store, for longer than MISSED_HEARTBEATS is considered dead, and another may
have started. So each process that writes to a store first checks that its run still holds the output.
"""

import fcntl
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from shardsight.object_stores import Changed, MissingObject, Rejected
from shardsight.storage import Storage, StorageError, explain, is_remote

HEARTBEAT = 2.0  # seconds between the renewals of a lock in a store
MISSED_HEARTBEATS = 3  # after which a run is considered dead


class Busy(StorageError):
    """Another run is writing to the same output."""


class Lost(StorageError):
    """The run no longer holds its output."""


@dataclass(frozen=True)
class Claim:
    """A run's claim to an output in a store, passed to each process that writes for the run.

    name: of the run. conditional: whether the store supports conditional writes; the lock is then one object, else each
    run has an object of its own in a folder.
    """

    out: str
    name: str
    conditional: bool

    @property
    def uri(self) -> str:
        """The uri of the object that this run writes."""
        return f"{self.out.rstrip('/')}/" + (".lock" if self.conditional else f"lock/{self.name}")

    def runs(self, storage: Storage) -> list[str]:
        """The uris of all runs' objects, where each has its own."""
        return [entry.uri for entry in storage.walk(f"{self.out.rstrip('/')}/lock")]

    def check(self, storage: Storage) -> None:
        """Raises Lost. Takes one request: a GET of the lock, or a listing, which has only this run's object."""
        if self.conditional:
            state = _state(storage, self.uri) or {}
            held = state.get("name") == self.name and state["state"] == "holding"
        else:
            uris = self.runs(storage)
            others = (_state(storage, uri) for uri in uris if uri != self.uri)
            held = self.uri in uris and not any(other and other["state"] == "holding" for other in others)
        if not held:
            raise Lost(
                f"this run was paused or cut off from the store, and lost its lock on {self.out}: "
                "start it again once no other run writes there"
            )


@contextmanager
def lock(out: str, storage: Storage) -> Iterator[Claim | None]:
    """Lock an output: a prefix of a store, for which it yields the claim that writers have to check, or an existing
    folder. Raises Busy if another run holds it; a lock that a killed run left behind is taken over.

    On a disk this is flock: on a network file system that does not pass it to its server (NFS mounted with `nolock`),
    only runs on the same machine exclude each other.
    """
    busy = f"another run is writing to {out}: wait for it, or choose another --output"
    if not is_remote(out):
        with ExitStack() as opened:
            try:
                file = opened.enter_context(open(f"{out}/.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel when the process ends
            except BlockingIOError:
                raise Busy(busy) from None
            except OSError as error:
                raise StorageError(f"{out} cannot be locked ({error}): choose another --output") from error
            yield None
        return
    name, stop = uuid.uuid4().hex, threading.Event()
    try:
        claim = Claim(out, name, _supports_conditions(f"{out.rstrip('/')}/.lock-{name}", storage))
    except (OSError, Rejected) as error:
        raise StorageError(explain(out, error)) from error
    holder = _ConditionalLock(claim, storage) if claim.conditional else _ListedLock(claim, storage)
    thread = threading.Thread(target=_keep_alive, args=(holder, replace(storage, retry_seconds=0.0), stop), daemon=True)
    thread.start()
    try:
        if not holder.acquire():
            raise Busy(busy)
        yield claim
    finally:
        stop.set()
        thread.join()
        with suppress(FileNotFoundError, StorageError):  # then other runs wait until it is considered dead
            holder.release()


def _supports_conditions(uri: str, storage: Storage) -> bool:
    """Whether a store refuses a write whose condition does not hold. rclone's server, for one, ignores conditions."""
    try:
        first = _write_if(storage, uri, {"name": uri, "writes": 1}, "")
        _write_if(storage, uri, {"name": uri, "writes": 2}, first)
        supports = all(_refuses(storage, uri, tag) for tag in ("", first))
    except Rejected:  # a store that refuses conditional writes, which it does not implement
        supports = False
    with suppress(FileNotFoundError):
        storage.remove(uri)
    return supports


def _refuses(storage: Storage, uri: str, tag: str) -> bool:
    try:
        storage.write_if(uri, b"{}", tag)
    except Changed:
        return True
    return False


def _write_if(storage: Storage, uri: str, state: dict[str, Any], tag: str) -> str:
    """As Storage.write_if, but a tag may also be that of a write by the same run whose response was lost. Raises
    Changed."""
    try:
        return storage.write_if(uri, json.dumps(state).encode(), tag)
    except (Changed, MissingObject) as error:
        with suppress(MissingObject):
            now = storage.tag(uri)  # first, so that the tag is never newer than the content
            found = _state(storage, uri) or {}
            if found == state:
                return now
            if found.get("name") == state["name"] and now != tag:
                return _write_if(storage, uri, state, now)
        raise Changed(str(error)) from error


def _state(storage: Storage, uri: str) -> dict[str, Any] | None:
    """The content of a lock's object; None if there is none. Raises StorageError."""
    try:
        content = storage.read(uri)
    except FileNotFoundError:
        return None
    try:
        return json.loads(content)
    except ValueError as error:  # as of the file that locks an output on a disk, if that was copied
        raise StorageError(f"{uri} is not a run's lock ({error}): remove it, or choose another --output") from error


class _ConditionalLock:
    """A lock of one object, `.lock`, which each run writes only if it is unchanged since the run read it.

    A run that finds it held waits for MISSED_HEARTBEATS, and takes it over if it was not renewed. It is never removed.
    """

    def __init__(self, claim: Claim, storage: Storage) -> None:
        self.claim, self.storage = claim, storage
        self.writes = 0  # written too, as a tag may be a hash of the content
        self.tag = ""  # of the object as this run wrote it; empty before

    def acquire(self) -> bool:
        """Whether this run holds the output now."""
        seen, since = "", 0.0
        while True:
            try:
                tag = self.storage.tag(self.claim.uri)
            except FileNotFoundError:
                tag = ""
            free = not tag or (_state(self.storage, self.claim.uri) or {}).get("state") == "released"
            if free or (tag == seen and _now() - since > MISSED_HEARTBEATS * HEARTBEAT):
                return self._write(self.storage, "holding", tag)
            if seen and tag != seen:
                return False
            if not seen:
                seen, since = tag, _now()  # after the request, which may have been retried for minutes
            time.sleep(HEARTBEAT / 4)

    def renew(self, storage: Storage) -> None:
        """Show that this run is alive."""
        if self.tag:
            self._write(storage, "holding", self.tag)

    def release(self) -> None:
        if self.tag:
            self._write(self.storage, "released", self.tag)

    def _write(self, storage: Storage, state: str, tag: str) -> bool:
        """Whether the object still had this tag, or that of a write of this run."""
        self.writes += 1
        content = {"name": self.claim.name, "state": state, "writes": self.writes}
        try:
            self.tag = _write_if(storage, self.claim.uri, content, tag)
        except Changed:
            return False
        return True


class _ListedLock:
    """A lock of an object for each run, for stores that ignore conditions.

    Each run writes and renews its own object, and lists the others. It gives up if another run that is alive holds the
    output. Of two runs that are both claiming it, the one whose name sorts last gives up, and the other waits until
    that one's object is gone. An object that is not renewed for MISSED_HEARTBEATS is a dead run's, and is removed.
    """

    def __init__(self, claim: Claim, storage: Storage) -> None:
        self.claim, self.storage = claim, storage
        self.state, self.writes, self.renewed = "claiming", 0, _now()

    def acquire(self) -> bool:
        """Whether this run holds the output now."""
        self._write(self.storage)
        watched: dict[str, tuple[dict[str, Any], float]] = {}
        while True:
            looked = _now()  # before the requests, which may be retried for minutes
            others = self._others()
            if not others:
                break
            for uri, state in others.items():
                before, since = watched.get(uri, (None, 0.0))
                if state != before:
                    watched[uri] = state, _now()
                    if before and (state["state"] == "holding" or uri < self.claim.uri):
                        return False
                elif looked - since > MISSED_HEARTBEATS * HEARTBEAT:
                    with suppress(FileNotFoundError):
                        self.storage.remove(uri)
            time.sleep(HEARTBEAT / 4)
        self.state = "holding"
        self._write(self.storage)
        try:
            self.claim.check(self.storage)  # another may hold it, if this run was paused in the lines above
        except Lost:
            return False
        return True

    def _others(self) -> dict[str, dict[str, Any]]:
        uris = (uri for uri in self.claim.runs(self.storage) if uri != self.claim.uri)
        return {uri: state for uri in uris if (state := _state(self.storage, uri))}

    def renew(self, storage: Storage) -> None:
        """Show that this run is alive; after a pause in which it may have been considered dead, only if no other run
        has started."""
        began = _now()
        paused = began - self.renewed > (MISSED_HEARTBEATS - 1) * HEARTBEAT
        if paused and self.claim.runs(storage) != [self.claim.uri]:
            return
        self._write(storage)
        self.renewed = began

    def release(self) -> None:
        self.storage.remove(self.claim.uri)

    def _write(self, storage: Storage) -> None:
        self.writes += 1
        storage.write(self.claim.uri, json.dumps({"state": self.state, "writes": self.writes}).encode())


def _now() -> float:
    """Seconds of a clock that also counts while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _keep_alive(holder: _ConditionalLock | _ListedLock, storage: Storage, stop: threading.Event) -> None:
    """Renew until stopped, also after a renewal that failed: the store may be available again in time."""
    while not stop.wait(HEARTBEAT):
        with suppress(Exception):
            holder.renew(storage)
