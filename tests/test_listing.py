"""Inputs and lists: what is there is listed once, in the version that it has, and nothing is left out unsaid."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsight.results.coverage import Coverage, hashes
from shardsight.results.writer import FOOTER
from shardsight.row import Failure
from shardsight.sources import InputError, Listing, Unit, pack, pictures, read, unpack
from shardsight.sources.units import resolve
from shardsight.storage import Storage
from tests.conftest import place, write_tar

STORAGE = Storage()


def listing(*inputs: Path, **options: Any) -> Listing:
    return Listing([str(path) for path in inputs], STORAGE, **options)


def files(found: Listing, done: Coverage | None = None) -> list[str]:
    return [file for unit in found.left(done or Coverage()) for file in unit.files]


def rows_of(found: Listing) -> list[dict[str, Any]]:
    """As a job leaves them that has done everything."""
    rows = []
    for unit in found.left(Coverage()):
        for record in read(unit, STORAGE):
            row = place(record.unit, record.index, record.last)
            rows.append(row | {"id": record.id, "uri": record.uri, "version": record.version})
    return rows


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """By reason: who brings 10,000 .npy files, or results of an earlier job, must learn that they were not read."""
    parts = "first/results/part-0123456789abcdef01234567.parquet"
    for name in ("a.JPG", "b.npy", "c.npy", "noending", ".d.jpg", ".git/e.jpg", parts, "own/job.json", "f.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = listing(tmp_path, exclude=f"{tmp_path}/own/")
    assert sorted(files(found)) == [f"{tmp_path}/a.JPG", f"{tmp_path}/f.heic"]
    expected = {".npy files": 2, "files without a known ending": 1, "hidden files": 2, "results of Shardsight": 2}
    assert found.ignored == expected
    files(found)
    assert found.ignored == expected  # once, however many passes there are
    with pytest.raises(InputError, match=r"but 2 \.npy files"):
        listing(tmp_path / "*.npy").check()


def test_results_that_are_named_are_refused(tmp_path: Path) -> None:
    """Whatever they are called, as a job over them would end with one odd error row; a damaged file is still read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [b"A"]})
    pq.write_table(table, tmp_path / "pictures.parquet")
    pq.write_table(table.replace_schema_metadata({FOOTER: b"{}"}), tmp_path / "renamed.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(InputError, match=r"renamed\.parquet holds the results of a job"):
        listing(tmp_path / "pictures.parquet", tmp_path / "renamed.parquet").check()
    names = [tmp_path / f"{name}.parquet" for name in ("pictures", "damaged", "pipe")]
    assert [unit.uri for unit in listing(*names).left(Coverage())] == [str(name) for name in names]


def test_inputs_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails, or a file that comes, while a job runs must not change what the job is about."""
    for index in range(600):
        (tmp_path / f"{index:03}.jpg").touch()
    found = listing(tmp_path)
    found.check()
    (tmp_path / "late.jpg").touch()
    monkeypatch.setattr(Storage, "walk", lambda *_: pytest.fail("listed again"))
    names = [f"{tmp_path}/{index:03}.jpg" for index in range(600)]
    assert files(found) == names == files(found)
    loose = [place(None, 0) | {"id": name} for name in names[::2]]
    assert files(found, Coverage.of(loose)) == names[1::2]
    assert [len(unit.files) for unit in found.left(Coverage(), 1)] == [150] * 4


def test_what_has_changed_is_told(tmp_path: Path) -> None:
    """A tar that has grown, a Parquet file or picture written anew: what is done of the old one is not done."""
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [("0.jpg", b"0"), ("1.jpg", b"1")])
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    done = Coverage.of(rows_of(listing(tmp_path)))
    units, changed = listing(tmp_path).changed(done)
    assert units == set() and len(changed) == 0 and list(listing(tmp_path).left(done)) == []

    write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1"), ("2.jpg", b"2" * 20_000)])
    (tmp_path / "a.jpg").write_bytes(b"xy")
    now = listing(tmp_path)
    units, changed = now.changed(done)
    assert units == {f"{tmp_path}/a.tar"} and np.array_equal(changed, hashes([f"{tmp_path}/a.jpg"]))
    old = Coverage.of([row | {"version": None} for row in rows_of(listing(tmp_path))])
    assert listing(tmp_path).changed(old)[0] == set()  # results of a version that knew none


LISTS: dict[str, Callable[[list[str]], str]] = {
    "txt": lambda names: "\n".join(names) + "\n",
    "csv": lambda names: 'id,"path"\n' + "".join(f'1,"{name}"\n' for name in names),
    "jsonl": lambda names: "\n\n".join(json.dumps({"label": 1, "path": name}) for name in names),
}
name = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters='"/\\'), min_size=1, max_size=8)


@given(st.lists(name, min_size=1, max_size=6, unique=True), st.sampled_from(list(LISTS)))
@settings(max_examples=60)
def test_every_line_of_a_list_is_an_input(names: list[str], ending: str) -> None:
    import tempfile

    names = [f"{name}.jpg" for name in names if name != "~"] or ["a.jpg"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"l.{ending}").write_text(LISTS[ending](names), encoding)
            assert files(listing(Path(folder) / f"l.{ending}")) == [f"{folder}/{name}" for name in names]


def test_odd_lines_cost_themselves_alone(tmp_path: Path) -> None:
    """A NUL, bytes that are no UTF-8, half of a character, a name too long: an error row each, and the others' rows."""
    odd = [b"in/1\0.jpg", b"\xff\xfe.jpg", b"n" * 5000, b"s3://", b"s3://bucket", b"ftp://x/y.jpg", b"/dev/zero"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(b"0")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "l.txt").write_bytes(b"\n".join([b"in/0.jpg", *odd, b"in/pipe.jpg"]))
    found = [record for unit in listing(tmp_path / "l.txt").left(Coverage()) for record in read(unit, STORAGE)]
    assert [record.data for record in found] == [b"0", *[None] * 8]
    assert [record.failure.type for record in found if record.failure] == [
        *("InvalidPath", "FileNotFoundError", "InvalidPath", "UnsupportedUri", "UnsupportedUri", "UnsupportedUri"),
        *("NotAFile", "NotAFile"),
    ]
    for record in found:
        record.id.encode()

    (tmp_path / "l.jsonl").write_text('"in/0.jpg"\n"\\ud800.jpg"\n{"path": null}\n[1]\nno json\n7\n{"path": "b.jpg"}\n')
    lines = listing(tmp_path / "l.jsonl")
    (tmp_path / "l.csv").write_text("path,n\nin/0.jpg,1\n,2\nb.jpg\nc.jpg,1,2,3\n")
    assert len(files(lines)) == 3 and len(files(listing(tmp_path / "l.csv"))) == 3
    assert lines.ignored == Counter({"entries of l.jsonl without a path or uri": 4})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '["in/a.jpg"]\n', "an array in line 1"),
        ("a.jsonl", "\n5\n", "a number in line 2"),
        ("a.jsonl", "in/a.jpg\n", "is not JSON, one value a line: line 1"),
        ("a.jsonl", '{"name": "x"}\n', "no column uri, url, path, file, image in line 1, but name"),
        ("a.csv", "in/a.jpg\nin/b.jpg\n", "no column uri, url, path, file, image in its first line, but in/a.jpg"),
        ("a.csv", 'path,text\na.jpg,"open\nb.jpg,x\n', "is not CSV in line"),
        ("a.txt", "\x89PNG\r\n\x1a\n\0\0\0\r", "is no text"),
        ("a.txt", "a\0b\0c\0", "is no text"),
        ("a.txt", "\n\n", "holds no pictures"),
    ],
)
def test_a_list_that_is_none_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    """In one sentence about the list, and not about an address that cannot be reached."""
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(InputError) as error:
        listing(tmp_path / name).check()
    assert words in str(error.value) and "reached" not in str(error.value)


