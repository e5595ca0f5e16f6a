"""Exports: every format that this machine can write is read by the same code as the weights, and finds the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import onnx
import pytest
from click import ClickException

import shardsight
from demo.scenes import scenes
from demo.writers import write
from serve.app import app
from serve.arguments import Arguments
from shardsight.cli import annotate as job
from shardsight.cli import export
from shardsight.errors import UsageError
from shardsight.models.info import ModelError
from shardsight.models.yolo import ultralytics_import  # noqa: F401 - before ultralytics
from shardsight.models.yolo.formats import FORMATS, PRECISIONS, missing
from shardsight.models.yolo.info import inspect
from shardsight.models.yolo.model import Yolo
from tests.conftest import PHOTOGRAPHS, S3, WEIGHTS, free_port, job_of, rows_of

import ultralytics  # isort: skip
from ultralytics.engine import exporter  # isort: skip

DETECTOR = WEIGHTS / "detect.pt"
SIZE = 320
# Format, precision, options, and how far a box may be off in pixels of the picture.
MATRIX: list[tuple[str, str, dict[str, Any], float]] = [
    ("torchscript", "fp32", {}, 0.1),
    ("onnx", "fp32", {}, 0.1),
    ("onnx", "fp32", {"dynamic": True}, 0.1),
    ("onnx", "fp32", {"nms": True}, 0.1),
    ("onnx", "fp16", {}, 2.0),
    ("onnx", "int8", {}, 8.0),
    ("openvino", "int8", {}, 8.0),
    ("openvino", "fp32", {"dynamic": True}, 0.5),
    ("openvino", "fp16", {}, 2.0),
    ("mnn", "fp32", {}, 0.5),
    ("mnn", "int8", {}, 12.0),
    ("ncnn", "fp32", {}, 2.0),
    ("paddle", "fp32", {}, 0.5),
    ("executorch", "fp32", {}, 0.5),
]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labelled")
    write(scenes(8, 77), out, "coco")
    return out / "annotations.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX export of 64 × 64 pixels."""
    out = tmp_path_factory.mktemp("small")
    made = shardsight.export(DETECTOR, out, "onnx", imgsz=64)
    return out / str(made.exports[0].name)


