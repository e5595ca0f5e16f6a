"""Pictures with something small in them are shown to the larger model."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.resolution import height
from demo.scenes import Scene, scenes
from shardsight.models.paligemma.routing import Route, lost

SIZES = (224, 448)
RULE = Route(SIZES, 224, small_box=16, lost_detail=0.08)


def box(x1: float, y1: float, x2: float, y2: float) -> dict[str, float]:
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2}


def page(height: int) -> np.ndarray:
    """Black print on white, of letters of that many pixels."""
    frame = np.full((896, 896, 3), 255, np.uint8)
    scale = height / 22  # of the font's capitals
    for y in range(60, 880, 2 * height + 8):
        cv2.putText(frame, "SMALL PRINT TO READ", (20, y), cv2.FONT_HERSHEY_DUPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return frame


def test_small_boxes_and_small_print() -> None:
    plain = np.full((896, 896, 3), 128, np.uint8)
    assert RULE.choose(plain, [], 896, 896) == 224
    assert RULE.choose(plain, [box(0, 0, 400, 64)], 896, 896) == 224  # 16 pixels of 224
    assert RULE.choose(plain, [box(0, 0, 400, 400), box(0, 0, 400, 60)], 896, 896) == 448
    assert RULE.choose(page(12), [], 896, 896) == 448
    assert RULE.choose(cv2.GaussianBlur(page(12), (0, 0), 8), [], 896, 896) == 224


def test_a_picture_that_has_no_more_to_see() -> None:
    """A crop of no more pixels than the smaller model sees goes to it, whatever it shows."""
    noise = np.random.default_rng(0).integers(0, 256, (896, 896, 3), np.uint8)
    assert RULE.choose(noise, [], 896, 896) == 448
    assert RULE.choose(noise[:112, :112], [], 112, 112) == 224


@given(st.lists(st.tuples(*[st.floats(1, 500)] * 2), max_size=4), st.integers(1, 64), st.integers(0, 20))
def test_one_of_them_takes_it(sizes: list[tuple[float, float]], small: int, detail: int) -> None:
    """Each picture has one model, and a stricter rule never sends it to a smaller one."""
    frame, boxes = page(8), [box(0, 0, *size) for size in sizes]
    chosen = []
    for smallest in (small, small + 8):
        rules = [Route((112, *SIZES), own, smallest, detail / 100) for own in (112, *SIZES)]
        (mine,) = [rule.own for rule in rules if rule.takes(frame, boxes, 512, 512)]
        chosen.append(mine)
    assert chosen[0] <= chosen[1]


def test_small_words_are_found() -> None:
    """As `benchmarks.resolution` measures: nearly all of them, and hardly a picture without words."""
    found = [(height(one), RULE.choose(one.image, [], 1, 1) == 448) for one in scenes(80, seed=9)]
    small, none = [large for tall, large in found if tall < 10], [large for tall, large in found if tall > 1000]
    assert len(small) > 5 and np.mean(small) > 0.7
    assert len(none) > 20 and np.mean(none) < 0.1


def test_what_is_lost_is_between_nothing_and_all(some_scenes: list[Scene]) -> None:
    values = [lost(scene.image, *SIZES) for scene in some_scenes]
    assert all(0 < value < 0.5 for value in values)
    assert lost(some_scenes[0].image, 448, 448) == pytest.approx(0, abs=0.01)
