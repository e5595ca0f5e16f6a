"""What PaliGemma is trained on, in every form in which people have it, and what is left out of it."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as rle
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast

from demo.questions import DETECT_ALL, detect, seen
from demo.scenes import scenes
from demo.writers import coco as demo_coco
from demo.writers import coco_rle, jpeg, write, write_splits
from shardsight.errors import UsageError
from shardsight.models.paligemma.info import inspect
from shardsight.models.paligemma.masks import MaskDecoder, MaskEncoder, paste
from shardsight.models.paligemma.prompts import decode_box
from shardsight.storage import Storage
from shardsight.truth import read
from shardsight.truth.text import objects_in
from tests import small_paligemma
from tests.conftest import S3, S3_KEY, S3_SECRET, write_tar
from tests.test_masks import VQVAE
from tests.test_tune_paligemma import write_set
from tune import paligemma_data
from tune.paligemma_data import Asked, Collator, Data, inspect_data
from tune.paligemma_questions import as_questions, read_questions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_paligemma.make(tmp_path_factory.mktemp("model"), ends=False)


def inspected(model: Path, path: str | Path, storage: Storage | None = None, **more: Any) -> Data:
    tokenizer = PaliGemmaProcessor.from_pretrained(model).tokenizer
    asked = Asked(**({"path": str(path), "split": 0.25, "max_length": 64} | more))
    return inspect_data(asked, inspect(str(model)), tokenizer, storage or Storage())


# --- Tars and Parquet files


def parquet_of(rows: list[dict[str, Any]], type: pa.DataType) -> bytes:
    text = [(name, pa.string()) for name in ("prefix", "suffix")]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([("image", type), *text])), file, row_group_size=5)
    return file.getvalue()


def written(folder: Path, form: str) -> Path:
    """The set of write_set as a shard, or several."""
    path = write_set(folder)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pictures = [(folder / line["image"]).read_bytes() for line in lines]
    if form == "parquet of paths":
        (folder / "a.parquet").write_bytes(parquet_of(lines, pa.string()))
        return folder / "a.parquet"
    (folder / "shards").mkdir()
    if form.startswith("parquet"):
        asked = [line | {"image": picture} for line, picture in zip(lines, pictures, strict=True)]
        type: pa.DataType = pa.binary()
        if form == "parquet of structs":
            asked = [line | {"image": {"bytes": line["image"], "path": "x.png"}} for line in asked]
            type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for number in range(2):  # of which a folder is given
            half = asked[number * 6 : number * 6 + 6]
            (folder / "shards" / f"{number}.parquet").write_bytes(parquet_of(half, type))
        return folder / "shards"
    members = []
    for number, (line, picture) in enumerate(zip(lines, pictures, strict=True)):
        asked_as = [("json", json.dumps({"prefix": line["prefix"], "suffix": line["suffix"]}))]
        if form != "tar of json":
            asked_as = [("prefix", f"{line['prefix']}\n"), (form.rpartition(" ")[2], line["suffix"])]
        members += [(f"{number}.{ending}", text.encode()) for ending, text in asked_as] + [(f"{number}.png", picture)]
    write_tar(folder / "shards" / "0.tar", members[: len(members) // 2])
    write_tar(folder / "shards" / "1.tar", members[len(members) // 2 :])
    return folder / "shards" / "*.tar"


FORMS = ["parquet of bytes", "parquet of structs", "parquet of paths", "tar of json", "tar of suffix", "tar of txt"]


def content(model: Path, data: Data, storage: Storage | None = None) -> list[tuple[str, tuple[str, ...], bytes]]:
    """Prompt, answers and pixels, as the trainer gets them."""
    processor = PaliGemmaProcessor.from_pretrained(model)
    everything = [*data.train, *data.val]
    collator = Collator(processor, inspect(str(model)), storage or Storage(), everything)
    frames = collator.frames(everything)
    return sorted(
        (one.prefix, one.suffixes, frame.tobytes()) for one, (frame, *_) in zip(everything, frames, strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
def test_shards_hold_what_jsonl_says(tmp_path: Path, model: Path, form: str) -> None:
    """The same questions about the same pixels, and the same pictures held back to measure on."""
    shards, lines = (inspected(model, path) for path in (written(tmp_path / "a", form), write_set(tmp_path / "b")))
    assert not shards.problems and len(shards.val) == 3
    assert content(model, shards) == content(model, lines)
    prompts = [sorted((one.prefix, one.suffixes) for one in data.val) for data in (shards, lines)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("form", ["parquet of bytes", "tar of json"])
def test_shards_in_a_store(s3: S3, tmp_path: Path, model: Path, form: str) -> None:
    storage = Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET})
    bucket = f"tune-{form[:3]}"
    lines = inspected(model, write_set(tmp_path / "b"))
    path = written(s3.folder / bucket, form)
    shards = inspected(model, f"s3://{path.relative_to(s3.folder)}", storage)
    assert content(model, shards, storage) == content(model, lines)


def test_what_a_shard_lacks_is_named(tmp_path: Path, model: Path) -> None:
    """A sample without a question, files without a picture, and a tar that ends early."""
    tar = written(tmp_path / "a", "tar of json").parent / "0.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) * 3 // 4])
    picture = (tmp_path / "a" / "0.png").read_bytes()
    write_tar(tar.parent / "2.tar", [("a.png", picture), ("b.json", b"{}"), ("c.npy", b"")])
    said = " | ".join(inspected(model, tar.parent).problems)
    for words in (
        "2.tar#a.png: lines without a picture",
        "1 .json files without a picture",
        "1 .npy files",
        "(Truncated",
    ):
        assert words in said, said


def test_a_picture_that_has_gone_is_one_sentence(tmp_path: Path, model: Path) -> None:
    path = written(tmp_path / "a", "tar of json")
    data = inspected(model, path)
    (path.parent / "1.tar").unlink()
    with pytest.raises(UsageError, match=r"1\.tar#.* could be read before, and now cannot"):
        content(model, data)


def test_the_copies_of_a_picture_are_learnt_or_measured(tmp_path: Path, model: Path) -> None:
    """A Parquet row has its own copy of its picture: one of them in training would give away the other."""
    folder = tmp_path / "a"
    write_set(folder)
    pictures = [(folder / f"{number}.png").read_bytes() for number in range(4)]
    rows = [{"image": picture, "prefix": f"caption {word}", "suffix": "x"} for picture in pictures for word in "abcde"]
    (folder / "a.parquet").write_bytes(parquet_of(rows, pa.binary()))
    data = inspected(model, folder / "a.parquet")
    assert (len(data.train), len(data.val)) == (15, 5)
    assert len({pixels for _, _, pixels in content(model, data)[:]}) == 4
    assert sorted(one.prefix for one in data.val) == [f"caption {word}" for word in "abcde"]


# --- What is left out


LOC = "<loc0010><loc0020><loc0500><loc1023>"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prefix": "detect car", "suffix": f"{LOC} car; red"}, paligemma_data.SEMICOLON),
        ({"prefix": "detect car", "suffix": "<loc0500><loc0020><loc0010><loc1023> car"}, paligemma_data.WITHOUT_AREA),
        ({"prefix": "detect car", "suffix": "<loc0500><loc0020> car"}, paligemma_data.MALFORMED),
        ({"prefix": "detect car", "suffix": "a car"}, paligemma_data.MALFORMED),
        ({"prefix": "detect car", "suffix": f"{LOC} dog"}, paligemma_data.NOT_ASKED),
        ({"prefix": "caption en", "suffix": "<image> a car"}, paligemma_data.RESERVED),
        ({"prefix": "caption en", "suffix": "car " * 60}, paligemma_data.TOO_LONG),
        ({"image": "nowhere.png"}, paligemma_data.GONE),
        ({"image": "train.jsonl"}, paligemma_data.UNREADABLE),
        ({"prefix": "answer en"}, "prompts that PaliGemma does not take; left out"),
    ],
)
def test_what_cannot_be_learnt_is_named_and_left_out(
    tmp_path: Path, model: Path, line: dict[str, str], reason: str
) -> None:
    """An answer that is cut, or a box that no one can read, would be learnt as it is."""
    data = inspected(model, write_set(tmp_path / "data", 12, **line))
    assert len({one.image for one in data.train}) == 8 and len({one.image for one in data.val}) == 3
    (problem,) = data.problems
    assert problem.startswith("train: ") and problem.endswith(reason)


def test_a_word_that_is_not_in_the_vocabulary(tmp_path: Path, model: Path) -> None:
    """Gemma's tokenizer spells what it does not know in bytes; one that cannot would teach `<unk>`."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    strict = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), unk_token="<unk>")
    path = write_set(tmp_path / "data", 12, prefix="caption en", suffix="a 猫")
    data = inspect_data(Asked(str(path), max_length=64), inspect(str(model)), strict, Storage())
    assert list(data.counts) == [paligemma_data.UNKNOWN]
    assert f"train: {path.parent}/11.png, caption en: {paligemma_data.UNKNOWN}" in data.problems
    assert not inspected(model, path).problems


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ({"prefix": "caption en", "suffix": "car " * 600}, {"max_length": 1 << 20}),  # than the model's window
        ({"prefix": "detect car", "suffix": f"{LOC} car"}, {"noise_boxes": 30, "max_length": 120}),
    ],
)
def test_too_long_answers_are_not_cut(tmp_path: Path, model: Path, line: dict[str, str], more: dict[str, int]) -> None:
    """Cut, they would lack the token that ends them. With noise boxes all answers to detect are as long."""
    path = write_set(tmp_path / "data", 12, **line)
    data = inspected(model, path, **more)
    asked = [one.prefix for one in [*data.train, *data.val]]
    lost = 3 if "noise_boxes" in more else 1
    assert data.counts == {paligemma_data.TOO_LONG: lost} and len(asked) == 12 - lost
    assert ("detect car" in asked) == ("noise_boxes" not in more)


