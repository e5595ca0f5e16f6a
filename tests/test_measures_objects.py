"""PaliGemma's answers to `detect` and `segment` against right answers in `<loc>` and `<seg>` tokens."""

from typing import Any

import numpy as np
import pytest

from shardsight.measures import objects
from shardsight.measures.objects import Decode
from shardsight.models.paligemma.masks import MaskDecoder, paste
from shardsight.models.paligemma.prompts import decode_box
from shardsight.truth import Sample, Truth
from shardsight.truth.text import objects_in
from tests.conftest import WEIGHTS

WIDTH, HEIGHT = 200, 100
SIZES = dict.fromkeys("abcd", (WIDTH, HEIGHT))
LEFT, RIGHT, WHOLE = (0, 0, 1023, 511), (0, 512, 1023, 1023), (0, 0, 1023, 1023)
CODES = tuple(range(0, 128, 8))


def told(bins: tuple[int, ...], name: str = "", codes: tuple[int, ...] = ()) -> str:
    """An object as PaliGemma writes it."""
    return "".join(f"<loc{n:04}>" for n in bins) + "".join(f"<seg{n:03}>" for n in codes) + f" {name}"


def found(bins: tuple[int, ...], label: str, score: float) -> dict[str, Any]:
    x1, y1, x2, y2 = decode_box(bins, WIDTH, HEIGHT)
    place = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "mask": None, "keypoints": None, "corners": None}
    return {"label": label, "score": score, **place}


@pytest.fixture(scope="module")
def decode() -> Decode:
    decoder = MaskDecoder.load(WEIGHTS / "paligemma" / "vae-oid.npz")
    return lambda codes, box, width, height: paste(decoder.decode(np.array([codes]))[0], box, width, height)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"{told(LEFT, 'cat')} ; {told(RIGHT, 'fat dog')}", [("cat", LEFT, ()), ("fat dog", RIGHT, ())]),
        (told(LEFT, "cat", CODES), [("cat", LEFT, CODES)]),
        (told(LEFT), [("", LEFT, ())]),
        (told(LEFT)[:-10] + " cat", []),  # three bins
        (told(LEFT, "cat", CODES[:-1]), []),
        (told((5, 5, 5, 9), "cat"), []),
        ("no cat", []),
    ],
)
def test_objects_in_answers(answer: str, expected: Any) -> None:
    assert objects_in("detect cat ; fat dog", answer) == expected


def test_a_single_name_needs_no_label() -> None:
    assert objects_in("segment the cat", told(LEFT)) == [("the cat", LEFT, ())]


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in result["measures"].items()}


def test_average_precision_of_answers() -> None:
    """Two cats, of which one is found, and surer a cat where a dog is; each prompt has its own right answers."""
    prompts = {"detect cat": [f"{told(LEFT, 'cat')} ; {told(RIGHT, 'cat')}"], "detect dog": [told(WHOLE, "dog")]}
    truth = Truth(
        "text", {}, [Sample("a", asked={**prompts, "ocr": ["x"]}), Sample("b", asked={"detect cat": [""]})], {}
    )
    said = {
        "a": {
            "detect cat": {"detections": [found(LEFT, "Cat", 0.8), found(WHOLE, "cat", 0.9)]},
            "detect dog": {"detections": [found(WHOLE, "dog", 0.7), found(WHOLE, "cow", 0.7)]},
        }
    }
    result = objects.measure(truth, said, SIZES, None)
    assert list(result) == ["boxes"]
    # Of cats, half are found, at a precision of a half: AP is 51 of 101 recalls × 1/2.
    assert values(result["boxes"])["mAP50"] == pytest.approx((1 + 51 / 101 / 2) / 2)
    assert [(one["name"], one["objects"]) for one in result["boxes"]["classes"]] == [("cat", 2), ("dog", 1)]
    assert result["boxes"]["pictures"]["b"] == 1 and 0 < result["boxes"]["pictures"]["a"] < 1


def test_iou_of_masks_that_phrases_refer_to(decode: Decode) -> None:
    """The same mask; another box; an answer that is none; no answer; and nothing where nothing is."""
    prompt = "segment the cat"
    right = {prompt: [told(LEFT, "the cat", CODES)]}
    samples = [Sample(id, asked=dict(right)) for id in "abc"] + [
        Sample("d", asked={prompt: [""]}),
        Sample("e", asked=right),
    ]
    said = {
        "a": {prompt: {"text": told(LEFT, "the cat", CODES)}},
        "b": {prompt: {"text": told(RIGHT, "the cat", CODES)}},
        "c": {prompt: {"text": "<loc0000> the cat"}},
        "d": {prompt: {"text": ""}},
    }
    truth = Truth("text", {}, samples, {})
    assert objects.measure(truth, said, SIZES, None) == {}
    result = objects.measure(truth, said, SIZES, decode)["referring"]
    assert result["pictures"] == {"a": 1, "b": 0, "c": 0, "d": 1, "e": 0}
    assert values(result) == pytest.approx({"mIoU": 2 / 5, "IoU ≥ 0.5": 2 / 5}) and result["prompts"] == 5
    low, high = result["measures"]["mIoU"]["interval"]
    assert 0 <= low < 0.4 < high <= 1


def test_all_masks_of_an_answer_count_together(decode: Decode) -> None:
    """Whatever their order: half of what is right is found, and nothing else."""
    prompt, both = "segment cats", (told(RIGHT, "cats", CODES), told(LEFT, "cats", CODES))
    truth = Truth("text", {}, [Sample("a", asked={prompt: [" ; ".join(both)]})], {})
    for answer, expected in ((" ; ".join(both[::-1]), 1), (both[0], 0.5)):
        result = objects.measure(truth, {"a": {prompt: {"text": answer}}}, SIZES, decode)["referring"]
        assert values(result)["mIoU"] == pytest.approx(expected, abs=0.01)
