"""Teach PaliGemma's SigLIP tower what is where, before there is any language.

Each of the picture's patches is asked, by one linear layer that is thrown away afterwards, for the shape
that it belongs to: kind, colour, box, word, place in the orders that answers are given in. That is some
thousand answers a picture where a caption has five, and is what makes hours out of days.
"""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from demo.paligemma_data import OWNERS, SIZE, Drawn
from demo.questions import Seen, downwards
from demo.scenes import COLOURS, KINDS, SIZES, WORDS

PATCH = 24
GRID = SIZE // PATCH
CELLS = OWNERS // GRID  # of the map of owners, along a patch's side
INK_CELLS = 8  # of the map of printed words, along a patch's side
NONE = -100  # torch's label for what no loss is taken of
FEW = 8  # shapes in a scene at the most

# What a patch is asked: classes of each question. Where there is a class more than there are answers, it is "none".
CLASSES = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "order": FEW,  # by the upper edge, as `detect` answers
    "order of kind": FEW,  # the same among its kind, as `segment` answers
    "words before": FEW + 1,  # its place among the words, as `ocr` answers
    "of kind": FEW,  # how many there are of its kind, less one
    "shapes": FEW,  # how many there are, less one
    "word of shape": len(WORDS) + 1,
    "word here": len(WORDS) + 1,
    "largest": 2,
    "centre": 2,  # whether the box's middle is in this patch
}
_LETTERS = 26
ASKED_BINS = 16  # patches a picture whose boxes are asked for as `<loc>` tokens too
_COLOUR_NAMES = list(COLOURS)


class Probe(nn.Module):  # type: ignore[misc]
    """tower features (n, GRID², width) → answers, by one linear layer.

    One of them is the box as the decoder will have to say it: near the embeddings of its four `<loc>` tokens,
    `table` of `losses`, (1024, table_width).
    """

    def __init__(self, width: int, table_width: int) -> None:
        super().__init__()
        self.bins = nn.Linear(width, 4 * table_width)
        self.linear = nn.Linear(width, sum(CLASSES.values()) + _LETTERS + 4)
        ys, xs = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        middles = (torch.stack([xs, ys], -1).reshape(-1, 2) + 0.5) / GRID
        self.register_buffer("middles", middles.repeat(1, 2), persistent=False)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = self.linear(features).split([*CLASSES.values(), _LETTERS, 4], -1)
        answers = dict(zip([*CLASSES, "letters", "box"], parts, strict=True))
        answers["box"] = self.middles + answers["box"]
        return answers

    def losses(
        self, features: torch.Tensor, targets: dict[str, torch.Tensor], table: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        answers = self(features)
        losses = {}
        for name in CLASSES:
            logits, labels = answers[name].flatten(0, 1), targets[name].flatten()
            if name in ("word here", "centre"):  # rare: what is there counts as much as all that is not
                there = labels != (CLASSES[name] - 1 if name == "word here" else 0)
                losses[name] = sum(
                    F.cross_entropy(logits[part], labels[part]) if part.any() else logits.sum() * 0
                    for part in (there, ~there)
                )
            else:
                losses[name] = F.cross_entropy(logits, labels, ignore_index=NONE)
        owned = targets["order"] != NONE
        found, box = answers["box"][owned], targets["box"][owned]
        losses["box"] = 10 * (found - box).abs().mean() + (1 - _generalised_iou(found, box)).mean()
        some = torch.randperm(len(box))[: ASKED_BINS * len(features)]
        corners = (box[some][:, [1, 0, 3, 2]].clamp(0, 1) * 1023).round().long()
        said = F.log_softmax(self.bins(features[owned][some]).unflatten(1, (4, -1)) @ table.T, -1)
        losses["bins"] = -(said * near_bins(corners)).sum(-1).mean()
        words = targets["word here"] != len(WORDS)
        losses["letters"] = (
            5 * F.binary_cross_entropy_with_logits(answers["letters"][words], targets["letters"][words])
            if words.any()
            else features.sum() * 0
        )
        return losses

    @torch.no_grad()
    def right(self, features: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, float]:
        """Of what is there, the part that is answered rightly; of boxes, the mean IoU."""
        answers, figures = self(features), {}
        for name, count in CLASSES.items():
            none = {"kind": count - 1, "colour": count - 1, "word of shape": count - 1, "word here": count - 1}
            none |= {"words before": count - 1, "centre": 0}
            there = (targets[name] != NONE) & (targets[name] != none.get(name, NONE))
            figures[name] = (answers[name].argmax(-1) == targets[name])[there].float().mean().item()
        owned = targets["order"] != NONE
        found, box = answers["box"][owned], targets["box"][owned]
        figures["box"] = _generalised_iou(found, box).clamp(0).mean().item()
        return figures


def near_bins(bins: torch.Tensor) -> torch.Tensor:
    """int64 (…) → (…, 1024) that sum to 1. A box that is off by a bin is nearly right: 1024 classes that know
    nothing of each other learn slowly."""
    near = torch.exp(-0.5 * ((torch.arange(1024) - bins[..., None]) / 3.0) ** 2)
    return near / near.sum(-1, keepdim=True)


def _generalised_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def area(box: torch.Tensor) -> torch.Tensor:
        return (box[..., 2:] - box[..., :2]).clamp(1e-4).prod(-1)

    inner = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1)
    outer = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)
    shared = (inner[..., 2:] - inner[..., :2]).clamp(0).prod(-1)
    union = area(a) + area(b) - shared
    return shared / union - (area(outer) - union) / area(outer)


