"""A job's results in the formats of other tools."""

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shardsight.decode.pictures import decode
from shardsight.errors import UsageError
from shardsight.originals import CHANGED, Originals
from shardsight.results.coverage import Coverage
from shardsight.results.formats import coco, fiftyone, huggingface, labelstudio, mot, paligemma, voc, webdataset, yolo
from shardsight.results.formats.sample import Contents, Picture, Report, Sample
from shardsight.results.formats.target import Target
from shardsight.results.selection import Samples, Selection, survey
from shardsight.results.writer import FOOTER, Results
from shardsight.row import Failure
from shardsight.sources import absolute
from shardsight.storage import Storage, StorageError, explain, is_remote

RECORD = "conversion.json"  # what was written and left out; and that a conversion wrote the folder
SPLIT = 0.2
FIRST_RETRIES = 20.0  # seconds for which a store is asked for job.json: a wrong address stays wrong
KEPT_ROWS = 16  # that are read at a time, where their pictures are in the results
_COLUMNS = ["id", "uri", "width", "height", "frame_index", "pts_seconds", "error"]
_ENDINGS = {
    **{b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"BM": ".bmp"},
    **{b"II*\0": ".tif", b"MM\0*": ".tif"},
}


@dataclass(frozen=True)
class Format:
    """pictures: whether it holds them. classes: whether it can say the class of a whole picture. splits: whether it
    tells training from validation. files: whether its pictures are files, which may be links."""

    write: Callable[[Iterable[Sample], Contents, Target, Report], None]
    pictures: bool = True
    classes: bool = True
    splits: bool = False
    files: bool = True


FORMATS = {
    "coco": Format(coco.write, pictures=False, classes=False, files=False),
    "yolo": Format(yolo.write, splits=True),
    "mot": Format(mot.write, pictures=False, classes=False, files=False),
    "fiftyone": Format(fiftyone.write),
    "labelstudio": Format(labelstudio.write),
    "voc": Format(voc.write, classes=False, splits=True),
    "webdataset": Format(webdataset.write, files=False),
    "huggingface": Format(huggingface.write, splits=True, files=False),
    "paligemma": Format(paligemma.write, classes=False, splits=True),
}


def convert(
    out: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    *,
    source: str = "detections",
    min_score: float = 0.0,
    label: Sequence[str] = (),
    prompt: Sequence[str] = (),
    split: float | None = None,
    link: bool = False,
    overwrite: bool = False,
    storage: Mapping[str, str] | None = None,
) -> Report:
    """Write the results of a job, finished or not, in the format of another tool; returns what was written and what was
    left out, which output/conversion.json tells, too.

    out: the job's output, a folder or a prefix in a store. output: a folder or prefix that is empty, or with
    `overwrite` an earlier conversion, which is deleted. to: of FORMATS. source: `detections`, of YOLO, or `answers`, of
    PaliGemma. min_score, label: which objects. prompt: which answers. split: the share of pictures for validation, 0.2
    by default. link: symbolic links to local pictures instead of copies. storage: options for fsspec, which override
    those in job.json. Raises UsageError and StorageError.
    """
    out, output = absolute(os.fspath(out).rstrip("/")), absolute(os.fspath(output).rstrip("/"))
    _check(to, output, source, min_score, split, link)
    given = dict(storage or {})
    job = _job(out, Storage(given, FIRST_RETRIES))
    store = Storage(job["configuration"]["storage"] | given)
    files = [path for path, *_ in store.walk(Results(out, store).folder) if path.endswith(".parquet")]
    selection = _selection(job, source, min_score, label, prompt)
    share = SPLIT if split is None else split
    model = job["models"].get("yolo" if source == "detections" else "paligemma", {})
    contents = survey(files, store, selection, model, share)
    _check_contents(out, to, contents)
    report = Report()
    if job["status"] != "done":
        report.notes.append(f"the job is {job['status']}: these are its rows so far")
    rows = _Rows(job, store, Samples(contents, selection, report), FORMATS[to].pictures, link)
    asked = {"out": out, "to": to, "source": source, "min_score": min_score, "label": list(label)}
    with _reported(output):
        _make_room(output, overwrite, store)
        with Target(output, store) as target:
            target.write_json(RECORD, asked | {"status": "running"})
            FORMATS[to].write(rows.samples(files), contents, target, report)
            target.write_json(RECORD, asked | {"status": "done", "names": contents.names} | _record(report))
    if not report.written.total():
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in report.left_out.most_common())
        raise UsageError(f"nothing of {out} could be converted ({reasons}): {output}/{RECORD} names them")
    return report


