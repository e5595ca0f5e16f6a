"""Rows with their truth beside them, as an evaluation writes and shows them."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from shardsight.row import DETECTION, ROW
from shardsight.truth import Sample, Truth

# The true objects of a picture, as detections without a score; its true class; and what is right to answer.
LABELLED = pa.schema(
    [
        *ROW,
        ("truth", pa.list_(pa.struct([*DETECTION, ("crowd", pa.bool_())]))),
        ("true_class", pa.string()),
        ("true_answers", pa.list_(pa.struct([("prompt", pa.string()), ("answers", pa.list_(pa.string()))]))),
    ]
)


def with_truth(row: Mapping[str, Any], truth: Truth, sample: Sample) -> dict[str, Any]:
    """A row of the picture with the columns of LABELLED. True objects are in pixels as the row's own; of a picture that
    could not be read they are left out where the labels are in parts of its sides."""
    width, height = row["width"], row["height"]
    sized = bool(width and height)
    known = sample.things if sized or not truth.normalised else []
    things = [thing.scaled(width, height) if truth.normalised else thing for thing in known]
    objects = []
    for thing in things:
        x1, y1, x2, y2 = thing.box
        mask = thing.rle(sample.width or width, sample.height or height) if sized else None
        size = mask["size"] if mask else (0, 0)
        objects.append(
            {
                **{"label": truth.names[thing.class_id], "class_id": thing.class_id, "crowd": thing.crowd},
                **{"x1": x1, "y1": y1, "x2": x2, "y2": y2, "corners": thing.corners},
                "mask": mask and {"height": size[0], "width": size[1], "counts": mask["counts"]},
                "keypoints": [{"x": x, "y": y, "score": float(seen > 0)} for x, y, seen in thing.points or ()] or None,
            }
        )
    return {
        **row,
        "truth": objects if truth.task not in ("classify", "text") else None,
        "true_class": None if sample.class_id is None else truth.names[sample.class_id],
        "true_answers": [{"prompt": prompt, "answers": answers} for prompt, answers in sample.asked.items()] or None,
    }
