"""Coverage, the proof that every input is in the results once."""

import base64
import itertools
import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardsight.results.coverage import Coverage, Hashes, UnitCoverage, among, hashes, merge, versions
from shardsight.row import version_of
from tests.conftest import place

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1])))


@given(RANGES)
def test_merge_is_the_union(ranges: list[tuple[int, int]]) -> None:
    merged = merge(ranges)
    assert {p for start, stop in merged for p in range(start, stop)} == {p for a, b in ranges for p in range(a, b)}
    assert all(a < b for a, b in merged)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))


def rows(units: list[list[int]]) -> list[dict[str, Any]]:
    """Every row of units whose records have so many frames each, and of five loose files; some failed."""
    made = [
        place(f"u{unit}", record, record + 1 == len(lengths), frame, length)
        for unit, lengths in enumerate(units)
        for record, length in enumerate(lengths)
        for frame in range(length)
    ]
    for number, row in enumerate(made):
        row["version"] = version_of(row["unit"])
        if row["last_record"] and row["last_frame"]:
            row["ignored"] = '{".md files": 2}'
        if number % 7 == 3:
            row["error"] = {"stage": "decode", "type": "X"}
    return made + [place(None, n) | {"version": version_of(n)} for n in range(5)]


UNITS = st.lists(st.lists(st.sampled_from([1, 1, 1, 2, 3, 9]), min_size=1, max_size=6), min_size=1, max_size=4)


@given(st.data())
def test_any_order_split_and_repetition_of_batches(data: st.DataObject) -> None:
    """Rows arrive in any order, in files of any size, some twice, some never: it is known exactly which are missing."""
    units = data.draw(UNITS)
    everything = rows(units)
    chosen = data.draw(st.lists(st.sampled_from(everything), max_size=60))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(chosen)), max_size=5)))
    files = [chosen[a:b] for a, b in zip([0, *cuts], [*cuts, len(chosen)], strict=True)]
    done = Coverage.union(Coverage.loads(Coverage.of(file).dumps()) for file in files)

    ids = {row["id"] for row in chosen}
    assert done.places == len(ids)
    assert done.rows == len(chosen)
    for unit, lengths in enumerate(units):
        found = done.units.get(f"u{unit}", UnitCoverage())
        for record, length in enumerate(lengths):
            there = {frame for frame in range(length) if f"u{unit}#{record}@{frame}" in ids}
            assert found.has(record) == (len(there) == length)
            if not found.has(record):
                assert {f for a, b in found.frames.get(record, []) for f in range(a, b)} == there
        whole = all(row["id"] in ids for row in everything if row["unit"] == f"u{unit}")
        assert done.complete(f"u{unit}") == whole
        ends = f"u{unit}#{len(lengths) - 1}@{lengths[-1] - 1}" in ids
        assert found.ignored == ({".md files": 2} if ends else {})
    assert done.has(hashes(f"None#{n}@0" for n in range(5))).tolist() == [f"None#{n}@0" in ids for n in range(5)]
    assert sum(done.errors.values()) == sum(1 for row in chosen if row["error"])


@given(st.data())
def test_places_of_a_files_rows_come_back(data: st.DataObject) -> None:
    """A file is rewritten without its failed rows: the places of the others must follow from its footer alone."""
    chosen = data.draw(st.sets(st.integers(0, 40)))
    everything = rows(data.draw(UNITS))
    kept = [row for number, row in enumerate(everything) if number in chosen]
    order = [row for row in kept if row["unit"]] + [row for row in kept if not row["unit"]]
    coverage = Coverage.loads(Coverage.of(kept).dumps())
    again = [
        row | {"id": old["id"], "error": old["error"]}
        for row, old in zip(coverage.of_rows([row["id"] for row in order]), order, strict=True)
    ]
    for row in again:
        for name in ("record", "frame_number", "last_record", "last_frame", "ignored"):
            row.setdefault(name, None)
    assert Coverage.of(again).dumps() == coverage.dumps()
    assert [(row["unit"], row["record"] or 0, row["frame_number"] or 0) for row in again] == [
        (row["unit"], row["record"] if row["unit"] else 0, row["frame_number"]) for row in order
    ]


def test_a_changed_file_is_noticed() -> None:
    """A picture that was replaced at the same path is run again; one of unknown version is not."""
    done = Coverage.of([place(None, n) | {"version": version} for n, version in enumerate(["1", "2", None])])
    ids = hashes([f"None#{n}@0" for n in range(4)])
    assert done.changed(ids, versions(["1", "3", "4", "5"])).tolist() == [False, True, False, False]
    assert done.changed(ids, versions([None] * 4)).tolist() == [False] * 4


def test_a_file_that_is_there_twice_counts_once() -> None:
    """A repeated write may have had other bounds. The version is the first one's."""
    one, two = (
        Coverage.of([place(None, n) | {"version": v} for n in some]) for v, some in (("1", (0, 1)), ("2", (1, 2)))
    )
    both = Coverage.union([one, two])
    assert (both.rows, both.places) == (4, 3)
    ids = hashes([f"None#{n}@0" for n in range(3)])
    assert both.has(ids).all() and both.changed(ids, versions(["1", "1", "2"])).tolist() == [False] * 3


def test_footers_of_the_version_before() -> None:
    """0.1.0 wrote ranges of records, and totals: its unfinished jobs can be resumed."""
    old = {"units": {"a.tar": [[0, 2], [3, 5]]}, "totals": {"a.tar": 5}, "rows": 5, "errors": [["read", "X", 1]]}
    old["files"] = base64.b64encode(hashes(["b.jpg"]).tobytes()).decode()
    done = Coverage.loads(json.dumps(old).encode())
    assert done.units["a.tar"].records == [(0, 2), (3, 5)] and done.units["a.tar"].total == 5
    assert done.places == 5 and done.has(hashes(["b.jpg", "c.jpg"])).tolist() == [True, False]
    assert not done.changed(hashes(["b.jpg"]), versions(["1"]))[0]
    assert Coverage.union([done, Coverage.of([place("a.tar", 2)])]).complete("a.tar")


@given(st.lists(st.lists(st.integers(0, 30)), max_size=12), st.integers(0, 40) | st.none())
def test_hashes_is_a_set(batches: list[list[int]], limit: int | None) -> None:
    known: set[int] = set()
    ours = Hashes()
    for batch in batches:
        new = ours.add(hashes(map(str, batch)), None if limit is None else limit - len(known))
        for value, is_new in zip(batch, new, strict=True):
            expected = value not in known and (limit is None or len(known) < limit)
            assert bool(is_new) == expected
            if expected:
                known.add(value)
    assert len(ours) == len(known)
    everything = np.sort(hashes(map(str, range(31))))
    assert ours.within(everything)
    assert ours.within(everything[1:]) == (not any(everything[0] == h for h in hashes(map(str, known))))


def test_hashes_that_end_in_zero_bytes_are_told_apart() -> None:
    """numpy's byte strings drop trailing zeros, which must not make two hashes equal."""
    first, second = b"a" * 15 + b"\0", b"a" * 14 + b"\0\0"
    array = np.frombuffer(first + second, "S16")
    assert len(np.unique(array)) == 2
    assert among(array[:1], np.sort(array[1:])).tolist() == [False]
