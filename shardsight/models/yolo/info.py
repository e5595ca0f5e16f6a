"""What a YOLO model is, for a process that does not load torch: a subprocess loads the model and prints it as JSON.
What it prints is kept for the next time.

The subprocess is `python -m shardsight.models.yolo.info PATH IMGSZ`, with IMGSZ in JSON.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from shardsight.models.info import ModelError, answer, key_of, made_once, sha256_of, weights_of
from shardsight.models.staging import companions, stage
from shardsight.models.yolo.letterbox import CentreCrop, Letterbox
from shardsight.settings import Models
from shardsight.storage import Storage, is_remote

_FOUND = "found.json"  # what is kept of an inspected model


@dataclass(frozen=True)
class YoloInfo:
    """names: label by class id.

    files: SHA-256 of every file that its results depend on, by name; for a folder, by path within it. sha256: of the
    file, or of all the folder's digests together.
    """

    path: str
    task: str
    names: dict[int, str]
    input: Letterbox | CentreCrop
    files: dict[str, str]
    sha256: str

    @property
    def is_export(self) -> bool:
        """Whether it is anything else than weights, a .pt file."""
        return not all(name.endswith(".pt") for name in self.files)


def inspect(path: str, imgsz: int | list[int] | None = None, storage: Storage | None = None) -> YoloInfo:
    """Raises ModelError. Takes seconds for a model that this user's processes have not inspected before.

    storage: of a model in a store, of which a copy is inspected.
    """
    if is_remote(path):
        return replace(inspect(str(stage(path, storage or Storage())), imgsz), path=path)
    path = str(weights_of(Path(path)))
    if not Path(path).exists():
        raise ModelError(f"there are no weights at {path}: give a .pt file or an export; nothing is downloaded")
    state = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in _files(Path(path)).values())
    return _inspect(path, json.dumps(imgsz), state)


def arguments(settings: Models, info: YoloInfo) -> dict[str, Any]:
    """The keyword arguments for the class Yolo."""
    names = ("conf", "iou", "max_det", "classes", "imgsz", "precision", "batch_size", "track", "track_config")
    own = {"model": info.path, "files": info.files, "storage": settings.storage}
    return own | {name: getattr(settings, name) for name in names}


@lru_cache
def _inspect(path: str, imgsz: str, state: tuple[tuple[str, int, int], ...]) -> YoloInfo:
    files = {name: sha256_of(file) for name, file in _files(Path(path)).items()}
    digests = b"".join(map(bytes.fromhex, files.values()))
    key = key_of(Path(__file__).parent, Path(path).name, imgsz, files)
    known = made_once("inspected", key, lambda folder: _describe_into(folder / _FOUND, path, imgsz))
    found = json.loads((known / _FOUND).read_text())
    input = found["input"] | {"imgsz": tuple(found["input"]["imgsz"])}
    return YoloInfo(
        path=path,
        task=found["task"],
        names={int(index): name for index, name in found["names"].items()},
        input=CentreCrop(**input) if found["task"] == "classify" else Letterbox(**input),
        files=files,
        sha256=files[Path(path).name] if Path(path).is_file() else hashlib.sha256(digests).hexdigest(),
    )


def _describe_into(file: Path, path: str, imgsz: str) -> None:
    """Write what _describe finds. Raises ModelError."""
    command = [sys.executable, "-m", "shardsight.models.yolo.info", path, imgsz]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process exited with code {done.returncode}"])[-1]
        raise ModelError(f"{path} cannot be loaded as a YOLO model: {last}")
    if error := json.loads(done.stdout).get("error"):
        raise ModelError(error)
    file.write_text(done.stdout)


def _files(path: Path) -> dict[str, Path]:
    """Every file that a model's results depend on, by name."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    beside = [path.with_name(name) for name in companions(path.name)]
    return {file.name: file for file in (path, *beside) if file.is_file()}


def _describe(path: str, imgsz: str) -> dict[str, Any]:
    """`task`, `names` and `input`. Raises ModelError."""
    from shardsight.models.yolo.model import Yolo

    yolo = Yolo(path, imgsz=json.loads(imgsz), precision="fp32")
    return {"task": yolo.task, "names": yolo.names, "input": asdict(yolo.input)}


if __name__ == "__main__":
    answer(lambda: _describe(*sys.argv[1:]))
