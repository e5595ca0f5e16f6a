"""Which inputs are done: of units, ranges of records and of their frames; of loose files, hashes of their ids.

A place is (unit, record, frame). A picture is a record of one frame, 0. A unit's last record and a record's last frame
are marked as such, so that totals are proven by rows too.
"""

import base64
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from shardsight.row import digest

Ranges = list[tuple[int, int]]  # half-open, sorted, neither adjacent nor overlapping

_HASH = np.dtype("S16")
_VERSION = np.dtype("<u8")


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union of half-open ranges in any order."""
    merged: Ranges = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    return merged


def within(ranges: Sequence[tuple[int, int]], number: int) -> bool:
    at = bisect_right(ranges, number, key=itemgetter(0)) - 1
    return at >= 0 and number < ranges[at][1]


def first_outside(ranges: Ranges, number: int) -> int:
    """The least one from `number` on that is in none of them."""
    return next((stop for start, stop in ranges if start <= number < stop), number)


def size(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def hashes(ids: Iterable[str]) -> np.ndarray:
    """Ids → their digests, dtype S16, in the order given."""
    return np.frombuffer(b"".join(digest(id) for id in ids), _HASH)


def versions(texts: Iterable[str | None]) -> np.ndarray:
    """Versions as of row.version_of → dtype uint64, 0 for None."""
    return np.array([int(text or "0", 16) for text in texts], _VERSION)


class Hashes:
    """A set of hashes at 16 bytes each: sorted arrays, each shorter than the one before it."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def add(self, wanted: np.ndarray, limit: int | None = None) -> np.ndarray:
        """Add the new ones among `wanted`, at most the first `limit` of them; returns which, bool (n,)."""
        new = np.zeros(len(wanted), bool)
        new[np.unique(wanted, return_index=True)[1]] = True
        for run in self.runs:
            new &= ~among(wanted, run)
        if limit is not None:
            new &= np.cumsum(new) <= limit
        run = np.sort(wanted[new])
        while self.runs and len(self.runs[-1]) <= len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]))
        self.runs.append(run)
        return new

    def within(self, other: np.ndarray) -> bool:
        """Whether a sorted array holds all of them."""
        return all(among(run, other).all() for run in self.runs)


def among(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of `wanted` are in the sorted `known`, bool (n,)."""
    return _indices(wanted, known) >= 0


def _indices(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where each of `wanted` is in the sorted `known`, int64 (n,); -1 where it is not."""
    if not len(known):
        return np.full(len(wanted), -1)
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[at] == wanted, at, -1)


@dataclass
class UnitCoverage:
    """What is done of a unit.

    records: those of which every frame is done. frames: record → frames done, of records that are done in part.
    lengths: record → its number of frames, where known and not 1. total: the unit's number of records, where known.
    version: of its file when it was read. ignored: reason → number of its entries that hold no picture.
    """

    records: Ranges = field(default_factory=list)
    frames: dict[int, Ranges] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    total: int | None = None
    version: str | None = None
    ignored: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        # More are done than the total where the file became unreadable after some later records were done.
        start, stop = self.records[0] if self.records else (0, 0)
        return self.total is not None and start == 0 and stop >= self.total

    @property
    def rows(self) -> int:
        """How many frames are done, each counted once."""
        more = sum(n - 1 for record, n in self.lengths.items() if record not in self.frames and self.has(record))
        return size(self.records) + more + sum(map(size, self.frames.values()))

    def has(self, record: int) -> bool:
        """Whether every frame of a record is done."""
        return within(self.records, record)

    def places(self) -> Iterator[dict[str, Any]]:
        """The place of each row, but for its unit, in order: see row.PLACE."""
        whole = {record: [(0, self.lengths.get(record, 1))] for a, b in self.records for record in range(a, b)}
        for record, ranges in sorted((whole | self.frames).items()):
            last_record = record + 1 == self.total
            length = self.lengths.get(record, None if record in self.frames else 1)
            for frame in (frame for start, stop in ranges for frame in range(start, stop)):
                last_frame = frame + 1 == length
                yield {
                    **{"record": record, "last_record": last_record, "frame_number": frame, "last_frame": last_frame},
                    "version": self.version,
                    "ignored": json.dumps(self.ignored) if last_record and last_frame else None,
                }

    @staticmethod
    def union(parts: Iterable["UnitCoverage"]) -> "UnitCoverage":
        """What is done in any of them. They are expected to be of one version."""
        whole: list[tuple[int, int]] = []
        frames: dict[int, list[tuple[int, int]]] = {}
        made = UnitCoverage()
        for part in parts:
            whole += part.records
            made.lengths |= part.lengths
            made.ignored |= part.ignored
            made.total = part.total if made.total is None else made.total
            made.version = part.version if made.version is None else made.version
            for record, ranges in part.frames.items():
                frames.setdefault(record, []).extend(ranges)
        made.frames = {record: merge(ranges) for record, ranges in frames.items()}
        done = [record for record, ranges in made.frames.items() if ranges == [(0, made.lengths.get(record))]]
        made.records = merge([*whole, *((record, record + 1) for record in done)])
        made.frames = {record: ranges for record, ranges in made.frames.items() if not made.has(record)}
        return made

    def content(self) -> dict[str, Any]:
        """For JSON, without fields that are empty."""
        content = {name: value for name, value in vars(self).items() if value not in (None, [], {})}
        for name in ("frames", "lengths"):
            if name in content:
                content[name] = sorted(content[name].items())
        return content

    @staticmethod
    def of_content(content: dict[str, Any]) -> "UnitCoverage":
        frames, lengths = content.pop("frames", []), content.pop("lengths", [])
        made = UnitCoverage(**content)
        made.records = [(start, stop) for start, stop in made.records]
        made.frames = {record: [(start, stop) for start, stop in ranges] for record, ranges in frames}
        made.lengths = dict(lengths)
        return made


