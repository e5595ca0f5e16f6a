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
    # Every point, as the lines between parts are then as short as can be.
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    ring = _without_straight(_joined([contour.reshape(-1, 2) for contour in contours]))
    while len(ring) < 3:  # a pixel, or a line of them
        ring = np.concatenate([ring, ring[-1:]])
    return ring + 0.5


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Closed lines, int (n, 2) each → one, which goes to the nearest part, around it, and back, until it has been to
    all of them. The nearest first: no line crosses a hole then."""
    parts = sorted(parts, key=len)
    ring = new = parts.pop()
    best: list[tuple[float, np.ndarray, int]] = [(np.inf, ring[0], 0)] * len(
        parts
    )  # distance, from where, to which point
    while parts:
        tree = KDTree(new)
        for number, part in enumerate(parts):
            distances, nearest = tree.query(part)
            at = int(distances.argmin())
            if distances[at] < best[number][0]:
                best[number] = float(distances[at]), new[nearest[at]], at
        chosen = min(range(len(parts)), key=lambda number: best[number][0])
        new, (_, start, at) = parts.pop(chosen), best.pop(chosen)
        leave = int(np.flatnonzero((ring == start).all(1))[0])
        ring = np.concatenate([ring[: leave + 1], new[at:], new[: at + 1], ring[leave:]])
    return ring


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """Without the points at which a closed line goes straight on."""
    before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(1) <= 0
    return ring[turns | back]


def outline(mask: Mapping[str, Any]) -> np.ndarray | None:
    """`polygon` of a row's mask."""
    return polygon(decode(mask))