def augment(drawn: Drawn, rng: np.random.Generator, words: bool) -> tuple[Drawn, list[tuple[str, Any]]]:
    """Cut up to a sixth off around the shapes, and change the light; with `words`, print some more of them.

    Returns the words that can be read too, with their boxes.
    """
    boxes = np.array([shape.box for shape in drawn.shapes])
    low = np.minimum(boxes[:, :2].min(0), 1 / 12) * rng.random(2) * (rng.random() < 0.7)
    high = 1 - np.minimum(1 - boxes[:, 2:].max(0), 1 / 12) * rng.random(2) * (rng.random() < 0.7)
    scale = 1 / (high - low)
    (x1, y1), (x2, y2) = np.round(low * SIZE).astype(int), np.round(high * SIZE).astype(int)
    image = cv2.resize(drawn.image[y1:y2, x1:x2], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    low, scale = np.array([x1, y1]) / SIZE, SIZE / np.array([x2 - x1, y2 - y1])
    at = ((np.arange(OWNERS) + 0.5) / OWNERS / scale[:, None] + low[:, None]) * OWNERS
    columns, rows = at.astype(int)
    owners = drawn.owners[np.ix_(rows, columns)]

    def move(point: Any) -> Any:
        return tuple(((np.reshape(point, (-1, 2)) - low) * scale).ravel().tolist())

    shapes = [Seen(one.kind, one.colour, one.word, move(one.box), move(one.centre)) for one in drawn.shapes]
    printed = [move(box) if box else None for box in drawn.words]
    readable = [(str(shape.word), box) for shape, box in zip(shapes, printed, strict=True) if box]
    light = image.astype(np.float32) * rng.uniform(0.92, 1.08) + rng.uniform(-8, 8)
    if words:
        for _ in range(rng.integers(4, 20)):
            _print_another(light, readable, rng)
    image = np.clip(light, 0, 255).astype(np.uint8)
    return Drawn(image, owners, shapes, printed, drawn.masks), readable


def _print_another(image: np.ndarray, readable: list[tuple[str, Any]], rng: np.random.Generator) -> None:
    word, (width, height) = WORDS[rng.integers(len(WORDS))], SIZES[rng.integers(len(SIZES))]
    (w, h), _ = cv2.getTextSize(word, cv2.FONT_HERSHEY_DUPLEX, 1, 1)
    scale = float(np.exp(rng.uniform(np.log(9), np.log(50)))) / h
    w, h = w * scale, h * scale
    thickness = max(1, round(scale * 1.5))
    (drawn, _), _ = cv2.getTextSize(word, cv2.FONT_HERSHEY_DUPLEX, scale, thickness)  # bold, it is wider
    stencil = np.zeros((int(h * 1.6) + 4, drawn + 4), np.uint8)
    cv2.putText(stencil, word, (2, round(h) + 2), cv2.FONT_HERSHEY_DUPLEX, scale, 255, thickness, cv2.LINE_AA)
    fx, fy = SIZE / width, SIZE / height
    stencil = cv2.resize(stencil, None, fx=fx, fy=fy, interpolation=cv2.INTER_AREA)
    rows, columns = stencil.shape
    if columns >= SIZE or rows >= SIZE:
        return
    x, y = int(rng.integers(0, SIZE - columns)), int(rng.integers(0, SIZE - rows))
    left, top, right, bottom = x + 2 * fx, y + 2 * fy, x + (2 + w) * fx, y + (2 + h) * fy
    box = left / SIZE, top / SIZE, right / SIZE, bottom / SIZE
    if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] + 0.02 and b[1] < box[3] + 0.02 for _, b in readable):
        return
    part = image[y : y + rows, x : x + columns]
    part += stencil[:, :, None] / np.float32(255) * ((250 if part.mean() < 128 else 15) - part)
    readable.append((word, box))


