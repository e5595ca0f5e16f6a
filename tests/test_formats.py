"""Each format, read back by the tool that it is for: the same objects, within rounding."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import datasets
import numpy as np
import pytest
import torchvision
import webdataset
import yaml
from hypothesis import given
from hypothesis import strategies as st
from label_studio_sdk.converter import Converter
from label_studio_sdk.label_interface import LabelInterface
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import shardsight
from demo.clips import Clip
from demo.questions import detect, seen
from demo.scenes import KEYPOINTS, KINDS, Scene, Shape
from demo.writers import coco_rle, truth
from shardsight.conversion import FORMATS
from shardsight.measures.tracks import read_mot
from shardsight.models.yolo.ultralytics_import import YOLO
from shardsight.results.formats.geometry import cut, polygon, xywh
from shardsight.results.formats.labelstudio import config
from shardsight.results.formats.sample import Contents, Found, Sample, safe
from shardsight.results.formats.voc import pixels
from shardsight.storage import Storage
from shardsight.truth import read
from tests.conftest import WEIGHTS
from tests.test_show import write_job

COUNT = 8
Convert = Callable[..., Path]


def detection(shape: Shape, scene: Scene, task: str = "detect") -> dict[str, Any]:
    """A shape as a model of the task would find it, were it perfect."""
    box = dict(zip(("x1", "y1", "x2", "y2"), map(float, shape.box), strict=True))
    found = {"label": shape.kind, "class_id": KINDS.index(shape.kind), "score": 0.5 + len(shape.kind) / 32, **box}
    if task == "segment":
        rle = coco_rle(shape.mask)
        found["mask"] = {"height": rle["size"][0], "width": rle["size"][1], "counts": rle["counts"]}
    if task == "pose":
        places = zip(shape.keypoints.tolist(), is_hidden(shape), strict=True)
        found["keypoints"] = [{"x": x, "y": y, "score": 0.1 if hidden else 0.9} for (x, y, _), hidden in places]
    if task == "obb":
        found |= {"corners": shape.corners.ravel().tolist(), "angle": 0.0}
    return found


def is_hidden(shape: Shape) -> np.ndarray:
    """Which keypoints the model does not see, bool (5,): those that the truth lacks, and the second."""
    return (shape.keypoints[:, 2] == 0) | (np.arange(len(KEYPOINTS)) == 1)


def rows(scenes: Iterable[Scene], pictures: Iterable[Path], task: str = "detect") -> list[dict[str, Any]]:
    made = []
    for scene, path in zip(scenes, pictures, strict=True):
        height, width = scene.image.shape[:2]
        row: dict[str, Any] = {"id": str(path), "uri": str(path), "width": width, "height": height}
        if task == "classify":
            names = sorted({shape.kind for shape in scene.shapes})
            row["classes"] = [{"label": name, "class_id": KINDS.index(name), "score": 0.5} for name in names]
        else:
            row["detections"] = [detection(shape, scene, task) for shape in scene.shapes]
        made.append(row)
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, jpegs: list[bytes]) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.jpg" for number in range(COUNT)]
    for path, data in zip(paths, jpegs, strict=False):
        path.write_bytes(data)
    return paths


@pytest.fixture
def convert(tmp_path: Path, some_scenes: list[Scene], pictures: list[Path]) -> Convert:
    """Converts what a perfect model of a task found in the scenes. The last picture's row has no objects, and there is
    one row with an error."""

    def run(to: str, task: str = "detect", **options: Any) -> Path:
        made = rows(some_scenes[:COUNT], pictures, task)
        if task != "classify":
            made[-1]["detections"] = []
        made.append({"id": "broken.jpg", "uri": "broken.jpg", "error": {"stage": "decode", "type": "X", "message": ""}})
        job = write_job(tmp_path / f"job-{to}-{task}", made[:3], made[3:])
        out = tmp_path / f"{to}-{task}"
        report = shardsight.convert(job, out, to, **options)
        assert report.left_out == {"rows with errors": 1}
        assert json.loads((out / "conversion.json").read_text())["left_out"]["rows with errors"]["ids"] == [
            "broken.jpg"
        ]
        return out

    return run


def expected(scene: Scene) -> list[tuple[str, tuple[int, ...]]]:
    return [(shape.kind, shape.box) for shape in scene.shapes]


def number(name: str) -> int:
    """Of a picture by its file's name."""
    return int(Path(name).name[0])


