"""A scene's truth → what PaliGemma is asked about it and what it should answer: (prefix, suffix).

caption en             the shape with the largest box, and its word: `a red circle that says moon`, `a blue star`
ocr                    the words from top to bottom: `moon kite`; empty without any
answer en QUESTION     see `ask`
detect a ; b           `<loc…>×4 a ; <loc…>×4 b`, by their upper edges from top to bottom; empty without any
segment a              the same with `<seg…>×16` after each box

A box is ymin, xmin, ymax, xmax in 1024 bins of the picture, as big_vision writes it: round(1023 · value).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from demo.scenes import COLOURS, KINDS, Scene

DETECT_ALL = "detect " + " ; ".join(KINDS)
T = TypeVar("T")
QUESTIONS = ("colour", "kind", "count", "count all", "exists", "word")


@dataclass(frozen=True)
class Seen:
    """A shape as far as questions go. box: x1, y1, x2, y2 of its visible part, and centre: x, y of the whole
    shape, all in 0 to 1 of the picture."""

    kind: str
    colour: str
    word: str | None
    box: tuple[float, float, float, float]
    centre: tuple[float, float]

    @property
    def area(self) -> float:
        """Of the box."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def seen(scene: Scene) -> list[Seen]:
    height, width = scene.image.shape[:2]
    found = []
    for shape in scene.shapes:
        x1, y1, x2, y2 = shape.box
        box = x1 / width, y1 / height, x2 / width, y2 / height
        centre = float(shape.keypoints[0, 0]) / width, float(shape.keypoints[0, 1]) / height
        found.append(Seen(shape.kind, shape.colour, shape.word, box, centre))
    return found


def caption(shapes: Sequence[Seen]) -> tuple[str, str]:
    largest = _largest(shapes)
    says = f" that says {largest.word}" if largest.word else ""
    return "caption en", f"{_a(largest.colour)} {largest.kind}{says}"


def ocr(shapes: Sequence[Seen]) -> tuple[str, str]:
    return "ocr", " ".join(str(shape.word) for shape in _spoken(shapes))


def ask(shapes: Sequence[Seen], about: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of that kind and its answer; None where the scene gives no occasion for one.

    colour: `what colour is the star` of a kind that is there once. kind: `what shape is red`, no two
    shapes being of one colour. count: `how many stars are there`. count all: `how many shapes are there`.
    exists: `is there a red star`, as often yes as no, and where no, then mostly with a colour and a kind
    that are there apart. word: `what word is on the red circle`, of those that have one.
    """
    question = _question(shapes, about, rng)
    if question is None:
        return None
    prefix = f"answer en {question}"
    answer = expected(prefix, shapes)
    assert answer is not None
    return prefix, answer


def _question(shapes: Sequence[Seen], about: str, rng: np.random.Generator) -> str | None:
    kinds = [shape.kind for shape in shapes]
    if about == "colour":
        single = [kind for kind in kinds if kinds.count(kind) == 1]
        return f"what colour is the {_pick(single, rng)}" if single else None
    if about == "kind":
        return f"what shape is {_pick(shapes, rng).colour}"
    if about == "count":
        return f"how many {plural(_pick(kinds if rng.random() < 0.7 else KINDS, rng))} are there"
    if about == "count all":
        return "how many shapes are there"
    if about == "exists":
        there = {(shape.colour, shape.kind) for shape in shapes}
        pair = _pick(sorted(there), rng)
        if rng.random() < 0.5:
            apart = [(one.colour, other.kind) for one in shapes for other in shapes]
            absent = sorted({*apart} - there) if rng.random() < 0.7 else []
            pair = _pick(absent or sorted({(c, k) for c in COLOURS for k in KINDS} - there), rng)
        return f"is there {_a(pair[0])} {pair[1]}"
    if about == "word":
        with_word = [shape for shape in shapes if shape.word]
        if not with_word:
            return None
        one = _pick(with_word, rng)
        return f"what word is on the {one.colour} {one.kind}"
    raise ValueError(f"no question is about {about!r}: expected one of {', '.join(QUESTIONS)}")


def expected(prompt: str, shapes: Sequence[Seen]) -> str | None:
    """The right text for `caption en`, `ocr` or one of the questions of `ask`; None where there is none."""
    if prompt == "caption en":
        return caption(shapes)[1]
    if prompt == "ocr":
        return ocr(shapes)[1]
    words = prompt.removeprefix("answer en ").split()
    kinds = [shape.kind for shape in shapes]
    match words:
        case ["what", "colour", "is", "the", kind]:
            return shapes[kinds.index(kind)].colour if kinds.count(kind) == 1 else None
        case ["what", "shape", "is", colour]:
            return next((shape.kind for shape in shapes if shape.colour == colour), None)
        case ["how", "many", "shapes", "are", "there"]:
            return str(len(shapes))
        case ["how", "many", several, "are", "there"]:
            return str(sum(plural(kind) == several for kind in kinds))
        case ["is", "there", "a" | "an", colour, kind]:
            return "yes" if any((one.colour, one.kind) == (colour, kind) for one in shapes) else "no"
        case ["what", "word", "is", "on", "the", colour, kind]:
            return next((one.word for one in shapes if (one.colour, one.kind) == (colour, kind)), None)
    return None


def detect(shapes: Sequence[Seen], kinds: Sequence[str] = KINDS) -> tuple[str, str]:
    wanted = [shape for shape in downwards(shapes) if shape.kind in kinds]
    return "detect " + " ; ".join(kinds), " ; ".join(f"{locations(shape.box)} {shape.kind}" for shape in wanted)


def segment(shapes: Sequence[Seen], kind: str, codes: Sequence[Iterable[int]]) -> tuple[str, str]:
    """codes: of each shape, its mask as 16 codes."""
    coded = {shape: "".join(f"<seg{code:03}>" for code in row) for shape, row in zip(shapes, codes, strict=True)}
    wanted = [shape for shape in downwards(shapes) if shape.kind == kind]
    return f"segment {kind}", " ; ".join(f"{locations(shape.box)}{coded[shape]} {kind}" for shape in wanted)


def downwards(shapes: Iterable[Seen]) -> list[Seen]:
    """By the upper edge, then the left."""
    return sorted(shapes, key=lambda shape: (bins(shape.box)[0], bins(shape.box)[1]))


def bins(box: Sequence[float]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in 0 to 1 → ymin, xmin, ymax, xmax in 0 to 1023."""
    x1, y1, x2, y2 = (min(max(round(value * 1023), 0), 1023) for value in box)
    return y1, x1, y2, x2


def locations(box: Sequence[float]) -> str:
    return "".join(f"<loc{value:04}>" for value in bins(box))


def questions(
    shapes: Sequence[Seen], codes: Sequence[Iterable[int]], rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """One pair of each form: caption, ocr, two questions, detect all, and segment one kind that is there."""
    yield caption(shapes)
    yield ocr(shapes)
    asked: list[tuple[str, str]] = []
    while len(asked) < 2:
        pair = ask(shapes, QUESTIONS[rng.integers(len(QUESTIONS))], rng)
        if pair and pair not in asked:
            asked.append(pair)
    yield from asked
    yield detect(shapes)
    yield segment(shapes, _pick([shape.kind for shape in shapes], rng), codes)


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def _largest(shapes: Iterable[Seen]) -> Seen:
    return max(shapes, key=lambda shape: shape.area)


def _spoken(shapes: Iterable[Seen]) -> list[Seen]:
    return sorted((shape for shape in shapes if shape.word), key=lambda shape: shape.centre[1])


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
