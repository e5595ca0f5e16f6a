"""A YOLO's network in int8 for CPUs: calibrated on some of a job's own pictures, and checked on others against fp32.

That is a process of its own, `python -m shardsight.models.yolo.int8 REQUEST FOLDER`, with REQUEST in JSON, which gets
the units to read and what reads them from its standard input.
"""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from shardsight.decode.frames import Load
from shardsight.decode.video import Sampling, extent
from shardsight.models.info import ModelError, answer, key_of, made_once
from shardsight.models.staging import stage
from shardsight.models.yolo.formats import FILES, Network
from shardsight.models.yolo.info import YoloInfo
from shardsight.models.yolo.letterbox import Letterbox
from shardsight.results.coverage import Ranges
from shardsight.row import Failure, frames_of
from shardsight.settings import Settings
from shardsight.sources import Unit, open_file, read
from shardsight.sources.listing import spread
from shardsight.storage import is_remote

if TYPE_CHECKING:
    from shardsight.models.yolo.model import Yolo

SAMPLE = 192  # pictures: two thirds to calibrate on, the others to check
LEAST = 9  # of them
MANY = 12  # pictures of one file, from which on they come from all over it: that takes reading it once more
AGREEMENT = 0.85  # of what int8 or fp32 finds, the share that both do; measured ones are in benchmarks/RESULTS.md
IOU = 0.75  # from which on two boxes, or masks, are of the same object
APART = 0.1  # of its box's side, how far an object's keypoints may be, on average: moved by that, a box has that IoU
INSTEAD = "choose --precision bf16 or fp32, or give --yolo what jobs.export --precision int8 writes"
_FOUND = "found.json"


@dataclass(frozen=True)
class Int8:
    """network: content of OpenVINO's two files. found: what job.json says of it, its sha256 among it."""

    network: Network
    found: dict[str, Any]


def calibrate(info: YoloInfo, settings: Settings, units: Sequence[Unit], load: Load) -> Int8:
    """units: that hold the sample. load: what decodes it. Made once: see `key`.

    Raises ModelError where int8 does not agree with fp32, and for networks that have no int8.
    """
    names = ("conf", "iou", "max_det", "classes", "imgsz")
    request = {name: getattr(settings, name) for name in names}

    def make(folder: Path) -> None:
        model = str(stage(info.path, load.storage, info.files))
        command = [sys.executable, "-m", __name__, json.dumps(request | {"model": model}), str(folder)]
        done = subprocess.run(command, input=pickle.dumps((units, load)), capture_output=True)
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        if done.returncode or not lines:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise ModelError(f"--precision int8: calibration failed ({said[-1]}): {INSTEAD}")
        found = json.loads(lines[-1])
        if "error" in found:
            raise ModelError(f"--precision int8: {found['error']}: {INSTEAD}")
        (folder / _FOUND).write_text(json.dumps(found))

    folder = made_once("int8", key(request, info, units, load), make)
    xml, weights = ((folder / name).read_bytes() for name in FILES)
    return Int8((xml, weights), json.loads((folder / _FOUND).read_text()))


def key(request: dict[str, Any], info: YoloInfo, units: Sequence[Unit], load: Load) -> str:
    """Of what the network and its agreement depend on: weights, settings, which pictures are read, and how."""
    decoded = repr(load.input), load.scaled, astuple(load.sampling)
    return key_of(Path(__file__).parent, request, info.files, [astuple(unit) for unit in units], decoded)