def test_boxes_and_labels_that_cannot_be_asked_for(tmp_path: Path, model: Path) -> None:
    """An object of a class with a `;`, and one that bins leave no area, each named; all others are asked for."""
    write(scenes(4, 5), tmp_path, "coco")
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    same = content["annotations"][0]
    content["categories"].append({"id": 9, "name": "cup; saucer"})
    content["annotations"] += [same | {"id": 900, "category_id": 9}, same | {"id": 901, "bbox": [5, 5, 0.01, 20]}]
    path.write_text(json.dumps(content))
    data = inspected(model, path, max_length=512)
    assert data.counts == {paligemma_data.SEMICOLON: 1, "boxes without area; left out": 1}
    assert f"cup; saucer: {paligemma_data.SEMICOLON}" in " | ".join(data.problems)
    kept = [one for one in [*data.train, *data.val] if one.prefix == DETECT_ALL]
    assert sum(one.suffixes[0].count("<loc") for one in kept) == 4 * (len(content["annotations"]) - 2)


def test_coco_boxes_are_asked_for(tmp_path: Path) -> None:
    write(scenes(3, 5), tmp_path, "coco")
    truth = as_questions(read(str(tmp_path / "annotations.json"), Storage()))
    for sample, scene in zip(truth.samples, scenes(3, 5), strict=True):
        _, answer = detect(seen(scene))
        assert list(sample.asked) == [DETECT_ALL]
        assert sorted(sample.asked[DETECT_ALL][0].split(" ; ")) == sorted(answer.split(" ; "))


