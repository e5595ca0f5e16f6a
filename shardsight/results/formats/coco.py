"""COCO: instances.json, a data set, and results.json, the same objects as a detector's results."""

from collections.abc import Iterable, Iterator
from typing import Any

from pycocotools import mask as coco_mask

from shardsight.results.formats.geometry import xywh
from shardsight.results.formats.sample import Contents, Found, Report, Sample, visible
from shardsight.results.formats.target import Target, Values, write_document


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """Category n + 1 is names[n]. An image's file_name is its row's id. Oriented boxes are polygons; a keypoint below
    sample.VISIBLE is 0, 0, 0 in instances.json."""
    images, annotations, results = Values(), Values(), Values()
    for sample in samples:
        image = {"id": images.count + 1, "file_name": sample.id, "width": sample.width, "height": sample.height}
        images.add(image)
        for found in sample.found:
            common: dict[str, Any] = {
                "image_id": image["id"],
                "category_id": found.category + 1,
                "bbox": xywh(found.box),
            }
            common |= _segmentation(found)
            area = common["bbox"][2] * common["bbox"][3] if found.mask is None else _area(common["segmentation"])
            annotation = {"id": annotations.count + 1, **common, "area": area, "iscrowd": 0}
            annotations.add(annotation | _keypoints(found, hide=True))
            results.add(common | _keypoints(found, hide=False) | {"score": 1.0 if found.score is None else found.score})
        report.written.update(images=1, objects=len(sample.found))
    with target.open("results.json") as file:
        results.copy_to(file)
    document = {"info": {"description": contents.model}, "categories": _categories(contents)}
    write_document(target, "instances.json", {**document, "images": images, "annotations": annotations})


def _categories(contents: Contents) -> list[dict[str, Any]]:
    points = {"keypoints": [str(number) for number in range(contents.keypoints)], "skeleton": []}
    more = points if contents.keypoints else {}
    return [{"id": index, "name": name, **more} for index, name in enumerate(contents.names, 1)]


def _segmentation(found: Found) -> dict[str, Any]:
    if found.mask is not None:
        return {
            "segmentation": {"size": [found.mask["height"], found.mask["width"]], "counts": found.mask["counts"]},
        }
    return {} if found.corners is None else {"segmentation": [found.corners]}


def _area(mask: dict[str, Any]) -> float:
    return float(coco_mask.area(mask | {"counts": mask["counts"].encode()}))


def _keypoints(found: Found, hide: bool) -> dict[str, Any]:
    if found.keypoints is None:
        return {}

    def numbers() -> Iterator[Any]:
        for point in found.keypoints or ():
            seen = visible(point)
            yield from (point["x"], point["y"], 2 if seen else 0) if seen or not hide else (0, 0, 0)

    points = list(numbers())
    return {"keypoints": points} | ({"num_keypoints": sum(map(bool, points[2::3]))} if hide else {})