@pytest.mark.parametrize(("task", "kind"), [("segment", "bbox"), ("segment", "segm"), ("pose", "keypoints")])
def test_coco(convert: Convert, some_scenes: list[Scene], task: str, kind: str) -> None:
    """pycocotools finds the results perfect in the data set, which has the truth's boxes, masks and keypoints."""
    out = convert("coco", task)
    data = COCO(out / "instances.json")
    assert [data.cats[n + 1]["name"] for n in range(len(data.cats))] == sorted(data.cats[n]["name"] for n in data.cats)
    found = data.loadRes(str(out / "results.json"))
    evaluation = COCOeval(data, found, kind)
    evaluation.params.kpt_oks_sigmas = np.full(len(KEYPOINTS), 0.05)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1.0
    assert len(data.imgs) == COUNT
    for id, image in data.imgs.items():
        index = number(image["file_name"])
        annotations = data.imgToAnns[id]
        assert len(annotations) == (0 if index == COUNT - 1 else len(some_scenes[index].shapes))
        for annotation, shape in zip(annotations, some_scenes[index].shapes, strict=False):
            assert data.cats[annotation["category_id"]]["name"] == shape.kind
            assert annotation["bbox"] == xywh(shape.box)
            if task == "segment":
                np.testing.assert_array_equal(data.annToMask(annotation), shape.mask)
                assert annotation["area"] == shape.mask.sum()
            else:
                points = np.array(annotation["keypoints"]).reshape(-1, 3)
                hidden = is_hidden(shape)
                assert (points[hidden] == 0).all() and (points[~hidden, 2] == 2).all()
                np.testing.assert_allclose(points[~hidden, :2], shape.keypoints[~hidden, :2], atol=1e-3)


def test_coco_of_oriented_boxes(convert: Convert, some_scenes: list[Scene]) -> None:
    """Their corners are polygons, which pycocotools draws."""
    data = COCO(convert("coco", "obb") / "instances.json")
    annotation, shape = data.imgToAnns[1][0], some_scenes[number(data.imgs[1]["file_name"])].shapes[0]
    np.testing.assert_allclose(annotation["segmentation"][0], shape.corners.ravel(), atol=1e-3)
    assert data.annToMask(annotation).sum() > 0.5 * shape.mask.sum()


