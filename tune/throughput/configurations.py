"""The configurations that are tried, and each as settings of jobs.annotate and of the service."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shardsight.evaluation.speed import BATCH
from shardsight.models.info import automatic
from shardsight.models.yolo.formats import missing
from shardsight.models.yolo.info import YoloInfo
from tune.throughput.request import Settings

Size = tuple[int, int]  # (height, width), pixels
_SHARES = (0.75, 0.5)  # of the model's own size
_EXPORTS = {True: ("engine:fp16", "onnx:fp16"), False: ("openvino:int8", "onnx:fp32")}  # by whether there is a GPU
PYTORCH = "pytorch"


@dataclass(frozen=True)
class Configuration:
    """How a YOLO is computed; by default as jobs.annotate does.

    model: as --yolo named it. format: NAME:PRECISION of its export, or PYTORCH for the model as it was given. imgsz:
    of an export that of which it was made, which one of any size does not know itself; None is the model's own.
    batch_size, actors: None are the job's defaults.
    """

    model: str
    format: str = PYTORCH
    imgsz: Size | None = None
    precision: str = "auto"
    scaled_decode: bool = True
    batch_size: int | None = None
    actors: int | None = None

    @property
    def variant(self) -> "Configuration":
        """What decides its rows, and therefore its accuracy."""
        return replace(self, batch_size=None, actors=None)

    @property
    def name(self) -> str:
        """For a reader; also of files, where it is a variant's."""
        size = self.imgsz and (str(self.imgsz[0]) if len(set(self.imgsz)) == 1 else "x".join(map(str, self.imgsz)))
        parts = [
            Path(self.model).name,
            *([] if self.format == PYTORCH else [self.format.replace(":", " ")]),
            *([] if self.precision == "auto" else [self.precision]),
            *([size] if size else []),
            *([] if self.scaled_decode else ["full decode"]),
            *([f"batch {self.batch_size}"] if self.batch_size else []),
            *([f"{self.actors} actors"] if self.actors else []),
        ]
        return " ".join(parts)

    def settings(self, path: str, gpus: float) -> dict[str, Any]:
        """As jobs.annotate names them, without what is a default. path: of the model or its export. gpus: of the
        cluster."""
        found: dict[str, Any] = {"yolo": path}
        if self.imgsz:
            height, width = self.imgsz
            found["imgsz"] = height if height == width else [height, width]
        if self.precision != "auto":
            found["precision"] = self.precision
        if not self.scaled_decode:
            found["scaled_decode"] = False
        if self.batch_size:
            found["batch_size"] = self.batch_size
        if self.actors:
            found["yolo_actors"] = str(self.actors)
            if gpus:
                found["gpus_per_actor"] = min(1.0, gpus / self.actors)
        return found


def as_yaml(settings: dict[str, Any], gpus: float, comment: str) -> str:
    """best.yaml, which `jobs.annotate --config` and `serve run` take. settings: of `Configuration.settings`."""
    of_jobs = ("yolo_actors", "gpus_per_actor")
    arguments = {name: value for name, value in settings.items() if name not in of_jobs}
    if gpus:
        arguments |= {"gpus": settings.get("gpus_per_actor", 1.0), "replicas": int(settings.get("yolo_actors", gpus))}
    application = {"name": "shardsight", "route_prefix": "/", "import_path": "serve.app:app", "args": arguments}
    content = {"configuration": settings, "applications": [application]}
    return f"# {comment}\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Space:
    """What is tried. own: size, by model. formats, sizes, precisions: by model, its own first. left_out: why some usual
    export is not."""

    own: dict[str, Size]
    formats: dict[str, list[str]]
    sizes: dict[str, list[Size | None]]
    precisions: dict[str, list[str]]
    decodes: list[bool]
    batch_sizes: list[int | None]
    actors: list[int | None]
    left_out: list[str]

    def variants(self) -> list[Configuration]:
        """All that differ in their rows; the defaults are the first."""
        return [
            Configuration(model, format, size if format == PYTORCH else size or self.own[model], precision, decode)
            for model, formats in self.formats.items()
            for format in formats
            for size in self.sizes[model]
            for precision in (self.precisions[model] if format == PYTORCH else ["auto"])
            for decode in self.decodes
        ]

    def loads(self, variant: Configuration) -> list[Configuration]:
        """The same variant with other batch sizes and actors."""
        found = [
            replace(variant, batch_size=batch, actors=count) for batch in self.batch_sizes for count in self.actors
        ]
        return [one for one in found if one != variant]


def space_of(settings: Settings, infos: dict[str, YoloInfo], gpus: float, usual: int, fits: Sequence[int]) -> Space:
    """What the settings ask for on this cluster. usual: actors of a job; fits: other numbers that it has room for."""
    cuda = gpus > 0
    exports = [one for one in settings.format or _EXPORTS[cuda] if one != PYTORCH]
    lacking = {one: None if settings.format else missing(*one.split(":")) for one in exports}
    exports = [one for one in exports if not lacking[one]]
    precisions = ["auto", *(one for one in settings.precision or ["fp32"] if one != automatic(cuda))]
    batches = settings.batch_size or [BATCH[cuda] // 2, 2 * BATCH[cuda], 4 * BATCH[cuda]]
    weights = {model for model, info in infos.items() if info.path.endswith(".pt")}
    return Space(
        own={model: info.input.imgsz for model, info in infos.items()},
        formats={model: [PYTORCH, *(exports if model in weights else [])] for model in infos},
        sizes={model: _sizes(settings, info) for model, info in infos.items()},
        precisions={model: precisions if model in weights else ["auto"] for model in infos},
        decodes=[True, *([False] if "full" in (settings.decode or ["full"]) else [])],
        batch_sizes=[None, *(one for one in batches if one != BATCH[cuda])],
        actors=[None, *(one for one in settings.actors or fits if one != usual)],
        left_out=[reason for reason in lacking.values() if reason],
    )


def _sizes(settings: Settings, info: YoloInfo) -> list[Size | None]:
    height, width = info.input.imgsz
    if not (info.path.endswith(".pt") or getattr(info.input, "minimal", False)):
        return [None]  # an export of one size
    asked = [(side, side) for side in settings.imgsz]
    asked = asked or [(_shrunk(height, share), _shrunk(width, share)) for share in _SHARES]
    return [None, *(size for size in dict.fromkeys(asked) if size != (height, width))]


def _shrunk(side: int, share: float) -> int:
    return max(32, round(side * share / 32) * 32)
