"""Pictures flipped and cropped with their boxes and masks, and noise boxes: what changes from epoch to epoch.

All of it follows from a seed of the training, the epoch and the example, so that a training that goes on sees the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from shardsight.models.paligemma.masks import SIZE, MaskDecoder, MaskEncoder, crop
from shardsight.models.paligemma.prompts import BINS, NOISE, SEPARATOR, Prompt, encode_box, parts_of

Change = Literal["flip", "crop"]
# Left is right in a flipped picture, and the topmost in a crop may be another one.
_PLACES = re.compile(
    r"\b(left|right|top|bottom|upper|lower|middle|cent(er|re)|corner|edge|first|last)(most)?\b", re.IGNORECASE
)
LEAST_SIDE = 0.7  # of a crop, as a share of the picture's
LEAST_SEEN = 1 / 3  # of a box in a crop; with less of it, the object is left out
_TRIES = 10


@dataclass(frozen=True)
class Masks:
    """Both halves of a VQ-VAE: codes cannot be mirrored or cut, masks can."""

    encoder: MaskEncoder
    decoder: MaskDecoder

    @classmethod
    def load(cls, path: Path) -> "Masks":
        """Raises MaskError."""
        return cls(MaskEncoder.load(path), MaskDecoder.load(path))

    def decode(self, codes: Sequence[int]) -> np.ndarray:
        """bool (64, 64)"""
        return self.decoder.decode(np.array([codes]))[0] > 0

    def encode(self, mask: np.ndarray) -> tuple[int, ...]:
        return tuple(self.encoder.encode(mask[None].astype(np.float32))[0].tolist())


@dataclass(frozen=True)
class _Object:
    """box: x1, y1, x2, y2 in 0 to 1 of the picture. codes: of the mask, or none."""

    box: tuple[float, float, float, float]
    codes: tuple[int, ...]
    label: str

    def __str__(self) -> str:
        """Empty where bins leave the box no area."""
        box = encode_box(self.box, 1, 1)
        return f"{box}{''.join(f'<seg{one:03}>' for one in self.codes)} {self.label}".rstrip() if box else ""


def augment(
    frame: np.ndarray,
    prefix: str,
    answer: str,
    changes: Sequence[Change],
    random: np.random.Generator,
    masks: Masks | None,
) -> tuple[np.ndarray, str]:
    """A picture, RGB uint8 (h, w, 3), and its answer to `detect` or `segment`: perhaps mirrored, and cropped.

    Unchanged are other prompts, as text cannot be read in a mirror and a caption may tell of what a crop loses; prompts
    and answers that say where something is; and masks, where there is nothing to decode and encode them.
    """
    if not prefix.startswith(("detect ", "segment ")) or _PLACES.search(f"{prefix} {answer}"):
        return frame, answer
    objects = []
    for bins, codes, label in parts_of(answer) if answer else ():
        y1, x1, y2, x2 = (one / (BINS - 1) for one in bins)
        objects.append(_Object((x1, y1, x2, y2), codes, label))
    if any(one.codes for one in objects) and masks is None:
        return frame, answer
    downwards = answer == " ; ".join(sorted(SEPARATOR.split(answer)))
    if "flip" in changes and random.random() < 0.5:
        frame, objects = np.ascontiguousarray(frame[:, ::-1]), [_flipped(one, masks) for one in objects]
    if "crop" in changes:
        frame, objects = _cropped(frame, objects, random, masks)
    said = [text for text in map(str, objects) if text]
    return frame, " ; ".join(sorted(said) if downwards else said)


def _flipped(one: _Object, masks: Masks | None) -> _Object:
    x1, y1, x2, y2 = one.box
    codes = masks.encode(masks.decode(one.codes)[:, ::-1]) if masks and one.codes else ()
    return _Object((1 - x2, y1, 1 - x1, y2), codes, one.label)


def _cropped(
    frame: np.ndarray, objects: list[_Object], random: np.random.Generator, masks: Masks | None
) -> tuple[np.ndarray, list[_Object]]:
    """Unchanged where no crop is found that keeps any object."""
    height, width = frame.shape[:2]
    for _ in range(_TRIES):
        (w, h), places = random.uniform(LEAST_SIDE, 1, 2), random.random(2)
        x1, y1 = round(places[0] * (1 - w) * width), round(places[1] * (1 - h) * height)
        x2, y2 = max(x1 + 1, round(x1 + w * width)), max(y1 + 1, round(y1 + h * height))
        window = x1 / width, y1 / height, x2 / width, y2 / height
        kept = [inside for one in objects if (inside := _inside(one, window, masks))]
        if kept or not objects:
            return frame[y1:y2, x1:x2], kept
    return frame, objects


def _inside(one: _Object, window: tuple[float, ...], masks: Masks | None) -> _Object | None:
    """What a crop shows of an object; None for less than LEAST_SEEN."""
    x1, y1, x2, y2 = one.box
    seen = max(x1, window[0]), max(y1, window[1]), min(x2, window[2]), min(y2, window[3])
    sides = seen[2] - seen[0], seen[3] - seen[1]
    if min(sides) <= 0 or sides[0] * sides[1] < LEAST_SEEN * (x2 - x1) * (y2 - y1):
        return None
    scale = window[2] - window[0], window[3] - window[1]
    box = tuple((edge - window[n % 2]) / scale[n % 2] for n, edge in enumerate(seen))
    codes = one.codes
    if masks and codes and seen != one.box:
        part = [SIZE * (edge - one.box[n % 2]) / (x2 - x1, y2 - y1)[n % 2] for n, edge in enumerate(seen)]
        cut = crop(masks.decode(codes), part)
        if cut is None or not cut.any():
            return None
        codes = masks.encode(cut)
    return replace(one, box=(box[0], box[1], box[2], box[3]), codes=codes)


def with_noise(prefix: str, answer: str, count: int, random: np.random.Generator) -> tuple[str, int | None]:
    """(an answer to `detect` of `count` boxes, how many of them are true; None where it is not changed).

    As PaliGemma 2 was trained for detection (arXiv 2412.03555, after Pix2seq; big_vision has not published it): the
    true boxes in random order, then boxes of random coordinates with the class `noise`, which is learnt, and not where
    they are. The model then finds more, and a label's probability says how sure it is. The paper's class is the token
    <noise>, which is not among those that PaliGemma adds to Gemma's; here it is a word.
    """
    true = parts_of(answer) if answer else []
    if not prefix.startswith("detect ") or len(true) >= count or NOISE in Prompt.of(prefix).names:
        return answer, None
    said = SEPARATOR.split(answer) if true else []
    said = [said[n] for n in random.permutation(len(said))]
    for _ in range(count - len(true)):
        (y1, y2), (x1, x2) = (sorted(random.choice(BINS, 2, replace=False).tolist()) for _ in range(2))
        said.append(f"<loc{y1:04}><loc{x1:04}><loc{y2:04}><loc{x2:04}> {NOISE}")
    return " ; ".join(said), len(true)
