"""YOLOv8: frames → detections, by ultralytics' own model and post-processing.

Importing this module turns off what ultralytics does behind a user's back: downloads, pip installs,
telemetry, and pickles that run code.
"""

import functools
import hashlib
import importlib.util
import math
import os
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS="1")
os.environ.setdefault("YOLO_VERBOSE", "false")
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", os.path.join(tempfile.gettempdir(), f"shardsight-{os.getuid()}"))
os.environ.pop("ULTRALYTICS_API_KEY", None)
# ultralytics sets it to 1 where it is missing, for every library in the process.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import cv2
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pycocotools import mask as rle
from ultralytics import YOLO
from ultralytics.engine.results import Results
from ultralytics.utils import SETTINGS, nms

from shardsight.models.info import ModelError, ModelInfo, computes_bf16
from shardsight.models.table import Stopwatch, with_results
from shardsight.models.yolo.letterbox import Box, CentreCrop, Letterbox
from shardsight.row import Failure, frames_of

if TYPE_CHECKING:
    from shardsight.models.yolo.openvino import Compiled

SETTINGS.update(sync=False)
# torchvision's NMS, which ultralytics prefers to its own where it can; importing all of torchvision takes 6 s.
_torchvision = importlib.util.find_spec("torchvision")
if _torchvision and _torchvision.origin:
    torch.ops.load_library(str(Path(_torchvision.origin).with_name("_C.so")))
    nms.TorchNMS.nms = staticmethod(torch.ops.torchvision.nms)
# By default it gives up after 2 s and 50 ms a picture, and returns the pictures it did not reach as empty.
nms.non_max_suppression = functools.partial(nms.non_max_suppression, max_time_img=math.inf)


_SIDES = ("x1", "y1", "x2", "y2")


def describe(path: str, imgsz: int | list[int] | None, answer: str) -> None:
    """Write a model's ModelInfo, or the ModelError, pickled, into the file `answer`."""
    try:
        outcome: ModelInfo | ModelError = Yolo(path, imgsz=imgsz, precision="fp32").info()
    except ModelError as error:
        outcome = error
    Path(answer).write_bytes(pickle.dumps(outcome))


