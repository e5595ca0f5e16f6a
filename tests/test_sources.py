"""Inputs → records: nothing is left out, nothing is read that is done."""

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardsight.results.coverage import Coverage, Ranges, UnitCoverage
from shardsight.sources import InputError, Listing, Record, Unit, absolute, as_json, read
from shardsight.storage import Storage
from tests.conftest import place, write_tar

STORAGE = Storage()


def records(path: Path, skip: Ranges | None = None, kind: str = "tar") -> list[Record]:
    return list(read(Unit(kind, str(path), skip=skip or []), STORAGE))


def listed(*inputs: Path, done: Coverage | None = None) -> list[Unit]:
    return list(Listing([str(path) for path in inputs], STORAGE).left(done or Coverage()))


def test_positions_that_are_done_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart seeks over finished members and row groups instead of reading them."""
    write_tar(tmp_path / "a.tar", [(f"{index}.jpg", b"x" * 100_000) for index in range(50)])
    read_bytes = 0
    original = tarfile.ExFileObject.read

    def counting(self: tarfile.ExFileObject, *args: int) -> bytes:
        nonlocal read_bytes
        data = original(self, *args)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(tarfile.ExFileObject, "read", counting)
    found = records(tmp_path / "a.tar", skip=[(0, 20), (22, 49)])
    assert [record.index for record in found] == [20, 21, 49] and found[-1].last
    assert read_bytes == 300_000

    pq.write_table(pa.table({"image": [b"a", b"b", b"c", b"d"]}), tmp_path / "a.parquet", row_group_size=2)
    groups = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **k: groups.append(k["row_groups"]) or iter_batches(self, **k)
    )
    found = records(tmp_path / "a.parquet", skip=[(0, 3)], kind="parquet")
    assert [(record.index, record.data) for record in found] == [(3, b"d")] and groups == [[1]]


def test_listing(tmp_path: Path) -> None:
    """Folders, globs, literal names that look like globs, repeated inputs, hidden and foreign files."""
    for name in ("a.jpg", "b[1].jpg", "c d.PNG", ".hidden.jpg", "notes.md", "sub/d.jpg", "sub/deep/e.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    write_tar(tmp_path / "sub/t.tar", [("x.jpg", b"x")])
    (tmp_path / "loop").symlink_to(tmp_path)

    def names(*inputs: Path) -> list[str]:
        units = listed(*inputs)
        return sorted(
            os.path.relpath(uri, tmp_path) for unit in units for uri in (unit.files or (unit.uri,)) if uri is not None
        )

    everything = ["a.jpg", "b[1].jpg", "c d.PNG", "sub/d.jpg", "sub/deep/e.webp", "sub/t.tar"]
    assert names(tmp_path) == everything
    assert names(tmp_path, tmp_path / "a.jpg", tmp_path / "sub") == everything
    assert names(tmp_path / "*.jpg") == ["a.jpg", "b[1].jpg"]
    assert names(tmp_path / "b[1].jpg") == ["b[1].jpg"]
    assert names(tmp_path / "sub" / "**" / "*.jpg") == ["sub/d.jpg"]
    assert names(tmp_path / "notes.md") == ["notes.md"]  # named outright, it is an input; decoding will say what it is
    listing = Listing([str(tmp_path)], STORAGE)
    list(listing.left(Coverage()))
    assert listing.ignored == {".md files": 1, "hidden files": 1}
    for wrong in (tmp_path / "nothing", tmp_path / "*.gif"):
        with pytest.raises(InputError):
            listed(wrong)


def test_a_file_that_goes_away_ends_where_its_rows_end(tmp_path: Path) -> None:
    """Deleted in the middle of a job, a shard must not leave the job waiting for rows that nobody can make."""
    for skip, end in (([(0, 2)], 2), ([(0, 2), (4, 6)], 2), ([(3, 5)], 0), ([], 0)):
        (record,) = records(tmp_path / "gone.tar", skip=skip)
        assert (record.index, record.last) == (end, True) and record.failure
        last = UnitCoverage(records=[(end, end + 1)], total=end + 1)
        assert UnitCoverage.union([UnitCoverage(records=skip), last]).complete


def test_done_units_are_not_listed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", b"x"), ("y.jpg", b"y")])
    (tmp_path / "l.jpg").write_bytes(b"x")
    tar = str(tmp_path / "a.tar")
    rows = [place(tar, n, n == 1) for n in range(2)]
    loose = [place(None, 0) | {"id": str(tmp_path / "l.jpg")}]
    assert listed(tmp_path, done=Coverage.of(rows + loose)) == []
    assert [unit.skip for unit in listed(tmp_path, done=Coverage.of(rows[1:] + loose))] == [[(1, 2)]]
    assert [unit.kind for unit in listed(tmp_path, done=Coverage.of(rows))] == ["files"]


def test_paths_and_json() -> None:
    assert absolute("file:///a%20b/c.jpg") == "/a b/c.jpg"
    assert absolute("s3://b/k #1.jpg") == "s3://b/k #1.jpg"
    with pytest.raises(InputError):
        absolute("https://b/k")
    assert json.loads(as_json({"a": [float("inf"), b"x", "é"], "b": {"c": float("nan")}})) == {
        "a": [None, "eA==", "é"],
        "b": {"c": None},
    }
