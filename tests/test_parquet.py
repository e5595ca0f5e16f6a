"""Parquet files of pictures: as the tools of this field write them, and as they come damaged."""

import datetime
import json
import os
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsight.results.writer import FOOTER
from shardsight.sources import Record, Unit, read
from shardsight.storage import Storage


def records(path: Path, **options: Any) -> list[Record]:
    return list(read(Unit("parquet", str(path), folder=str(path.parent), **options), Storage()))


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_of_every_shape(tmp_path: Path) -> None:
    (tmp_path / "side.jpg").write_bytes(b"from a file")
    rows = [{"bytes": b"1", "path": None}, {"bytes": None, "path": "side.jpg"}, None, {"bytes": None, "path": "gone"}]
    pq.write_table(pa.table({"image": rows, "t": [1.5, float("nan"), None, 2.0]}), tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet")
    assert [record.data for record in found] == [b"1", b"from a file", None, None]
    assert [r.failure and r.failure.type for r in found] == [None, None, "MissingImage", "FileNotFoundError"]
    assert [json.loads(r.metadata or "")["t"] for r in found] == [1.5, None, None, 2.0]
    for table, words in [
        (pa.table({"picture": [1]}), "no column of bytes or {bytes, path} among picture"),
        (pa.table({"image": ["text"]}), "where bytes"),
        (pa.table({"image": pa.array([], pa.binary())}), "no picture"),
    ]:
        pq.write_table(table, tmp_path / "b.parquet")
        (record,) = records(tmp_path / "b.parquet")
        assert record.failure and words in record.failure.message and record.last


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [os.urandom(2000) for _ in range(9)]})
    pq.write_table(table, path, row_group_size=3, compression="snappy", use_dictionary=False)
    offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = b"\xff" * 400
    path.write_bytes(data)
    found = records(path)
    assert [record.index for record in found] == list(range(9))
    assert [bool(record.failure) for record in found] == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("columns", "picture"),
    [
        ({"jpg": [b"A"], "json": ["{}"], "key": ["0"]}, "jpg"),  # img2dataset
        ({"img": [{"bytes": b"A", "path": None}], "label": [1]}, "img"),  # CIFAR on Hugging Face's hub
        ({"content": [b"A"], "path": ["p"], "length": [1]}, "content"),  # Spark's binaryFile
        ({"image": pa.array([b"A"]).dictionary_encode()}, "image"),
        ({"image": pa.array([b"A"], pa.binary_view())}, "image"),
        ({"image": pa.array([b"A"], pa.large_binary()), "jpg": [b"B"]}, "image"),
        ({"PNG": [b"A"], "mask": [b"B"]}, "PNG"),
        ({"image": ["a.jpg"], "jpg": [b"A"]}, "jpg"),
    ],
)
def test_the_column_of_pictures_is_recognised(columns: dict[str, Any], picture: str, tmp_path: Path) -> None:
    """A million pictures must not be one error because their column has another name than ours."""
    (record,) = records(written(tmp_path / "a.parquet", columns))
    assert record.data == b"A", record.failure
    assert picture not in json.loads(record.metadata or "{}")


def test_where_several_columns_may_hold_pictures_the_user_is_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"left": [b"L"], "right": [b"R"], "fixed": pa.array([b"xy"], pa.binary(2))})
    (record,) = records(path)
    assert record.failure and "left, right" in record.failure.message and "--image-column" in record.failure.message
    assert [records(path, image_column=name)[0].data for name in ("right", "fixed")] == [b"R", b"xy"]
    for options, words in [
        ({"image_column": "middle"}, "no column middle among left, right, fixed"),
        ({"uri_column": "left"}, "column left is binary, where text was expected"),
    ]:
        (record,) = records(path, **options)
        assert record.failure and words in record.failure.message


def test_columns_of_uris_follow_one_rule(tmp_path: Path) -> None:
    """As in lists: file: uris with their escapes, absolute paths, and paths from where the command runs or from the
    Parquet file; in every type that text has."""
    (tmp_path / "a b.jpg").write_bytes(b"A")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c.jpg").write_bytes(b"C")
    there = tmp_path / "a b.jpg"
    uris = [there.as_uri(), f"file:{there}".replace(" ", "%20"), str(there), "a b.jpg", "c.jpg", "no\0path", "", None]
    for column in (
        pa.array(uris),
        pa.array(uris).dictionary_encode(),
        pa.array(uris, pa.string_view()),
        pa.array(uris, pa.large_string()),
    ):
        path = written(tmp_path / "data" / "a.parquet", {"where": column, "n": range(8)})
        found = list(read(Unit("parquet", str(path), uri_column="where", folder=str(tmp_path)), Storage()))
        assert [record.data for record in found] == [b"A", b"A", b"A", b"A", b"C", None, None, None]
        assert [record.failure.type for record in found if record.failure] == [
            *("InvalidPath", "IsADirectoryError", "MissingImage")
        ]


