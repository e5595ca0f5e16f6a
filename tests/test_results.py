"""The writer: complete files or none, each row once."""

import shutil
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
from shardsight.results.writer import FOOTER, Results
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


def test_a_repeated_write_replaces_the_first(results: Results) -> None:
    """Ray may run a write twice: the name is a hash of the content, so there is one file."""
    part = table(("a", 1), ("a", 0), (None, 5), (None, 6))
    results.write(part, 100)
    results.write(part, 100)
    assert len(results.files()) == 1
    assert ids(results) == ["None#5@0", "None#6@0", "a#0@0", "a#1@0"]
    assert records(results.done()) == {"a": [(0, 2)]}


def test_rows_of_overlapping_files_are_kept_once(results: Results) -> None:
    """A retried batch with other bounds leaves rows twice: after a restart each is there once."""
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
    """What Ray may do to batches, run after run: after restarts each place is there once, and at no time twice.

    Each run does what the files before it lack; some of its rows are lost, some come twice, in other batches.
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
            if run < 3:  # the last run loses nothing
                left = data.draw(st.lists(st.sampled_from(left), max_size=2 * len(left)), "came") if left else []
            elif left:
                left = data.draw(st.permutations(left), "came")
            for start in range(0, len(left), size := data.draw(st.integers(1, 5), "batch")):
                results.write(rows(left[start : start + size]), data.draw(st.integers(1, 4), "rows a file"))
        done = results.done()
        assert ids(results) == sorted(row["id"] for row in everything)
        assert all(done.complete(f"u{unit}") for unit in range(len(units)))


def has(done: Coverage, row: dict[str, Any]) -> bool:
    """Whether a row is done."""
    if row["unit"] is None:
        return bool(done.has(hashes([row["id"]]))[0])
    unit, record = done.units.get(row["unit"], UnitCoverage()), row["record"]
    return unit.has(record) or any(a <= row["frame_number"] < b for a, b in unit.frames.get(record, []))


def test_failed_rows_are_dropped_with_their_evidence(results: Results) -> None:
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
    """A reader that lists the folder at any moment must not see a part of a file."""

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


def test_damaged_files_are_named_and_kept(results: Results) -> None:
    """A copy that was cut off must not be a traceback, and what it holds must not be deleted unasked."""
    results.write(table(("a", 0), ("a", 1), failed=(1,)), 100)
    (path,) = Path(results.folder).iterdir()
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    foreign = pq.read_table(path).replace_schema_metadata({FOOTER: b"{}"})
    for damaged in (b"", whole[:-30], whole[:footer] + bytes(20) + whole[footer + 20 :]):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=rf"^{path} cannot be read .* finished rows, so restore it.*again$"):
            results.done()
        assert path.read_bytes() == damaged
    pq.write_table(foreign, path)
    with pytest.raises(StorageError, match="cannot be read as a results file"):
        results.done()
    path.write_bytes(whole[:4] + bytes(footer - 4) + whole[footer:])
    assert results.done().rows == 2
    with pytest.raises(StorageError, match="cannot be read as a results file"):
        results.drop_errors()


@pytest.mark.parametrize("content", [b"", b'{"status": "do', b"\xff", b"[]", b'{"name": "another tool"}'])
def test_a_broken_or_foreign_job_file_is_refused(results: Results, content: bytes) -> None:
    Path(results.job_file).write_bytes(content)
    with pytest.raises(StorageError, match=rf"^{results.job_file} is damaged, or not of a Shardsight job: choose"):
        results.job()
    results.clear()
    assert results.job() is None


def test_changed_inputs_are_dropped_from_every_file(results: Results) -> None:
    """A tar that was appended to is run again: its old rows must be removed from every file, and no others."""
    video = [place("v", 0, True, frame, 3) for frame in range(3)]
    results.write(rows([place("a", 0), place("b", 0), *video[:2], place(None, 1), place(None, 2)]), 100)
    results.write(rows([place("a", 1, True), video[2], place(None, 3)]), 100)
    results.write(rows([place("a", 2)]), 100)
    results.drop({"a", "not there"}, hashes(["None#3@0", "None#1@0", "nor this"]))
    assert ids(results) == ["None#2@0", "b#0@0", "v#0@0", "v#0@1", "v#0@2"]
    assert len(results.files()) == 2  # one held nothing else
    done = results.done()
    assert set(done.units) == {"b", "v"} and done.complete("v") and done.rows == done.places == 5


@given(st.data())
@settings(max_examples=30)
def test_what_is_dropped_is_missing_and_nothing_else(data: st.DataObject) -> None:
    """Units with records of many frames, and loose files, in files of any bounds: it is known exactly what is left."""
    lengths = data.draw(st.lists(st.lists(st.sampled_from([1, 1, 3]), min_size=1, max_size=3), max_size=3), "frames")
    everything = [
        place(f"u{unit}", record, record + 1 == len(records), frame, length) | {"version": f"{unit:016x}"}
        for unit, records in enumerate(lengths)
        for record, length in enumerate(records)
        for frame in range(length)
    ]
    everything += [place(None, n) for n in range(4)]
    units = data.draw(st.sets(st.sampled_from(["u0", "u1", "u2"])), "units")
    files = data.draw(st.sets(st.sampled_from([f"None#{n}@0" for n in range(5)])), "files")
    with tempfile.TemporaryDirectory() as folder:
        results = Results(folder, Storage())
        results.prepare()
        shuffled = data.draw(st.permutations(everything))
        for start in range(0, len(shuffled), size := data.draw(st.integers(1, 6), "batch")):
            results.write(rows(shuffled[start : start + size]), data.draw(st.integers(1, 4), "rows a file"))
        results.drop(units, hashes(files))
        left = [row for row in everything if row["unit"] not in units and row["id"] not in files]
        done = results.done()
        assert ids(results) == sorted(row["id"] for row in left)
        assert done.rows == done.places == len(left)
        assert {name: unit.version for name, unit in done.units.items()} == {
            row["unit"]: row["version"] for row in left if row["unit"]
        }


def test_jobs_of_the_version_before_resume(tmp_path: Path) -> None:
    """Written by 0.1.0: records 0, 1 (failed), 3 and 4 of a tar's five, a whole tar, and a loose picture."""
    shutil.copytree(Path(__file__).parent / "data" / "version-0.1.0", tmp_path, dirs_exist_ok=True)
    results = Results(str(tmp_path), Storage())
    done = results.done()
    assert records(done) == {"in/a.tar": [(0, 2), (3, 5)], "in/c.tar": [(0, 2)]}
    assert done.complete("in/c.tar") and not done.complete("in/a.tar")
    assert done.has(hashes(["in/b.jpg", "in/d.jpg"])).tolist() == [True, False]
    assert (done.rows, done.places) == (7, 7)
    results.drop_errors()
    results.write(rows([place("in/a.tar", 1), place("in/a.tar", 2)]), 100)
    results.write(rows([place("in/a.tar", 0) | {"id": "in/a.tar#0.jpg"}]), 100)  # once more
    done = results.done()
    assert done.complete("in/a.tar") and done.rows == done.places == 8
