"""Boxes, masks, keypoints and oriented boxes against pycocotools and ultralytics."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shardsight.errors import UsageError
from shardsight.measures import bootstrap, boxes
from shardsight.models.yolo import ultralytics_import  # noqa: F401 - before ultralytics
from shardsight.truth import Sample, Thing, Truth

from ultralytics.utils.metrics import ap_per_class, batch_probiou  # isort: skip

NAMES = {7: "cat", 3: "dog", 5: "bird"}  # not in order, as in many a file
IDS = list(NAMES)
SIZE = 320
POINTS = 5
Pictures = Mapping[str, Sequence[Mapping[str, Any]]]


def drawn(seed: int, kind: str, pictures: int = 30) -> tuple[Pictures, Pictures]:
    """Objects, and detections near them, far from them, of wrong classes and with equal scores; some pictures empty."""
    rng = np.random.default_rng(seed)
    truth: dict[str, list[Any]] = {}
    found: dict[str, list[Any]] = {}
    for number in range(pictures):
        objects = [_thing(rng, kind) for _ in range(rng.integers(0, 6))]
        detections = []
        for one in [*objects, *objects, *(_thing(rng, kind) for _ in range(rng.integers(0, 3)))]:
            if rng.random() < 0.8:
                label = NAMES[one["class_id"] if rng.random() < 0.9 else IDS[rng.integers(3)]]
                near = _moved(rng, one, kind)
                detections.append({**near, "label": label.upper(), "score": float(rng.integers(1, 21)) / 20})
        truth[f"p{number}"] = [{**one, "crowd": bool(kind != "keypoints" and rng.random() < 0.1)} for one in objects]
        found[f"p{number}"] = detections
    return truth, found


def _thing(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    x, y = rng.uniform(0, SIZE - 160, 2)
    w, h = rng.uniform(8, 150, 2)
    one = {"class_id": IDS[rng.integers(3)], "x1": x, "y1": y, "x2": x + w, "y2": y + h}
    return _with(kind, one | {"mask": None, "keypoints": None, "corners": None}, rng)


def _moved(rng: np.random.Generator, one: dict[str, Any], kind: str) -> dict[str, Any]:
    off = rng.normal(0, 0.06 * (one["x2"] - one["x1"]), 4)
    sides = {side: max(0.0, one[side] + value) for side, value in zip(("x1", "y1", "x2", "y2"), off, strict=True)}
    sides["x2"], sides["y2"] = max(sides["x2"], sides["x1"] + 2), max(sides["y2"], sides["y1"] + 2)
    return _with(kind, {**one, **sides}, rng)


def _with(kind: str, one: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    w, h = one["x2"] - one["x1"], one["y2"] - one["y1"]
    if kind == "masks":
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[int(one["y1"]) : int(one["y2"]), int(one["x1"]) : int(one["x2"])] = 1
        mask[int(one["y1"]) : int(one["y1"] + h / 3), int(one["x1"]) : int(one["x1"] + w / 3)] = 0
        encoded = coco_mask.encode(np.asfortranarray(mask))
        one = {**one, "mask": {"height": SIZE, "width": SIZE, "counts": encoded["counts"].decode()}}
        one["area"] = float(mask.sum())
    if kind == "keypoints":
        places = [(0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)]
        jitter = rng.normal(0, 0.02, (len(places), 2)) if one["keypoints"] else np.zeros((len(places), 2))
        one = {
            **one,
            "keypoints": [
                {"x": one["x1"] + w * (px + dx), "y": one["y1"] + h * (py + dy), "score": int(rng.integers(0, 3))}
                for (px, py), (dx, dy) in zip(places, jitter, strict=True)
            ],
            "area": w * h * 0.53,
        }
    return one


def truth_of(pictures: Pictures) -> Truth:
    samples = [
        Sample(
            key,
            SIZE,
            SIZE,
            [
                Thing(
                    one["class_id"],
                    (one["x1"], one["y1"], one["x2"], one["y2"]),
                    one.get("crowd", False),
                    one.get("area"),
                    mask=one.get("mask") and {"size": [SIZE, SIZE], "counts": one["mask"]["counts"]},
                    points=[(p["x"], p["y"], p["score"]) for p in one.get("keypoints") or ()] or None,
                )
                for one in things
            ],
        )
        for key, things in pictures.items()
    ]
    return Truth("detect", NAMES, samples, {}, keypoints=POINTS)


def measured(truth: Pictures, found: Pictures, kind: str = "boxes") -> dict[str, Any]:
    return boxes.measure(truth_of(truth), found, {}, kind)


def reference(truth: Pictures, found: Pictures, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """pycocotools as its users run it: ground truth as a data set, results through loadRes. All, and mAP by class."""
    keys, annotations, results = list(truth), [], []
    numbers = {name: number for number, name in NAMES.items()}
    for image, key in enumerate(keys, 1):
        for one in truth[key]:
            x, y, w, h = one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]
            made = {"id": len(annotations) + 1, "image_id": image, "category_id": one["class_id"]}
            made |= {"bbox": [x, y, w, h], "area": one.get("area", w * h), "iscrowd": int(one["crowd"])}
            annotations.append(made | _shape(one, kind))
        for one in found[key]:
            x, y, w, h = one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]
            made = {"image_id": image, "category_id": numbers[one["label"].lower()], "score": one["score"]}
            results.append(made | ({"bbox": [x, y, w, h]} if kind == "bbox" else _shape(one, kind)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image, "height": SIZE, "width": SIZE} for image in range(1, len(keys) + 1)],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.full(POINTS, 1 / POINTS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    of_classes = evaluation.eval["precision"][:, :, :, 0, -1].mean((0, 1))
    by_class = {NAMES[number]: of_classes[n] for n, number in enumerate(evaluation.params.catIds)}
    names = STATS["keypoints" if kind == "keypoints" else "bbox"]
    return {name: float(value) for name, value in zip(names, evaluation.stats, strict=False) if name}, by_class


STATS = {
    "bbox": ["mAP50-95", "mAP50", "mAP75", "small", "medium", "large", None, None, "AR"],
    "keypoints": ["mAP50-95", "mAP50", "mAP75", "medium", "large", "AR"],
}


def _shape(one: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind == "segm":
        return {"segmentation": {"size": [SIZE, SIZE], "counts": one["mask"]["counts"]}}
    if kind == "keypoints":
        points = [value for point in one["keypoints"] for value in (point["x"], point["y"], point["score"])]
        return {"keypoints": points, "num_keypoints": sum(seen > 0 for seen in points[2::3])}
    return {}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize(("kind", "coco"), [("boxes", "bbox"), ("masks", "segm"), ("keypoints", "keypoints")])
def test_equal_to_pycocotools(kind: str, coco: str, seed: int) -> None:
    """The figures that people publish, to 1e-9, with crowds, ties, wrong classes and empty pictures."""
    truth, found = drawn(seed, kind, 12)
    expected, by_class = reference(truth, found, coco)
    result = measured(truth, found, kind)
    assert result["measures"].keys() == expected.keys() | {boxes.VAL}
    for name, value in expected.items():
        mine = result["measures"][name]["value"]
        assert (-1 if mine is None else mine) == pytest.approx(value, abs=1e-9), name
    for one in result["classes"]:
        mine = one["mAP50-95"]
        assert (-1 if mine is None else mine) == pytest.approx(by_class[one["name"]], abs=1e-9), one["name"]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 40))
def test_integral_equal_to_ultralytics(seed: int, count: int) -> None:
    """Of any detections, right and wrong, the area is the one that `val` computes."""
    rng = np.random.default_rng(seed)
    right = rng.random((len(boxes.THRESHOLDS), count)) < 0.6
    scores = np.sort(rng.random(count))[::-1]
    positives = np.array([max(1, int(right.sum(axis=1).max(initial=0))), int(rng.integers(5))])
    mine = boxes.Matches(scores, right, np.zeros_like(right), np.zeros(count, int), positives)
    theirs = ap_per_class(right.T, scores, np.zeros(count), np.zeros(positives.sum()))[5]
    assert mine.integral() == pytest.approx(theirs[0], abs=1e-9)


def test_resamples_equal_to_pycocotools() -> None:
    """The interval is of the same measure: a resample's value is that of its pictures, some of them twice.

    Scores differ: of equal ones in one picture, pycocotools takes those of one copy before those of the other.
    """
    truth, found = drawn(5, "boxes")
    for number, one in enumerate(one for some in found.values() for one in some):
        one["score"] -= 1e-4 * number  # type: ignore[index]
    figure = measured(truth, found)["measures"]["mAP50-95"]
    keys = list(truth)
    for weights, value in list(zip(bootstrap.weights(len(keys)), figure["replicates"], strict=True))[:5]:
        again = [(key, copy) for key, weight in zip(keys, weights, strict=True) for copy in range(weight)]
        of_truth, of_model = ({f"{key}-{copy}": pictures[key] for key, copy in again} for pictures in (truth, found))
        assert value == pytest.approx(reference(of_truth, of_model, "bbox")[0]["mAP50-95"], abs=1e-9)
    low, high = figure["interval"]
    assert low < figure["value"] < high


def test_models_are_resampled_alike() -> None:
    """The interval of a difference would be of nothing if each model drew its own pictures."""
    truth, found = drawn(5, "boxes")
    worse = {key: [{**one, "score": one["score"] / 2} for one in some[1:]] for key, some in found.items()}
    first, second = (measured(truth, some)["measures"]["mAP50-95"]["replicates"] for some in (found, worse))
    assert np.corrcoef(first, second)[0, 1] > 0.5


def turned(rng: np.random.Generator, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Oriented boxes as x, y, w, h, angle (n, 5) and as corners (n, 8)."""
    xywhr = np.concatenate(
        [rng.uniform(50, 100, (count, 2)), rng.uniform(5, 60, (count, 2)), rng.uniform(-1.5, 1.5, (count, 1))], 1
    )
    cos, sin = np.cos(xywhr[:, 4]), np.sin(xywhr[:, 4])
    first = np.stack([xywhr[:, 2] / 2 * cos, xywhr[:, 2] / 2 * sin], 1)
    second = np.stack([-xywhr[:, 3] / 2 * sin, xywhr[:, 3] / 2 * cos], 1)
    centre = xywhr[:, :2]
    sides = (first + second, first - second, -first - second, -first + second)
    return xywhr, np.concatenate([centre + side for side in sides], 1)


