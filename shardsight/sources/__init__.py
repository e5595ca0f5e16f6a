"""Inputs → units of work → records of encoded bytes, one bad record never costing another."""

import csv
import glob
import io
import json
import os
import re
import tarfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from operator import itemgetter
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from shardsight.results.coverage import Coverage, Hashes, Ranges, hashes, merge
from shardsight.row import Failure, digest
from shardsight.storage import Storage, explain, is_remote

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif")
NEIGHBOURS = ("json", "txt", "cls")  # of a picture in a tar, that become its metadata
LISTS = (".txt", ".csv", ".jsonl")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
URI_COLUMNS = ("uri", "url", "path", "file", "image")  # of a list, the first that is there
GROUP = 256  # loose files in a unit
PAGE = 10_000  # uris looked at together while listing
MAX_BYTES = 1 << 30  # of one encoded record
AHEAD = 16  # remote files asked for at once

_SAMPLE = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")


class InputError(ValueError):
    """The request names something that cannot be read: one sentence for the user."""


@dataclass(frozen=True)
class Unit:
    """What is read from its start: a tar, a Parquet file, or a group of loose files (`uri` is then None).

    skip: positions that are done. stop: where `--limit` ends it. column: of uris, in a Parquet file.
    """

    kind: str
    uri: str | None = None
    files: tuple[str, ...] = ()
    skip: Ranges = field(default_factory=list)
    stop: int | None = None
    column: str | None = None

    def without(self, positions: Iterable[int]) -> "Unit":
        """What is left of it; loose files are then counted anew."""
        if self.kind == "files":
            gone = set(positions)
            return replace(self, files=tuple(file for n, file in enumerate(self.files) if n not in gone))
        return replace(self, skip=merge([*self.skip, *((position, position + 1) for position in positions)]))


@dataclass(frozen=True)
class Record:
    """One input. unit and index are its place; `data`, encoded, or `failure` why there is none.

    last: nothing of its unit comes after it. version: of the file that it is read from, where one is known. ignored:
    with the last one, how many entries of the unit hold no picture, by reason. seconds: what reading it took, clock
    and CPU.
    """

    unit: str | None
    index: int
    id: str
    uri: str
    data: bytes | None = None
    failure: Failure | None = None
    metadata: str | None = None
    last: bool = False
    version: str | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)


# --- Listing, in the driver


