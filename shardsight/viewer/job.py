"""The page of a job: its numbers, histograms of labels and scores, errors by kind, and some pictures and videos."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardsight.decode.pictures import decode
from shardsight.errors import UsageError
from shardsight.results.writer import Results
from shardsight.row import Failure, video_of, without_pictures
from shardsight.sources import pictures
from shardsight.storage import Storage, StorageError, explain, is_remote
from shardsight.viewer.page import page, thumbnail
from shardsight.viewer.videos import Videos, videos_of

BINS = 20  # of scores from 0 to 1, as in viewer.js
EXAMPLES = 5  # of each kind of error
SIDE, SMALL_SIDE = 1024, 640  # pixels of a picture; the smaller if there are more than MANY
MANY = 100
RETRY_SECONDS = 10.0  # short, as somebody waits for the page
# The columns that are counted, without masks and pictures, which make up most of a file.
_COUNTED = ["id", "frame_index", "error", "classes"]
_COUNTED += [f"detections.list.element.{name}" for name in ("label", "score")]
_COUNTED += [f"answers.list.element.{name}" for name in ("prompt", "detections.list.element.label")]
_COUNTED += ["answers.list.element.detections.list.element.score"]


def show(
    out: str, target: str | os.PathLike[str] | None = None, count: int = 24, storage: Mapping[str, str] | None = None
) -> str:
    """Write the page of a job, finished or not, and return where.

    out: the job's output, a folder or a prefix in a store. target: the file to write; by default OUT/page.html, or
    page.html in the current folder if OUT is in a store. count: pictures and videos on the page, evenly spread over
    all. storage: options for fsspec, which override those in job.json. Raises UsageError and StorageError.
    """
    if count < 0:
        raise UsageError(f"--count {count}: expected 0 or more pictures")
    out = out.rstrip("/") if is_remote(out) else os.path.abspath(os.path.expanduser(out))
    given = dict(storage or {})
    job = Results(out, Storage(given, RETRY_SECONDS)).job()
    if job is None:
        raise UsageError(f"{out} holds no job.json: give the --output of a job")
    data = summary(out, job, count, Storage(job["configuration"]["storage"] | given, RETRY_SECONDS))
    path = os.path.abspath("page.html") if is_remote(out) else os.path.join(out, "page.html")
    path = os.fspath(target) if target else path
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(data))
    except OSError as error:
        raise UsageError(f"the page cannot be written to {path} ({error.strerror}): name another file") from None
    return path


def summary(out: str, job: Mapping[str, Any], count: int, storage: Storage) -> dict[str, Any]:
    """The data for `page` of a job's results."""
    counts, files = _Counts(), []
    for path, *_ in storage.walk(Results(out, storage).folder):
        if path.endswith(".parquet"):
            files.append((path, counts.add_file(path, storage)))
    if not files:
        raise UsageError(f"{out} holds no results yet: show it once rows are written")
    chosen = list(_chosen(files, count, storage))
    side = SIDE if count <= MANY else SMALL_SIDE
    stills = [row for row in chosen if row["frame_index"] is None]
    seen = thumbnails(stills, storage, side, job["configuration"].get("image_column"))
    videos = Videos([row for row in chosen if row["frame_index"] is not None], counts.videos, job, storage).items()
    items = [
        {**seen[row["id"]], "rows": [{"model": None, "row": without_pictures(row)}]}
        if row["frame_index"] is None
        else videos[video_of(row["id"])]
        for row in chosen
    ]
    good = sum(len(rows) for _, rows in files)
    models = (model["path"].rstrip("/").rpartition("/")[2] for model in job["models"].values())
    shown = "All of them." if len(items) == good else f"{len(items):,} of {good:,}, evenly spread; --count shows more."
    return {
        "title": out.rpartition("/")[2],
        "subtitle": " · ".join([*models, job["started"].replace("T", " ").replace("+00:00", " UTC"), job["status"]]),
        "numbers": _numbers(job, counts),
        "layers": counts.layers(job["configuration"].get("prompt") or []),
        "errors": counts.error_kinds(),
        "items": items,
        "note": shown,
    }


