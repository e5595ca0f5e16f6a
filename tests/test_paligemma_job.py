"""Both models in one pass of the job; and PaliGemma on the crops of YOLO's detections."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardsight.decode.pictures import decode
from shardsight.models.paligemma.routing import Route
from shardsight.models.yolo.model import Yolo
from tests.clips import decoded, encode
from tests.conftest import S3, job_of, rows_of
from tests.small_paligemma import IMAGE_SIZE, Reference, make
from tests.test_yolo import annotated

Annotate = Callable[..., tuple[int, str]]
TOKENS = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small"), "gemma", seed=21)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("large"), "gemma", seed=22, size=2 * IMAGE_SIZE)


@pytest.fixture
def folder(tmp_path: Path, jpegs: list[bytes]) -> Path:
    """Four scenes, and a file that is no picture."""
    (tmp_path / "in").mkdir()
    for index, data in enumerate(jpegs[:4]):
        (tmp_path / "in" / f"{index}.jpg").write_bytes(data)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "in"


def said(reference: Reference, frame: Any, prompt: str) -> str:
    ids, _ = reference.answer(frame, prompt, TOKENS)
    return str(reference.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_all_models_in_one_pass(
    tmp_path: Path, folder: Path, small: Path, large: Path, detector: Path, annotate: Annotate
) -> None:
    """Each prompt has its answer, of the model whose resolution suits the picture; YOLO finds what it finds alone."""
    prompts = ("caption en", "answer en how many dogs are there in the picture?")
    asked = ("--paligemma", large, "--paligemma", small, "--small-box", 8, "--lost-detail", 1)
    asked += tuple(part for prompt in prompts for part in ("--prompt", prompt))
    exact = ("--precision", "fp32", "--no-scaled-decode", "--max-tokens", TOKENS, "--max-error-rate", 1)
    code, text = annotate(folder, "--output", tmp_path / "both", "--yolo", detector, *asked, *exact)
    assert code == 0, text
    rows = rows_of(tmp_path / "both")
    assert sorted(Path(row["id"]).name for row in rows) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "broken.jpg"]
    route = Route((IMAGE_SIZE, 2 * IMAGE_SIZE), IMAGE_SIZE, small_box=8, lost_detail=1)
    references, used = {IMAGE_SIZE: Reference(small), 2 * IMAGE_SIZE: Reference(large)}, set()
    yolo = Yolo(str(detector), precision="fp32")
    for row in rows:
        if Path(row["id"]).name == "broken.jpg":
            assert row["error"] and row["answers"] is None and row["detections"] is None
            continue
        data = Path(row["id"]).read_bytes()
        (alone,) = annotated(yolo, [data])
        assert row["error"] is None and row["detections"] == alone["detections"]
        frame, width, height = decode(data)
        size = route.choose(frame, row["detections"], width, height)
        used.add(size)
        assert [(one["prompt"], one["text"]) for one in row["answers"]] == [
            (prompt, said(references[size], frame, prompt)) for prompt in prompts
        ]
    assert len(used) == 2
    job = job_of(tmp_path / "both")
    assert job["exactly_once"] is True and job["stages"]["paligemma"]["rows"] == 4
    assert set(job["models"]) == {"yolo", "paligemma", "paligemma 112"}
    assert job["models"]["paligemma"]["path"] == str(small) and len(job["models"]["paligemma"]["sha256"]) == 64


def test_regions_are_cut_out_of_the_original(
    tmp_path: Path, folder: Path, small: Path, detector: Path, annotate: Annotate
) -> None:
    """A crop of the frame that YOLO sees would have lost what is to be read in it."""
    asked = ("--paligemma", small, "--prompt", "ocr", "--on", "regions", "--max-tokens", TOKENS)
    rest = ("--precision", "fp32", "--max-error-rate", 1)
    code, text = annotate(folder, "--output", tmp_path / "out", "--yolo", detector, *asked, *rest)
    assert code == 0, text
    reference, count = Reference(small), 0
    for row in rows_of(tmp_path / "out"):
        if row["error"]:
            continue
        assert row["answers"] is None
        frame, _, _ = decode(Path(row["id"]).read_bytes())
        for one in row["detections"]:
            x1, y1, x2, y2 = math.floor(one["x1"]), math.floor(one["y1"]), math.ceil(one["x2"]), math.ceil(one["y2"])
            assert one["text"] == said(reference, frame[y1:y2, x1:x2], "ocr")
            count += 1
    assert count > 5


def test_what_is_no_paligemma_is_one_sentence(tmp_path: Path, folder: Path, detector: Path, annotate: Annotate) -> None:
    for model in (detector, detector.parent, tmp_path / "nowhere"):
        code, text = annotate(folder, "--output", tmp_path / "out", "--paligemma", model)
        assert code == 2 and text.startswith("shardsight: ") and text.count("\n") == 1, text


def test_resolutions_that_are_not_there(tmp_path: Path, folder: Path, small: Path, annotate: Annotate) -> None:
    for arguments, words in [
        (("--paligemma", small, "--resolution", 448), "no --paligemma sees 448 pixels, only 56"),
        (("--paligemma", small, "--resolution", "big"), "--resolution: expected auto or a number of pixels"),
        (("--paligemma", small, "--paligemma", small), "both see 56 pixels"),
        (("--paligemma", small, "--paligemma", "org/other", "--adapter", small), "--adapter belongs to one model"),
    ]:
        code, text = annotate(folder, "--output", tmp_path / "out", *arguments)
        assert code == 2 and words in text and text.count("\n") == 1, text


def test_clips_of_a_video(tmp_path: Path, jpegs: list[bytes], small: Path, annotate: Annotate) -> None:
    """Four frames of each 0.4 seconds are asked about together; a picture beside the video alone."""
    frames = [decode(data, None)[0] for data in jpegs[:24]]
    frames = [cv2.resize(frame, (160, 128)) for frame in frames]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "v.mp4").write_bytes(clip := encode(frames))
    (tmp_path / "in" / "x.jpg").write_bytes(jpegs[0])
    asked = ("--paligemma", small, "--prompt", "ocr", "--clip-frames", 4, "--clip-seconds", 0.4)
    exact = ("--precision", "fp32", "--no-scaled-decode", "--max-tokens", TOKENS)
    code, text = annotate(tmp_path / "in", "--output", tmp_path / "out", *asked, *exact)
    assert code == 0, text
    rows = {row["frame_index"]: row for row in rows_of(tmp_path / "out")}
    assert job_of(tmp_path / "out")["exactly_once"] and len(rows) == len(frames) + 1
    answered = {index: row["answers"][0]["frames"] for index, row in rows.items() if row["answers"]}
    # The last clip has four frames only, of which each is there once.
    assert answered == {None: None, 0: [0, 3, 5, 8], 10: [10, 13, 15, 18], 20: [20, 20, 23, 23]}
    seen = [frame for _, frame in decoded(clip)]
    reference = Reference(small)
    for index in (0, 20):
        answer = rows[index]["answers"][0]
        assert answer["text"] == said(reference, [seen[number] for number in answer["frames"]], "ocr")


def test_each_picture_is_asked_its_own(tmp_path: Path, folder: Path, small: Path, annotate: Annotate) -> None:
    """A labelled set asks each picture another question; a row without one is asked what all are, and a prompt that
    PaliGemma does not take costs its own row."""
    asked: list[Any] = ["answer en how many?", ["ocr", "caption en"], None, "detect"]
    table = pa.table({"image": [f"{folder}/{n}.jpg" for n in range(4)], "asked": [pa_text(one) for one in asked]})
    pq.write_table(table, tmp_path / "asked.parquet")
    options = ("--uri-column", "image", "--prompt-column", "asked", "--prompt", "caption de", "--max-error-rate", 1)
    exact = ("--precision", "fp32", "--no-scaled-decode", "--max-tokens", TOKENS)
    code, text = annotate(
        tmp_path / "asked.parquet", "--output", tmp_path / "out", "--paligemma", small, *options, *exact
    )
    assert code == 0, text
    rows = {row["uri"].rpartition("/")[2]: row for row in rows_of(tmp_path / "out")}
    reference = Reference(small)
    for name, prompts in [("0.jpg", asked[0:1]), ("1.jpg", asked[1]), ("2.jpg", ["caption de"])]:
        frame, _, _ = decode((folder / name).read_bytes())
        assert [(one["prompt"], one["text"]) for one in rows[name]["answers"]] == [
            (prompt, said(reference, frame, prompt)) for prompt in prompts
        ]
    assert rows["3.jpg"]["answers"] is None and rows["3.jpg"]["error"]["type"] == "PromptError"


def pa_text(asked: Any) -> list[str] | None:
    return [asked] if isinstance(asked, str) else asked


def test_a_model_in_a_store(annotate: Any, s3: S3, jpegs: list[bytes], small: Path, tmp_path: Path) -> None:
    """`--paligemma s3://…` is fetched, and answers as the model does."""
    shutil.copytree(small, s3.bucket("models") / "small", dirs_exist_ok=True)
    (tmp_path / "one.jpg").write_bytes(jpegs[0])
    asked = ("--paligemma", "s3://models/small", "--prompt", "caption en", "--max-tokens", TOKENS)
    exact = ("--precision", "fp32", "--no-scaled-decode")
    code, text = annotate(tmp_path / "one.jpg", "--output", tmp_path / "out", *asked, *exact, *s3.options())
    assert code == 0, text
    (row,) = rows_of(tmp_path / "out")
    assert row["answers"][0]["text"] == said(Reference(small), decode(jpegs[0])[0], "caption en")