class Yolo:
    """One YOLOv8 of any task, as weights or as an export that ultralytics' AutoBackend opens.

    conf, iou, max_det, classes, imgsz: as in ultralytics; imgsz defaults to the model's own.
    precision: auto, fp32, bf16 or fp16. threads: of the CPU; all by default.
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
        self.stopwatch = Stopwatch()
        self.path = path = Path(model)
        if not path.exists():  # ultralytics would look for it on the net
            raise ModelError(f"there are no weights at {model}")
        self.threads = threads or os.cpu_count() or 1
        torch.set_num_threads(self.threads)
        cuda = torch.cuda.is_available()
        self.batch_size = batch_size or (64 if cuda else 16)
        self.dtype = _dtype(precision, cuda)
        try:
            yolo = YOLO(model, task=None if path.suffix == ".pt" else _exported_task(path))
            self.task = str(yolo.task)
            overrides = {**yolo.overrides, "mode": "predict", "save": False, "verbose": False, "batch": 1, "rect": True}
            overrides |= {"conf": conf, "iou": iou, "max_det": max_det, "classes": classes}
            overrides |= {"device": 0 if cuda else "cpu"} | ({"imgsz": imgsz} if imgsz else {})
            self.predictor = yolo._smart_load("predictor")(overrides=overrides)
            self.predictor.setup_model(model=yolo.model, verbose=False)
            self.predictor.setup_source([np.zeros((64, 64, 3), np.uint8)])
        except Exception as error:
            raise ModelError(f"{model} cannot be loaded as a YOLO model: {_first_line(error)}") from error
        self.backend = self.predictor.model
        self.names: dict[int, str] = dict(self.backend.names)
        self.native = self.backend.format == "pt"
        minimal = self.native or bool(getattr(self.backend, "dynamic", False))
        size = tuple(self.predictor.imgsz)
        classify = self.task == "classify"
        self.input = CentreCrop(size) if classify else Letterbox(size, int(self.backend.stride), minimal)
        self.compiles = self.native and not cuda and not classify
        if not self.native:
            self.dtype = torch.float32  # an export has its own precision inside
        elif not self.compiles:
            self._cast()

    def set_thresholds(self, conf: float, iou: float, max_det: int, classes: Sequence[int] | None) -> None:
        """For the calls from now on; as in ultralytics."""
        vars(self.predictor.args).update(conf=conf, iou=iou, max_det=max_det, classes=classes and list(classes))

    def info(self) -> ModelInfo:
        return ModelInfo(str(self.path), self.task, self.names, self.input, _sha256(self.path))

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

        return Compiled(self.backend.model, self.dtype, self.threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with FRAME columns → the same, with `detections` or `classes`, or with `error`."""
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
        """Of each picture what was found; where a batch fails, each of its pictures is tried alone."""
        try:
            rows = self.predict([frame for _, frame, _ in items], [box for _, _, box in items])
            return zip((index for index, _, _ in items), rows, strict=True)
        except Exception as error:
            if len(items) == 1:
                return [(items[0][0], Failure.of(error))]
            return [outcome for item in items for outcome in self._outcomes([item])]

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
        return [self._rows(result, box) for result, box in zip(results, boxes, strict=True)]

    def _rows(self, result: Results, box: Box) -> list[dict[str, Any]]:
        if self.task == "classify":
            scores = result.probs.data.float().cpu().numpy()
            return [self._label(i) | {"score": float(scores[i])} for i in np.argsort(-scores, kind="stable")[:5]]
        boxes = result.obb if self.task == "obb" else result.boxes
        xyxy, scores, classes = (part.float().cpu().numpy() for part in (boxes.xyxy, boxes.conf, boxes.cls))
        rows = [
            self._label(label) | {"score": float(score)} | dict(zip(_SIDES, map(float, corner), strict=True))
            for corner, score, label in zip(xyxy, scores, classes, strict=True)
        ]
        if self.task == "obb":
            corners, angles = boxes.xyxyxyxy.float().cpu().numpy(), boxes.xywhr[:, 4].float().cpu().numpy()
            for row, points, angle in zip(rows, corners, angles, strict=True):
                row |= {"angle": float(angle), "corners": points.ravel().tolist()}
        elif result.masks is not None:
            for row, mask in zip(rows, result.masks.data.cpu().numpy(), strict=True):
                row["mask"] = _original_mask(mask, row, box)
        elif result.keypoints is not None:
            for row, points in zip(rows, result.keypoints.data.float().cpu().numpy(), strict=True):
                row["keypoints"] = [
                    {"x": float(p[0]), "y": float(p[1]), "score": float(p[2]) if len(p) == 3 else None} for p in points
                ]
        return rows

    def _label(self, index: int) -> dict[str, Any]:
        return {"label": self.names[int(index)], "class_id": int(index)}


def _original_mask(mask: np.ndarray, row: dict[str, Any], box: Box) -> dict[str, Any]:
    """A mask of the model's input, (outer height, outer width), as COCO RLE of the original picture.

    Only the detection's own box is scaled: a whole picture's mask takes as many bytes as it has pixels.
    """
    x1, y1 = max(0, math.floor(row["x1"])), max(0, math.floor(row["y1"]))
    x2, y2 = min(box.width, math.ceil(row["x2"])), min(box.height, math.ceil(row["y2"]))
    canvas = np.zeros((box.height, box.width), np.uint8, order="F")
    if x2 > x1 and y2 > y1:
        scale_x, scale_y = box.inner[0] / box.width, box.inner[1] / box.height
        # From the centre of a pixel of the original to the mask's.
        shift_x = (x1 + 0.5) * scale_x + box.left - 0.5
        shift_y = (y1 + 0.5) * scale_y + box.top - 0.5
        matrix = np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        part = cv2.warpAffine(mask.astype(np.float32), matrix, (x2 - x1, y2 - y1), flags=flags)
        canvas[y1:y2, x1:x2] = part >= 0.5
    return {"height": box.height, "width": box.width, "counts": rle.encode(canvas)["counts"].decode()}


def _dtype(precision: str, cuda: bool) -> torch.dtype:
    """auto: fp16 on CUDA, bf16 on a CPU that computes in it, else fp32."""
    if precision == "auto":
        precision = "fp16" if cuda else "bf16" if computes_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _exported_task(path: Path) -> str | None:
    """The task that an export names in its metadata; None where AutoBackend has to tell."""
    import yaml

    metadata = path / "metadata.yaml"
    if metadata.exists():
        return str(yaml.safe_load(metadata.read_text())["task"])
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        task: str | None = session.get_modelmeta().custom_metadata_map.get("task")
        return task
    return None


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest() if path.is_dir() else stream.read())
    return total.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
