"""Local paths and s3://, gs:// and az:// uris alike: list, read with retries, write atomically."""

import io
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, TypeVar

from shardsight.object_stores import (
    OPTIONS,
    S3,
    Azure,
    GoogleCloud,
    Item,
    MissingBucket,
    NoAccess,
    Rejected,
    StorageError,
    Store,
    Unavailable,
)
from shardsight.row import version_of

__all__ = ["OPTIONS", "Entry", "Storage", "StorageError", "explain", "is_hidden", "is_remote"]

CHUNK = 8 << 20  # bytes per request of a remote file: large enough to be fast, small enough to repeat
RETRY_SECONDS = 300.0  # for which a store may be unavailable in the middle of a job
_SERVICES = {"s3": "s3", "gs": "gs", "az": "az", "abfs": "az", "abfss": "az"}  # scheme → key of OPTIONS and _STORES
_STORES: dict[str, Callable[[dict[str, str]], Store]] = {"s3": S3, "gs": GoogleCloud, "az": Azure}
_EXTRAS = {"gcsfs": "gcs", "adlfs": "azure"}  # module → extra of this package

T = TypeVar("T")


class Entry(NamedTuple):
    """A file or an object. size: in bytes; version: as row.version_of. Both are None for what cannot be examined, such
    as a broken link."""

    uri: str
    size: int | None
    version: str | None


@dataclass(frozen=True)
class Storage:
    """options: those of `--storage`, of which each service takes its own (see OPTIONS); what is missing comes from the
    environment. retry_seconds: for how long requests to an unavailable store are repeated, with exponential backoff.

    Keys of objects are used exactly as they are listed. For a uri of a store, every method raises FileNotFoundError
    (MissingBucket, MissingObject), PermissionError or Rejected (a ValueError) if this uri is the cause, and
    StorageError if the store cannot be used at all: NoAccess, or Unavailable after the last retry.
    """

    options: dict[str, str] = field(default_factory=dict)
    retry_seconds: float = RETRY_SECONDS
    _stores: dict[tuple[str, str], Store] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __reduce__(self) -> Any:  # connections cannot be pickled
        return type(self), (self.options, self.retry_seconds)

    def read(self, uri: str) -> bytes:
        if not is_remote(uri):
            with open(uri, "rb") as file:
                return file.read()
        return self._ask(uri, lambda store, bucket, key: store.get(bucket, key))

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object of a store, which must not end before `stop`."""

        def get(store: Store, bucket: str, key: str) -> bytes:
            data = store.get(bucket, key, start, stop)
            if len(data) != stop - start:
                raise Unavailable(f"received {len(data)} of {stop - start} bytes")
            return data

        return self._ask(uri, get)

    def info(self, uri: str) -> Entry:
        if not is_remote(uri):
            return _local_entry(uri)
        return _entry(uri, self._ask(uri, lambda store, bucket, key: store.head(bucket, key)))

    def size(self, uri: str) -> int:
        return self.info(uri).size or 0

    def open(self, uri: str) -> BinaryIO:
        """A seekable file, of which no more than a chunk is in memory."""
        if not is_remote(uri):
            return open(uri, "rb")
        return io.BufferedReader(_RemoteFile(self, uri), 1 << 20)

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace atomically: readers see the file before or after the write, never a part of it."""
        if is_remote(uri):
            self._ask(uri, lambda store, bucket, key: store.put(bucket, key, data))
            return
        folder, name = os.path.split(uri)
        path = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path, uri)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise

    def write_if(self, uri: str, data: bytes, tag: str) -> str:
        """Write an object of a store only if it still has this tag; with "", only if there is none.

        Returns its new tag. Raises Changed or MissingObject, unless the store ignores conditions, as some do. When the
        response to a successful write is lost, its retry raises Changed.
        """
        return self._ask(uri, lambda store, bucket, key: store.put(bucket, key, data, tag))

    def tag(self, uri: str) -> str:
        """The tag of an object of a store, for `write_if`."""
        return self._ask(uri, lambda store, bucket, key: store.head(bucket, key)).tag

    def remove(self, uri: str) -> None:
        if is_remote(uri):
            self._ask(uri, lambda store, bucket, key: store.delete(bucket, key))
        else:
            os.unlink(uri)

    def exists(self, uri: str) -> bool:
        if not is_remote(uri):
            return os.path.exists(uri)
        try:
            self.info(uri)
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, uri: str) -> bool:
        """Whether a path is a folder, or a prefix holds a file that is not hidden."""
        if is_remote(uri):
            return next(self.walk(uri), None) is not None
        return os.path.isdir(uri)

    def walk(self, uri: str, hidden: bool = False) -> Iterator[Entry]:
        """Every file below a folder or prefix, in a stable order, listed a page at a time."""
        prefix = uri.rstrip("/") + "/"
        if not is_remote(uri):
            yield from _walk_local(prefix, hidden)
            return
        root = prefix[: len(prefix) - len(_split(prefix)[2])]
        token: str | None = None
        while True:
            items, token = self._ask(prefix, lambda store, bucket, key: store.page(bucket, key, token))  # noqa: B023
            for item in items:
                found = root + item.key
                if not found.endswith("/") and (hidden or not is_hidden(found, prefix)):
                    yield _entry(found, item)
            if token is None:
                return

    def filesystem(self, uri: str) -> Any:
        """The filesystem of fsspec for a uri of a store; the path in it is BUCKET/KEY."""
        return self._store(uri).filesystem

    def _ask(self, uri: str, request: Callable[[Store, str, str], T]) -> T:
        """Run a request, and repeat it with exponential backoff while the store is unavailable."""
        deadline, pause = time.monotonic() + self.retry_seconds, 0.5
        store, (_, bucket, key) = self._store(uri), _split(uri)
        while True:
            try:
                return request(store, bucket.partition("@")[0], key)
            except (NoAccess, Unavailable) as error:
                if isinstance(error, NoAccess) or time.monotonic() + pause > deadline:
                    raise type(error)(_sentence(uri, error)) from error
            time.sleep(random.uniform(pause / 2, pause))  # so that a thousand tasks do not return at the same time
            pause = min(2 * pause, 15)

    def _store(self, uri: str) -> Store:
        service, bucket, _ = _split(uri)
        account = bucket.partition("@")[2].partition(".")[0]  # abfs://container@account.dfs.core.windows.net/…
        if (service, account) not in self._stores:
            options = {name: value for name, value in self.options.items() if name in OPTIONS[service]}
            if account and service == "az":
                options["account_name"] = account
            try:
                self._stores[service, account] = _STORES[service](options)
            except ModuleNotFoundError as error:
                extra = _EXTRAS.get(error.name or "")
                if extra is None:
                    raise
                raise StorageError(f"{uri} needs {error.name}: pip install 'shardsight[{extra}]'") from None
            except (ValueError, OSError) as error:  # invalid options or environment
                raise NoAccess(_sentence(uri, NoAccess(str(error)))) from error
        return self._stores[service, account]


