"""Boxes and masks as the formats have them."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from scipy.spatial import KDTree

from shardsight.results.formats.sample import Box


def cut(box: Box, width: int, height: int) -> Box | None:
    """The part of a box that is in the picture; None if it has no area there."""
    x1, y1, x2, y2 = box
    x1, x2 = max(0.0, x1), min(float(width), x2)
    y1, y2 = max(0.0, y1), min(float(height), y2)
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def xywh(box: Box) -> list[float]:
    """x1, y1, x2, y2 → x1, y1, width, height, as in COCO."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def decode(mask: Mapping[str, Any]) -> np.ndarray:
    """The row's mask → uint8 (height, width), 0 or 1."""
    return coco_mask.decode({"size": [mask["height"], mask["width"]], "counts": mask["counts"].encode()})


def polygon(mask: np.ndarray) -> np.ndarray | None:
    """A mask, uint8 (height, width) → one closed polygon around it, float (n, 2), x and y in pixels; None if the mask
    is empty.

    Its corners are the centres of the mask's outermost pixels, so that cv2.fillPoly of its integer part is the mask
    again, holes included. Parts that lie apart are connected by lines, which fillPoly draws one pixel wide.
    """
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return None
    parts = sorted((contour.reshape(-1, 2) for contour in contours), key=len, reverse=True)
    ring = parts[0]
    for part in parts[1:]:
        # From the point of the ring that is nearest to the part, around the part, and back.
        distances, nearest = KDTree(ring).query(part)
        at = int(distances.argmin())
        leave = int(nearest[at])
        ring = np.concatenate([ring[: leave + 1], part[at:], part[: at + 1], ring[leave:]])
    while len(ring) < 3:  # a pixel, or a line of them
        ring = np.concatenate([ring, ring[-1:]])
    return ring + 0.5


def outline(mask: Mapping[str, Any]) -> np.ndarray | None:
    """`polygon` of a row's mask."""
    return polygon(decode(mask))