def test_odd_values_cost_no_picture(tmp_path: Path) -> None:
    """Metadata that Python, JSON or UTF-8 has no form for becomes text or null."""
    words = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    far = pa.array([2**31 - 1], pa.int32()).cast(pa.date32())
    columns = {
        "words": words,
        "date": far,
        "time": pa.array([10**15], pa.timestamp("ms")),
        "zone": pa.array([0], pa.timestamp("us", tz="Mars/Base")),
        "nano": pa.array([1], pa.timestamp("ns")),
        "long": pa.array([2**62], pa.duration("s")),
        "decimal": pa.array([Decimal("1.5")], pa.decimal256(60, 3)),
        "map": pa.array([[("a", float("nan"))]], pa.map_(pa.string(), pa.float64())),
        "nested": pa.StructArray.from_arrays([far, words], ["date", "words"]),
        "list": pa.ListArray.from_arrays([0, 1], far),
        "binary": pa.array([b"x"]),
        "large": pa.array([b"x" * 5000]),
        "none": pa.nulls(1),
        "uuid": pa.array([b"0123456789abcdef"], pa.uuid()),
    }
    (record,) = records(written(tmp_path / "a.parquet", {"image": [b"A"], **columns}))
    assert record.data == b"A"
    found = json.loads(record.metadata or "")
    assert set(found) == set(columns)
    assert (found["large"], found["binary"], found["decimal"]) == ("(5,000 bytes)", "eA==", "1.500")
    assert isinstance(found["date"], str) and found["nested"]["date"] == found["list"][0] == found["date"]
    assert found["zone"].endswith("UTC") and found["map"] == [["a", None]] and found["none"] is None


def test_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([b"A"]), pa.array([2])], names=["image", "image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    (record,) = records(tmp_path / "a.parquet")
    assert record.data == b"A" and json.loads(record.metadata or "") == {"image": 1, "image#2": 2}


def test_a_damaged_column_of_metadata_costs_no_picture(tmp_path: Path) -> None:
    columns = {
        "image": [os.urandom(500) for _ in range(40)],
        "bad": [os.urandom(500) for _ in range(40)],
        "n": range(40),
    }
    path = written(tmp_path / "a.parquet", columns, use_dictionary=False, compression="snappy")
    whole = records(path)
    offset = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = b"\xff" * 400
    path.write_bytes(data)
    found = records(path)
    assert [(r.id, r.data, r.failure) for r in found] == [(r.id, r.data, None) for r in whole]
    assert [json.loads(r.metadata or "") for r in found] == [{"n": n} for n in range(40)]


def test_results_are_no_input(tmp_path: Path) -> None:
    """Whatever they are called: with --keep-images every picture would be annotated twice."""
    table = pa.table({"image": [b"A"]}).replace_schema_metadata({FOOTER: b"{}"})
    pq.write_table(table, tmp_path / "renamed.parquet")
    (record,) = records(tmp_path / "renamed.parquet")
    assert record.failure and record.failure.type == "ResultsOfShardsight" and record.last


# Longer ones are more microseconds than Arrow's 64 bits can hold.
durations = st.timedeltas(datetime.timedelta(days=-(10**6)), datetime.timedelta(days=10**6))
values = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
values |= st.dates() | st.datetimes(timezones=st.none() | st.just(datetime.UTC)) | durations | st.times()
values |= st.lists(st.integers(0, 9), max_size=3) | st.dictionaries(st.sampled_from("ab"), st.floats(), min_size=1)


@given(
    st.lists(st.none() | st.binary(max_size=4), min_size=1, max_size=40),
    st.dictionaries(st.text(max_size=3), values, max_size=5),
    st.integers(1, 40),
    st.sampled_from([pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())]),
)
@settings(max_examples=60)
def test_every_row_is_a_record(
    pictures: list[bytes | None], others: dict[str, Any], group: int, type: pa.DataType
) -> None:
    """Of whatever schema and in whatever groups; and places stay the same when some of them are done."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        table = {name: [value] * len(pictures) for name, value in others.items()} | {"image": pa.array(pictures, type)}
        written(path, table, row_group_size=group)
        found = records(path)
        assert [record.data for record in found] == pictures
        assert [record.failure and record.failure.type for record in found] == [
            None if data is not None else "MissingImage" for data in pictures
        ]
        assert [(record.index, record.id) for record in found] == [(n, f"{path}#{n}") for n in range(len(pictures))]
        for record in found:
            json.loads(record.metadata or "null", parse_constant=pytest.fail)
        half = len(found) // 2
        assert [replaced(record) for record in records(path, skip=[(0, half)] if half else [])] == [
            replaced(record) for record in found[half:]
        ]


def replaced(record: Record) -> tuple[Any, ...]:
    """A record without its seconds, and with a failure that can be compared."""
    return record.index, record.id, record.data, record.metadata, record.last, str(record.failure)