def is_remote(uri: str) -> bool:
    return uri.partition("://")[0] in _SERVICES and "://" in uri


def is_hidden(uri: str, root: str) -> bool:
    """Whether a file, or a folder between it and `root`, has a name that begins with a dot."""
    return "/." in uri[len(root.rstrip("/")) :]


def explain(uri: str, error: Exception) -> str:
    """An error of a file or a store as one sentence that says what to do about it."""
    return str(error) if isinstance(error, StorageError) else _sentence(uri, error)


def _sentence(uri: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    service, bucket, _ = _split(uri) if is_remote(uri) else ("", "", "")
    place = "--storage or the environment"
    if isinstance(error, NoAccess):
        return f"no credentials are valid for {uri} ({text}): check the keys in {place}"
    if isinstance(error, MissingBucket):
        kind = "container" if service == "az" else "bucket"
        return f"there is no {kind} {bucket} ({text}): check its name, and endpoint and account in {place}"
    if isinstance(error, FileNotFoundError):
        return f"{uri} does not exist: check the name"
    if isinstance(error, PermissionError):
        return f"{uri} may not be accessed ({text}): check " + (
            f"what the keys in {place} may do" if service else "its permissions"
        )
    if isinstance(error, Rejected):
        region = "region" in text.lower() and service == "s3"
        return f"the store refuses {uri} ({text}): check the " + (f"region_name in {place}" if region else "name")
    if service:
        return f"{uri} cannot be reached ({text}): check the network and endpoint_url in {place}, and try again"
    return f"{uri} cannot be read ({text}): check it and try again"


def _split(uri: str) -> tuple[str, str, str]:
    """A uri of a store → service, bucket, key; of Azure the bucket may be container@account.host."""
    scheme, _, place = uri.partition("://")
    bucket, _, key = place.partition("/")
    return _SERVICES[scheme], bucket, key


def _entry(uri: str, item: Item) -> Entry:
    return Entry(uri, item.size, version_of(item.size, item.tag))


def _local_entry(path: str) -> Entry:
    found = os.stat(path)
    return Entry(path, found.st_size, version_of(found.st_size, found.st_mtime_ns))


def _walk_local(folder: str, hidden: bool, above: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """folder: with a slash at its end. above: the real paths of the folders that it is in."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above
        return
    with os.scandir(folder) as listing:  # names alone, as a million DirEntry objects take four times the memory
        names = [entry.name + "/" * entry.is_dir() for entry in listing if hidden or not entry.name.startswith(".")]
    for name in sorted(names):
        path = folder + name
        if name.endswith("/"):
            yield from _walk_local(path, hidden, above | {real})
            continue
        try:
            yield _local_entry(path)
        except OSError:
            yield Entry(path, None, None)


class _RemoteFile(io.RawIOBase):
    """An object of a store, read by ranges of a chunk."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.storage, self.uri = storage, uri
        self.length = storage.size(uri)
        self.position = 0
        self.start, self.chunk = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.length:
            return 0
        if not self.start <= self.position < self.start + len(self.chunk):
            stop = min(self.position + CHUNK, self.length)
            self.start, self.chunk = self.position, self.storage.read_range(self.uri, self.position, stop)
        offset = self.position - self.start
        part = self.chunk[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)
