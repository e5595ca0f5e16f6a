"""ultralytics' own figures of YOLOv8, beside those of an evaluation on COCO's val2017 with them."""

import re
from collections.abc import Mapping
from typing import Any

# Of docs.ultralytics.com/models/yolov8, for n, s, m, l and x, in percent: mAP50-95 on val2017.
_MEASURES = {"boxes": "mAP50-95", "masks": "mAP50-95", "keypoints": "mAP50-95"}
_FIGURES = {
    "boxes": dict(zip("nsmlx", (37.3, 44.9, 50.2, 52.9, 53.9), strict=True)),
    "masks": dict(zip("nsmlx", (30.5, 36.8, 40.8, 42.6, 43.4), strict=True)),
    "keypoints": dict(zip("nsmlx", (50.4, 60.0, 65.0, 67.6, 69.2), strict=True)),
}
_SUFFIX = {"": "boxes", "-seg": "masks", "-pose": "keypoints"}


def published(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table of the models whose file is named as ultralytics names them; None if the set is not val2017."""
    if "val2017" not in report["truth"]["data"]:
        return None
    rows = []
    for model in report["models"]:
        name = model["path"].rstrip("/").rpartition("/")[2]
        found = re.match(r"yolov8([nsmlx])(-seg|-pose|)(?![a-z-])", name)
        kind = _SUFFIX[found[2]] if found else ""
        if found and kind in model["figures"]:
            own = model["figures"][kind]["measures"][_MEASURES[kind]]["value"]
            theirs = _FIGURES[kind][found[1]]
            cells = [{"text": f"{theirs:.1f}"}, {"text": "–" if own is None else f"{100 * own:.1f}"}]
            rows.append({"name": model["name"], "cells": cells})
    pictures = report["truth"]["pictures"]
    note = "mAP50-95 in percent, as published by ultralytics at imgsz 640, on the 5,000 pictures of COCO val2017."
    if pictures != 5000:
        note += f" This set has {pictures:,}, so that the two do not compare."
    return {"note": note, "columns": ["model", "published", "here"], "rows": rows} if rows else None
