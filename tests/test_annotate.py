"""The main job, as users run it: bad input, restarts, refusals, and what opens its results."""

import base64
import contextlib
import io
import json
import math
import os
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import shardsight.cli
from shardsight.decode.pictures import decode
from shardsight.models.yolo.model import Yolo
from shardsight.row import ROW
from tests.conftest import PHOTOGRAPHS, WEIGHTS, job_of, rows_of, start_job, write_tar

Annotate = Callable[..., tuple[int, str]]


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    """A PNG whose header says 60,000 × 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encoded(format: str, size: tuple[int, int] = (64, 48)) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, format)
    return buffer.getvalue()


def mixed_inputs(jpegs: list[bytes]) -> list[tuple[str, bytes, str | None]]:
    """(name, bytes, type of the error that it must give)."""
    png = encoded("PNG", (300, 200))
    return [
        ("good 1.jpg", jpegs[0], None),
        ("zero.jpg", b"", "EmptyFile"),
        ("good #2.jpg", jpegs[1], None),
        ("half.jpg", jpegs[2][: len(jpegs[2]) // 2], "TruncatedImage"),
        ("good 100%.jpg", jpegs[3], None),
        ("half.png", png[: len(png) // 2], "TruncatedImage"),
        ("good \"quoted\" 'twice'.png", png, None),
        ("text.jpg", b"this is no picture at all", "NotAnImage"),
        ("good 😀 é.webp", encoded("WEBP"), None),
        ("huge.png", huge_png(), "TooManyPixels"),
        ("one.png", encoded("PNG", (1, 1)), None),
        ("n" * 196 + ".bmp", encoded("BMP"), None),
        ("good.tiff", encoded("TIFF"), None),
        ("good.gif", encoded("GIF"), None),
    ]


def check(rows: list[dict[str, Any]], expected: dict[str, str | None]) -> None:
    """Every id once, with the error that is expected of it, or with detections."""
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids))
    assert set(ids) == set(expected)
    for row in rows:
        type = row["error"] and row["error"]["type"]
        assert type == expected[row["id"]], row
        assert (row["detections"] is None) == bool(type)
        if type:
            assert row["error"]["stage"] in ("read", "decode") and row["error"]["message"]
        else:
            assert row["width"] >= 1 and row["height"] >= 1


def test_bad_pictures_cost_no_other(tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path) -> None:
    """A user's bucket holds broken files: each becomes a row that says why, and every good one has its result."""
    folder = tmp_path / "in"
    (folder / "pictures").mkdir(parents=True)
    expected: dict[str, str | None] = {}
    inputs = mixed_inputs(jpegs)
    for name, data, error in inputs:
        (folder / "pictures" / name).write_bytes(data)
        expected[str(folder / "pictures" / name)] = error
    (folder / "notes.md").write_text("not a picture, not an input")

    members = [(name, data) for name, data, _ in inputs]
    write_tar(folder / "all.tar", [*members, ("twice.jpg", jpegs[4]), ("twice.jpg", jpegs[5])])
    expected |= {f"{folder}/all.tar#{name}": error for name, _, error in inputs}
    expected |= {f"{folder}/all.tar#twice.jpg": None, f"{folder}/all.tar#twice.jpg#2": None}

    write_tar(folder / "cut.tar", [(f"{index}.jpg", data) for index, data in enumerate(jpegs[:10])])
    whole = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: sum(map(len, jpegs[:5])) + 5 * 1024])
    expected |= {f"{folder}/cut.tar#{index}.jpg": None for index in range(5)}
    cut = [id for id in expected if "cut.tar" in id]

    (folder / "empty.tar").write_bytes(b"")
    expected[f"{folder}/empty.tar"] = "EmptyFile"
    (folder / "broken.parquet").write_bytes(b"PAR1 but no more")
    expected[f"{folder}/broken.parquet"] = "NotParquet"

    images = pa.array([{"bytes": data, "path": name} for name, data, _ in inputs] + [None])
    pq.write_table(pa.table({"image": images, "n": range(len(images))}), folder / "all.parquet", row_group_size=5)
    expected |= {f"{folder}/all.parquet#{index}": error for index, (_, _, error) in enumerate(inputs)}
    expected[f"{folder}/all.parquet#{len(inputs)}"] = "MissingImage"

    code, said = annotate(folder, "--output", tmp_path / "out", "--yolo", detector, "--max-error-rate", 0.9)
    assert code == 0, said
    rows = rows_of(tmp_path / "out")
    extra = [row for row in rows if "cut.tar" in row["id"] and row["id"] not in cut]
    assert [row["error"]["type"] for row in extra] == ["TruncatedTar"]
    check([row for row in rows if row not in extra], expected)
    job = job_of(tmp_path / "out")
    assert job["exactly_once"] is True and job["inputs"] == job["rows"] == len(rows)
    assert sum(n for types in job["errors"].values() for n in types.values()) == sum(1 for r in rows if r["error"])
    assert json.loads(next(r["metadata"] for r in rows if r["id"].endswith("all.parquet#3"))) == {"n": 3}

    code, said = annotate(folder, "--output", tmp_path / "out", "--yolo", detector)
    assert code == 3 and "--max-error-rate" in said
    assert len(rows_of(tmp_path / "out")) == len(rows)


