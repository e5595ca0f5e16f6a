"""The same answers as ultralytics, whatever shares the batch."""

import os
import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from demo.scenes import Scene, scene, scenes
from demo.score import average_precision, rle_of
from demo.writers import TASKS, jpeg
from shardsight.decode.frames import Load
from shardsight.models.info import ModelDied
from shardsight.models.yolo.model import Yolo
from shardsight.sources import Record
from shardsight.storage import Storage
from tests.conftest import PHOTOGRAPHS, WEIGHTS

# isort: split
from ultralytics import YOLO  # after shardsight, which sets how ultralytics loads weights
from ultralytics.utils import nms

LOW = 0.05  # confidence: enough detections on photographs to compare, which the demo's weights never saw


def annotated(model: Yolo, pictures: list[bytes], scaled: bool = False) -> list[dict[str, Any]]:
    load = Load(Storage(), model.input, scaled)
    rows = [load.row(Record(None, n, str(n), str(n), data=data)) for n, data in enumerate(pictures)]
    return model(load.table(rows)).to_pylist()


@pytest.fixture(scope="module")
def pictures(jpegs: list[bytes]) -> list[bytes]:
    return [path.read_bytes() for path in PHOTOGRAPHS] + jpegs[:12]


@pytest.mark.parametrize("task", TASKS)
def test_same_as_ultralytics(task: str, pictures: list[bytes], tmp_path: Path) -> None:
    """Of each picture alone, at ultralytics' defaults: count, boxes, scores and what else a task has."""
    weights = WEIGHTS / f"{task}.pt"
    ours = annotated(Yolo(str(weights), conf=LOW, precision="fp32"), pictures)
    theirs = YOLO(weights)
    total = 0
    for index, (row, data) in enumerate(zip(ours, pictures, strict=True)):
        (tmp_path / f"{index}.jpg").write_bytes(data)
        result = theirs.predict(tmp_path / f"{index}.jpg", conf=LOW, verbose=False)[0]
        assert row["error"] is None
        if task == "classify":
            assert [c["class_id"] for c in row["classes"]] == result.probs.top5
            assert np.allclose([c["score"] for c in row["classes"]], result.probs.top5conf, atol=0.005)
            total += 1
            continue
        boxes = result.obb if task == "obb" else result.boxes
        found = row["detections"]
        total += len(found)
        assert len(found) == len(boxes)
        if not found:
            continue
        assert [one["class_id"] for one in found] == boxes.cls.int().tolist()
        assert np.allclose([one["score"] for one in found], boxes.conf, atol=0.005)
        assert np.allclose([[one[name] for name in ("x1", "y1", "x2", "y2")] for one in found], boxes.xyxy, atol=0.5)
        if task == "obb":
            assert np.allclose([one["corners"] for one in found], boxes.xyxyxyxy.reshape(-1, 8), atol=0.5)
            assert np.allclose([one["angle"] for one in found], boxes.xywhr[:, 4], atol=0.01)
        if task == "pose":
            points = [[(p["x"], p["y"], p["score"]) for p in one["keypoints"]] for one in found]
            assert np.allclose(points, result.keypoints.data, atol=0.5)
        if task == "segment":
            whole = theirs.predict(tmp_path / f"{index}.jpg", conf=LOW, verbose=False, retina_masks=True)[0]
            assert np.median([overlap(o["mask"], m) for o, m in zip(found, whole.masks.data, strict=True)]) > 0.9
    assert total >= len(pictures)


def overlap(ours: dict[str, Any], theirs: torch.Tensor) -> float:
    mine = rle.decode(rle_of(ours)).astype(bool)
    other = theirs.numpy().astype(bool)
    return float((mine & other).sum() / max(1, (mine | other).sum()))


