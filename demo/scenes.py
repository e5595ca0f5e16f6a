"""Made-up scenes with their truth: shapes on textured backgrounds, the same for the same seed.

Coordinates are pixels of the picture, x to the right and y downwards; a pixel covers [x, x + 1).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np

KINDS = ("circle", "cross", "ring", "square", "star", "triangle")
COLOURS = {  # RGB
    "black": (25, 25, 28),
    "blue": (35, 80, 215),
    "green": (30, 150, 60),
    "orange": (245, 135, 20),
    "purple": (135, 50, 165),
    "red": (215, 35, 40),
    "white": (245, 245, 240),
    "yellow": (245, 220, 35),
}
WORDS = [
    "apple",
    "bird",
    "cloud",
    "door",
    "earth",
    "fire",
    "glass",
    "hill",
    "iron",
    "jazz",
    "kite",
    "lamp",
    "moon",
    "nest",
    "ocean",
    "park",
    "queen",
    "river",
    "stone",
    "tree",
    "unit",
    "voice",
    "wind",
    "yard",
    "zebra",
    "book",
    "coin",
    "dust",
    "echo",
    "farm",
]
KEYPOINTS = ("centre", "top", "right", "bottom", "left")
SIZES = ((640, 480), (480, 640), (640, 360), (512, 512), (600, 400))  # (width, height)
SMALLEST, LARGEST = 10, 300  # of a shape's side, pixels


@dataclass(frozen=True)
class Shape:
    """One shape and what of it can be seen.

    mask: bool (H, W), its visible pixels. keypoints: float32 (5, 3), x, y and COCO's visibility
    (1 hidden, 2 seen), named by KEYPOINTS. corners: float32 (4, 2), its oriented box, clockwise.
    word: what is printed on it.
    """

    kind: str
    colour: str
    word: str | None
    mask: np.ndarray
    keypoints: np.ndarray
    corners: np.ndarray

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 of the visible pixels."""
        ys, xs = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """image: RGB uint8 (H, W, 3). shapes: one to eight, the farthest first."""

    name: str
    image: np.ndarray
    shapes: list[Shape]


def scenes(count: int, seed: int = 0) -> Iterator[Scene]:
    """The first `count` scenes of a seed."""
    return (scene(index, seed) for index in range(count))


def scene(index: int, seed: int = 0) -> Scene:
    rng = np.random.default_rng([seed, index])
    width, height = SIZES[rng.integers(len(SIZES))]
    outlines = _place(rng, int(rng.integers(1, 9)), width, height)
    image = background(rng, width, height)
    shapes = []
    colours = rng.permutation(list(COLOURS)).tolist()  # no two alike, so that no outline is in doubt
    stacked = stack(outlines, width, height)
    for outline, colour, (whole, covered) in zip(outlines, colours, stacked, strict=False):
        paint(image, outline.alpha(width, height), surface(rng, colour, width, height))
        mask = whole & ~covered
        word = str(rng.choice(WORDS)) if rng.random() < 0.8 else None
        if word and not print_word(word, image, outline, mask, colour):
            word = None
        shapes.append(Shape(outline.kind, colour, word, mask, outline.keypoints(covered), outline.corners()))
    image += 3 * rng.standard_normal(image.shape, np.float32)
    image = np.clip(image, 0, 255).astype(np.uint8)
    return Scene(f"{seed:04d}-{index:06d}", image, shapes)


