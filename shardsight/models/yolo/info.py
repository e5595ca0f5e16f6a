"""What is known of a YOLO model before it is loaded, so that the driver stays free of torch."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from shardsight.models.info import ModelError
from shardsight.models.yolo.letterbox import CentreCrop, Letterbox
from shardsight.settings import Models

# What belongs to an export of one file and stands beside it: ONNX's external data, and a frozen graph's names.
_BESIDE = {".onnx": ("{}.data", "{}_data"), ".pb": ("metadata.yaml",)}


@dataclass(frozen=True)
class YoloInfo:
    """input: what frames become for it. names: label by class id.

    files: SHA-256 of all that decides its answers, by name; within the folder, of an export that is one. sha256: of
    the file, or of a folder's files together.
    """

    path: str
    task: str
    names: dict[int, str]
    input: Letterbox | CentreCrop
    files: dict[str, str]
    sha256: str


def inspect(path: str, imgsz: int | list[int] | None = None) -> YoloInfo:
    """Load a YOLO model once, in a process of its own, and tell what it is. Raises ModelError."""
    if not Path(path).exists():
        raise ModelError(f"there are no weights at {path}: give a .pt file or an export; nothing is downloaded")
    state = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in _files(Path(path)).values())
    return _inspect(path, json.dumps(imgsz), state)


def arguments(settings: Models, info: YoloInfo) -> dict[str, Any]:
    """What the class Yolo is started with."""
    names = ("conf", "iou", "max_det", "classes", "imgsz", "precision", "batch_size")
    return {"model": info.path} | {name: getattr(settings, name) for name in names}


@lru_cache
def _inspect(path: str, imgsz: str, state: tuple[tuple[str, int, int], ...]) -> YoloInfo:
    """Once for each state of the files, as it takes seconds."""
    command = [sys.executable, "-m", "shardsight.models.yolo.describe", path, imgsz]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise ModelError(f"{path} cannot be loaded as a YOLO model: {last}")
    found = json.loads(done.stdout)
    if "error" in found:
        raise ModelError(found["error"])
    sides = found["input"] | {"imgsz": tuple(found["input"]["imgsz"])}
    files = {name: _sha256(file) for name, file in _files(Path(path)).items()}
    return YoloInfo(
        path=path,
        task=found["task"],
        names={int(index): name for index, name in found["names"].items()},
        input=CentreCrop(**sides) if found["task"] == "classify" else Letterbox(**sides),
        files=files,
        sha256=_together(files) if Path(path).is_dir() else files[Path(path).name],
    )


def _files(path: Path) -> dict[str, Path]:
    """All that decides the answers of a model, by name."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    beside = [path.with_name(name.format(path.name)) for name in _BESIDE.get(path.suffix.lower(), ())]
    return {file.name: file for file in (path, *beside) if file.is_file()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _together(files: dict[str, str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
