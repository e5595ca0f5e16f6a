"""The job over videos: each frame is a row, once, wherever the video stands and however it is read."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ultralytics import YOLO

import shardsight
from shardsight import pipeline
from shardsight.decode import split
from shardsight.results.writer import Results
from shardsight.sources import Unit
from shardsight.storage import Storage
from tests.clips import decoded, encode, panned
from tests.conftest import PHOTOGRAPHS, S3, WEIGHTS, job_of, write_tar

Annotate = Callable[..., tuple[int, str]]
FRAMES = 30


@pytest.fixture(scope="module")
def clips(jpegs: list[bytes]) -> list[bytes]:
    """Videos of FRAMES frames, a keyframe in six."""
    import io

    pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((320, 240))) for data in jpegs[:3]]
    return [encode(panned(picture, FRAMES), g="6") for picture in pictures]


@pytest.fixture
def folder(tmp_path: Path, clips: list[bytes]) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, clip in enumerate(clips):
        (folder / f"{number}.mp4").write_bytes(clip)
    return folder


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = shardsight.load_results(out).to_table().to_pylist()
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def boxes(row: dict[str, Any]) -> np.ndarray:
    return np.array([[one[side] for side in ("x1", "y1", "x2", "y2", "score")] for one in row["detections"]])


def test_a_video_may_stand_wherever_a_picture_may(
    folder: Path, clips: list[bytes], jpegs: list[bytes], annotate: Annotate, detector: Path, tmp_path: Path
) -> None:
    """In a folder, a tar, a Parquet cell, a column of paths and a list, beside pictures, with the same rows."""
    write_tar(folder / "a.tar", [("x.jpg", jpegs[0]), ("v.mp4", clips[0]), ("v.json", b'{"a": 1}')])
    pq.write_table(pa.table({"image": [jpegs[0], clips[1]], "n": [1, 2]}), folder / "b.parquet")
    paths = tmp_path / "paths.parquet"
    pq.write_table(pa.table({"path": [str(folder / "2.mp4")]}), paths)
    listed = tmp_path / "list.txt"
    listed.write_text(str(folder / "0.mp4"))
    options = ("--yolo", detector, "--precision", "fp32", "--no-scaled-decode", "--max-error-rate", 1)
    code, _ = annotate(folder, listed, paths, "--output", tmp_path / "out", *options, "--uri-column", "path")
    assert code == 0
    job, rows = job_of(tmp_path / "out"), rows_of(tmp_path / "out")
    # With a column of uris named, b.parquet, which has none of that name, is one row that says so.
    assert job["exactly_once"] and job["inputs"] == 7 and job["rows"] == len(rows) == 5 * FRAMES + 2
    assert annotate(folder / "b.parquet", "--output", tmp_path / "cells", *options)[0] == 0
    rows |= rows_of(tmp_path / "cells")
    expected = shardsight.Yolo(str(detector), precision="fp32")
    places = {f"{folder}/0.mp4": 0, f"{folder}/a.tar#v.mp4": 0, f"{folder}/b.parquet#1": 1, f"{paths}#0": 2}
    for name, number in places.items():
        frames = decoded(clips[number])
        for index, (seconds, frame) in enumerate(frames):
            row = rows[f"{name}@{index}"]
            assert (row["frame_index"], row["pts_seconds"]) == (index, seconds)
            assert (row["width"], row["height"], row["error"]) == (320, 240, None)
            if index % 10 == 0:
                np.testing.assert_allclose(boxes(row), boxes(expected(frame)[0]), atol=1e-3)
    assert json.loads(rows[f"{folder}/a.tar#v.mp4@3"]["metadata"]) == {"json": {"a": 1}}
    assert json.loads(rows[f"{folder}/b.parquet#1@3"]["metadata"]) == {"n": 2}
    assert rows[f"{folder}/a.tar#x.jpg"]["frame_index"] is None


@pytest.mark.parametrize(
    ("flags", "indices"),
    [
        (("--every", 7), range(0, FRAMES, 7)),
        (("--fps", 5), range(0, FRAMES, 5)),
        (("--keyframes",), range(0, FRAMES, 6)),
    ],
)
def test_sampled_frames_keep_their_indices(
    folder: Path, annotate: Annotate, detector: Path, flags: tuple[Any, ...], indices: range
) -> None:
    out = folder.parent / "out"
    assert annotate(folder, "--output", out, "--yolo", detector, *flags)[0] == 0
    assert sorted(row["frame_index"] for row in rows_of(out).values()) == sorted([*indices] * 3)
    assert job_of(out)["exactly_once"] and job_of(out)["inputs"] == 3


class Noted(split.Split):
    """Notes the first frames of parts beside their video."""

    def parts(self, unit: Unit) -> list[Unit]:
        found = super().parts(unit)
        with (Path(unit.uri or "").parent / "noted").open("a") as file:
            file.writelines(f"{one.part and one.part.first}\n" for one in found)
        return found


def test_a_long_video_has_the_same_rows_in_parts(
    folder: Path, annotate: Annotate, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--yolo", detector, "--precision", "fp32")
    assert annotate(folder, "--output", folder.parent / "whole", *options)[0] == 0
    monkeypatch.setattr(split, "LONG", 0)
    monkeypatch.setattr(pipeline, "Split", partial(Noted, frames=10))
    assert annotate(folder, "--output", folder.parent / "parts", *options)[0] == 0
    assert sorted((folder / "noted").read_text().split()) == ["0"] * 3 + ["12"] * 3
    whole, parted = rows_of(folder.parent / "whole"), rows_of(folder.parent / "parts")
    assert parted.keys() == whole.keys() and job_of(folder.parent / "parts")["exactly_once"]
    for id, row in whole.items():
        assert row["pts_seconds"] == parted[id]["pts_seconds"]
        np.testing.assert_allclose(boxes(row), boxes(parted[id]), atol=1e-3)


@pytest.mark.parametrize("tracked", [False, True])
def test_only_frames_that_are_missing_are_computed(
    folder: Path, annotate: Annotate, detector: Path, tracked: bool
) -> None:
    """A resumed job decodes no frame again, but a tracked video from its start: identities begin there."""
    out = folder.parent / "out"
    options = ("--yolo", detector, "--precision", "fp32", *(("--track", "bytetrack") if tracked else ()))
    assert annotate(folder, "--output", out, *options)[0] == 0
    whole = rows_of(out)
    results = Results(str(out), Storage())

    def without_some(evidence: pa.Table) -> np.ndarray:
        gone = [unit.endswith("1.mp4") for unit in evidence["unit"].to_pylist()]
        return ~(np.array(gone) & (evidence["frame_number"].to_numpy() >= FRAMES - 8))

    for path, coverage in results.files():
        results._keep(path, coverage, without_some)
    assert len(rows_of(out)) == 3 * FRAMES - 8
    assert annotate(folder, "--output", out, *options)[0] == 0
    again, job = rows_of(out), job_of(out)
    assert again == whole and job["exactly_once"]
    assert job["stages"]["yolo"]["rows"] == (FRAMES if tracked else 8)


def test_a_video_that_cannot_be_read_costs_no_other(folder: Path, annotate: Annotate, detector: Path) -> None:
    clip = (folder / "0.mp4").read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mkv").write_text("no video")
    (folder / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (folder / "misnamed.jpg").write_bytes(clip)
    out = folder.parent / "out"
    assert annotate(folder, "--output", out, "--yolo", detector, "--max-error-rate", 1)[0] == 0
    rows, job = rows_of(out), job_of(out)
    assert job["exactly_once"] and job["inputs"] == 7 and len(rows) == 3 * FRAMES + 4
    for name in ("empty.mp4", "text.mkv", "cut.mp4", "misnamed.jpg"):
        assert rows[f"{folder}/{name}"]["error"]["stage"] == "decode"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fps", 2, "--every", 3), "--fps, --every and --keyframes"),
        (("--track-config", "x.yaml"), "give --track"),
        (("--clip-frames", 4), "give both"),
        (("--clip-frames", 4, "--clip-seconds", 1), "give --paligemma"),
        (("--track", "no-such"), "botsort"),
        (("--track", "--yolo", WEIGHTS / "classify.pt"), "classifier"),
    ],
)
def test_refusals(folder: Path, annotate: Annotate, detector: Path, flags: tuple[Any, ...], said: str) -> None:
    code, text = annotate(folder, "--output", folder.parent / "out", "--yolo", detector, *flags)
    assert code == 2 and said in text and "Traceback" not in text and len(text.strip().splitlines()) == 1


def test_a_video_in_a_store_has_the_same_rows(
    folder: Path, s3: S3, annotate: Annotate, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by ranges, whole or in parts."""
    shutil.copytree(folder, s3.bucket("videos") / "in")
    options = ("--yolo", detector, "--precision", "fp32")
    assert annotate(folder, "--output", folder.parent / "local", *options)[0] == 0
    local = {id.removeprefix(str(folder)): row["detections"] for id, row in rows_of(folder.parent / "local").items()}
    for name, long in (("whole", split.LONG), ("parts", 0)):
        monkeypatch.setattr(split, "LONG", long)
        monkeypatch.setattr(pipeline, "Split", partial(split.Split, frames=10))
        code, said = annotate("s3://videos/in", "--output", folder.parent / name, *options, *s3.options())
        assert code == 0, said
        rows = rows_of(folder.parent / name)
        assert {id.removeprefix("s3://videos/in"): row["detections"] for id, row in rows.items()} == local