def test_masks_are_of_the_original_picture() -> None:
    """On scenes never seen they lie over the shapes, pixel by pixel; a mask of the model's input would not."""
    some = list(scenes(40, seed=88))
    rows = annotated(Yolo(str(WEIGHTS / "segment.pt"), conf=0.001), [jpeg(one) for one in some])
    for one, row in zip(some, rows, strict=True):
        sizes = {(found["mask"]["height"], found["mask"]["width"]) for found in row["detections"]}
        assert sizes <= {one.image.shape[:2]}
    found = {one.name: row["detections"] for one, row in zip(some, rows, strict=True)}
    assert average_precision(some, found, masks=True)["mAP50"] > 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_mates_change_nothing(pictures: list[bytes], precision: str) -> None:
    """A picture's row is the same alone, in a crowd, and beside other shapes."""
    model = Yolo(str(WEIGHTS / "detect.pt"), precision=precision, batch_size=16)
    together = annotated(model, pictures)
    for row, data in zip(together, pictures, strict=True):
        (alone,) = annotated(model, [data])
        assert len(alone["detections"]) == len(row["detections"])
        for one, other in zip(alone["detections"], row["detections"], strict=True):
            assert one["label"] == other["label"]
            assert abs(one["score"] - other["score"]) < (1e-4 if precision == "fp32" else 0.01)
            assert all(abs(one[side] - other[side]) < 0.5 for side in ("x1", "y1", "x2", "y2"))


