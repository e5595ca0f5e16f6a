"""ultralytics' results → dicts of DETECTION and CLASS."""

import math
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from shardsight.models.yolo.letterbox import Placement
from shardsight.models.yolo.ultralytics_import import OBB, Boxes, Results

_SIDES = ("x1", "y1", "x2", "y2")


def rows_of(result: Results, names: dict[int, str], placed: Placement) -> list[dict[str, Any]]:
    """One picture's result → its detections, or a classifier's best five classes.

    Boxes and keypoints of the result are in pixels of the original; masks in those of the model's input, in which the
    picture is `placed`.
    """
    if result.probs is not None:
        scores = result.probs.data.float().cpu().numpy()
        return [_label(names, i) | {"score": float(scores[i])} for i in np.argsort(-scores, kind="stable")[:5]]
    rows = rows_of_boxes(result.boxes if result.obb is None else result.obb, names)
    if result.masks is not None:
        for row, mask in zip(rows, result.masks.data.cpu().numpy(), strict=True):
            row["mask"] = _original_mask(mask, row, placed)
    elif result.keypoints is not None:
        for row, points in zip(rows, result.keypoints.data.float().cpu().numpy(), strict=True):
            row["keypoints"] = [
                {"x": float(p[0]), "y": float(p[1]), "score": float(p[2]) if len(p) == 3 else None} for p in points
            ]
    return rows


def rows_of_boxes(boxes: Boxes | OBB, names: dict[int, str]) -> list[dict[str, Any]]:
    """Boxes in pixels of the original → dicts of DETECTION, with `track_id` if a tracker has given them one."""
    xyxy, scores, classes = (part.float().cpu().numpy() for part in (boxes.xyxy, boxes.conf, boxes.cls))
    rows = [
        _label(names, label) | {"score": float(score)} | dict(zip(_SIDES, map(float, corner), strict=True))
        for corner, score, label in zip(xyxy, scores, classes, strict=True)
    ]
    if boxes.is_track:
        for row, track in zip(rows, boxes.id.tolist(), strict=True):
            row["track_id"] = int(track)
    if isinstance(boxes, OBB):
        corners, angles = boxes.xyxyxyxy.float().cpu().numpy(), boxes.xywhr[:, 4].float().cpu().numpy()
        for row, points, angle in zip(rows, corners, angles, strict=True):
            row |= {"angle": float(angle), "corners": points.ravel().tolist()}
    return rows


def _label(names: dict[int, str], index: int) -> dict[str, Any]:
    return {"label": names[int(index)], "class_id": int(index)}


def _original_mask(mask: np.ndarray, row: dict[str, Any], placed: Placement) -> dict[str, Any]:
    """A mask of the model's input, (outer height, outer width) → COCO RLE of the original picture.

    Only the part within the detection's box is scaled, as floats of the whole picture would take four times its bytes.
    """
    x1, y1 = max(0, math.floor(row["x1"])), max(0, math.floor(row["y1"]))
    x2, y2 = min(placed.width, math.ceil(row["x2"])), min(placed.height, math.ceil(row["y2"]))
    canvas = np.zeros((placed.height, placed.width), np.uint8, order="F")
    if x2 > x1 and y2 > y1:
        scale_x, scale_y = placed.inner[0] / placed.width, placed.inner[1] / placed.height
        # From the centre of the original's pixel to the mask's.
        shift_x = (x1 + 0.5) * scale_x + placed.left - 0.5
        shift_y = (y1 + 0.5) * scale_y + placed.top - 0.5
        matrix = np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        part = cv2.warpAffine(mask.astype(np.float32), matrix, (x2 - x1, y2 - y1), flags=flags)
        canvas[y1:y2, x1:x2] = part >= 0.5
    return {"height": placed.height, "width": placed.width, "counts": rle.encode(canvas)["counts"].decode()}