def targets(drawn: Drawn, readable: list[tuple[str, Any]]) -> dict[str, np.ndarray]:
    """What each patch should answer: int64 (GRID²,), with `owner`, its shape's number or -1; float32 `letters` (GRID²,
    26), `box` (GRID², 4), `outline` (GRID², CELLS²), which of its cells are its shape's, and `ink` (GRID², INK_CELLS²),
    which have print in them."""
    blocks = _blocks(drawn)
    owner = _owners(drawn, blocks)
    owned = owner >= 0
    shapes = drawn.shapes
    order = downwards(shapes)
    kinds = [shape.kind for shape in shapes]
    spoken = sorted((shape for shape in shapes if shape.word), key=lambda shape: shape.centre[1])
    largest = max(shapes, key=lambda shape: shape.area)
    of_shape = {
        "kind": [KINDS.index(kind) for kind in kinds],
        "colour": [_COLOUR_NAMES.index(shape.colour) for shape in shapes],
        "order": [order.index(shape) for shape in shapes],
        "order of kind": [[one for one in order if one.kind == shape.kind].index(shape) for shape in shapes],
        "words before": [spoken.index(shape) if shape.word else FEW for shape in shapes],
        "of kind": [kinds.count(kind) - 1 for kind in kinds],
        "word of shape": [WORDS.index(shape.word) if shape.word else len(WORDS) for shape in shapes],
        "largest": [int(shape is largest) for shape in shapes],
    }
    none = {"kind": len(KINDS), "colour": len(COLOURS)}
    found = {
        name: np.where(owned, np.array(values)[owner], none.get(name, NONE)).astype(np.int64)
        for name, values in of_shape.items()
    }
    found["shapes"] = np.full(GRID * GRID, len(shapes) - 1, np.int64)
    found["centre"] = np.zeros(GRID * GRID, np.int64)
    for shape in shapes:
        found["centre"][_patch((shape.box[0] + shape.box[2]) / 2, (shape.box[1] + shape.box[3]) / 2)] = 1
    found["box"] = np.array([shape.box for shape in shapes], np.float32)[owner]
    found["owner"] = owner.astype(np.int64)
    found["outline"] = ((blocks == owner[:, None] + 1) & owned[:, None]).astype(np.float32)
    found["ink"] = _ink(readable)
    found["word here"], found["letters"] = _words(readable)
    return found


def _patch(x: float, y: float) -> int:
    return min(int(y * GRID), GRID - 1) * GRID + min(int(x * GRID), GRID - 1)


def _blocks(drawn: Drawn) -> np.ndarray:
    """uint8 (GRID², CELLS²): the map of owners by patches."""
    return drawn.owners.reshape(GRID, CELLS, GRID, CELLS).swapaxes(1, 2).reshape(GRID * GRID, -1)


