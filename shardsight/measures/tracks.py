"""How well objects are followed through videos, as TrackEval measures it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# A frame's ids (n,) and boxes (n, 4), x1, y1, x2, y2 in pixels; in order, of a video.
Frame = tuple[Sequence[int], Sequence[Sequence[float]]]
Video = Sequence[Frame]


def scores(truth: Mapping[str, Video], found: Mapping[str, Video]) -> dict[str, float]:
    """HOTA, DetA, AssA (means over 19 IoU thresholds, 0.05 to 0.95), MOTA, IDF1 (at IoU 0.5) in 0 to 1, though MOTA may
    be negative; and `switches`, how often an object's id changes. Over all videos, by name, in both.

    Classes do not count, so that a track whose class changes is one track. TrackEval's own MOTChallenge reader takes
    pedestrians alone. Needs the extra `evaluate`. Raises ValueError where truth and found do not have the same videos
    and as many frames of each, or an id stands twice in a frame.
    """
    from trackeval.metrics import CLEAR, HOTA, Identity

    if truth.keys() != found.keys():
        raise ValueError(f"expected tracks of {', '.join(sorted(truth))}; found those of {', '.join(sorted(found))}")
    videos = {name: _sequence(name, truth[name], found[name]) for name in truth}
    quiet = {"PRINT_CONFIG": False}
    hota, clear, identity = (
        metric.combine_sequences({name: metric.eval_sequence(video) for name, video in videos.items()})
        for metric in (HOTA(), CLEAR(quiet), Identity(quiet))
    )
    return {
        **{name: float(np.mean(hota[name])) for name in ("HOTA", "DetA", "AssA")},
        "MOTA": float(clear["MOTA"]),
        "IDF1": float(identity["IDF1"]),
        "switches": float(clear["IDSW"]),
    }


def read_mot(path: Path, frames: int) -> Video:
    """MOTChallenge's gt.txt, or a tracker's result in that form, of a video of so many frames.

    Lines are frame from 1, id, x, y, width, height, considered, …: those with considered 0 are left out. Coordinates
    stay as they are. Raises ValueError for a frame outside of the video, or a line that is none.
    """
    video: list[tuple[list[int], list[list[float]]]] = [([], []) for _ in range(frames)]
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            frame, id, x, y, width, height, considered = map(float, line.split(",")[:7])
        except ValueError:
            raise ValueError(f"{path}:{number}: expected seven numbers or more with commas, found {line!r}") from None
        if not 1 <= frame <= frames:
            raise ValueError(f"{path}:{number}: frame {frame:.0f} of a video of {frames} frames")
        if considered:
            ids, boxes = video[int(frame) - 1]
            ids.append(int(id))
            boxes.append([x, y, x + width, y + height])
    return video


def _sequence(name: str, truth: Video, found: Video) -> dict[str, Any]:
    """What TrackEval's metrics take: ids from 0, and the IoU of each pair of boxes in a frame."""
    if len(truth) != len(found):
        raise ValueError(f"{name}: expected {len(truth)} frames, found {len(found)}")
    true_ids, found_ids = _from_zero(name, truth), _from_zero(name, found)
    return {
        "gt_ids": true_ids,
        "tracker_ids": found_ids,
        "similarity_scores": [_iou(boxes, others) for (_, boxes), (_, others) in zip(truth, found, strict=True)],
        "num_gt_dets": sum(map(len, true_ids)),
        "num_tracker_dets": sum(map(len, found_ids)),
        "num_gt_ids": _distinct(true_ids),
        "num_tracker_ids": _distinct(found_ids),
        "num_timesteps": len(truth),
    }


def _from_zero(name: str, video: Video) -> list[np.ndarray]:
    known: dict[int, int] = {}
    for number, (ids, _) in enumerate(video):
        if len(set(ids)) < len(ids):
            raise ValueError(f"{name}: frame {number}, counted from 0, has an id twice: {list(ids)}")
        for one in ids:
            known.setdefault(one, len(known))
    return [np.array([known[one] for one in ids], int) for ids, _ in video]


def _distinct(ids: Iterable[np.ndarray]) -> int:
    return len({one for frame in ids for one in frame.tolist()})


def _iou(boxes: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """(n, 4) and (m, 4), x1, y1, x2, y2 → (n, m)."""
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    first, second = (np.array(some, float) - [[0, 0, *one[:2]] for one in some] for some in (boxes, others))
    return np.array(coco_mask.iou(first, second, [0] * len(second)))
