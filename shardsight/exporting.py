"""A YOLO → exports, with the size, speed and accuracy of each beside the original's."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from shardsight import truth
from shardsight.errors import UsageError
from shardsight.models.info import ModelError, weights_of
from shardsight.models.staging import stage
from shardsight.models.yolo import info as yolo
from shardsight.models.yolo.export import export as export_one
from shardsight.models.yolo.formats import FORMATS, PRECISIONS, missing
from shardsight.sources import absolute
from shardsight.sources.files import fetch
from shardsight.storage import Storage, StorageError, explain, is_remote
from shardsight.truth.yolo import pictures_in

RECORD = "export.json"
CALIBRATED = 300  # pictures, as ultralytics recommends
WHOLE = ("fp32", "fp16")  # precisions that need no calibration


@dataclass
class Exported:
    """An export, or with `reason` one that failed. name: of its file or folder in the output. main: its main figure,
    0 to 1; latency_ms: of one picture, the median."""

    format: str
    precision: str
    name: str | None = None
    mb: float | None = None
    seconds: float | None = None
    sha256: str | None = None
    reason: str | None = None
    main: float | None = None
    pictures_per_second: float | None = None
    latency_ms: float | None = None


@dataclass
class Exports:
    """What was exported. original: the weights themselves, computed as `jobs.annotate` does by default. measure: what
    `main` is. chosen: the name of the fastest that loses no more than was allowed. page: of the evaluation."""

    out: str
    original: Exported
    exports: list[Exported]
    measure: str | None = None
    within: float | None = None
    chosen: str | None = None
    page: str | None = None

    @property
    def failed(self) -> list[Exported]:
        return [one for one in self.exports if one.reason]

    def print(self, console: Console) -> None:
        """A table; what failed, with its reason; and the choice."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        figures = ["ms", "pictures/s", self.measure, "difference"] if self.measure else []
        for column in ("export", "precision", "MB", *figures):
            table.add_column(column, justify="left" if column in ("export", "precision") else "right")
        for one in (self.original, *self.exports):
            if one.reason:
                continue
            cells = [_number(one.latency_ms), _number(one.pictures_per_second), _points(one.main)]
            gap = None if one.main is None or self.original.main is None else one.main - self.original.main
            cells.append("" if one is self.original else _points(gap, "+"))
            table.add_row(one.name or "", one.precision, _number(one.mb), *(cells if figures else []))
        console.print(table, highlight=False)
        for one in self.failed:
            console.print(f"{one.reason}", highlight=False, soft_wrap=True)
        if self.within is not None and self.chosen:
            said = f"{self.chosen}: the fastest that loses no more than {self.within:g} points of {self.measure}"
            console.print(said, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _points(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{100 * share:{sign}.1f}"


@dataclass(frozen=True)
class Request:
    """options: of ultralytics' export. rounds: in which speed is measured. data: labelled pictures, or a folder of
    pictures to calibrate with. compare: whether labelled pictures also compare the exports with the original."""

    model: str
    output: str
    formats: Sequence[str]
    precisions: Sequence[str] = ("",)
    options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    within: float | None = None
    limit: int | None = None
    rounds: int = 5
    overwrite: bool = False
    storage: dict[str, str] = field(default_factory=dict)
    compare: bool = True

    def pairs(self) -> list[tuple[str, str]]:
        """(format, precision), of which "" is the format's own first; a precision that a format lacks is left out.

        Raises UsageError, before anything is done.
        """
        if self.within is not None and not self.data:
            raise UsageError("--within compares accuracy: give labelled pictures as --data")
        for name in self.formats:
            if name not in FORMATS:
                raise UsageError(f"there is no --format {name}: choose from {', '.join(FORMATS)}")
        for precision in filter(None, self.precisions):
            if precision not in PRECISIONS:
                raise UsageError(f"there is no --precision {precision}: choose from {', '.join(PRECISIONS)}")
            if len(self.formats) > 1 and not any(precision in FORMATS[name].precisions for name in self.formats):
                raise UsageError(f"--precision {precision} suits none of these formats: {', '.join(self.formats)}")
        found: dict[tuple[str, str], None] = {}
        for name in self.formats:
            wanted = [one or FORMATS[name].precisions[0] for one in self.precisions]
            able = [one for one in wanted if one in FORMATS[name].precisions]
            if not able:
                known = ", ".join(FORMATS[name].precisions)
                raise UsageError(f"--format {name} has no {' or '.join(wanted)}: choose from {known}")
            for precision in able:
                self._check(name, precision)
                found[name, precision] = None
        return list(found)

    def _check(self, name: str, precision: str) -> None:
        """Raises UsageError."""
        if reason := missing(name, precision):
            raise UsageError(reason)
        if precision not in WHOLE and FORMATS[name].calibrated and not self.data:
            raise UsageError(f"--precision {precision} of {name} is calibrated on pictures: give some as --data")
        for option in self.options.keys() - {"imgsz"}:
            if option not in FORMATS[name].options:
                raise UsageError(f"--{option} is no option of {name}: leave it out, or export {name} apart")


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str | Sequence[str],
    precision: str | Sequence[str] = "",
    *,
    data: str | os.PathLike[str] | None = None,
    within: float | None = None,
    limit: int | None = None,
    rounds: int = 5,
    overwrite: bool = False,
    storage: dict[str, str] | None = None,
    **options: Any,
) -> Exports:
    """Export a YOLO's weights to one or several formats; nothing is downloaded or installed.

    model: a .pt file, output: a folder, each local or in a store. format: of FORMATS. precision: of PRECISIONS; by
    default each format's first. data: labelled pictures, as for `evaluate`, on which int8 is calibrated and all exports
    are compared with the original; or for int8 alone a folder of pictures. within: points of the main measure that the
    choice may lose. limit: pictures of the comparison. rounds: in which speed is measured. options: imgsz, batch,
    dynamic, nms, opset, simplify, fraction.
    Raises UsageError. An export that fails costs itself alone: see Exports.failed.
    """
    formats, precisions = ([one] if isinstance(one, str) else [*one] for one in (format, precision))
    data = None if data is None else absolute(os.fspath(data))
    model, output = absolute(os.fspath(model)), absolute(os.fspath(output).rstrip("/"))
    given = dict(storage or {})
    return run(Request(model, output, formats, precisions, options, data, within, limit, rounds, overwrite, given))


def run(request: Request, console: Console | None = None) -> Exports:
    """console: is told which export is next. Raises UsageError, JobError and JobInterrupted."""
    pairs, store = request.pairs(), Storage(request.storage)
    weights, info = _weights(request.model, store)
    labelled = _labelled(request, info.task, store)
    asked = {"sha256": info.sha256, "exports": [list(pair) for pair in pairs], "options": request.options}
    before = _there(request, asked, store)
    size = round(weights.stat().st_size / 1e6, 2)
    made = Exports(request.output, Exported("pytorch", "auto", weights.name, size, sha256=info.sha256), before)
    if not before:
        with tempfile.TemporaryDirectory() as temporary:
            with _calibration(request, pairs, labelled, info.task, store) as calibration:
                for name, precision in pairs:
                    if console:
                        console.print(f"{name} {precision}", highlight=False)
                    tag = "" if precision == FORMATS[name].precisions[0] else f"-{precision}"
                    target = Path(temporary) / f"{weights.stem}{tag}"
                    made.exports.append(_one(weights, target, name, precision, request, calibration))
            _publish(Path(temporary), request, store)
        _record(made, asked, store)  # before the comparison, with which the same command goes on
    if labelled and request.compare:
        _compare(made, request, console)
        _record(made, asked, store)
    return made


def _record(made: Exports, asked: dict[str, Any], store: Storage) -> None:
    store.write(f"{made.out}/{RECORD}", json.dumps(asdict(made) | {"asked": asked}, indent=1).encode())


def _weights(model: str, store: Storage) -> tuple[Path, yolo.YoloInfo]:
    """Raises ModelError."""
    path = weights_of(stage(model, store))
    info = yolo.inspect(str(path))
    if path.suffix.lower() != ".pt":
        raise ModelError(f"{model} is an export already: give the .pt file that it was made from")
    return path, info


def _there(request: Request, asked: dict[str, Any], store: Storage) -> list[Exported]:
    """The exports of an earlier run of the same request. Raises UsageError where the output holds something else."""
    record = f"{request.output}/{RECORD}"
    if not store.exists(record):
        if store.is_folder(request.output) and next(store.walk(request.output, hidden=True), None):
            raise UsageError(f"{request.output} holds other files: give an empty folder as --output")
        return []
    before = json.loads(store.read(record))
    if request.overwrite:
        return []
    if before["asked"] != asked:
        raise UsageError(f"{request.output} holds other exports: give another --output, or --overwrite")
    return [Exported(**one) for one in before["exports"]]


def _remove_earlier(request: Request, store: Storage) -> None:
    """What `export.json` lists, and the evaluation; other files stay."""
    record = f"{request.output}/{RECORD}"
    if not store.exists(record):
        return
    names = [one["name"] for one in json.loads(store.read(record))["exports"] if one["name"]]
    for name in (*names, "evaluation", RECORD):
        path = f"{request.output}/{name}"
        for entry in list(store.walk(path, hidden=True)) if store.is_folder(path) else []:
            store.remove(entry.uri)
        if not is_remote(path) and os.path.isdir(path):
            shutil.rmtree(path)
        elif store.exists(path):
            store.remove(path)


def _labelled(request: Request, task: str, store: Storage) -> truth.Truth | None:
    """The labelled set, unless `data` is a plain folder of pictures. Raises UsageError."""
    if not request.data:
        return None
    if task != "classify" and store.is_folder(request.data) and not store.exists(f"{request.data}/data.yaml"):
        if request.within is not None:
            raise UsageError(f"--within compares accuracy, and {request.data} is a folder without labels")
        return None
    return truth.read(request.data, store, task)


def _one(
    weights: Path, target: Path, format: str, precision: str, request: Request, calibration: str | None
) -> Exported:
    made = Exported(format, precision)
    options = dict(request.options)
    if calibration and precision not in WHOLE and FORMATS[format].calibrated:
        options["data"] = calibration
    began = time.monotonic()
    try:
        path = export_one(weights, target, format, precision, options)
    except ModelError as error:
        made.reason = str(error)
        return made
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    made.name, made.seconds = path.name, round(time.monotonic() - began, 1)
    made.mb = round(sum(file.stat().st_size for file in files) / 1e6, 2)
    try:
        made.sha256 = yolo.inspect(str(path)).sha256
    except ModelError as error:
        made.reason = f"{path.name} is written, but this machine cannot load it: {error}"
    return made


@contextmanager
def _calibration(
    request: Request, pairs: Sequence[tuple[str, str]], labelled: truth.Truth | None, task: str, store: Storage
) -> Iterator[str | None]:
    """Pictures of `data` as ultralytics takes them for calibration: a data.yaml, or for a classifier a folder."""
    if not request.data or all(precision in WHOLE for _, precision in pairs):
        yield None
        return
    uris = [sample.id for sample in labelled.samples] if labelled else pictures_in(request.data, store)
    chosen = [uris[index] for index in np.unique(np.linspace(0, len(uris) - 1, CALIBRATED).astype(int))] if uris else []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        pictures = root / "train" / "any"
        pictures.mkdir(parents=True)
        (root / "val").symlink_to("train")  # ultralytics asks for both
        for number, uri in enumerate(chosen):
            ending = os.path.splitext(uri)[1].lower() or ".jpg"
            with suppress(OSError, ValueError, StorageError):
                data = fetch(uri, store)
                (pictures / f"{number:06}{ending}").write_bytes(data)
        if not any(pictures.iterdir()):
            raise UsageError(f"--data {request.data} holds no picture that can be read: int8 is calibrated on some")
        if task == "classify":
            yield str(root)
            return
        content = {"path": str(root), "train": "train/any", "val": "val/any", "names": {0: "any"}}
        (root / "data.yaml").write_text(yaml.safe_dump(content))
        yield str(root / "data.yaml")


def _publish(folder: Path, request: Request, store: Storage) -> None:
    """In the place of earlier exports. Raises UsageError."""
    output = request.output
    try:
        _remove_earlier(request, store)
        if not is_remote(output):
            shutil.copytree(folder, output, dirs_exist_ok=True)
            return
        for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
            store.write(f"{output}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    except (OSError, StorageError) as error:
        raise UsageError(explain(output, error)) from error


def _compare(made: Exports, request: Request, console: Console | None) -> None:
    """Fill in the figures of all exports that can be loaded, and choose."""
    from shardsight.evaluation.request import Evaluation
    from shardsight.evaluation.run import run as evaluate
    from shardsight.settings import settings_as

    whole = [one for one in made.exports if not one.reason]
    paths = [request.model, *(f"{request.output}/{one.name}" for one in whole)]
    asked = settings_as(
        Evaluation,
        **{"data": request.data, "output": f"{request.output}/evaluation", "yolo": paths},
        **{"limit": request.limit, "rounds": request.rounds, "storage": request.storage},
    )
    report = evaluate(asked, say=(lambda said: console.print(said, highlight=False)) if console else lambda _: None)
    kind, name = report.content["main"]["kind"], report.content["main"]["measure"]
    made.measure, made.page = name, report.page
    for one, model in zip((made.original, *whole), report.models, strict=True):
        one.main = model["figures"][kind]["measures"][name]["value"]
        speed = model["speed"] or {}
        one.pictures_per_second = speed.get("pictures_per_second")
        one.latency_ms = (speed.get("latency_ms") or {}).get("p50")
    made.within = request.within
    if request.within is not None and made.original.main is not None:
        least = made.original.main - request.within / 100
        good = [one for one in (made.original, *whole) if one.main is not None and one.main >= least - 1e-12]
        made.chosen = max(good, key=lambda one: one.pictures_per_second or 0.0).name