def agreement(some: Sequence[Sequence[dict[str, Any]]], others: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    """Of the detections of some and of others, pictures in the same order, the share that have a partner there: of the
    same class and in the same place. None where there are none."""
    from scipy.optimize import linear_sum_assignment

    paired = count = 0
    for ours, theirs in zip(some, others, strict=True):
        count += len(ours) + len(theirs)
        for name in {one["class_id"] for one in ours}:
            own, other = ([one for one in each if one["class_id"] == name] for each in (ours, theirs))
            if other:
                near = _near(own, other)
                paired += near[linear_sum_assignment(near, maximize=True)].sum()
    return 2 * float(paired) / count if count else None


def _near(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> np.ndarray:
    """Detections → bool (some, others): whether their boxes are in the same place, and their masks, keypoints and
    corners, where they have them."""
    from pycocotools import mask

    from shardsight.measures.boxes import probiou

    both = some, others
    near = mask.iou(*([_xywh(one) for one in each] for each in both), [0] * len(others)) >= IOU
    if some[0].get("mask"):
        near &= mask.iou(*([_rle(one["mask"]) for one in each] for each in both), [0] * len(others)) >= IOU
    if some[0].get("keypoints"):
        here, there = (np.array([_points(one) for one in each]) for each in both)
        sides = np.sqrt([np.prod(_xywh(one)[2:]) for one in some])
        near &= _apart(here[:, None], there[None]) <= APART * sides[:, None]
    if some[0].get("corners"):
        near &= probiou(*([one["corners"] for one in each] for each in both)) >= IOU
    return near


def _apart(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Keypoints (…, n, 3), as of `_points` → (…): pixels from one to the other, on average. Those with low scores count
    less: they are out of sight, and lie anywhere."""
    weights = some[..., 2] + others[..., 2] + 1e-9
    distances = np.linalg.norm(some[..., :2] - others[..., :2], axis=-1)
    found: np.ndarray = (distances * weights).sum(-1) / weights.sum(-1)
    return found


def _xywh(one: dict[str, Any]) -> list[float]:
    return [one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]]


def _rle(mask: dict[str, Any]) -> dict[str, Any]:
    return {"size": [mask["height"], mask["width"]], "counts": mask["counts"]}


def _points(one: dict[str, Any]) -> list[list[float]]:
    """x, y and score, 1 where the network gives none."""
    return [[p["x"], p["y"], 1.0 if p["score"] is None else p["score"]] for p in one["keypoints"]]


def sample(units: Sequence[Unit], load: Load) -> list[dict[str, Any]]:
    """At most about SAMPLE rows with frames: a loose file is one, and of each other unit come equally many, the first
    or as `_thinned` chooses them; of a tar of videos, those of its first."""
    loose = sum(not unit.uri for unit in units)
    each = -(-(SAMPLE - loose) // max(1, len(units) - loose))
    found: list[dict[str, Any]] = []
    for unit in units:
        records = read(_thinned(unit, load, each), load.storage)
        rows = chain.from_iterable(map(load.rows, records))
        found += islice((row for row in rows if row.get("frame")), each if unit.uri else 1)
    return found


def _thinned(unit: Unit, load: Load, wanted: int) -> Unit:
    """The unit with `wanted` records, or frames of a video, from all over it; unchanged where that takes too much
    reading (see MANY), as of files of a store, and for videos whose frames only decoding tells, such as AVI."""
    if not unit.uri or is_remote(unit.uri) or wanted < MANY:
        return unit
    if unit.kind != "video":
        chosen = spread(sum(1 for _ in read(unit, load.storage, payload=False)), wanted)
        return replace(unit, skip=_between(chosen))
    frames = None
    with suppress(Failure), open_file(unit.uri, load.storage) as file:
        frames = extent(file, load.sampling).frames
    return replace(unit, frames={0: _between(spread(frames, wanted))}) if frames else unit


def _between(places: Sequence[int]) -> Ranges:
    """What lies before and between some places, which are sorted."""
    return [(before + 1, place) for before, place in pairwise([-1, *places]) if place > before + 1]


def divided(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to calibrate on, and others to check: every third picture, and of a video the last third, since each of its
    frames is much like the one before."""
    used: list[dict[str, Any]] = []
    checked: list[dict[str, Any]] = []
    short = 0
    for _, group in groupby(rows, lambda row: (row["uri"], row["record"])):
        own = list(group)
        held = len(own) // 3
        if len(own) < LEAST:  # a picture, or one of many videos
            held = 0 if short % 3 else len(own)
            short += 1
        used += own[: len(own) - held]
        checked += own[len(own) - held :]
    return used, checked


def _make(folder: Path, model: str, units: Sequence[Unit], load: Load, **settings: Any) -> dict[str, Any]:
    """Write FILES. Returns what was found. Raises ModelError."""
    from shardsight.models.yolo.model import Yolo
    from shardsight.models.yolo.openvino import quantize

    exact = Yolo(model, precision="fp32", **settings)
    if not exact.compiles:
        raise ModelError(f"{model} has no int8 here, which is for CPUs, not for classifiers or end-to-end networks")
    # Keyframes are spread over a video and soon decoded, but a short one has few.
    rows = sample(units, replace(load, sampling=Sampling(keyframes=True)))
    if len(rows) < SAMPLE / 2:
        rows = sample(units, load)
    if len(rows) < LEAST:
        raise ModelError(
            f"only {len(rows)} of the input's pictures can be decoded, where it takes {LEAST} to calibrate"
        )
    used, checked = divided(rows)
    quantize(exact.converted(), _inputs(exact, load.table(used)), exact.backend.model.model[-1].i, folder / FILES[0])
    xml, weights = ((folder / name).read_bytes() for name in FILES)
    quick = Yolo(model, precision="int8", network=(xml, weights), **settings)
    both = [[each or [] for each in yolo(load.table(checked))["detections"].to_pylist()] for yolo in (exact, quick)]
    objects = sum(map(len, both[0]))
    found = agreement(*both)
    if found is None:
        raise ModelError(f"neither int8 nor fp32 finds anything in the {len(checked)} pictures that it is checked on")
    if found < AGREEMENT:
        raise ModelError(
            f"int8 agrees with fp32 on {found:.1%} of what they find in {len(checked)} pictures ({objects} objects), "
            f"less than {AGREEMENT:.0%}"
        )
    digest = hashlib.sha256(xml + weights).hexdigest()
    said = {"agreement": round(found, 4), "objects": objects, "calibrated": len(used), "checked": len(checked)}
    return said | {"sha256": digest}


def _inputs(yolo: "Yolo", table: pa.Table) -> Iterator[np.ndarray]:
    """A table's frames as the network sees them, RGB uint8 (1, h, w, 3)."""
    widths, heights = table["width"].to_pylist(), table["height"].to_pylist()
    assert isinstance(yolo.input, Letterbox)
    for index, frame in frames_of(table):
        yield yolo.input.canvas([frame], [yolo.input.place(widths[index], heights[index])])


def _main(request: str, folder: str) -> dict[str, Any]:
    """What `_make` returns. Raises ModelError."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # NNCF goes on without it
    units, load = pickle.load(sys.stdin.buffer)
    return _make(Path(folder), units=units, load=load, **json.loads(request))


if __name__ == "__main__":
    answer(lambda: _main(*sys.argv[1:]))
