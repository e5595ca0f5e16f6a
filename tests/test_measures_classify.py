"""Classes of whole pictures, against what is counted by hand."""

from typing import Any

import pytest

from shardsight.measures import classify
from shardsight.truth import Sample, Truth


def said(*labels: str) -> list[dict[str, Any]]:
    return [{"label": label, "score": 0.9 / (rank + 1)} for rank, label in enumerate(labels)]


def test_classes() -> None:
    """Right; second best; a class that the labels lack; nothing, of a picture that failed; and right at the sixth."""
    right = {"a": 0, "b": 4, "c": 4, "d": 0, "e": 0}
    truth = Truth("classify", {4: "dog", 0: "Cat"}, [Sample(id, class_id=n) for id, n in right.items()], {})
    found = {"a": said("cat", "dog"), "b": said("CAT", "Dog"), "c": said("cow"), "d": [], "e": said(*"uvwxy", "cat")}
    result = classify.measure(truth, found)
    assert {name: figure["value"] for name, figure in result["measures"].items()} == {"top-1": 0.2, "top-5": 0.4}
    low, high = result["measures"]["top-1"]["interval"]
    assert low == 0 and 0.2 < high < 1
    assert result["confusion"] == {"labels": ["dog", "Cat"], "counts": [[0, 1, 1], [0, 1, 2], [0, 0, 0]]}
    assert result["pictures"] == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0}
    assert [(one["name"], one["objects"], one["top-1"]) for one in result["classes"]] == [
        ("dog", 2, 0),
        ("Cat", 3, pytest.approx(1 / 3)),
    ]
    assert result["calibration"]["error"] == pytest.approx(0.9 - 0.25)
    (only,) = result["calibration"]["bins"]  # of the four that have a score
    assert only == {"score": pytest.approx(0.9), "right": 0.25, "count": 4}


def test_no_pictures_answered() -> None:
    result = classify.measure(Truth("classify", {0: "cat"}, [Sample("a", class_id=0)], {}), {})
    assert result["measures"]["top-1"]["value"] == 0 and result["calibration"] == {"error": None, "bins": []}