def test_the_same_command_again_does_nothing(
    tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path
) -> None:
    """A finished job is recognised without reading a picture; new pictures are all that a rerun decodes."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index, data in enumerate(jpegs[:6]):
        (folder / f"{index}.jpg").write_bytes(data)
    write_tar(folder / "a.tar", [(f"{index}.jpg", data) for index, data in enumerate(jpegs[6:12])])
    command = (folder, "--output", tmp_path / "out", "--yolo", detector)
    assert annotate(*command)[0] == 0
    first = rows_of(tmp_path / "out")
    assert annotate(*command)[0] == 0
    job = job_of(tmp_path / "out")
    assert job["stages"]["decode"]["rows"] == 0 and job["rows"] == job["resumed_rows"] == 12
    assert sorted(r["id"] for r in rows_of(tmp_path / "out")) == sorted(r["id"] for r in first)

    (folder / "new.jpg").write_bytes(jpegs[12])
    assert annotate(*command)[0] == 0
    job = job_of(tmp_path / "out")
    assert job["stages"]["decode"]["rows"] == 1 and job["rows"] == 13 and job["exactly_once"] is True


def test_retry_errors_runs_only_what_failed(
    tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index, data in enumerate(jpegs[:4]):
        (folder / f"{index}.jpg").write_bytes(data if index != 2 else b"broken")
    write_tar(
        folder / "a.tar", [(f"{index}.jpg", data if index != 1 else b"") for index, data in enumerate(jpegs[4:8])]
    )
    command = (folder, "--output", tmp_path / "out", "--yolo", detector, "--max-error-rate", 1)
    annotate(*command)
    assert sum(1 for row in rows_of(tmp_path / "out") if row["error"]) == 2
    (folder / "2.jpg").write_bytes(jpegs[2])
    assert annotate(*command, "--retry-errors")[0] == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len({row["id"] for row in rows}) == 8
    assert [row["id"] for row in rows if row["error"]] == [f"{folder}/a.tar#1.jpg"]
    assert job_of(tmp_path / "out")["stages"]["decode"]["rows"] == 2


def test_an_interrupted_job_goes_on(
    tmp_path: Path, one_ray: str, jpegs: list[bytes], detector: Path, annotate: Annotate
) -> None:
    """Ctrl-C, then a killed driver: the same command ends with each id once, and decodes no finished one again."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", [(f"{shard}-{index}.jpg", jpegs[index]) for index in range(40)])
    for index in range(40):
        (folder / f"{index}.jpg").write_bytes(jpegs[index])
    # Small files, so that something is finished when the signal comes.
    command = (folder, "--output", out, "--yolo", detector, "--rows-per-file", 10)
    there = 0
    for kill in (signal.SIGINT, signal.SIGKILL):
        # What outlives a killed driver must not write on while we count: its cluster is its own, and is killed with it.
        before, running = files_of(out), start_job(*command, cluster=one_ray if kill is signal.SIGINT else None)
        try:
            wait_for(lambda before=before: files_of(out) >= before + 2, running)
        finally:
            started = psutil.Process(running.pid).children(recursive=True)
            running.send_signal(kill)
            code = running.wait(60)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        assert not psutil.wait_procs(started, timeout=60)[1]
        assert code == (130 if kill is signal.SIGINT else -signal.SIGKILL)
        now = duckdb.sql(f"select count(*) from '{out}/results/*.parquet'").fetchall()[0][0]
        assert there < now < 200
        there = now
    code, said = annotate(*command)
    assert code == 0, said
    rows = rows_of(out)
    assert len(rows) == len({row["id"] for row in rows}) == 200
    job = job_of(out)
    assert job["exactly_once"] is True
    assert job["resumed_rows"] == there
    assert job["stages"]["decode"]["rows"] == 200 - there


def files_of(out: Path) -> int:
    return len(list((out / "results").glob("*.parquet")))


def wait_for(condition: Callable[[], bool], process: Any, seconds: float = 300) -> None:
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.set_blocking(process.stderr.fileno(), False)
    raise AssertionError(f"it did not happen in time; what the job said: {process.stderr.read()!r}")