def test_masks_of_coco_are_asked_for(tmp_path: Path) -> None:
    """`<loc>` ×4, `<seg>` ×16 and the label; decoded again, the masks are those of the labels. Crowds, and what has no
    mask, are named."""
    write(scenes(4, 6), tmp_path, "coco")
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    del content["annotations"][1]["segmentation"]
    path.write_text(json.dumps(content))
    truth = read_questions(str(path), "train", MaskEncoder.load(VQVAE), Storage())
    first = truth.samples[0].id
    assert truth.faults == {"crowds; left out": [first], "objects without a mask; left out": [first]}
    decoder, overlaps = MaskDecoder.load(VQVAE), []
    shapes = [shape for scene in scenes(4, 6) for shape in scene.shapes][2:]
    for sample in truth.samples:
        ((prompt, (answer,)),) = sample.asked.items()
        assert prompt == DETECT_ALL.replace("detect", "segment")
        for name, bins, codes in objects_in(prompt, answer):
            assert sample.width and sample.height
            box = decode_box(bins, sample.width, sample.height)
            pasted = paste(decoder.decode(np.array([codes]))[0], box, sample.width, sample.height)
            found = {"size": [pasted["height"], pasted["width"]], "counts": pasted["counts"]}
            same = [
                coco_rle(one.mask) for one in shapes if one.kind == name and np.abs(np.subtract(one.box, box)).max() < 2
            ]
            overlaps += [rle.iou([found], same, [0] * len(same)).max()] if same else []
    assert len(overlaps) == len(shapes) and np.mean(overlaps) > 0.85


