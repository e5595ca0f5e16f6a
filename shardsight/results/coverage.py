"""Which inputs are done: positions of units as ranges, loose files as hashes of their ids."""

import base64
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardsight.row import digest

Ranges = list[tuple[int, int]]  # half-open, in order, neither touching nor overlapping

_HASH = np.dtype("S16")


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union of half-open ranges in any order."""
    merged: Ranges = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    return merged


def size(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def hashes(ids: Iterable[str]) -> np.ndarray:
    """Ids → their digests, dtype S16, in the order given."""
    return np.frombuffer(b"".join(digest(id) for id in ids), _HASH)


class Hashes:
    """A set of hashes at 16 bytes each: sorted runs, of which a longer never follows a shorter."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def add(self, wanted: np.ndarray, room: int | None = None) -> np.ndarray:
        """Add the first `room` of those that are new; returns which were, bool (n,)."""
        new = np.zeros(len(wanted), bool)
        new[np.unique(wanted, return_index=True)[1]] = True
        for run in self.runs:
            new &= ~among(wanted, run)
        if room is not None:
            new &= np.cumsum(new) <= room
        run = np.sort(wanted[new])
        while self.runs and len(self.runs[-1]) <= len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]))
        self.runs.append(run)
        return new

    def within(self, other: np.ndarray) -> bool:
        """Whether all of them are in a sorted array."""
        return all(among(run, other).all() for run in self.runs)


def among(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of `wanted` are in the sorted `known`, bool (n,)."""
    if not len(known):
        return np.zeros(len(wanted), bool)
    found = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.asarray(known[found] == wanted)


@dataclass
class Coverage:
    """What a results file holds, or all of them together.

    units: unit → its finished positions. totals: unit → how many positions it has, where its last
    record is known. files: sorted hashes of loose files' ids. rows: how many rows there are, which is
    more than the positions when one of them is there twice. errors: (stage, type) → rows.
    """

    units: dict[str, Ranges] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    files: np.ndarray = field(default_factory=lambda: np.empty(0, _HASH))
    rows: int = 0
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)

    @staticmethod
    def of(rows: list[dict[str, Any]]) -> "Coverage":
        """Of rows that have `unit` (None for a loose file), `position`, `last`, `id` and `error`."""
        units: dict[str, list[tuple[int, int]]] = {}
        totals = {}
        for row in rows:
            if row["unit"] is not None:
                units.setdefault(row["unit"], []).append((row["position"], row["position"] + 1))
                if row["last"]:
                    totals[row["unit"]] = row["position"] + 1
        return Coverage(
            {unit: merge(ranges) for unit, ranges in units.items()},
            totals,
            np.unique(hashes(row["id"] for row in rows if row["unit"] is None)),
            len(rows),
            Counter((row["error"]["stage"], row["error"]["type"]) for row in rows if row["error"]),
        )

    @staticmethod
    def union(parts: Iterable["Coverage"]) -> "Coverage":
        parts = list(parts)
        units: dict[str, list[tuple[int, int]]] = {}
        for part in parts:
            for unit, ranges in part.units.items():
                units.setdefault(unit, []).extend(ranges)
        return Coverage(
            {unit: merge(ranges) for unit, ranges in units.items()},
            {unit: total for part in parts for unit, total in part.totals.items()},
            np.unique(np.concatenate([part.files for part in parts])) if parts else np.empty(0, _HASH),
            sum(part.rows for part in parts),
            sum((part.errors for part in parts), Counter()),
        )

    @property
    def positions(self) -> int:
        """How many inputs are done, each counted once."""
        return len(self.files) + sum(size(ranges) for ranges in self.units.values())

    def places(self) -> list[dict[str, Any]]:
        """unit, position and last of each row, where rows are in the order of units, then loose files."""
        loose = {"unit": None, "position": 0, "last": False}
        return [
            {"unit": unit, "position": position, "last": position + 1 == self.totals.get(unit)}
            for unit in sorted(self.units)
            for start, stop in self.units[unit]
            for position in range(start, stop)
        ] + [loose] * len(self.files)

    def complete(self, unit: str) -> bool:
        return unit in self.totals and self.units[unit] == [(0, self.totals[unit])]

    def has(self, files: np.ndarray) -> np.ndarray:
        """Which loose files, given by their hashes, are done, bool (n,)."""
        return among(files, self.files)

    def dumps(self) -> bytes:
        content = {
            "units": self.units,
            "totals": self.totals,
            "files": base64.b64encode(self.files.tobytes()).decode(),
            "rows": self.rows,
            "errors": [[*key, count] for key, count in sorted(self.errors.items())],
        }
        return json.dumps(content, sort_keys=True).encode()

    @staticmethod
    def loads(data: bytes) -> "Coverage":
        content = json.loads(data)
        return Coverage(
            {unit: [(start, stop) for start, stop in ranges] for unit, ranges in content["units"].items()},
            content["totals"],
            np.frombuffer(base64.b64decode(content["files"]), _HASH),
            content["rows"],
            Counter({(stage, type): count for stage, type, count in content["errors"]}),
        )
