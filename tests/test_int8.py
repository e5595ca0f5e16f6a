"""--precision int8: calibrated on a job's own pictures, checked on others, or refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from demo.scenes import scene
from demo.score import average_precision
from demo.writers import jpeg
from shardsight.decode.frames import Load
from shardsight.decode.video import Sampling
from shardsight.models import info
from shardsight.models.info import ModelError
from shardsight.models.yolo import int8
from shardsight.models.yolo.info import inspect
from shardsight.models.yolo.int8 import agreement, divided, key, sample
from shardsight.models.yolo.model import Yolo
from shardsight.sources import Listing, Unit
from shardsight.storage import Storage
from tests.clips import encode, numbered
from tests.conftest import WEIGHTS, job_of, rows_of, write_tar

Annotate = Callable[..., tuple[int, str]]
BOXES = st.tuples(st.integers(0, 2), *[st.integers(0, 50)] * 2, *[st.integers(1, 50)] * 2)


def detection(class_id: int, x: float, y: float, width: float, height: float) -> dict[str, Any]:
    return {"class_id": class_id, "x1": x, "y1": y, "x2": x + width, "y2": y + height}


PICTURES = st.lists(st.lists(BOXES.map(lambda box: detection(*box)), max_size=4), max_size=3)


@given(PICTURES, st.integers(0, 2**32))
def test_agreement_with_itself_is_whole(found: list[list[dict[str, Any]]], seed: int) -> None:
    """Whatever the order of a picture's detections; and with nothing, nothing."""
    mixed = [[one[index] for index in torch.randperm(len(one)).tolist()] for one in found]
    assert agreement(found, mixed) == (1.0 if any(found) else None)
    assert agreement(found, [[] for _ in found]) == (0.0 if any(found) else None)


def test_agreement_is_of_the_same_class_and_place() -> None:
    box = detection(1, 0, 0, 100, 100)
    near, far, other = detection(1, 10, 0, 100, 100), detection(1, 40, 0, 100, 100), detection(2, 0, 0, 100, 100)
    assert agreement([[box]], [[near]]) == 1.0
    assert agreement([[box]], [[far]]) == agreement([[box]], [[other]]) == 0.0
    assert agreement([[box]], [[near, near]]) == pytest.approx(2 / 3)  # each is found once
    assert agreement([[box], [box]], [[box], []]) == pytest.approx(2 / 3)


def rectangle(x: int, width: int) -> dict[str, Any]:
    """A mask, of a picture of 100 × 100."""
    canvas = np.zeros((100, 100), np.uint8, order="F")
    canvas[:, x : x + width] = 1
    return {"height": 100, "width": 100, "counts": rle.encode(canvas)["counts"].decode()}


def points(*xys: tuple[float, float], score: float | None = 1.0) -> list[dict[str, float | None]]:
    return [{"x": x, "y": y, "score": score} for x, y in xys]


@pytest.mark.parametrize(
    ("own", "near", "far"),
    [
        ({"mask": rectangle(0, 50)}, {"mask": rectangle(0, 45)}, {"mask": rectangle(50, 50)}),
        (
            {"keypoints": points((20, 20), (80, 80))},
            {"keypoints": points((20, 25), (85, 80))},
            {"keypoints": points((20, 45), (80, 80))},
        ),
        (  # what is out of sight lies anywhere
            {"keypoints": points((20, 20)) + points((80, 80), score=0.01)},
            {"keypoints": points((20, 20)) + points((20, 80), score=0.01)},
            {"keypoints": points((80, 20)) + points((80, 80), score=0.01)},
        ),
        (
            {"keypoints": points((20, 20), score=None)},
            {"keypoints": points((25, 25), score=None)},
            {"keypoints": points((45, 20), score=None)},
        ),
        (
            {"corners": [0, 10, 90, 100, 100, 90, 10, 0]},
            {"corners": [0, 12, 88, 100, 100, 88, 12, 0]},
            {"corners": [0, 90, 10, 100, 100, 10, 90, 0]},
        ),
    ],
    ids=["mask", "keypoints", "unseen", "no scores", "corners"],
)
def test_agreement_is_of_more_than_boxes(own: dict[str, Any], near: dict[str, Any], far: dict[str, Any]) -> None:
    """Of a network of masks, keypoints or oriented boxes, boxes alone may be right."""
    box = detection(1, 0, 0, 100, 100)
    assert agreement([[box | own]], [[box | own]]) == agreement([[box | own]], [[box | near]]) == 1.0
    assert agreement([[box | own]], [[box | far]]) == 0.0