def boxes_of(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [np.array([[one[side] for side in ("x1", "y1", "x2", "y2")] for one in row["detections"]]) for row in rows]


def test_our_table_is_that_of_ultralytics() -> None:
    """A format that it gains, or an option that it drops, is noticed."""
    table = exporter.export_formats()
    theirs = dict(zip(table["Argument"], table["Arguments"], strict=True))
    theirs.pop("-")
    assert {name: sorted(known.options) for name, known in FORMATS.items()} == {
        name: sorted(set(options) - {"quantize"}) for name, options in theirs.items()
    }
    for name, known in FORMATS.items():
        able = {
            **{"fp32": name not in exporter.FP32_UNSUPPORTED_FORMATS, "fp16": name in exporter.FP16_FORMATS},
            **{"int8": name in exporter.INT8_FORMATS, "w8a16": name in exporter.W8A16_FORMATS},
            **{"w8a32": name in exporter.W8A32_FORMATS},
        }
        assert list(known.precisions) == [one for one in PRECISIONS if able[one]], name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "tflite"], "there is no --format tflite: choose from torchscript, onnx, "),
        (["--format", "onnx", "--precision", "int4"], "there is no --precision int4: choose from fp32, fp16, int8"),
        (
            ["--format", "torchscript", "--precision", "int8"],
            "--format torchscript has no int8: choose from fp32, fp16",
        ),
        (["--format", "onnx", "--precision", "int8"], "--precision int8 of onnx is calibrated on pictures: give some"),
        (["--format", "onnx,ncnn", "--dynamic"], "--dynamic is no option of ncnn: leave it out, or export ncnn apart"),
        (["--format", "onnx", "--within", "0.3"], "--within compares accuracy: give labelled pictures as --data"),
        (["--format", "engine"], "--format engine needs a machine with an NVIDIA GPU: run this there"),
        (["--format", "coreml"], "--format coreml needs macOS: run this there"),
        (["--format", "onnx,hailo", "--precision", ""], "--format hailo needs the package hailo-dataflow-compiler: "),
        (["--format", "litert"], "--format litert needs the package"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is exported: a long calibration must not end in a missing package."""
    assert export([str(DETECTOR), *arguments, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"shardsight: {said}") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("openvino", "int8") is None
    found = {"nncf": "2.1.0", "openvino": "2025.1"}
    monkeypatch.setattr("shardsight.models.yolo.formats.version", found.__getitem__)
    said = missing("openvino", "int8")
    assert said and said.startswith("--format openvino needs the package nncf>=2.14.0: ") and "pip install" in said


@pytest.mark.parametrize(("format", "precision", "options", "off"), MATRIX[1:3])
def test_the_same_boxes(format: str, precision: str, options: dict[str, Any], off: float, tmp_path: Path) -> None:
    """As the weights', and as ultralytics' own `predict` with the export."""
    made = shardsight.export(DETECTOR, tmp_path / "out", format, precision, imgsz=SIZE, **options)
    (one,) = made.exports
    assert one.reason is None and one.name and one.mb and one.mb > 3
    path = tmp_path / "out" / one.name
    pictures = [cv2.imread(str(picture))[..., ::-1].copy() for picture in PHOTOGRAPHS]  # encoded ones decode smaller
    settings: dict[str, Any] = {"conf": 0.1, "imgsz": SIZE, "precision": "fp32"}
    found = Yolo(str(path), **settings)(pictures)
    reference_model = ultralytics.YOLO(str(path), task="detect")
    for ours, picture in zip(boxes_of(found), PHOTOGRAPHS, strict=True):
        (reference,) = reference_model.predict(str(picture), conf=0.1, imgsz=SIZE, verbose=False)
        assert len(ours) == len(reference.boxes)
        assert np.abs(ours - reference.boxes.xyxy.numpy()).max(initial=0) < 0.1
    if options.get("dynamic"):  # else the input is square, and the borders' grey changes weak boxes
        for ours, others in zip(boxes_of(Yolo(str(DETECTOR), **settings)(pictures)), boxes_of(found), strict=True):
            assert len(ours) == len(others) and np.abs(ours - others).max(initial=0) < off


@pytest.mark.slow
@pytest.mark.parametrize(("format", "precision", "options", "off"), MATRIX)
def test_every_format_in_the_job(
    format: str, precision: str, options: dict[str, Any], off: float, annotate: Any, tmp_path: Path
) -> None:
    """Each box of the weights within rounding. Pictures are square, as the weights would pad others less than an export
    of a fixed size does."""
    if lacking := missing(format, precision):  # paddle and executorch, large packages that no extra has
        pytest.skip(lacking)
    pictures = tmp_path / "in"
    pictures.mkdir()
    for one in scenes(12, 99):
        side = min(one.image.shape[:2])
        cv2.imwrite(str(pictures / f"{one.name}.png"), one.image[:side, :side, ::-1])
    data = pictures if precision == "int8" and format != "mnn" else None
    made = shardsight.export(DETECTOR, tmp_path / "out", format, precision, data=data, imgsz=SIZE, **options)
    assert not made.failed, made.failed
    flags = ["--precision", "fp32", "--no-scaled-decode", "--imgsz", SIZE]
    rows: list[dict[str, Any]] = []
    for number, model in enumerate((DETECTOR, tmp_path / "out" / str(made.exports[0].name))):
        out = tmp_path / f"job{number}"
        conf = (0.5, 0.25)[number]  # less of the export, as int8 changes scores, too
        code, said = annotate(pictures, "--output", out, "--yolo", model, "--conf", conf, *flags)
        assert code == 0, said
        rows.append({row["id"]: row["detections"] for row in rows_of(out)})
    far = [
        (id, one["label"])
        for id, detections in rows[0].items()
        for one in detections
        if not any(
            one["label"] == other["label"]
            and max(abs(one[side] - other[side]) for side in ("x1", "y1", "x2", "y2")) < max(off, 1.0)
            for other in rows[1][id]
        )
    ]
    total = sum(map(len, rows[0].values()))
    # OpenVINO, for one, computes fp32 in bf16 on CPUs that can.
    assert total > 20 and len(far) <= (0.05 if off < 0.5 else 0.1) * total, far


@pytest.mark.slow
def test_int8_and_the_choice(one_ray: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrated on the labelled pictures, compared with the original, and the fastest of those that lose little; the
    same command again goes on."""
    command = [str(DETECTOR), "--format", "openvino", "--precision", "fp32,int8,fp32", "--imgsz", str(SIZE)]
    command += [
        "--data",
        str(labelled),
        "--within",
        "100",
        "--rounds",
        "1",
        "--limit",
        "4",
        "--output",
        str(tmp_path / "out"),
    ]
    assert export(command) == 0
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    whole, small = record["exports"]
    assert record["measure"] == "mAP50-95" and small["mb"] < 0.4 * whole["mb"]
    assert record["original"]["main"] and abs(record["original"]["main"] - small["main"]) < 0.3
    rates = {one["name"]: one["pictures_per_second"] for one in (record["original"], whole, small)}
    assert all(rates.values()) and record["chosen"] == max(rates, key=lambda name: rates[name])
    assert (tmp_path / "out" / "evaluation" / "report.html").exists()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    assert export(command) == 0
    assert f"{record['chosen']}: the fastest that loses no more" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")} == files


@pytest.mark.slow
def test_int8_of_a_classifier(one_ray: str, tmp_path: Path) -> None:
    """Calibrated on pictures cropped and scaled as a classifier sees them, it loses little."""
    write(scenes(100, 4321), tmp_path / "in", "yolo", "classify")
    options: dict[str, Any] = {"data": tmp_path / "in", "rounds": 0}
    made = shardsight.export(WEIGHTS / "classify.pt", tmp_path / "out", "openvino", "int8", **options)
    (small,) = made.exports
    assert small.main and made.original.main and made.original.main > 0.6
    print(f"top-1 {100 * made.original.main:.1f}, in int8 {100 * small.main:.1f}")
    assert abs(small.main - made.original.main) <= 0.05


def test_what_is_in_the_output_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hidden files count; --overwrite deletes exports alone, and nothing before the request is known to be right."""
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "config").write_text("mine")
    command = [str(DETECTOR), "--format", "torchscript", "--imgsz", "64", "--output", str(out)]
    assert export(command) == 2 and "holds other files: give an empty folder" in capsys.readouterr().err
    shutil.rmtree(out / ".git")
    assert export(command) == 0
    (out / "mine.txt").write_text("mine")
    assert export([*command[:-3], "96", *command[-2:]]) == 2
    assert "holds other exports: give another --output, or --overwrite" in capsys.readouterr().err
    assert export([*command, "--overwrite", "--data", str(tmp_path / "none.yaml")]) == 2
    assert (out / "detect.torchscript").exists()
    assert export([*command, "--overwrite"]) == 0 and (out / "mine.txt").exists()


def test_one_that_fails_costs_itself_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch writes fp16 TorchScript on a GPU only."""
    code = export(
        [str(DETECTOR), "--format", "torchscript", "--precision", "fp16,fp32", "--imgsz", "64"]
        + ["--output", str(tmp_path / "out")]
    )
    said = capsys.readouterr().err
    assert code == 3 and "torchscript fp16: ValueError: FP16 TorchScript export is only supported on GPU" in said
    assert (tmp_path / "out" / "detect.torchscript").exists()


@pytest.mark.slow
def test_in_and_from_a_store(annotate: Any, s3: S3, jpegs: list[bytes], tmp_path: Path) -> None:
    """Weights, exports that are files and folders, and calibration pictures may lie in one."""
    bucket = s3.bucket("models")
    shutil.copy(DETECTOR, bucket / "best.pt")
    (bucket / "pictures").mkdir()
    for number, data in enumerate(jpegs[:4]):
        (bucket / "pictures" / f"{number}.jpg").write_bytes(data)
    storage = dict(pair.split("=", 1) for pair in s3.options()[1::2])
    made = shardsight.export(
        *("s3://models/best.pt", "s3://models/exports", "openvino", "int8"),
        **{"data": "s3://models/pictures", "imgsz": 64, "storage": storage},
    )
    assert not made.failed and (bucket / "exports" / "best-int8_openvino_model" / "metadata.yaml").exists()
    (tmp_path / "one.jpg").write_bytes(jpegs[0])
    for number, model in enumerate(("s3://models/best.pt", "s3://models/exports/best-int8_openvino_model")):
        out = tmp_path / f"out{number}"
        precision = ["--precision", "int8"] if number else []
        code, said = annotate(tmp_path / "one.jpg", "--output", out, "--yolo", model, *precision, *s3.options())
        assert code == 0, said
        assert job_of(out)["models"]["yolo"]["path"] == model
    code, said = annotate(
        tmp_path / "one.jpg", "--output", tmp_path / "no", "--yolo", "s3://models/no.pt", *s3.options()
    )
    assert code == 2 and "there is no model at s3://models/no.pt" in said


def test_exports_that_are_damaged(small: Path, tmp_path: Path) -> None:
    """One sentence each, before a job starts."""
    shutil.copy(DETECTOR, tmp_path / "yolov5n.pt")  # a name that ultralytics takes for another model's
    made = shardsight.export(tmp_path / "yolov5n.pt", tmp_path / "out", "openvino", imgsz=64)
    openvino = tmp_path / "out" / str(made.exports[0].name)
    shutil.copytree(openvino, tmp_path / "no_openvino_model")
    (tmp_path / "no_openvino_model" / "metadata.yaml").unlink()
    with pytest.raises(ModelError, match=r"no_openvino_model lacks its metadata"):
        inspect(str(tmp_path / "no_openvino_model"))
    shutil.copytree(openvino, tmp_path / "weights_openvino_model")
    binary = tmp_path / "weights_openvino_model" / "model.bin"
    binary.write_bytes(binary.read_bytes()[:1000])
    with pytest.raises(ModelError, match="weights_openvino_model"):
        inspect(str(tmp_path / "weights_openvino_model"))
    with pytest.raises(UsageError, match=r"is an export already: give the \.pt file"):
        shardsight.export(small, tmp_path / "again", "openvino")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.onnx", "cannot be loaded as a YOLO model"),
        ("depth.onnx", "is a model for the task depth: expected a YOLO"),
    ],
)
def test_the_job_and_the_service_say_what_is_wrong(
    name: str, words: str, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of an export that is cut short, and of one of a task that no row can hold."""
    path = tmp_path / name
    graph = onnx.load(small)
    onnx.helper.set_model_props(graph, {one.key: one.value for one in graph.metadata_props} | {"task": "depth"})
    data = small.read_bytes()
    path.write_bytes(data[: len(data) // 2] if name == "cut.onnx" else graph.SerializeToString())
    assert job([str(PHOTOGRAPHS[0]), "--output", str(tmp_path / "out"), "--yolo", str(path)]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"shardsight: {path} {words}") and said.count("\n") == 1
    with pytest.raises(ClickException, match=words) as refused:  # which `serve run` shows without a traceback
        app(Arguments(yolo=str(path)))
    assert isinstance(refused.value, UsageError)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_in_the_service(annotate: Any, s3: S3, jpegs: list[bytes], tmp_path: Path, format: str) -> None:
    """From a store: a request's row is the job's."""
    from ray import serve

    bucket, port = s3.bucket(f"served-{format}"), free_port()
    (export,) = shardsight.export(DETECTOR, bucket / "out", format, imgsz=SIZE).exports
    model, storage = f"s3://served-{format}/out/{export.name}", dict(p.split("=", 1) for p in s3.options()[1::2])
    for number, data in enumerate(jpegs[:6]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    code, said = annotate(tmp_path / "*.jpg", "--output", tmp_path / "out", "--yolo", model, *s3.options())
    assert code == 0, said
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app(Arguments(yolo=model, storage=storage)), name="exported")
        for row in rows_of(tmp_path / "out"):
            data = Path(row["id"]).read_bytes()
            served = httpx.post(f"http://127.0.0.1:{port}/v1/annotate", files={"image": data}, timeout=60).json()
            assert served["detections"] and served | {"id": row["id"], "uri": row["uri"]} == row
    finally:
        serve.shutdown()


def test_nothing_leaves_the_machine(tmp_path: Path) -> None:
    """No telemetry, download or install: in a process that may open no socket but local ones, and start no pip."""
    code = (
        "import socket, subprocess, sys\n"
        "def refuse(*arguments, **more): raise SystemExit(f'called out: {arguments}')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from shardsight.models.yolo.export import _run\n"
        "for request in (('onnx', 32), ('openvino', 32), ('mnn', 32)):\n"
        "    _run(sys.argv[1], *request, {'imgsz': 64})\n"
    )
    shutil.copy(DETECTOR, tmp_path / "best.pt")
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    pip.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "best.pt"],
        env={
            "PATH": f"{pip.parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "called").exists() and (tmp_path / "best.mnn").exists()
