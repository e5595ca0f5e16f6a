"""How right detections and answers are against a scene's truth."""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from demo.questions import expected, seen
from demo.scenes import KINDS, Scene
from demo.writers import coco, coco_rle
from shardsight.measures.tracks import Frame, Video


def average_precision(
    scenes: Iterable[Scene], rows: dict[str, list[dict[str, Any]]], masks: bool = False
) -> dict[str, float]:
    """COCO's mAP50-95 and mAP50 of `detections` by scene name; of their boxes, or of their masks."""
    truth = COCO()
    truth.dataset = coco(scenes)
    found = [
        {
            "image_id": image["id"],
            "category_id": KINDS.index(one["label"]) + 1,
            "score": one["score"],
            "bbox": [one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]],
        }
        | ({"segmentation": rle_of(one["mask"])} if masks else {})
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


def answer_figures(scenes: Iterable[Scene], answers: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """How right PaliGemma's answers are, by scene name and each as the row has it (records.ANSWER).

    caption, ocr, vqa: the part of them that is right to the letter, where the scene gives the question an answer,
    and `ocr` a word. mAP50: of the boxes of `detect`. mask IoU: the mean over the shapes of a kind that was asked for
    with `segment`, each with one of the masks that were found, 0 where none is left. What was not asked is left out.
    """
    scenes = list(scenes)
    right: dict[str, list[float]] = {"caption": [], "ocr": [], "vqa": [], "mask IoU": []}
    boxes: dict[str, list[dict[str, Any]]] = {}
    for scene in scenes:
        shapes = seen(scene)
        for answer in answers[scene.name]:
            form, _, rest = answer["prompt"].partition(" ")
            if form == "detect":
                found = [one for one in answer["detections"] or [] if one["label"] in KINDS]
                boxes[scene.name] = boxes.get(scene.name, []) + found
            elif form == "segment":
                truth = [coco_rle(shape.mask) for shape in scene.shapes if shape.kind == rest]
                masks = [rle_of(one["mask"]) for one in answer["detections"] or [] if one.get("mask")]
                right["mask IoU"] += _best_overlaps(truth, masks)
            else:
                text = expected(answer["prompt"], shapes)
                if text:  # half of the scenes have no word, which is no reading
                    right["vqa" if form == "answer" else form].append(float(answer["text"].strip() == text))
    figures = {name: float(np.round(np.mean(values), 4)) for name, values in right.items() if values}
    asked = [scene for scene in scenes if scene.name in boxes]
    return figures | ({"mAP50": average_precision(asked, boxes)["mAP50"]} if asked else {})


def _best_overlaps(truth: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[float]:
    """Of each true mask the IoU with its own among the found ones, the best pairs first."""
    ious = [0.0] * len(truth)
    if truth and found:
        table = np.array(coco_mask.iou(found, truth, [0] * len(truth)))
        for _ in range(min(table.shape)):
            row, column = np.unravel_index(table.argmax(), table.shape)
            ious[column] = float(table[row, column])
            table[row], table[:, column] = -1, -1
    return ious


def rle_of(mask: dict[str, Any]) -> dict[str, Any]:
    """A row's `mask` → what pycocotools takes."""
    return {"size": [mask["height"], mask["width"]], "counts": mask["counts"].encode()}


def tracks_of(results: Path) -> dict[str, Video]:
    """A job's Parquet files → the tracks in each video, by its file's name without ending. What has no `track_id` is on
    none, and a frame with an error has none."""
    rows = ds.dataset(results, format="parquet").to_table(columns=["uri", "frame_index", "detections"]).to_pylist()
    videos: dict[str, list[Frame]] = {}
    for row in sorted(rows, key=lambda row: (row["uri"], row["frame_index"] or 0)):
        found = [one for one in row["detections"] or [] if one["track_id"] is not None]
        boxes = [[one[side] for side in ("x1", "y1", "x2", "y2")] for one in found]
        videos.setdefault(Path(row["uri"]).stem, []).append(([one["track_id"] for one in found], boxes))
    return dict(videos)