def _owners(drawn: Drawn, blocks: np.ndarray) -> np.ndarray:
    """The shape that each patch belongs to, int (GRID²,), -1 for none: of those in it the one that has the most
    of the patch or of itself there, so that a small one is not lost on a large one."""
    counts = (blocks[:, :, None] == np.arange(1, len(drawn.shapes) + 1)).sum(1)
    share = counts / np.minimum(blocks.shape[1], np.maximum(counts.sum(0), 1))
    owner = np.where(share.max(1) > 0.1, share.argmax(1), -1)
    for number, shape in enumerate(drawn.shapes):
        if not (owner == number).any():
            owner[_patch((shape.box[0] + shape.box[2]) / 2, (shape.box[1] + shape.box[3]) / 2)] = number
    return owner


def _words(readable: list[tuple[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    words = np.full((GRID, GRID), len(WORDS), np.int64)
    letters = np.zeros((GRID, GRID, _LETTERS), np.float32)
    edges = np.arange(GRID + 1) / GRID
    for word, (x1, y1, x2, y2) in readable:
        x = np.clip(np.minimum(edges[1:], x2) - np.maximum(edges[:-1], x1), 0, None)
        y = np.clip(np.minimum(edges[1:], y2) - np.maximum(edges[:-1], y1), 0, None)
        least = min(1 / GRID, x2 - x1) * min(1 / GRID, y2 - y1)
        words[np.outer(y, x) > 0.2 * least] = WORDS.index(word)
        rows = np.flatnonzero(y > 0.4 * min(1 / GRID, y2 - y1))
        for letter, place in zip(word, _LETTER_PLACES[word], strict=True):
            column = min(int((x1 + (x2 - x1) * place) * GRID), GRID - 1)
            letters[rows, column, ord(letter) - ord("a")] = 1
    return words.reshape(-1), letters.reshape(GRID * GRID, _LETTERS)


def _ink(readable: list[tuple[str, Any]]) -> np.ndarray:
    """How much of each cell is print, doubled and at most 1, as a stroke fills half of a cell at the most."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    for word, (x1, y1, x2, y2) in readable:
        stencil, wider, higher = _STENCILS[word]
        left, top = round(x1 * SIZE), round(y1 * SIZE)
        size = max(round((x2 - x1) * SIZE * wider), 1), max(round((y2 - y1) * SIZE * higher), 1)
        if left >= 0 and top >= 0:
            part = canvas[top : top + size[1], left : left + size[0]]
            print_ = cv2.resize(stencil, size, interpolation=cv2.INTER_AREA)[: part.shape[0], : part.shape[1]]
            np.maximum(part, print_, out=part)
    side = GRID * INK_CELLS
    small = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
    cells = small.reshape(GRID, INK_CELLS, GRID, INK_CELLS).swapaxes(1, 2).reshape(GRID * GRID, -1)
    return np.minimum(cells / np.float32(127), 1)


def _stencil(word: str) -> tuple[np.ndarray, float, float]:
    """The word as scenes.py prints it, and how much wider and higher that is than its box: letters are bold, and some
    hang below the line."""
    font = cv2.FONT_HERSHEY_DUPLEX
    (width, height), _ = cv2.getTextSize(word, font, 2, 1)
    (bold, _), below = cv2.getTextSize(word, font, 2, 3)
    stencil = np.zeros((height + below, bold), np.uint8)
    cv2.putText(stencil, word, (0, height), font, 2, 255, 3, cv2.LINE_AA)
    return stencil, bold / width, (height + below) / height


def _letter_places(word: str) -> list[float]:
    """The middle of each letter, of the word's width."""
    ends = [0, *(cv2.getTextSize(word[: n + 1], cv2.FONT_HERSHEY_DUPLEX, 1, 1)[0][0] for n in range(len(word)))]
    return [(a + b) / 2 / ends[-1] for a, b in pairwise(ends)]


_LETTER_PLACES = {word: _letter_places(word) for word in WORDS}
_STENCILS = {word: _stencil(word) for word in WORDS}
