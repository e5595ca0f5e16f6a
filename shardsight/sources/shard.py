"""What the readers of tars and of Parquet files share: one record after the other, to the last."""

import io
import os
import stat
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from errno import ELOOP, ENAMETOOLONG
from itertools import islice
from operator import itemgetter
from typing import Any, BinaryIO

from shardsight.row import Failure
from shardsight.sources.units import Record, Unit, Wanted, printable
from shardsight.storage import Storage, explain, is_remote

ANSWERS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class ShardFile(io.BufferedReader):
    """A shard's file that remembers what its store raised, as libraries turn that into errors of their own."""

    def __init__(self, uri: str, storage: Storage) -> None:
        self._source = _Remembering(storage.open(uri), is_remote(uri))
        super().__init__(self._source, 1 << 20)

    def check(self) -> None:
        """Raises what the store raised: then it is not the file that is damaged."""
        if self._source.fault:
            raise self._source.fault


class _Remembering(io.RawIOBase):
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
            if self.remote and not isinstance(error, ANSWERS):
                self.fault = error
            raise

    def close(self) -> None:
        self.file.close()
        super().close()


# Unit, its file, the storage, what is wanted, and where to count what is no picture → its records.
Reader = Callable[[Unit, ShardFile, Storage, Wanted, "Counter[str]"], Iterator[Record]]


def read_shard(reader: Reader, unit: Unit, storage: Storage, payload: bool) -> Iterator[Record]:
    """The unit's records in order, without those in `skip`; payload=False leaves their bytes unread.

    A record that cannot be read has a failure, and so has a unit without records, at position 0.
    """
    pending = pending_in(unit)

    def wanted(position: int, id: str | None) -> bool:
        return payload and pending(position, id)

    ignored: Counter[str] = Counter()
    records = records_of(reader, unit, storage, wanted, ignored)
    for record in _timed(_with_last(records, unit.stop, ignored)):
        if pending(record.index, record.id):
            yield replace(record, version=unit.version)


def records_of(
    reader: Reader, unit: Unit, storage: Storage, wanted: Wanted, ignored: "Counter[str]"
) -> Iterator[Record]:
    """All of the unit's records, and one with a failure where it cannot be read on."""
    assert unit.uri is not None
    name = printable(unit.uri)
    position = 0
    failure = Failure("NoImages", f"no picture in this {unit.kind} file")
    try:
        with _open(unit.uri, storage) as file:
            try:
                for record in reader(unit, file, storage, wanted, ignored):
                    yield record
                    position = record.index + 1
            except Failure:
                file.check()
                raise
            except OSError as error:
                if is_remote(unit.uri):
                    raise
                raise failure_of(unit.uri, error) from None
        if position:
            return
    except Failure as found:
        failure = found
    yield Record(name, position, name, name, failure=failure)


def _open(uri: str, storage: Storage) -> ShardFile:
    try:
        if not is_remote(uri):
            size_of(uri)
        return ShardFile(uri, storage)
    except (OSError, ValueError) as error:
        if is_remote(uri) and not isinstance(error, (*ANSWERS, ValueError)):
            raise
        raise failure_of(uri, error) from None


def size_of(path: str) -> int:
    """Bytes of a local file. Raises Failure for what never ends or waits for ever, and OSError or ValueError."""
    found = os.stat(path)
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return found.st_size
    raise Failure("NotAFile", f"{printable(path)} is a device, a pipe or a socket")


def failure_of(uri: str, error: Exception) -> Failure:
    """Why a file cannot be read, of a path that no file can have, too."""
    no_path = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in (ENAMETOOLONG, ELOOP))
    if no_path and not is_remote(uri):
        return Failure("InvalidPath", f"{printable(uri)[:200]} is no path of a file: {error}"[:1000])
    return Failure(type(error).__name__, explain(printable(uri), error))


def pending_in(unit: Unit) -> Wanted:
    """Whether a position is not among the ranges to skip."""

    def pending(position: int, _: str | None) -> bool:
        index = bisect_right(unit.skip, position, key=itemgetter(0)) - 1
        return index < 0 or position >= unit.skip[index][1]

    return pending


def _with_last(records: Iterator[Record], stop: int | None, ignored: "Counter[str]") -> Iterator[Record]:
    """Marks the last record, which takes reading one ahead."""
    before: Record | None = None
    for record in islice(records, stop):
        if before:
            yield before
        before = record
    if before:
        yield replace(before, last=True, ignored=dict(ignored))


def _timed(records: Iterator[Record]) -> Iterator[Record]:
    while True:
        clock, cpu = time.perf_counter(), time.thread_time()
        record = next(records, None)
        if record is None:
            return
        yield replace(record, seconds=(time.perf_counter() - clock, time.thread_time() - cpu))