def test_refusals(tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path) -> None:
    """A wrong request ends with code 2 and one sentence, before anything is started or written."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpegs[0])
    (tmp_path / "none").mkdir()
    text = tmp_path / "weights.pt"
    text.write_text("no weights")
    out, weights = tmp_path / "out", tmp_path / "mine.pt"
    shutil.copy(detector, weights)
    fine = ("--output", out, "--yolo", weights)
    for arguments, words in [
        ((tmp_path / "nowhere", *fine), "does not exist"),
        ((tmp_path / "none", *fine), "holds no pictures"),
        ((folder, *fine, "--bogus", "1"), "--bogus"),
        ((folder, *fine, "--precision", "int3"), "--precision"),
        ((folder, *fine, "--conf", "2"), "--conf"),
        ((folder, *fine, "--prompt", "caption en"), "--prompt"),
        ((folder, "--output", out), "--yolo"),
        ((folder, "--yolo", detector), "--output"),
        ((folder, "--output", out, "--yolo", tmp_path / "missing.pt"), "no weights at"),
        ((folder, "--output", out, "--yolo", text), "no checkpoint at all"),
        ((folder, "--output", out, "--yolo", "yolov8n.pt"), "no weights at"),
        (("http://127.0.0.1/a.jpg", *fine), "neither a path nor"),
    ]:
        code, said = annotate(*arguments)
        assert code == 2, (arguments, said)
        assert words in said and said.startswith("shardsight: ") and said.count("\n") == 1, said
    assert not out.exists()

    assert annotate(folder, *fine)[0] == 0
    code, said = annotate(folder, *fine, "--conf", 0.5)
    assert code == 2 and "conf = 0.25, not 0.5" in said and "--overwrite" in said
    assert annotate(folder, *fine, "--batch-size", 2)[0] == 0
    assert annotate("--config", out / "job.json")[0] == 0
    assert annotate(folder, *fine, "--conf", 0.5, "--overwrite")[0] == 0
    assert job_of(out)["configuration"]["conf"] == 0.5

    shutil.copy(WEIGHTS / "segment.pt", weights)  # trained anew, say
    code, said = annotate(folder, *fine, "--conf", 0.5)
    assert code == 2 and "yolo's sha256" in said and "--overwrite" in said

    (out / "results" / "other.parquet").write_bytes((out / "results").glob("part-*").__next__().read_bytes())
    pq.write_table(pa.table({"a": [1]}), out / "results" / "other.parquet")
    shutil.copy(detector, weights)
    code, said = annotate(folder, *fine, "--conf", 0.5)
    assert code == 2 and "not written by Shardsight" in said
    (out / "job.json").write_text("{}")
    code, said = annotate(folder, *fine)
    assert code == 2 and "not of a Shardsight job" in said and said.count("\n") == 1


def test_two_jobs_into_one_output(tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path) -> None:
    """The second is refused, and what a killed run leaves behind refuses nobody."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.jpg").write_bytes(jpegs[index])
    command = (folder, "--output", tmp_path / "out", "--yolo", detector)
    first = start_job(*command)
    try:
        wait_for((tmp_path / "out" / "job.json").exists, first)
        code, said = annotate(*command)
        assert code == 2 and "another run is writing" in said
    finally:
        first.kill()
        first.wait()
    assert annotate(*command)[0] == 0
    assert len(rows_of(tmp_path / "out")) == 40


def test_limit_takes_the_first(tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "a.tar", [(f"{index}.jpg", data) for index, data in enumerate(jpegs[:5])])
    write_tar(folder / "b.tar", [(f"{index}.jpg", data) for index, data in enumerate(jpegs[:5])])
    assert annotate(folder, "--output", tmp_path / "out", "--yolo", detector, "--limit", 7)[0] == 0
    ids = sorted(row["id"].rpartition("/")[2] for row in rows_of(tmp_path / "out"))
    assert ids == [*(f"a.tar#{index}.jpg" for index in range(5)), "b.tar#0.jpg", "b.tar#1.jpg"]
    assert job_of(tmp_path / "out")["exactly_once"] is True


