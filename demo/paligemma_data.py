"""Scenes drawn once at the model's input size, with the truth that its training needs."""

import json
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from demo.questions import Seen, seen
from demo.scenes import Shape, scene
from demo.writers import jpeg, mask_crops

SIZE = 336  # of the square picture that the model sees, pixels
OWNERS = 84  # cells a side of the map that says which shape is seen where
PER_SHARD = 250


@dataclass(frozen=True)
class Drawn:
    """image: RGB uint8 (SIZE, SIZE, 3). owners: uint8 (OWNERS, OWNERS), 1 + the shape that is seen there, or 0.
    words: of each shape x1, y1, x2, y2 of its printed word in 0 to 1, or None.
    masks: uint8 (n, 64, 64), each shape's visible part within its box, 255 inside."""

    image: np.ndarray
    owners: np.ndarray
    shapes: list[Seen]
    words: list[tuple[float, float, float, float] | None]
    masks: np.ndarray


def draw(index: int, seed: int) -> Drawn:
    """As a job would see it: through JPEG, and squashed, by one of the methods that resize pictures."""
    made = scene(index, seed)
    rng = np.random.default_rng([seed, index, 1])
    height, width = made.image.shape[:2]
    picture = simplejpeg.decode_jpeg(jpeg(made), fastdct=bool(rng.random() < 0.5))
    if rng.random() < 0.7:
        image = np.array(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    else:
        image = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    owners = np.zeros((height, width), np.uint8)
    for number, shape in enumerate(made.shapes, 1):
        owners[shape.mask] = number
    return Drawn(
        image,
        cv2.resize(owners, (OWNERS, OWNERS), interpolation=cv2.INTER_NEAREST),
        seen(made),
        [word_box(shape, width, height) for shape in made.shapes],
        mask_crops(made),
    )


def word_box(shape: Shape, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Where scenes.py printed the word, from the same sizes."""
    if shape.word is None:
        return None
    (x, y), top = shape.keypoints[0, :2], shape.keypoints[1, :2]
    side = float(np.hypot(*(top - (x, y)))) / (0.45 if shape.kind == "square" else 0.5)
    room = {"square": 0.7, "circle": 0.7, "cross": 0.8}[shape.kind]
    (w, h), _ = cv2.getTextSize(shape.word, cv2.FONT_HERSHEY_DUPLEX, 1, 1)
    scale = min(room * side / w, (0.28 if shape.kind == "cross" else 0.5) * side / h)
    w, h = w * scale / 2, h * scale / 2
    return (x - w) / width, (y - h) / height, (x + w) / width, (y + h) / height


def draw_shards(folder: Path, shards: range, seed: int, processes: int = 2) -> None:
    """Draw those shards of a seed that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in shards if not (folder / f"{number:05}.json").exists()]
    if not missing:
        return
    with get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(partial(_draw_shard, folder, seed), missing):
            pass


def _draw_shard(folder: Path, seed: int, number: int) -> None:
    cv2.setNumThreads(1)
    drawn = [draw(index, seed) for index in range(number * PER_SHARD, (number + 1) * PER_SHARD)]
    np.save(folder / f"{number:05}-images.npy", np.stack([one.image for one in drawn]))
    np.save(folder / f"{number:05}-owners.npy", np.stack([one.owners for one in drawn]))
    np.save(folder / f"{number:05}-masks.npy", np.concatenate([one.masks for one in drawn]))
    lines = [{"shapes": [vars(shape) for shape in one.shapes], "words": one.words} for one in drawn]
    # Last, and in one step: a shard is there when this file is.
    part = folder / f"{number:05}.part"
    part.write_text(json.dumps(lines, default=float))
    part.rename(folder / f"{number:05}.json")


class Shards:
    """Drawn scenes on the disk, by their number. New shards are seen after `refresh`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, tuple[Any, ...]] = {}
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self._folder.glob("*.json")):
            if path.stem not in self._shards:
                arrays = (np.load(f"{path.with_suffix('')}-{name}.npy", "r") for name in ("images", "owners", "masks"))
                lines = json.loads(path.read_text())
                starts = np.cumsum([0, *(len(line["shapes"]) for line in lines)])
                self._shards[path.stem] = (*arrays, lines, starts)
        self._order = list(self._shards.values())

    def __len__(self) -> int:
        return len(self._order) * PER_SHARD

    def __getitem__(self, number: int) -> Drawn:
        images, owners, masks, lines, starts = self._order[number // PER_SHARD]
        at = number % PER_SHARD
        line = lines[at]
        shapes = [
            Seen(one["kind"], one["colour"], one["word"], tuple(one["box"]), tuple(one["centre"]))
            for one in line["shapes"]
        ]
        words = [tuple(box) if box else None for box in line["words"]]
        return Drawn(images[at], owners[at], shapes, words, masks[starts[at] : starts[at + 1]])