def test_wide_cells_of_csv(tmp_path: Path) -> None:
    """Other columns may hold pictures in base64; Python's own limit is 128 KiB, which its other users keep."""
    import csv

    (tmp_path / "l.csv").write_text(f"path,base64\na.jpg,{'y' * 200_000}\n")
    before = csv.field_size_limit()
    assert files(listing(tmp_path / "l.csv")) == [f"{tmp_path}/a.jpg"] and csv.field_size_limit() == before


def test_one_rule_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.jpg").touch()
    source, folder = str(tmp_path / "l.txt"), str(tmp_path / "here")
    for entry, path in [
        ("a.jpg", f"{tmp_path}/here/a.jpg"),
        ("b.jpg", f"{tmp_path}/b.jpg"),
        ("/x/y.jpg", "/x/y.jpg"),
        ("file:///x/a%20b%23.jpg", "/x/a b#.jpg"),
        ("file:///x/a#1?.jpg", "/x/a#1?.jpg"),
        ("file://localhost/x.jpg", "/x.jpg"),
        ("file:/x.jpg", "/x.jpg"),
        ("file://elsewhere/x.jpg", "file://elsewhere/x.jpg"),
        ("s3://b/a%20b?versionId=3.jpg", "s3://b/a%20b?versionId=3.jpg"),
        ("https://x/y.jpg?z=1", "https://x/y.jpg?z=1"),
    ]:
        assert resolve(entry, source, folder) == path
    assert resolve("a/b.jpg", "s3://bucket/lists/l.txt", folder) == "s3://bucket/lists/a/b.jpg"