def test_a_data_yaml_has_its_own_split(tmp_path: Path, model: Path) -> None:
    """Learnt from `train`, measured on `val`, as the same scenes' COCO JSON says it; by masks, too."""
    write_splits(scenes(4, 5), scenes(3, 6), tmp_path / "yolo", "segment")
    write(scenes(4, 5), tmp_path / "coco", "coco")
    shutil.copy(VQVAE, model)
    (tmp_path / "yolo" / "backup.tar").touch()
    for task, name in (("detect", "yolo"), ("segment", "yolo/data.yaml")):
        asked = {"max_length": 512, "task": task}
        data, same = (inspected(model, tmp_path / one, **asked) for one in (name, "coco/annotations.json"))
        assert not data.problems and len(data.val) == 3
        answers = [
            sorted((one.prefix, one.suffixes) for one in some) for some in (data.train, [*same.train, *same.val])
        ]
        if task == "detect":  # by polygons, which are half a pixel off
            boxes = [[objects_in(prompt, own[0]) for prompt, own in one] for one in answers]
            assert [[name for name, *_ in one] for one in boxes[0]] == [[name for name, *_ in one] for one in boxes[1]]
        assert len(answers[0]) == 4 and all(("<seg" in own[0]) == (task == "segment") for _, own in answers[0])


def test_what_is_learnt_and_measured_is_named(tmp_path: Path, model: Path) -> None:
    path = write_set(tmp_path / "a")
    data = inspected(model, path, val=str(path))
    assert len(data.problems) == 12 and data.problems[0].endswith(paligemma_data.BOTH)


# --- RefCOCO


def write_refs(folder: Path) -> Path:
    """Every shape of four scenes, by its colour and kind; the last scene is for val."""
    folder.mkdir()
    content = demo_coco(scenes(4, 7))
    (folder / "instances.json").write_text(json.dumps(content))
    for scene in scenes(4, 7):
        (folder / f"{scene.name}.jpg").write_bytes(jpeg(scene))
    refs = [
        {
            "ann_id": one["id"],
            "image_id": one["image_id"],
            "split": "val" if one["image_id"] == 4 else "train",
            "sentences": [
                {"sent": f"the {one['attributes']['colour']} one", "raw": "?"},
                {"raw": f"shape {one['id']}"},
            ],
        }
        for one in content["annotations"]
    ]
    refs[0]["sentences"] = [{"sent": "a ; b"}, {"sent": "the first"}]
    (folder / "refs.json").write_text(json.dumps([*refs, refs[0] | {"ann_id": 999}]))
    return folder / "refs.json"


def test_phrases_of_refcoco(tmp_path: Path, model: Path) -> None:
    """Each is asked for on its own, by box or by mask; what no answer belongs to is named."""
    path = write_refs(tmp_path / "refs")
    shutil.copy(VQVAE, model)
    for task, objects in (("detect", 4), ("segment", 20)):
        data = inspected(model, path, task=task)
        assert {one.image for one in data.val}.isdisjoint(one.image for one in data.train) and len(data.val) > 1
        every = [one for one in data.train if one.prefix.startswith(f"{task} shape ")]
        assert len(every) == sum(len(scene.shapes) for scene in list(scenes(4, 7))[:3]) - 1
        assert all(answer.count("<") == objects and answer.endswith(">") for one in every for answer in one.suffixes)
        said = " | ".join(data.problems)
        assert "999: the first: phrases about an object" in said and "1: a ; b: phrases that are empty" in said
    truth = read(str(path), Storage())  # as jobs.evaluate does: the split val
    assert (truth.task, len(truth.samples), truth.splits) == ("text", 1, ("train", "val"))
    scene = list(scenes(4, 7))[3]
    for shape, (prompt, answers) in zip(
        scene.shapes, [one for one in truth.samples[0].asked.items() if "shape" in one[0]], strict=True
    ):
        ((_, bins, _),) = objects_in(prompt, answers[0])
        height, width = scene.image.shape[:2]
        np.testing.assert_allclose(decode_box(bins, width, height), shape.box, atol=0.6)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    """RefCOCO comes as one, and a pickle runs what its writer wishes."""
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    with pytest.raises(UsageError, match="is a pickle, which could run any program") as raised:
        read(str(tmp_path / "refs(unc).p"), Storage())
    assert not (tmp_path / "run").exists() and "\n" not in str(raised.value)
    code = str(raised.value).partition('python -c "')[2].removesuffix('"')
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{"ann_id": 1}]))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "refs.json").read_text()) == [{"ann_id": 1}]
