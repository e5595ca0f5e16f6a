"""How a picture of any size becomes YOLO's input, pixel for pixel as in ultralytics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

GREY = 114


@dataclass(frozen=True)
class Placement:
    """Where a picture of `width` × `height` lies in the model's input.

    It is scaled to `inner` and lies at (`left`, `top`) in an input of size `outer`; both are (width, height), pixels.
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

    minimal: pad only to the next multiple of the stride, as ultralytics does for a single picture; otherwise to imgsz,
    for exports of a fixed size.
    """

    imgsz: tuple[int, int]
    stride: int = 32
    minimal: bool = True

    def place(self, width: int, height: int) -> Placement:
        full_height, full_width = self.imgsz
        ratio = min(full_height / height, full_width / width)
        inner = max(round(width * ratio), 1), max(round(height * ratio), 1)
        spare_x, spare_y = full_width - inner[0], full_height - inner[1]
        if self.minimal:
            spare_x, spare_y = spare_x % self.stride, spare_y % self.stride
        outer = inner[0] + spare_x, inner[1] + spare_y
        return Placement(width, height, inner, outer, round(spare_x / 2 - 0.1), round(spare_y / 2 - 0.1))

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        inner = self.place(width, height).inner
        return min(inner[0], width), min(inner[1], height)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        inner = self.place(width, height).inner
        if frame.shape[1] <= inner[0] and frame.shape[0] <= inner[1]:
            return frame
        return cv2.resize(frame, inner, interpolation=cv2.INTER_LINEAR)

    def canvas(self, frames: Sequence[np.ndarray], placements: Sequence[Placement]) -> np.ndarray:
        """RGB uint8 frames (h, w, 3) of any scale, with the same `outer` → uint8 (n, outer height, outer width, 3)."""
        width, height = placements[0].outer
        canvas = np.empty((len(frames), height, width, 3), np.uint8)
        for frame, placed, slot in zip(frames, placements, canvas, strict=True):
            self.draw(frame, placed, slot)
        return canvas

    def draw(self, frame: np.ndarray, placed: Placement, canvas: np.ndarray) -> None:
        """Draw `frame`, RGB uint8 (h, w, 3) of any scale, on `canvas`, uint8 (outer height, outer width, 3)."""
        width, height = placed.inner
        if frame.shape[:2] != (height, width):
            frame = cv2.resize(frame, placed.inner, interpolation=cv2.INTER_LINEAR)
        canvas[:] = GREY
        canvas[placed.top : placed.top + height, placed.left : placed.left + width] = frame


@dataclass(frozen=True)
class CentreCrop:
    """A classifier's input: the shorter side scaled to imgsz, (height, width), and the centre cropped."""

    imgsz: tuple[int, int]

    def place(self, width: int, height: int) -> Placement:
        return Placement(width, height, (width, height), self.imgsz[::-1], 0, 0)

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, max(self.imgsz) / min(width, height))
        return math.ceil(width * scale), math.ceil(height * scale)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """Unchanged: torchvision's antialiased resizing, which the model was trained with, needs every pixel."""
        return frame
