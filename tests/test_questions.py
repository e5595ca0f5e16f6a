"""What PaliGemma is asked about the scenes: right by the scenes' truth, and scored by it."""

from typing import Any

import numpy as np
import pytest

from demo.questions import (
    DETECT_ALL,
    QUESTIONS,
    Seen,
    ask,
    bins,
    caption,
    detect,
    expected,
    ocr,
    questions,
    seen,
    segment,
)
from demo.scenes import KINDS, Scene
from demo.score import answer_figures
from demo.writers import coco_rle

SHAPES = [
    Seen("star", "red", None, (0.5, 0.5, 1.0, 1.0), (0.75, 0.75)),
    Seen("circle", "orange", "moon", (0.1, 0.2, 0.3, 0.4), (0.2, 0.3)),
    Seen("circle", "blue", "kite", (0.6, 0.1, 0.7, 0.2), (0.65, 0.15)),
]


def test_the_forms() -> None:
    assert caption(SHAPES) == ("caption en", "a red star")
    assert caption(SHAPES[1:]) == ("caption en", "an orange circle that says moon")
    assert ocr(SHAPES) == ("ocr", "kite moon") and ocr(SHAPES[:1]) == ("ocr", "")
    assert detect(SHAPES, ["ring"]) == ("detect ring", "")
    assert detect(SHAPES)[0] == DETECT_ALL
    prefix, suffix = segment(SHAPES, "circle", [range(16), [5] * 16, [127] * 16])
    assert prefix == "segment circle"
    first, second = suffix.split(" ; ")
    assert first == "<loc0102><loc0614><loc0205><loc0716>" + "<seg127>" * 16 + " circle"
    assert second == "<loc0205><loc0102><loc0409><loc0307>" + "<seg005>" * 16 + " circle"
    assert bins((0, 0.25, 1.01, 1)) == (256, 0, 1023, 1023)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what colour is the star", "red"),
        ("what colour is the circle", None),  # there are two
        ("what colour is the ring", None),
        ("what shape is blue", "circle"),
        ("how many circles are there", "2"),
        ("how many crosses are there", "0"),
        ("how many shapes are there", "3"),
        ("is there an orange circle", "yes"),
        ("is there a red circle", "no"),
        ("what word is on the blue circle", "kite"),
        ("what word is on the red star", None),
        ("why", None),
    ],
)
def test_answers(question: str, answer: str | None) -> None:
    assert expected(f"answer en {question}", SHAPES) == answer


def test_questions_of_scenes(some_scenes: list[Scene]) -> None:
    """Each form is there, each answer is the expected one, and no kind of question has one answer only."""
    answers: dict[str, set[str]] = {about: set() for about in QUESTIONS}
    rng = np.random.default_rng(0)
    for scene in some_scenes:
        shapes = seen(scene)
        pairs = list(questions(shapes, [range(16)] * len(shapes), rng))
        forms = [prefix.split()[0] for prefix, _ in pairs]
        assert forms == ["caption", "ocr", "answer", "answer", "detect", "segment"]
        assert all(expected(prefix, shapes) == suffix for prefix, suffix in pairs[:4])
        assert pairs[4][1].count("<loc") == 4 * len(shapes) and pairs[5][1].count("<seg") >= 16
        for topic in QUESTIONS:
            pair = ask(shapes, topic, rng)
            if pair:
                answers[topic].add(pair[1])
    assert all(len(found) > 1 for found in answers.values())
    with pytest.raises(ValueError, match="weather"):
        ask(SHAPES, "weather", rng)


def right_answers(scene: Scene) -> list[dict[str, Any]]:
    height, width = scene.image.shape[:2]
    shapes = seen(scene)
    found = [
        {
            "label": shape.kind,
            "score": 0.9,
            **dict(zip(("x1", "y1", "x2", "y2"), shape.box, strict=True)),
            "mask": {"height": height, "width": width, "counts": coco_rle(shape.mask)["counts"]},
        }
        for shape in scene.shapes
    ]
    texts = ("caption en", "ocr", "answer en how many shapes are there", "answer en why")
    answers = [{"prompt": prompt, "text": expected(prompt, shapes) or "", "detections": []} for prompt in texts]
    answers.append({"prompt": DETECT_ALL, "text": "", "detections": found})
    for kind in KINDS:
        of_kind = [one for one in found if one["label"] == kind]
        answers.append({"prompt": f"segment {kind}", "text": "", "detections": of_kind})
    return answers


def test_scores(some_scenes: list[Scene]) -> None:
    """The truth scores 1; what is missing, wrong or there twice costs what it should."""
    made = [scene for scene in some_scenes if any(shape.word for shape in scene.shapes)][:8]
    answers = {scene.name: right_answers(scene) for scene in made}
    names = {"caption", "ocr", "vqa", "mask IoU", "mAP50"}
    assert answer_figures(made, answers) == dict.fromkeys(names, 1.0)

    first = answers[made[0].name]
    first[0]["text"], first[1]["text"], first[2]["text"] = "a cat", "", "9"
    lost = sum(len(answer.pop("detections")) for answer in first[5:])
    for answer in first[5:]:
        answer["detections"] = None
    first[4]["detections"] = []
    figures = answer_figures(made, answers)
    assert figures["caption"] == figures["ocr"] == figures["vqa"] == 1 - 1 / 8
    total = sum(len(scene.shapes) for scene in made)
    assert figures["mask IoU"] == pytest.approx(1 - lost / total, abs=1e-4)
    assert 0.5 < figures["mAP50"] < 1

    one = answers[made[1].name]
    masks = next(answer["detections"] for answer in one[5:] if len(answer["detections"]) == 1)
    masks.append(masks[0])  # the second has nothing left to fit
    assert answer_figures(made, answers)["mask IoU"] == figures["mask IoU"]
    assert set(answer_figures(made, {scene.name: one[:1] for scene in made})) == {"caption"}
