"""The job as a function: what ends it is written down, and a bug is never taken for a bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.data import DataContext

import shardsight
from shardsight.actors import Annotator
from shardsight.job import Job, JobInterrupted, _totals, run
from shardsight.results.coverage import Coverage, UnitCoverage
from shardsight.results.writer import Results
from shardsight.settings import settings
from shardsight.storage import Storage
from tests.conftest import job_of, write_tar

Annotate = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, jpegs: list[bytes]) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(6):
        write_tar(folder / f"{shard}.tar", [(f"{n}.jpg", jpegs[n]) for n in range(3)])
    return folder


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("a bug of ours")


class BrokenModel(Annotator):
    def __call__(self, table: pa.Table) -> pa.Table:
        raise ZeroDivisionError("a bug of ours")


class BrokenStart(Annotator):
    def __init__(self, *_: Any) -> None:
        raise ZeroDivisionError("a bug of ours")


@pytest.mark.parametrize("kind", [BrokenModel, BrokenStart])
def test_a_bug_stops_the_job_at_once(
    folder: Path, annotate: Annotate, detector: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """A programming error in a stage must not cost two more passes before anyone hears of it."""
    flows: list[bool] = []
    from shardsight import pipeline

    flow = pipeline.flow

    def counted(*arguments: Any) -> Any:
        flows.append(True)
        return flow(*arguments)

    monkeypatch.setattr(pipeline, "flow", counted)
    monkeypatch.setattr(pipeline, "Annotator", kind)
    out = folder.parent / "out"
    code, said = annotate(folder, "--output", out, "--yolo", detector)
    assert code == 1 and len(flows) == 1
    sentence = said.strip().splitlines()[-1]
    assert "ZeroDivisionError: a bug of ours" in sentence and f"{out}/error.log" in sentence
    assert "Traceback" not in said
    assert "test_job.py" in (out / "error.log").read_text()
    assert job_of(out)["status"] == "failed" and "ZeroDivisionError" in job_of(out)["reason"]


def test_a_store_that_fails_in_the_middle_is_written_down(
    folder: Path, one_ray: str, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """job.json must not say "running" of a job that has ended."""
    out = folder.parent / "out"
    asked = settings(inputs=[folder], output=out, yolo=detector)

    def away(self: Results, *_: Any) -> Coverage:
        raise ConnectionError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr("shardsight.writing.run", broken)
        with pytest.raises(shardsight.JobError, match="ZeroDivisionError") as caught:
            run(asked)
        assert caught.value.job.status == job_of(out)["status"] == "failed"
        assert caught.value.job.rows == 0 and not caught.value.job.exactly_once
        patch.setattr("shardsight.writing.run", raises(KeyboardInterrupt))
        with pytest.raises(JobInterrupted):
            run(asked)
        assert job_of(out)["status"] == "interrupted"
        patch.setattr("shardsight.sources.Listing.left", raises(PermissionError("a folder")))
        with pytest.raises(shardsight.JobError, match="PermissionError"):
            run(asked)
        assert job_of(out)["status"] == "failed"
    assert run(asked).exactly_once
    with monkeypatch.context() as patch:
        patch.setattr("shardsight.sources.Listing.changed", raises(ConnectionError("gone")))
        patch.setattr(Results, "save_job", saved_once(Results.save_job))
        with pytest.raises(
            shardsight.JobError, match="ConnectionError"
        ):  # the first error, not that of writing it down
            run(asked)


def raises(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def saved_once(save: Callable[..., None]) -> Callable[..., None]:
    calls: list[bool] = []

    def function(*arguments: Any) -> None:
        calls.append(True)
        if len(calls) > 1:
            raise ConnectionError("still gone")
        save(*arguments)

    return function


def test_settings_that_change_no_row_do_not_refuse(
    folder: Path, one_ray: str, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default of PaliGemma that another version has changed, or a new setting, is nothing to a job of YOLO's."""
    out = folder.parent / "out"
    asked: dict[str, Any] = {"inputs": [folder], "output": out, "yolo": detector, "limit": 2}
    run(settings(**asked))
    job = job_of(out)
    job["configuration"] |= {"lost_detail": 0.3, "max_tokens": 7, "prompt": ["other"], "resolution": "448"}
    del job["configuration"]["image_column"]  # which 0.1.0 did not have
    (out / "job.json").write_text(json.dumps(job))
    assert run(settings(**asked)).content["resumed_rows"] == 2
    for option, value in {"conf": 0.3, "image_column": "other", "precision": "fp32"}.items():
        with pytest.raises(shardsight.UsageError, match=option):
            run(settings(**asked, **{option: value}))


