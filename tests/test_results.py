"""The writer: whole files or none, each row once, one run at a time."""

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsight.decode.frames import TABLE
from shardsight.results.coverage import Coverage, Ranges, UnitCoverage, hashes
from shardsight.results.writer import Results
from shardsight.row import FRAME, ROW
from shardsight.storage import Storage, StorageError
from tests.conftest import place


def table(*places: tuple[str | None, int], total: int = 10, failed: tuple[int, ...] = ()) -> pa.Table:
    """Rows of records of one frame."""
    error = {"stage": "decode", "type": "X", "message": "m"}
    return rows([place(unit, n, n == total - 1) | ({"error": error} if n in failed else {}) for unit, n in places])


def rows(places: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([field for field in TABLE if field.name not in dict(FRAME)])
    return pa.Table.from_pylist([place | {"uri": "u"} for place in places], schema=schema)


def records(coverage: Coverage) -> dict[str, Ranges]:
    return {name: unit.records for name, unit in coverage.units.items()}


def ids(results: Results) -> list[str]:
    return sorted(row["id"] for path, _ in results.files() for row in pq.read_table(path, columns=["id"]).to_pylist())


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(str(tmp_path), Storage())
    results.prepare()
    return results


def test_a_repeated_write_replaces_itself(results: Results) -> None:
    """Ray may run a write twice: the name follows from the content, so there is one file."""
    part = table(("a", 1), ("a", 0), (None, 5), (None, 6))
    results.write(part, 100)
    results.write(part, 100)
    assert len(results.files()) == 1
    assert ids(results) == ["None#5@0", "None#6@0", "a#0@0", "a#1@0"]
    assert records(results.done()) == {"a": [(0, 2)]}


def test_rows_that_overlap_otherwise_are_mended(results: Results) -> None:
    """A retried batch that was cut elsewhere leaves rows twice: a restart leaves each once."""
    results.write(table(*(("a", n) for n in range(6)), (None, 0), (None, 1)), 100)
    results.write(table(*(("a", n) for n in range(4, 9)), (None, 1), (None, 2)), 100)
    done = results.done()
    assert done.rows == done.places == 12
    assert ids(results) == sorted([*(f"a#{n}@0" for n in range(9)), *(f"None#{n}@0" for n in range(3))])
    assert records(Coverage.union(coverage for _, coverage in results.files())) == {"a": [(0, 9)]}


def test_rows_twice_in_one_write(results: Results) -> None:
    results.write(table(("a", 0), ("a", 1), ("a", 0), (None, 3), (None, 3)), 100)
    assert ids(results) == ["None#3@0", "a#0@0", "a#1@0"]


@given(st.data())
@settings(max_examples=40)
def test_any_order_split_retry_and_loss_of_batches(data: st.DataObject) -> None:
    """What Ray may do to batches, run after run: after restarts each position is there once, and none twice on the way.

    Each run does what the files before it lack; of its rows some are lost, some come twice, cut otherwise.
    """
    units = data.draw(st.lists(st.lists(st.sampled_from([1, 1, 2, 4]), min_size=1, max_size=5), max_size=3), "frames")
    everything = [
        place(f"u{unit}", record, record + 1 == len(lengths), frame, length)
        for unit, lengths in enumerate(units)
        for record, length in enumerate(lengths)
        for frame in range(length)
    ]
    everything += [place(None, n) for n in range(data.draw(st.integers(0 if units else 1, 4), "loose files"))]
    with tempfile.TemporaryDirectory() as folder:
        results = Results(folder, Storage())
        results.prepare()
        for run in range(4):
            done = results.done()
            assert done.rows == done.places == len(ids(results)) == len(set(ids(results)))
            left = [row for row in everything if not has(done, row)]
            if run < 3:  # the last loses nothing
                left = data.draw(st.lists(st.sampled_from(left), max_size=2 * len(left)), "came") if left else []
            elif left:
                left = data.draw(st.permutations(left), "came")
            for start in range(0, len(left), size := data.draw(st.integers(1, 5), "batch")):
                results.write(rows(left[start : start + size]), data.draw(st.integers(1, 4), "rows a file"))
        done = results.done()
        assert ids(results) == sorted(row["id"] for row in everything)
        assert all(done.complete(f"u{unit}") for unit in range(len(units)))


def has(done: Coverage, row: dict[str, Any]) -> bool:
    """Whether a row is there."""
    if row["unit"] is None:
        return bool(done.has(hashes([row["id"]]))[0])
    unit, record = done.units.get(row["unit"], UnitCoverage()), row["record"]
    return unit.has(record) or any(a <= row["frame_number"] < b for a, b in unit.frames.get(record, []))


def test_errors_are_dropped_with_their_evidence(results: Results) -> None:
    results.write(table(*(("b", n) for n in range(3)), *(("a", n) for n in range(10)), (None, 5), failed=(1, 5)), 100)
    results.write(table(("c", 1), total=2, failed=(1,)), 100)
    results.drop_errors()
    assert ids(results) == sorted(["b#0@0", "b#2@0", *(f"a#{n}@0" for n in (0, 2, 3, 4, 6, 7, 8, 9))])
    done = results.done()
    assert records(done) == {"a": [(0, 1), (2, 5), (6, 10)], "b": [(0, 1), (2, 3)]} and done.units["a"].total == 10
    assert done.errors.total() == 0 and len(done.files) == 0


def test_files_are_no_larger_than_asked(results: Results) -> None:
    results.write(table(*(("a", n) for n in range(10))), 4)
    assert sorted(coverage.rows for _, coverage in results.files()) == [2, 4, 4]
    for path, _ in results.files():
        assert pq.read_schema(path).remove_metadata() == ROW


def test_a_write_that_fails_leaves_nothing(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lists the folder at the worst moment must see no half of a file."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        results.write(table(("a", 0)), 100)
    assert list(Path(results.folder).iterdir()) == []


def test_foreign_files_are_refused(results: Results) -> None:
    pq.write_table(pa.table({"a": [1]}), f"{results.folder}/x.parquet")
    with pytest.raises(StorageError, match="not written by Shardsight"):
        results.done()