@contextmanager
def _reported(output: str) -> Iterator[None]:
    """Errors of writing as UsageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = explain(output, error) if is_remote(output) else f"{output} cannot be written: {error}"
        raise UsageError(reason) from error


def _check(to: str, output: str, source: str, min_score: float, split: float | None, link: bool) -> None:
    """Raises UsageError."""
    if to not in FORMATS:
        raise UsageError(f"--to {to}: choose from {', '.join(FORMATS)}")
    if source not in ("detections", "answers"):
        raise UsageError(f"--from {source}: choose from detections, answers")
    if not 0 <= min_score <= 1:
        raise UsageError(f"--min-score {min_score}: expected 0 to 1")
    if split is not None and not FORMATS[to].splits:
        raise UsageError(f"--split: {to} does not tell training from validation; leave it out")
    if split is not None and not 0 <= split < 1:
        raise UsageError(f"--split {split}: expected a share from 0 to less than 1")
    if link and not FORMATS[to].files:
        raise UsageError(f"--link: {to} has no pictures as files; leave it out")
    if link and is_remote(output):
        raise UsageError(f"--link: {output} is in a store, which has no links; leave it out")


def _selection(
    job: Mapping[str, Any], source: str, min_score: float, label: Sequence[str], prompt: Sequence[str]
) -> Selection:
    """Raises UsageError."""
    if prompt and source != "answers":
        raise UsageError("--prompt chooses from PaliGemma's answers: give --from answers, too")
    asked = job["configuration"].get("prompt") or []
    for text in prompt:
        if text not in asked and not job["configuration"].get("prompt_column"):
            raise UsageError(f"--prompt {text!r}: the job asked only {', '.join(map(repr, asked)) or 'nothing'}")
    return Selection(source, min_score, frozenset(label), frozenset(prompt))


def _check_contents(out: str, to: str, contents: Contents) -> None:
    """Raises UsageError."""
    if contents.classes and not FORMATS[to].classes:
        able = ", ".join(name for name, format in FORMATS.items() if format.classes)
        raise UsageError(f"{out} holds classes of whole pictures, which {to} cannot say: choose from {able}")
    if to == "mot" and not contents.tracks:
        raise UsageError(f"{out} holds no tracks: annotate videos with --track, and convert that job")


def _job(out: str, storage: Storage) -> dict[str, Any]:
    job = Results(out, storage).job()
    if job is None:
        raise UsageError(f"{out} holds no job.json: give the --output of a job")
    return job


def _make_room(output: str, overwrite: bool, storage: Storage) -> None:
    """Raises UsageError where `output` holds something that may not be deleted."""
    if next(storage.walk(output, hidden=True), None) is None if is_remote(output) else not os.path.exists(output):
        return
    if not is_remote(output):
        if not os.path.isdir(output):
            raise UsageError(f"{output} is a file: choose another --output")
        if not os.listdir(output):
            return
    if not overwrite:
        raise UsageError(f"{output} is not empty: choose another --output, or --overwrite an earlier conversion")
    if not storage.exists(f"{output}/{RECORD}"):
        raise UsageError(f"{output} holds no {RECORD}, so no conversion wrote it: choose another --output")
    if is_remote(output):
        for entry in list(storage.walk(output, hidden=True)):
            storage.remove(entry.uri)
        return
    for found in os.scandir(output):
        if found.is_dir(follow_symlinks=False):
            shutil.rmtree(found)
        else:
            os.unlink(found)


def _record(report: Report) -> dict[str, Any]:
    left_out = {reason: {"count": n, "ids": report.examples[reason]} for reason, n in report.left_out.items()}
    return {"written": dict(report.written), "left_out": left_out, "notes": report.notes}


@dataclass
class _Rows:
    """Reads the rows of results files as samples, with their pictures if they are wanted; one file's rows are in memory
    at a time, without masks and boxes as Python objects."""

    job: Mapping[str, Any]
    storage: Storage
    make: Samples
    pictures: bool
    link: bool

    def __post_init__(self) -> None:
        self.originals = Originals(self.job, self.storage)

    def samples(self, files: Sequence[str]) -> Iterator[Sample]:
        for path in files:
            with self.storage.open(path) as file:
                parquet = pq.ParquetFile(file)
                versions = _versions(parquet) if self.pictures else {}
                for table in map(self.make.usable, self._tables(parquet)):
                    yield from self._with_pictures(table, versions) if self.pictures else self._of(table)

    def _tables(self, parquet: pq.ParquetFile) -> Iterator[pa.Table]:
        columns = [*_COLUMNS, self.make.column]
        if not self.pictures:
            yield from (pa.Table.from_batches([one]) for one in parquet.iter_batches(batch_size=256, columns=columns))
        elif self.job["configuration"].get("keep_images"):
            for batch in parquet.iter_batches(batch_size=KEPT_ROWS, columns=[*columns, "image"]):
                yield pa.Table.from_batches([batch])
        else:
            yield parquet.read(columns=columns)

    def _of(self, table: pa.Table) -> Iterator[Sample]:
        yield from filter(None, map(self.make.of, table.to_pylist()))

    def _with_pictures(self, table: pa.Table, versions: Mapping[str, str | None]) -> Iterator[Sample]:
        places = {id: number for number, id in enumerate(table["id"].to_pylist())}
        for id, data in self._encoded(table, versions):
            (row,) = table.slice(places[id], 1).to_pylist()
            picture = data if isinstance(data, Failure) else _picture(data, row, self.link)
            if isinstance(picture, Failure):
                changed = picture.type == CHANGED
                reason = (
                    "that have changed since the job read them" if changed else f"that cannot be read: {picture.type}"
                )
                self.make.report.leave_out(f"pictures {reason}", id)
            elif sample := self.make.of(row):
                yield replace(sample, picture=picture)

    def _encoded(self, table: pa.Table, versions: Mapping[str, str | None]) -> Iterator[tuple[str, bytes | Failure]]:
        """The rows' pictures: from the column `image`, else from where the job read them."""
        images = table["image"] if "image" in table.column_names else pa.nulls(len(table))
        rows = {}
        for row, image in zip(table.select(_COLUMNS).to_pylist(), images, strict=True):
            if image.is_valid:
                yield row["id"], image.as_py()
            else:
                rows[row["id"]] = row | {"version": versions.get(row["id"])}
        yield from self.originals.read(rows)