def test_nms_never_gives_up(pictures: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """By default ultralytics returns pictures as empty, with a warning, once its NMS has taken two seconds.

    Through the model, so that it is noticed when ultralytics calls another function.
    """
    model = Yolo(str(WEIGHTS / "detect.pt"), conf=LOW)
    same = [pictures[0]] * 4
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr("ultralytics.utils.nms.time.time", lambda: float(next(clock)))
    assert all(row["detections"] for row in annotated(model, same))
    monkeypatch.setattr(nms, "non_max_suppression", nms.non_max_suppression.__wrapped__)
    assert not all(row["detections"] for row in annotated(model, same)), "the fault that this guards against is gone"


def test_a_box_of_several_classes(pictures: list[bytes]) -> None:
    """A detection each, where that is asked for, and only by the model of which it is asked."""
    several = Yolo(str(WEIGHTS / "detect.pt"), conf=0.01, precision="fp32", multi_label=True)
    one = Yolo(str(WEIGHTS / "detect.pt"), conf=0.01, precision="fp32")

    def boxes_of(model: Yolo) -> list[list[tuple[float, ...]]]:
        rows = annotated(model, pictures)
        return [
            [tuple(found[side] for side in ("x1", "y1", "x2", "y2")) for found in row["detections"]] for row in rows
        ]

    assert any(len(set(boxes)) < len(boxes) for boxes in boxes_of(several))
    assert all(len(set(boxes)) == len(boxes) for boxes in boxes_of(one))


def test_nms_is_torchvisions() -> None:
    """The kernel is loaded without the package, whose import takes seconds in every process."""
    import torchvision

    boxes = torch.rand(400, 4) * 100
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(400)
    assert nms.TorchNMS.nms(boxes, scores, 0.5).tolist() == torchvision.ops.nms(boxes, scores, 0.5).tolist()


def test_a_picture_that_fails_in_the_model_costs_no_other(
    pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes an error row, since a blank picture of its shape can be computed."""
    model = Yolo(str(WEIGHTS / "detect.pt"), precision="fp32", batch_size=8)
    predict = model.predict

    def fails_on_zidane(frames: list[np.ndarray], boxes: list[Any]) -> list[list[dict[str, Any]]]:
        if any(box.width == 1280 and frame.any() for frame, box in zip(frames, boxes, strict=True)):
            raise RuntimeError("out of memory")
        return predict(frames, boxes)

    monkeypatch.setattr(model, "predict", fails_on_zidane)
    rows = annotated(model, pictures)
    assert [row["error"] and (row["error"]["stage"], row["error"]["type"]) for row in rows] == [
        None,
        ("yolo", "RuntimeError"),
        *[None] * 12,
    ]


def test_a_gpu_that_has_failed_gives_no_rows(pictures: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of CUDA all further pictures fail: as error rows, they would be lost one and all."""
    model = Yolo(str(WEIGHTS / "detect.pt"), precision="fp32", batch_size=8)
    predict, calls = model.predict, 0

    def fails_from_the_second_on(frames: list[np.ndarray], boxes: list[Any]) -> list[list[dict[str, Any]]]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
        return predict(frames, boxes)

    monkeypatch.setattr(model, "predict", fails_from_the_second_on)
    with pytest.raises(ModelDied, match="blank picture, too: RuntimeError: CUDA error: an illegal memory access"):
        annotated(model, pictures)


@pytest.mark.parametrize(
    ("count", "least", "apart"), [(60, 0.8, 0.01), pytest.param(500, 0.85, 0.003, marks=pytest.mark.slow)]
)
def test_defaults_cost_no_accuracy(count: int, least: float, apart: float) -> None:
    """Reduced decoding and bf16 against full decoding and fp32, over unseen scenes."""
    with get_context("spawn").Pool() as pool:
        some = pool.map(partial(scene, seed=77), range(count))
    encoded = [jpeg(one) for one in some]
    exact, quick = (
        precision_of(
            some, annotated(Yolo(str(WEIGHTS / "detect.pt"), conf=0.001, precision=precision), encoded, scaled)
        )
        for precision, scaled in (("fp32", False), ("auto", True))
    )
    print(f"mAP50-95 of {count} scenes: fp32 and full decoding {exact:.4f}, the defaults {quick:.4f}")
    assert exact >= least
    assert abs(exact - quick) <= apart


def precision_of(some: list[Scene], rows: list[dict[str, Any]]) -> float:
    found = {scene.name: row["detections"] for scene, row in zip(some, rows, strict=True)}
    return average_precision(some, found)["mAP50-95"]


def test_exports_open_too(tmp_path: Path, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX export of a fixed size gives what ultralytics gives with it. Its input is contiguous in memory, as some
    runtimes, MNN's and ExecuTorch's, would otherwise find other things in it without a word."""
    path = YOLO(WEIGHTS / "detect.pt").export(format="onnx", imgsz=320, dynamic=False)
    target = tmp_path / "detect.onnx"
    Path(path).rename(target)
    model, contiguous = Yolo(str(target), conf=LOW), list[bool]()
    forward = model.backend.backend.forward
    monkeypatch.setattr(
        model.backend.backend, "forward", lambda im: (contiguous.append(im.is_contiguous()), forward(im))[1]
    )
    ours = annotated(model, pictures)
    assert contiguous and all(contiguous)
    theirs = YOLO(target, task="detect")
    for row, data in zip(ours, pictures, strict=True):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        boxes = theirs.predict(image, conf=LOW, verbose=False)[0].boxes
        assert len(row["detections"]) == len(boxes)
        xyxy = [[one[name] for name in ("x1", "y1", "x2", "y2")] for one in row["detections"]]
        assert not len(boxes) or np.allclose(xyxy, boxes.xyxy, atol=0.5)


def test_importing_leaves_the_environment_and_threads_alone() -> None:
    """In a fresh process: no probe of the net, no telemetry, no single-threaded numpy for everybody else, and what the
    user has set for ultralytics stays set."""
    check = (
        "import os, cv2; before = dict(os.environ); "  # OpenCV itself changes LD_LIBRARY_PATH
        "import torch; threads = torch.get_num_threads(); "
        "import shardsight.models.yolo.model; "
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items()); "
        "assert torch.get_num_threads() == threads; "
        "from ultralytics.utils import AUTOINSTALL, ONLINE, SAFE_LOAD, SETTINGS, USER_CONFIG_DIR; "
        "assert not ONLINE and not AUTOINSTALL and not SETTINGS['sync']; "
        "assert SAFE_LOAD == (os.environ['ULTRALYTICS_SAFE_LOAD'] == 'yes'); "
        "assert 'torchvision' not in __import__('sys').modules"
    )
    names = ("OMP_NUM_THREADS", "YOLO_OFFLINE", "YOLO_AUTOINSTALL", "YOLO_CONFIG_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"ULTRALYTICS_SAFE_LOAD": "no", "ULTRALYTICS_API_KEY": "mine"}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)


def test_empty_table_and_failed_rows() -> None:
    """A block may hold nothing to look at: its rows pass through."""
    model = Yolo(str(WEIGHTS / "detect.pt"))
    load = Load(Storage(), model.input)
    assert len(model(load.table([]))) == 0
    (row,) = model(load.table([load.row(Record(None, 0, "a", "a", data=b"no picture"))])).to_pylist()
    assert row["error"]["type"] == "NotAnImage" and row["detections"] is None
