"""Tracking's measures against what is counted by hand."""

from pathlib import Path

import pytest

from shardsight.measures.tracks import Frame, read_mot, scores

LEFT, RIGHT = [0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0]
TWO: list[Frame] = [([1, 2], [LEFT, RIGHT])] * 10


def test_perfect_tracks() -> None:
    """Ids are names: others for the same objects are as good. A frame without objects is no fault."""
    truth = {"a": [*TWO, ([], [])], "b": TWO}
    found = {"a": [*[([7, 5], [LEFT, RIGHT])] * 10, ([], [])], "b": TWO}
    expected = {"HOTA": 1, "DetA": 1, "AssA": 1, "MOTA": 1, "IDF1": 1, "switches": 0}
    assert scores(truth, found) == pytest.approx(expected)


def test_swapped_ids() -> None:
    """Halfway, two objects exchange their ids: each box is found, and each track is right for half of its time."""
    found: list[Frame] = [*TWO[:5], *[([2, 1], [LEFT, RIGHT])] * 5]
    result = scores({"a": TWO}, {"a": found})
    # A match of object and id holds in 5 frames, of 10 that each is in: 5 / (10 + 10 - 5).
    expected = {"DetA": 1, "AssA": 1 / 3, "HOTA": (1 / 3) ** 0.5, "MOTA": 1 - 2 / 20, "IDF1": 0.5, "switches": 2}
    assert result == pytest.approx(expected)


def test_misses_and_false_boxes() -> None:
    """One of two objects is never found, and a box is where nothing is."""
    found: list[Frame] = [([1, 3], [LEFT, [200.0, 200.0, 210.0, 210.0]])] * 10
    result = scores({"a": TWO}, {"a": found})
    assert result == pytest.approx(
        {"DetA": 1 / 3, "AssA": 1, "HOTA": (1 / 3) ** 0.5, "MOTA": 0, "IDF1": 0.5, "switches": 0}
    )


def test_nothing_found() -> None:
    result = scores({"a": TWO}, {"a": [([], [])] * 10})
    assert result == dict.fromkeys(["HOTA", "DetA", "AssA", "MOTA", "IDF1", "switches"], 0)


def test_loose_boxes() -> None:
    """Boxes of an IoU of 0.6 count at the 12 of 19 thresholds up to it."""
    found: list[Frame] = [([1, 2], [[0.0, 0.0, 6.0, 10.0], [50.0, 0.0, 56.0, 10.0]])] * 10
    result = scores({"a": TWO}, {"a": found})
    assert result["HOTA"] == pytest.approx(12 / 19) and result["MOTA"] == result["IDF1"] == 1


def test_videos_count_by_their_objects() -> None:
    """A long video weighs more than a short one; ids of one video mean nothing in another."""
    found = {"long": TWO, "short": [([], [])]}
    result = scores({"long": TWO, "short": TWO[:1]}, found)
    assert [result["DetA"], result["MOTA"]] == pytest.approx([20 / 22, 20 / 22])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="expected tracks of a; found those of b"):
        scores({"a": TWO}, {"b": TWO})
    with pytest.raises(ValueError, match="a: expected 10 frames, found 9"):
        scores({"a": TWO}, {"a": TWO[1:]})
    with pytest.raises(ValueError, match="frame 0, counted from 0, has an id twice"):
        scores({"a": TWO[:1]}, {"a": [([1, 1], [LEFT, RIGHT])]})


def test_mot_file(tmp_path: Path) -> None:
    """Frames without a line are empty, and what is not to be considered is left out."""
    path = tmp_path / "gt.txt"
    path.write_text("1,4,10,20,30,40,1,1,0.9\n3,4,11.5,20,30,40,1,2,1\n3,5,0,0,5,5,0,1,1\n")
    assert read_mot(path, 4) == [([4], [[10, 20, 40, 60]]), ([], []), ([4], [[11.5, 20, 41.5, 60]]), ([], [])]
    with pytest.raises(ValueError, match=r"gt.txt:2: frame 3 of a video of 2 frames"):
        read_mot(path, 2)
    path.write_text("frame,id\n")
    with pytest.raises(ValueError, match=r"gt.txt:1: expected seven numbers"):
        read_mot(path, 2)
