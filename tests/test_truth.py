"""Labelled sets as people have them, and everything that may be wrong with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from demo.scenes import scenes
from demo.writers import write
from shardsight.errors import UsageError
from shardsight.storage import Storage
from shardsight.truth import MISSING, Sample, Thing, Truth, read
from tests.conftest import S3, S3_KEY, S3_SECRET

STORAGE = Storage({})
RUNS = [4, 4, 8]  # of a mask of 4 × 4: its second column


def coco(annotations: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    images = [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}]
    categories = [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}]
    given = [
        {"id": n, "image_id": 1, "category_id": 9, "bbox": [1, 0, 2, 4], **one} for n, one in enumerate(annotations)
    ]
    return {"images": images, "categories": categories, "annotations": given, **more}


def reading(folder: Path, content: Any, name: str = "labels.json", task: str | None = None) -> Truth:
    """Of a file beside one picture, a.jpg."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "a.jpg").touch()
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read(str(folder / name), STORAGE, task)


def faults(truth: Truth) -> dict[str, list[str]]:
    """By the first words of their reasons."""
    return {reason.partition(";")[0]: names for reason, names in truth.faults.items()}


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 0, 2, 0, 2, 4, 1, 4]],
        {"size": [4, 4], "counts": RUNS},
        {"size": [4, 4], "counts": rle.frPyObjects({"size": [4, 4], "counts": RUNS}, 4, 4)["counts"].decode()},
    ],
)
def test_masks_of_coco(tmp_path: Path, segmentation: Any) -> None:
    """As polygons, run lengths and compressed run lengths."""
    truth = reading(tmp_path, coco([{"segmentation": segmentation, "area": 4, "iscrowd": 0}]))
    assert (truth.task, truth.names, truth.faults) == ("segment", {9: "cat", 2: "dog"}, {})
    (thing,) = truth.samples[0].things
    assert (thing.class_id, thing.box, thing.crowd, thing.area) == (9, (1, 0, 3, 4), False, 4)
    mask = thing.rle(4, 4)
    assert mask and rle.decode(mask).tolist() == [[0, 1, 0, 0]] * 4


def test_keypoints_of_coco(tmp_path: Path) -> None:
    truth = reading(tmp_path, coco([{"keypoints": [1, 2, 2, 0, 0, 0], "num_keypoints": 1}, {}]))
    assert (truth.task, truth.keypoints) == ("pose", 2)
    assert [thing.points for thing in truth.samples[0].things] == [[(1, 2, 2), (0, 0, 0)], None]
    assert reading(tmp_path, coco([{"keypoints": [1, 2, 2]}]), task="detect").task == "detect"


NO_NUMBERS = "objects whose coordinates are no numbers"
BAD_MASK = "objects whose mask is broken, or of another size than their picture"
FAULTS: list[tuple[str, dict[str, Any], str, int]] = [
    # what is wrong: the annotation; its reason; how many objects are kept.
    ("category", {"category_id": 5}, "objects of a class that the set does not name", 1),
    ("picture", {"image_id": 5}, "objects of a picture that the set does not list", 1),
    ("text", {"bbox": [1, 0, "wide", 4]}, NO_NUMBERS, 1),
    ("nan", {"bbox": [1, 0, float("nan"), 4]}, NO_NUMBERS, 1),
    ("three", {"bbox": [1, 0, 2]}, NO_NUMBERS, 1),
    ("area", {"area": "large"}, NO_NUMBERS, 1),
    ("pairs", {"keypoints": [1, 2]}, NO_NUMBERS, 1),
    ("odd", {"segmentation": [[1, 0, 2, 0, 2]]}, BAD_MASK, 1),
    ("size", {"segmentation": {"size": [5, 4], "counts": [20]}}, BAD_MASK, 1),
    ("runs", {"segmentation": {"size": [4, 4], "counts": [4, 99]}}, BAD_MASK, 1),
    ("short", {"segmentation": {"size": [4, 4], "counts": [4, 4]}}, BAD_MASK, 1),
    ("crowd", {"iscrowd": 1}, "crowds", 2),
    ("point", {"bbox": [1, 1, 0, 0]}, "boxes without area", 2),
    ("outside", {"bbox": [-3, 0, 5, 4]}, "boxes that reach out of their picture", 2),
    ("twice", {"id": 0}, "pictures or objects whose id is there twice", 2),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "reason", "kept"), [one[1:] for one in FAULTS], ids=[one[0] for one in FAULTS])
