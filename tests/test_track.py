"""Identities: each video's are those that ultralytics gives to that video alone."""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as rle

from demo.scenes import scene
from shardsight.decode.frames import TABLE
from shardsight.errors import UsageError
from shardsight.models.info import ModelError
from shardsight.models.yolo.letterbox import Letterbox
from shardsight.models.yolo.model import Yolo
from shardsight.models.yolo.trackers import TRACKERS, needs_pixels, tracker_settings
from shardsight.row import frame_columns
from tests.conftest import WEIGHTS

# isort: split
from ultralytics import YOLO  # after shardsight, which sets how ultralytics loads weights
from ultralytics.trackers.track import TRACKER_MAP
from ultralytics.utils import ops

# A low iou: of shapes that overlap, NMS drops some, of which tracktrack makes use.
IMGSZ, CONF, IOU = 320, 0.1, 0.2
SEEDS = (1, 2, 3)  # of the clips
SIDES = ("x1", "y1", "x2", "y2")


@cache
def clip(seed: int, count: int = 30) -> list[np.ndarray]:
    """Frames, RGB uint8: shapes that cross, leave and come back over a panning ground; some frames show nothing."""
    rng = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(scene(seed, seed=500).image, (0, 0), 12)
    height, width = ground.shape[:2]
    sprites = []
    for index in range(3):
        one = scene(10 * seed + index, seed=600)
        for shape in sorted(one.shapes, key=lambda shape: -int(shape.mask.sum()))[:2]:
            x1, y1, x2, y2 = shape.box
            place, speed = rng.uniform(0, (width - (x2 - x1), height - (y2 - y1))), rng.uniform(-14, 14, 2)
            sprites.append((one.image[y1:y2, x1:x2], shape.mask[y1:y2, x1:x2], place, speed))
    frames = []
    for number in range(count):
        frame = np.roll(ground, (2 * number, 3 * number), (0, 1))
        for image, mask, place, speed in sprites if number % 13 != 9 else ():
            x, y = np.round(place + number * speed).astype(int)
            left, top = max(0, -x), max(0, -y)
            part = frame[max(0, y) : max(0, y + len(image)), max(0, x) : max(0, x + image.shape[1])]
            seen = np.s_[top : top + part.shape[0], left : left + part.shape[1]]
            part[mask[seen]] = image[seen][mask[seen]]
        frames.append(frame)
    return frames


def rows_of_clip(frames: list[np.ndarray], record: int, shrink: Letterbox | None = None) -> list[dict[str, Any]]:
    """The rows of a video, its frames in full size, or no larger than `shrink` needs them."""
    rows = []
    for number, frame in enumerate(frames):
        height, width = frame.shape[:2]
        frame = shrink.shrink(frame, width, height) if shrink else frame
        place = {"unit": "u", "record": record, "frame_number": number, "last_frame": number == len(frames) - 1}
        rows.append(place | {"frame_index": 3 * number} | frame_columns(frame, width, height))
    return rows


def mixed(videos: list[list[dict[str, Any]]], seed: int = 7) -> Iterator[list[dict[str, Any]]]:
    """Rows of several videos mixed at random, each video's in order, in tables of random sizes."""
    rng = random.Random(seed)
    order = [index for index, video in enumerate(videos) for _ in video]
    rng.shuffle(order)
    waiting = [iter(video) for video in videos]
    rows = [next(waiting[index]) for index in order]
    while rows:
        size = rng.randint(1, 12)
        yield rows[:size]
        rows = rows[size:]