def yolo_labels(out: Path, task: str) -> list[dict[str, Any]]:
    """The labels of train and val, as ultralytics reads them."""
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(out / "data.yaml"), autodownload=False)
    found = {}
    for split in ("train", "val"):
        dataset = YOLODataset(img_path=data[split], data=data, task=task, augment=False, imgsz=64)
        found |= {label["im_file"]: label | {"names": data["names"]} for label in dataset.labels}
    return list(found.values())


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_yolo(convert: Convert, some_scenes: list[Scene], pictures: list[Path], task: str) -> None:
    """ultralytics reads each picture's objects, ignores none as corrupt, and finds the pictures byte for byte."""
    out = convert("yolo", task, split=0.4)
    labels = yolo_labels(out, task)
    assert len(labels) == COUNT
    assert {path.parent.name for path in out.glob("images/*/*.jpg")} == {"train", "val"}
    for label in labels:
        index = number(label["im_file"])
        shapes = [] if index == COUNT - 1 else some_scenes[index].shapes
        assert Path(label["im_file"]).read_bytes() == pictures[index].read_bytes()
        height, width = some_scenes[index].image.shape[:2]
        assert label["shape"] == (height, width) and len(label["cls"]) == len(shapes)
        names = [label["names"][int(number)] for number in label["cls"].ravel()]
        assert names == [shape.kind for shape in shapes]
        size = np.array([width, height])
        for at, shape in enumerate(shapes):
            if task in ("detect", "pose"):
                x1, y1, x2, y2 = shape.box
                centre, sides = np.split(label["bboxes"][at] * np.tile(size, 2), 2)
                np.testing.assert_allclose(
                    np.concatenate([centre - sides / 2, centre + sides / 2]), shape.box, atol=0.01
                )
                assert (x2 - x1) * (y2 - y1) > 0
            if task == "pose":
                points, hidden = label["keypoints"][at], is_hidden(shape)
                np.testing.assert_array_equal(points[:, 2] > 0, ~hidden)
                np.testing.assert_allclose(points[~hidden, :2] * size, shape.keypoints[~hidden, :2], atol=0.01)
            if task == "obb":
                inside = np.clip(shape.corners, 0, size)
                np.testing.assert_allclose(label["segments"][at] * size, inside, atol=0.01)
            if task == "segment":
                drawn = cv2.fillPoly(np.zeros((height, width), np.uint8), [np.int32(label["segments"][at] * size)], 1)
                assert iou(drawn > 0, shape.mask) > 0.98


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def trained(data: Path, task: str, project: Path) -> YOLO:
    """A model after one epoch; ultralytics raises where it finds no labels."""
    model = YOLO(WEIGHTS / f"{task}.pt")
    flags = {"plots": False, "amp": False, "workers": 0, "device": "cpu", "verbose": False, "exist_ok": True}
    model.train(data=str(data), epochs=1, imgsz=64, batch=4, project=str(project), name="run", **flags)
    return model


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb", "classify"])
def test_ultralytics_trains_on_it(convert: Convert, tmp_path: Path, task: str) -> None:
    out = convert("yolo", task, split=0.4)
    model = trained(out if task == "classify" else out / "data.yaml", task, tmp_path / "runs")
    assert set(model.names.values()) == set(KINDS if task != "classify" else names_of(out))
    assert (tmp_path / "runs" / "run" / "weights" / "last.pt").exists()


def names_of(out: Path) -> list[str]:
    names: list[str] = json.loads((out / "conversion.json").read_text())["names"]
    return names


def test_yolo_folders_of_classes(convert: Convert, some_scenes: list[Scene]) -> None:
    """Each split has a folder of every class, as ultralytics numbers the folders that are there."""
    out = convert("yolo", "classify", split=0.4)
    for split in ("train", "val"):
        assert sorted(path.name for path in (out / split).iterdir()) == sorted(names_of(out))
    found = {number(path.name): path.parent.name for path in out.glob("*/*/*.jpg")}
    assert found == {n: min(shape.kind for shape in some_scenes[n].shapes) for n in range(COUNT)}


def test_yolo_without_a_picture_for_validation(convert: Convert) -> None:
    """ultralytics wants both splits: the one that is empty is the other, which the report says."""
    out = convert("yolo", split=0.0)
    content = yaml.safe_load((out / "data.yaml").read_text())
    assert content["train"] == content["val"] == "images/train"
    assert "no picture fell to val" in json.loads((out / "conversion.json").read_text())["notes"][0]
    assert len(yolo_labels(out, "detect")) == COUNT


