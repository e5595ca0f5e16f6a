"""What is found in the frames of videos → identities, with ultralytics' own trackers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

from shardsight.models.info import ModelError
from shardsight.models.yolo.rows import rows_of_boxes
from shardsight.models.yolo.trackers import needs_pixels, tracker_settings
from shardsight.models.yolo.ultralytics_import import (
    OBB,
    TRACKER_MAP,
    BasePredictor,
    Boxes,
    IterableSimpleNamespace,
    Results,
    ops,
)
from shardsight.row import Failure, frames_of

_COLUMNS = ("unit", "record", "frame_number", "last_frame", "frame_index")


@dataclass
class Found:
    """What is in one picture.

    rows: dicts of DETECTION or CLASS. boxes: of those rows, in pixels of the original; a classifier has none. dropped:
    further boxes, which NMS has dropped, for the trackers that use them.
    """

    rows: list[dict[str, Any]]
    boxes: Boxes | OBB
    dropped: Any = None


@dataclass
class _Video:
    """frames: how many have come."""

    tracker: Any
    frames: int = 0


class Tracking:
    """Gives identities to what is found in videos, as ultralytics' `model.track(persist=True)` does for each alone.

    name: one of TRACKERS. given: settings other than ultralytics' defaults. predictor: which finds; it is switched to
    tracking. names: label by class id. Raises ModelError for classifiers, and UsageError for wrong settings.

    A tracker is made for the row of a (unit, record) with frame_number 0, and dropped after the one with last_frame.
    """

    def __init__(self, name: str, given: dict[str, Any], predictor: BasePredictor, names: dict[int, str]) -> None:
        if predictor.args.task == "classify":
            raise ModelError("a classifier finds no boxes to track: leave out --track, or give a model of another task")
        settings = tracker_settings(name, given)
        self.settings, self.looks = IterableSimpleNamespace(**settings), needs_pixels(settings)
        self.kind, self.predictor, self.names = TRACKER_MAP[name], predictor, names
        self.videos: dict[tuple[str | None, int], _Video] = {}
        if hasattr(self.kind, "setup_predictor"):  # keeps the network's output for compute_frame_extras
            predictor.args.mode = "track"
            self.kind.setup_predictor(predictor)

    def dropped(self, results: list[Results]) -> Sequence[Any]:
        """Of each result of the predictor's last batch the boxes that NMS has dropped, if the tracker uses them."""
        if not hasattr(self.kind, "compute_frame_extras"):
            return [None] * len(results)
        self.predictor.results = results
        return self.kind.compute_frame_extras(self.predictor) or [None] * len(results)

    def follow(self, table: pa.Table, found: list[Found | None], errors: list[dict[str, str] | None]) -> None:
        """Replace in `found` the rows of videos' frames by what the trackers make of them, in the table's order.

        found: None of rows with an error, which are no frames. errors: gets those of frames that cannot be tracked.
        Rows without frame_index are pictures, and stay as they are.
        """
        if "frame_number" not in table.column_names:  # pictures given directly
            return
        frames = dict(frames_of(table)) if self.looks else {}
        for index, place in enumerate(zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True)):
            unit, record, number, last, frame_index = place
            if frame_index is None and errors[index] is None:
                continue
            try:
                video = self._video((unit, record), number)
                if one := found[index]:
                    one.rows = self._rows(video.tracker, one, frames.get(index))
            except Failure as failure:
                found[index], errors[index] = None, errors[index] or failure.row("yolo")
            if last:
                self.videos.pop((unit, record), None)

    def _video(self, key: tuple[str | None, int], number: int) -> _Video:
        """The video of frame `number`. Raises Failure if frames are missing, also for all frames after them."""
        if number == 0:
            self.videos[key] = _Video(self.kind(args=self.settings))
        video = self.videos.get(key)
        if video is None or video.frames != number:
            self.videos.pop(key, None)
            expected = video.frames if video else 0
            raise Failure("FramesMissing", f"expected the video's frame {expected}, found {number}: tracking needs all")
        video.frames += 1
        return video

    def _rows(self, tracker: Any, one: Found, frame: np.ndarray | None) -> list[dict[str, Any]]:
        """A frame's rows, with the boxes and identities of its video's tracker. frame: RGB; only if it looks."""
        boxes = one.boxes
        height, width = boxes.orig_shape
        if frame is not None:
            if frame.shape[:2] != (height, width):  # motion is in pixels of the original
                frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
            frame = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        extra = {} if one.dropped is None else {"dets_del": one.dropped}
        data = boxes.data.float().cpu().numpy()  # numpy has no bf16
        try:
            tracks = tracker.update(type(boxes)(data, boxes.orig_shape), frame, **extra)
        except ValueError as error:  # LinAlgError among them: the Kalman filter's, for degenerate boxes
            raise Failure.of(error) from error
        if not len(tracks):
            # New tracks are hidden until they are confirmed. As in ultralytics, boxes that began none are not.
            return [] if any(not track.is_activated for track in tracker.tracked_stracks) else one.rows
        tracked = torch.as_tensor(tracks[:, :-1])
        if not isinstance(boxes, OBB):
            ops.clip_boxes(tracked, boxes.orig_shape)
        rows = rows_of_boxes(type(boxes)(tracked, boxes.orig_shape), self.names)
        return [one.rows[int(index)] | row for index, row in zip(tracks[:, -1], rows, strict=True)]