@dataclass(frozen=True)
class Outline:
    """A shape's place. centre, side: pixels. angle: radians, clockwise."""

    kind: str
    centre: tuple[float, float]
    side: float
    angle: float

    def place(self, points: np.ndarray) -> np.ndarray:
        """Points of the unit square [-0.5, 0.5]² → pixels, (n, 2)."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return points * self.side @ np.array([[cos, sin], [-sin, cos]]) + self.centre

    @lru_cache(maxsize=16)  # noqa: B019  (placing asks for the same few again and again)
    def alpha(self, width: int, height: int) -> np.ndarray:
        """Coverage 0 to 255, uint8 (H, W), with smooth edges."""
        canvas = np.zeros((height, width), np.uint8)
        for polygon, value in _polygons(self.kind):
            # Four bits of sub-pixels; OpenCV's pixel centres lie on whole numbers, ours on halves.
            fixed = np.round((self.place(polygon) - 0.5) * 16).astype(np.int32)
            cv2.fillPoly(canvas, [fixed], value, cv2.LINE_AA, shift=4)
        return canvas

    def corners(self) -> np.ndarray:
        points = np.concatenate([polygon for polygon, _ in _polygons(self.kind)])
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        return self.place(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])).astype(np.float32)

    def keypoints(self, covered: np.ndarray) -> np.ndarray:
        height, width = covered.shape
        points = self.place(_KEYPOINTS[self.kind])
        columns, rows = np.clip(points.astype(int), 0, (width - 1, height - 1)).T
        return np.column_stack([points, 2 - covered[rows, columns]]).astype(np.float32)


def _arc(radius: float, count: int, start: float = -np.pi / 2) -> np.ndarray:
    angles = start + np.arange(count) * 2 * np.pi / count
    return radius * np.column_stack([np.cos(angles), np.sin(angles)])


def _star() -> np.ndarray:
    points = np.empty((10, 2))
    points[0::2], points[1::2] = _arc(0.5, 5), _arc(0.22, 5, -np.pi / 2 + np.pi / 5)
    return points


_A = 1 / 6  # half the width of a cross's arm
_OUTLINES = {
    "circle": _arc(0.5, 90),
    "cross": np.array(
        [(-_A, -0.5), (_A, -0.5), (_A, -_A), (0.5, -_A), (0.5, _A), (_A, _A)]
        + [(_A, 0.5), (-_A, 0.5), (-_A, _A), (-0.5, _A), (-0.5, -_A), (-_A, -_A)]
    ),
    "ring": _arc(0.5, 90),
    "square": np.array([(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)]),
    "star": _star(),
    "triangle": np.array([(0, -0.5), (0.5, 0.4), (-0.5, 0.4)]),
}
_CROSSING = np.array([(0, 0), (0, -0.5), (0.5, 0), (0, 0.5), (-0.5, 0)])  # in the order of KEYPOINTS
_KEYPOINTS = dict.fromkeys(KINDS, _CROSSING) | {
    "square": _CROSSING * 0.9,
    "star": np.array([(0, 0), *_star()[[0, 2, 5, 8]]]),
    "triangle": np.array([(0, 0), (0, -0.5), (0.5, 0.4), (0, 0.4), (-0.5, 0.4)]),
}


def _polygons(kind: str) -> list[tuple[np.ndarray, int]]:
    hole = [(_arc(0.26, 60), 0)] if kind == "ring" else []
    return [(_OUTLINES[kind], 255), *hole]


def _place(rng: np.random.Generator, count: int, width: int, height: int) -> list[Outline]:
    """The larger lie behind the smaller, and of each at least half can be seen."""
    # Turned by 30 degrees at the most, so that a star's or a square's top is never in doubt.
    sides = sorted(rng.uniform(SMALLEST, min(LARGEST, 0.7 * min(width, height)), count), reverse=True)
    placed: list[Outline] = []
    for side in sides:
        for _ in range(30):
            kind = str(rng.choice(KINDS))
            angle = 0.0 if kind in ("circle", "ring") else rng.uniform(-np.pi / 6, np.pi / 6)
            reach = side * 0.5 * (abs(np.cos(angle)) + abs(np.sin(angle))) + 1
            centre = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            candidate = [*placed, Outline(kind, centre, side, angle)]
            stacked = stack(candidate, width, height)
            if all((whole & covered).sum() <= 0.5 * whole.sum() for whole, covered in stacked):
                placed = candidate
                break
    return placed


def stack(outlines: list[Outline], width: int, height: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each outline its pixels, and those that the outlines after it cover; bool (H, W)."""
    stacked: list[tuple[np.ndarray, np.ndarray]] = []
    covered = np.zeros((height, width), bool)
    for outline in reversed(outlines):
        whole = outline.alpha(width, height) >= 128
        stacked.append((whole, covered))
        covered = covered | whole
    return stacked[::-1]


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Muted noise of three grains and a few lines, float32 (H, W, 3)."""
    image = np.tile(rng.uniform(80, 170) + rng.uniform(-20, 20, 3), (height, width, 1)).astype(np.float32)
    for cells, strength in ((3, 25), (12, 15), (60, 8)):
        grain = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(0, strength / 3, (cells, cells, 3))
        image += cv2.resize(grain.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(0, 6)):
        ends = rng.integers(0, (width, height), (2, 2))
        shade = image.mean((0, 1)) + rng.normal(0, 25, 3)
        cv2.line(image, ends[0].tolist(), ends[1].tolist(), shade.tolist(), int(rng.integers(1, 5)), cv2.LINE_AA)
    return image


def surface(rng: np.random.Generator, colour: str, width: int, height: int) -> np.ndarray:
    """A colour, slightly off and slightly shaded across the picture, float32 (H, W, 3)."""
    shade = cv2.resize(rng.normal(0, 8, (2, 2, 1)).astype(np.float32), (width, height))
    return np.array(COLOURS[colour], np.float32) + rng.normal(0, 6, 3).astype(np.float32) + shade[:, :, None]


def paint(image: np.ndarray, alpha: np.ndarray, colours: np.ndarray) -> None:
    """Blend colours into the image, both float32 (H, W, 3), where alpha, uint8 (H, W), covers it."""
    x, y, width, height = cv2.boundingRect(alpha)
    part = np.s_[y : y + height, x : x + width]
    weight = alpha[part][:, :, None] / np.float32(255)
    image[part] += weight * (colours[part] - image[part])


def print_word(word: str, image: np.ndarray, outline: Outline, mask: np.ndarray, colour: str) -> bool:
    """Print a word over the middle of a shape; False, and no change, where it would be unreadable or partly hidden."""
    font, room = cv2.FONT_HERSHEY_DUPLEX, {"square": 0.7, "circle": 0.7, "cross": 0.8}.get(outline.kind, 0.0)
    (w, h), _ = cv2.getTextSize(word, font, 1, 1)
    scale = min(room * outline.side / w, (0.28 if outline.kind == "cross" else 0.5) * outline.side / h)
    w, h = w * scale, h * scale
    x, y = outline.centre[0] - w / 2, outline.centre[1] - h / 2
    area = mask[int(y - 2) : int(y + h + 3), int(x - 2) : int(x + w + 3)]
    if h < 9 or not area.size or area.mean() < 0.98:
        return False
    ink = np.broadcast_to(np.float32(250 if np.mean(COLOURS[colour]) < 128 else 15), image.shape)
    stencil = np.zeros(mask.shape, np.uint8)
    cv2.putText(stencil, word, (round(x), round(y + h)), font, scale, 255, max(1, round(scale * 1.5)), cv2.LINE_AA)
    paint(image, stencil, ink)
    return True
