"""Which weights and exports are computed, as ultralytics computes them, and which are refused in a sentence."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
import yaml

from shardsight.models.info import KEPT, ModelDied, ModelError, cache, made_once
from shardsight.models.yolo import info
from shardsight.models.yolo import openvino as openvino_network
from shardsight.models.yolo.info import inspect
from shardsight.models.yolo.load import load
from shardsight.models.yolo.model import Yolo
from tests.conftest import PHOTOGRAPHS, WEIGHTS

import ultralytics  # isort: skip - after what sets it up
from ultralytics.nn.tasks import DetectionModel  # isort: skip

DETECTOR = WEIGHTS / "detect.pt"


def saved(path: Path, name: str = "yolov8n.yaml", family: str = "YOLO", **changes: Any) -> Path:
    """A model of random weights whose scores differ from place to place, as a checkpoint."""
    torch.manual_seed(0)
    model = getattr(ultralytics, family)(name)
    if changes:
        model.model = DetectionModel(name, verbose=False, **changes)
        model.model.args = {"imgsz": 64}
    for module in model.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    for branch in [*getattr(model.model.model[-1], "cv3", ()), *getattr(model.model.model[-1], "one2one_cv3", ())]:
        branch[-1].bias.data.fill_(-3)
        branch[-1].weight.data.mul_(6)
    model.save(path)
    return path


@pytest.mark.parametrize(
    ("name", "family", "word"),
    [
        ("yolov8-rtdetr.yaml", "RTDETR", "RTDETR"),
        ("yolov8s-worldv2.yaml", "YOLOWorld", "YOLOWorld"),
        ("yoloe-11s.yaml", "YOLOE", "YOLOE"),
        ("yolo26n-depth.yaml", "YOLO", "depth"),
        ("yolo26n-sem.yaml", "YOLO", "semantic"),
    ],
)
def test_other_families_are_refused(name: str, family: str, word: str, tmp_path: Path) -> None:
    """Their pictures are prepared otherwise: boxes would be some pixels off, without a word."""
    with pytest.raises(ModelError, match=f"{word}: expected a YOLO for detect, segment, classify, pose or obb$"):
        load(saved(tmp_path / "other.pt", name, family), None, "cpu")


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_than_three_are_refused(channels: int, tmp_path: Path) -> None:
    """Every row would be an error."""
    with pytest.raises(ModelError, match=f"takes pictures of {channels} channels: expected a model of 3"):
        load(saved(tmp_path / "grey.pt", ch=channels, nc=3), None, "cpu")


@pytest.mark.parametrize(
    ("name", "fused", "max_det"),
    [("yolov8n-p6.yaml", False, 300), ("yolo26n.yaml", False, 300), ("yolo26n.yaml", True, 500)],
)
def test_other_generations_equal_ultralytics(name: str, fused: bool, max_det: int, tmp_path: Path) -> None:
    """Strides up to 64, and networks that pick their detections themselves (`fused`), of which ultralytics lets them
    pick as many as are asked for.

    All candidates are kept (iou 1): scores of random weights are all but equal, so that which of two suppresses the
    other would be decided by rounding, otherwise on each CPU.
    """
    path = saved(tmp_path / "model.pt", name)
    if fused:
        model = ultralytics.YOLO(path)
        model.model.model[-1].end2end = True
        model.model.model[-1].fuse()
        model.save(path)
    photograph, conf, iou, classes = PHOTOGRAPHS[1], 0.05, 1.0, list(range(0, 80, 2))
    ours = Yolo(str(path), conf=conf, imgsz=320, precision="fp32")
    ours.set_thresholds(conf, iou, max_det, classes)
    theirs = ultralytics.YOLO(path).predict(
        photograph, conf=conf, iou=iou, imgsz=320, max_det=max_det, classes=classes, verbose=False
    )[0]
    (row,) = ours(photograph.read_bytes())
    assert len(row["detections"]) == len(theirs.boxes) > 20
    xyxy = np.array([[one[side] for side in ("x1", "y1", "x2", "y2")] for one in row["detections"]])
    gaps = np.abs(theirs.boxes.xyxy.numpy()[:, None] - xyxy[None]).max(2).min(1)  # to the nearest of ours
    assert gaps.max() < 0.01
    assert np.allclose([one["score"] for one in row["detections"]][:20], theirs.boxes.conf[:20], rtol=0.01)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("run",)


def of_another_repository(path: Path) -> None:
    """A class that is found when it is saved, and not when it is loaded."""
    module = types.ModuleType("models.yolo")
    network = type("Model", (torch.nn.Module,), {"__module__": "models.yolo"})
    vars(module)["Model"] = network
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "models", types.ModuleType("models"))
        patch.setitem(__import__("sys").modules, "models.yolo", module)
        torch.save({"model": network()}, path)


def flipped(path: Path) -> None:
    data = bytearray(DETECTOR.read_bytes())
    half = len(data) // 2
    data[half : half + 100] = bytes(byte ^ 255 for byte in data[half : half + 100])
    path.write_bytes(data)


def checkpoints(path: Path) -> None:
    """As ultralytics leaves them."""
    path.mkdir()
    for name in ("last.pt", "best.pt"):
        shutil.copy(DETECTOR, path / name)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text.pt": (lambda path: path.write_text("hello"), "no checkpoint at all: it begins with b'hello'"),
    "empty.pt": (lambda path: path.touch(), "is empty"),
    "cut.pt": (lambda path: path.write_bytes(DETECTOR.read_bytes()[:100_000]), "is cut short"),
    "flipped.pt": (flipped, "does not match its checksum"),
    "state.pt": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "state_dict alone"),
    "inner.pt": (lambda path: torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path), "state_dict alone"),
    "tensor.pt": (lambda path: torch.save(torch.zeros(3), path), "holds no network"),
    "layer.pt": (lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path), "holds no network"),
    "code.pt": (lambda path: torch.save({"model": RunsCode()}, path), "posix.mkdir, which is no class of ultralytics"),
    "v5.pt": (of_another_repository, "models.yolo.Model, which is no class of ultralytics"),
    "script.pt": (
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path)),
        "is a TorchScript export: give its file the ending .torchscript",
    ),
    "FastSAM-s.pt": (lambda path: shutil.copy(DETECTOR, path), "of the family FastSAM"),
    "bad.onnx": (lambda path: path.write_bytes(b"x"), "Protobuf parsing failed"),
    "bad.torchscript": (lambda path: path.write_bytes(b"x"), "not a ZIP archive$"),
    "network.yaml": (lambda path: path.write_text("nc: 3"), "holds no weights"),
    "weights.safetensors": (lambda path: path.write_bytes(b"x"), "neither a .pt file nor an export"),
    "folder": (lambda path: path.mkdir(), "neither a .pt file nor an export"),
    "a_openvino_model": (lambda path: path.mkdir(), "lacks the file of the model"),
    "checkpoints": (checkpoints, r"checkpoints holds 2 \.pt files: name the one to use, as .*/best\.pt$"),
    "plan.engine": (
        lambda path: path.write_bytes(b"x"),
        "Python package tensorrt, which is not installed: python -m pip install tensorrt$",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_what_is_no_model_is_told_by_its_cause(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence about the user's file, without ultralytics' advice to use another model."""
    monkeypatch.chdir(tmp_path)
    make, cause = WRONG[name]
    make(tmp_path / name)
    with pytest.raises(ModelError, match=cause) as caught:
        load(tmp_path / name, None, "cpu")
    said = str(caught.value)
    assert said.startswith(str(tmp_path / name)) and "\n" not in said and len(said) < len(str(tmp_path)) + 300
    assert "yolo26n" not in said and "❌" not in said
    assert not (tmp_path / "run").exists(), "the pickle's code was run"


