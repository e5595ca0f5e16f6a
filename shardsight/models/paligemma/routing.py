"""Which of several PaliGemmas, of different resolutions, is asked about a picture.

The lowest in which nothing is too small: no box whose shorter side is less than `small_box` pixels of the model's
input, and no texture, as of small print, that loses more contrast than `lost_detail`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

CELLS = 56  # per side of the grid over which contrast is averaged: four pixels of a 224-pixel input


@dataclass(frozen=True)
class Route:
    """Selects the pictures of one model. sizes: sides of all models' inputs, pixels, ascending. own: this model's."""

    sizes: tuple[int, ...]
    own: int
    small_box: float
    lost_detail: float

    def takes(self, frame: np.ndarray, boxes: Sequence[dict[str, Any]], width: int, height: int) -> bool:
        """frame: RGB uint8 (h, w, 3). width, height: of the picture, in whose pixels the boxes' x1 … y2 are."""
        return self.choose(frame, boxes, width, height) == self.own

    def choose(self, frame: np.ndarray, boxes: Sequence[dict[str, Any]], width: int, height: int) -> int:
        """The side of the chosen model's input."""
        share = min(
            (min((box["x2"] - box["x1"]) / width, (box["y2"] - box["y1"]) / height) for box in boxes), default=1.0
        )
        for size in self.sizes[:-1]:
            if share * size >= self.small_box and lost(frame, size, self.sizes[-1]) <= self.lost_detail:
                return size
        return self.sizes[-1]


def lost(frame: np.ndarray, size: int, larger: int) -> float:
    """The contrast, 0 to 1, that a picture's finest cell loses when resized to `size` pixels instead of `larger`."""
    if max(frame.shape[:2]) <= size:
        return 0.0
    sharp = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (larger, larger), interpolation=cv2.INTER_AREA)
    small = cv2.resize(sharp, (size, size), interpolation=cv2.INTER_AREA)
    difference = cv2.absdiff(sharp, cv2.resize(small, (larger, larger), interpolation=cv2.INTER_CUBIC))
    cells = cv2.resize(difference.astype(np.float32), (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    return float(cells.max()) / 255
