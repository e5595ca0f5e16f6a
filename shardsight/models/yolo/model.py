"""YOLO: frames → detections, by ultralytics' own model and post-processing."""

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from shardsight.models.info import ModelDied, ModelError, computes_bf16
from shardsight.models.table import Picture, Stopwatch, from_pictures, to_rows, with_results
from shardsight.models.yolo.letterbox import Box, CentreCrop, Letterbox
from shardsight.models.yolo.load import load
from shardsight.models.yolo.rows import rows_of
from shardsight.row import Failure, frames_of

if TYPE_CHECKING:
    from shardsight.models.yolo.openvino import Compiled


class Yolo:
    """One YOLO for detect, segment, classify, pose or obb, as weights or as an export that ultralytics opens.

    model: path of a .pt file or an export. conf, iou, max_det, classes, imgsz: as in ultralytics; imgsz defaults to the
    model's own. precision: auto, fp32, bf16 or fp16. batch_size: pictures that are computed at once; by default 64 on
    a GPU, else 16. threads: of the CPU; all by default. Raises ModelError.
    """

    def __init__(
        self,
        model: str,
        conf: float = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        classes: list[int] | None = None,
        imgsz: int | list[int] | None = None,
        precision: str = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
    ) -> None:
        if not Path(model).exists():  # ultralytics would look for it on the net
            raise ModelError(f"there are no weights at {model}: give a .pt file or an export; nothing is downloaded")
        if threads:
            torch.set_num_threads(threads)
        self.threads = threads or os.cpu_count() or 1
        cuda = torch.cuda.is_available()
        self.batch_size = batch_size or (64 if cuda else 16)
        self.predictor = load(Path(model), imgsz, 0 if cuda else "cpu")
        self.backend = self.predictor.model
        self.task = str(self.predictor.args.task)
        self.names: dict[int, str] = dict(self.backend.names)
        native = self.backend.format == "pt"
        minimal = native or (bool(getattr(self.backend, "dynamic", False)) and self.backend.format != "imx")
        size = tuple(self.predictor.imgsz)
        classify = self.task == "classify"
        self.input = CentreCrop(size) if classify else Letterbox(size, int(self.backend.stride), minimal)
        self.end2end = native and bool(self.backend.end2end)
        self.compiles = native and not (cuda or classify or self.end2end)
        self.set_thresholds(conf, iou, max_det, classes)
        self.dtype = _dtype(precision, cuda) if native else torch.float32  # an export has its own precision inside
        self.stopwatch = Stopwatch()
        if native and not self.compiles:
            self._cast()

    def set_thresholds(self, conf: float, iou: float, max_det: int, classes: Sequence[int] | None) -> None:
        """For the calls from now on; as in ultralytics."""
        vars(self.predictor.args).update(conf=conf, iou=iou, max_det=max_det, classes=classes and list(classes))
        if self.end2end:  # the network itself picks so many, as ultralytics sets it, before classes are filtered
            self.backend.model.set_head_attr(max_det=max(max_det, 300))

    def _cast(self) -> None:
        network = self.backend.model
        network.to(self.dtype, memory_format=torch.channels_last)
        head = network.model[-1]
        if self.dtype != torch.float32 and hasattr(head, "_inference"):
            # Pixels above 256 have no half in fp16, nor a whole in bf16: boxes are computed in fp32.
            if hasattr(head, "dfl"):
                head.dfl.float()
            decode = head._inference
            head._inference = lambda outputs: decode(
                {key: value.float() if torch.is_tensor(value) else value for key, value in outputs.items()}
            )

    @functools.cached_property
    def compiled(self) -> "Compiled":
        """On first use, as who only asks what a model is need not wait for it."""
        from shardsight.models.yolo.openvino import Compiled

        return Compiled(self.backend.model, int(self.backend.stride), self.dtype, self.threads)

    def __call__(self, pictures: pa.Table | Picture | Sequence[Picture]) -> Any:
        """Rows with FRAME columns → the same, with `detections` or `classes`, or with `error`.

        A picture, or a list of them, as encoded bytes, Pillow picture or RGB uint8 array (h, w, 3) → a list of rows as
        dicts with the columns of ROW, one of each picture. Raises ModelDied; TypeError for what is no picture.
        """
        if isinstance(pictures, pa.Table):
            return self._annotate(pictures)
        return to_rows(self._annotate(from_pictures(pictures, self.input)))

    def _annotate(self, table: pa.Table) -> pa.Table:
        began = self.stopwatch.now()
        heights, widths = table["height"].to_pylist(), table["width"].to_pylist()
        groups: dict[tuple[int, int], list[tuple[int, np.ndarray, Box]]] = defaultdict(list)
        for index, frame in frames_of(table):
            box = self.input.place(widths[index], heights[index])
            groups[box.outer].append((index, frame, box))
        found: list[list[dict[str, Any]] | None] = [None] * len(table)
        errors = table["error"].to_pylist()
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                for index, outcome in self._outcomes(group[first : first + self.batch_size]):
                    if isinstance(outcome, Failure):
                        errors[index] = outcome.row("yolo")
                    else:
                        found[index] = outcome
        computed = [index for group in groups.values() for index, _, _ in group]
        column = "classes" if self.task == "classify" else "detections"
        return with_results(table, "yolo", {column: found}, errors, computed, self.stopwatch.since(began))

    def _outcomes(
        self, items: list[tuple[int, np.ndarray, Box]]
    ) -> Iterable[tuple[int, list[dict[str, Any]] | Failure]]:
        """Of each picture what was found; where a batch fails, each picture is tried alone. Raises ModelDied."""
        try:
            rows = self.predict([frame for _, frame, _ in items], [box for _, _, box in items])
            return zip((index for index, _, _ in items), rows, strict=True)
        except Exception as error:
            if len(items) > 1:
                return [outcome for item in items for outcome in self._outcomes([item])]
            index, frame, box = items[0]
            self._check_blank(frame, box)
            return [(index, Failure.of(error))]

    def _check_blank(self, frame: np.ndarray, box: Box) -> None:
        """After an error of CUDA, say, everything fails until the process ends: a blank picture tells that it was not
        the picture. Raises ModelDied."""
        try:
            self.predict([np.zeros_like(frame)], [box])
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise ModelDied(f"YOLO fails on a blank picture, too: {type(error).__name__}: {reason}") from error

    def predict(self, frames: list[np.ndarray], boxes: list[Box]) -> list[list[dict[str, Any]]]:
        """RGB uint8 frames (h, w, 3), of any scale, whose boxes share an outer size → rows of DETECTION or CLASS."""
        with torch.inference_mode():
            if isinstance(self.input, CentreCrop):
                batch = torch.stack([self.predictor.transforms(Image.fromarray(frame)) for frame in frames])
            else:
                width, height = boxes[0].outer
                canvas = np.empty((len(frames), height, width, 3), np.uint8)
                for frame, box, room in zip(frames, boxes, canvas, strict=True):
                    self.input.draw(frame, box, room)
                # (n, h, w, 3) in memory is channels-last (n, 3, h, w): no copy.
                batch = torch.from_numpy(canvas).permute(0, 3, 1, 2)
            if self.compiles:
                outputs = self.compiled(canvas)
            else:
                batch = batch.to(self.predictor.device)
                batch = batch.to(self.dtype).div_(255) if batch.dtype == torch.uint8 else batch.to(self.dtype)
                outputs = self.backend(batch)
            # ultralytics scales its results to the originals, of which it needs nothing but the shapes.
            originals = [np.broadcast_to(np.uint8(0), (box.height, box.width, 3)) for box in boxes]
            self.predictor.batch = [""] * len(frames), None, None
            results = self.predictor.postprocess(outputs, batch, originals)
        return [rows_of(result, self.names, box) for result, box in zip(results, boxes, strict=True)]


def _dtype(precision: str, cuda: bool) -> torch.dtype:
    """auto: fp16 on CUDA, bf16 on a CPU that computes in it, else fp32."""
    if precision == "auto":
        precision = "fp16" if cuda else "bf16" if computes_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