@pytest.mark.parametrize("name", ["yolov5n.pt", "John's.pt", "UPPER.PT", "a b.pt"])
def test_any_file_name_will_do(name: str, tmp_path: Path) -> None:
    """ultralytics looks for other files in place of some, and then on the net."""
    shutil.copy(DETECTOR, tmp_path / name)
    assert load(tmp_path / name, None, "cpu").args.task == "detect"


def test_the_driver_learns_what_the_child_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where libraries print; and what is no model is the same sentence there."""
    monkeypatch.setenv("YOLO_VERBOSE", "true")
    info, model = inspect(str(DETECTOR)), Yolo(str(DETECTOR))
    assert (info.task, info.names, info.input) == (model.task, model.names, model.input)
    assert info.files == {"detect.pt": info.sha256}
    with pytest.raises(ModelError, match="there are no weights at"):
        inspect(str(tmp_path / "missing.pt"))
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ModelError, match=r"empty.pt is empty: give a .pt file or an export$"):
        inspect(str(tmp_path / "empty.pt"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    shutil.copy(DETECTOR, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"OSError: libcudart.so.13: cannot open shared object file$"):
        inspect(str(tmp_path / "other.pt"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX export of 96 × 64 pixels."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(DETECTOR, folder / "detect.pt")
    return Path(ultralytics.YOLO(folder / "detect.pt").export(format="onnx", imgsz=(96, 64), dynamic=False))


def test_an_exports_size_is_its_own(exported: Path) -> None:
    """Where another is asked for, ultralytics takes its own without a word."""
    assert Yolo(str(exported), imgsz=[96, 64]).input.imgsz == Yolo(str(exported)).input.imgsz == (96, 64)
    with pytest.raises(ModelError, match=r"was exported for 96,64 pixels .height,width., not 64,64: leave out --imgsz"):
        Yolo(str(exported), imgsz=64)


@pytest.mark.parametrize("mark", [("head", "RTDETRDecoder"), ("description", "Ultralytics rtdetr-l model")])
def test_other_families_are_refused_as_exports_too(exported: Path, mark: tuple[str, str], tmp_path: Path) -> None:
    """Newer releases of ultralytics write down the head, older ones the name alone."""
    graph = onnx.load(exported)
    kept = {entry.key: entry.value for entry in graph.metadata_props if entry.key not in ("head", "description")}
    onnx.helper.set_model_props(graph, kept | dict([mark]))
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="of the family RTDETR: expected a YOLO"):
        load(tmp_path / "other.onnx", None, "cpu")


def test_identity_is_of_every_file(exported: Path, tmp_path: Path) -> None:
    """Of a folder, or beside the file: weights kept in another file, labels in the metadata."""
    first = inspect(str(exported))
    assert list(first.files) == ["detect.onnx"]
    outside = exported.with_name("detect.onnx.data")
    outside.write_bytes(b"1")
    second = inspect(str(exported))
    assert list(second.files) == ["detect.onnx", "detect.onnx.data"]
    assert second.sha256 == first.sha256 == second.files["detect.onnx"]  # as outputs of earlier releases have it
    outside.write_bytes(b"2")
    assert inspect(str(exported)).files["detect.onnx.data"] != second.files["detect.onnx.data"]


def test_a_folder_is_looked_at_again_when_a_file_in_it_changes(exported: Path, tmp_path: Path) -> None:
    """The folder itself stays as old as it was."""
    folder = tmp_path / "detect_openvino_model"
    openvino.save_model(openvino.Core().read_model(exported), folder / "detect.xml")
    names = dict(enumerate(Yolo(str(exported)).names.values()))
    described = {"task": "detect", "names": names, "imgsz": [96, 64], "stride": 32, "batch": 1}
    (folder / "metadata.yaml").write_text(yaml.safe_dump(described))
    first = inspect(str(folder))
    assert set(first.files) == {"detect.bin", "detect.xml", "metadata.yaml"}
    (folder / "metadata.yaml").write_text(yaml.safe_dump(described | {"names": names | {0: "renamed"}}))
    second = inspect(str(folder))
    assert second.names == first.names | {0: "renamed"} and second.sha256 != first.sha256
    assert [name for name in first.files if first.files[name] != second.files[name]] == ["metadata.yaml"]


def test_a_model_is_inspected_and_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the next process gives the same; other weights of the same name are no such model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, photograph = tmp_path / "model.pt", PHOTOGRAPHS[0].read_bytes()
    shutil.copy(DETECTOR, model)
    info_made, rows = inspect(str(model)), Yolo(str(model), precision="fp32")([photograph])
    assert rows[0]["detections"]
    assert list(tmp_path.glob("shardsight-*/networks/*/*.blob"))  # goes with its network

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(info, "_describe_into", never)
    monkeypatch.setattr(openvino_network, "_convert", never)
    info._inspect.cache_clear()
    assert inspect(str(model)) == info_made
    assert Yolo(str(model), precision="fp32")([photograph]) == rows
    shutil.copy(WEIGHTS / "pose.pt", model)
    with pytest.raises(AssertionError, match="made again"):
        inspect(str(model))
    with pytest.raises(ModelDied, match="made again"):
        Yolo(str(model), precision="fp32")([photograph])


def test_what_another_user_keeps_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache("networks")
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    (tmp_path / f"shardsight-{os.getuid()}").mkdir()
    with pytest.raises(ModelError, match="belongs to another user: remove it, or set TMPDIR"):
        cache("networks")


def test_what_others_can_write_to_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache("networks").parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(ModelError, match="can be written to by other users: remove it, or set TMPDIR"):
        cache("networks")


def test_ultralytics_does_not_open_the_cache_to_others(tmp_path: Path) -> None:
    """Its settings are in the same folder, which the first one makes."""
    command = [sys.executable, "-c", "import shardsight.models.yolo.ultralytics_import"]
    subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(tmp_path)}, umask=0o002)
    assert (tmp_path / f"shardsight-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_what_nobody_uses_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    long_ago = time.time() - KEPT - 1
    for old in [made_once("networks", name, lambda folder: (folder / "a").touch()) for name in ("used", "unused")]:
        os.utime(old, (long_ago, long_ago))
    made_once("networks", "used", lambda _: pytest.fail("it was there"))
    made_once("networks", "new", lambda _: None)
    assert {entry.name for entry in cache("networks").iterdir()} == {"used", "new"}
