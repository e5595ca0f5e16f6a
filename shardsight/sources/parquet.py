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
from shardsight.sources.columns import image_field, values
from shardsight.sources.files import ahead, fetch
from shardsight.sources.metadata import as_json
from shardsight.sources.paths import resolve
from shardsight.sources.shard import ShardFile
from shardsight.sources.units import Record, Unit, Wanted, printable
from shardsight.storage import Storage

ROWS = 16  # read at once


def records(unit: Unit, file: ShardFile, storage: Storage, wanted: Wanted, ignored: "Counter[str]") -> Iterator[Record]:
    """Raises Failure where the file as a whole cannot be read; a damaged row group costs no other."""
    assert unit.uri is not None
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
    except Exception as error:
        raise Failure("NotParquet", f"not a Parquet file that can be read: {error}") from None
    if FOOTER in (parquet.metadata.metadata or {}):
        raise Failure("ResultsOfShardsight", "what an earlier job wrote is no input: leave it out")
    field = image_field(schema, unit.uri_column, unit.image_column)
    reader = _Reader(unit, storage, wanted, file, parquet, field)
    first = 0
    for group in range(parquet.num_row_groups):
        yield from reader.records(group, first)
        first += parquet.metadata.row_group(group).num_rows


@dataclass(frozen=True)
class _Reader:
    """field: of the column that holds pictures or their uris."""

    unit: Unit
    storage: Storage
    wanted: Wanted
    file: ShardFile
    parquet: pq.ParquetFile
    field: pa.Field

    def records(self, group: int, first: int) -> Iterator[Record]:
        """Those of a row group, whose first has the position `first`."""
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
                yield from ahead(self.record, rows, remote=self.unit.uri_column is not None)
        except Failure as failure:
            yield from (replace(record, failure=failure) for record in blank[done:])

    def blank(self, position: int) -> Record:
        name = printable(self.unit.uri or "")
        return Record(name, position, f"{name}#{position}", name)

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Of a row group. Where a column beside the pictures' cannot be read, the pictures are read without it.
        Raises Failure."""
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
        return replace(record, data=fetch(uri, self.storage), uri=printable(uri))
