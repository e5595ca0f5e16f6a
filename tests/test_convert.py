"""Converting a job: which rows and objects, which pictures, from and to where, and what the user is told."""

import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import shardsight
from demo.scenes import KINDS, Scene
from demo.writers import jpeg
from shardsight import cli
from shardsight.conversion import FORMATS
from shardsight.decode.pictures import decode
from shardsight.storage import Storage
from tests.clips import decoded, encode, numbered
from tests.conftest import ROOT, S3, WEIGHTS, job_of, write_tar
from tests.test_formats import rows_of_one, trained, yolo_labels
from tests.test_show import write_job

Annotate = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, jpegs: list[bytes]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rows of pictures from wherever a job reads them, with one object each; and each picture's bytes, None for frames
    of videos."""
    folder = tmp_path_factory.mktemp("sources")
    made: dict[str, tuple[str, bytes]] = {}
    (folder / "a").mkdir()
    (folder / "a" / "b.jpg").write_bytes(jpegs[0])
    (folder / "a_b.jpg").write_bytes(jpegs[1])
    (folder / "no ending").write_bytes(jpegs[2])
    for name, data in (("a/b.jpg", jpegs[0]), ("a_b.jpg", jpegs[1]), ("no ending", jpegs[2])):
        made[str(folder / name)] = str(folder / name), data
    write_tar(folder / "t.tar", [("x/1.jpg", jpegs[3]), ("x/2.jpg", jpegs[4]), ("y.JPEG", jpegs[5])])
    for name, data in (("x/1.jpg", jpegs[3]), ("y.JPEG", jpegs[5])):
        made[f"{folder}/t.tar#{name}"] = f"{folder}/t.tar", data
    pq.write_table(pa.table({"image": jpegs[6:9]}), folder / "t.parquet")
    made[f"{folder}/t.parquet#1"] = f"{folder}/t.parquet", jpegs[7]
    file = io.BytesIO()
    Image.open(io.BytesIO(jpegs[9])).save(file, "PNG")
    (folder / "c.png").write_bytes(file.getvalue())
    made[str(folder / "c.png")] = str(folder / "c.png"), file.getvalue()
    found = []
    for id, (uri, data) in made.items():
        width, height = decode(data)[1:]
        found.append({"id": id, "uri": uri, "width": width, "height": height, "detections": [OBJECT]})
    return found, {id: data for id, (_, data) in made.items()}


OBJECT = {"label": "star", "class_id": 4, "score": 0.75, "x1": 1.0, "y1": 2.0, "x2": 30.0, "y2": 40.0}


def ids_of(out: Path) -> dict[str, Path]:
    """The pictures of a VOC data set by the ids in its annotations."""
    from xml.etree import ElementTree

    annotations = map(ElementTree.parse, (out / "Annotations").iterdir())
    return {one.findtext("source/image", ""): out / "JPEGImages" / one.findtext("filename", "") for one in annotations}


def test_pictures_come_from_where_the_job_read_them(
    tmp_path: Path, sources: tuple[list[dict[str, Any]], dict[str, bytes]]
) -> None:
    """Loose, from tars and from Parquet; byte for byte, each with an object of its own and a name of its own."""
    found, pictures = sources
    shardsight.convert(write_job(tmp_path / "job", found[:4], found[4:]), tmp_path / "out", "voc")
    files = ids_of(tmp_path / "out")
    assert files.keys() == pictures.keys() and len(set(files.values())) == len(pictures)
    for id, path in files.items():
        assert path.read_bytes() == pictures[id]
        assert path.suffix == (".png" if id.endswith("c.png") else ".jpg")


def test_what_few_tools_read_becomes_a_png(tmp_path: Path, jpegs: list[bytes]) -> None:
    """A GIF, say, which ultralytics does not take; with the pixels that the job saw."""
    Image.open(io.BytesIO(jpegs[0])).save(tmp_path / "a.gif")
    row = rows_of_one(tmp_path / "a.gif", "star")
    shardsight.convert(write_job(tmp_path / "job", [row]), tmp_path / "out", "yolo")
    (label,) = yolo_labels(tmp_path / "out", "detect")[:1]
    shown = np.array(Image.open(label["im_file"]))
    np.testing.assert_array_equal(shown, decode((tmp_path / "a.gif").read_bytes())[0])


def test_frames_of_videos(tmp_path: Path) -> None:
    """The frame that the row is of, as a JPEG, from a file and from within a tar, however the job sampled it."""
    clip = encode(numbered(40), g="10")
    (tmp_path / "v.mp4").write_bytes(clip)
    write_tar(tmp_path / "t.tar", [("v.mp4", clip)])
    size = {"width": 128, "height": 96}
    for sampling, indices in (
        ({}, (3, 30, 31)),
        ({"every": 5}, (15, 35)),
        ({"fps": 5.0}, (0, 20)),
        ({"keyframes": True}, (8,)),
    ):
        for id, uri in ((f"{tmp_path}/v.mp4", f"{tmp_path}/v.mp4"), (f"{tmp_path}/t.tar#v.mp4", f"{tmp_path}/t.tar")):
            made = [
                {"id": f"{id}@{index}", "uri": uri, **size, "frame_index": index, "pts_seconds": index / 25}
                | {"detections": [OBJECT]}
                for index in indices
            ]
            made.append(made[0] | {"id": f"{id}@4000", "frame_index": 4000})
            name = f"{zlib.crc32(repr((sampling, id)).encode())}"
            configuration = {"storage": {}, "prompt": [], **sampling}
            job = write_job(tmp_path / f"job{name}", made, configuration=configuration)
            report = shardsight.convert(job, tmp_path / f"out{name}", "voc")
            assert report.left_out == {"pictures that cannot be read: MissingFrame": 1}
            files = ids_of(tmp_path / f"out{name}")
            assert {one["id"] for one in made[:-1]} == files.keys()
            for one in made[:-1]:
                shown = np.array(Image.open(files[one["id"]]), np.int16)
                frame = decoded(clip)[one["frame_index"]][1]
                assert files[one["id"]].suffix == ".jpg" and np.abs(shown - frame).mean() < 4


def test_kept_pictures(tmp_path: Path, jpegs: list[bytes]) -> None:
    """With --keep-images they are in the results, and the originals are not needed any more."""
    size = decode(jpegs[0])[1:]
    row = {"id": "gone.jpg", "uri": "gone.jpg", "width": size[0], "height": size[1], "detections": [OBJECT]}
    configuration = {"storage": {}, "prompt": [], "keep_images": True}
    job = write_job(tmp_path / "job", [row | {"image": jpegs[0]}], configuration=configuration)
    shardsight.convert(job, tmp_path / "out", "voc")
    assert ids_of(tmp_path / "out")["gone.jpg"].read_bytes() == jpegs[0]


def test_pictures_turned_by_exif(tmp_path: Path, jpegs: list[bytes]) -> None:
    """Boxes are of the picture as shown, and so ultralytics reads the picture and its size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(jpegs[0])).save(tmp_path / "a.jpg", exif=exif)
    _, width, height = decode((tmp_path / "a.jpg").read_bytes())
    row = {"id": str(tmp_path / "a.jpg"), "uri": str(tmp_path / "a.jpg"), "width": width, "height": height}
    shardsight.convert(write_job(tmp_path / "job", [row | {"detections": [OBJECT]}]), tmp_path / "out", "yolo")
    label = yolo_labels(tmp_path / "out", "detect")[0]
    assert label["shape"] == (height, width) != Image.open(tmp_path / "a.jpg").size[::-1]
    x, y, w, h = label["bboxes"][0] * [width, height, width, height]
    assert (round(x - w / 2), round(y - h / 2), round(x + w / 2), round(y + h / 2)) == (1, 2, 30, 40)


