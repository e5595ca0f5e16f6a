"""A data set on which ultralytics trains: images/, labels/ and data.yaml; for a classifier a folder for each class."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from shardsight.results.formats.geometry import outline
from shardsight.results.formats.sample import Contents, Found, Report, Sample, safe, visible
from shardsight.results.formats.target import Target

SPLITS = ("train", "val")


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """Of the task that the objects tell: segment if there are masks, else pose, obb or detect; an object that lacks
    what the task needs is left out. Coordinates are shares of the picture as shown, as ultralytics turns it by EXIF."""
    if contents.classes:
        _write_classes(samples, contents, target, report)
        return
    counts: Counter[str] = Counter()
    for sample in samples:
        split = SPLITS[contents.validates(sample)]
        lines = [line for found in sample.found if (line := _line(found, sample, contents, report))]
        assert sample.picture
        target.put(f"images/{split}/{sample.file}", sample.picture)
        target.write(f"labels/{split}/{sample.name}.txt", "".join(f"{line}\n" for line in lines).encode())
        counts[split] += 1
        report.written.update({f"pictures in {split}": 1, "objects": len(lines)})
    folders = {split: f"images/{split}" for split in SPLITS if counts[split]}
    for split, other in (SPLITS, SPLITS[::-1]):  # ultralytics wants both
        if folders and split not in folders:
            folders[split] = folders[other]
            report.notes.append(f"no picture fell to {split}: data.yaml names those of {other} for it, too")
    content: dict[str, Any] = {split: folders.get(split) for split in SPLITS} | {
        "names": dict(enumerate(contents.names))
    }
    if _task(contents) == "pose":
        content["kpt_shape"] = [contents.keypoints, 3]
    target.write("data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def _write_classes(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    names = [safe(name) for name in contents.names]
    names = [f"{name}-{number}" if names.count(name) > 1 else name for number, name in enumerate(names)]
    for split in SPLITS:  # all of them, as ultralytics numbers the folders of each split
        for name in names:
            target.make_folder(f"{split}/{name}")
    for sample in samples:
        split = SPLITS[contents.validates(sample)]
        assert sample.picture and sample.category is not None
        target.put(f"{split}/{names[sample.category]}/{sample.file}", sample.picture)
        report.written[f"pictures in {split}"] += 1


def _task(contents: Contents) -> str:
    if contents.masks:
        return "segment"
    return "pose" if contents.keypoints else "obb" if contents.corners else "detect"


def _line(found: Found, sample: Sample, contents: Contents, report: Report) -> str | None:
    """An object's line; None if it is left out."""
    task = _task(contents)
    x1, y1, x2, y2 = found.box
    (x1, y1), (x2, y2) = sample.relative(x1, y1), sample.relative(x2, y2)
    values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    if task == "segment":
        ring = None if found.mask is None else outline(found.mask)
        if ring is None:
            report.leave_out("objects without a mask, which a data set of masks cannot have", sample.id)
            return None
        values = [share for point in ring.tolist() for share in sample.relative(*point)]
    elif task == "pose":
        points = found.keypoints or []
        missing = [0.0] * 3 * (contents.keypoints - len(points))
        for point in points:
            x, y = sample.relative(point["x"] or 0.0, point["y"] or 0.0)
            values += [x, y, 2] if visible(point) else [0.0, 0.0, 0]
        values += missing
    elif task == "obb":
        if found.corners is None:
            report.leave_out("objects without an angle, which a data set of oriented boxes cannot have", sample.id)
            return None
        pairs = zip(found.corners[::2], found.corners[1::2], strict=True)
        values = [share for pair in pairs for share in sample.relative(*pair)]
    return " ".join([str(found.category), *(f"{value:.7g}" for value in values)])