def run(model: Yolo, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return model(pa.Table.from_pylist(rows, TABLE)).to_pylist()


def tracker(track: str | None = "bytetrack", task: str = "detect", **more: Any) -> Yolo:
    given = {"conf": CONF, "iou": IOU, "imgsz": IMGSZ, "precision": "fp32"} | more
    return Yolo(str(WEIGHTS / f"{task}.pt"), track=track, **given)


@pytest.fixture(scope="module")
def model() -> Yolo:
    """Of the tests that leave none of its videos unfinished."""
    return tracker()


CASES = [*(("detect", name) for name in TRACKERS)]
CASES += [("obb", "tracktrack"), ("obb", "bytetrack"), ("segment", "botsort"), ("pose", "ocsort")]


@pytest.mark.parametrize(("task", "name"), CASES)
def test_same_as_ultralytics_on_each_video_alone(task: str, name: str) -> None:
    """Identities and boxes, though frames of several videos share tables and batches, and hold no more pixels than the
    tracker needs; and masks, keypoints and corners go with their boxes."""
    model = tracker(name, task)
    shrink = None if needs_pixels(tracker_settings(name)) else model.input
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for rows in mixed([rows_of_clip(clip(seed), seed, shrink) for seed in SEEDS]):
        for row in run(model, rows):
            assert row["error"] is None
            found[row["record"], row["frame_number"]] = row["detections"]
    assert not model.tracking.videos, "finished videos are kept in memory"
    identities = 0
    for seed in SEEDS:
        theirs, last = YOLO(WEIGHTS / f"{task}.pt"), 0
        options = {"tracker": f"{name}.yaml", "conf": CONF, "iou": IOU, "imgsz": IMGSZ, "verbose": False}
        for number, frame in enumerate(clip(seed)):
            (result,) = theirs.track(np.ascontiguousarray(frame[..., ::-1]), persist=True, **options)
            compare(found[seed, number], result)
            ids = [row["track_id"] for row in found[seed, number] if row["track_id"]]
            last = max([last, *ids])
        identities += last
    assert identities > 3 * len(SEEDS)


def compare(rows: list[dict[str, Any]], result: Any) -> None:
    boxes = result.boxes if result.obb is None else result.obb
    ids = [None] * len(boxes) if boxes.id is None else boxes.id.int().tolist()
    assert [row["track_id"] for row in rows] == ids
    if not rows:
        return
    assert [row["class_id"] for row in rows] == boxes.cls.int().tolist()
    assert np.allclose([row["score"] for row in rows], boxes.conf, atol=1e-4)
    assert np.allclose([[row[side] for side in SIDES] for row in rows], boxes.xyxy, rtol=0, atol=1e-3)
    if result.obb is not None:
        assert np.allclose([row["corners"] for row in rows], boxes.xyxyxyxy.reshape(-1, 8), rtol=0, atol=1e-3)
        assert np.allclose([row["angle"] for row in rows], boxes.xywhr[:, 4], rtol=0, atol=1e-4)
    if result.keypoints is not None:
        points = [[(point["x"], point["y"], point["score"]) for point in row["keypoints"]] for row in rows]
        assert np.allclose(points, result.keypoints.data, rtol=0, atol=0.01)
    if result.masks is not None:
        masks = ops.scale_masks(result.masks.data[None].float(), result.orig_shape)[0] > 0.5
        shared = [overlap(row["mask"], mask.numpy()) for row, mask in zip(rows, masks, strict=True)]
        assert np.median(shared) > 0.8


def overlap(mine: dict[str, Any], theirs: np.ndarray) -> float:
    mask = rle.decode({"size": [mine["height"], mine["width"]], "counts": mine["counts"]}).astype(bool)
    return float((mask & theirs).sum() / max(1, (mask | theirs).sum()))


def inputs(model: Yolo, rows: list[dict[str, Any]]) -> list[tuple[np.ndarray | None, Any]]:
    """(frame, what NMS dropped) that each row's tracker is given."""
    assert model.tracking
    given, update = [], model.tracking.kind.update

    def note(self: Any, boxes: Any, img: Any = None, **more: Any) -> Any:
        given.append((img, more.get("dets_del")))
        return update(self, boxes, img, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.tracking.kind, "update", note)
        run(model, rows)
    return given


@pytest.mark.parametrize("task", ["detect", "obb"])
def test_boxes_that_nms_drops_reach_tracktrack(task: str) -> None:
    """It follows a shape behind another of its kind through them; without them it would lose its identity."""
    given = inputs(tracker("tracktrack", task), rows_of_clip(clip(2)[:8], 1))
    assert len(given) == 8
    assert any(dropped is not None and len(dropped[0]) for _, dropped in given)


def test_frames_reach_the_tracker_in_full_size(model: Yolo) -> None:
    """And as BGR. Where smaller ones come they are scaled up, since camera motion is in pixels of the original."""
    frames, looks = clip(3)[:3], tracker("botsort")
    for frame, (given, _) in zip(frames, inputs(looks, rows_of_clip(frames, 1)), strict=True):
        assert given is not None and given.flags.c_contiguous
        assert np.array_equal(given, frame[..., ::-1])
    small = rows_of_clip(frames, 1, looks.input)
    assert small[0]["frame_width"] < small[0]["width"]
    assert [given.shape for given, _ in inputs(looks, small)] == [frame.shape for frame in frames]
    assert [given for given, _ in inputs(model, small)] == [None] * 3


def test_rows_with_an_error_are_no_frames(model: Yolo) -> None:
    """A damaged frame does not count: the rest is tracked as if it had not been; and a damaged last frame frees the
    tracker like any other."""
    frames = clip(1)[:10]
    rows = rows_of_clip(frames, 1)
    for index in (0, 4, 9):  # the decoder does not know the index of a frame that it cannot decode
        error = {"stage": "decode", "type": "InvalidData", "message": "damaged"}
        rows[index] |= {"error": error, "frame": None, "frame_index": None}
    found = run(model, rows)
    assert model.tracking and not model.tracking.videos
    assert [row["error"] is not None for row in found] == [index in (0, 4, 9) for index in range(10)]
    whole = run(model, rows_of_clip([frames[index] for index in (1, 2, 3, 5, 6, 7, 8)], 1))
    assert [row["detections"] for row in found if not row["error"]] == [row["detections"] for row in whole]
    assert any(one["track_id"] for row in whole for one in row["detections"])


def test_a_missing_frame_is_an_error_and_no_wrong_identity(model: Yolo) -> None:
    """Of a video that has lost rows, or that another process has begun, what follows is not tracked as if it were all;
    other videos, and the same one from its beginning, are."""
    rows, other = rows_of_clip(clip(1)[:6], 1), rows_of_clip(clip(2)[:6], 2)
    found = run(model, [*rows[:2], *other[:3], *rows[3:], *other[3:]])
    wrong = [(row["record"], row["frame_number"]) for row in found if row["error"]]
    assert wrong == [(1, 3), (1, 4), (1, 5)]
    message = "expected the video's frame 2, found 3: tracking needs all"
    assert found[5]["error"] == {"stage": "yolo", "type": "FramesMissing", "message": message}
    assert found[5]["detections"] is None
    assert not any(row["error"] for row in run(model, rows))


def test_a_frame_whose_tracker_fails_costs_no_other(model: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Kalman filter cannot invert what some degenerate boxes make of its matrix."""
    rows = rows_of_clip(clip(1)[:3], 1)
    run(model, rows[:1])
    assert model.tracking
    (video,) = model.tracking.videos.values()

    def fail(*_: Any) -> None:
        raise np.linalg.LinAlgError("not positive definite")

    with monkeypatch.context() as patch:
        patch.setattr(video.tracker, "update", fail)
        (row,) = run(model, rows[1:2])
    assert row["error"]["type"] == "LinAlgError" and row["detections"] is None
    assert run(model, rows[2:])[0]["error"] is None


def test_pictures_are_not_tracked(model: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of pictures and videos, and as what Python code hands over."""
    frames = clip(1)[:4]
    rows = [row | {"frame_index": None, "frame_number": 0, "last_frame": True} for row in rows_of_clip(frames, 1)]
    found = [[row["detections"] for row in each] for each in (run(model, rows), model(frames))]
    monkeypatch.setattr(model, "tracking", None)
    expected = [row["detections"] for row in run(model, rows)]
    assert any(expected)
    assert found == [expected, expected]


def test_a_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="a classifier finds no boxes to track"):
        tracker(task="classify")


def test_trackers_are_those_of_ultralytics() -> None:
    """And each has settings that pass our own check; those that look at pixels have a gmc_method."""
    assert set(TRACKERS) == set(TRACKER_MAP)
    assert {name for name in TRACKERS if needs_pixels(tracker_settings(name))} == {"botsort", "tracktrack"}


def test_settings_override_some_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("track_buffer: 90\nmatch_thresh: 1\ngmc_method: none\n")
    settings = tracker_settings("botsort", str(file))
    assert settings == tracker_settings("botsort") | {"track_buffer": 90, "match_thresh": 1, "gmc_method": "none"}
    assert not needs_pixels(settings)
    model = tracker("botsort", track_config=settings)
    run(model, rows_of_clip(clip(1)[:2], 1)[:1])
    assert model.tracking
    assert [video.tracker.max_frames_lost for video in model.tracking.videos.values()] == [90]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("track_bufer: 3", "bytetrack has no setting track_bufer: choose from tracker_type, track_high_thresh"),
        ("tracker_type: botsort", "its tracker_type is botsort, but the tracker is bytetrack"),
        ("track_buffer: long", "track_buffer is 'long': expected int, such as 30"),
        ("fuse_score: 1", "fuse_score is 1: expected bool, such as True"),
        ("a: [", "is no YAML: while parsing"),
        ("- 3", "expected settings as `key: value`, found list"),
        ("", "expected settings as `key: value`, found NoneType"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str, tmp_path: Path) -> None:
    """In the command's first second, in one sentence."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(f"--track-config {file}")) as caught:
        tracker_settings("bytetrack", str(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unusable_trackers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no tracker sort: choose from botsort, "):
        tracker_settings("sort")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        tracker_settings("botsort", str(tmp_path / "none.yaml"))
    for setting, message in (("with_reid: true", "needs the weights"), ("gmc_method: flow", "choose from sparse")):
        (tmp_path / "a.yaml").write_text(setting)
        with pytest.raises(UsageError, match=message):
            tracker_settings("tracktrack", str(tmp_path / "a.yaml"))


def test_settings_are_checked_without_torch() -> None:
    """The command says what is wrong before anything heavy is imported."""
    check = (
        "import sys; from shardsight.models.yolo.trackers import needs_pixels, tracker_settings as of; "
        "needs_pixels(of('ocsort')); assert not {'torch', 'ultralytics'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