@dataclass
class _Counts:
    """videos: id → the results files with its rows. found: (layer, label, bin of the score) → number of detections; the
    bin is -1 if there is no score.

    layer: "detections", "classes" or "answer PROMPT".
    """

    rows: int = 0
    videos: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    found: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))

    def add_file(self, path: str, storage: Storage) -> np.ndarray:
        """Count the rows of a results file; returns the indices of those without an error, of a video's the first,
        int64 (n,)."""
        good = []
        with storage.open(path) as file:
            first = 0
            for batch in pq.ParquetFile(file).iter_batches(columns=_COUNTED):
                failed = pc.is_valid(batch["error"])
                self._add_errors(batch.filter(failed))
                self._add_found(batch)
                good.append(first + self._shown(batch, ~failed.to_numpy(zero_copy_only=False), path))
                first += len(batch)
            self.rows += first
        return np.concatenate([np.empty(0, np.int64), *good])

    def _shown(self, batch: pa.RecordBatch, good: np.ndarray, path: str) -> np.ndarray:
        """Of the rows that are `good` the indices of pictures, and of the first frames of videos that are new."""
        framed = pc.is_valid(batch["frame_index"]).to_numpy(zero_copy_only=False)
        places = np.flatnonzero(good & framed)
        videos = videos_of(batch["id"].take(places)).dictionary_encode()
        new = []
        for number, at in zip(*np.unique(videos.indices.to_numpy(), return_index=True), strict=True):
            files = self.videos[videos.dictionary[number].as_py()]
            if not files:
                new.append(places[at])
            files.add(path)
        return np.sort(np.concatenate([np.flatnonzero(good & ~framed), np.array(new, np.int64)]))

    def _add_errors(self, failed: pa.RecordBatch) -> None:
        for row in failed.select(["id", "error"]).to_pylist():
            kind = row["error"]["stage"], row["error"]["type"]
            self.errors[kind] += 1
            if len(self.examples[kind]) < EXAMPLES:
                self.examples[kind].append({"id": row["id"], "message": row["error"]["message"]})

    def _add_found(self, batch: pa.RecordBatch) -> None:
        detections = pc.list_flatten(batch["detections"])
        self._add(pa.repeat("detections", len(detections)), detections)
        answers = pc.list_flatten(batch["answers"])
        lists = pc.struct_field(answers, "detections")
        prompts = pc.struct_field(answers, "prompt").take(pc.list_parent_indices(lists))
        self._add(pc.binary_join_element_wise("answer", prompts, " "), pc.list_flatten(lists))
        best = pc.list_element(batch["classes"].filter(pc.greater(pc.list_value_length(batch["classes"]), 0)), 0)
        self._add(pa.repeat("classes", len(best)), best)

    def _add(self, layers: pa.Array, found: pa.Array) -> None:
        share = pc.cast(pc.struct_field(found, "score"), pa.float64())
        bins = pc.cast(pc.floor(pc.multiply(share, BINS)), pa.int64(), safe=False)
        bins = pc.fill_null(pc.min_element_wise(bins, BINS - 1, skip_nulls=False), -1)
        labels = pc.fill_null(pc.struct_field(found, "label"), "")
        table = pa.table({"layer": layers, "label": labels, "bin": bins})
        for row in table.group_by(["layer", "label", "bin"]).aggregate([([], "count_all")]).to_pylist():
            self.found[row["layer"], row["label"] or "(no label)", row["bin"]] += row["count_all"]

    def layers(self, prompts: list[str]) -> list[dict[str, Any]]:
        """The labels and scores of each layer: YOLO first, then the prompts in their order."""
        asked = {f"answer {prompt}": prompt for prompt in prompts if prompt.startswith(("detect ", "segment "))}
        names = {"detections": "YOLO", "classes": "YOLO's best class"} | asked
        keys = {layer for layer, _, _ in self.found} | set(asked)
        names |= {key: key.removeprefix("answer ") for key in sorted(keys - set(names))}
        layers = []
        for key in filter(keys.__contains__, names):
            labels: Counter[str] = Counter()
            scores = [0] * BINS
            for (layer, label, bin), number in self.found.items():
                if layer == key:
                    labels[label] += number
                    if bin >= 0:
                        scores[bin] += number
            layers.append({"key": key, "name": names[key], "labels": labels.most_common(), "scores": scores})
        return layers

    def error_kinds(self) -> list[dict[str, Any]]:
        return [
            {"stage": stage, "type": type, "count": number, "examples": self.examples[stage, type]}
            for (stage, type), number in self.errors.most_common()
        ]