def test_lists_and_uri_columns(tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path) -> None:
    """People bring lists: of lines, of CSV, of JSON, and as a column in Parquet; a missing picture is a row."""
    (tmp_path / "p").mkdir()
    for index in range(4):
        (tmp_path / "p" / f"{index}.jpg").write_bytes(jpegs[index])
    (tmp_path / "l.txt").write_text("p/0.jpg\n\np/nothing.jpg\np/0.jpg\n")
    (tmp_path / "l.csv").write_text(f"id,url\n7,{tmp_path}/p/1.jpg\n")
    (tmp_path / "l.jsonl").write_text(json.dumps({"path": "p/2.jpg"}) + "\n" + json.dumps("ftp://x/y.jpg") + "\n")
    pq.write_table(pa.table({"where": ["p/3.jpg", "p/gone.jpg"], "k": [1, 2]}), tmp_path / "l.parquet")
    lists = [tmp_path / f"l.{suffix}" for suffix in ("txt", "csv", "jsonl")]
    assert annotate(*lists, "--output", tmp_path / "o1", "--yolo", detector, "--max-error-rate", 1)[0] == 0
    found = {row["id"]: row["error"] and row["error"]["type"] for row in rows_of(tmp_path / "o1")}
    assert found == {
        **{f"{tmp_path}/p/{index}.jpg": None for index in range(3)},
        **{f"{tmp_path}/p/nothing.jpg": "FileNotFoundError", "ftp://x/y.jpg": "UnsupportedUri"},
    }
    code, said = annotate(
        *(tmp_path / "l.parquet", "--uri-column", "where", "--output", tmp_path / "o2", "--yolo", detector),
        *("--max-error-rate", 1),
    )
    assert code == 0, said
    found2 = {row["id"]: (row["uri"], bool(row["error"])) for row in rows_of(tmp_path / "o2")}
    assert found2[f"{tmp_path}/l.parquet#0"] == (f"{tmp_path}/p/3.jpg", False)
    assert found2[f"{tmp_path}/l.parquet#1"][1]


@pytest.fixture(scope="module")
def finished(one_ray: None, jpegs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shardsight.cli import annotate

    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    for index in range(6):
        (folder / f"{index}.jpg").write_bytes(jpegs[index])
    (folder / "broken.jpg").write_bytes(b"x")
    shutil.copy(PHOTOGRAPHS[0], folder)
    command = [str(folder), "--output", str(out), "--yolo", str(WEIGHTS / "detect.pt"), "--max-error-rate", "1"]
    assert annotate([*command, "--keep-images", "--rows-per-file", "3"]) == 0
    return out


def test_crops_are_cut_out_of_the_original(tmp_path: Path, annotate: Annotate, detector: Path) -> None:
    """Decoded for YOLO, a photograph has lost what a crop is looked at for. The job's page does without them."""
    (tmp_path / "in").mkdir()
    with Image.open(PHOTOGRAPHS[0]) as picture:  # larger than the model's input
        picture.resize((1620, 2160)).save(tmp_path / "in" / "bus.jpg", quality=95)
    out = tmp_path / "out"
    assert annotate(tmp_path / "in", "--output", out, "--yolo", detector, "--conf", 0.02, "--crops")[0] == 0
    (row,) = rows_of(out)
    picture = decode((tmp_path / "in" / "bus.jpg").read_bytes())[0].astype(int)
    assert row["detections"]
    for one in row["detections"]:
        crop = decode(one["crop"])[0]
        x1, y1 = math.floor(one["x1"]), math.floor(one["y1"])
        assert crop.shape[:2] == (math.ceil(one["y2"]) - y1, math.ceil(one["x2"]) - x1)
        original = picture[y1 : y1 + crop.shape[0], x1 : x1 + crop.shape[1]]
        assert np.abs(original - crop).mean() < 4
    assert shardsight.cli.show([str(out), "--page", str(tmp_path / "page.html")]) == 0
    assert base64.b64encode(row["detections"][0]["crop"][:30]).decode() not in (tmp_path / "page.html").read_text()

    (without,) = Yolo(str(detector), conf=0.02)([PHOTOGRAPHS[0].read_bytes()])
    (with_crops,) = Yolo(str(detector), conf=0.02, crops=True)([PHOTOGRAPHS[0].read_bytes()])
    assert {one["crop"] for one in without["detections"]} == {None}
    assert all(one["crop"][:2] == b"\xff\xd8" for one in with_crops["detections"])

    for model, reason in ((("--yolo", WEIGHTS / "classify.pt"), "classifier"), (("--paligemma", "p"), "--yolo")):
        code, said = annotate(tmp_path / "in", "--output", tmp_path / "other", "--crops", *model)
        assert code == 2 and reason in said and said.count("\n") == 1, said


def test_the_readers_that_people_use(finished: Path) -> None:
    """DuckDB's line of the design as written, pandas, Polars and datasets open what the job wrote."""
    counted = duckdb.sql(
        f"select d.label, count(*) from '{finished}/results/*.parquet', unnest(detections) as t(d) group by 1"
    ).fetchall()
    assert counted and all(label and count for label, count in counted)

    import datasets
    import pandas
    import polars

    files = str(finished / "results" / "*.parquet")
    assert len(pandas.read_parquet(finished / "results")) == 8
    assert polars.read_parquet(files).height == 8
    assert polars.read_parquet(files)["error"].drop_nulls().len() == 1
    cache = str(finished / "cache")
    assert len(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)) == 8
    for path in (finished / "results").glob("*.parquet"):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.remove_metadata() == ROW
        assert file.metadata.num_rows <= 3