def test_a_network_is_kept_for_its_own_pictures(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated on 20 pictures of a tar it is none for the whole tar; nor as they are decoded otherwise."""
    model, unit, load = inspect(str(detector)), Unit("parquet", "a.parquet", version="1"), Load(Storage())
    units = [replace(unit, **one) for one in ({}, {"stop": 20}, {"image_column": "b"}, {"uri_column": "b"})]
    keys = {key({}, model, [one], load) for one in units}
    others = {"scaled": False}, {"sampling": Sampling(every=2)}, {"input": model.input}
    keys |= {key({}, model, [unit], replace(load, **one)) for one in others}
    versions = info.version
    monkeypatch.setattr(info, "version", lambda name: "0" if name == "nncf" else versions(name))
    keys.add(key({}, model, [unit], load))
    assert len(keys) == 8


@pytest.mark.parametrize("kind", ["tar", "video"])
def test_a_sample_comes_from_all_over_a_file(
    tmp_path: Path, jpegs: list[bytes], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a tar that is sorted by class the first pictures show one, and a video's first seconds are one scene."""
    monkeypatch.setattr(int8, "SAMPLE", 12)
    if kind == "tar":
        write_tar(tmp_path / "a", [(f"{number}.jpg", data) for number, data in enumerate(jpegs)])
    else:
        (tmp_path / "a").write_bytes(encode(numbered(40), g="40"))
    rows = sample([Unit(kind, str(tmp_path / "a"))], Load(Storage()))
    places = [row["record" if kind == "tar" else "frame_index"] for row in rows]
    assert places == [0, 3, 7, 10, 14, 17, 21, 24, 28, 31, 35, 39]
    assert len(sample([Unit(kind, str(tmp_path / "a")), Unit(kind, "missing")], Load(Storage()))) == 6


def test_what_int8_is_checked_on_is_not_like_what_it_is_calibrated_on() -> None:
    """A video's frames are checked on a part that was not calibrated on; of many videos, on whole ones."""
    rows = [{"uri": "long", "record": 0, "frame": number} for number in range(30)]
    rows += [{"uri": f"short {number // 2}", "record": 0} for number in range(8)]
    rows += [{"uri": "tar", "record": number} for number in range(5)]
    used, checked = divided(rows)
    assert [row["frame"] for row in checked if "frame" in row] == list(range(20, 30))
    assert [row["uri"] for row in checked[10:]] == ["short 0"] * 2 + ["short 3"] * 2 + ["tar"]
    assert len(used) + len(checked) == len(rows) and not any(row in used for row in checked)


def test_a_sample_is_spread_over_all_inputs(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:04}.jpg").touch()
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).touch()
    some = Listing([str(tmp_path)], Storage()).sample(10)
    assert [Path(unit.uri).name for unit in some if unit.uri] == ["a.tar", "b.tar"]
    names = [int(Path(unit.files[0]).stem) for unit in some if not unit.uri]
    assert names == [0, 249, 499, 749, 999]
    assert len(Listing([str(tmp_path)], Storage()).sample(5000)) == 1002