def test_a_job_whose_inputs_have_changed(
    tmp_path: Path, jpegs: list[bytes], annotate: Annotate, detector: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The objects of one picture must not get another's pixels: what is gone or has changed since the job read it is
    counted by reason, named, and costs nothing else."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.jpg").write_bytes(jpegs[index])
    (folder / "broken.jpg").write_bytes(b"no picture")
    for name in ("kept", "changed"):
        write_tar(folder / f"{name}.tar", [("6.jpg", jpegs[6]), ("7.jpg", jpegs[7])])
    (folder / "v.mp4").write_bytes(encode(cv2.resize(decode(data)[0], (320, 240)) for data in jpegs[:3]))
    code, said = annotate(folder, "--output", tmp_path / "job", "--yolo", detector, "--max-error-rate", 1)
    assert code == 0, said
    assert list(job_of(tmp_path / "job")["models"]["yolo"]["names"].values()) == list(KINDS)
    (folder / "1.jpg").write_bytes(black_one_like(jpegs[1]))
    (folder / "2.jpg").unlink()
    write_tar(folder / "changed.tar", [("6.jpg", black_one_like(jpegs[6])), ("7.jpg", jpegs[7]), ("8.jpg", jpegs[8])])
    arguments = [str(tmp_path / "job"), "--to", "yolo", "--output", str(tmp_path / "out")]
    assert cli.convert(arguments) == 0
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    for words in ("1 rows with errors", "3 pictures that have changed since the job read them"):
        assert words in printed.err
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    left_out = {reason: sorted(Path(id).name for id in one["ids"]) for reason, one in record["left_out"].items()}
    assert left_out == {
        "rows with errors": ["broken.jpg"],
        "pictures that have changed since the job read them": ["1.jpg", "changed.tar#6.jpg", "changed.tar#7.jpg"],
        "pictures that cannot be read: FileNotFoundError": ["2.jpg"],
    }
    assert sum(count for what, count in record["written"].items() if what.startswith("pictures")) == 3 + 2 + 3
    # All classes of the model, whether found or not, and in its order.
    labels = yolo_labels(tmp_path / "out", "detect")
    assert list(labels[0]["names"].values()) == record["names"] == list(KINDS)