def test_pictures_of_results(tmp_path: Path) -> None:
    """What a page of results shows is read again: each shard once, and no further than needed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_tar(tmp_path / "a.tar", [(f"{index}.jpg", b"%d" % index) for index in range(9)])
    pq.write_table(pa.table({"jpg": [b"p%d" % index for index in range(9)]}), tmp_path / "b.parquet", row_group_size=2)
    (tmp_path / "c#1.jpg").write_bytes(b"c")
    rows = rows_of(listing(tmp_path))
    expected = {row["id"]: row["id"] for row in rows}
    found = dict(pictures(rows, STORAGE))
    assert set(found) == set(expected) and found[f"{tmp_path}/c#1.jpg"] == b"c"
    assert found[f"{tmp_path}/a.tar#7.jpg"] == b"7" and found[f"{tmp_path}/b.parquet#5"] == b"p5"
    gone = {"id": f"{tmp_path}/a.tar#gone.jpg", "uri": f"{tmp_path}/a.tar"}
    ((_, missing),) = pictures([gone], STORAGE)
    assert isinstance(missing, Failure) and missing.type == "NoImages"


@pytest.mark.parametrize("readers, size", [(1, 75), (2, 37), (8, 16), (1000, 16)])
def test_loose_files_suffice_for_all_readers(readers: int, size: int, tmp_path: Path) -> None:
    """Groups of one size would leave all but one process of a large machine idle over a small folder."""
    for number in range(310):
        (tmp_path / f"{number:03}.jpg").touch()
    write_tar(tmp_path / "a.tar", [("a.jpg", b"a")])
    found, done = listing(tmp_path), Coverage(files=np.sort(hashes(str(tmp_path / f"{n:03}.jpg") for n in range(10))))
    tar, *groups = found.left(done, readers)
    assert tar.kind == "tar" and {len(unit.files) for unit in groups[:-1]} == {size}
    names = [str(tmp_path / f"{number:03}.jpg") for number in range(10, 310)]
    assert [one for unit in groups for one in zip(unit.files, unit.versions, strict=True)] == [
        (name, STORAGE.info(name).version) for name in names
    ]


def test_packed_units_take_little_memory(tmp_path: Path) -> None:
    """The driver holds all that is left of a job."""
    files = tuple(f"s3://a-bucket/of-many/pictures/{number // 1000:04}/{number:09}.jpg" for number in range(256))
    versions = tuple(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(256))
    unit = Unit("files", files=files, versions=versions)
    assert unpack(pack(unit)) == unit and len(pack(unit)) < 40 * len(files)
