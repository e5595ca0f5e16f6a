"""Clips: the same for the same seed, and their truth is what the file shows."""

import configparser
from pathlib import Path

import av
import numpy as np
import pytest

from demo.__main__ import main
from demo.clips import FPS, HEIGHT, WIDTH, Clip
from demo.scenes import COLOURS
from shardsight.measures.tracks import Video, read_mot


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["demo", str(out), "--format", "clips", "--count", "1", "--seed", "3"])
        assert main() == 0
    return out


@pytest.fixture(scope="module")
def pictures(written: Path) -> list[np.ndarray]:
    """As the file shows them, RGB uint8 (H, W, 3)."""
    with av.open(written / "clip-0003-000.mp4") as file:
        stream = file.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", FPS)
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]


@pytest.fixture(scope="module")
def truth(written: Path, pictures: list[np.ndarray]) -> Video:
    info = configparser.ConfigParser()
    info.read(written / "clip-0003-000" / "seqinfo.ini")
    sequence = info["Sequence"]
    assert sequence["name"] == "clip-0003-000" and sequence.getint("seqLength") == len(pictures)
    assert (sequence.getint("imWidth"), sequence.getint("imHeight")) == (WIDTH, HEIGHT) == pictures[0].shape[1::-1]
    return read_mot(written / "clip-0003-000" / "gt" / "gt.txt", len(pictures))


def test_boxes_hold_the_colour_that_they_name(pictures: list[np.ndarray], truth: Video) -> None:
    """Frame n of the file is frame n + 1 of the truth, and an id's box holds its colour and fits it."""
    frames = list(Clip(0, 3).frames())
    for frame, picture, (ids, boxes) in list(zip(frames, pictures, truth, strict=True))[::10]:
        assert [(track.id, list(track.box)) for track in frame.tracks] == list(zip(ids, boxes, strict=True))
        for track in frame.tracks:
            own = np.abs(picture.astype(int) - COLOURS[track.colour]).sum(2) < 90
            x1, y1, x2, y2 = track.box
            assert own[y1:y2, x1:x2].any()
            if track.visibility > 0.95:  # else a thin tip may be all that one side shows
                left, top = max(0, x1 - 8), max(0, y1 - 8)
                ys, xs = np.nonzero(own[top : y2 + 8, left : x2 + 8])
                seen = xs.min() + left, ys.min() + top, xs.max() + 1 + left, ys.max() + 1 + top
                assert seen == pytest.approx(track.box, abs=3)


def test_shapes_hide_each_other_leave_and_return(written: Path, truth: Video) -> None:
    """What makes tracking hard is in each clip; a shape that returns has the id that it had."""
    lines = (written / "clip-0003-000" / "gt" / "gt.txt").read_text().splitlines()
    assert min(float(line.split(",")[8]) for line in lines) < 0.5
    present = np.array([[id in ids for ids, _ in truth] for id in range(1, 6)])
    gone = [np.flatnonzero(~row) for row in present if row[0] and row[-1]]
    assert any(len(frames) >= FPS // 2 for frames in gone)
    first, last = (dict(zip(*truth[number], strict=True)) for number in (0, len(truth) // 2))
    assert (first[1][0] - first[2][0]) * (last[1][0] - last[2][0]) < 0  # the two have changed sides


def test_same_seed_same_clip() -> None:
    one, same, other = (next(Clip(index, 3).frames()) for index in (1, 1, 2))
    assert (one.image == same.image).all() and one.tracks == same.tracks
    assert one.tracks != other.tracks


def test_a_clip_lasts_four_to_six_seconds() -> None:
    assert {4 * FPS <= Clip(index).length <= 6 * FPS for index in range(30)} == {True}