def test_oriented_iou_is_that_of_ultralytics() -> None:
    xywhr, corners = turned(np.random.default_rng(0))
    expected = batch_probiou(torch.tensor(xywhr), torch.tensor(xywhr)).numpy()
    assert np.abs(boxes.probiou(corners, corners) - expected).max() < 1e-6


def square(x: float, **more: Any) -> dict[str, Any]:
    return {"x1": x, "y1": 0.0, "x2": x + 100, "y2": 100.0, "mask": None, "keypoints": None, "corners": None, **more}


def test_what_a_person_would_count() -> None:
    """Two cats, of which one is found, one taken for a dog; a bird where nothing is; and a label that nobody knows."""
    truth: Pictures = {
        "a": [square(0, class_id=7), square(200, class_id=7)],
        "b": [],
        "c": [square(0, class_id=3, crowd=True)],
        "d": [],
    }
    found = {
        "a": [square(0, label="cat", score=0.9), square(200, label="dog", score=0.95)],
        "b": [square(0, label=" Bird", score=0.7), square(0, label="cow", score=0.9)],
        "c": [square(0, label="dog", score=0.9)],
    }
    result = measured(truth, found)
    confusion = boxes.confusion(truth_of(truth), found, {}, 0.5)
    assert confusion["labels"] == ["cat", "dog", "bird"]
    assert confusion["counts"] == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert boxes.confusion(truth_of(truth), found, {}, 0.8)["counts"][-1] == [0, 0, 0, 0]
    # From any score up to 0.9 on, of the one class that there is: the middle of them.
    assert result["best_conf"] == pytest.approx({"conf": 0.45, "f1": 2 / 3, "precision": 1, "recall": 0.5})
    assert result["pictures"] == pytest.approx({"a": 0.5, "b": 0, "c": 1, "d": 1})
    assert [(one["name"], one["objects"]) for one in result["classes"]] == [("cat", 2), ("dog", 0), ("bird", 0)]
    assert result["classes"][0]["mAP50"] == pytest.approx(51 / 101) and result["classes"][1]["mAP50-95"] is None
    assert sum(one["count"] for one in result["calibration"]["bins"]) == 3  # neither the cow nor what is in the crowd


