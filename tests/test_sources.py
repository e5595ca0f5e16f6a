"""Inputs → records: nothing is left out, nothing is read that is done."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardsight.results.coverage import Coverage, Ranges
from shardsight.sources import InputError, Listing, Record, Unit, absolute, as_json, read
from shardsight.storage import Storage
from tests.conftest import place, write_tar

STORAGE = Storage()


def records(path: Path, skip: Ranges | None = None, kind: str = "tar") -> list[Record]:
    return list(read(Unit(kind, str(path), skip=skip or []), STORAGE))


def listed(*inputs: Path, done: Coverage | None = None) -> list[Unit]:
    return list(Listing([str(path) for path in inputs], STORAGE).left(done or Coverage()))


def test_samples_of_a_tar(tmp_path: Path) -> None:
    """WebDataset: neighbours of a key become metadata, in whatever order they come; two pictures are two records."""
    write_tar(
        tmp_path / "a.tar",
        [
            *[("a.cls", b"7"), ("a.jpg", b"A"), ("a.json", b'{"x": NaN, "y": [1]}')],
            *[("dir/b.txt", b"words"), ("dir/b.left.png", b"L"), ("dir/b.right.png", b"R")],
            *[("c.json", b"no json"), ("c.JPG", b"C"), ("lone.json", b"{}"), ("README", b"hi"), ("._a.jpg", b"mac")],
        ],
    )
    found = records(tmp_path / "a.tar")
    assert [(r.index, r.id.rpartition("#")[2], r.data) for r in found] == [
        *[(0, "a.jpg", b"A"), (1, "dir/b.left.png", b"L"), (2, "dir/b.right.png", b"R"), (3, "c.JPG", b"C")]
    ]
    assert [r.metadata and json.loads(r.metadata) for r in found] == [
        *[{"cls": 7, "json": {"x": None, "y": [1]}}, {"txt": "words"}, {"txt": "words"}, {"json": "no json"}]
    ]
    assert [r.last for r in found] == [False, False, False, True]


@given(st.lists(st.sampled_from(["a.jpg", "a.jpg#2", "b.jpg", "a.png"]), max_size=8))
@settings(max_examples=60)
def test_names_that_repeat_stay_apart(names: list[str]) -> None:
    """Ids are unique even where a member's name looks like our mark for a second one; and stable when some are done."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write_tar(path, [(name if name.endswith("g") else f"{name}.jpg", b"x") for name in names])
        found = records(path)
        ids = [record.id for record in found]
        assert len(set(ids)) == len(ids) == max(1, len(names))
        assert [record.id for record in records(path, skip=[(0, len(names) // 2)])] == ids[len(names) // 2 :]


@given(st.integers(0, 20_000))
@example(11264)  # where the last member ends: more could have followed
@example(11265)  # and a zero, which begins no header
@settings(max_examples=80)
def test_a_tar_cut_anywhere(cut: int) -> None:
    """All whole members come out, and the cut is said exactly once, unless only padding is gone."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        members = [(f"{index}.jpg", bytes([4 - index]) * (100 + 700 * index)) for index in range(5)]
        write_tar(path, members)
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        found = records(path)
        good = [record.data for record in found if record.data is not None]
        end, fit = 0, 0
        for _, data in members:
            end += 512 + len(data)
            fit += end <= cut
            end = -(-end // 512) * 512
        assert good == [data for _, data in members][:fit]
        failures = [record for record in found if record.failure]
        complete = cut > end
        assert len(failures) == (0 if complete else 1), (cut, end, found)
        assert found[-1].last and [record.last for record in found].count(True) == 1
        assert len({record.id for record in found}) == len(found)


def test_damage_in_the_middle_of_a_tar_is_said(tmp_path: Path) -> None:
    """tarfile ends quietly at a damaged header, and every member after it would be lost unseen."""
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{index}.jpg", b"x" * 600) for index in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1536 : 2 * 1536 + 100] = b"\xff" * 100
    path.write_bytes(data)
    found = records(path)
    assert [record.failure and record.failure.type for record in found] == [None, None, "TruncatedTar"]


def test_long_and_foreign_names(tmp_path: Path) -> None:
    """200 characters, and bytes that are no UTF-8, as old archives hold them."""
    long = "d" * 120 + "/" + "n" * 200 + ".jpg"
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format, encoding="latin-1") as tar:
            for name in (long, "b\xe9.jpg"):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        found = records(tmp_path / "a.tar")
        assert found[0].id.endswith(long) and found[1].id.endswith("jpg")
        for record in found:
            record.id.encode()


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


def test_parquet_of_every_shape(tmp_path: Path) -> None:
    (tmp_path / "side.jpg").write_bytes(b"from a file")
    rows = [{"bytes": b"1", "path": None}, {"bytes": None, "path": "side.jpg"}, None, {"bytes": None, "path": "gone"}]
    pq.write_table(pa.table({"image": rows, "t": [1.5, float("nan"), None, 2.0]}), tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet", kind="parquet")
    assert [record.data for record in found] == [b"1", b"from a file", None, None]
    assert [r.failure and r.failure.type for r in found] == [None, None, "MissingImage", "FileNotFoundError"]
    assert [json.loads(r.metadata or "")["t"] for r in found] == [1.5, None, None, 2.0]
    for table, words in [
        (pa.table({"picture": [b"x"]}), "no column image among picture"),
        (pa.table({"image": ["text"]}), "where bytes"),
        (pa.table({"image": pa.array([], pa.binary())}), "no picture"),
    ]:
        pq.write_table(table, tmp_path / "b.parquet")
        (record,) = records(tmp_path / "b.parquet", kind="parquet")
        assert record.failure and words in record.failure.message and record.last


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [os.urandom(2000) for _ in range(9)]})
    pq.write_table(table, path, row_group_size=3, compression="snappy", use_dictionary=False)
    offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = b"\xff" * 400
    path.write_bytes(data)
    found = records(path, kind="parquet")
    assert [record.index for record in found] == list(range(9))
    assert [bool(record.failure) for record in found] == [False] * 3 + [True] * 3 + [False] * 3


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
    assert listing.ignored == 1
    for wrong in (tmp_path / "nothing", tmp_path / "*.gif"):
        with pytest.raises(InputError):
            listed(wrong)
    with pytest.raises(InputError, match="video"):
        (tmp_path / "v.mp4").touch()
        listed(tmp_path / "v.mp4")


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
        absolute("gs://b/k")
    assert json.loads(as_json({"a": [float("inf"), b"x", "é"], "b": {"c": float("nan")}})) == {
        "a": [None, "b'x'", "é"],
        "b": {"c": None},
    }
