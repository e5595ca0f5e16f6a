"""How right detections are against a scene's truth, by COCO's own measure."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shardsight.demo.scenes import KINDS, Scene
from shardsight.demo.writers import coco


def average_precision(
    scenes: Iterable[Scene], rows: dict[str, list[dict[str, Any]]], masks: bool = False
) -> dict[str, float]:
    """mAP50-95 and mAP50 of `detections` by scene name; of their boxes, or of their masks."""
    truth = COCO()
    truth.dataset = coco(scenes)
    found = [
        {
            "image_id": image["id"],
            "category_id": KINDS.index(one["label"]) + 1,
            "score": one["score"],
            "bbox": [one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]],
        }
        | ({"segmentation": _rle(one["mask"])} if masks else {})
        for image in truth.dataset["images"]
        for one in rows[image["file_name"].removesuffix(".jpg")]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if not found:
            return {"mAP50-95": 0.0, "mAP50": 0.0}
        evaluation = COCOeval(truth, truth.loadRes(found), "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"mAP50-95": float(np.round(evaluation.stats[0], 4)), "mAP50": float(np.round(evaluation.stats[1], 4))}


def _rle(mask: dict[str, Any]) -> dict[str, Any]:
    return {"size": [mask["height"], mask["width"]], "counts": mask["counts"].encode()}