def test_a_job_in_int8(tmp_path: Path, annotate: Annotate, jpegs: list[bytes], detector: Path) -> None:
    """A broken picture is not calibrated on. The network is kept with the job, which goes on with it and no other."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.jpg").write_bytes(jpegs[0][:300])
    for number, data in enumerate(jpegs[:20]):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data)
    write_tar(tmp_path / "in" / "more.tar", [(f"{number}.jpg", data) for number, data in enumerate(jpegs[20:])])
    request = tmp_path / "in", "--yolo", detector, "--max-error-rate", 1, "--output"
    code, said = annotate(*request, tmp_path / "out", "--precision", "int8")
    assert code == 0 and "calibrating int8" in said
    job = job_of(tmp_path / "out")
    found = job["models"]["yolo"]["int8"]
    assert job["exactly_once"] and found["agreement"] >= 0.9 and found["calibrated"] > found["checked"] > 10

    annotate(*request, tmp_path / "exact", "--precision", "fp32")
    both = [
        [row["detections"] or [] for row in sorted(rows_of(tmp_path / name), key=lambda row: row["id"])]
        for name in ("out", "exact")
    ]
    assert both[0] != both[1]  # it is in int8
    assert (agreement(*both) or 0) >= 0.9

    for file in (tmp_path / "out" / "results").iterdir():
        file.unlink()
    kept = (tmp_path / "out" / "int8.bin").read_bytes()
    code, said = annotate(*request, tmp_path / "out", "--precision", "int8")
    assert code == 0 and "calibrating" not in said
    again = [row["detections"] or [] for row in sorted(rows_of(tmp_path / "out"), key=lambda row: row["id"])]
    assert again == both[0]

    (tmp_path / "out" / "int8.bin").write_bytes(kept[:-1])
    code, said = annotate(*request, tmp_path / "out", "--precision", "int8")
    assert code == 2 and "int8.bin are not the network that this job began with" in said
    assert annotate(*request, tmp_path / "out", "--precision", "int8", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "int8.bin").read_bytes() == kept


def spoil(weights: Path, target: Path) -> None:
    """A network that computes as before, less one channel of its first layer, or of a pose's first layers of keypoints,
    which is now so large that int8 has no steps left for the others; the next layer does not look at it."""
    checkpoint = torch.load(weights, weights_only=False)
    layers = checkpoint["model"].float().model
    with torch.no_grad():
        for first, second, *_ in getattr(layers[-1], "cv4", [layers]):
            first.bn.weight[0], first.bn.bias[0] = 0, 1e5
            second.conv.weight[:, 0] = 0
    checkpoint["ema"] = None
    torch.save(checkpoint, target)


@pytest.mark.parametrize("weights", ["detect", "pose"])
def test_int8_that_does_not_agree_is_refused(
    tmp_path: Path, annotate: Annotate, jpegs: list[bytes], weights: str
) -> None:
    """With the figure, before a row is written. The pose's boxes are right, and its keypoints are not."""
    (tmp_path / "in").mkdir()
    for number, data in enumerate(jpegs):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data)
    spoil(WEIGHTS / f"{weights}.pt", tmp_path / "spoilt.pt")
    request = tmp_path / "in", "--yolo", tmp_path / "spoilt.pt", "--output", tmp_path / "out"
    code, said = annotate(*request, "--precision", "int8")
    assert code == 2 and "int8 agrees with fp32 on " in said and "less than 85%: choose --precision bf16" in said
    assert not (tmp_path / "out" / "job.json").exists()
    assert annotate(*request, "--precision", "fp32")[0] == 0
    assert sum(len(row["detections"]) for row in rows_of(tmp_path / "out")) > 40  # fp32 does compute


@pytest.mark.parametrize(
    ("weights", "count", "reason"),
    [("detect", 5, "only 5 of the input's pictures"), ("classify", 20, "has no int8 here")],
)
def test_what_cannot_be_calibrated(
    tmp_path: Path, annotate: Annotate, jpegs: list[bytes], weights: str, count: int, reason: str
) -> None:
    (tmp_path / "in").mkdir()
    for number, data in enumerate(jpegs[:count]):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data)
    request = tmp_path / "in", "--yolo", WEIGHTS / f"{weights}.pt", "--output", tmp_path / "out"
    code, said = annotate(*request, "--precision", "int8")
    assert code == 2 and reason in said and said.strip().count("\n") == 1  # and the line that says what it waits for


def test_weights_alone_have_no_int8(detector: Path) -> None:
    with pytest.raises(ModelError, match="is not calibrated for int8: use --precision int8 in an annotate job"):
        Yolo(str(detector), precision="int8")


@pytest.mark.slow
def test_int8_costs_no_accuracy(tmp_path: Path, annotate: Annotate) -> None:
    """Within a point of fp32, over 500 unseen scenes."""
    with get_context("spawn").Pool() as pool:
        some = pool.map(partial(scene, seed=78), range(500))
    (tmp_path / "in").mkdir()
    for one in some:
        (tmp_path / "in" / f"{one.name}.jpg").write_bytes(jpeg(one))
    found = {}
    for precision in ("fp32", "int8"):
        request = tmp_path / "in", "--yolo", WEIGHTS / "detect.pt", "--conf", 0.001, "--precision", precision
        assert annotate(*request, "--output", tmp_path / precision)[0] == 0
        rows = {Path(row["uri"]).stem: row["detections"] for row in rows_of(tmp_path / precision)}
        found[precision] = average_precision(some, rows)["mAP50-95"]
    print(f"mAP50-95 of 500 scenes: {found}")
    assert found["int8"] >= found["fp32"] - 0.01
