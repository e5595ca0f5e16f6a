"""What Shardsight uses of ultralytics, imported without what ultralytics does to the process that imports it.

ultralytics reads its settings from the environment, once, when it is imported. They are set for that moment only, and
what the user has set stays as it is. Where a program has imported ultralytics before, its own settings hold.
"""

import functools
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch  # reads OMP_NUM_THREADS, which ultralytics sets to 1, and has to see what the user wants

_SETTINGS = {
    "YOLO_OFFLINE": "true",  # no probe of the network, no download in place of a file that is missing
    "YOLO_AUTOINSTALL": "false",  # no pip install
    "YOLO_VERBOSE": "false",
    "ULTRALYTICS_SAFE_LOAD": "1",  # weights are read without running code from their pickle
    # Not the user's own, which many processes would write at the same time.
    "YOLO_CONFIG_DIR": os.path.join(tempfile.gettempdir(), f"shardsight-{os.getuid()}"),
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
    from ultralytics.utils import SETTINGS, nms

    dict.__setitem__(SETTINGS, "sync", False)  # no telemetry; ultralytics' own way would write it to the user's file

    from ultralytics import YOLO
    from ultralytics.engine.predictor import BasePredictor
    from ultralytics.engine.results import Results
    from ultralytics.models.yolo.classify import ClassificationPredictor
    from ultralytics.models.yolo.detect import DetectionPredictor
    from ultralytics.models.yolo.obb import OBBPredictor
    from ultralytics.models.yolo.pose import PosePredictor
    from ultralytics.models.yolo.segment import SegmentationPredictor
    from ultralytics.nn.backends.base import BaseBackend

__all__ = ["PREDICTORS", "YOLO", "BaseBackend", "BasePredictor", "Results", "nms"]

PREDICTORS = (DetectionPredictor, SegmentationPredictor, ClassificationPredictor, PosePredictor, OBBPredictor)

# torchvision's NMS, which ultralytics prefers to its own where it can; importing all of torchvision takes 6 s.
_torchvision = importlib.util.find_spec("torchvision")
if _torchvision and _torchvision.origin:
    torch.ops.load_library(str(Path(_torchvision.origin).with_name("_C.so")))
    nms.TorchNMS.nms = staticmethod(torch.ops.torchvision.nms)
# By default it gives up after 2 s and 50 ms a picture, and returns the pictures it did not reach as empty.
nms.non_max_suppression = functools.partial(nms.non_max_suppression, max_time_img=math.inf)