@dataclass
class Listing:
    """Inputs → the units that are left. Once `left()` is through, it knows what there is:

    files: every loose file. units: every tar and Parquet file. ignored: how many files of a folder
    hold no pictures.
    """

    inputs: list[str]
    storage: Storage
    uri_column: str | None = None
    limit: int | None = None
    exclude: str | None = None
    files: Hashes = field(default_factory=Hashes)
    units: list[str] = field(default_factory=list)
    ignored: int = 0
    _begun: list[Iterator[str]] = field(default_factory=list)

    def left(self, done: Coverage) -> Iterator[Unit]:
        """The work that `done` lacks. Raises InputError."""
        self.files, self.units = Hashes(), []
        room = self.limit
        waiting: list[str] = []
        uris = self._uris()
        known: set[str] = set()
        while (room is None or room > 0) and (batch := list(islice(uris, PAGE))):
            loose = [uri for uri in batch if _kind(uri) == "image"]
            new = self.files.add(hashes(map(printable, loose)), room)
            room = None if room is None else room - int(new.sum())
            loose = [uri for uri, is_new in zip(loose, new, strict=True) if is_new]
            over = done.has(hashes(map(printable, loose)))
            waiting += [uri for uri, is_over in zip(loose, over, strict=True) if not is_over]
            while len(waiting) >= GROUP:
                yield Unit("files", files=tuple(waiting[:GROUP]))
                del waiting[:GROUP]
            for uri in batch:
                name = printable(uri)
                if _kind(uri) == "image" or name in known or room == 0:
                    continue
                known.add(name)
                unit = Unit(_kind(uri), uri, column=self.uri_column)
                if room is not None:
                    unit = replace(unit, stop=sum(1 for _ in islice(read(unit, self.storage, payload=False), room)))
                    room -= unit.stop or 0
                self.units.append(name)
                if not done.complete(name):
                    yield replace(unit, skip=done.units[name].records if name in done.units else [])
        if waiting:
            yield Unit("files", files=tuple(waiting))

    def check(self) -> None:
        """Whether every input holds something. Raises InputError."""
        self.ignored, self._begun = 0, []
        self._begun = [self._begin(text) for text in self.inputs]

    def _uris(self) -> Iterator[str]:
        """Of every input. What check() has begun is gone on with, as a folder of a million files takes seconds."""
        begun, self._begun = self._begun, []
        self.ignored = self.ignored if begun else 0
        for index, text in enumerate(self.inputs):
            yield from begun[index] if begun else self._begin(text)

    def _begin(self, text: str) -> Iterator[str]:
        uris = self._expand(absolute(text))
        first = next(uris, None)
        if first is None:
            raise InputError(f"{text} holds no pictures, tars or Parquet files: give another input")
        return chain([first], uris)

    def _expand(self, uri: str) -> Iterator[str]:
        try:
            if uri.lower().endswith(LISTS) and self.storage.exists(uri):
                yield from _read_list(uri, self.storage, self.uri_column)
            elif self.storage.is_folder(uri):
                yield from self._known(entry.uri for entry in self.storage.walk(uri))
            elif self.storage.exists(uri):
                if uri.lower().endswith(VIDEOS):
                    raise InputError(f"{uri} is a video, which this version cannot read: give pictures")
                yield uri
            elif glob.has_magic(uri):
                for match in self._glob(uri):
                    if not is_remote(match) and os.path.isdir(match):
                        yield from self._known(entry.uri for entry in self.storage.walk(match))
                    else:
                        yield from self._known([match])
            elif is_remote(uri):
                raise InputError(f"there is nothing at {uri}: check the name")
            else:
                raise InputError(f"{uri} does not exist: check the name")
        except InputError:
            raise
        except Exception as error:
            raise InputError(explain(uri, error)) from error

    def _known(self, uris: Iterable[str]) -> Iterator[str]:
        for uri in uris:
            if self.exclude and uri.startswith(self.exclude):
                continue
            if uri.lower().endswith((*IMAGES, ".tar", ".parquet")):
                yield uri
            else:
                self.ignored += 1

    def _glob(self, uri: str) -> Iterator[str]:
        if not is_remote(uri):
            yield from sorted(glob.iglob(uri, recursive=True))
            return
        fixed = re.split(r"[*?\[]", uri, maxsplit=1)[0].rpartition("/")[0]
        pattern = re.compile(glob_translate(uri))
        yield from (entry.uri for entry in self.storage.walk(fixed) if pattern.match(entry.uri))


def absolute(text: str) -> str:
    """A path as the workers can open it; s3:// uris as they are."""
    if is_remote(text):
        return text
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif "://" in text:
        raise InputError(f"{text} is neither a path nor an s3:// uri: copy it to one of these")
    return os.path.abspath(os.path.expanduser(text))


def printable(uri: str) -> str:
    """A path whose bytes are no UTF-8 as text that Arrow can hold; any other as it is."""
    return uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _kind(uri: str) -> str:
    lower = uri.lower()
    return "tar" if lower.endswith(".tar") else "parquet" if lower.endswith(".parquet") else "image"


def _read_list(uri: str, storage: Storage, column: str | None) -> Iterator[str]:
    with io.TextIOWrapper(storage.open(uri), "utf-8-sig", newline="" if uri.lower().endswith(".csv") else None) as file:
        try:
            for entry in filter(None, _entries(uri, file, column)):
                if "://" in entry or os.path.isabs(entry):
                    yield entry if "://" in entry and not entry.startswith("file://") else absolute(entry)
                elif is_remote(uri):
                    yield f"{uri.rpartition('/')[0]}/{entry}"
                else:  # beside the list, or where the command runs, as ultralytics takes it
                    yield _beside(uri, entry)
        except UnicodeDecodeError:
            raise InputError(f"{uri} is no text in UTF-8: write one uri a line") from None


