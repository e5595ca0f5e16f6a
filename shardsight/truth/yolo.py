"""ultralytics' labels: data.yaml with a text file a picture, or a folder of classes. Nothing is downloaded."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shardsight.decode.pictures import ENDINGS
from shardsight.errors import UsageError
from shardsight.sources import absolute
from shardsight.sources.files import AHEAD
from shardsight.storage import Storage, is_remote
from shardsight.truth.labels import MISSING, NO_CATEGORY, NO_LABELS, NO_NUMBERS, Faults, Sample, Thing, Truth

SPLITS = ("val", "test", "train")  # the first that there is


def read_yaml(path: str, content: Mapping[str, Any], storage: Storage, task: str | None) -> Truth:
    """The split `val` of a data.yaml. task: of the models, as four corners are a polygon or an oriented box. Raises
    UsageError."""
    names = content["names"]
    named = dict(enumerate(names)) if isinstance(names, list) else {int(n): str(name) for n, name in names.items()}
    split = next((one for one in SPLITS if content.get(one)), None)
    if split is None:
        raise UsageError(f"{path} names no pictures: give it a line val: FOLDER")
    root = _root(path, content, storage)
    given = content[split]
    faults = Faults()
    uris = [
        uri for one in (given if isinstance(given, list) else [given]) for uri in _pictures(f"{root}/{one}", storage)
    ]
    if not uris:
        raise UsageError(f"{path}: there are no pictures in {split}: {given}")
    with ThreadPoolExecutor(AHEAD) as pool:
        lines = dict(zip(uris, pool.map(lambda uri: _lines(uri, storage), uris), strict=True))
    points = (content.get("kpt_shape") or [0, 0])[:2]
    task = task if task not in (None, "text") else _task(lines, bool(points[0]))
    if task == "classify":
        raise UsageError(f"{path} has boxes, and the model is a classifier: give a folder of classes")
    if task == "pose" and not points[0]:
        raise UsageError(f"{path} has no kpt_shape, and the model is for pose: give a set with keypoints")
    samples = []
    for uri, text in lines.items():
        if not storage.exists(uri):
            faults.add(MISSING, uri)
        things = list(_things(uri, text, str(task), named, points, faults))
        faults.things(uri, things, 1.0, 1.0)
        samples.append(Sample(uri, things=things))
    return Truth(str(task), named, samples, faults.found(), normalised=True, keypoints=int(points[0]))


def read_folder(path: str, storage: Storage) -> Truth:
    """A folder of classes, or its `val` or `test`. Raises UsageError."""
    base = next((f"{path}/{one}" for one in ("val", "test") if storage.is_folder(f"{path}/{one}")), path)
    uris = [uri for uri in _pictures(base, storage) if "/" in uri.removeprefix(f"{base}/")]
    names = sorted({uri.removeprefix(f"{base}/").partition("/")[0] for uri in uris})
    if not uris:
        raise UsageError(
            f"{path} holds no labels: give COCO JSON, a data.yaml, JSONL or a folder with a folder a class"
        )
    samples = [Sample(uri, class_id=names.index(uri.removeprefix(f"{base}/").partition("/")[0])) for uri in uris]
    return Truth("classify", dict(enumerate(names)), samples, {})


def _root(path: str, content: Mapping[str, Any], storage: Storage) -> str:
    """The folder that the splits are relative to."""
    folder = path.rpartition("/")[0]
    given = str(content.get("path") or "").rstrip("/")
    if not given or given == ".":
        return folder
    if is_remote(given) or given.startswith("/"):
        return given
    beside = f"{folder}/{given}"
    return beside if storage.is_folder(beside) else folder


def _pictures(uri: str, storage: Storage) -> list[str]:
    """Those of a folder, or of a text file that lists them."""
    uri = uri if is_remote(uri) else absolute(uri)
    if uri.endswith(".txt"):
        folder = uri.rpartition("/")[0]
        listed = storage.read(uri).decode("utf-8", "replace").splitlines() if storage.exists(uri) else []
        return [
            one if "://" in one or one.startswith("/") else f"{folder}/{one.removeprefix('./')}"
            for one in map(str.strip, listed)
            if one
        ]
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
    """By the number of columns; four corners are an oriented box where no line has another number."""
    counts = Counter(len(line.split()) for text in lines.values() for line in text)
    if points:
        return "pose"
    if not counts or set(counts) <= {5}:
        return "detect"
    return "obb" if set(counts) == {9} else "segment"


def _things(
    uri: str, text: list[str], task: str, names: Mapping[int, str], points: list[int], faults: Faults
) -> Iterator[Thing]:
    for number, line in enumerate(text, 1):
        place = f"{uri}, line {number}"
        try:
            first, *values = map(float, line.split())
        except ValueError:
            faults.add(NO_NUMBERS, place)
            continue
        if not all(map(math.isfinite, (first, *values))):
            faults.add(NO_NUMBERS, place)
        elif first not in names:
            faults.add(NO_CATEGORY, f"{place}: class {first:g}")
        elif (thing := _thing(int(first), values, task, points)) is None:
            faults.add(NO_LABELS, place)
        else:
            yield thing


def _thing(class_id: int, values: list[float], task: str, points: list[int]) -> Thing | None:
    """None where the number of values is none of the task's."""
    if len(values) == 4 and task in ("detect", "segment"):
        return Thing(class_id, _box(values))
    if task == "pose":
        count, size = int(points[0]), int(points[1])
        if len(values) != 4 + count * size:
            return None
        given = [values[4 + n * size : 4 + (n + 1) * size] for n in range(count)]
        seen = [(one[0], one[1], one[2] if size == 3 else 2.0 * bool(one[0] or one[1])) for one in given]
        return Thing(class_id, _box(values[:4]), points=seen)
    if len(values) < 6 or len(values) % 2 or (task == "obb" and len(values) != 8):
        return None
    xs, ys = values[::2], values[1::2]
    box = min(xs), min(ys), max(xs), max(ys)
    return Thing(class_id, box, corners=values) if task == "obb" else Thing(class_id, box, polygons=[values])


def _box(values: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = values
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