@dataclass
class Coverage:
    """What a results file holds, or several together.

    units: by name. files: sorted hashes of loose files' ids. file_versions: their versions, as of `versions`. rows:
    their number, which is more than `places` if some are there twice. errors: (stage, type) → number of rows.
    """

    units: dict[str, UnitCoverage] = field(default_factory=dict)
    files: np.ndarray = field(default_factory=lambda: np.empty(0, _HASH))
    file_versions: np.ndarray = field(default_factory=lambda: np.empty(0, _VERSION))
    rows: int = 0
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)

    @staticmethod
    def of(rows: list[dict[str, Any]]) -> "Coverage":
        """The coverage of rows that have `id`, `error` and the columns of row.PLACE; a loose file's `unit` is None."""
        units: dict[str, UnitCoverage] = {}
        for row in rows:
            if row["unit"] is None:
                continue
            unit = units.setdefault(row["unit"], UnitCoverage(version=row["version"]))
            record, frame = row["record"], row["frame_number"]
            if row["last_frame"] and frame == 0:
                unit.records.append((record, record + 1))
            else:
                unit.frames.setdefault(record, []).append((frame, frame + 1))
                if row["last_frame"]:
                    unit.lengths[record] = frame + 1
            if row["last_record"]:
                unit.total = record + 1
            unit.ignored |= json.loads(row["ignored"] or "{}")
        loose = [row for row in rows if row["unit"] is None]
        files, first = np.unique(hashes(row["id"] for row in loose), return_index=True)
        return Coverage(
            {name: UnitCoverage.union([unit]) for name, unit in units.items()},
            files,
            versions(row["version"] for row in loose)[first],
            len(rows),
            Counter((row["error"]["stage"], row["error"]["type"]) for row in rows if row["error"]),
        )

    @staticmethod
    def union(parts: Iterable["Coverage"]) -> "Coverage":
        parts = [Coverage(), *parts]
        units: dict[str, list[UnitCoverage]] = {}
        for part in parts:
            for name, unit in part.units.items():
                units.setdefault(name, []).append(unit)
        # As np.unique does it, in half of its memory.
        files = np.concatenate([part.files for part in parts])
        order = np.argsort(files, kind="stable")
        files, first = files[order], np.ones(len(files), bool)
        first[1:] = files[1:] != files[:-1]
        if not first.all():
            files, order = files[first], order[first]
        return Coverage(
            {name: UnitCoverage.union(found) for name, found in units.items()},
            files,
            np.concatenate([part.file_versions for part in parts])[order],
            sum(part.rows for part in parts),
            sum((part.errors for part in parts), Counter()),
        )

    @property
    def places(self) -> int:
        """How many frames are done, each counted once."""
        return len(self.files) + sum(unit.rows for unit in self.units.values())

    @property
    def ignored(self) -> Counter[str]:
        """Reason → number of entries of units that hold no picture."""
        return sum((Counter(unit.ignored) for unit in self.units.values()), Counter())

    def of_rows(self, ids: list[str]) -> list[dict[str, Any]]:
        """row.PLACE of each row of a results file, in which loose files follow the units' rows. ids: of all rows."""
        found = [{"unit": name} | place for name, unit in sorted(self.units.items()) for place in unit.places()]
        loose = hashes(ids[len(found) :])
        known = dict(zip(self.files.tolist(), self.file_versions.tolist(), strict=True))
        return [*found, *({"unit": None, "version": f"{known[one]:016x}"} for one in loose.tolist())]

    def complete(self, unit: str) -> bool:
        return unit in self.units and self.units[unit].complete

    def has(self, files: np.ndarray) -> np.ndarray:
        """Which loose files, given by their hashes, are done, bool (n,)."""
        return among(files, self.files)

    def changed(self, files: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Which loose files are done in another version than the one they have `now`, bool (n,)."""
        at = _indices(files, self.files)
        then = np.zeros(len(files), _VERSION)
        then[at >= 0] = self.file_versions[at[at >= 0]]
        return np.asarray((then != 0) & (now != 0) & (then != now))

    def dumps(self) -> bytes:
        content = {
            "units": {name: unit.content() for name, unit in self.units.items()},
            "files": base64.b64encode(self.files.tobytes()).decode(),
            "file_versions": base64.b64encode(self.file_versions.tobytes()).decode(),
            "rows": self.rows,
            "errors": [[*key, count] for key, count in sorted(self.errors.items())],
        }
        return json.dumps(content, sort_keys=True).encode()

    @staticmethod
    def loads(data: bytes) -> "Coverage":
        """Raises ValueError, KeyError or TypeError for data that `dumps` did not write."""
        content = json.loads(data)
        units = {}
        for name, unit in content["units"].items():
            if isinstance(unit, list):  # as 0.1.0 wrote it: ranges of records of one frame, and totals apart
                unit = {"records": unit, "total": content["totals"].get(name)}
            units[name] = UnitCoverage.of_content(unit)
        files = np.frombuffer(base64.b64decode(content["files"]), _HASH)
        then = content.get("file_versions")
        return Coverage(
            units,
            files,
            np.zeros(len(files), _VERSION) if then is None else np.frombuffer(base64.b64decode(then), _VERSION),
            content["rows"],
            Counter({(stage, type): count for stage, type, count in content["errors"]}),
        )