def _entries(uri: str, lines: Iterable[str], column: str | None) -> Iterator[str]:
    if uri.lower().endswith(".txt"):
        yield from map(str.strip, lines)
    elif uri.lower().endswith(".csv"):
        yield from (_entry(row, column, uri) for row in csv.DictReader(lines))
    else:
        for line in filter(str.strip, lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{uri} is not JSON, one value a line: {error}") from None
            yield row if isinstance(row, str) else _entry(row, column, uri)


def _beside(uri: str, entry: str) -> str:
    here = os.path.abspath(entry)
    return here if os.path.exists(here) else os.path.normpath(os.path.join(os.path.dirname(uri), entry))


def _entry(row: dict[str, Any], column: str | None, uri: str) -> str:
    for name in (column,) if column else URI_COLUMNS:
        if isinstance(row.get(name), str):
            return str(row[name])
    wanted = column or ", ".join(URI_COLUMNS)
    raise InputError(f"{uri} has no column {wanted}, but {', '.join(map(str, row))}: name it with --uri-column")


# --- Reading, in the workers


def read(unit: Unit, storage: Storage, payload: bool = True) -> Iterator[Record]:
    """The unit's records in order, without those in `skip`; payload=False leaves their bytes unread.

    A record that cannot be read has a failure, and so has a unit without records, at position 0.
    """
    if unit.kind == "files":
        yield from _read_files(unit, storage)
        return
    assert unit.uri is not None
    name = printable(unit.uri)
    reader = _read_tar if unit.kind == "tar" else _read_parquet

    def records() -> Iterator[Record]:
        assert unit.uri is not None
        position = 0
        wanted = _Wanted(unit.skip)
        try:
            for record in reader(unit, storage, lambda position: payload and wanted(position)):
                yield record
                position = record.index + 1
        except Failure as failure:
            yield Record(name, position, name, name, failure=failure)
            return
        except (FileNotFoundError, PermissionError) as error:
            yield Record(name, position, name, name, failure=Failure(type(error).__name__, explain(name, error)))
            return
        if position == 0:
            yield Record(name, 0, name, name, failure=Failure("NoImages", f"no picture in this {unit.kind} file"))

    wanted = _Wanted(unit.skip)
    for record in _timed(_with_last(records(), unit.stop)):
        if wanted(record.index):
            yield record


class _Wanted:
    """Whether a position is not among the ranges to skip."""

    def __init__(self, skip: Ranges) -> None:
        self.skip = skip

    def __call__(self, position: int) -> bool:
        index = bisect_right(self.skip, position, key=itemgetter(0)) - 1
        return index < 0 or position >= self.skip[index][1]


def _with_last(records: Iterator[Record], stop: int | None) -> Iterator[Record]:
    """Marks the last record, which takes reading one ahead."""
    before: Record | None = None
    for record in islice(records, stop):
        if before:
            yield before
        before = record
    if before:
        yield replace(before, last=True)


def _timed(records: Iterator[Record]) -> Iterator[Record]:
    while True:
        clock, cpu = time.perf_counter(), time.thread_time()
        record = next(records, None)
        if record is None:
            return
        yield replace(record, seconds=(time.perf_counter() - clock, time.thread_time() - cpu))


def _read_files(unit: Unit, storage: Storage) -> Iterator[Record]:
    def fetch(item: tuple[int, str]) -> Record:
        clock, cpu = time.perf_counter(), time.thread_time()
        position, uri = item
        name = printable(uri)
        try:
            record = Record(None, position, name, name, data=_fetch(uri, storage))
        except Failure as failure:
            record = Record(None, position, name, name, failure=failure)
        return replace(record, seconds=(time.perf_counter() - clock, time.thread_time() - cpu))

    yield from _ahead(fetch, enumerate(unit.files), unit.files)


def _ahead(fetch: Callable[[Any], Record], items: Iterable[Any], uris: Iterable[str]) -> Iterator[Record]:
    """In order; from a store far away, several at a time."""
    if not any(is_remote(uri) for uri in uris):
        yield from map(fetch, items)
        return
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(fetch, item))
            if len(waiting) > AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _fetch(uri: str, storage: Storage) -> bytes:
    """A picture's bytes; Failure for what asking again would not mend."""
    if "://" in uri and not is_remote(uri):
        raise Failure("UnsupportedUri", f"{uri} is neither a path nor an s3:// uri")
    try:
        return storage.read(uri)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise Failure(type(error).__name__, explain(printable(uri), error)) from None
    except OSError as error:
        if is_remote(uri):  # the store is away, which no record caused
            raise
        raise Failure(type(error).__name__, str(error)) from None


