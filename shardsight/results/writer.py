"""Rows → Parquet, exactly once; job.json.

A results file says in its footer which inputs it holds, so that rows and evidence appear in one atomic write. Its name
is a hash of the evidence, so that a repeated write replaces the file of the first.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FSSpecHandler, PyFileSystem

from shardsight.errors import UsageError
from shardsight.object_stores import Rejected
from shardsight.results.coverage import Coverage, Hashes, among, hashes
from shardsight.results.lock import Claim, lock
from shardsight.row import PLACE, ROW, STAGES
from shardsight.storage import Storage, StorageError, explain, is_remote

FOOTER = b"shardsight"
_EVIDENCE = [*(name for name, _ in PLACE), "id", "error"]


@dataclass(frozen=True)
class Written:
    """What was written: its coverage, and for each stage the number of rows that it processed and its seconds."""

    coverage: Coverage
    stages: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Results:
    """A job's output folder or prefix.

    claim: of the run that writes to an output in a store. Every write checks it first, and raises lock.Lost if another
    run has taken over the output.
    """

    out: str
    storage: Storage
    claim: Claim | None = None

    @contextmanager
    def locked(self) -> Iterator["Results"]:
        """The results, locked for this run. Raises lock.Busy."""
        with lock(self.out, self.storage) as claim:
            yield replace(self, claim=claim)

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/results"

    @property
    def job_file(self) -> str:
        return f"{self.out.rstrip('/')}/job.json"

    def write(self, table: pa.Table, rows_per_file: int) -> Written:
        """Write rows with the columns of ROW, PLACE and SECONDS, in files of no more than `rows_per_file`."""
        clock, cpu = time.perf_counter(), time.thread_time()
        stages = {
            stage: {"rows": pc.count(table[f"{stage}_clock_seconds"]).as_py()}
            | {kind: pc.sum(table[f"{stage}_{kind}"]).as_py() or 0.0 for kind in ("clock_seconds", "cpu_seconds")}
            for stage in STAGES
        }
        parts = []
        for start in range(0, len(table), rows_per_file):
            part = _in_order(table.slice(start, rows_per_file))
            parts.append(self._put(part.select(ROW.names), _coverage(part)))
        spent = {"clock_seconds": time.perf_counter() - clock, "cpu_seconds": time.thread_time() - cpu}
        return Written(Coverage.union(parts), stages | {"write": {"rows": len(table), **spent}})

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
        """Every results file with what it holds. Raises StorageError for one that is damaged, or not Shardsight's."""
        paths = self._paths(".parquet")
        with ThreadPoolExecutor(16) as pool:
            return list(zip(paths, pool.map(self._evidence, paths), strict=True))

    def _paths(self, suffix: str = "") -> list[str]:
        if not self.storage.is_folder(self.folder):
            return []
        return [entry.uri for entry in self.storage.walk(self.folder) if entry.uri.endswith(suffix)]

    def _evidence(self, path: str) -> Coverage:
        with self._opened(path) as file:
            evidence = (pq.read_metadata(file).metadata or {}).get(FOOTER)
            if evidence is None:
                raise StorageError(f"{path} was not written by Shardsight: choose another --output")
            return Coverage.loads(evidence)

    @contextmanager
    def _opened(self, path: str) -> Iterator[BinaryIO]:
        """A results file, while it is parsed. Raises StorageError; nothing is removed, as it may hold finished rows."""
        try:
            with self.storage.open(path) as file:
                yield file
        except (StorageError, PermissionError, FileNotFoundError, Rejected) as error:
            raise StorageError(explain(path, error)) from error
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow raises the first two
            raise StorageError(
                f"{path} cannot be read as a results file ({' '.join(str(error).split())}): it may hold finished rows, "
                "so restore it, or remove it to compute them again"
            ) from error

    def done(self) -> Coverage:
        """What all files hold. If some rows are there twice, as a repeated write had other bounds, removes them."""
        files = self.files()
        done = Coverage.union(coverage for _, coverage in files)
        if done.rows > done.places:
            self._keep_first(files)
            done = Coverage.union(coverage for _, coverage in self.files())
        return done

    def _keep_first(self, files: list[tuple[str, Coverage]]) -> None:
        ids = Hashes()
        for path, coverage in sorted(files, key=lambda file: -file[1].rows):
            with self._opened(path) as file:
                new = ids.add(hashes(pq.read_table(file, columns=["id"])["id"].to_pylist()))
            if not new.all():
                self._keep(path, coverage, lambda _: new)  # noqa: B023

    def drop_errors(self) -> None:
        """Remove the rows that failed, so that they are missing and are run again."""
        for path, coverage in self.files():
            if coverage.errors:
                self._keep(path, coverage, lambda evidence: evidence["error"].is_null().to_numpy())

    def drop(self, units: set[str], files: np.ndarray) -> None:
        """Remove the rows of units, by name, and of loose files, by the hashes of their ids (dtype S16, in any order),
        so that they are missing and are run again: of inputs that have changed, say."""
        files = np.sort(files)

        def keep(evidence: pa.Table) -> np.ndarray:
            loose = evidence["unit"].is_null().to_numpy() & among(hashes(evidence["id"].to_pylist()), files)
            return ~(loose | pc.is_in(evidence["unit"], pa.array(units, pa.string())).to_numpy())

        for path, coverage in self.files():
            if not units.isdisjoint(coverage.units) or coverage.has(files).any():
                self._keep(path, coverage, keep)

    def drop_records(self, records: set[tuple[str, int]]) -> None:
        """Remove the rows of records, (unit, number)."""

        def keep(evidence: pa.Table) -> np.ndarray:
            names = zip(evidence["unit"].to_pylist(), evidence["record"].to_pylist(), strict=True)
            return np.array([name not in records for name in names])

        for path, coverage in self.files():
            if any(unit in coverage.units for unit, _ in records):
                self._keep(path, coverage, keep)

    def _keep(self, path: str, coverage: Coverage, keep: Callable[[pa.Table], np.ndarray]) -> None:
        """Rewrite a file with some of its rows: in place, so that no reader sees a row twice or misses the file. If no
        row is left, remove it. keep: table of _EVIDENCE, a row for each of the file's → which to keep, bool (n,)."""
        with self._opened(path) as file:
            rows = pq.read_table(file)
        places = pa.Table.from_pylist(coverage.of_rows(rows["id"].to_pylist()), schema=pa.schema(PLACE))
        evidence = places.append_column("id", rows["id"]).append_column("error", rows["error"])
        kept = pa.array(keep(evidence))
        if pc.any(kept).as_py():
            self._put(rows.filter(kept), _coverage(evidence.filter(kept)), path)
        else:
            self._check()
            self.storage.remove(path)

    def dataset(self) -> ds.Dataset:
        """The rows of every file, with the columns of row.ROW."""
        paths = self._paths(".parquet")
        if not is_remote(self.out):
            return ds.dataset(paths, ROW, format="parquet")
        filesystem = PyFileSystem(FSSpecHandler(self.storage.filesystem(self.out)))
        return ds.dataset([path.partition("://")[2] for path in paths], ROW, filesystem=filesystem, format="parquet")

    def clear(self) -> None:
        """Remove the results, job.json and what goes with it."""
        self._check()
        for path in self._paths():
            self.storage.remove(path)
        for path in (self.job_file, *self._networks):
            with suppress(FileNotFoundError):
                self.storage.remove(path)

    @property
    def _networks(self) -> list[str]:
        return [f"{self.out.rstrip('/')}/int8.{ending}" for ending in ("xml", "bin")]

    def keep_network(self, content: tuple[bytes, bytes]) -> None:
        """Keep the network in int8 that computes the job, in OpenVINO's format: its .xml and its .bin."""
        self._check()
        for path, data in zip(self._networks, content, strict=True):
            self.storage.write(path, data)

    def network(self, sha256: str) -> tuple[bytes, bytes]:
        """What `keep_network` kept. Raises UsageError where it is not that any more."""
        try:
            xml, weights = map(self.storage.read, self._networks)
        except FileNotFoundError:
            xml = weights = b""
        if hashlib.sha256(xml + weights).hexdigest() != sha256:
            raise UsageError(
                f"{' and '.join(self._networks)} are not the network that this job began with: bring them back, or "
                "--overwrite the job"
            )
        return xml, weights

    def prepare(self) -> None:
        """Create the folder of an output on a disk."""
        if not is_remote(self.out):
            os.makedirs(self.folder, exist_ok=True)

    def job(self) -> dict[str, Any] | None:
        """The content of job.json; None if there is none. Raises StorageError."""
        try:
            text = self.storage.read(self.job_file)
        except FileNotFoundError:
            return None
        except (OSError, Rejected) as error:
            raise StorageError(explain(self.job_file, error)) from error
        with suppress(ValueError):
            content = json.loads(text)
            if isinstance(content, dict) and {"configuration", "models"} <= content.keys():
                return content
        raise StorageError(
            f"{self.job_file} is damaged, or not of a Shardsight job: choose another output, or remove it if its "
            "results are of the same settings"
        )

    def save_job(self, content: dict[str, Any]) -> None:
        self._check()
        self.storage.write(self.job_file, json.dumps(content, indent=2, ensure_ascii=False, default=str).encode())


def _coverage(table: pa.Table) -> Coverage:
    """The coverage of rows with the columns of _EVIDENCE."""
    return Coverage.of(table.select(_EVIDENCE).to_pylist())


def _in_order(table: pa.Table) -> pa.Table:
    """Rows sorted by unit, record and frame, then loose files, each once: as Coverage.of_rows expects them."""
    table = table.sort_by([("unit", "ascending"), ("record", "ascending"), ("frame_number", "ascending")])
    names = zip(*(table[name].to_pylist() for name in ("unit", "record", "frame_number", "id")), strict=True)
    keys = [(unit, record, frame) if unit is not None else id for unit, record, frame, id in names]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    return table if len(first) == len(keys) else table.take(sorted(first.values()))