def black_one_like(data: bytes) -> bytes:
    """A picture of the same size."""
    file = io.BytesIO()
    Image.new("RGB", decode(data)[1:]).save(file, "JPEG")
    return file.getvalue()


def test_a_picture_that_is_another_now(tmp_path: Path, jpegs: list[bytes]) -> None:
    """Where the results tell no version, as of pictures of the web, the size shows it; or that it is none any more."""
    made = []
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(jpegs[index])
        made.append(rows_of_one(tmp_path / f"{index}.jpg", "star"))
    Image.new("RGB", (33, 44)).save(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").write_text("<html>gone</html>")
    job = write_job(tmp_path / "job", made)
    report = shardsight.convert(job, tmp_path / "out", "voc")
    assert report.left_out == {"pictures that have changed since the job read them": 2}
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(
        shardsight.UsageError, match=r"nothing of .* could be .*2 pictures that have changed .*; 1 .*FileNotFound"
    ):
        shardsight.convert(job, tmp_path / "none", "yolo")


def test_what_is_converted(tmp_path: Path) -> None:
    """Filters, classes and what is left out, each counted."""
    found = [
        OBJECT,
        OBJECT | {"label": "ring", "class_id": 7, "score": 0.5},
        OBJECT | {"label": "ring", "class_id": 7, "score": 0.2},
        OBJECT | {"label": "cross", "class_id": 1},
        OBJECT | {"label": None, "class_id": None},
        OBJECT | {"x2": 1.0},
        OBJECT | {"x1": -5.0, "y2": 1000.0},
    ]
    row = {"id": "a.jpg", "uri": "a.jpg", "width": 100, "height": 50, "detections": found}
    job = write_job(
        tmp_path / "job", [row, row | {"id": "b.jpg", "detections": []}, row | {"id": "c.jpg", "detections": None}]
    )
    report = shardsight.convert(job, tmp_path / "out", "coco", min_score=0.3, label=["star", "ring"])
    assert report.left_out == {
        **{"objects with a score below 0.3": 1, "objects of other labels": 1, "objects without a label": 1},
        **{"objects without an area in the picture": 1, "rows without detections": 1},
    }
    assert report.written == {"images": 2, "objects": 3}
    content = json.loads((tmp_path / "out" / "instances.json").read_text())
    # In the order of the model's class ids.
    assert [(one["id"], one["name"]) for one in content["categories"]] == [(1, "star"), (2, "ring")]
    assert [(one["category_id"], one["bbox"]) for one in content["annotations"]] == [
        *((1, [1.0, 2.0, 29.0, 38.0]), (2, [1.0, 2.0, 29.0, 38.0]), (1, [0.0, 2.0, 30.0, 48.0]))
    ]


def answers_job(out: Path) -> Path:
    """An object with a score; one without, whose answer's mean log-probability is -1; a row that was not asked."""
    both = [OBJECT | {"class_id": 0}, OBJECT | {"label": "ring", "class_id": 1}]
    answers = [
        {"prompt": "detect star ; ring", "text": "", "score": -0.1, "detections": both},
        {"prompt": "caption en", "text": "a star", "score": -0.5, "detections": []},
        {"prompt": "detect ring", "text": "", "score": -1.0}
        | {"detections": [OBJECT | {"label": "ring", "class_id": 0, "score": None}]},
    ]
    row = {"id": "a.jpg", "uri": "a.jpg", "width": 100, "height": 50, "answers": answers}
    prompts = [one["prompt"] for one in answers]
    configuration = {"storage": {}, "prompt": prompts}
    return write_job(out, [row, row | {"id": "b.jpg", "answers": None}], configuration=configuration)


def test_answers(tmp_path: Path) -> None:
    """Two prompts may give their own class the same number: classes are the labels, sorted."""
    job = answers_job(tmp_path / "job")
    report = shardsight.convert(job, tmp_path / "out", "coco", source="answers")
    assert report.left_out == {"rows without answers": 1} and report.written == {"images": 1, "objects": 3}
    content = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert [one["name"] for one in content["categories"]] == ["ring", "star"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["category_id"], round(one["score"], 3)) for one in results] == [(2, 0.75), (1, 0.75), (1, 0.368)]
    report = shardsight.convert(job, tmp_path / "one", "coco", source="answers", prompt=["detect ring"])
    assert report.written == {"images": 1, "objects": 1}
    content = json.loads((tmp_path / "one" / "instances.json").read_text())
    assert [one["name"] for one in content["categories"]] == ["ring"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--from", "answers"), "no row has answers: try --from detections"),
        (("--label", "dog"), "--label dog: no such class, only ring, star"),
        (("--min-score", "0.9"), "nothing is left to convert of detections with a score of at least 0.9"),
        (("--min-score", "2"), "--min-score 2.0: expected 0 to 1"),
        (("--split", "0.3"), "--split: coco does not tell training from validation"),
        (("--link",), "--link: coco has no pictures as files"),
        (("--to", "yolo", "--split", "1"), "--split 1.0: expected a share"),
        (("--to", "yolo", "--link", "--output", "s3://bucket/x"), "which has no links"),
        (("--to", "mot"), "holds no tracks: annotate videos with --track"),
        (("--prompt", "ocr"), "give --from answers, too"),
        (("--storage", "key"), "expected KEY=VALUE"),
    ],
)
def test_refusals(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str) -> None:
    """One sentence that says what to do, exit code 2, and nothing written."""
    found = [OBJECT, OBJECT | {"label": "ring", "class_id": 2}]
    row = {"id": "a.jpg", "uri": "a.jpg", "width": 100, "height": 50, "detections": found}
    job = write_job(tmp_path / "job", [row])
    refused(capfd, [str(job), "--to", "coco", "--output", str(tmp_path / "out"), *flags], said)
    assert not (tmp_path / "out").exists()


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["convert", *arguments]) == 2
    printed = capfd.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_refusals_of_places_and_jobs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = {"id": "a.jpg", "uri": "a.jpg", "width": 100, "height": 50, "detections": [OBJECT]}
    job = write_job(tmp_path / "job", [row])
    classes = [{"label": "star", "class_id": 0, "score": 0.5}]
    classified = write_job(tmp_path / "classified", [row | {"detections": None, "classes": classes}])
    to = ["--to", "coco", "--output"]
    refused(capfd, [str(tmp_path), *to, str(tmp_path / "out")], "holds no job.json")
    refused(capfd, [str(classified), *to, str(tmp_path / "out")], "classes of whole pictures, which coco cannot say")
    asked = answers_job(tmp_path / "asked")
    refused(capfd, [str(asked), *to, str(tmp_path / "out")], "no row has detections: try --from answers")
    refused(
        capfd, [str(asked), *to, str(tmp_path / "out"), "--from", "answers", "--prompt", "ocr"], "'ocr': the job asked"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(capfd, [str(job), *to, str(tmp_path / "mine")], "is not empty")
    refused(capfd, [str(job), *to, str(tmp_path / "mine"), "--overwrite"], "no conversion wrote it")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    refused(capfd, [str(job), *to, str(tmp_path / "mine" / "thesis.txt")], "is a file")
    refused(capfd, [str(job), *to, str(tmp_path / "mine" / "thesis.txt" / "x")], "cannot be written")


def test_overwrite(tmp_path: Path, jpegs: list[bytes]) -> None:
    """An earlier conversion goes, all of it, and links in it are removed and not followed."""
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    job = write_job(tmp_path / "job", [rows_of_one(tmp_path / "a.jpg", "star")])
    shardsight.convert(job, tmp_path / "out", "yolo", link=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "out" / "images" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "precious")
    shardsight.convert(job, tmp_path / "out", "coco", overwrite=True)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["conversion.json", "instances.json", "results.json"]
    assert (tmp_path / "precious" / "file").exists() and (tmp_path / "a.jpg").read_bytes() == jpegs[0]


def test_links(tmp_path: Path, jpegs: list[bytes]) -> None:
    """Instead of copies, except of a JPEG that ultralytics would rewrite, through the link."""
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    (tmp_path / "b.jpg").write_bytes(odd := jpegs[1] + b"\0\0")
    write_tar(tmp_path / "t.tar", [("c.jpg", jpegs[2])])
    width, height = decode(jpegs[2])[1:]
    inside = {"id": f"{tmp_path}/t.tar#c.jpg", "uri": f"{tmp_path}/t.tar", "width": width, "height": height}
    made = [rows_of_one(tmp_path / name, "star") for name in ("a.jpg", "b.jpg")] + [inside | {"detections": [OBJECT]}]
    shardsight.convert(write_job(tmp_path / "job", made), tmp_path / "out", "yolo", link=True)
    links = {path.name[0]: path.is_symlink() for path in (tmp_path / "out" / "images").glob("*/*.jpg")}
    assert links == {"a": True, "b": False, "t": False}
    assert len(yolo_labels(tmp_path / "out", "detect")) == 3
    assert (tmp_path / "a.jpg").read_bytes() == jpegs[0] and (tmp_path / "b.jpg").read_bytes() == odd


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "mot"])
def test_stores(tmp_path: Path, s3: S3, jpegs: list[bytes], to: str, capfd: pytest.CaptureFixture[str]) -> None:
    """From a job, and pictures, in S3 into S3: the same files as on a disk."""
    bucket = s3.bucket(f"convert-{to}")
    for index in range(3):
        (bucket / f"{index}.jpg").write_bytes(jpegs[index])
    write_tar(bucket / "t.tar", [("3.jpg", jpegs[3])])
    places = {f"{index}.jpg": index for index in range(3)} | {"t.tar#3.jpg": 3}
    made = []
    for name, index in places.items():
        width, height = decode(jpegs[index])[1:]
        id = f"s3://convert-{to}/{name}"
        made.append({"id": id, "uri": id.partition("#")[0], "width": width, "height": height, "detections": [OBJECT]})
    write_job(bucket / "job", made)
    arguments = ["--to", to, *s3.options()]
    assert cli.convert([f"s3://convert-{to}/job", "--output", f"s3://convert-{to}/out/", *arguments]) == 0
    assert cli.convert([f"s3://convert-{to}/job", "--output", str(tmp_path / "local"), *arguments]) == 0
    stored, local = bucket / "out", tmp_path / "local"
    files = sorted(path.relative_to(local) for path in local.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(stored) for path in stored.rglob("*") if path.is_file())
    for path in files:
        text = (stored / path).read_bytes().replace(f"s3://convert-{to}/out/".encode(), b"/data/local-files/?d=")
        assert text == (local / path).read_bytes()
    capfd.readouterr()
    refused(capfd, [f"s3://convert-{to}/job", "--output", f"s3://convert-{to}/out", *arguments], "is not empty")
    (stored / "stale").write_text("x")
    assert cli.convert([f"s3://convert-{to}/job", "--output", f"s3://convert-{to}/out", *arguments, "--overwrite"]) == 0
    assert not (stored / "stale").exists()