def _versions(parquet: pq.ParquetFile) -> dict[str, str | None]:
    """Of the input of each row, as the job read it, by the row's id."""
    with suppress(KeyError, TypeError, ValueError):  # of another version of Shardsight
        ids = parquet.read(columns=["id"])["id"].to_pylist()
        places = Coverage.loads((parquet.metadata.metadata or {})[FOOTER]).of_rows(ids)
        return {id: place["version"] for id, place in zip(ids, places, strict=True)}
    return {}


def _picture(data: bytes, row: Mapping[str, Any], link: bool) -> Picture | Failure:
    """Encoded bytes as a file for other tools: as they are if all of them read the format, else as a PNG."""
    ending = next((ending for magic, ending in _ENDINGS.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        ending = ".webp"
    if ending is None:
        try:
            file = io.BytesIO()
            Image.fromarray(decode(data)[0]).save(file, "PNG")
        except Failure as failure:
            return failure
        return Picture(file.getvalue(), ".png")
    # ultralytics rewrites in place a JPEG whose last bytes are not its end, which must not happen to the original.
    safe = ending != ".jpg" or data.endswith(b"\xff\xd9")
    linked = link and safe and row["id"] == row["uri"] and "://" not in row["uri"] and row.get("image") is None
    return Picture(data, ending, row["uri"] if linked else None)
