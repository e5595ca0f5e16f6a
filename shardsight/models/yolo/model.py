"""YOLO: frames → detections, with ultralytics' own model and post-processing."""

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from PIL import Image

from shardsight.models.info import ModelDied, ModelError, automatic, weights_of
from shardsight.models.staging import stage
from shardsight.models.table import Picture, Stopwatch, from_pictures, to_rows, with_results
from shardsight.models.yolo.formats import Network
from shardsight.models.yolo.letterbox import CentreCrop, Letterbox, Placement
from shardsight.models.yolo.load import load
from shardsight.models.yolo.rows import rows_of
from shardsight.models.yolo.track import Found, Tracking
from shardsight.models.yolo.ultralytics_import import multi_label_nms
from shardsight.row import Failure, crop_of, frames_of
from shardsight.storage import Storage

if TYPE_CHECKING:
    from shardsight.models.yolo.openvino import Compiled

_NO_INT8 = (
    "is not calibrated for int8: use --precision int8 in an annotate job on a CPU, or give an export made by "
    "jobs.export --precision int8"
)
Item = tuple[int, np.ndarray, Placement]  # (row in the table, frame, where it lies in the model's input)


class Yolo:
    """One YOLO for detect, segment, classify, pose or obb, as weights or as an export that ultralytics opens.

    model: path or uri of a .pt file or an export. conf, iou, max_det, classes, imgsz: as in ultralytics; imgsz defaults
    to the model's own. multi_label: a box is a detection for each of its classes above conf, as in ultralytics' `val`,
    not only for the best, as in `predict`; exports with NMS inside, and end-to-end networks, decide this themselves.
    precision: auto, fp32, bf16, fp16 or int8. batch_size: pictures per call of the network; by default 64
    on a GPU, else 16. threads: of the CPU; all by default. track: one of TRACKERS, which follows what is found through
    each video of the tables. track_config: settings of that tracker, if others than ultralytics' defaults. crops: store
    a JPEG of each detection, for which a table's frames must be unscaled. storage: options of the model's store, as for
    the job. files: YoloInfo's, which its own have to be. network: for precision int8, of these weights, as int8.py
    makes it. Raises ModelError and UsageError.
    """

    def __init__(
        self,
        model: str,
        conf: float = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        classes: list[int] | None = None,
        imgsz: int | list[int] | None = None,
        multi_label: bool = False,
        precision: str = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
        track: str | None = None,
        track_config: dict[str, Any] | None = None,
        crops: bool = False,
        storage: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
        network: Network | None = None,
    ) -> None:
        model = str(stage(model, Storage(storage or {}), files))
        if not Path(model).exists():  # ultralytics would try to download it
            raise ModelError(f"there are no weights at {model}: give a .pt file or an export; nothing is downloaded")
        if threads:
            torch.set_num_threads(threads)
        self.threads = threads or os.cpu_count() or 1
        cuda = torch.cuda.is_available()
        self.batch_size = batch_size or (64 if cuda else 16)
        self.weights = weights_of(Path(model))
        self.predictor = load(self.weights, imgsz, 0 if cuda else "cpu")
        self.backend = self.predictor.model
        self.task = str(self.predictor.args.task)
        self.names: dict[int, str] = dict(self.backend.names)
        native = self.backend.format == "pt"
        minimal = native or (bool(getattr(self.backend, "dynamic", False)) and self.backend.format != "imx")
        size, classify = tuple(self.predictor.imgsz), self.task == "classify"
        self.input = CentreCrop(size) if classify else Letterbox(size, int(self.backend.stride), minimal)
        self.end2end = native and bool(self.backend.end2end)
        self.compiles = native and not (cuda or classify or self.end2end)
        self.set_thresholds(conf, iou, max_det, classes)
        self.multi_label, self.crops, self.network = multi_label, crops, network
        if precision == "int8" and native and not (network and self.compiles):
            raise ModelError(f"{model} {_NO_INT8}")
        self.dtype = _dtype(precision, cuda) if native else torch.float32  # an export's precision is fixed
        self.tracking = self.tracker(track, track_config) if track else None
        self.stopwatch = Stopwatch()
        if native and not self.compiles:
            self._cast()

    def set_thresholds(self, conf: float, iou: float, max_det: int, classes: Sequence[int] | None) -> None:
        """For the following calls; as in ultralytics."""
        vars(self.predictor.args).update(conf=conf, iou=iou, max_det=max_det, classes=classes and list(classes))
        if self.end2end:  # such a network itself keeps the best max_det, before classes are filtered
            self.backend.model.set_head_attr(max_det=max(max_det, 300))

    def tracker(self, name: str, config: dict[str, Any] | None = None) -> Tracking:
        """What follows other videos than those of other trackers; see `set_tracking`. Raises ModelError, UsageError."""
        return Tracking(name, config or {}, self.predictor, self.names)

    def set_tracking(self, tracking: Tracking | None) -> None:
        """For the following calls: what follows the videos in their tables, if anything."""
        self.tracking = tracking
        self.predictor.args.mode = "track" if tracking else "predict"

    def _cast(self) -> None:
        network = self.backend.model
        network.to(self.dtype, memory_format=torch.channels_last)
        head = network.model[-1]
        if self.dtype != torch.float32 and hasattr(head, "_inference"):
            # Boxes are decoded in fp32: between 512 and 1024 pixels, fp16 has steps of 0.5 and bf16 of 4.
            if hasattr(head, "dfl"):
                head.dfl.float()
            decode = head._inference
            head._inference = lambda outputs: decode(
                {key: value.float() if torch.is_tensor(value) else value for key, value in outputs.items()}
            )

    @functools.cached_property
    def compiled(self) -> "Compiled":
        """Compiled on first use: `inspect` does not need it."""
        from shardsight.models.yolo.openvino import Compiled, stored

        return Compiled(stored(self.network) if self.network else self.converted(), self.dtype, self.threads)

    def converted(self) -> Path:
        """The network as OpenVINO's file, where it `compiles`."""
        from shardsight.models.yolo.openvino import converted

        return converted(self.backend.model, self.weights, int(self.backend.stride))

    def __call__(self, pictures: pa.Table | Picture | Sequence[Picture]) -> Any:
        """A table of rows with frames → the same table with `detections` or `classes`, or with `error`.

        A picture, or a list of them, as encoded bytes, Pillow picture or RGB uint8 array (h, w, 3) → a list of dicts
        with the columns of ROW, one per picture. Raises ModelDied; TypeError for other types.

        With `track`, the frames of each video come in order, in any number of calls, one call at a time; frames of
        several videos may be mixed. See Tracking.
        """
        if isinstance(pictures, pa.Table):
            return self._annotate(pictures)
        return to_rows(self._annotate(from_pictures(pictures, None if self.crops else self.input)))

    def _annotate(self, table: pa.Table) -> pa.Table:
        began = self.stopwatch.now()
        widths, heights = table["width"].to_pylist(), table["height"].to_pylist()
        groups: dict[tuple[int, int], list[Item]] = defaultdict(list)
        for index, frame in frames_of(table):
            placed = self.input.place(widths[index], heights[index])
            groups[placed.outer].append((index, frame, placed))
        found: list[Found | None] = [None] * len(table)
        errors = table["error"].to_pylist()
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                for index, outcome in self._outcomes(group[first : first + self.batch_size]):
                    if isinstance(outcome, Failure):
                        errors[index] = outcome.row("yolo")
                    else:
                        found[index] = outcome
        if self.tracking:
            self.tracking.follow(table, found, errors)
        if self.crops:
            _cut_out(table, found, errors)
        computed = [index for group in groups.values() for index, _, _ in group]
        rows = [one and one.rows for one in found]
        column = "classes" if self.task == "classify" else "detections"
        return with_results(table, "yolo", {column: rows}, errors, computed, self.stopwatch.since(began))

    def _outcomes(self, items: list[Item]) -> Iterable[tuple[int, Found | Failure]]:
        """(row, what was found or why not) of each item. If a batch fails, each picture is tried alone.

        Raises ModelDied.
        """
        indices, frames, placements = map(list, zip(*items, strict=True))
        try:
            return zip(indices, self.predict(frames, placements), strict=True)
        except Exception as error:
            if len(items) > 1:
                return [outcome for item in items for outcome in self._outcomes([item])]
            self._check_blank(frames[0], placements[0])
            return [(indices[0], Failure.of(error))]

    def _check_blank(self, frame: np.ndarray, placed: Placement) -> None:
        """Raises ModelDied if a blank picture of that size fails too: after some CUDA errors, every call fails."""
        try:
            self.predict([np.zeros_like(frame)], [placed])
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise ModelDied(f"YOLO fails on a blank picture, too: {type(error).__name__}: {reason}") from error

    def predict(self, frames: list[np.ndarray], placements: list[Placement]) -> list[Found]:
        """RGB uint8 frames (h, w, 3) of any scale, whose `outer` is the same → what is in each."""
        with torch.inference_mode():
            if isinstance(self.input, CentreCrop):
                batch = torch.stack([self.predictor.transforms(Image.fromarray(frame)) for frame in frames])
            else:
                canvas = self.input.canvas(frames, placements)
                # No copy: (n, h, w, 3) in memory is (n, 3, h, w) in the format channels_last.
                batch = torch.from_numpy(canvas).permute(0, 3, 1, 2)
            if self.compiles:
                outputs = self.compiled(canvas)
            else:
                batch = batch.to(self.predictor.device)
                batch = batch.to(self.dtype).div_(255) if batch.dtype == torch.uint8 else batch.to(self.dtype)
                # The runtimes of some exports, such as MNN and ExecuTorch, read memory as if it were (n, 3, h, w).
                outputs = self.backend(batch if self.backend.format == "pt" else batch.contiguous())
            # ultralytics scales its results to the originals, of which it needs only the shapes.
            originals = [np.broadcast_to(np.uint8(0), (placed.height, placed.width, 3)) for placed in placements]
            self.predictor.batch = [""] * len(frames), None, None
            with multi_label_nms(self.multi_label):
                results = self.predictor.postprocess(outputs, batch, originals)
            dropped = self.tracking.dropped(results) if self.tracking else [None] * len(results)
        rows = [rows_of(result, self.names, placed) for result, placed in zip(results, placements, strict=True)]
        boxes = [result.boxes if result.obb is None else result.obb for result in results]
        return [Found(*each) for each in zip(rows, boxes, dropped, strict=True)]


def _cut_out(table: pa.Table, found: list[Found | None], errors: list[dict[str, str] | None]) -> None:
    """Add to what was found in each unscaled frame its `crop`."""
    for index, frame in frames_of(table):
        one = found[index]
        try:
            for row in one.rows if one else ():
                row["crop"] = simplejpeg.encode_jpeg(np.ascontiguousarray(crop_of(frame, row)), quality=95)
        except Exception as error:  # a side of more than 65,535 pixels fits in no JPEG
            found[index], errors[index] = None, Failure.of(error).row("yolo")


def _dtype(precision: str, cuda: bool) -> torch.dtype:
    chosen = automatic(cuda) if precision in ("auto", "int8") else precision  # for layers that are not quantized
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
