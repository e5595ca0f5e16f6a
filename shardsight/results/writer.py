"""Rows → Parquet, exactly once; what is there already; job.json.

A results file says in its footer which inputs it holds, so that rows and evidence appear in one atomic
write. Its name follows from what it holds, so that a write done twice replaces itself.
"""

import fcntl
import hashlib
import io
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FSSpecHandler, PyFileSystem

from shardsight.results.coverage import Coverage
from shardsight.row import PLACE, ROW, STAGES
from shardsight.storage import Storage, StorageError, explain, is_remote

FOOTER = b"shardsight"
_EVIDENCE = [*(name for name, _ in PLACE), "id", "error"]
HEARTBEAT = 2.0  # seconds between the signs of life of a run that writes to object storage


@dataclass(frozen=True)
class Written:
    """What a write put there: its coverage, and of each stage the rows that it did and its seconds for them."""

    coverage: Coverage
    stages: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Results:
    """A job's output folder or prefix."""

    out: str
    storage: Storage

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
        self.storage.write(path or f"{self.folder}/part-{name}.parquet", buffer.getvalue())
        return coverage

    def files(self) -> list[tuple[str, Coverage]]:
        """Every results file with what it holds. Raises StorageError for a file of somebody else's."""
        paths = [path for path in self._paths() if path.endswith(".parquet")]
        with ThreadPoolExecutor(16) as pool:
            return list(zip(paths, pool.map(self._evidence, paths), strict=True))

    def _paths(self) -> list[str]:
        return list(self.storage.walk(self.folder)) if self.storage.is_folder(self.folder) else []

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
        ids: set[str] = set()
        for path, _ in sorted(files, key=lambda entry: -entry[1].rows):
            names = self._read(path, ["id"])["id"].to_pylist()
            repeated = ids.intersection(names)
            ids.update(names)
            if repeated:
                self._drop(path, pa.array([name in repeated for name in names]))

    def drop_errors(self) -> None:
        """Take away the rows that failed, so that they are missing and are run again."""
        for path, coverage in self.files():
            if coverage.errors:
                self._drop(path, pc.is_valid(self._read(path, ["error"])["error"]))

    def _drop(self, path: str, unwanted: pa.Array | pa.ChunkedArray) -> None:
        """Rewrite a file without some of its rows: in place, so that no reader sees a row twice or misses the file."""
        rows = self._read(path)
        wanted = pc.invert(unwanted)
        places = pa.Table.from_pylist(self._evidence(path).of_rows(rows["id"].to_pylist()), schema=pa.schema(PLACE))
        evidence = places.append_column("id", rows["id"]).append_column("error", rows["error"])
        self._put(rows.filter(wanted), _coverage(evidence.filter(wanted)), path)

    def _read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        with self.storage.open(path) as file:
            return pq.read_table(file, columns=columns)

    def dataset(self) -> ds.Dataset:
        """The rows of every file, of row.ROW."""
        paths = [path for path in self._paths() if path.endswith(".parquet")]
        filesystem = PyFileSystem(FSSpecHandler(self.storage.s3)) if is_remote(self.out) else None
        return ds.dataset([path.removeprefix("s3://") for path in paths], ROW, filesystem=filesystem, format="parquet")

    def clear(self) -> None:
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


class Busy(StorageError):
    """Another run is writing to the same output."""


@contextmanager
def lock(results: Results) -> Iterator[None]:
    """Keep other runs out of an output. Raises Busy; what a killed run left behind keeps nobody out."""
    sentence = f"another run is writing to {results.out}: wait for it, or choose another --output"
    if is_remote(results.out):
        with _Claim(results, sentence):
            yield
        return
    with open(f"{results.out}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends
        except BlockingIOError:
            raise Busy(sentence) from None
        yield


class _Claim:
    """A lock out of objects, for stores without a conditional write.

    Each run puts a claim of its own and renews it every HEARTBEAT. It then looks at the others': a holder
    that is alive turns it away; of two that are only claiming, the one of the higher name withdraws, and
    the other waits to see it go. A claim that is not renewed for three heartbeats is a dead run's.
    """

    def __init__(self, results: Results, sentence: str) -> None:
        self.results, self.sentence = results, sentence
        self.folder = f"{results.out.rstrip('/')}/lock"
        self.name = uuid.uuid4().hex
        self.state, self.beats = "claiming", 0
        self.stop = threading.Event()

    def __enter__(self) -> None:
        try:
            self._beat()
        except Exception as error:
            raise StorageError(explain(self.results.out, error)) from error
        threading.Thread(target=self._keep_alive, daemon=True).start()
        try:
            watched: dict[str, tuple[dict[str, Any], float]] = {}
            while others := self._others():
                for name, claim in others.items():
                    before, since = watched.get(name, (None, 0.0))
                    if before is None:
                        watched[name] = claim, time.monotonic()
                    elif claim["beats"] == before["beats"] and claim["state"] == before["state"]:
                        if time.monotonic() - since > 3 * HEARTBEAT:
                            self.results.storage.remove(f"{self.folder}/{name}")
                    elif claim["state"] == "holding" or name < self.name:
                        raise Busy(self.sentence)
                    else:
                        watched[name] = claim, time.monotonic()
                time.sleep(HEARTBEAT / 4)
            self.state = "holding"
            self._beat()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.results.storage.remove(f"{self.folder}/{self.name}")

    def _others(self) -> dict[str, dict[str, Any]]:
        others = {}
        for path in self.results.storage.walk(self.folder):
            name = path.rpartition("/")[2]
            if name != self.name:
                try:
                    others[name] = json.loads(self.results.storage.read(path))
                except FileNotFoundError:  # it went while we looked
                    continue
        return others

    def _beat(self, storage: Storage | None = None) -> None:
        self.beats += 1
        content = json.dumps({"state": self.state, "beats": self.beats}).encode()
        (storage or self.results.storage).write(f"{self.folder}/{self.name}", content)

    def _keep_alive(self) -> None:
        """A beat that fails is followed by the next: once the store is back, nobody must take us for dead."""
        while not self.stop.wait(HEARTBEAT):
            with suppress(Exception):
                self._beat(replace(self.results.storage, patience=0.0))
