"""Opening and reading files, local or remote; and units of loose files, of which each is a picture."""

import io
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from errno import ELOOP, ENAMETOOLONG
from typing import Any, BinaryIO, TypeVar

from shardsight.row import Failure
from shardsight.sources import web
from shardsight.sources.units import MAX_BYTES, Record, Unit, printable, too_large
from shardsight.storage import Storage, explain, is_remote

T = TypeVar("T")
Made = TypeVar("Made")
AHEAD = 16  # remote files requested at the same time
# Errors of a store that concern a single object; any other makes the store useless and ends the job.
OBJECT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)


class ShardFile(io.BufferedReader):
    """A tar or Parquet file that keeps its store's error, which tarfile and pyarrow replace with errors of their own.

    Raises Failure where the file itself cannot be opened.
    """

    def __init__(self, uri: str, storage: Storage) -> None:
        try:
            if not is_remote(uri):
                size_of(uri)
            self._source = _Source(storage.open(uri), is_remote(uri))
        except (OSError, ValueError) as error:
            if is_remote(uri) and not isinstance(error, OBJECT_ERRORS):
                raise
            raise failure_of(uri, error) from None
        super().__init__(self._source, 1 << 20)

    def check(self) -> None:
        """Raises the store's error, if there was one: the file is then not damaged."""
        if self._source.fault:
            raise self._source.fault


class _Source(io.RawIOBase):
    def __init__(self, file: BinaryIO, remote: bool) -> None:
        self.file, self.remote = file, remote
        self.fault: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            return self.file.readinto(buffer)  # type: ignore[attr-defined]
        except Exception as error:
            if self.remote and not isinstance(error, OBJECT_ERRORS):
                self.fault = error
            raise

    def close(self) -> None:
        self.file.close()
        super().close()


def read_files(unit: Unit, storage: Storage) -> Iterator[Record]:
    """The records of a unit of loose files."""
    versions = unit.versions or (None,) * len(unit.files)

    def record(item: tuple[int, tuple[str, str | None]]) -> Record:
        cpu = time.thread_time()
        position, (uri, version) = item
        name = printable(uri)
        made = Record(None, position, name, name, version=version)
        try:
            made = replace(made, data=fetch(uri, storage))
        except Failure as failure:
            made = replace(made, failure=failure)
        return replace(made, seconds=(0.0, time.thread_time() - cpu))

    items = enumerate(zip(unit.files, versions, strict=True))
    records = ahead(record, items, AHEAD if any("://" in uri for uri in unit.files) else 0)
    while True:
        clock = time.perf_counter()
        found = next(records, None)
        if found is None:
            return
        # Of several requests at a time, the seconds that were waited for, not those of each.
        yield replace(found, seconds=(time.perf_counter() - clock, found.seconds[1]))


def ahead(make: Callable[[T], Made], items: Iterable[T], threads: int) -> Iterator[Made]:
    """`make` of each item, in order, computed by so many threads while the caller works; by 0, when it is asked for."""
    if not threads:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def fetch(uri: str, storage: Storage) -> bytes:
    """The content of a file of any kind. Raises Failure for what concerns it alone, and the errors of Storage for what
    makes a store useless."""
    if web.is_web(uri):
        return web.fetch(uri)
    remote = is_remote(uri)
    if remote and not all(uri.partition("://")[2].partition("/")):
        raise Failure("UnsupportedUri", f"{printable(uri)} names no object: it takes a bucket and a key")
    if "://" in uri and not remote:
        raise Failure("UnsupportedUri", f"{printable(uri)} is neither a path nor a uri of a store or of the web")
    try:
        if not remote and (size := size_of(uri)) > MAX_BYTES:
            raise too_large(size)
        return storage.read(uri)
    except (OSError, ValueError) as error:
        if remote and not isinstance(error, OBJECT_ERRORS):
            raise
        raise failure_of(uri, error) from None


def open_file(uri: str, storage: Storage) -> BinaryIO:
    """A file of any kind; one of the web is read whole. Raises as `fetch`."""
    return io.BytesIO(web.fetch(uri)) if web.is_web(uri) else ShardFile(uri, storage)


def size_of(path: str) -> int:
    """Bytes of a local file. Raises Failure for devices, pipes and sockets, which may never end; else OSError or
    ValueError."""
    found = os.stat(path)
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return found.st_size
    raise Failure("NotAFile", f"{printable(path)} is a device, a pipe or a socket")


def failure_of(uri: str, error: Exception) -> Failure:
    """The Failure for an error of opening or reading a file."""
    invalid = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in (ENAMETOOLONG, ELOOP))
    if invalid and not is_remote(uri):
        return Failure("InvalidPath", f"{printable(uri)[:200]} is no path of a file: {error}"[:1000])
    return Failure(type(error).__name__, explain(printable(uri), error))
