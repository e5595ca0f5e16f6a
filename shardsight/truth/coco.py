"""COCO's JSON: boxes, masks, keypoints, crowds."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pycocotools import mask as rle

from shardsight.errors import UsageError
from shardsight.storage import Storage
from shardsight.truth.labels import (
    BAD_MASK,
    MISSING,
    NO_CATEGORY,
    NO_NUMBERS,
    NO_PICTURE,
    TWICE,
    Faults,
    Sample,
    Thing,
    Truth,
)
from shardsight.truth.pictures import Pictures


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(path: str, content: Mapping[str, Any], storage: Storage, task: str | None) -> Truth:
    """task: of the models; by default keypoints or masks where there are any. Raises UsageError."""
    faults = Faults()
    names = {int(one["id"]): str(one["name"]) for one in content["categories"]}
    faults.classes(names)
    images: dict[Any, Mapping[str, Any]] = {}
    for image in content["images"]:
        if image["id"] in images:
            faults.add(TWICE, image.get("file_name", image["id"]))
        else:
            images[image["id"]] = image
    things: dict[Any, list[Thing]] = defaultdict(list)
    seen: set[Any] = set()
    keypoints = max((len(one.get("keypoints") or ()) // 3 for one in content["annotations"]), default=0)
    for annotation in content["annotations"]:
        _add(annotation, images, names, things, faults)
        if annotation.get("id") in seen:
            faults.add(TWICE, f"annotation {annotation['id']}")
        seen.add(annotation.get("id"))
    # val2017 of annotations/instances_val2017.json
    part = path.rpartition("/")[2].rpartition(".")[0].rpartition("_")[2]
    pictures = Pictures(path, part, storage)
    places = pictures.find_all([(str(one["file_name"]), str(one.get("coco_url") or "")) for one in images.values()])
    samples = []
    for (number, image), (uri, there) in zip(images.items(), places, strict=True):
        if not there:
            faults.add(MISSING, uri)
        faults.things(uri, things[number], image.get("width"), image.get("height"))
        samples.append(Sample(uri, image.get("width"), image.get("height"), things[number]))
    masks = any(thing.mask or thing.polygons for some in things.values() for thing in some)
    found = _task(task, "pose" if keypoints else "segment" if masks else "detect", path)
    if not samples:
        raise UsageError(f"{path} lists no pictures: give a set that has some")
    if found == "segment":
        faults.masks(samples)
    return Truth(found, names, samples, faults.found(), keypoints=keypoints)


def _task(asked: str | None, found: str, path: str) -> str:
    can = {"detect": ("detect",), "segment": ("segment", "detect"), "pose": ("pose", "segment", "detect")}[found]
    if asked in (None, "text"):
        return found
    if asked not in can:
        raise UsageError(
            f"{path} has labels for {' and '.join(can)}, and the model is for {asked}: give another of both"
        )
    return str(asked)


def _add(
    annotation: Mapping[str, Any],
    images: Mapping[Any, Mapping[str, Any]],
    names: Mapping[int, str],
    things: dict[Any, list[Thing]],
    faults: Faults,
) -> None:
    name = f"annotation {annotation.get('id')}"
    image = images.get(annotation.get("image_id"))
    if image is None:
        faults.add(NO_PICTURE, name)
    elif annotation.get("category_id") not in names:
        faults.add(NO_CATEGORY, f"{name}: category {annotation.get('category_id')}")
    elif isinstance(thing := _thing(annotation, image), str):
        faults.add(thing, name)
    else:
        things[annotation["image_id"]].append(thing)


def _thing(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> Thing | str:
    """The reason, where it cannot be read."""
    try:
        x, y, width, height = map(float, annotation["bbox"])
        points = [float(value) for value in annotation.get("keypoints") or ()]
        area = annotation.get("area")
        area = None if area is None else float(area)
    except (KeyError, TypeError, ValueError):
        return NO_NUMBERS
    if not all(map(math.isfinite, (x, y, width, height, area or 0.0, *points))) or len(points) % 3:
        return NO_NUMBERS
    try:
        polygons, mask = _mask(annotation.get("segmentation"), image)
    except (KeyError, TypeError, ValueError):
        return BAD_MASK
    return Thing(
        *(int(annotation["category_id"]), (x, y, x + width, y + height), bool(annotation.get("iscrowd"))),
        *(area, polygons, mask),
        points=list(zip(points[::3], points[1::3], points[2::3], strict=True)) or None,
    )


def _mask(found: Any, image: Mapping[str, Any]) -> tuple[list[list[float]] | None, dict[str, Any] | None]:
    """(polygons, RLE) of a segmentation in any of COCO's three forms."""
    if not found:
        return None, None
    if isinstance(found, list):
        polygons = [[float(value) for value in polygon] for polygon in found]
        if any(len(polygon) % 2 or not all(map(math.isfinite, polygon)) for polygon in polygons):
            raise ValueError("a polygon that is no list of points")
        return [polygon for polygon in polygons if len(polygon) >= 6] or None, None
    height, width = map(int, found["size"])
    if (image.get("height") or height, image.get("width") or width) != (height, width):
        raise ValueError("a mask of another size than its picture's")
    counts = found["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width or min(counts) < 0:
            raise ValueError("run lengths that are not those of the mask's size")
        counts = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    mask = {"size": [height, width], "counts": counts.decode() if isinstance(counts, bytes) else str(counts)}
    if rle.area(mask) > height * width:
        raise ValueError("run lengths that are longer than the mask")
    return None, mask