def test_faults_of_coco(tmp_path: Path, annotation: dict[str, Any], reason: str, kept: int) -> None:
    """Each is named once, and the object beside it is kept."""
    truth = reading(tmp_path, coco([{}, annotation]))
    found = faults(truth)
    assert list(found) == [reason] and len(found[reason]) == 1
    assert len(truth.samples[0].things) == kept


def test_faults_of_a_set(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "again.jpg"}, {"id": 2, "file_name": "gone.jpg"}]
    categories = [{"id": 1, "name": "Cat"}, {"id": 2, "name": "cat "}]
    segmentation = [[1, 0, 2, 0, 2, 4]]
    given = [{"category_id": 1, "segmentation": segmentation}, {"category_id": 1}]
    truth = reading(tmp_path, coco(given, images=images, categories=categories))
    assert faults(truth) == {
        "classes of the same name as another": ["cat "],
        "pictures or objects whose id is there twice": ["again.jpg"],
        "pictures that are not there": [str(tmp_path / "gone.jpg")],
        "pictures without an object": [str(tmp_path / "gone.jpg")],
        "objects without a mask in a set of masks": [str(tmp_path / "a.jpg")],
    }
    assert [Path(sample.id).name for sample in truth.samples] == ["a.jpg", "gone.jpg"]


@pytest.mark.parametrize("place", [".", "images", "../val2017", "../images/val2017", "../images", "..", "val2017"])
def test_where_pictures_lie(tmp_path: Path, place: str) -> None:
    labels = tmp_path / "annotations" / "instances_val2017.json"
    picture = (labels.parent / place / "b.jpg").resolve()
    for path in (labels, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    picture.touch()
    images = [{"id": n, "file_name": name} for n, name in enumerate(["gone.jpg", "b.jpg"])]
    labels.write_text(json.dumps(coco([], images=images)))
    truth = read(str(labels), STORAGE)
    assert truth.samples[1].id == str(picture)
    assert len(faults(truth)["pictures that are not there"]) == 1


def test_pictures_at_addresses(tmp_path: Path) -> None:
    """A coco_url counts where it is a path; nothing is asked of the web."""
    (tmp_path / "far.jpg").touch()
    images = [{"id": 1, "file_name": "b.jpg", "coco_url": str(tmp_path / "far.jpg")}]
    images += [{"id": 2, "file_name": "c.jpg", "coco_url": "http://images.example/c.jpg"}]
    truth = reading(tmp_path / "in", coco([], images=images))
    assert [sample.id for sample in truth.samples] == [str(tmp_path / "far.jpg"), str(tmp_path / "in" / "c.jpg")]
    assert faults(truth)["pictures that are not there"] == [str(tmp_path / "in" / "c.jpg")]


def test_pictures_of_another_size() -> None:
    """A photograph stored on its side, whose labels are of the file as stored: its boxes are elsewhere."""
    truth = Truth("detect", {}, [Sample("a", 40, 30), Sample("b", 40, 30), Sample("c")], {})
    assert truth.other_sizes({"a": (30, 40), "b": (40, 30), "c": (1, 1)}) == ["a: labels of 40×30, picture of 30×40"]


# --- ultralytics


def data_yaml(folder: Path, labels: dict[str, str], more: str = "") -> Path:
    """labels: name → the lines of its label file, of a picture in images/val."""
    for part in ("images", "labels"):
        (folder / part / "val").mkdir(parents=True, exist_ok=True)
    for name, text in labels.items():
        (folder / "images" / "val" / f"{name}.jpg").touch()
        (folder / "labels" / "val" / f"{name}.txt").write_text(text)
    (folder / "data.yaml").write_text(more or "val: images/val\nnames: [cat, dog]\n")
    return folder / "data.yaml"


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_labels_of_ultralytics(tmp_path: Path, task: str) -> None:
    """The demo's own, which ultralytics trains on: each shape of each scene, in its place."""
    some = {scene.name: scene for scene in scenes(20, 77)}
    write(some.values(), tmp_path, "yolo", task)
    truth = read(str(tmp_path), STORAGE)
    assert (truth.task, truth.normalised, truth.faults) == (task, True, {}) and truth.samples
    for sample in truth.samples:
        scene = some[Path(sample.id).stem]
        height, width = scene.image.shape[:2]
        kinds = [truth.names[thing.class_id] for thing in sample.things]
        assert kinds == [shape.kind for shape in scene.shapes]
        if task == "detect":
            boxes = [thing.scaled(width, height).box for thing in sample.things]
            assert np.allclose(boxes, [shape.box for shape in scene.shapes], atol=0.01)


def test_a_set_in_a_store(tmp_path: Path, s3: S3) -> None:
    """As on a disk, but for the names of the pictures."""
    some = list(scenes(6, 77))
    for format in ("coco", "yolo"):
        write(some, tmp_path / format, format)
        shutil.copytree(tmp_path / format, s3.bucket("labelled") / format)
    storage = Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET})
    for place in ("coco/annotations.json", "yolo/data.yaml", "yolo"):
        local, remote = read(str(tmp_path / place), STORAGE), read(f"s3://labelled/{place}", storage)
        assert remote.faults.keys() == local.faults.keys() and MISSING not in remote.faults
        base = f"{tmp_path}/"
        assert [one.id for one in remote.samples] == [
            f"s3://labelled/{one.id.removeprefix(base)}" for one in local.samples
        ]
        assert [one.things for one in remote.samples] == [one.things for one in local.samples]
    with pytest.raises(UsageError, match="s3://labelled/nowhere"):
        read("s3://labelled/nowhere.json", storage)


