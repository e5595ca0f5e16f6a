"""Models side by side on labelled pictures: the figures are pycocotools' own, nothing is computed twice, and what
is wrong with the labels is named."""

import contextlib
import io
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import shardsight
from demo.scenes import scenes
from demo.writers import write
from shardsight.cli import evaluate
from shardsight.decode.pictures import decode
from shardsight.evaluation.recommend import Contender, front, recommend
from shardsight.evaluation.request import Evaluation, command_of, unique_names
from shardsight.measures import bootstrap, boxes
from shardsight.models.yolo.ultralytics_import import YOLO
from shardsight.row import ROW
from shardsight.settings import parse_as
from shardsight.storage import Storage
from shardsight.truth import read
from tests.conftest import S3, WEIGHTS, rows_of
from tests.small_paligemma import Reference, adapter, make

SMALL = {"imgsz": 320, "precision": "fp32", "rounds": 0}
GONE, BROKEN = "0077-000003.jpg", "0077-000005.jpg"
IOU_TYPES = {"detect": ("boxes", "bbox"), "segment": ("masks", "segm"), "pose": ("keypoints", "keypoints")}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes as COCO, with every fault that labels may have."""
    out = tmp_path_factory.mktemp("labelled")
    write(scenes(12, 77), out, "coco")
    (out / "images" / GONE).unlink()
    (out / "images" / BROKEN).write_bytes(b"no picture")
    content = json.loads((out / "annotations.json").read_text())
    first, second, third, *_ = content["annotations"]
    content["annotations"] += [
        first | {"id": 900, "category_id": 99},
        first | {"id": 901, "image_id": 99},
        second | {"id": 902, "bbox": [5, 5, 0, 0]},
        second | {"id": 903, "bbox": [-50, 5, 60, 20]},
        second | {"id": 904, "bbox": [1, 2, "wide", 3]},
        third | {"id": 905, "iscrowd": 1},
        dict(third),
    ]
    content["images"] += [
        content["images"][0] | {"id": 50, "file_name": "empty.jpg"},
        dict(content["images"][0]),
    ]
    shutil.copy(out / "images" / "0077-000000.jpg", out / "images" / "empty.jpg")
    (out / "annotations.json").write_text(json.dumps(content))
    return out / "annotations.json"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clean")
    write(scenes(12, 77), out, "coco")
    return out / "annotations.json"


@pytest.fixture(scope="module")
def two(one_ray: str, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> shardsight.Report:
    """Two models on the set with faults, with their speed."""
    models = [WEIGHTS / "detect.pt", WEIGHTS / "segment.pt"]
    options = SMALL | {"rounds": 1, "price": 0.5}
    return shardsight.evaluate(labelled, output=tmp_path_factory.mktemp("two") / "out", yolo=models, **options)


def rows_and_truth(report: shardsight.Report, name: str) -> list[dict[str, Any]]:
    relation = duckdb.sql(f"select * from '{report.out}/rows/{name}.parquet'")
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


@pytest.mark.parametrize("task", IOU_TYPES)
def test_figures_are_those_of_pycocotools(one_ray: str, clean: Path, tmp_path: Path, task: str) -> None:
    """Over the labels as they stand on the disk and the rows that the evaluation wrote."""
    report = shardsight.evaluate(clean, output=tmp_path / "out", yolo=WEIGHTS / f"{task}.pt", **SMALL)
    kind, iou_type = IOU_TYPES[task]
    ours = report.models[0]["figures"][kind]["measures"]
    with contextlib.redirect_stdout(io.StringIO()):
        right = COCO(str(clean))
        numbers = {image["file_name"]: image["id"] for image in right.dataset["images"]}
        categories = {one["name"]: one["id"] for one in right.dataset["categories"]}
        results = []
        for row in rows_and_truth(report, f"{task}.pt"):
            for one in row["detections"]:
                made = {"image_id": numbers[Path(row["uri"]).name], "category_id": categories[one["label"]]}
                made["score"] = one["score"]
                if task == "detect":
                    made["bbox"] = [one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]]
                elif task == "segment":
                    mask = one["mask"]
                    made["segmentation"] = {"size": [mask["height"], mask["width"]], "counts": mask["counts"]}
                else:
                    made["keypoints"] = [v for p in one["keypoints"] for v in (p["x"], p["y"], p["score"])]
                results.append(made)
        theirs = COCOeval(right, right.loadRes(results), iou_type)
        if task == "pose":
            theirs.params.kpt_oks_sigmas = np.full(5, 1 / 5)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    for name, value in zip(("mAP50-95", "mAP50", "mAP75", *boxes.AREAS[kind]), theirs.stats, strict=False):
        own = ours[name]["value"]
        assert (-1 if own is None else own) == pytest.approx(value, abs=1e-9), name
    assert ours["mAP50-95"]["value"] > 0.1
    low, high = ours["mAP50-95"]["interval"]
    assert low <= ours["mAP50-95"]["value"] <= high


def test_a_resample_is_pycocotools_over_these_pictures(clean: Path) -> None:
    """The intervals come from matches that were made once; a picture drawn twice counts as two."""
    truth = read(str(clean), Storage({}), "detect")
    rng = np.random.default_rng(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in truth.samples:
        found[sample.id] = []
        for thing in sample.things:
            x1, y1, x2, y2 = np.array(thing.box) + rng.normal(0, 8, 4)
            label = truth.names[thing.class_id if rng.random() < 0.8 else 1]
            sides = dict(zip(("x1", "y1", "x2", "y2"), map(float, (x1, y1, x2, y2)), strict=True))
            found[sample.id].append({"label": label, "score": float(rng.random()), "mask": None, **sides})
    drawn = bootstrap.weights(len(truth.samples))
    replicates = boxes.measure(truth, found, {}, "boxes")["measures"]["mAP50-95"]["replicates"]
    for number in range(5):
        samples, again = [], {}
        for sample, times in zip(truth.samples, drawn[number], strict=True):
            for copy in range(times):
                samples.append(type(sample)(**{**vars(sample), "id": f"{sample.id}@{copy}"}))
                again[f"{sample.id}@{copy}"] = found[sample.id]
        resampled = type(truth)(**{**vars(truth), "samples": samples})
        own = boxes.measure(resampled, again, {}, "boxes")["measures"]["mAP50-95"]["value"]
        assert replicates[number] == pytest.approx(own, abs=1e-9)


def test_faults_are_counted_and_named(two: shardsight.Report) -> None:
    faults = two.content["faults"]
    counts = {reason.partition(";")[0]: len(names) for reason, names in faults.items()}
    assert counts == {
        "pictures that are not there": 1,
        "pictures that cannot be read or decoded": 1,
        "pictures without an object": 1,
        "crowds": 1,
        "boxes without area": 1,
        "boxes that reach out of their picture": 1,
        "objects of a class that the set does not name": 1,
        "objects of a picture that the set does not list": 1,
        "objects whose coordinates are no numbers": 1,
        "pictures or objects whose id is there twice": 2,
    }
    named = {reason.partition(";")[0]: names[0] for reason, names in faults.items()}
    assert named["pictures that are not there"].endswith(GONE)
    assert named["pictures that cannot be read or decoded"].endswith(BROKEN)
    assert named["objects of a class that the set does not name"] == "annotation 900: category 99"
    for model in two.models:
        assert model["errors"] == {"read: FileNotFoundError": 1, "decode: NotAnImage": 1}
        assert sorted(Path(id).name for id in model["failed"]) == [GONE, BROKEN]
    page = Path(two.page).read_text()
    assert "objects of a class that the set does not name" in page and "annotation 900: category 99" in page


def test_rows_have_their_truth(two: shardsight.Report) -> None:
    """Every listed picture once, in the order of the labels, with the columns of a job and the labels beside them."""
    rows = rows_and_truth(two, "detect.pt")
    assert len(rows) == len({row["uri"] for row in rows}) == 13
    assert set(ROW.names) < set(rows[0])
    assert [Path(row["uri"]).name for row in rows][:2] == ["0077-000000.jpg", "0077-000001.jpg"]
    assert sum(len(row["truth"]) for row in rows) == two.content["truth"]["objects"]
    assert sum(one["crowd"] for row in rows for one in row["truth"]) == 1


def test_speed_and_cost(two: shardsight.Report) -> None:
    assert two.content["machine"]["cores"] > 0 and two.content["machine"]["cpu"]
    for model in two.models:
        speed = model["speed"]
        assert 0 < speed["latency_ms"]["p50"] <= speed["latency_ms"]["p90"] <= speed["latency_ms"]["p99"]
        assert speed["pictures_per_second"] > 0 and speed["peak_memory_mb"] > 100 and speed["batch_size"] > 0
        assert speed["joules_per_picture"] is not None or speed["joules_reason"]
        assert model["cost_per_million"] == pytest.approx(0.5 / 3600 / speed["pictures_per_second"] * 1e6, rel=1e-3)
        assert model["job"]["pictures_per_second"] > 0


def test_a_finished_evaluation_computes_nothing_again(two: shardsight.Report, labelled: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(two.out).glob("models/*/results/*.parquet")}
    speed = (Path(two.out) / "speed.json").read_bytes()
    models = [WEIGHTS / "detect.pt", WEIGHTS / "segment.pt"]
    again = shardsight.evaluate(labelled, output=two.out, yolo=models, **(SMALL | {"rounds": 1, "price": 0.5}))
    assert {path: path.stat().st_mtime_ns for path in Path(two.out).glob("models/*/results/*.parquet")} == before
    assert (Path(two.out) / "speed.json").read_bytes() == speed
    changing = ("started", "seconds")
    assert {k: v for k, v in again.content.items() if k not in changing} == {
        k: v for k, v in two.content.items() if k not in changing
    }


def test_an_interrupted_evaluation_goes_on(one_ray: str, clean: Path, tmp_path: Path) -> None:
    """What the first model has computed is kept, and in the end each picture is there once for each model."""

    class Interrupts:
        passes = 0

        def begin(self, done: int, total: int | None) -> None:
            self.passes += 1
            if self.passes == 2:
                raise KeyboardInterrupt

        def add(self, rows: int, errors: int, total: int | None) -> None:
            pass

        def use(self, line: str) -> None:
            pass

        def wait(self, line: str) -> None:
            pass

    from shardsight.evaluation.run import run
    from shardsight.job import JobInterrupted
    from shardsight.settings import settings_as

    models = [str(WEIGHTS / "detect.pt"), str(WEIGHTS / "pose.pt")]
    options: dict[str, Any] = {"data": clean, "output": tmp_path / "out", "yolo": models, "limit": 6, **SMALL}
    with pytest.raises(JobInterrupted):
        run(settings_as(Evaluation, **options), Interrupts())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "running"
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/models/detect.pt/results/*.parquet")}
    assert first and not list(tmp_path.glob("out/models/pose.pt/results/*.parquet"))
    report = shardsight.evaluate(options.pop("data"), **options)
    assert report.content["status"] == "done"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/models/detect.pt/results/*.parquet")} == first
    for name in ("detect.pt", "pose.pt"):
        assert len({row["id"] for row in rows_of(tmp_path / "out" / "models" / name)}) == 6


# Task → kind → our measure and ultralytics'.
OF_VAL = {
    "detect": {"boxes": [(boxes.VAL, "metrics/mAP50-95(B)")]},
    "segment": {"boxes": [(boxes.VAL, "metrics/mAP50-95(B)")], "masks": [(boxes.VAL, "metrics/mAP50-95(M)")]},
    "pose": {"boxes": [(boxes.VAL, "metrics/mAP50-95(B)")], "keypoints": [(boxes.VAL, "metrics/mAP50-95(P)")]},
    "obb": {"oriented": [(boxes.VAL, "metrics/mAP50-95(B)")]},
    "classify": {"classes": [("top-1", "metrics/accuracy_top1"), ("top-5", "metrics/accuracy_top5")]},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", OF_VAL)
def test_near_val(one_ray: str, tmp_path: Path, task: str) -> None:
    """The figures that ultralytics' users know, of 200 scenes, whose pictures `val` decodes in full and in fp32."""
    data = tmp_path / "in"
    write(scenes(200, 4321), data / "val" if task == "classify" else data, "yolo", task)
    if task == "classify":  # `val` wants both parts
        shutil.copytree(data / "val", data / "train")
    options = {"precision": "fp32", "scaled_decode": False, "rounds": 0}
    report = shardsight.evaluate(data, output=tmp_path / "out", yolo=WEIGHTS / f"{task}.pt", **options)
    (model,) = report.models
    assert report.content["main"]["kind"] == list(OF_VAL[task])[-1] and not model["failed"]
    assert model["classes"]["missing"] == [] and not any(model["classes"]["unknown"].values())
    labels = data if task == "classify" else data / "data.yaml"
    same = {"device": "cpu", "workers": 0, "plots": False, "verbose": False, "project": str(tmp_path / "runs")}
    # save_txt: masks in the pictures' own resolution, as ours; by default in a quarter of it.
    theirs = YOLO(WEIGHTS / f"{task}.pt").val(data=str(labels), split="val", save_txt=task == "segment", **same)
    for kind, pairs in OF_VAL[task].items():
        for name, other in pairs:
            value, expected = model["figures"][kind]["measures"][name]["value"], theirs.results_dict[other]
            print(f"{task}: {name} of {kind} {100 * value:.2f}, val {100 * expected:.2f}")
            assert value > 0.3 and abs(value - expected) < 0.005, (kind, name)