def _numbers(job: Mapping[str, Any], counts: _Counts) -> list[dict[str, Any]]:
    """Rows and errors are those in the results so far; the totals of job.json exist once the job has ended."""
    errors = counts.errors.total()
    numbers: dict[str, tuple[str, bool | None]] = {}
    if "inputs" in job:
        numbers["inputs"] = f"{job['inputs']:,}", None
    numbers["rows"] = f"{counts.rows:,}", None
    numbers["errors"] = f"{errors:,}", False if errors else None
    if "rows_per_second" in job:
        numbers["rows per second"] = f"{job['rows_per_second']:,.1f}", None
    if "exactly_once" in job:
        numbers["each input exactly once"] = "yes" if job["exactly_once"] else "no", job["exactly_once"]
    for reason, number in job.get("ignored", {}).items():
        if number:
            numbers[f"left out: {reason}"] = f"{number:,}", None
    return [{"name": name, "value": value, "good": good} for name, (value, good) in numbers.items()]


def _chosen(files: list[tuple[str, np.ndarray]], count: int, storage: Storage) -> Iterator[dict[str, Any]]:
    """`count` rows without an error, evenly spread over all of them."""
    ends = np.cumsum([len(rows) for _, rows in files])
    numbers = np.unique(np.linspace(0, ends[-1] - 1, count).astype(int)) if ends[-1] else np.empty(0, int)
    for (path, rows), end in zip(files, ends, strict=True):
        wanted = rows[numbers[(numbers >= end - len(rows)) & (numbers < end)] - (end - len(rows))]
        if not len(wanted):
            continue
        with storage.open(path) as file:
            first = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
                inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
                yield from batch.take(pa.array(inside)).to_pylist()
                first += len(batch)


def thumbnails(
    rows: list[dict[str, Any]], storage: Storage, side: int, image_column: str | None
) -> dict[str, dict[str, str | None]]:
    """Row's id → its `picture`, or the `problem` with it. Each tar and Parquet file is read once."""
    found = {row["id"]: _shown(row["image"], side) for row in rows if row["image"] is not None}
    for remote in (False, True):  # separately, as a store that fails must not cost the local pictures
        asked = [row for row in rows if row["id"] not in found and is_remote(row["uri"]) is remote]
        try:
            for id, data in pictures(asked, storage, image_column):
                found[id] = _absent(data) if isinstance(data, Failure) else _shown(data, side)
        except StorageError as error:
            reason = explain(asked[0]["uri"], error)
            found |= {row["id"]: _absent(reason) for row in asked if row["id"] not in found}
    return found


def _shown(data: bytes, side: int) -> dict[str, str | None]:
    try:
        return {"picture": thumbnail(decode(data, lambda width, height: (side, side))[0], side), "problem": None}
    except Exception as error:  # of any kind, as in a job: it concerns this picture alone
        return _absent(Failure.of(error))


def _absent(reason: str | Failure) -> dict[str, str | None]:
    text = reason.message if isinstance(reason, Failure) else reason
    return {"picture": None, "problem": f"The picture cannot be shown: {text}"}