def test_mot(tmp_path: Path) -> None:
    """TrackEval reads the tracks, and so does read_mot: the same ids and boxes, sorted by frame and id."""
    from trackeval.datasets import MotChallenge2DBox

    clips = [Clip(number, seed=3) for number in range(2)]
    videos = {"a/clip.mp4": clips[0], "b/clip.mp4": clips[1], "b/other.mp4": clips[0]}
    made = [
        {
            **{"id": f"{name}@{2 * index}", "uri": name, "width": 640, "height": 480, "frame_index": 2 * index},
            "detections": [
                {"label": track.kind, "score": 0.5, "track_id": track.id}
                | dict(zip(("x1", "y1", "x2", "y2"), map(float, track.box), strict=True))
                for track in frame.tracks
            ],
        }
        for name, clip in videos.items()
        for index, frame in zip(range(6), clip.frames(), strict=False)
    ]
    still = {"id": "still.jpg", "uri": "still.jpg", "width": 640, "height": 480, "detections": []}
    job = write_job(tmp_path / "job", [*made[9:], still], made[:9][::-1])
    report = shardsight.convert(job, tmp_path / "trackers" / "ours", "mot")
    assert report.left_out == {"pictures, as tracks are of videos": 1} and report.written["videos"] == 3
    files = sorted((tmp_path / "trackers" / "ours").glob("*.txt"))
    # Two videos have one name, and one file each all the same.
    assert (
        len(files) == 3 and files[-1].name == "other.txt" and all(file.stem.startswith("clip-") for file in files[:2])
    )
    truth = [frame.tracks for _, frame in zip(range(6), clips[0].frames(), strict=False)]
    for index, (ids, boxes) in enumerate(read_mot(files[-1], 11)):
        tracks = truth[index // 2] if index % 2 == 0 else []
        found = [(id, tuple(box)) for id, box in zip(ids, boxes, strict=True)]
        assert found == sorted((track.id, track.box) for track in tracks)
    for file in files:
        (tmp_path / "gt" / file.stem / "gt").mkdir(parents=True)
        lines = [line.split(",")[:6] + ["1", "1", "1"] for line in file.read_text().splitlines()]
        (tmp_path / "gt" / file.stem / "gt" / "gt.txt").write_text("".join(f"{','.join(line)}\n" for line in lines))
    sequences = {file.stem: 11 for file in files}
    places = {"GT_FOLDER": str(tmp_path / "gt"), "TRACKERS_FOLDER": str(tmp_path / "trackers"), "SEQ_INFO": sequences}
    more = {"TRACKER_SUB_FOLDER": "", "SKIP_SPLIT_FOL": True, "DO_PREPROC": False, "PRINT_CONFIG": False}
    reader = MotChallenge2DBox({**places, **more, "BENCHMARK": "MOT15"})
    for name in sequences:
        data = reader.get_raw_seq_data("ours", name)
        assert sum(map(len, data["tracker_ids"])) > 5
        for found, true, alike in zip(data["tracker_ids"], data["gt_ids"], data["similarity_scores"], strict=True):
            np.testing.assert_array_equal(found, true)
            np.testing.assert_allclose(np.diag(alike), 1)


def test_fiftyone(convert: Convert, some_scenes: list[Scene], pictures: list[Path]) -> None:
    """As FiftyOne documents its FiftyOneImageDetectionDataset: a picture's labels by its file's name without ending."""
    out = convert("fiftyone")
    content = json.loads((out / "labels.json").read_text())
    files = {path.stem: path for path in (out / "data").iterdir()}
    assert files.keys() == content["labels"].keys() and len(files) == COUNT
    assert content["classes"] == sorted(content["classes"])
    for name, labels in content["labels"].items():
        index = number(name)
        assert files[name].read_bytes() == pictures[index].read_bytes()
        height, width = some_scenes[index].image.shape[:2]
        found = [
            (one["label"], tuple(round(v) for v in (x * width, y * height, (x + w) * width, (y + h) * height)))
            for one in labels
            for x, y, w, h in [one["bounding_box"]]
        ]
        assert found == ([] if index == COUNT - 1 else expected(some_scenes[index]))
        assert all(0.5 < one["confidence"] < 1 for one in labels)


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb", "classify"])
def test_labelstudio_accepts_the_tasks(convert: Convert, task: str) -> None:
    """By its own check of tasks and predictions against the project's configuration."""
    out = convert("labelstudio", task)
    interface = LabelInterface((out / "config.xml").read_text())
    interface.validate()
    tasks = json.loads((out / "tasks.json").read_text())
    assert len(tasks) == COUNT
    for one in tasks:
        assert interface.validate_prediction(one["predictions"][0], return_errors=True) == []
        address = one["data"]["image"]
        assert (out / address.removeprefix("/data/local-files/?d=")).exists()
        assert one["predictions"][0]["model_version"] == "best.pt"
    assert sum(len(one["predictions"][0]["result"]) for one in tasks) > 5


@pytest.mark.parametrize("task", ["detect", "segment", "obb"])
def test_labelstudio_converts_them_back(convert: Convert, some_scenes: list[Scene], tmp_path: Path, task: str) -> None:
    """Its converter makes COCO of the pre-annotations, taken over as annotations; or YOLO's oriented boxes."""
    out = convert("labelstudio", task)
    tasks = json.loads((out / "tasks.json").read_text())
    for number_, one in enumerate(tasks):
        one |= {"id": number_, "annotations": one.pop("predictions")}
    (tmp_path / "annotated.json").write_text(json.dumps(tasks))
    converter = Converter(str(out / "config.xml"), str(tmp_path), download_resources=False)
    if task == "obb":
        back = tmp_path / "back"
        converter.convert_to_yolo(str(tmp_path / "annotated.json"), str(back), is_dir=False, is_obb=True)
        labels = {number(path.name.split("__")[-1]): path for path in (back / "labels").glob("*.txt")}
        for index, scene in enumerate(some_scenes[: COUNT - 1]):
            size = np.array(scene.image.shape[1::-1])
            lines = [line.split() for line in labels[index].read_text().splitlines()]
            for line, shape in zip(lines, scene.shapes, strict=True):
                found = np.array(line[1:], float).reshape(4, 2) * size
                if ((shape.corners >= 0) & (shape.corners <= size)).all():
                    nearest = np.abs(found[:, None] - shape.corners[None]).max(2)
                    assert (nearest.min(0) < 0.5).all(), (found, shape.corners)
        return
    converter.convert_to_coco(str(tmp_path / "annotated.json"), str(tmp_path / "back"), is_dir=False)
    back = json.loads((tmp_path / "back" / "result.json").read_text())
    names = {one["id"]: one["name"] for one in back["categories"]}
    for image in back["images"]:
        scene = some_scenes[number(image["file_name"].split("/")[-1])]
        annotations = [one for one in back["annotations"] if one["image_id"] == image["id"]]
        assert [names[one["category_id"]] for one in annotations] == (
            [shape.kind for shape in scene.shapes] if annotations else []
        )
        for one, shape in zip(annotations, scene.shapes, strict=False):
            if task == "detect":
                np.testing.assert_allclose(one["bbox"], xywh(shape.box), atol=0.01)
            else:
                points = np.int32(np.array(one["segmentation"][0]).reshape(-1, 2))
                drawn = cv2.fillPoly(np.zeros(shape.mask.shape, np.uint8), [points], 1)
                assert iou(drawn > 0, shape.mask) > 0.98
    assert len(back["annotations"]) == sum(len(scene.shapes) for scene in some_scenes[: COUNT - 1])


def test_voc(convert: Convert, some_scenes: list[Scene], tmp_path: Path) -> None:
    """torchvision reads the data set; boxes are whole pixels from 1."""
    out = convert("voc", split=0.4)
    shutil.copytree(out, tmp_path / "root" / "VOCdevkit" / "VOC2012")
    counts = []
    for split in ("train", "val", "trainval"):
        data = torchvision.datasets.VOCDetection(str(tmp_path / "root"), "2012", split, download=False)
        counts.append(len(data))
        for image, target in data:
            index = number(target["annotation"]["filename"])
            scene = some_scenes[index]
            size = target["annotation"]["size"]
            assert (int(size["height"]), int(size["width"])) == scene.image.shape[:2] == image.size[::-1]
            found = [
                (one["name"], tuple(int(one["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")))
                for one in target["annotation"].get("object", [])
            ]
            shapes = [] if index == COUNT - 1 else expected(scene)
            assert found == [(kind, (x1 + 1, y1 + 1, x2, y2)) for kind, (x1, y1, x2, y2) in shapes]
    assert counts[0] + counts[1] == counts[2] == COUNT and min(counts) > 0


def test_names_that_xml_cannot_hold(tmp_path: Path, pictures: list[Path]) -> None:
    row = rows_of_one(pictures[0], "a\x01 & <b>")
    shardsight.convert(write_job(tmp_path / "job", [row]), tmp_path / "out", "voc")
    (file,) = (tmp_path / "out" / "Annotations").iterdir()
    assert ElementTree.parse(file).findtext("object/name") == "a\ufffd & <b>"


def rows_of_one(path: Path, label: str, **more: Any) -> dict[str, Any]:
    found = {"label": label, "class_id": 0, "score": 0.5, "x1": 1.0, "y1": 2.0, "x2": 30.0, "y2": 40.0}
    with Image.open(path) as image:
        size = dict(zip(("width", "height"), image.size, strict=True))
    return {"id": str(path), "uri": str(path), **size, "detections": [found]} | more


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_webdataset(
    convert: Convert, some_scenes: list[Scene], pictures: list[Path], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reader has each picture with what was found in it, from tars of no more than so many samples."""
    monkeypatch.setattr("shardsight.results.formats.webdataset.SAMPLES", 3)
    out = convert("webdataset", task)
    tars = sorted(map(str, out.glob("*.tar")))
    assert len(tars) == 3
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == COUNT
    for sample in samples:
        index, content = number(sample["__key__"]), json.loads(sample["json"])
        assert sample["jpg"] == pictures[index].read_bytes() and content["id"] == str(pictures[index])
        scene = some_scenes[index]
        assert (content["height"], content["width"]) == scene.image.shape[:2]
        if task == "classify":
            assert int(sample["cls"]) == content["class_id"] and content["score"] == 0.5
            assert content["label"] == min(shape.kind for shape in scene.shapes) == names_of(out)[content["class_id"]]
        elif index < COUNT - 1:
            assert [(one["label"], tuple(map(round, one["box"]))) for one in content["objects"]] == expected(scene)
            masks = [one["mask"] for one in content["objects"]]
            sizes = [{"size": [mask["height"], mask["width"]], "counts": mask["counts"]} for mask in masks]
            assert sizes == [truth(scene)["shapes"][at]["mask"] for at in range(len(scene.shapes))]


@pytest.mark.parametrize("task", ["segment", "pose", "classify"])
def test_huggingface(
    convert: Convert, some_scenes: list[Scene], pictures: list[Path], tmp_path: Path, task: str
) -> None:
    """`datasets.load_dataset` opens the folder, with pictures and named classes."""
    out = convert("huggingface", task, split=0.4)
    data = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "validation"} and sum(map(len, data.values())) == COUNT
    for split in data.values():
        feature = split.features["label"] if task == "classify" else split.features["objects"]["categories"].feature
        assert isinstance(split.features["image"], datasets.Image) and feature.names == names_of(out)
        for row in split:
            index = number(Path(row["id"]).name)
            scene = some_scenes[index]
            shown = np.array(row["image"].convert("RGB"))
            np.testing.assert_array_equal(shown, np.array(Image.open(pictures[index]).convert("RGB")))
            if task == "classify":
                assert feature.int2str(row["label"]) == min(shape.kind for shape in scene.shapes)
                continue
            objects = row["objects"]
            found = [
                (feature.int2str(category), (round(x), round(y), round(x + w), round(y + h)))
                for category, (x, y, w, h) in zip(objects["categories"], objects["bbox"], strict=True)
            ]
            assert found == ([] if index == COUNT - 1 else expected(scene))
            assert len(objects["scores"]) == len(found)
            if task == "pose" and found:
                points = np.array(objects["keypoints"])
                np.testing.assert_allclose(
                    points[..., :2], [shape.keypoints[:, :2] for shape in scene.shapes], atol=1e-3
                )
            if task == "segment":
                size = list(scene.image.shape[:2])
                for counts, shape in zip(objects["masks"], scene.shapes, strict=False):
                    np.testing.assert_array_equal(coco_mask.decode({"size": size, "counts": counts}), shape.mask)


def test_paligemma(convert: Convert, some_scenes: list[Scene]) -> None:
    """What `detect` should answer about each picture is what the labelled set of the same boxes says."""
    out = convert("paligemma", split=0.4)
    sets = [read(str(out / name), Storage()) for name in ("train.jsonl", "val.jsonl")]
    found = {number(Path(sample.id).name): sample for truth in sets for sample in truth.samples}
    assert all(truth.samples and not truth.faults for truth in sets) and sorted(found) == list(range(COUNT))
    for index, sample in found.items():
        [(prompt, [answer])] = sample.asked.items()
        assert prompt == "detect " + " ; ".join(names_of(out))
        right = detect(seen(some_scenes[index]))[1].split(" ; ") if index < COUNT - 1 else [""]
        assert sorted(answer.split(" ; ")) == sorted(right)


def test_huggingface_in_several_files(convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsight.results.formats.huggingface.BYTES", 1)
    out = convert("huggingface", split=0.0)
    assert len(list((out / "data").glob("train-*.parquet"))) == COUNT
    assert len(datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]) == COUNT


masks = st.tuples(st.integers(1, 24), st.integers(1, 24), st.randoms(use_true_random=False), st.floats(0.05, 0.95))


@given(masks)
def test_polygons(drawn: tuple[int, int, Any, float]) -> None:
    """A polygon drawn again covers the mask, and nothing but the lines between parts that lie apart; that of a mask of
    one part is exactly the mask."""
    height, width, random, share = drawn
    mask = np.array([[random.random() < share for _ in range(width)] for _ in range(height)], np.uint8)
    ring = polygon(mask)
    if ring is None:
        assert not mask.any()
        return
    assert len(ring) >= 3 and (ring > 0).all() and (ring < [width, height]).all()
    again = cv2.fillPoly(np.zeros_like(mask), [np.int32(ring)], 1)
    assert (again >= mask).all()
    parts, _ = cv2.connectedComponents(mask, connectivity=8)
    if parts == 2:
        np.testing.assert_array_equal(again, mask)
    # The same after shares of the picture's size, as YOLO's labels have them.
    sample = Sample("a", "a", width, height)
    shares = [[float(f"{share:.7g}") for share in sample.relative(*point)] for point in ring.tolist()]
    np.testing.assert_array_equal(np.int32(np.array(shares) * [width, height]), np.int32(ring))


numbers = st.floats(-50, 150, width=32)


@given(st.tuples(numbers, numbers, numbers, numbers), st.integers(1, 100), st.integers(1, 100))
def test_boxes_are_cut_to_the_picture(box: tuple[float, float, float, float], width: int, height: int) -> None:
    found = cut(box, width, height)
    if found is None:
        x1, y1, x2, y2 = np.clip(box, 0, [width, height, width, height])
        assert x2 <= x1 or y2 <= y1
        return
    x1, y1, x2, y2 = found
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    xmin, ymin, xmax, ymax = pixels(Found(0, found))
    assert 1 <= xmin <= xmax <= width + 1 and 1 <= ymin <= ymax <= height + 1
    assert abs(xmin - 1 - x1) <= 0.5 and abs(ymin - 1 - y1) <= 0.5


@given(st.lists(st.text(max_size=12), unique=True, max_size=20), st.integers(0, 3))
def test_names_of_files(ids: list[str], frames: int) -> None:
    """Unique, whatever the ids are; of characters that every system and tool takes; the same each time."""
    ids = ids + ["a/b.jpg", "a_b.jpg", "x/a_b.jpg", "a b.jpg", "a_b.png"]
    names = [Sample(id, id, 1, 1).name for id in dict.fromkeys(ids)]
    assert len(set(names)) == len(names)
    assert all(name and name == safe(name) for name in names)
    assert names == [Sample(id, id, 1, 1).name for id in dict.fromkeys(ids)]


def test_frames_of_a_video_go_to_one_split() -> None:
    """As they look alike, a model would be validated on what it was trained on. Half of the videos, for a half."""
    contents = Contents(["a"], validation=0.5)
    videos = [
        {contents.validates(Sample(f"v{n}.mp4@{at}", f"v{n}.mp4", 9, 9, frame_index=at)) for at in range(5)}
        for n in range(200)
    ]
    assert all(len(split) == 1 for split in videos) and 70 < sum(True in split for split in videos) < 130


def test_every_format_is_tested_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'convert("{name}"' in text or f'"{name}")' in text for name in FORMATS)


def test_the_interface_of_labelstudio_escapes_names() -> None:
    assert LabelInterface(config(Contents(['a "b" & <c>'])).decode()).get_tag("box").labels == ['a "b" & <c>']
