"""What is known of a model before it is loaded, so that the driver stays free of torch."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from shardsight.letterbox import CentreCrop, Letterbox


class ModelError(Exception):
    """Weights that cannot be used: one sentence for the user."""


@dataclass(frozen=True)
class ModelInfo:
    """input: what frames become for it. sha256: of the file, or of a folder's files."""

    path: str
    task: str
    names: dict[int, str]
    input: Letterbox | CentreCrop
    sha256: str


def inspect(path: str, imgsz: int | list[int] | None = None) -> ModelInfo:
    """Load a YOLO model once, in a process of its own, and tell what it is. Raises ModelError."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_inspect, path, imgsz).result()


def _inspect(path: str, imgsz: int | list[int] | None) -> ModelInfo:
    from shardsight.yolo import Yolo

    return Yolo(path, imgsz=imgsz, precision="fp32").info()
