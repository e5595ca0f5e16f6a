"""Hugging Face datasets: Parquet files that `datasets.load_dataset(DIR)` opens, with pictures and named classes."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shardsight.results.formats.geometry import xywh
from shardsight.results.formats.sample import Contents, Report, Sample
from shardsight.results.formats.target import Target

ROWS = 100  # of a row group, which readers load at a time
BYTES = 256 << 20  # of a file's pictures, at most by about a row group more

# What `datasets` calls the types of the columns, and Arrow's.
_TEXT = {"dtype": "string", "_type": "Value"}, pa.string()
_INT = {"dtype": "int32", "_type": "Value"}, pa.int32()
_LONG = {"dtype": "int64", "_type": "Value"}, pa.int64()
_FLOAT = {"dtype": "float32", "_type": "Value"}, pa.float32()
_IMAGE = {"_type": "Image"}, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_Type = tuple[dict[str, Any], pa.DataType]


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """data/train-NNNNN.parquet and, with a share for it, data/validation-NNNNN.parquet.

    Columns: `image`, `id`, `width`, `height`, and `objects` of lists: `bbox` (x, y, width, height in pixels),
    `categories` (a ClassLabel), `scores`, and as there are any `track_ids`, `corners`, `keypoints` (x, y, score of
    each), `masks` (COCO's compressed RLE, of the picture's size). Of a classifier's results `label`, a ClassLabel, and
    `score`.
    """
    features = _features(contents)
    schema = pa.schema([(name, type) for name, (_, type) in features.items()])
    said = {"info": {"features": {name: said for name, (said, _) in features.items()}}}
    schema = schema.with_metadata({"huggingface": json.dumps(said)})
    with _Split("train", schema, target) as train, _Split("validation", schema, target) as validation:
        for sample in samples:
            split = validation if contents.validates(sample) else train
            split.add(_row(sample, contents))
            report.written.update({f"pictures in {split.name}": 1, "objects": len(sample.found)})


class _Split:
    """Writes one split's files."""

    def __init__(self, name: str, schema: pa.Schema, target: Target) -> None:
        self.name, self.schema, self.target = name, schema, target
        self.held: list[dict[str, Any]] = []
        self.size = self.number = 0  # bytes of pictures in the file of this number
        self.files = ExitStack()
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Split":
        return self

    def __exit__(self, failed: Any, *more: Any) -> None:
        if not failed:
            self.flush()
        self.files.__exit__(failed, *more)

    def add(self, row: dict[str, Any]) -> None:
        self.held.append(row)
        self.size += len(row["image"]["bytes"])
        if len(self.held) == ROWS or self.size > BYTES:
            self.flush()
        if self.size > BYTES:
            self.files.close()
            self.writer, self.size, self.number = None, 0, self.number + 1

    def flush(self) -> None:
        if not self.held:
            return
        if self.writer is None:
            file = self.files.enter_context(self.target.open(f"data/{self.name}-{self.number:05}.parquet"))
            self.writer = self.files.enter_context(pq.ParquetWriter(file, self.schema))
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.held, self.schema))
        self.held = []


def _list(type: _Type) -> _Type:
    return {"feature": type[0], "_type": "Sequence"}, pa.list_(type[1])


def _features(contents: Contents) -> dict[str, _Type]:
    label = {"names": contents.names, "_type": "ClassLabel"}, pa.int64()
    columns = {"image": _IMAGE, "id": _TEXT, "width": _INT, "height": _INT}
    if contents.classes:
        return columns | {"label": label, "score": _FLOAT}
    lists = {"bbox": _list(_list(_FLOAT)), "categories": _list(label), "scores": _list(_FLOAT)}
    lists |= {"track_ids": _list(_LONG)} if contents.tracks else {}
    lists |= {"corners": _list(_list(_FLOAT))} if contents.corners else {}
    lists |= {"keypoints": _list(_list(_list(_FLOAT)))} if contents.keypoints else {}
    lists |= {"masks": _list(_TEXT)} if contents.masks else {}
    said = {name: said for name, (said, _) in lists.items()}
    return columns | {"objects": (said, pa.struct([(name, type) for name, (_, type) in lists.items()]))}


def _row(sample: Sample, contents: Contents) -> dict[str, Any]:
    assert sample.picture
    row: dict[str, Any] = {"image": {"bytes": sample.picture.data, "path": sample.file}}
    row |= {"id": sample.id, "width": sample.width, "height": sample.height}
    if contents.classes:
        return row | {"label": sample.category, "score": sample.score}
    found = sample.found
    objects: dict[str, list[Any]] = {
        "bbox": [xywh(one.box) for one in found],
        "categories": [one.category for one in found],
        "scores": [one.score for one in found],
        "track_ids": [one.track_id for one in found],
        "corners": [one.corners for one in found],
        "keypoints": [[list(point.values()) for point in one.keypoints or ()] for one in found],
        "masks": [one.mask and one.mask["counts"] for one in found],
    }
    return row | {"objects": objects}
