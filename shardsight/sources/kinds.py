"""The kinds of units, each with its reader; and reading a unit's records from the first to the last."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from shardsight.decode import pictures as picture_formats
from shardsight.decode import video
from shardsight.results.coverage import first_outside, within
from shardsight.row import Failure
from shardsight.sources import parquet, tar
from shardsight.sources.files import AHEAD, ShardFile, ahead, failure_of, fetch, read_files
from shardsight.sources.units import Record, Unit, Wanted, printable
from shardsight.storage import Storage, is_remote

# Yields all records of an open tar or Parquet file, those that are wanted with their bytes, and counts in the Counter
# by reason what is no picture.
Reader = Callable[[Unit, ShardFile, Storage, Wanted, "Counter[str]"], Iterator[Record]]


@dataclass(frozen=True)
class Kind:
    """endings: of files' names, in lower case. reader: None where a file is one record."""

    endings: Iterable[str]
    reader: Reader | None


KINDS = {
    "files": Kind(picture_formats.ENDINGS, None),
    "video": Kind(video.ENDINGS, None),
    "tar": Kind((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tzst"), tar.records),
    "parquet": Kind((".parquet", ".parq"), parquet.records),
}
SHARDS = ("tar", "parquet")  # of these, the kinds that hold several records
LISTS = (".txt", ".csv", ".jsonl")

_KIND_OF = {ending: kind for kind, known in KINDS.items() for ending in known.endings}


def kind_of(uri: str) -> str | None:
    """The kind that a file's ending names."""
    name = uri[uri.rfind("/") + 1 :].lower()
    last = name.rfind(".")
    if last < 0:
        return None
    return _KIND_OF.get(name[last:]) or _KIND_OF.get(name[name.rfind(".", 0, last) :])


def read(unit: Unit, storage: Storage, payload: bool = True) -> Iterator[Record]:
    """The unit's records in order, without those in `skip`; payload=False leaves the bytes of a shard's unread.

    A record that cannot be read has a failure, and a tar or Parquet file without records yields one with a failure.
    """
    if unit.kind == "video":
        if unit.skip:
            return
        name = printable(unit.uri or "")
        record = Record(name, 0, name, name, video_uri=unit.uri, last=True, version=unit.version, part=unit.part)
        yield replace(record, done=unit.frames.get(0, []), length=unit.lengths.get(0))
        return
    if KINDS[unit.kind].reader is None:
        yield from read_files(unit, storage)
        return

    def pending(position: int, _: str | None) -> bool:
        return not within(unit.skip, position)

    ignored: Counter[str] = Counter()
    records = _records(unit, storage, pending if payload else lambda *_: False, ignored)
    for record in _timed(_with_last(islice(records, unit.stop), ignored)):
        if pending(record.index, None):
            done, length = unit.frames.get(record.index, []), unit.lengths.get(record.index)
            yield replace(record, version=unit.version, done=done, length=length)


def pictures(
    rows: Iterable[dict[str, Any]], storage: Storage, image_column: str | None = None
) -> Iterator[tuple[str, bytes | Failure]]:
    """(id, encoded picture or why there is none) of rows of results with `id` and `uri`, not in the order of the rows.

    Each tar and Parquet file is read once, and no further than the last picture that is asked for. image_column: as
    the job was told.
    """
    shards: dict[str, set[str]] = {}
    loose: list[tuple[str, str]] = []
    for row in rows:
        id, uri = row["id"], row["uri"]
        if id.startswith(f"{uri}#"):
            shards.setdefault(uri, set()).add(id)
        else:
            loose.append((id, uri))

    def fetched(one: tuple[str, str]) -> tuple[str, bytes | Failure]:
        try:
            return one[0], fetch(one[1], storage)
        except Failure as error:
            return one[0], error

    yield from ahead(fetched, loose, AHEAD if any("://" in uri for _, uri in loose) else 0)
    for uri, ids in shards.items():
        failure = Failure("NoImages", f"{uri} does not hold it any more")
        unit = Unit(kind_of(uri) or "tar", uri, image_column=image_column)
        for record in _records(unit, storage, lambda _, id: id in ids, Counter()):  # noqa: B023
            if record.id not in ids:
                failure = record.failure or failure
                continue
            yield record.id, record.failure or record.data or b""
            ids.remove(record.id)
            if not ids:
                break
        yield from ((id, failure) for id in ids)


def _records(unit: Unit, storage: Storage, wanted: Wanted, ignored: "Counter[str]") -> Iterator[Record]:
    """All records of a tar or Parquet file, and one with a failure where it cannot be read further."""
    reader = KINDS[unit.kind].reader
    assert reader and unit.uri is not None
    name = printable(unit.uri)
    position = 0
    failure = Failure("NoImages", f"no picture in this {unit.kind} file")
    try:
        with ShardFile(unit.uri, storage) as file:
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
    # At a place that is not done: a file that went away in the middle of a job ends where its rows end.
    position = first_outside(unit.skip, position)
    yield Record(name, position, name, name, failure=failure)


def _with_last(records: Iterator[Record], ignored: "Counter[str]") -> Iterator[Record]:
    """Marks the last record, which takes reading one ahead."""
    before: Record | None = None
    for record in records:
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
