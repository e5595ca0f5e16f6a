"""Which objects of a job's rows are converted, and what they are: their classes, and whether they have masks."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardsight.errors import UsageError
from shardsight.results.formats.geometry import cut
from shardsight.results.formats.sample import Contents, Found, Report, Sample
from shardsight.storage import Storage

# What is looked at beforehand, without masks, which make up most of a file.
_OF_OBJECTS = ["label", "class_id", "score", "track_id", "mask.height", "corners.list.element"]
_OF_OBJECTS += ["keypoints.list.element.x"]
_LISTS = {"detections": "detections.list.element", "answers": "answers.list.element.detections.list.element"}
_OF_CLASSES = [f"classes.list.element.{name}" for name in ("label", "class_id", "score")]


@dataclass(frozen=True)
class Selection:
    """source: `detections`, of YOLO, or `answers`, of PaliGemma. min_score: below which an object is left out. labels,
    prompts: those that are wanted; all, if there are none."""

    source: str = "detections"
    min_score: float = 0.0
    labels: frozenset[str] = frozenset()
    prompts: frozenset[str] = frozenset()

    def keeps(self, found: pa.Array) -> pa.Array:
        """Which objects, with `label` and `score`, are wanted, bool (n,)."""
        scores, labels = pc.struct_field(found, "score"), pc.struct_field(found, "label")
        kept = pc.and_(pc.fill_null(pc.greater_equal(scores, self.min_score), True), pc.is_valid(labels))
        return pc.and_(kept, pc.is_in(labels, pa.array(self.labels, pa.string()))) if self.labels else kept


@dataclass
class _Seen:
    """rows, classified: with a list of objects, or of classes, even if it is empty. labels: each with its class id."""

    rows: int = 0
    classified: int = 0
    labels: dict[str, float] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    masks: bool = False
    corners: bool = False
    tracks: bool = False
    keypoints: int = 0

    def add(self, batch: pa.RecordBatch, selection: Selection) -> None:
        self.rows += pc.count(batch[selection.source]).as_py()
        self._add(_objects(batch, selection), selection)
        if selection.source == "detections":
            self.classified += pc.count(batch["classes"]).as_py()
            self._add(_best(batch), selection)

    def _add(self, found: pa.Array, selection: Selection) -> None:
        self._note(found)
        found = found.filter(selection.keeps(found))
        self.wanted |= set(pc.struct_field(found, "label").unique().to_pylist())
        names = {found.type.field(number).name for number in range(found.type.num_fields)}
        if "mask" not in names:
            return
        for flag, name in (("masks", "mask"), ("corners", "corners"), ("tracks", "track_id")):
            setattr(self, flag, getattr(self, flag) or pc.count(pc.struct_field(found, name)).as_py() > 0)
        most = pc.max(pc.list_value_length(pc.struct_field(found, "keypoints"))).as_py()
        self.keypoints = max(self.keypoints, most or 0)

    def _note(self, found: pa.Array) -> None:
        columns = [pc.struct_field(found, name) for name in ("label", "class_id")]
        for row in pa.table(columns, ["label", "id"]).group_by(["label", "id"]).aggregate([]).to_pylist():
            if row["label"] is not None:
                number = math.inf if row["id"] is None else row["id"]
                self.labels[row["label"]] = min(number, self.labels.get(row["label"], math.inf))


def survey(
    files: Iterable[str], storage: Storage, selection: Selection, model: Mapping[str, Any], validation: float
) -> Contents:
    """What the results files hold of the selection. model: what job.json says of it.

    Classes: of detections the model's, all of them and in its order; where its names are not known, those found, in the
    order of its class ids. Of answers the labels found, sorted. With `labels`, no other. Raises UsageError where
    nothing is left.
    """
    seen = _Seen()
    columns = [f"{_LISTS[selection.source]}.{name}" for name in _OF_OBJECTS]
    columns += _OF_CLASSES if selection.source == "detections" else ["answers.list.element.prompt"]
    for path in files:
        with storage.open(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=columns):
                seen.add(batch, selection)
    if not (seen.rows or seen.classified):
        other = {"detections": "answers", "answers": "detections"}[selection.source]
        raise UsageError(f"no row has {selection.source}: try --from {other}, or wait until rows are written")
    names = _names(seen, selection, {int(number): name for number, name in (model.get("names") or {}).items()})
    for label in sorted(selection.labels):
        if label not in names and label not in seen.labels:
            raise UsageError(f"--label {label}: no such class, only {', '.join(names) or 'none'}")
    if not seen.wanted:
        raise UsageError(
            f"nothing is left to convert of {selection.source} with a score of at least {selection.min_score:g}"
            + (f" and the label {' or '.join(sorted(selection.labels))}" if selection.labels else "")
            + (": ask PaliGemma with --prompt 'detect NAME ; NAME'" if selection.source == "answers" else "")
        )
    names = [name for name in names if name in selection.labels or not selection.labels]
    flags = {name: getattr(seen, name) for name in ("masks", "corners", "tracks", "keypoints")}
    path = str(model.get("path", "")).rstrip("/").rpartition("/")[2]
    return Contents(names, classes=not seen.rows, **flags, model=path, validation=validation)


def _names(seen: _Seen, selection: Selection, known: Mapping[int, str]) -> list[str]:
    if selection.source == "answers":
        return sorted(seen.labels)
    names = [known[number] for number in sorted(known)]
    found = sorted(seen.labels, key=lambda name: (seen.labels[name], name))
    return list(dict.fromkeys([*names, *found]))


@dataclass
class Samples:
    """Makes samples of rows, and counts in the report what it leaves out."""

    contents: Contents
    selection: Selection
    report: Report

    def __post_init__(self) -> None:
        self.categories = {name: number for number, name in enumerate(self.contents.names)}
        self.column = "classes" if self.contents.classes else self.selection.source

    def usable(self, table: pa.Table) -> pa.Table:
        """The rows without an error, and with a list of objects, which may be empty."""
        failed = pc.is_valid(table["error"])
        empty = pc.and_(pc.invert(failed), pc.is_null(table[self.column]))
        for reason, which in (("rows with errors", failed), (f"rows without {self.column}", empty)):
            for id in table["id"].filter(which).to_pylist():
                self.report.leave_out(reason, id)
        return table.filter(pc.invert(pc.or_(failed, empty)))

    def of(self, row: Mapping[str, Any]) -> Sample | None:
        """The sample of a usable row; None if it has no class that is wanted."""
        names = ("id", "uri", "width", "height", "frame_index", "pts_seconds")
        place = {name: row[name] for name in names}
        if self.contents.classes:
            best = row["classes"][:1]
            wanted = [one for one in best if self._is_wanted(one, one["score"], row["id"])]
            if not wanted:
                self.report.leave_out("pictures without a class that is wanted", row["id"])
                return None
            return Sample(**place, category=self.categories[wanted[0]["label"]], score=wanted[0]["score"])
        return Sample(**place, found=tuple(self._found(row)))

    def _found(self, row: Mapping[str, Any]) -> Iterator[Found]:
        for one, score in self._objects(row):
            if not self._is_wanted(one, score, row["id"]):
                continue
            box = cut((one["x1"], one["y1"], one["x2"], one["y2"]), row["width"], row["height"])
            if box is None:
                self.report.leave_out("objects without an area in the picture", row["id"])
                continue
            more = {name: one[name] for name in ("track_id", "corners", "mask", "keypoints")}
            yield Found(self.categories[one["label"]], box, score, **more)

    def _objects(self, row: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], float | None]]:
        """(object, its score; without one, the probability of its answer's tokens)"""
        if self.selection.source == "detections":
            yield from ((one, one["score"]) for one in row["detections"])
            return
        for answer in row["answers"]:
            if self.selection.prompts and answer["prompt"] not in self.selection.prompts:
                continue
            mean = None if answer["score"] is None else math.exp(answer["score"])
            yield from ((one, mean if one["score"] is None else one["score"]) for one in answer["detections"] or ())

    def _is_wanted(self, one: Mapping[str, Any], score: float | None, id: str) -> bool:
        if one["label"] is None:
            self.report.leave_out("objects without a label", id)
        elif one["label"] not in self.categories:
            self.report.leave_out("objects of other labels", id)
        elif score is not None and score < self.selection.min_score:
            self.report.leave_out(f"objects with a score below {self.selection.min_score:g}", id)
        else:
            return True
        return False


def _objects(batch: pa.RecordBatch, selection: Selection) -> pa.Array:
    lists = batch[selection.source]
    if selection.source == "answers":
        answers = pc.list_flatten(lists)
        if selection.prompts:
            prompts = pc.struct_field(answers, "prompt")
            answers = answers.filter(pc.is_in(prompts, pa.array(selection.prompts, pa.string())))
        lists = pc.struct_field(answers, "detections")
    return pc.list_flatten(lists)


def _best(batch: pa.RecordBatch) -> pa.Array:
    """The best class of each row that has one."""
    lists = batch["classes"]
    return pc.list_element(lists.filter(pc.fill_null(pc.greater(pc.list_value_length(lists), 0), False)), 0)
