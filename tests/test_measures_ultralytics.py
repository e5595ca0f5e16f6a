"""The figures of every task against ultralytics' own `val`, on the demo's models and scenes."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

import shardsight
from demo.scenes import scenes
from demo.writers import write
from shardsight.evaluation.measuring import KINDS
from shardsight.measures import boxes, classify
from shardsight.models.yolo import ultralytics_import  # noqa: F401 - before ultralytics
from shardsight.storage import Storage
from shardsight.truth import Truth, read
from tests.conftest import WEIGHTS

from ultralytics import YOLO  # isort: skip
from ultralytics.utils import nms  # isort: skip

SCENES, BATCH = 100, 16
# Of the task's kinds: ours → theirs.
SAME = {
    "boxes": {"mAP50-95": "metrics/mAP50-95(B)"},
    "masks": {"mAP50-95": "metrics/mAP50-95(M)"},
    "keypoints": {"mAP50-95": "metrics/mAP50-95(P)"},
    "oriented": {"mAP50-95": "metrics/mAP50-95(B)"},
    "classes": {"top-1": "metrics/accuracy_top1", "top-5": "metrics/accuracy_top5"},
}


def val(folder: Path, task: str) -> dict[str, float]:
    """Masks in the pictures' own resolution, which `save_txt` brings about; by default in a quarter of it."""
    data = folder if task == "classify" else folder / "data.yaml"
    options: dict[str, Any] = {"plots": False, "device": "cpu", "workers": 0, "verbose": False, "batch": BATCH}
    options |= {"save_txt": task == "segment", "project": str(folder / "runs")}
    return dict(YOLO(WEIGHTS / f"{task}.pt").val(data=str(data), split="val", **options).results_dict)


def ours(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    truth = read(str(folder), Storage({}))
    yolo = shardsight.Yolo(str(WEIGHTS / f"{task}.pt"), conf=0.001, precision="fp32")
    samples = truth.samples
    batches = [samples[first : first + BATCH] for first in range(0, len(samples), BATCH)]
    rows = [row for batch in batches for row in yolo([Path(sample.id).read_bytes() for sample in batch])]
    return measured(truth, {sample.id: row for sample, row in zip(samples, rows, strict=True)})


def measured(truth: Truth, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if truth.task == "classify":
        return {"classes": classify.measure(truth, {id: row["classes"] for id, row in rows.items()})}
    found = {id: row["detections"] for id, row in rows.items()}
    sizes = {id: (row["width"], row["height"]) for id, row in rows.items()}
    return {kind: boxes.measure(truth, found, sizes, kind) for kind in KINDS[truth.task]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb", "classify"])
def test_within_half_a_point_of_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """Of the same detections: `val` gives a box each class above its `conf`, where `predict`, as Shardsight, gives it
    the likeliest one."""
    write(scenes(SCENES, 4321), tmp_path / "val" if task == "classify" else tmp_path, "yolo", task)
    if task == "classify":  # `val` wants both parts
        shutil.copytree(tmp_path / "val", tmp_path / "train")
    expected = val(tmp_path, task)
    monkeypatch.setattr(nms, "non_max_suppression", functools.partial(nms.non_max_suppression, multi_label=True))
    for kind, result in ours(tmp_path, task).items():
        for name, theirs in SAME[kind].items():
            mine = result["measures"][name]["value"]
            print(task, kind, name, round(mine, 4), round(expected[theirs], 4))
            assert mine == pytest.approx(expected[theirs], abs=0.005), (kind, name)
