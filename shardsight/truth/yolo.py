"""ultralytics' labels: data.yaml with a text file a picture, or a folder of classes. Nothing is downloaded."""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shardsight.decode.pictures import ENDINGS
from shardsight.errors import UsageError
from shardsight.sources import absolute
from shardsight.sources.files import AHEAD
from shardsight.storage import Storage, is_remote
from shardsight.truth.labels import (
    MISSING,
    NO_CATEGORY,
    NO_CLASS,
    NO_LABELS,
    NO_NUMBERS,
    SAME_LINE,
    SPLITS,
    Faults,
    Sample,
    Thing,
    Truth,
    split_of,
)
from shardsight.truth.pictures import joined


def read_yaml(path: str, content: Mapping[str, Any], storage: Storage, task: str | None, split: str | None) -> Truth:
    """One split of a data.yaml. task: of the models, as four corners are a polygon or an oriented box. split: as for
    `read`. Raises UsageError."""
    given = content["names"]
    names = {int(n): str(name) for n, name in (enumerate(given) if isinstance(given, list) else given.items())}
    faults = Faults()
    faults.classes(names)
    splits, chosen = split_of((one for one in SPLITS if content.get(one)), split)
    uris = _split(path, content, chosen, storage, faults)
    with ThreadPoolExecutor(AHEAD) as pool:
        there = list(pool.map(storage.exists, uris))
        lines = dict(zip(uris, pool.map(lambda uri: _lines(uri, storage), uris), strict=True))
    count, size = points = [int(number) for number in (*(content.get("kpt_shape") or ()), 0, 0)[:2]]
    task = task if task not in (None, "text") else _task(lines, bool(count))
    if task == "classify":
        raise UsageError(f"{path} has boxes, and the model is a classifier: give a folder of classes")
    if task == "pose" and (not count or size not in (2, 3)):
        raise UsageError(f"{path} has no kpt_shape, and the model is for pose: give a set with keypoints")
    samples = []
    for (uri, text), exists in zip(lines.items(), there, strict=True):
        if not exists:
            faults.add(MISSING, uri)
        things = list(_things(uri, text, str(task), names, points, faults))
        faults.things(uri, things, 1.0, 1.0)
        samples.append(Sample(uri, things=things))
    if task == "segment":
        faults.masks(samples)
    return Truth(str(task), names, samples, faults.found(), True, count, splits)


def _split(path: str, content: Mapping[str, Any], split: str | None, storage: Storage, faults: Faults) -> list[str]:
    """The pictures of a split. Raises UsageError where there are none."""
    if split is None:
        raise UsageError(f"{path} names no pictures: give it a line val: FOLDER")
    root, given = _root(path, content, storage), content[split]
    uris = dict[str, None]()
    for one in map(str, given if isinstance(given, list) else [given]):
        found = pictures_in(_inside(root, one, storage), storage)
        if not found:
            raise UsageError(f"{path}: there are no pictures in {split}: {one}")
        for uri in found:
            if uri in uris:
                faults.add(SAME_LINE, uri)
            uris[uri] = None
    return list(uris)


def _inside(root: str, given: str, storage: Storage) -> str:
    """A split's folder or list. Roboflow's exports say ../valid/images of what is beside their data.yaml."""
    if is_remote(given) or given.startswith("/"):
        return given
    place = absolute(f"{root}/{given}")
    beside = f"{root}/{given.removeprefix('../')}"
    return place if storage.exists(place) or storage.is_folder(place) else beside


def read_folder(path: str, storage: Storage) -> Truth:
    """A folder of classes, or its `val` or `test`. Raises UsageError."""
    base = next((f"{path}/{one}" for one in ("val", "test") if storage.is_folder(f"{path}/{one}")), path)
    everything, faults = pictures_in(base, storage), Faults()
    uris = [uri for uri in everything if "/" in uri.removeprefix(f"{base}/")]
    for uri in set(everything) - set(uris):
        faults.add(NO_CLASS, uri)
    names = sorted({uri.removeprefix(f"{base}/").partition("/")[0] for uri in uris})
    if not uris:
        raise UsageError(
            f"{path} holds no labels: give COCO JSON, a data.yaml, JSONL or a folder with a folder a class"
        )
    samples = [Sample(uri, class_id=names.index(uri.removeprefix(f"{base}/").partition("/")[0])) for uri in uris]
    return Truth("classify", dict(enumerate(names)), samples, faults.found())