@pytest.mark.parametrize("to", ["coco", "yolo"])
def test_a_store_that_is_not_there(
    tmp_path: Path, s3: S3, jpegs: list[bytes], capfd: pytest.CaptureFixture[str], to: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    job = str(write_job(tmp_path / "job", [rows_of_one(tmp_path / "a.jpg", "star")]))
    missing, here = "s3://no-such-bucket/x", str(tmp_path / "out")
    refused(capfd, [job, "--to", to, "--output", missing, *s3.options()], "there is no bucket no-such-bucket")
    refused(capfd, [missing, "--to", to, "--output", here, *s3.options()], "no-such-bucket/x holds no job.json")


def test_a_write_that_fails(
    tmp_path: Path, s3: S3, jpegs: list[bytes], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of a store are written several at a time; one that fails must not be missed."""

    def refuse(self: Storage, uri: str, data: bytes) -> None:
        if uri.endswith(".txt"):
            raise PermissionError("denied")

    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    job = str(write_job(tmp_path / "job", [rows_of_one(tmp_path / "a.jpg", "star")]))
    s3.bucket("denied")
    monkeypatch.setattr(Storage, "write", refuse)
    refused(capfd, [job, "--to", "yolo", "--output", "s3://denied/x", *s3.options()], "may not be accessed (denied)")


def test_an_unfinished_job_is_converted_so_far(tmp_path: Path) -> None:
    row = {"id": "a.jpg", "uri": "a.jpg", "width": 100, "height": 50, "detections": [OBJECT]}
    report = shardsight.convert(write_job(tmp_path / "job", [row], status="running"), tmp_path / "out", "coco")
    assert report.notes == ["the job is running: these are its rows so far"]


def test_neither_ray_nor_a_model_is_loaded(tmp_path: Path) -> None:
    """Converting takes seconds, and works where neither runs."""
    row = {"id": "a.jpg", "uri": "a.jpg", "width": 100, "height": 50, "detections": [OBJECT]}
    job = write_job(tmp_path / "job", [row])
    code = (
        f"import shardsight, sys; shardsight.convert({str(job)!r}, {str(tmp_path / 'out')!r}, 'coco')\n"
        "sys.exit(', '.join({'ray', 'torch', 'ultralytics', 'vllm', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_paligemma_is_distilled_into_yolo(
    tmp_path: Path, some_scenes: list[Scene], annotate: Annotate, capfd: pytest.CaptureFixture[str]
) -> None:
    """The README's three commands, on a handful of pictures: annotate, convert, train."""
    (tmp_path / "in").mkdir()
    for index, scene in enumerate(some_scenes[:12]):
        (tmp_path / "in" / f"{index}.jpg").write_bytes(jpeg(scene))
    asked = ("--paligemma", WEIGHTS / "paligemma", "--prompt", f"detect {' ; '.join(KINDS)}")
    code, said = annotate(tmp_path / "in", "--output", tmp_path / "job", *asked)
    assert code == 0, said
    flags = ["--to", "yolo", "--from", "answers", "--split", "0.3", "--output", str(tmp_path / "data")]
    assert cli.convert([str(tmp_path / "job"), *flags]) == 0
    labels = yolo_labels(tmp_path / "data", "detect")
    assert len(labels) == 12
    right = 0
    for label in labels:
        scene = some_scenes[int(Path(label["im_file"]).name.partition("-")[0])]
        size = np.tile(scene.image.shape[1::-1], 2)
        for name, (x, y, w, h) in zip(label["cls"].ravel(), label["bboxes"] * size, strict=True):
            kind = label["names"][int(name)]
            near = [shape for shape in scene.shapes if shape.kind == kind]
            right += any(
                np.abs(np.array(shape.box) - [x - w / 2, y - h / 2, x + w / 2, y + h / 2]).max() < 40 for shape in near
            )
    assert right > 5
    model = trained(tmp_path / "data" / "data.yaml", "detect", tmp_path / "runs")
    assert list(model.names.values()) == list(labels[0]["names"].values()) == sorted(model.names.values())
