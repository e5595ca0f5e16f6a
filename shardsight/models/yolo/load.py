"""Weights and exports → ultralytics' predictor, or a ModelError that says why not in one sentence."""

import pickle
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from shardsight.models.info import ModelError, weights_of
from shardsight.models.yolo.ultralytics_import import PREDICTORS, YOLO, BaseBackend, BasePredictor, MNNBackend

_TASKS = "expected a YOLO for detect, segment, classify, pose or obb"
_PACKAGES = {"paddle": "paddlepaddle", "ai_edge_litert": "ai-edge-litert"}  # of modules with other names
_NO_MODEL = "holds no network of ultralytics (a state_dict alone is not enough): give the whole model"


def load(path: Path, imgsz: int | list[int] | None, device: int | str) -> BasePredictor:
    """The predictor that ultralytics itself would use, with its model loaded, fused and in fp32.

    imgsz: the model's own by default. Raises ModelError, also for models whose results would differ from ultralytics'.
    """
    path = weights_of(path)
    try:
        predictor = _open(path, {"device": device} | ({"imgsz": imgsz} if imgsz else {}))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_why_not(path, error)) from error
    backend = predictor.model
    if backend.format == "pt" and not backend.base_model:
        raise ModelError(f"{path} {_NO_MODEL}")
    channels = getattr(backend, "channels", 3)
    if channels != 3:
        raise ModelError(f"{path} takes pictures of {channels} channels: expected a model of 3 (RGB)")
    _check_size(path, imgsz, predictor)
    return predictor


def _open(path: Path, settings: dict[str, Any]) -> BasePredictor:
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ModelError(f"{path} describes a network and holds no weights: give a .pt file or an export")
    if path.suffix.lower() == ".pt":
        _check_archive(path)
        # Under another name: ultralytics replaces some, such as yolov5n.pt, and drops apostrophes from a path.
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "model.pt"
            link.symlink_to(path.resolve())
            yolo, metadata = YOLO(str(link)), {}
    else:
        metadata = _metadata(path)
        yolo = YOLO(str(path), task=metadata.get("task"))
    _check_family(path, yolo, metadata)
    fixed = {"mode": "predict", "save": False, "verbose": False, "batch": 1, "rect": True}
    predictor = yolo._smart_load("predictor")(overrides={**yolo.overrides, **fixed, **settings})
    predictor.setup_model(model=yolo.model, verbose=False)
    predictor.setup_source([np.zeros((64, 64, 3), np.uint8)])
    if (
        path.suffix.lower() != ".pt" and "task" not in metadata
    ):  # ultralytics would guess the task and number the classes
        raise ModelError(
            f"{path} lacks its metadata, which says its task and classes: export it again with ultralytics"
        )
    return predictor


def _metadata(path: Path) -> dict[str, Any]:
    """What ultralytics wrote down about an export; of MNN's files, only their runtime reads it."""
    mnn = path.suffix.lower() == ".mnn"
    found: dict[str, Any] = MNNBackend(path, "cpu").metadata if mnn else BaseBackend.read_metadata(path)
    return found


def _check_archive(path: Path) -> None:
    """Checks the checksums, which torch does not: damaged weights would give wrong results without an error."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ModelError(f"{path} is damaged: its part {damaged} does not match its checksum; fetch it again")


def _check_family(path: Path, yolo: YOLO, metadata: dict[str, Any]) -> None:
    """Raises ModelError for families, such as RTDETR, whose preprocessing and outputs differ from YOLO's."""
    family = type(yolo).__name__
    if family == "YOLO" and "rtdetr" in str(metadata.get("description", "")).lower():
        family = "RTDETR"  # an export by an older release, whose metadata lacks `head`
    if family == "YOLO" and "fastsam" in path.stem.lower():  # by name, as ultralytics' command does
        family = "FastSAM"
    if family != "YOLO":
        raise ModelError(f"{path} is a model of the family {family}: {_TASKS}")
    if yolo._smart_load("predictor") not in PREDICTORS:
        raise ModelError(f"{path} is a model for the task {yolo.task}: {_TASKS}")


def _check_size(path: Path, imgsz: int | list[int] | None, predictor: BasePredictor) -> None:
    """Raises ModelError for another size than an export's own, which ultralytics would silently use instead."""
    sides = [imgsz] * 2 if isinstance(imgsz, int) else imgsz
    if sides and predictor.model.format != "pt" and not getattr(predictor.model, "dynamic", False):
        height, width = predictor.imgsz
        if list(sides) != [height, width]:
            raise ModelError(
                f"{path} was exported for {height},{width} pixels (height,width), not {sides[0]},{sides[1]}: "
                "leave out --imgsz, or export it again"
            )


def _why_not(path: Path, error: Exception) -> str:
    """The cause of what ultralytics raised, in one sentence, without its advice to use another model."""
    cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    weights = path.suffix.lower() == ".pt"
    if isinstance(cause, ModuleNotFoundError):
        package = _PACKAGES.get(str(cause.name), cause.name)
        return f"{path} needs the Python package {package}, which is not installed: python -m pip install {package}"
    if weights and "TorchScript archive" in str(cause):
        return f"{path} is a TorchScript export: give its file the ending .torchscript"
    if isinstance(cause, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(cause))):
        return (
            f"{path} refers to {found[1]}, which is no class of ultralytics and could run any code: give a checkpoint "
            "that ultralytics has saved, or set ULTRALYTICS_SAFE_LOAD=0 if you trust the file"
        )
    if path.is_file() and not path.stat().st_size:
        return f"{path} is empty: give a .pt file or an export"
    if weights and not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            return f"{path} is cut short, or no checkpoint at all: it begins with {stream.read(16)!r}"
    if weights and isinstance(cause, (TypeError, AttributeError)):
        return f"{path} {_NO_MODEL}"
    if "not a supported model format" in str(cause) or isinstance(cause, FileNotFoundError):
        return f"{path} is neither a .pt file nor an export that ultralytics knows by its name: {_TASKS}"
    if isinstance(cause, StopIteration):
        return f"{path} lacks the file of the model: give the whole folder of the export"
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].split(". ")[0]
    return f"{path} cannot be loaded as a YOLO model: {reason}"
