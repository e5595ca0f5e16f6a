"""What a labelled set says of its pictures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as rle

SPLITS = ("val", "test", "train")  # of which the first that there is is evaluated
BOXES = ("detect", "segment", "pose", "obb")  # tasks of objects in pictures


@dataclass(frozen=True)
class Thing:
    """One labelled object, in pixels of the picture, or, of a set whose `normalised` is true, in 0 to 1 of its sides.

    class_id: a key of Truth.names. box: x1, y1, x2, y2. crowd: a group, as COCO marks it; what is found in it counts
    neither for nor against a model. area: as the labels give it, else None. polygons: each x, y, x, y, …; mask: COCO's
    compressed RLE, {"size": [height, width], "counts": text}; points: x, y and whether it is labelled (0, 1, 2) for
    each keypoint; corners: x, y of an oriented box's four; phrase: what
    refers to it and to nothing else.
    """

    class_id: int
    box: tuple[float, float, float, float]
    crowd: bool = False
    area: float | None = None
    polygons: list[list[float]] | None = None
    mask: dict[str, Any] | None = None
    points: list[tuple[float, float, float]] | None = None
    corners: list[float] | None = None
    phrase: str | None = None

    def scaled(self, width: float, height: float) -> "Thing":
        """From 0 to 1 of the sides to pixels."""

        def pairs(values: list[float]) -> list[float]:
            return [value * (width, height)[n % 2] for n, value in enumerate(values)]

        x1, y1, x2, y2 = pairs(list(self.box))
        return Thing(
            *(self.class_id, (x1, y1, x2, y2), self.crowd),
            polygons=self.polygons and [pairs(one) for one in self.polygons],
            points=self.points and [(x * width, y * height, seen) for x, y, seen in self.points],
            corners=self.corners and pairs(self.corners),
        )

    def rle(self, width: int, height: int) -> dict[str, Any] | None:
        """Its mask as COCO's compressed RLE of a picture of that size; None where it has none."""
        if self.mask:
            return self.mask
        if not self.polygons:
            return None
        merged = rle.merge(rle.frPyObjects(self.polygons, height, width))
        return {"size": merged["size"], "counts": merged["counts"].decode()}


@dataclass(frozen=True)
class Sample:
    """One picture with its labels. id: its path or uri, as a job's row has it in `uri`. shard: the tar or Parquet file
    that holds the picture; its id is then the row's `id`.

    width, height: pixels, where the labels say them. Labels in pixels are taken as of the picture as shown, after EXIF
    orientation, which is where jobs find objects; see Truth.other_sizes. class_id: of a picture that is of one class.
    asked: prompt → the answers that are right.
    """

    id: str
    width: int | None = None
    height: int | None = None
    things: list[Thing] = field(default_factory=list)
    class_id: int | None = None
    asked: dict[str, list[str]] = field(default_factory=dict)
    shard: str | None = None


@dataclass(frozen=True)
class Truth:
    """A labelled set. task: detect, segment, pose, obb, classify or text. names: class id → name.

    faults: what is wrong with the labels, and what became of it → names. normalised: things are in 0 to 1 of their
    picture's sides, after EXIF orientation, as ultralytics has it. keypoints: of an object. splits: that the set names.
    """

    task: str
    names: dict[int, str]
    samples: list[Sample]
    faults: dict[str, list[str]]
    normalised: bool = False
    keypoints: int = 0
    splits: tuple[str, ...] = ()

    @property
    def objects(self) -> int:
        return sum(len(sample.things) for sample in self.samples)

    def other_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Pictures that are shown in another size than the labels say, so that the labels cannot fit what is found.

        Most have an EXIF orientation and labels of the picture as stored. sizes: Sample.id → width, height, as shown.
        """
        return [
            f"{one.id}: labels of {one.width}×{one.height}, picture of {sizes[one.id][0]}×{sizes[one.id][1]}"
            for one in self.samples
            if one.width and one.height and sizes.get(one.id, (one.width, one.height)) != (one.width, one.height)
        ]

    @property
    def sigmas(self) -> np.ndarray:
        """Of COCO's OKS: its own for 17 keypoints, else 1 / their number, as ultralytics has it."""
        return COCO_SIGMAS if self.keypoints == 17 else np.full(self.keypoints, 1 / max(1, self.keypoints))


# Of COCO's 17 keypoints, in its order, as pycocotools has them.
_TENFOLD = [0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]
COCO_SIGMAS = np.array(_TENFOLD) / 10


def split_of(names: Iterable[str], asked: str | None) -> tuple[tuple[str, ...], str | None]:
    """(the splits that a set names, the one to read: the one that is asked for, else the first of SPLITS)."""
    splits = tuple(dict.fromkeys(names))
    return splits, next((one for one in (asked, *SPLITS) if one in splits), None)


class Faults:
    """Reason → names, collected while labels are read."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: object) -> None:
        self.names[reason].append(str(name))

    def things(self, name: str, things: list[Thing], width: float | None, height: float | None) -> None:
        """Count what is odd about a picture's objects, which are kept. width, height: in the objects' own unit."""
        if not things:
            self.add(EMPTY, name)
        slack = 1.0 if width and width > 1 else 0.001
        for thing in things:
            x1, y1, x2, y2 = thing.box
            if thing.crowd:
                self.add(CROWD, name)
            if x2 <= x1 or y2 <= y1:
                self.add(NO_AREA, name)
            elif width and height and (min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack):
                self.add(OUTSIDE, name)

    def classes(self, names: Mapping[int, str]) -> None:
        """Classes are matched by name, whatever its case."""
        seen: set[str] = set()
        for name in names.values():
            if name.strip().lower() in seen:
                self.add(SAME_NAME, name)
            seen.add(name.strip().lower())

    def masks(self, samples: Iterable["Sample"]) -> None:
        for sample in samples:
            for thing in sample.things:
                if not (thing.mask or thing.polygons):
                    self.add(NO_MASK, sample.id)

    def found(self) -> dict[str, list[str]]:
        return dict(self.names)


MISSING = "pictures that are not there; counted as pictures with nothing found"
EMPTY = "pictures without an object; kept, whatever is found there is wrong"
CROWD = "crowds; kept, what is found in them counts neither way"
NO_MASK = "objects without a mask in a set of masks; kept, no mask can match them"
SAME_NAME = "classes of the same name as another; what is found counts for the first of them"
NO_AREA = "boxes without area; kept, nothing can match them"
OUTSIDE = "boxes that reach out of their picture; kept as they are"
OTHER_SIZE = "pictures of another size than their labels say, as by an EXIF orientation; kept, labels may not fit them"
NO_CATEGORY = "objects of a class that the set does not name; left out"
NO_PICTURE = "objects of a picture that the set does not list; left out"
NO_NUMBERS = "objects whose coordinates are no numbers; left out"
BAD_MASK = "objects whose mask is broken, or of another size than their picture; left out"
TWICE = "pictures or objects whose id is there twice; of pictures the first is kept, objects are all kept"
SAME_LINE = "lines that a label file has twice, or pictures that a list has twice; the first is kept"
NO_CLASS = "pictures in no folder of a class; left out"
UNREADABLE = "pictures that cannot be read; left out"
NO_LABELS = "lines that are no label; left out"