# --- Tar


def _read_tar(unit: Unit, storage: Storage, wanted: Callable[[int], bool]) -> Iterator[Record]:
    """WebDataset: neighbours with one key are a sample; each of its pictures is a record."""
    assert unit.uri is not None
    name = printable(unit.uri)
    names: set[int] = set()
    sample = _Sample()
    position = 0
    with storage.open(unit.uri) as file:
        tar = _Tar(file)
        try:
            for member in tar:
                match = _SAMPLE.match(member.name)
                if not match:
                    continue
                key, suffix = match[1], match[2].lower()
                if key != sample.key or suffix in sample.suffixes:
                    yield from sample.records()
                    sample = _Sample(key)
                sample.suffixes.add(suffix)
                if f".{suffix}".endswith(IMAGES):
                    id = f"{name}#{_unique(printable(member.name), names)}"
                    record = Record(name, position, id, name)
                    if wanted(position):
                        record = _with_data(record, tar, member)
                    sample.pictures.append(record)
                    position += 1
                elif suffix.endswith(NEIGHBOURS) and member.size <= MAX_BYTES and (sample.pictures or wanted(position)):
                    sample.add_neighbour(suffix, tar.read(member).decode("utf-8", "replace"))
        except Failure:
            yield from sample.records()
            raise
        yield from sample.records()


@dataclass
class _Sample:
    key: str = ""
    suffixes: set[str] = field(default_factory=set)
    pictures: list[Record] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def add_neighbour(self, suffix: str, text: str) -> None:
        if suffix.endswith("json"):
            try:
                self.metadata[suffix] = json.loads(text)
            except ValueError:
                self.metadata[suffix] = text
        else:
            self.metadata[suffix] = int(text) if suffix.endswith("cls") and text.strip().isdecimal() else text

    def records(self) -> Iterator[Record]:
        metadata = as_json(self.metadata) if self.metadata else None
        return (replace(record, metadata=metadata) for record in self.pictures)


def _with_data(record: Record, tar: "_Tar", member: tarfile.TarInfo) -> Record:
    try:
        return replace(record, data=tar.read(member))
    except Failure as failure:
        tar.cut = failure.type == "TruncatedTar"
        return replace(record, failure=failure)


class _Tar:
    """tarfile, which forgets what it has read and ends quietly where an archive is damaged; this does neither."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.cut = False  # a picture was cut short, which its record says
        try:
            self.tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (closed with `file`)
        except tarfile.ReadError as error:
            file.seek(0)
            empty = not file.read(1)
            reason = "the file holds no bytes" if empty else f"not a tar: {error}"
            raise Failure("EmptyFile" if empty else "NotATar", reason) from None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while not self.cut:
            try:
                member = self.tar.next()
            except (tarfile.TarError, EOFError) as error:
                raise Failure("TruncatedTar", f"the archive ends in the middle of a member: {error}") from None
            self.tar.members.clear()  # type: ignore[attr-defined]
            if member is None:
                self._check_end()
                return
            if member.isfile():
                yield member

    def read(self, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_BYTES:
            raise Failure("TooManyBytes", f"{member.size:,} bytes; at most {MAX_BYTES:,} are read")
        stream = self.tar.extractfile(member)
        assert stream
        try:
            return stream.read()
        except tarfile.ReadError:
            raise Failure("TruncatedTar", f"the archive ends within this member of {member.size:,} bytes") from None

    def _check_end(self) -> None:
        offset = self.tar.offset
        self.file.seek(offset)
        block = self.file.read(512)
        # A header begins with a name: where a zero stands, be it the file's last byte, no member follows.
        if not block or block.strip(b"\0"):
            reason = f"the archive is cut off or damaged at byte {offset:,}; what follows is not read"
            raise Failure("TruncatedTar", reason)


def _unique(name: str, seen: set[int]) -> str:
    """A member's name; the second of that name in a tar becomes name#2. Hashes keep a million names small."""
    candidate, count = name, 1
    while (key := int.from_bytes(digest(candidate)[:8])) in seen:
        count += 1
        candidate = f"{name}#{count}"
    seen.add(key)
    return candidate


