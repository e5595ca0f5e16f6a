"""What is known of a model before it is loaded, so that the driver stays free of torch."""

import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from shardsight.errors import UsageError
from shardsight.models.yolo.letterbox import CentreCrop, Letterbox


class ModelError(UsageError):
    """Weights that cannot be used: one sentence for the user."""


class ModelDied(Exception):
    """A model failed as a whole, by no record's fault: its process has to end, and another to be asked."""


@dataclass(frozen=True)
class ModelInfo:
    """input: what frames become for it. sha256: of the file, or of a folder's files."""

    path: str
    task: str
    names: dict[int, str]
    input: Letterbox | CentreCrop
    sha256: str


def computes_bf16() -> bool:
    """Whether this machine's CPU does."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def inspect(path: str, imgsz: int | list[int] | None = None) -> ModelInfo:
    """Load a YOLO model once, in a process of its own, and tell what it is. Raises ModelError."""
    if not Path(path).exists():
        raise ModelError(f"there are no weights at {path}: give a .pt file or an export; nothing is downloaded")
    return _inspect(path, tuple(imgsz) if isinstance(imgsz, list) else imgsz, os.stat(path).st_mtime_ns)


@lru_cache
def _inspect(path: str, imgsz: int | tuple[int, ...] | None, changed: int) -> ModelInfo:
    """Once for each state of the file: it takes seconds."""
    with tempfile.NamedTemporaryFile() as answer:
        child = "import sys, pickle; from shardsight.models.yolo.model import describe; "
        child += "describe(*pickle.loads(eval(sys.argv[1])))"
        arguments = repr(pickle.dumps((path, list(imgsz) if isinstance(imgsz, tuple) else imgsz, answer.name)))
        done = subprocess.run([sys.executable, "-c", child, arguments], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{path} cannot be loaded as a YOLO model: {last}")
        outcome = pickle.loads(Path(answer.name).read_bytes())
    if isinstance(outcome, ModelError):
        raise outcome
    assert isinstance(outcome, ModelInfo)
    return outcome