def test_objects_of_ultralytics(tmp_path: Path) -> None:
    text = "1 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.3 0.1 0.3 0.5\n"
    truth = read(str(data_yaml(tmp_path, {"a": text})), STORAGE)
    box, polygon = truth.samples[0].things
    assert truth.task == "segment" and list(faults(truth)) == ["objects without a mask in a set of masks"]
    assert (box.class_id, box.box) == (1, pytest.approx((0.4, 0.3, 0.6, 0.7)))
    assert (polygon.box, polygon.polygons) == ((0.1, 0.1, 0.3, 0.5), [[0.1, 0.1, 0.3, 0.1, 0.3, 0.5]])
    scaled = polygon.scaled(100, 10)
    assert scaled.box == pytest.approx((10, 1, 30, 5)) and scaled.polygons == [pytest.approx([10, 1, 30, 1, 30, 5])]


def test_oriented_boxes_or_polygons(tmp_path: Path) -> None:
    """Four corners are either, which only the model tells."""
    path = str(data_yaml(tmp_path, {"a": "0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5\n"}))
    assert read(path, STORAGE).samples[0].things[0].corners == [0.1, 0.1, 0.3, 0.1, 0.3, 0.5, 0.1, 0.5]
    assert read(path, STORAGE, "segment").samples[0].things[0].polygons
    assert read(path, STORAGE, "detect").samples[0].things[0].box == (0.1, 0.1, 0.3, 0.5)


def test_a_detector_on_keypoints(tmp_path: Path) -> None:
    """Their boxes are its truth, not the outline of the keypoints."""
    more = "val: images/val\nnames: [cat]\nkpt_shape: [3, 2]\n"
    path = str(data_yaml(tmp_path, {"a": "0 0.5 0.5 0.2 0.4 0.1 0.1 0.2 0.2 0 0\n"}, more))
    assert read(path, STORAGE, "detect").samples[0].things == [Thing(0, pytest.approx((0.4, 0.3, 0.6, 0.7)))]
    (pose,) = read(path, STORAGE).samples[0].things
    assert pose.points == [(0.1, 0.1, 2), (0.2, 0.2, 2), (0, 0, 0)]