def test_identities_are_those_of_ultralytics(
    folder: Path, clips: list[bytes], annotate: Annotate, detector: Path
) -> None:
    """Of each video alone, whatever others are tracked beside it; pictures among them are not tracked."""
    for number in range(8):
        (folder / f"{number}.mp4").write_bytes(clips[number % 3])
    shutil.copy(PHOTOGRAPHS[0], folder)
    out = folder.parent / "out"
    assert annotate(folder, "--output", out, "--yolo", detector, "--precision", "fp32", "--track")[0] == 0
    rows = rows_of(out)
    assert job_of(out)["exactly_once"] and len(rows) == 8 * FRAMES + 1
    assert all(one["track_id"] is None for one in rows[f"{folder}/bus.jpg"]["detections"])
    for number, clip in enumerate(clips):
        model = YOLO(detector)
        for index, (_, frame) in enumerate(decoded(clip)):
            (expected,) = model.track(frame[..., ::-1], persist=True, tracker="botsort.yaml", verbose=False)
            for name in range(number, 8, 3):
                found = rows[f"{folder}/{name}.mp4@{index}"]["detections"]
                ids = expected.boxes.id
                assert [one["track_id"] for one in found] == ([None] * len(expected) if ids is None else ids.tolist())
                np.testing.assert_allclose(
                    [[one[side] for side in ("x1", "y1", "x2", "y2")] for one in found],
                    expected.boxes.xyxy.numpy().reshape(-1, 4) if len(found) else [],
                    atol=0.01,
                )
