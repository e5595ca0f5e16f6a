"""What the benchmarks compute themselves, so that what they say of ours and of the peers is the same thing."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import measuring
from benchmarks.measuring import Run
from benchmarks.throughput import objects
from benchmarks.video import make_clips
from benchmarks.video_contenders import HEIGHT, IMGSZ, SIDE, WIDTH, _frames, _Model, crops, squash
from demo.scenes import Scene
from demo.score import tracks_of
from shardsight.decode.frames import Load
from shardsight.models.yolo.model import Yolo
from shardsight.row import ROW, Failure, frame_columns
from tests.conftest import ROOT


def test_tracks_of_a_job(tmp_path: Path) -> None:
    """Rows come in any order, from several files; frames without tracks, and boxes without ids, are no tracks."""
    box = {"label": "star", "score": 0.9, "x1": 1, "y1": 2, "x2": 3, "y2": 4}
    rows = [
        {"uri": "/clips/b.mp4", "frame_index": 1, "detections": [box | {"track_id": 3}, box]},
        {"uri": "/clips/a.mp4", "frame_index": 0, "detections": [box | {"track_id": 3}]},
        {"uri": "/clips/b.mp4", "frame_index": 0, "detections": []},
    ]
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row], ROW), tmp_path / f"{number}.parquet")
    expected = {"a": [([3], [[1, 2, 3, 4]])], "b": [([], []), ([3], [[1, 2, 3, 4]])]}
    assert tracks_of(tmp_path) == expected


def test_our_crops_are_those_of_the_peers(some_scenes: list[Scene], detector: Path) -> None:
    """The same frames, detections and PNGs, so that the figures are of the same work."""
    yolo, images = Yolo(str(detector), precision="fp32", imgsz=IMGSZ), [scene.image for scene in some_scenes[:4]]
    stretched = [cv2.resize(image, (SIDE, SIDE)) for image in images]
    rows = [frame_columns(image, image.shape[1], image.shape[0]) for image in images]
    broken = {"error": Failure("TruncatedVideo", "cut").row("decode")}
    table = squash(Load.table([*rows, broken]))
    ours = crops(yolo(table)).to_pylist()
    peers = [
        (frame, one)
        for frame, found in zip(stretched, _Model(str(detector)).features(stretched), strict=True)
        for one in found
    ]
    assert len(ours) == len(peers) > 4
    for mine, (frame, theirs) in zip(ours, peers, strict=True):
        assert mine["label"] == theirs["label"] and mine["bbox"] == pytest.approx(theirs["bbox"], abs=0.5)
        x1, y1, x2, y2 = map(int, mine["bbox"])
        assert np.array_equal(np.array(Image.open(io.BytesIO(mine["object"]))), frame[y1:y2, x1:x2])


def test_clips_move(tmp_path: Path) -> None:
    make_clips(tmp_path / "clips", 1, 5)
    frames = [row["frame"] for row in _frames(str(tmp_path / "clips"), WIDTH, HEIGHT)]
    assert len(frames) == 5 and frames[0].shape == (HEIGHT, WIDTH, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 5


def test_the_rate_of_a_stream() -> None:
    """Beyond the first rows, in whatever order processes note theirs, one by one or together."""
    assert measuring.stream("12.0 16\n10.0 16\n14.0 8\n") == (10.0, pytest.approx(24 / 4))
    assert measuring.stream("10.0 8\n10.02 8\n12.0 16\n") == (10.0, pytest.approx(16 / 2))
    assert measuring.stream("") == (None, None)
    assert measuring.stream("10.0 16\n") == measuring.stream("10.0 16\n10.0 1\n") == (10.0, None)


def test_a_contender_is_measured_with_all_of_its_processes() -> None:
    """Also one that it leaves behind; and a failure is told. By another process, all of whose children are ended."""

    def measured(argument: str) -> subprocess.CompletedProcess[str]:
        code = f"from benchmarks.measuring import measure; print(measure('tests.contender', '{argument}'))"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    run = eval(measured("200").stdout, {"Run": Run})
    assert run.rate and run.first and 0 < run.first < run.seconds < 30
    assert run.peak_mb > 200 + run.own_mb > 2 * 200 and run.cpu_seconds > 2  # its own, and the orphan's
    failed = measured("what")
    assert failed.returncode == 1 and "tests.contender what failed:" in failed.stderr and "ValueError" in failed.stderr


def _runs(*rates: float, others: float = 0.0) -> dict[int, list[Run]]:
    return {size: [Run(100 / rate, 3.14, rate, 10, 1000, 500, others) for rate in rates] for size in (16, 400)}


def test_a_table_compares_round_by_round() -> None:
    """Ours is twice as fast in each round, however much the machine changes between them."""
    runs = {"ours": _runs(20, 100, 40), "slow": _runs(2, 10, 4), "peer": _runs(10, 50, 20), "bare": _runs(99, 99, 99)}
    lines = measuring.table(runs, {name: name for name in runs}, ["slow", "peer"], "rows", ["bare"]).splitlines()
    assert lines[0] == "| | first row, s | 16, s | 400, s | rows/s | times the fastest peer | CPU, s | MB |"
    assert lines[2] == "| ours | 3.1 | 2.5 | 2.5 | 40.0 | 2.00× (2.00–2.00) | 10 | 1,000 |"
    assert lines[5].startswith("| bare |  |  |  | 99.0 | 4.95× (1.98–9.90) |  |")
    commands = measuring.table(runs, {name: name for name in runs}, ["slow", "peer"], "rows", rate=False).splitlines()
    assert commands[0] == "| | first row, s | 16, s | 400, s | times the fastest peer | CPU, s | MB |"
    assert commands[2] == "| ours | 3.1 | 2.5 | 2.5 | 2.00× (2.00–2.00) | 10 | 1,000 |"


def test_what_a_contender_left_is_counted(tmp_path: Path) -> None:
    """A row without detections, or one too few, is no result to compare."""
    (tmp_path / "results").mkdir()

    def left(*detections: list[dict[str, Any]] | None) -> None:
        table = pa.table({"detections": pa.array(detections, pa.list_(pa.struct([("label", pa.string())])))})
        pq.write_table(table, tmp_path / "results" / "a.parquet")

    left([{"label": "star"}, {"label": "ring"}], [])
    assert objects(tmp_path, 2) == 2
    with pytest.raises(SystemExit, match="should have 3 rows"):
        objects(tmp_path, 3)
    left([{"label": "star"}], None)
    with pytest.raises(SystemExit, match="1 of them without"):
        objects(tmp_path, 2)


def test_a_contest_alternates_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    run = Run(1, 1, 1, 1, 1, 1, 0)
    monkeypatch.setattr(measuring, "measure", lambda *command: order.append(command[0]) or run)
    runs = measuring.contest(["a", "b"], [16], 2, lambda name, size: [name], lambda name, size: len(name) + size)
    assert order == ["a", "b", "b", "a"]
    assert [one.objects for one in runs["a"][16]] == [17, 17]


def test_noise_is_told() -> None:
    assert measuring.noise({"a": _runs(1, others=0.03)}) == "Other work took 3% of the machine, at most 3%."
    assert "in 2 of 4 medians: **too much" in measuring.noise({"a": _runs(1), "b": _runs(1, others=0.2)})


def test_a_card_replaces_its_own_alone(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\n## A, x\n\nold\n\n## B, x\n\nkept\n")
    measuring.record("A, x", "new\n", path)
    measuring.record("C, x", "first\n", path)
    measuring.record("B, x", "last\n", path)
    assert path.read_text() == "# Results\n\n## C, x\n\nfirst\n\n## A, x\n\nnew\n\n## B, x\n\nlast\n"
