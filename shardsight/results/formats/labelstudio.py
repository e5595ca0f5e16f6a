"""Label Studio: tasks.json with pre-annotations, config.xml for the project, and the pictures."""

import math
from collections.abc import Iterable, Iterator
from itertools import count
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

from shardsight.results.formats.geometry import outline
from shardsight.results.formats.sample import Contents, Found, Report, Sample, visible
from shardsight.results.formats.target import Target, Values

# The tags of config.xml: its name → (the tag, the tag of its labels, the name of a region's value).
_TAGS = {
    "class": ("Choices", "Choice", "choices"),
    "box": ("RectangleLabels", "Label", "rectanglelabels"),
    "mask": ("PolygonLabels", "Label", "polygonlabels"),
    "keypoint": ("KeyPointLabels", "Label", "keypointlabels"),
}


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """Coordinates are percents of the picture as shown. A mask is a polygon, an oriented box a rotated rectangle, a
    keypoint a region of its own with its object's as parent.

    Tasks name pictures in a store by their uris, and on a disk as Label Studio's local storage does: its
    LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is then this folder.
    """
    target.write("config.xml", config(contents))
    tasks = Values()
    for sample in samples:
        assert sample.picture
        place = f"images/{sample.file}"
        target.put(place, sample.picture)
        address = target.path(place) if target.remote else f"/data/local-files/?d={place}"
        regions = list(_regions(sample, contents))
        scores = [score for score in (sample.score, *(found.score for found in sample.found)) if score is not None]
        prediction: dict[str, Any] = {"model_version": contents.model, "result": regions}
        prediction |= {"score": fmean(scores)} if scores else {}
        tasks.add({"data": {"image": address, "id": sample.id}, "predictions": [prediction]})
        report.written.update(pictures=1, objects=len(sample.found))
    with target.open("tasks.json") as file:
        tasks.copy_to(file)


def config(contents: Contents) -> bytes:
    """The labeling interface."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    names = {"class": contents.names} if contents.classes else {"box": contents.names}
    if contents.masks:
        names["mask"] = contents.names
    if contents.keypoints:
        names["keypoint"] = [str(number) for number in range(contents.keypoints)]
    for name, labels in names.items():
        tag, label, _ = _TAGS[name]
        control = ElementTree.SubElement(view, tag, name=name, toName="image")
        for value in labels:
            ElementTree.SubElement(control, label, value=value)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="utf-8")


def _regions(sample: Sample, contents: Contents) -> Iterator[dict[str, Any]]:
    numbers = count()

    def region(name: str, label: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
        kind = _TAGS[name][2]
        sizes = {"original_width": sample.width, "original_height": sample.height, "image_rotation": 0}
        base = {"id": str(next(numbers)), "from_name": name, "to_name": "image", "type": kind, **sizes}
        return base | {"value": value | {kind: [label]}} | {key: one for key, one in more.items() if one is not None}

    if sample.category is not None:
        yield region("class", contents.names[sample.category], {}, score=sample.score)
    for found in sample.found:
        label = contents.names[found.category]
        ring = None if found.mask is None else outline(found.mask)
        if ring is not None:
            points = [_percent(sample, x, y) for x, y in ring.tolist()]
            made = region("mask", label, {"points": points, "closed": True}, score=found.score)
        else:
            made = region("box", label, _rectangle(sample, found), score=found.score)
        yield made
        for number, point in enumerate(found.keypoints or ()):
            if visible(point):
                x, y = _percent(sample, point["x"] or 0.0, point["y"] or 0.0)
                yield region("keypoint", str(number), {"x": x, "y": y, "width": 0.5}, parentID=made["id"])


def _percent(sample: Sample, x: float, y: float) -> list[float]:
    return [100 * share for share in sample.relative(x, y)]


def _rectangle(sample: Sample, found: Found) -> dict[str, Any]:
    """x, y: of the corner around which it is turned, clockwise, by `rotation` degrees."""
    x1, y1, x2, y2 = found.box
    rotation = 0.0
    if found.corners is None:
        (x, y), width, height = (x1, y1), x2 - x1, y2 - y1
    else:
        corners = list(zip(found.corners[::2], found.corners[1::2], strict=True))
        # One in the picture, if there is one, as others cannot be given.
        at = next((n for n, (x, y) in enumerate(corners) if 0 <= x < sample.width and 0 <= y < sample.height), 0)
        (x, y), before, after = corners[at], corners[at - 1], corners[(at + 1) % 4]
        if (before[0] - x) * (after[1] - y) < (before[1] - y) * (after[0] - x):
            before, after = after, before
        rotation = math.degrees(math.atan2(before[1] - y, before[0] - x)) % 360
        width, height = math.dist(before, (x, y)), math.dist(after, (x, y))
    x, y = _percent(sample, x, y)
    size = {"width": min(100.0, 100 * width / sample.width), "height": min(100.0, 100 * height / sample.height)}
    return {"x": x, "y": y, **size, "rotation": rotation}
