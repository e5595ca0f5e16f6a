"""How a picture of any size becomes YOLO's input: ultralytics' geometry, to the pixel."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

GREY = 114


@dataclass(frozen=True)
class Box:
    """A picture of `width` × `height` inside the input: scaled to `inner`, padded left and top, in `outer`.

    inner, outer: (width, height), pixels.
    """

    width: int
    height: int
    inner: tuple[int, int]
    outer: tuple[int, int]
    left: int
    top: int


@dataclass(frozen=True)
class Letterbox:
    """imgsz: (height, width) of the full input. stride: of the model.

    minimal: pad to the next multiple of the stride only, as ultralytics does for a picture alone;
    otherwise to the whole of imgsz, for exports of a fixed size.
    """

    imgsz: tuple[int, int]
    stride: int = 32
    minimal: bool = True

    def place(self, width: int, height: int) -> Box:
        full_height, full_width = self.imgsz
        ratio = min(full_height / height, full_width / width)
        inner = max(round(width * ratio), 1), max(round(height * ratio), 1)
        spare_x, spare_y = full_width - inner[0], full_height - inner[1]
        if self.minimal:
            spare_x, spare_y = spare_x % self.stride, spare_y % self.stride
        outer = inner[0] + spare_x, inner[1] + spare_y
        return Box(width, height, inner, outer, round(spare_x / 2 - 0.1), round(spare_y / 2 - 0.1))

    def enough(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) below which a picture would lose what the model could see."""
        inner = self.place(width, height).inner
        return min(inner[0], width), min(inner[1], height)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """The frame of a picture of width × height, no larger than it will be drawn."""
        inner = self.place(width, height).inner
        if frame.shape[1] <= inner[0] and frame.shape[0] <= inner[1]:
            return frame
        return cv2.resize(frame, inner, interpolation=cv2.INTER_LINEAR)

    def draw(self, frame: np.ndarray, box: Box, canvas: np.ndarray) -> None:
        """Lay `frame`, RGB uint8 (h, w, 3) of any scale, into `canvas`, uint8 (outer height, outer width, 3)."""
        width, height = box.inner
        canvas[:] = GREY
        part = canvas[box.top : box.top + height, box.left : box.left + width]
        if frame.shape[:2] == (height, width):
            part[:] = frame
        else:
            part[:] = cv2.resize(frame, box.inner, interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class CentreCrop:
    """The classifier's input: the shorter side scaled to imgsz, the middle cut out. imgsz: (height, width)."""

    imgsz: tuple[int, int]

    def place(self, width: int, height: int) -> Box:
        return Box(width, height, (width, height), self.imgsz[::-1], 0, 0)

    def enough(self, width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, max(self.imgsz) / min(width, height))
        return math.ceil(width * scale), math.ceil(height * scale)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """As it is: torchvision's antialiased scaling, which the model was trained on, needs all of it."""
        return frame
