"""COCO's JSON: boxes, masks, keypoints, crowds."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pycocotools import mask as rle

from shardsight.errors import UsageError
from shardsight.sources import printable
from shardsight.storage import Storage, is_remote
from shardsight.truth.labels import (
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


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(path: str, content: Mapping[str, Any], storage: Storage, task: str | None) -> Truth:
    """task: of the models; by default keypoints or masks where there are any. Raises UsageError."""
    faults = Faults()
    names = {int(one["id"]): str(one["name"]) for one in content["categories"]}
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
    place = _Pictures(path, storage)
    samples = []
    for number, image in images.items():
        uri, there = place.find(image)
        if not there:
            faults.add(MISSING, uri)
        faults.things(uri, things[number], image.get("width"), image.get("height"))
        samples.append(Sample(uri, image.get("width"), image.get("height"), things[number]))
    masks = any(thing.mask or thing.polygons for some in things.values() for thing in some)
    found = "pose" if keypoints else "segment" if masks else "detect"
    if not samples:
        raise UsageError(f"{path} lists no pictures: give a set that has some")
    return Truth(_task(task, found, path), names, samples, faults.found(), keypoints=keypoints)


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
    elif (thing := _thing(annotation, image)) is None:
        faults.add(NO_NUMBERS, name)
    else:
        things[annotation["image_id"]].append(thing)


def _thing(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> Thing | None:
    """None where its numbers are none."""
    try:
        x, y, width, height = map(float, annotation["bbox"])
        points = [float(value) for value in annotation.get("keypoints") or ()]
        area = annotation.get("area")
        polygons, mask = _mask(annotation.get("segmentation"), image)
    except (KeyError, TypeError, ValueError):
        return None
    if not all(map(math.isfinite, (x, y, width, height, *points))):
        return None
    return Thing(
        *(int(annotation["category_id"]), (x, y, x + width, y + height), bool(annotation.get("iscrowd"))),
        *(float(area) if area is not None else None, polygons, mask),
        points=list(zip(points[::3], points[1::3], points[2::3], strict=True)) or None,
    )


def _mask(found: Any, image: Mapping[str, Any]) -> tuple[list[list[float]] | None, dict[str, Any] | None]:
    """(polygons, RLE) of a segmentation in any of COCO's three forms."""
    if not found:
        return None, None
    if isinstance(found, list):
        polygons = [[float(value) for value in polygon] for polygon in found]
        return [polygon for polygon in polygons if len(polygon) >= 6] or None, None
    if isinstance(found["counts"], list):
        found = rle.frPyObjects(found, *found["size"])
    counts = found["counts"]
    return None, {"size": list(found["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


class _Pictures:
    """Where the pictures of a JSON lie: beside it, in `images/`, in a folder beside it that its name names (val2017 of
    annotations/instances_val2017.json), or where `coco_url` says."""

    def __init__(self, path: str, storage: Storage) -> None:
        self.storage = storage
        folder, _, name = path.rpartition("/")
        above = folder.rpartition("/")[0]
        part = name.rpartition(".")[0].rpartition("_")[2]
        self.folders = [
            folder,
            f"{folder}/images",
            f"{above}/{part}",
            f"{above}/images/{part}",
            f"{above}/images",
            above,
        ]

    def find(self, image: Mapping[str, Any]) -> tuple[str, bool]:
        """(path or uri, whether it is there). The folder of the first that is found is tried first from then on."""
        name = str(image["file_name"])
        if "://" in name or name.startswith("/"):
            return printable(name), "://" in name or self.storage.exists(name)
        for folder in self.folders:
            if self.storage.exists(uri := f"{folder}/{name}"):
                self.folders.remove(folder)
                self.folders.insert(0, folder)
                return printable(uri), True
        url = str(image.get("coco_url") or "")
        if url and (is_remote(url) or self.storage.exists(url)):
            return printable(url), self.storage.exists(url)
        return printable(f"{self.folders[0]}/{name}"), False