def as_json(value: Any) -> str:
    """JSON that any parser takes: no NaN, and what JSON has no form for as text."""
    return json.dumps(_finite(value), ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


# --- Parquet


def _read_parquet(unit: Unit, storage: Storage, wanted: Callable[[int], bool]) -> Iterator[Record]:
    assert unit.uri is not None
    with storage.open(unit.uri) as file:
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowException, ValueError) as error:
            raise Failure("NotParquet", f"not a Parquet file that can be read: {error}") from None
        column = _image_column(parquet.schema_arrow, unit.column)
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if any(wanted(position) for position in range(first, first + count)):
                yield from _read_group(parquet, group, first, column, unit, storage, wanted)
            else:
                name = printable(unit.uri)
                yield from (Record(name, p, f"{name}#{p}", name) for p in range(first, first + count))
            first += count


def _image_column(schema: pa.Schema, uri_column: str | None) -> str:
    name = uri_column or "image"
    if name not in schema.names:
        hint = "" if uri_column else "; if it lists uris, name their column with --uri-column"
        raise Failure("NoImageColumn", f"no column {name} among {', '.join(schema.names)}{hint}")
    type = schema.field(name).type
    fine = pa.types.is_string(type) or pa.types.is_large_string(type)
    if not uri_column:
        binary = type.field("bytes").type if pa.types.is_struct(type) and type.get_field_index("bytes") >= 0 else type
        fine = pa.types.is_binary(binary) or pa.types.is_large_binary(binary)
    if not fine:
        expected = "text" if uri_column else "bytes or {bytes, path}"
        raise Failure("NoImageColumn", f"column {name} is {type}, where {expected} was expected")
    return name


def _read_group(
    parquet: pq.ParquetFile,
    group: int,
    first: int,
    column: str,
    unit: Unit,
    storage: Storage,
    wanted: Callable[[int], bool],
) -> Iterator[Record]:
    assert unit.uri is not None
    name = printable(unit.uri)
    end = first + parquet.metadata.row_group(group).num_rows
    position = first

    def record(item: tuple[int, dict[str, Any]]) -> Record:
        position, row = item
        record = Record(name, position, f"{name}#{position}", name)
        if not wanted(position):
            return record
        value = row.pop(column)
        rest = as_json(row) if row else None
        try:
            data, source = _cell(value, unit, storage)
            return replace(record, data=data, uri=source, metadata=rest)
        except Failure as failure:
            return replace(record, failure=failure, metadata=rest)

    try:
        for batch in parquet.iter_batches(batch_size=16, row_groups=[group], use_threads=False):
            rows = list(enumerate(batch.to_pylist(), position))
            position += batch.num_rows
            remote = [unit.uri] if unit.column else []
            yield from _ahead(record, rows, remote)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and is_remote(unit.uri):
            raise
        failure = Failure("CorruptParquet", f"row group {group} cannot be read: {error}")
        yield from (Record(name, p, f"{name}#{p}", name, failure=failure) for p in range(position, end))


def _cell(value: Any, unit: Unit, storage: Storage) -> tuple[bytes, str]:
    """(encoded picture, where it came from)."""
    assert unit.uri is not None
    if isinstance(value, bytes):
        return value, printable(unit.uri)
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"], printable(unit.uri)
        value = value.get("path")
    if value is None:
        raise Failure("MissingImage", "the cell is empty")
    uri = value if "://" in value else os.path.join(unit.uri.rpartition("/")[0], value)
    return _fetch(uri, storage), printable(uri)