def _root(path: str, content: Mapping[str, Any], storage: Storage) -> str:
    """The folder that the splits are relative to: `path`, or, where that is not on this machine, the file's own."""
    folder = path.rpartition("/")[0]
    given = joined(folder, str(content.get("path") or "").rstrip("/") or ".")
    return given if storage.is_folder(given) else folder


def pictures_in(uri: str, storage: Storage) -> list[str]:
    """Those of a folder, or of a text file that lists them."""
    uri = uri if is_remote(uri) else absolute(uri)
    if uri.endswith(".txt"):
        folder = uri.rpartition("/")[0]
        listed = storage.read(uri).decode("utf-8", "replace").splitlines() if storage.exists(uri) else []
        return [joined(folder, one) for one in map(str.strip, listed) if one]
    if not storage.is_folder(uri):
        return []
    return [entry.uri for entry in storage.walk(uri) if f".{entry.uri.rpartition('.')[2].lower()}" in ENDINGS]


def _lines(uri: str, storage: Storage) -> list[str]:
    """Of a picture's label file; none where there is none, which is a picture without objects."""
    before, found, after = uri.rpartition("/images/")
    label = f"{before}/labels/{after}" if found else uri
    try:
        text = storage.read(f"{label.rpartition('.')[0]}.txt")
    except FileNotFoundError:
        return []
    return [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]


def _task(lines: Mapping[str, list[str]], points: bool) -> str:
    """By the number of columns; four corners are an oriented box where no polygon has another number."""
    outlines = {count for text in lines.values() for line in text if (count := len(line.split())) >= 7 and count % 2}
    if points:
        return "pose"
    return ("obb" if outlines == {9} else "segment") if outlines else "detect"


def _things(
    uri: str, text: list[str], task: str, names: Mapping[int, str], points: list[int], faults: Faults
) -> Iterator[Thing]:
    seen: set[tuple[float, ...]] = set()
    for number, line in enumerate(text, 1):
        place = f"{uri}, line {number}"
        try:
            first, *values = row = tuple(map(float, line.split()))
        except ValueError:
            faults.add(NO_NUMBERS, place)
            continue
        if not all(map(math.isfinite, row)):
            faults.add(NO_NUMBERS, place)
        elif first not in names:
            faults.add(NO_CATEGORY, f"{place}: class {first:g}")
        elif (thing := _thing(int(first), values, task, points)) is None:
            faults.add(NO_LABELS, place)
        elif row in seen:  # ultralytics leaves them out, too
            faults.add(SAME_LINE, place)
        else:
            seen.add(row)
            yield thing


def _thing(class_id: int, values: list[float], task: str, points: list[int]) -> Thing | None:
    """None where the number of values is none of the task's."""
    count, size = points
    if task == "obb":
        return Thing(class_id, _around(values), corners=values) if len(values) == 8 else None
    if count and len(values) == 4 + count * size:
        given = [values[4 + n * size : 4 + (n + 1) * size] for n in range(count)]
        seen = [(one[0], one[1], one[2] if size == 3 else 2.0 * bool(one[0] or one[1])) for one in given]
        return Thing(class_id, _box(values[:4]), points=seen if task == "pose" else None)
    if task == "pose":
        return None
    if len(values) == 4:
        return Thing(class_id, _box(values))
    if len(values) < 6 or len(values) % 2:
        return None
    return Thing(class_id, _around(values), polygons=[values])


def _around(values: list[float]) -> tuple[float, float, float, float]:
    xs, ys = values[::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _box(values: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = values
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
