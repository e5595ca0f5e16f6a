"""Imports ultralytics without its side effects: network access, pip, telemetry and changes of the environment.

ultralytics reads its settings from the environment when it is first imported. They are set during that import only, and
do not override the user's. In a program that has imported ultralytics before, that program's settings remain.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch  # before ultralytics, which sets OMP_NUM_THREADS to 1

from shardsight.models.info import own_folder

_SETTINGS = {
    "YOLO_OFFLINE": "true",  # no check for a network, no download of a missing file
    "YOLO_AUTOINSTALL": "false",  # no pip install
    "YOLO_VERBOSE": "false",
    "ULTRALYTICS_SAFE_LOAD": "1",  # no code from a pickle is run
    # Not the user's own folder, to which many processes would write at the same time.
    "YOLO_CONFIG_DIR": str(own_folder()),
}


@contextmanager
def _environment() -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(_SETTINGS | before)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


with _environment():
    from ultralytics.utils import SETTINGS, IterableSimpleNamespace, downloads, nms, ops

    dict.__setitem__(SETTINGS, "sync", False)  # no telemetry; SETTINGS.update would write to a file

    from ultralytics import YOLO
    from ultralytics.engine.predictor import BasePredictor
    from ultralytics.engine.results import OBB, Boxes, Results
    from ultralytics.models.yolo.classify import ClassificationPredictor
    from ultralytics.models.yolo.detect import DetectionPredictor
    from ultralytics.models.yolo.obb import OBBPredictor
    from ultralytics.models.yolo.pose import PosePredictor
    from ultralytics.models.yolo.segment import SegmentationPredictor
    from ultralytics.nn.backends.base import BaseBackend
    from ultralytics.nn.backends.mnn import MNNBackend
    from ultralytics.trackers.track import TRACKER_MAP

__all__ = [
    "OBB",
    "PREDICTORS",
    "TRACKER_MAP",
    "YOLO",
    "BaseBackend",
    "BasePredictor",
    "Boxes",
    "IterableSimpleNamespace",
    "MNNBackend",
    "Results",
    "multi_label_nms",
    "nms",
    "ops",
]

PREDICTORS = (DetectionPredictor, SegmentationPredictor, ClassificationPredictor, PosePredictor, OBBPredictor)

# Every data set's check asks GitHub for a font, and downloads it; what is not there is not downloaded.
_is_url = downloads.is_url
downloads.is_url = lambda url, check=False: not check and _is_url(url)

# torchvision's NMS, as ultralytics uses it where torchvision is imported; importing all of torchvision takes 6 s.
_torchvision = importlib.util.find_spec("torchvision")
if _torchvision and _torchvision.origin:
    torch.ops.load_library(str(Path(_torchvision.origin).with_name("_C.so")))
    nms.TorchNMS.nms = staticmethod(torch.ops.torchvision.nms)

_non_max_suppression = nms.non_max_suppression
_multi_label: ContextVar[bool] = ContextVar("multi_label", default=False)


@contextmanager
def multi_label_nms(multi_label: bool) -> Iterator[None]:
    """Within it, and in this thread, predictors give a box for each class above `conf`, as ultralytics' `val` does,
    where multi_label; otherwise for its best class."""
    token = _multi_label.set(multi_label)
    try:
        yield
    finally:
        _multi_label.reset(token)


@functools.wraps(_non_max_suppression)
def _nms(*arguments: Any, **options: Any) -> Any:
    """Without a time limit: by default, pictures not reached within 2 s and 50 ms per picture have no detections."""
    return _non_max_suppression(*arguments, **{"multi_label": _multi_label.get(), "max_time_img": math.inf} | options)


nms.non_max_suppression = _nms
