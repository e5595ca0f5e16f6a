"""Local paths and s3://, gs:// and az:// uris alike: list, read with retries, write all or nothing."""

import io
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, TypeVar

from shardsight.row import version_of
from shardsight.stores import (
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

__all__ = ["OPTIONS", "Entry", "Storage", "StorageError", "explain", "is_hidden", "is_remote"]

CHUNK = 8 << 20  # of a remote file read in order: large enough to be fast, small enough to ask again
RETRY_SECONDS = 300.0  # that a store may be away in the middle of a job
_SERVICES = {"s3": "s3", "gs": "gs", "az": "az", "abfs": "az", "abfss": "az"}  # scheme → key of OPTIONS
_EXTRAS = {"gcsfs": "gcs", "adlfs": "azure"}  # module → extra of this package

T = TypeVar("T")


class Entry(NamedTuple):
    """A file or an object. size: in bytes; version: as row.version_of. Both are None where a file cannot be looked at,
    such as a link that leads nowhere."""

    uri: str
    size: int | None
    version: str | None


@dataclass(frozen=True)
class Storage:
    """options: those of `--storage`, of which each service takes its own (see OPTIONS); what is missing comes from the
    environment. retry_seconds: for how long requests are repeated, with exponential backoff, while a store is away.

    A key of a store is used exactly as it is listed. Of a store, every method raises FileNotFoundError (MissingBucket,
    MissingObject), PermissionError, Rejected (a ValueError) for what that uri caused, and StorageError for what makes
    the store useless: NoAccess, and Unavailable once the retries are used up.
    """

    options: dict[str, str] = field(default_factory=dict)
    retry_seconds: float = RETRY_SECONDS
    _stores: dict[tuple[str, str], Store] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __reduce__(self) -> Any:  # connections stay where they are
        return type(self), (self.options, self.retry_seconds)

    def read(self, uri: str) -> bytes:
        if not is_remote(uri):
            with open(uri, "rb") as file:
                return file.read()
        return self._ask(uri, lambda store, bucket, key: store.get(bucket, key))

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object of a store, which has that many."""

        def get(store: Store, bucket: str, key: str) -> bytes:
            data = store.get(bucket, key, start, stop)
            if len(data) != stop - start:
                raise Unavailable(f"{len(data)} bytes came of {stop - start}")
            return data

        return self._ask(uri, get)

    def info(self, uri: str) -> Entry:
        if not is_remote(uri):
            found = os.stat(uri)
            return Entry(uri, found.st_size, version_of(found.st_size, found.st_mtime_ns))
        return _entry(uri, self._ask(uri, lambda store, bucket, key: store.head(bucket, key)))

    def size(self, uri: str) -> int:
        return self.info(uri).size or 0

    def open(self, uri: str) -> BinaryIO:
        """A seekable file that holds no more than a chunk of a remote one in memory."""
        if not is_remote(uri):
            return open(uri, "rb")
        return io.BufferedReader(_RemoteFile(self, uri), 1 << 20)

    def write(self, uri: str, data: bytes) -> None:
        """Readers see the whole of it or nothing, and what was there before is replaced."""
        if is_remote(uri):
            self._ask(uri, lambda store, bucket, key: store.put(bucket, key, data))
            return
        folder, name = os.path.split(uri)
        handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(path, 0o666 & ~_umask())
            os.replace(path, uri)
        except BaseException:
            os.unlink(path)
            raise

    def write_if(self, uri: str, data: bytes, tag: str) -> str:
        """Write an object of a store only if it still has this tag; with "", only if there is none.

        Returns its new tag. Raises Changed or MissingObject, unless the store ignores conditions, as some do. A write
        that is repeated since its answer was lost raises Changed, too, although it succeeded.
        """
        return self._ask(uri, lambda store, bucket, key: store.put(bucket, key, data, tag))

    def tag(self, uri: str) -> str:
        """Of an object of a store, for `write_if`."""
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
        """Whether something lies below a path or a prefix."""
        if is_remote(uri):
            return next(self.walk(uri), None) is not None
        return os.path.isdir(uri)

    def walk(self, uri: str, hidden: bool = False) -> Iterator[Entry]:
        """Every file below a folder or prefix, in a stable order and a page at a time; `hidden` ones if asked for."""
        prefix = uri.rstrip("/") + "/"
        if not is_remote(uri):
            yield from _walk_local(prefix, hidden)
            return
        token: str | None = None
        while True:
            items, token = self._ask(prefix, lambda store, bucket, key: store.page(bucket, key, token))  # noqa: B023
            root = prefix[: len(prefix) - len(_split(prefix)[2])]
            for item in items:
                found = root + item.key
                if not found.endswith("/") and (hidden or not is_hidden(found, prefix)):
                    yield _entry(found, item)
            if token is None:
                return

    def filesystem(self, uri: str) -> Any:
        """That of fsspec for the store of a uri, in which its path is BUCKET/KEY."""
        service, bucket, _ = _split(uri)
        return self._store(uri, service, bucket).filesystem

    def _ask(self, uri: str, request: Callable[[Store, str, str], T]) -> T:
        """Repeat a request, with exponential backoff, as long as the store's trouble can pass."""
        deadline, pause = time.monotonic() + self.retry_seconds, 0.5
        service, bucket, key = _split(uri)
        store = self._store(uri, service, bucket)
        while True:
            try:
                return request(store, bucket.partition("@")[0], key)
            except NoAccess as error:
                raise NoAccess(_sentence(uri, error)) from error
            except Unavailable as error:
                if time.monotonic() + pause > deadline:
                    raise Unavailable(_sentence(uri, error)) from error
            time.sleep(random.uniform(pause / 2, pause))  # not all at once, where a thousand tasks were refused
            pause = min(2 * pause, 15)

    def _store(self, uri: str, service: str, bucket: str) -> Store:
        account = bucket.partition("@")[2].partition(".")[0]
        if (service, account) not in self._stores:
            options = {name: value for name, value in self.options.items() if name in OPTIONS[service]}
            makers: dict[str, Callable[[], Store]] = {
                "s3": lambda: S3(options),
                "gs": lambda: GoogleCloud(options),
                "az": lambda: Azure(options, account),
            }
            try:
                self._stores[service, account] = makers[service]()
            except ModuleNotFoundError as error:
                extra = _EXTRAS.get(error.name or "")
                if extra is None:
                    raise
                raise StorageError(f"{uri} needs {error.name}: pip install 'shardsight[{extra}]'") from None
            except (ValueError, OSError) as error:  # of what the options or the environment say
                raise NoAccess(_sentence(uri, NoAccess(str(error)))) from error
        return self._stores[service, account]


def is_remote(uri: str) -> bool:
    return uri.partition("://")[0] in _SERVICES and "://" in uri


def is_hidden(uri: str, root: str) -> bool:
    """Whether a file below a folder or prefix, or a folder between, has a name that begins with a dot."""
    return "/." in uri[len(root.rstrip("/")) :]


def explain(uri: str, error: Exception) -> str:
    """An error of a file or a store as one sentence that says what to do."""
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _walk_local(folder: str, hidden: bool, above: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """folder: with a slash at its end."""
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder that we are in
        return
    with os.scandir(folder) as listing:  # names, since a million entries of it take four times the memory
        names = [entry.name + "/" * entry.is_dir() for entry in listing if hidden or not entry.name.startswith(".")]
    for name in sorted(names):
        path = folder + name
        if name.endswith("/"):
            yield from _walk_local(path, hidden, above | {real})
            continue
        try:
            found = os.stat(path)
        except OSError:
            yield Entry(path, None, None)
        else:
            yield Entry(path, found.st_size, version_of(found.st_size, found.st_mtime_ns))


class _RemoteFile(io.RawIOBase):
    """Reads by ranges, each asked again when the store cuts it short."""

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

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.length:
            return 0
        if not self.start <= self.position < self.start + len(self.chunk):
            self.start, end = self.position, min(self.position + CHUNK, self.length)
            self.chunk = self.storage.read_range(self.uri, self.start, end)
        offset = self.position - self.start
        part = self.chunk[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)
