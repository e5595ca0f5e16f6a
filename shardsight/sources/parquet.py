"""Parquet files of encoded pictures, or of their uris: each row is a record, its other columns its metadata."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shardsight.results.writer import FOOTER
from shardsight.row import Failure
from shardsight.sources.files import AHEAD, ShardFile, ahead, fetch
from shardsight.sources.metadata import as_json, values
from shardsight.sources.units import Record, Unit, Wanted, names_video, printable, resolve
from shardsight.storage import Storage

ROWS = 16  # read at once
# Of several columns of bytes, the one of such a name holds the pictures; `image` comes before the others.
IMAGE_COLUMNS = {
    *("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes"),
    *("image_bytes", "img_bytes", "image_data", "encoded_image"),
}


def records(unit: Unit, file: ShardFile, storage: Storage, wanted: Wanted, ignored: "Counter[str]") -> Iterator[Record]:
    """Raises Failure where the file as a whole cannot be read; a damaged row group costs no other."""
    assert unit.uri is not None
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
    except Exception as error:
        raise Failure("NotParquet", f"not a Parquet file that can be read: {error}") from None
    if FOOTER in (parquet.metadata.metadata or {}):
        raise Failure("ResultsOfShardsight", "the results of a job are no input: leave this file out")
    field = _image_field(schema, unit)
    reader = _Reader(unit, storage, wanted, file, parquet, field)
    first = 0
    for group in range(parquet.num_row_groups):
        yield from reader.records(group, first)
        first += parquet.metadata.row_group(group).num_rows


def is_results(uri: str, storage: Storage) -> bool:
    """Whether a job has written a Parquet file; False for a file that cannot be read."""
    try:
        with ShardFile(uri, storage) as file:
            return FOOTER in (pq.read_metadata(file).metadata or {})
    except (Failure, pa.ArrowException, OSError, ValueError):
        return False


def holds_text(uri: str, column: str, storage: Storage) -> bool:
    """Whether a column of a Parquet file is text; False for a file that cannot be read."""
    try:
        with ShardFile(uri, storage) as file:
            return any(field.name == column and _is_text(field.type) for field in pq.read_schema(file))
    except (Failure, pa.ArrowException, OSError, ValueError):
        return False


@dataclass(frozen=True)
class _Reader:
    """field: the column of the pictures or their uris."""

    unit: Unit
    storage: Storage
    wanted: Wanted
    file: ShardFile
    parquet: pq.ParquetFile
    field: pa.Field

    def records(self, group: int, first: int) -> Iterator[Record]:
        """Those of a row group, whose first one has the position `first`."""
        end = first + self.parquet.metadata.row_group(group).num_rows
        blank = [self.blank(position) for position in range(first, end)]
        if not any(self.wanted(record.index, record.id) for record in blank):
            yield from blank
            return
        done = 0
        try:
            for batch in self.batches(group):
                rows = enumerate(self.rows(batch), first + done)
                done += batch.num_rows
                yield from ahead(self.record, rows, AHEAD if self.unit.uri_column else 0)
        except Failure as failure:
            yield from (replace(record, failure=failure) for record in blank[done:])

    def blank(self, position: int) -> Record:
        name = printable(self.unit.uri or "")
        return Record(name, position, f"{name}#{position}", name)

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Of a row group, without the metadata columns that cannot be read. Raises Failure."""
        done, columns = 0, None
        failure = Failure("CorruptParquet", "")
        for _ in range(2):
            seen = 0
            try:
                for batch in self.read(group, columns):
                    new = batch.slice(min(batch.num_rows, done - seen)) if seen < done else batch
                    seen += batch.num_rows
                    done = max(done, seen)
                    if new.num_rows:
                        yield new
                return
            except Exception as error:
                self.file.check()
                failure = Failure("CorruptParquet", f"row group {group} cannot be read: {error}")
            columns = [self.field.name, *self.readable(group)]
        raise failure

    def read(self, group: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        return self.parquet.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns, use_threads=False)

    def readable(self, group: int) -> Iterator[str]:
        """The other columns that can be read by themselves."""
        for name in dict.fromkeys(self.parquet.schema_arrow.names):
            try:
                for _ in self.read(group, [name]):
                    pass
                yield name
            except Exception:
                self.file.check()

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(the picture's cell, the other cells by name)"""
        names: list[str] = []
        cells: list[list[Any]] = []
        picture: list[Any] = []
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if not picture and (field.name, field.type) == (self.field.name, self.field.type):
                picture = values(column)
                continue
            count = names.count(field.name)
            names.append(f"{field.name}#{count + 1}" if count else field.name)
            cells.append(values(column))
        for index, cell in enumerate(picture):
            yield cell, {name: column[index] for name, column in zip(names, cells, strict=True)}

    def record(self, item: tuple[int, tuple[Any, dict[str, Any]]]) -> Record:
        position, (cell, others) = item
        record = self.blank(position)
        if not self.wanted(position, record.id):
            return record
        record = replace(record, metadata=as_json(others) if others else None)
        try:
            return self.with_data(record, cell)
        except Failure as failure:
            return replace(record, failure=failure)

    def with_data(self, record: Record, cell: Any) -> Record:
        if isinstance(cell, dict):
            cell = cell["path"] if cell.get("bytes") is None and "path" in cell else cell.get("bytes")
        if cell is None:
            raise Failure("MissingImage", "the cell is empty")
        if isinstance(cell, bytes):
            return replace(record, data=cell)
        uri = resolve(str(cell), self.unit.uri or "", self.unit.folder or os.getcwd())
        if names_video(uri):
            return replace(record, video_uri=uri, uri=printable(uri))
        return replace(record, data=fetch(uri, self.storage), uri=printable(uri))


def _image_field(schema: pa.Schema, unit: Unit) -> pa.Field:
    """The column that holds the pictures, as bytes or {bytes, path}, or their uris. Raises Failure."""
    if unit.uri_column or unit.image_column:
        return _named_field(schema, unit)
    found = [field for field in schema if _is_bytes(field.type) or _is_struct(field.type)]
    known = [field for field in found if field.name.lower() in IMAGE_COLUMNS]
    known = [field for field in known if field.name == "image"] or known
    found = known if len(known) == 1 else found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(field.name for field in found)
        reason = f"several columns hold bytes ({names}): name the one of the pictures with --image-column"
        raise Failure("NoImageColumn", reason)
    reason = f"no column of bytes or {{bytes, path}} among {', '.join(schema.names)}"
    if "image" in schema.names:
        given = ", ".join(str(field.type) for field in schema if field.name == "image")
        reason = f"column image is {given}, where bytes or {{bytes, path}} were expected"
    raise Failure("NoImageColumn", f"{reason}: if a column lists uris, name it with --uri-column")


def _named_field(schema: pa.Schema, unit: Unit) -> pa.Field:
    """The first suitable column of the name that the user gave, as several may have it."""
    name = unit.uri_column or unit.image_column
    fields = [field for field in schema if field.name == name]
    if not fields:
        raise Failure("NoImageColumn", f"no column {name} among {', '.join(schema.names)}")
    for field in fields:
        fixed = pa.types.is_fixed_size_binary(_bare(field.type))
        if _is_text(field.type) if unit.uri_column else _is_bytes(field.type) or _is_struct(field.type) or fixed:
            return field
    expected = "text" if unit.uri_column else "bytes or {bytes, path}"
    raise Failure("NoImageColumn", f"column {name} is {fields[0].type}, where {expected} was expected")


def _bare(type: pa.DataType) -> pa.DataType:
    """The type within dictionaries and extensions."""
    while pa.types.is_dictionary(type) or isinstance(type, pa.BaseExtensionType):
        type = type.value_type if pa.types.is_dictionary(type) else type.storage_type
    return type


def _is_text(type: pa.DataType) -> bool:
    return _bare(type) in (pa.string(), pa.large_string(), pa.string_view())


def _is_bytes(type: pa.DataType) -> bool:
    return _bare(type) in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_struct(type: pa.DataType) -> bool:
    bare = _bare(type)
    return pa.types.is_struct(bare) and any(field.name == "bytes" and _is_bytes(field.type) for field in bare)
