"""Which of several resolutions of a PaliGemma a picture is shown to.

The lowest does, unless something in the picture is small there: a box whose shorter side is less than `small_box`
pixels of the model's input, or texture as fine as small print, whose contrast the lower resolution would lose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

PLACES = 56  # on a side of the picture, in each of which contrast is looked at: four pixels of a 224-pixel input


@dataclass(frozen=True)
class Route:
    """Picks the pictures of one of several models.

    sizes: sides of their inputs, pixels, the lowest first. own: this model's. small_box: see above.
    lost_detail: of what `lost` returns, the most that a picture may lose.
    """

    sizes: tuple[int, ...]
    own: int
    small_box: float
    lost_detail: float

    def takes(self, frame: np.ndarray, boxes: Sequence[dict[str, Any]], width: int, height: int) -> bool:
        """frame: RGB uint8 (h, w, 3), of a picture of width × height pixels, in which the boxes' x1 … y2 are."""
        return self.choose(frame, boxes, width, height) == self.own

    def choose(self, frame: np.ndarray, boxes: Sequence[dict[str, Any]], width: int, height: int) -> int:
        """The side of the input that does."""
        share = min(
            (min((box["x2"] - box["x1"]) / width, (box["y2"] - box["y1"]) / height) for box in boxes), default=1.0
        )
        for size in self.sizes[:-1]:
            if share * size >= self.small_box and lost(frame, size, self.sizes[-1]) <= self.lost_detail:
                return size
        return self.sizes[-1]


def lost(frame: np.ndarray, size: int, larger: int) -> float:
    """The contrast, 0 to 1, that the finest place of a picture has at `larger` pixels and not at `size`."""
    if max(frame.shape[:2]) <= size:
        return 0.0
    sharp = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (larger, larger), interpolation=cv2.INTER_AREA)
    small = cv2.resize(sharp, (size, size), interpolation=cv2.INTER_AREA)
    difference = cv2.absdiff(sharp, cv2.resize(small, (larger, larger), interpolation=cv2.INTER_CUBIC))
    places = cv2.resize(difference.astype(np.float32), (PLACES, PLACES), interpolation=cv2.INTER_AREA)
    return float(places.max()) / 255