def test_calibration() -> None:
    """Of a score of 0.9, nine of ten should be right; here five are, and all of a score of 0.4."""
    result = boxes.calibration(np.array([0.9] * 10 + [0.4] * 5), np.array([True] * 5 + [False] * 5 + [True] * 5))
    assert result["error"] == pytest.approx((10 * 0.4 + 5 * 0.6) / 15)
    assert [(one["right"], one["count"]) for one in result["bins"]] == [(1.0, 5), (0.5, 10)]


def test_nothing_to_measure_is_no_figure() -> None:
    for kind in ("boxes", "masks", "keypoints", "oriented"):
        result = measured({"a": []}, {}, kind)
        assert result["measures"]["mAP50-95"]["value"] is None and result["measures"]["mAP50-95"]["interval"] is None
        assert result["best_conf"]["conf"] is None and result["calibration"] == {"error": None, "bins": []}
    missed = measured({"a": [square(0, class_id=7)]}, {})
    assert missed["measures"]["mAP50-95"]["value"] == 0.0 and missed["pictures"] == {"a": 0.0}


def points(count: int) -> list[dict[str, float]]:
    return [{"x": 10.0 * n, "y": 10.0, "score": 2.0} for n in range(count)]


def test_objects_without_keypoints() -> None:
    """As of persons too far away to label: they are neither to be found, nor a reason to stop."""
    truth = {"a": [square(0, class_id=7, keypoints=points(POINTS)), square(200, class_id=7)]}
    truth["b"] = [square(0, class_id=3, keypoints=points(2))]  # of a class with fewer of them
    found = {"a": [square(0, keypoints=points(POINTS), label="cat", score=0.9)]}
    found["b"] = [square(0, keypoints=points(POINTS), label="dog", score=0.9)]
    result = measured(truth, found, "keypoints")
    assert [(one["mAP50"], one["objects"]) for one in result["classes"]] == [
        (pytest.approx(1), 1),
        (pytest.approx(1), 1),
        (None, 0),
    ]


def test_keypoints_of_another_number() -> None:
    truth = {"a": [square(0, class_id=7, keypoints=points(POINTS))]}
    found = {"a": [square(0, keypoints=points(17), label="cat", score=0.9)]}
    with pytest.raises(UsageError, match="objects have 5 keypoints, and the model finds 17"):
        measured(truth, found, "keypoints")


def test_models_with_different_numbers_of_resamples_are_compared() -> None:
    """A model that finds much on many pictures has fewer: the comparison once stopped the evaluation."""
    values = np.arange(7.0)
    one, other = bootstrap.weights(7) @ values, bootstrap.weights(7, 300) @ values + 0.5
    low, high = bootstrap.between(one, other) or [0, 0]
    assert low == high == -0.5
