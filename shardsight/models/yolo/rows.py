"""ultralytics' results → rows of DETECTION and CLASS."""

import math
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from shardsight.models.yolo.letterbox import Box
from shardsight.models.yolo.ultralytics_import import Results

_SIDES = ("x1", "y1", "x2", "y2")


def rows_of(result: Results, names: dict[int, str], box: Box) -> list[dict[str, Any]]:
    """One picture's result, in pixels of the original but for masks → its detections; of a classifier, classes.

    box: how the picture lies in the model's input, of which the masks are.
    """
    if result.probs is not None:
        scores = result.probs.data.float().cpu().numpy()
        return [_label(names, i) | {"score": float(scores[i])} for i in np.argsort(-scores, kind="stable")[:5]]
    boxes = result.boxes if result.obb is None else result.obb
    xyxy, scores, classes = (part.float().cpu().numpy() for part in (boxes.xyxy, boxes.conf, boxes.cls))
    rows = [
        _label(names, label) | {"score": float(score)} | dict(zip(_SIDES, map(float, corner), strict=True))
        for corner, score, label in zip(xyxy, scores, classes, strict=True)
    ]
    if result.obb is not None:
        corners, angles = boxes.xyxyxyxy.float().cpu().numpy(), boxes.xywhr[:, 4].float().cpu().numpy()
        for row, points, angle in zip(rows, corners, angles, strict=True):
            row |= {"angle": float(angle), "corners": points.ravel().tolist()}
    elif result.masks is not None:
        for row, mask in zip(rows, result.masks.data.cpu().numpy(), strict=True):
            row["mask"] = _original_mask(mask, row, box)
    elif result.keypoints is not None:
        for row, points in zip(rows, result.keypoints.data.float().cpu().numpy(), strict=True):
            row["keypoints"] = [
                {"x": float(p[0]), "y": float(p[1]), "score": float(p[2]) if len(p) == 3 else None} for p in points
            ]
    return rows


def _label(names: dict[int, str], index: int) -> dict[str, Any]:
    return {"label": names[int(index)], "class_id": int(index)}


def _original_mask(mask: np.ndarray, row: dict[str, Any], box: Box) -> dict[str, Any]:
    """A mask of the model's input, (outer height, outer width), as COCO RLE of the original picture.

    Only the detection's own box is scaled: a whole picture's mask takes as many bytes as it has pixels.
    """
    x1, y1 = max(0, math.floor(row["x1"])), max(0, math.floor(row["y1"]))
    x2, y2 = min(box.width, math.ceil(row["x2"])), min(box.height, math.ceil(row["y2"]))
    canvas = np.zeros((box.height, box.width), np.uint8, order="F")
    if x2 > x1 and y2 > y1:
        scale_x, scale_y = box.inner[0] / box.width, box.inner[1] / box.height
        # From the centre of a pixel of the original to the mask's.
        shift_x = (x1 + 0.5) * scale_x + box.left - 0.5
        shift_y = (y1 + 0.5) * scale_y + box.top - 0.5
        matrix = np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        part = cv2.warpAffine(mask.astype(np.float32), matrix, (x2 - x1, y2 - y1), flags=flags)
        canvas[y1:y2, x1:x2] = part >= 0.5
    return {"height": box.height, "width": box.width, "counts": rle.encode(canvas)["counts"].decode()}