def test_faults_of_ultralytics(tmp_path: Path) -> None:
    lines = ["0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2", "7 0.5 0.5 0.2 0.2", "0 0.5 x 0.2 0.2", "0 0.5 nan 0.2 0.2"]
    lines += ["0 0.5 0.5", "0 0.9 0.5 0.4 0.2", "0 0.5 0.5 0 0", ""]
    path = data_yaml(tmp_path, {"a": "\n".join(lines), "b": ""}, "val: list.txt\nnames: {0: cat}\n")
    names = ["./images/val/a.jpg", "images/val/a.jpg", "images/val/b.jpg", "images/val/gone.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    truth = read(str(path), STORAGE)
    a, b, gone = (str(tmp_path / "images" / "val" / name) for name in ("a.jpg", "b.jpg", "gone.jpg"))
    assert faults(truth) == {
        "lines that a label file has twice, or pictures that a list has twice": [a, f"{a}, line 2"],
        "objects of a class that the set does not name": [f"{a}, line 3: class 7"],
        NO_NUMBERS: [f"{a}, line 4", f"{a}, line 5"],
        "lines that are no label": [f"{a}, line 6"],
        "boxes that reach out of their picture": [a],
        "boxes without area": [a],
        "pictures without an object": [b, gone],
        "pictures that are not there": [gone],
    }
    assert [len(sample.things) for sample in truth.samples] == [3, 0, 0]


@pytest.mark.parametrize(
    "more",
    [
        "path: .\nval: images/val",
        "path: /nowhere/of/another/machine\nval: images/val",
        "path: datasets/demo\nval: [images/val]",
        "val: ../images/val",  # as Roboflow writes it
        "val: ABSOLUTE/images/val",
        "path: ABSOLUTE\nval: images/val",
        "train: images/val",
        "val:\ntest: images/val",
    ],
)
def test_splits(tmp_path: Path, more: str) -> None:
    more = more.replace("ABSOLUTE", str(tmp_path)) + "\nnames: [cat, dog]\n"
    truth = read(str(data_yaml(tmp_path, {"a": "0 0.5 0.5 0.2 0.2\n"}, more)), STORAGE)
    assert [(Path(sample.id), len(sample.things)) for sample in truth.samples] == [(tmp_path / "images/val/a.jpg", 1)]


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("val/dog/1.jpg", "val/cat/2.JPG", "val/cat/deep/3.png", "val/stray.jpg", "train/dog/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    truth = read(str(tmp_path), STORAGE)
    assert (truth.task, truth.names) == ("classify", {0: "cat", 1: "dog"})
    assert {Path(one.id).name: one.class_id for one in truth.samples} == {"1.jpg": 1, "2.JPG": 0, "3.png": 0}
    assert faults(truth) == {"pictures in no folder of a class": [str(tmp_path / "val" / "stray.jpg")]}


# --- Questions and answers


def test_jsonl(tmp_path: Path) -> None:
    """One suffix or several; U+2028, which Python takes for the end of a line, does not end one of JSON."""
    lines = [
        {"image": "a.jpg", "prefix": "caption en", "suffix": "a\u2028cat"},
        {"image": "./a.jpg", "prefix": " ocr ", "suffix": ["STOP", "stop"]},
        {"image": "gone.jpg", "prefix": "answer en how many?", "suffix": 2},
        {"image": "a.jpg", "prefix": "caption en", "suffix": "a pet"},
    ]
    truth = reading(tmp_path, "\n".join(json.dumps(one, ensure_ascii=False) for one in lines) + "\n", "q.jsonl")
    assert [(Path(sample.id).name, sample.asked) for sample in truth.samples] == [
        ("a.jpg", {"caption en": ["a\u2028cat", "a pet"], "ocr": ["STOP", "stop"]}),
        ("gone.jpg", {"answer en how many?": ["2"]}),
    ]
    assert faults(truth) == {
        "pictures that are not there": [str(tmp_path / "gone.jpg")],
        "prompts that are there twice for a picture": ["line 4: a.jpg, caption en"],
    }


def test_faults_of_jsonl(tmp_path: Path) -> None:
    good = {"image": "a.jpg", "prefix": "ocr", "suffix": "x"}
    lines = [good, good | {"image": None}, good | {"suffix": []}, good | {"prefix": "answer en"}, [1]]
    lines.append(good | {"prefix": "detect cat", "suffix": "<loc0001> cat"})
    text = "\n".join([*map(json.dumps, lines), '{"image": "a.jpg", "pre'])
    truth = reading(tmp_path, text, "q.jsonl")
    assert faults(truth) == {
        "lines without a picture, a prompt or an answer": ["line 2", "line 3", "line 5", "line 7"],
        "right answers to detect or segment in which no object can be read": ["line 6"],
        "prompts that PaliGemma does not take": ["line 4: 'answer en' lacks its rest: write answer LANG QUESTION"],
    }
    assert len(truth.samples) == 1


@pytest.mark.parametrize("files", [1, 2])
def test_vqa(tmp_path: Path, files: int) -> None:
    """VQAv2's two files, or one; with the answers of ten people, or one."""
    questions: list[dict[str, Any]] = [{"question_id": n, "image_id": 42, "question": f"What {n}?"} for n in (10, 11)]
    questions.append({"question_id": 12, "image": "a.jpg", "question": "Where?"})
    annotations = [
        {"question_id": 10, "answers": [{"answer": "yes"}] * 9 + [{"answer": "no"}]},
        {"question_id": 12, "multiple_choice_answer": "here"},
    ]
    content: dict[str, Any] = {"questions": questions, "data_subtype": "val2014"}
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").touch()
    if files == 1:
        content["annotations"] = annotations
    else:
        (tmp_path / "v2_annotations.json").write_text(json.dumps({"annotations": annotations}))
    truth = reading(tmp_path, content, "v2_questions.json")
    assert [(Path(sample.id).name, sample.asked) for sample in truth.samples] == [
        ("COCO_val2014_000000000042.jpg", {"answer en What 10?": ["yes"] * 9 + ["no"]}),
        ("a.jpg", {"answer en Where?": ["here"]}),
    ]
    assert faults(truth) == {"lines without a picture, a prompt or an answer": ["question 11"]}


# --- What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", "{", "cannot be read as labels"),
        ("x.json", {"a": 1}, "no labelled set that is known"),
        ("x.json", coco([], images=[{"id": 1}]), "it lacks 'file_name'"),
        ("x.json", coco([], images=[]), "lists no pictures"),
        ("x.json", coco([]) | {"annotations": 3}, "cannot be read as labels"),
        ("x.json", {"questions": []}, "no annotations: put them beside it"),
        ("x.jsonl", "no JSON\n", "has nothing with image, prefix and suffix; line 1: lines"),
        ("x.yaml", "names: [a]\n", "names no pictures"),
        ("x.yaml", "names: [a]\nval: nowhere\n", "there are no pictures in val: nowhere"),
        ("x.yaml", "names: [a]\nval: [., nowhere]\n", "there are no pictures in val: nowhere"),
        ("x.yaml", "names: 3\nval: nowhere\n", "cannot be read as labels"),
        ("x.yaml", "a: [\n", "cannot be read as labels"),
        ("x.yaml", "- a\n", "no labelled set that is known"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        reading(tmp_path, content, name)
    assert "\n" not in str(raised.value)


def test_labels_for_another_task(tmp_path: Path) -> None:
    path = str(data_yaml(tmp_path, {"a": "0 0.5 0.5 0.2 0.2\n"}))
    for task, words in (("classify", "the model is a classifier"), ("pose", "has no kpt_shape")):
        with pytest.raises(UsageError, match=words):
            read(path, STORAGE, task)
    with pytest.raises(UsageError, match="labels for detect, and the model is for segment"):
        reading(tmp_path, coco([{}]), task="segment")
    with pytest.raises(UsageError, match="nowhere"):
        read(str(tmp_path / "nowhere.json"), STORAGE)
