"""Exports a YOLO by ultralytics, in a process of its own: exporters change global state, and some crash.

The process is `python -m shardsight.models.yolo.export REQUEST`, with REQUEST in JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shardsight.models.info import ModelError, answer
from shardsight.models.yolo.formats import PRECISIONS

# Telemetry of exporters; without the module they go on. MNN's also runs `pip install`.
_BLOCKED = ("MNN.tools.utils.log", "openvino_telemetry")


def export(weights: Path, target: Path, format: str, precision: str, options: dict[str, Any]) -> Path:
    """Export a .pt file that `info.inspect` has accepted; returns the file or folder, `target` with an ending.

    target: its folder and the start of its name. options: of ultralytics' `export`, besides format and precision.
    Raises ModelError with the exporter's reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.pt"  # ultralytics downloads another model for a name such as yolov5n.pt
        shutil.copy(weights, copy)
        request = {"weights": str(copy), "format": format, "quantize": PRECISIONS[precision], "options": options}
        command = [sys.executable, "-m", "shardsight.models.yolo.export", json.dumps(request)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", env=_environment())
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{format} {precision}: its process ended with code {done.returncode}: {last}")
        found = json.loads(lines[-1])
        if "error" in found:
            raise ModelError(f"{format} {precision}: {found['error']}")
        made = Path(found["path"])
        path = target.with_name(target.name + made.name.removeprefix(copy.stem).replace("_int8", ""))
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        shutil.move(made, path)
    return path


def _environment() -> dict[str, str]:
    """With this library importable from another folder, as where it runs from the repository."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _run(weights: str, format: str, quantize: int | str, options: dict[str, Any]) -> str:
    sys.modules.update(dict.fromkeys(_BLOCKED))  # type: ignore[arg-type]
    import torch

    from shardsight.models.yolo.ultralytics_import import YOLO

    device = 0 if torch.cuda.is_available() else "cpu"
    return str(YOLO(weights).export(format=format, quantize=quantize, device=device, **options))


def _main(request: str) -> dict[str, Any]:
    """`path`. Raises ModelError, also for what exporters raise."""
    try:
        return {"path": _run(**json.loads(request))}
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(f"{type(error).__name__}: {lines[0].removeprefix('ERROR ❌️ ')}") from error


if __name__ == "__main__":
    answer(lambda: _main(sys.argv[1]))