def test_a_changed_file_of_a_model_is_noticed(folder: Path, one_ray: str, detector: Path) -> None:
    """Weights are not all that decides a model's answers."""
    out = folder.parent / "out"
    asked = settings(inputs=[folder], output=out, yolo=detector, limit=1)
    run(asked)
    job = job_of(out)
    assert job["models"]["yolo"]["files"]
    job["models"]["yolo"]["files"]["tokenizer.json"] = "0" * 64
    (out / "job.json").write_text(json.dumps(job))
    with pytest.raises(shardsight.UsageError, match=r"yolo.s tokenizer\.json"):
        run(asked)
    job["models"]["yolo"]["files"] = {}  # as of 0.1.0, which knew weights only
    (out / "job.json").write_text(json.dumps(job))
    assert run(asked).exactly_once


def test_the_library(folder: Path, one_ray: str, detector: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The lines of Python that a user of the wheel writes; nothing is printed."""
    context = DataContext.get_current()
    before = context.max_errored_blocks, context.enable_progress_bars, context.target_max_block_size
    job = shardsight.annotate(folder, output=folder.parent / "out", yolo=detector)
    assert context is DataContext.get_current()
    assert before == (context.max_errored_blocks, context.enable_progress_bars, context.target_max_block_size)
    assert (job.rows, job.errors, job.exactly_once) == (18, {}, True)
    assert job.content["bottleneck"] in job.content["stages"]
    rows = job.results()
    assert rows.count_rows() == shardsight.load_results(folder.parent / "out").count_rows() == 18
    assert capfd.readouterr() == ("", "")
    with pytest.raises(shardsight.UsageError, match="no model"):
        shardsight.annotate(folder, output="o")
    with pytest.raises(shardsight.UsageError, match="there is no setting colour"):
        shardsight.annotate(folder, output="o", yolo=detector, colour="red")

    frames = shardsight.read(str(folder))
    found = frames.map_batches(
        shardsight.Yolo, fn_constructor_args=(str(detector),), batch_format="pyarrow", concurrency=1, num_cpus=0
    ).take_all()
    assert len(found) == 18 and all(row["detections"] for row in found)


def test_importing_changes_nothing(tmp_path: Path) -> None:
    """Who imports the library for one function keeps environment, signal handlers and Pillow's limits as they were."""
    code = """if True:
        import os, signal, sys
        from PIL import Image
        state = lambda: (dict(os.environ), signal.getsignal(signal.SIGINT), Image.MAX_IMAGE_PIXELS)
        before, modules = state(), set(sys.modules)
        import shardsight
        dir(shardsight)
        assert state() == before
        new = {name.partition(".")[0] for name in set(sys.modules) - modules}
        assert new <= {"shardsight", "importlib"}, new
        shardsight.UsageError, shardsight.annotate
        assert state()[1:] == before[1:]  # cv2 sets LD_LIBRARY_PATH
        assert not {"torch", "ray", "vllm", "ultralytics", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_video_has_many_rows_of_which_some_may_fail() -> None:
    content = {"inputs": 1, "rows": 100, "errors": {"yolo": {"ProcessDied": 5}}}
    made = Job("out", Storage(), content | {"configuration": {"max_error_rate": 0.05}})
    assert not made.too_many_errors
    assert replace(made, content=made.content | {"rows": 99}).too_many_errors


def test_how_many_rows_there_will_be_is_not_told_by_a_part_of_a_video() -> None:
    whole = UnitCoverage(frames={0: [(0, 40)]}, lengths={0: 100}, total=1)
    assert _totals(Coverage({"v": whole, "w": replace(whole, lengths={})})) == {"v": 100}
