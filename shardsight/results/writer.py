"""Rows → Parquet, exactly once; what is there already; job.json.

A results file says in its footer which inputs it holds, so that rows and evidence appear in one atomic
write. Its name follows from what it holds, so that a write done twice replaces itself.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FSSpecHandler, PyFileSystem

from shardsight.results.coverage import Coverage, Hashes, among, hashes
from shardsight.results.lock import Claim, lock
from shardsight.row import PLACE, ROW, STAGES
from shardsight.storage import Storage, StorageError, is_remote

FOOTER = b"shardsight"
_EVIDENCE = [*(name for name, _ in PLACE), "id", "error"]


@dataclass(frozen=True)
class Written:
    """What a write put there: its coverage, and of each stage the rows that it did and its seconds for them."""

    coverage: Coverage
    stages: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Results:
    """A job's output folder or prefix.

    claim: of the run that writes there, in a store. All that writes checks it first, and raises lock.Lost where another
    run has taken the output over.
    """

    out: str
    storage: Storage
    claim: Claim | None = None

    @contextmanager
    def locked(self) -> Iterator["Results"]:
        """The results that this run alone may write to. Raises lock.Busy."""
        with lock(self.out, self.storage) as claim:
            yield replace(self, claim=claim)

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/results"

    @property
    def job_file(self) -> str:
        return f"{self.out.rstrip('/')}/job.json"

    def write(self, table: pa.Table, rows_per_file: int) -> Written:
        """Write rows of ROW, PLACE and `…_seconds` columns, in files of no more than `rows_per_file`."""
        stages = {
            stage: {"rows": pc.count(table[f"{stage}_clock_seconds"]).as_py()}
            | {kind: pc.sum(table[f"{stage}_{kind}"]).as_py() or 0.0 for kind in ("clock_seconds", "cpu_seconds")}
            for stage in STAGES
        }
        parts = []
        for start in range(0, len(table), rows_per_file):
            part = _in_order(table.slice(start, rows_per_file))
            parts.append(self._put(part.select(ROW.names), _coverage(part)))
        return Written(Coverage.union(parts), stages)

    def _put(self, rows: pa.Table, coverage: Coverage, path: str | None = None) -> Coverage:
        evidence = coverage.dumps()
        buffer = io.BytesIO()
        pq.write_table(rows.cast(ROW).replace_schema_metadata({FOOTER: evidence}), buffer, compression="zstd")
        name = hashlib.blake2b(evidence, digest_size=12).hexdigest()
        self._check()
        self.storage.write(path or f"{self.folder}/part-{name}.parquet", buffer.getvalue())
        return coverage

    def _check(self) -> None:
        if self.claim:
            self.claim.check(self.storage)

    def files(self) -> list[tuple[str, Coverage]]:
        """Every results file with what it holds. Raises StorageError for a file of somebody else's."""
        paths = [path for path in self._paths() if path.endswith(".parquet")]
        with ThreadPoolExecutor(16) as pool:
            return list(zip(paths, pool.map(self._evidence, paths), strict=True))

    def _paths(self) -> list[str]:
        if not self.storage.is_folder(self.folder):
            return []
        return [entry.uri for entry in self.storage.walk(self.folder)]

    def _evidence(self, path: str) -> Coverage:
        with self.storage.open(path) as file:
            evidence = (pq.read_metadata(file).metadata or {}).get(FOOTER)
        if evidence is None:
            raise StorageError(f"{path} was not written by Shardsight: choose another --output")
        return Coverage.loads(evidence)

    def done(self) -> Coverage:
        """All that is there. Rows that are there twice, after a write that was repeated otherwise, are mended first."""
        files = self.files()
        done = Coverage.union(coverage for _, coverage in files)
        if done.rows > done.places:
            self._keep_first(files)
            done = Coverage.union(coverage for _, coverage in self.files())
        return done

    def _keep_first(self, files: list[tuple[str, Coverage]]) -> None:
        ids = Hashes()
        for path, _ in sorted(files, key=lambda entry: -entry[1].rows):
            new = ids.add(hashes(self._read(path, ["id"])["id"].to_pylist()))
            if not new.all():
                self._drop(path, ~new)

    def drop_errors(self) -> None:
        """Take away the rows that failed, so that they are missing and are run again."""
        for path, coverage in self.files():
            if coverage.errors:
                self._drop(path, self._read(path, ["error"])["error"].is_valid().to_numpy())

    def drop(self, units: set[str], files: np.ndarray) -> None:
        """Take away the rows of units, by name, and of loose files, by the hashes of their ids (dtype S16, in any
        order), so that they are missing and are run again: of inputs that have changed, say."""
        files = np.sort(files)
        for path, coverage in self.files():
            if units.isdisjoint(coverage.units) and not coverage.has(files).any():
                continue
            ids = self._read(path, ["id"])["id"].to_pylist()
            named = [place["unit"] for place in coverage.of_rows(ids)]
            loose = np.array([unit is None for unit in named]) & among(hashes(ids), files)
            self._drop(path, loose | np.array([unit in units for unit in named]))

    def _drop(self, path: str, unwanted: np.ndarray) -> None:
        """Rewrite a file without some of its rows: in place, so that no reader sees a row twice or misses the file.
        A file of which nothing is left is removed."""
        if unwanted.all():
            self._check()
            self.storage.remove(path)
            return
        rows, wanted = self._read(path), pa.array(~unwanted)
        places = pa.Table.from_pylist(self._evidence(path).of_rows(rows["id"].to_pylist()), schema=pa.schema(PLACE))
        evidence = places.append_column("id", rows["id"]).append_column("error", rows["error"])
        self._put(rows.filter(wanted), _coverage(evidence.filter(wanted)), path)

    def _read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        with self.storage.open(path) as file:
            return pq.read_table(file, columns=columns)

    def dataset(self) -> ds.Dataset:
        """The rows of every file, of row.ROW."""
        paths = [path for path in self._paths() if path.endswith(".parquet")]
        if not is_remote(self.out):
            return ds.dataset(paths, ROW, format="parquet")
        filesystem = PyFileSystem(FSSpecHandler(self.storage.filesystem(self.out)))
        return ds.dataset([path.partition("://")[2] for path in paths], ROW, filesystem=filesystem, format="parquet")

    def clear(self) -> None:
        self._check()
        for path in self._paths():
            self.storage.remove(path)
        if self.storage.exists(self.job_file):
            self.storage.remove(self.job_file)

    def prepare(self) -> None:
        if not is_remote(self.out):
            os.makedirs(self.folder, exist_ok=True)

    def job(self) -> dict[str, Any] | None:
        """job.json, where there is one."""
        if not self.storage.exists(self.job_file):
            return None
        content: dict[str, Any] = json.loads(self.storage.read(self.job_file))
        return content

    def save_job(self, content: dict[str, Any]) -> None:
        self._check()
        self.storage.write(self.job_file, json.dumps(content, indent=2, ensure_ascii=False, default=str).encode())


def _coverage(table: pa.Table) -> Coverage:
    """Of a table with the columns of row.PLACE, `id` and `error`."""
    return Coverage.of(table.select(_EVIDENCE).to_pylist())


def _in_order(table: pa.Table) -> pa.Table:
    """Units by name, record and frame, then loose files, each once: a footer's ranges then tell the rows' places."""
    table = table.sort_by([("unit", "ascending"), ("record", "ascending"), ("frame_number", "ascending")])
    names = zip(*(table[name].to_pylist() for name in ("unit", "record", "frame_number", "id")), strict=True)
    keys = [(unit, record, frame) if unit is not None else id for unit, record, frame, id in names]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    return table if len(first) == len(keys) else table.take(sorted(first.values()))