@pytest.mark.slow
def test_questions_and_answers(one_ray: str, tmp_path: Path, jpegs: list[bytes]) -> None:
    """Each picture is asked its own prompts; what is not measured is counted."""
    lines = []
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(jpegs[n])
        lines.append({"image": f"{n}.jpg", "prefix": "answer en what?", "suffix": ["yes", "no"]})
    lines += [{"image": "0.jpg", "prefix": "ocr", "suffix": "moon"}, {"image": "1.jpg", "prefix": "detect star"}]
    lines += [{"image": "2.jpg", "prefix": "detect star", "suffix": "<loc0000>"}, {"image": "gone.jpg"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: dict[str, Any] = {"precision": "fp32", "rounds": 0, "max_tokens": 8}
    small = make(tmp_path / "small", "gemma", seed=21)
    report = shardsight.evaluate(tmp_path / "q.jsonl", output=tmp_path / "out", paligemma=small, **options)
    asked = {Path(row["uri"]).name: [a["prompt"] for a in row["answers"]] for row in rows_and_truth(report, "small")}
    assert asked == {
        "0.jpg": ["answer en what?", "ocr"],
        "1.jpg": ["answer en what?"],
        "2.jpg": ["answer en what?", "detect star"],
    }
    assert report.content["main"] == {"kind": "vqa", "measure": "accuracy", "said": "accuracy of vqa"}
    counts = {reason.partition(";")[0]: len(names) for reason, names in report.content["faults"].items()}
    assert counts == {
        "lines without a picture, a prompt or an answer": 2,
        "right answers to detect or segment in which no object can be read": 1,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_beside_its_base_in_a_store(one_ray: str, s3: S3, tmp_path: Path, jpegs: list[bytes]) -> None:
    """Labels, base, adapter and output all lie there; answers are Hugging Face's own, and a mask in a right answer is
    decoded by what lies with the base."""
    bucket = s3.bucket("adapted")
    base = make(bucket / "base", "gemma", seed=21)
    lora = adapter(base, bucket / "lora")
    shutil.copy(WEIGHTS / "paligemma" / "vae-oid.npz", base)
    mask = "<loc0100><loc0100><loc0900><loc0900>" + "<seg005>" * 16 + " star"
    questions = [("answer en what?", "yes"), ("segment star", mask)]
    lines = [{"image": f"{n}.jpg", "prefix": asked, "suffix": right} for n in range(3) for asked, right in questions]
    for n in range(3):
        (bucket / f"{n}.jpg").write_bytes(jpegs[n])
    (bucket / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: dict[str, Any] = {"precision": "fp32", "rounds": 0, "max_tokens": 8, "scaled_decode": False}
    options |= {"storage": dict(pair.split("=", 1) for pair in s3.options()[1::2])}
    places = {"output": "s3://adapted/out", "paligemma": "s3://adapted/base", "adapter": "s3://adapted/lora"}
    report = shardsight.evaluate("s3://adapted/q.jsonl", **places, **options)
    assert [(model["name"], model["base"]) for model in report.models] == [
        ("base", None),
        ("lora", places["paligemma"]),
    ]
    answers = []
    for name, reference in (("base", Reference(base)), ("lora", Reference(base, lora))):
        rows = [dict(row) for row in pq.read_table(bucket / "out" / "rows" / f"{name}.parquet").to_pylist()]
        said = {(Path(row["uri"]).name, one["prompt"]): one["text"] for row in rows for one in row["answers"]}
        for n, data in enumerate(jpegs[:3]):
            frame, _, _ = decode(data)
            for prompt, _ in questions:
                ids, _ = reference.answer(frame, prompt, 8)
                text = reference.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
                assert said[f"{n}.jpg", prompt] == text, (name, n, prompt)
        answers.append(said)
    assert answers[0] != answers[1] and report.content["faults"] == {}
    assert "referring" in report.models[0]["figures"]


def test_from_and_in_a_store(one_ray: str, s3: S3, tmp_path: Path) -> None:
    """The figures are those of the same files on a disk, and the report names no secret."""
    bucket = s3.bucket("labelled")
    write(scenes(4, 77), bucket / "in", "coco")
    shutil.copy(WEIGHTS / "detect.pt", bucket)
    storage = dict(pair.split("=", 1) for pair in s3.options()[1::2])
    asked = {"data": "s3://labelled/in/annotations.json", "output": "s3://labelled/out"}
    remote = shardsight.evaluate(**asked, yolo="s3://labelled/detect.pt", storage=storage, **SMALL)
    local = shardsight.evaluate(
        bucket / "in" / "annotations.json", output=tmp_path / "out", yolo=bucket / "detect.pt", **SMALL
    )
    assert remote.models[0]["figures"] == local.models[0]["figures"]
    assert remote.models[0]["errors"] == {} and remote.content["faults"] == local.content["faults"]
    written = json.loads((bucket / "out" / "report.json").read_text())
    assert written["status"] == "done" and written["models"][0]["path"] == "s3://labelled/detect.pt"
    assert len(pq.read_table(bucket / "out" / "rows" / "detect.pt.parquet")) == 4
    for file in ("report.json", "report.html"):
        assert storage["secret"] not in (bucket / "out" / file).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--yolo", "NOWHERE.pt", "--data", "LABELS"], "no weights at"),
        (["--data", "LABELS"], "no model: give --yolo MODEL"),
        (["--yolo", "detect.pt", "--data", "nowhere.json"], "nowhere.json"),
        (["--yolo", "detect.pt", "--data", "OTHER"], "no labelled set that is known"),
        (["--yolo", "classify.pt", "--data", "LABELS"], "the model is for classify"),
        (["--yolo", "detect.pt", "--yolo", "classify.pt", "--data", "LABELS"], "compare models for one task"),
        (["--yolo", "detect.pt", "--yolo", "detect.pt", "--data", "LABELS"], "is given twice"),
        (["--yolo", "detect.pt", "--data", "LABELS", "--track", "botsort"], "--track"),
        (["--yolo", "detect.pt", "--data", "QUESTIONS"], "is labelled for text"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    labelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.jpg", "prefix": "ocr", "suffix": "x"}) + "\n")
    places = {"LABELS": labelled, "OTHER": tmp_path / "other.json", "QUESTIONS": tmp_path / "q.jsonl"}
    places |= {f"{task}.pt": WEIGHTS / f"{task}.pt" for task in ("detect", "classify")}
    code = evaluate([str(places.get(one, one)) for one in arguments] + ["--output", str(tmp_path / "out")])
    said = capfd.readouterr().err
    assert code == 2 and words in said and said.count("\n") == 1, said


def test_an_output_of_another_evaluation(two: shardsight.Report, clean: Path, tmp_path: Path) -> None:
    with pytest.raises(shardsight.UsageError, match="holds an evaluation on"):
        shardsight.evaluate(clean, output=two.out, yolo=WEIGHTS / "detect.pt", **SMALL)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(shardsight.UsageError, match="holds a job"):
        shardsight.evaluate(clean, output=tmp_path, yolo=WEIGHTS / "detect.pt", **SMALL)


def test_the_command_repeats_it(two: shardsight.Report) -> None:
    words = shlex.split(two.content["command"])
    assert words[:3] == ["python", "-m", "jobs.evaluate"]
    assert parse_as(Evaluation, words[3:]).record() == two.content["configuration"]
    options = ["--data", "a b.json", "--output", "o", "--yolo", "x,y.pt", "--imgsz", "320,640", "--no-scaled-decode"]
    record = parse_as(Evaluation, options).record()
    assert parse_as(Evaluation, shlex.split(command_of(record))[3:]).record() == record


def test_names_tell_models_apart() -> None:
    paths = ["a/run1/weights/best.pt", "a/run2/weights/best.pt", "b/yolov8n.pt", "b/best_openvino_model"]
    names = ["run1/best.pt", "run2/best.pt", "yolov8n.pt", "best_openvino_model"]
    assert unique_names([Path(path) for path in paths]) == names


def test_recommendation() -> None:
    """The fastest of those within noise or a point of the best; and who is beaten in both is not in front."""
    n = Contender("n", 0.373, (0.36, 0.38), 0.156, (0.14, 0.17), 200.0, (190.0, 210.0))
    s = Contender("s", 0.525, (0.51, 0.54), 0.004, (-0.002, 0.011), 61.0, (58.0, 64.0))
    x = Contender("x", 0.529, (0.52, 0.54), 0.0, None, 20.0, (19.0, 21.0))
    slow = Contender("slow", 0.40, (0.39, 0.41), 0.129, (0.11, 0.14), 10.0, (9.0, 11.0))
    found = recommend([n, s, x, slow], "mAP50-95 of boxes", 5000)
    assert found["model"] == "s"
    assert (
        found["sentence"].startswith("s: within 0.4 points of the best") and "3.0 times its speed" in found["sentence"]
    )
    assert front([n, s, x, slow]) == ["n", "s", "x"]
    assert recommend([n, x], "mAP", 5000)["model"] == "x"  # 15 points are not made up for by any speed
    as_fast = Contender("s", 0.525, (0.51, 0.54), 0.004, (-0.002, 0.011), 22.0, (18.0, 26.0))
    assert recommend([as_fast, x], "mAP", 5000)["model"] == "x"  # no faster than the rounds differ
    assert recommend([Contender("a", 0.5), Contender("b", 0.4, behind=0.1)], "mAP", 9)["model"] == "a"


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable[..., Any]]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium-headless-shell"))

        def opened(path: str, width: int, scheme: Any) -> tuple[Any, list[str]]:
            page, wrong = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), list[str]()
            allowed = ("file:", "data:")
            page.on("request", lambda asked: None if asked.url.startswith(allowed) else wrong.append(asked.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text))
            page.goto(Path(path).as_uri())
            return page, wrong

        yield opened
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page(two: shardsight.Report, open_page: Callable[..., Any], width: int, scheme: str) -> None:
    """It asks nothing of the network, fits the window, says what report.json says, and draws the truth, too."""
    page, wrong = open_page(two.page, width, scheme)
    page.locator(".chart svg path.curve").first.wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".verdict .sentence").inner_text() == two.content["recommendation"]["sentence"]
    table = page.locator(".models table")
    for model in two.models:
        figure = model["figures"]["boxes"]["measures"]["mAP50-95"]["value"]
        row = table.locator("tbody tr").filter(has_text=model["name"])
        assert f"{100 * figure:.1f}" in row.locator("td").first.inner_text()
    matrix = page.locator(".matrix tbody tr")
    assert matrix.count() == 7
    page.get_by_label("Model").select_option("1")
    first = page.locator(".pictures .card").first
    first.scroll_into_view_if_needed()
    first.locator(".mark").first.wait_for(state="attached")
    assert first.locator(".model").all_inner_texts()[:2] == ["truth", "detect.pt"]
    assert not wrong
    page.close()


@pytest.mark.slow
def test_the_page_on_paper(two: shardsight.Report, open_page: Callable[..., Any]) -> None:
    """Every picture is drawn, of which the screen has shown the first few alone, and what is wrong with the labels is
    spelt out."""
    page, wrong = open_page(two.page, 390, "light")
    page.locator(".pictures .card").first.wait_for(state="attached")
    cards, drawn = page.locator(".pictures .card"), page.locator(".pictures .card:has(image[href]):has(.mark)")
    assert drawn.count() < cards.count()
    page.pdf(format="A4")
    assert drawn.count() == cards.count() > 5
    page.emulate_media(media="print")
    assert page.get_by_text("annotation 900: category 99").is_visible()
    assert not wrong
    page.close()
