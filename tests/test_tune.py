"""Sweeps of YOLO training: real ultralytics training of a few small pictures, in real Ray Tune.

The long ones: `make tune-proofs`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import httpx
import psutil
import pyarrow.parquet as pq
import pytest
from ray.tune import register_trainable

import shardsight
from demo.scenes import scenes
from demo.writers import write_splits
from shardsight.errors import UsageError
from tests.conftest import ROOT, S3, WEIGHTS, free_port, in_process, rows_of
from tune import search, yolo
from tune.report import importance
from tune.space import Range, Space, load_space, parse_space
from tune.sweep import Trial
from tune.training import HYPERPARAMETERS

Tune = Callable[..., tuple[int, str]]
SMALL = ("--model", "yolov8n.yaml", "--imgsz", "64", "--train", "batch=8", "--train", "warmup_epochs=0")


def make_data(folder: Path, count: int = 16) -> Path:
    """A data set of made-up scenes; the path of its data.yaml."""
    write_splits(scenes(count, seed=1), scenes(8, seed=2), folder)
    return folder / "data.yaml"


def space(folder: Path, **lines: str) -> Path:
    path = folder / "space.yaml"
    path.write_text("".join(f"{name}: {said}\n" for name, said in lines.items()))
    return path


def trials(out: Path) -> list[dict[str, Any]]:
    """trials.parquet, by DuckDB, as a user reads it; without what differs from run to run."""
    relation = duckdb.sql(f"select * from '{out}/trials.parquet' order by trial")
    rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    for row in rows:
        for name in ("id", "seconds", "started", "checkpoint"):
            del row[name]
        for epoch in [*row["history"], *([row["metrics"]] if row["metrics"] else [])]:
            del epoch["seconds"]
    return rows


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return found


@pytest.fixture
def tune(one_ray: str, capfd: pytest.CaptureFixture[str]) -> Tune:
    """Runs the command in this process; its exit code and what it said."""
    return in_process(yolo.main, capfd)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_space_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = space(tmp_path, lr0="loguniform 1e-5 1e-1", model="choice a.pt b.pt", close_mosaic="int 0 3", mosaic="0")
    found = parse_space(load_space(str(path)), HYPERPARAMETERS)
    assert found.ranges == {
        "lr0": Range("loguniform", (1e-5, 0.1)),
        "model": Range("choice", ("a.pt", "b.pt")),
        "close_mosaic": Range("int", (0, 3)),
    }
    assert found.fixed == {"mosaic": 0}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"lr": "uniform 0 1"}, "there is no hyperparameter lr: did you mean lr0 or lrf?"),
        ({"epochs": "choice 1 2"}, "there is no hyperparameter epochs"),
        ({"lr0": "uniform 1 0"}, "goes from the lower to the higher"),
        ({"lr0": "loguniform 0 1"}, "loguniform needs numbers above 0"),
        ({"lr0": "uniform 1"}, "expected two numbers"),
        ({"close_mosaic": "int 0.5 2"}, "expected two whole numbers"),
        ({"lr0": "between 0 1"}, "is no range"),
        ({"optimizer": "choice SGD SGD"}, "expected different choices"),
    ],
)
def test_a_space_that_is_wrong_is_refused(tmp_path: Path, lines: dict[str, str], said: str) -> None:
    """A typing error would otherwise search something else for hours."""
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        parse_space(load_space(str(space(tmp_path, **lines))), HYPERPARAMETERS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.yaml"], "there is no data set at"),
        (["--model", "nowhere.pt"], "there are no weights at"),
        (["--model", "yolov8n.onnx"], "cannot be trained"),
        (["--search", "grid"], "grid tries every choice"),
        (["--search", "grid", "--samples", "3"], "leave out --samples"),
        (["--search", "optuna", "--scheduler", "pbt"], "leave out --search"),
        (["--scheduler", "pbt", "--space", "none"], "has nothing to change"),
        (["--train", "lr=1"], "did you mean lr0 or lrf?"),
        (["--callbacks", "tests.tune_callbacks:nothing"], "cannot be imported"),
        (["--callbacks", "nothing"], "expected module:function"),
        (["--mlflow", "sqlite:///x.db"], "pip install mlflow"),
        (["--cpus-per-trial", "4000"], "no trial could ever run"),
        (["--gpus-per-trial", "0.5"], "no trial could ever run"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    tune: Tune, data: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "out"
    code, err = tune("--data", data, *SMALL, "--output", out, *arguments)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    assert not (out / "sweep.json").exists()


def test_a_trial_that_fails_is_a_row(tune: Tune, tmp_path: Path, annotate: Callable[..., tuple[int, str]]) -> None:
    """A diverging trial costs itself alone, an unreadable picture is named, and best/ is a model for a job."""
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "train" / "images" / "bad.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    arguments = ("--data", data, *SMALL, "--epochs", "2", "--search", "grid", "--scheduler", "none", "--output", out)
    wild = space(tmp_path, lr0="choice 0.002 1e6")
    code, err = tune(*arguments, "--space", wild)
    assert code == 0, err
    good, bad = trials(out)
    assert (good["status"], good["epochs"], good["config"]["lr0"]) == ("done", 2, 0.002)
    assert bad["status"] == "failed" and "'lr0=1000000.0' is an invalid value" in bad["error"] and bad["epochs"] == 0
    found = content(out)
    assert found["trials"]["failed"] == 1 and found["best"]["trial"] == good["trial"]
    assert found["data"]["pictures"] == {"train": 16, "val": 8}
    assert len(found["data"]["problems"]) == 1 and "bad.jpg" in found["data"]["problems"][0]
    assert "an invalid value" in (out / "report.html").read_text()
    assert list((out / "trials").rglob("events.out.tfevents*"))

    best = json.loads((out / "best" / "best.json").read_text())
    assert best["config"] == {"lr0": 0.002} and best["data"]["sha256"] == found["data"]["sha256"]
    assert str(data.parent).encode() not in (out / "best" / "best.pt").read_bytes()  # may be given to others
    assert annotate(data.parent / "val" / "images", "--output", tmp_path / "job", "--yolo", out / "best")[0] == 0
    assert len(rows_of(tmp_path / "job")) == 8

    before = (out / "trials.parquet").stat().st_mtime_ns
    assert tune(*arguments, "--space", wild)[0] == 0
    assert (out / "trials.parquet").stat().st_mtime_ns == before  # a sweep that is done is not run again
    code, err = tune(*arguments, "--space", space(tmp_path, lr0="choice 0.002 0.01"))
    assert code == 2 and "has a sweep with space" in err
    (data.parent / "val" / "labels" / next(iter(os.listdir(data.parent / "val" / "labels")))).write_text("")
    code, err = tune(*arguments, "--space", wild)
    assert code == 2 and ("has changed" in err or "has a sweep with space" in err)


@pytest.mark.slow
def test_a_killed_trial_goes_on_bit_for_bit(tune: Tune, tmp_path: Path) -> None:
    """Of two trainings with the same settings the process of one is killed: both report the same, to the last bit."""
    data = make_data(tmp_path / "data")
    data.with_name("die").touch()
    arguments = ("--space", "none", "--scheduler", "none", "--samples", "2", "--epochs", "3", "--train", "mixup=0.3")
    where = ("--data", data, "--output", tmp_path / "out", "--callbacks", "tests.tune_callbacks:die_once")
    code, err = tune(*SMALL, *arguments, *where)
    assert code == 0, err
    assert not data.with_name("die").exists()
    started = pq.read_table(tmp_path / "out" / "trials.parquet", columns=["started"])["started"].to_pylist()
    assert sorted(started) == [1, 2]
    one, other = trials(tmp_path / "out")
    assert [epoch["epoch"] for epoch in one["history"]] == [1, 2, 3]
    assert one["history"] == other["history"]


@pytest.mark.parametrize("name", ["optuna", "random"])
def test_the_first_trial_has_the_defaults(name: str) -> None:
    """A sweep of few trials would otherwise often end below what plain training reaches."""
    space = Space({"lr0": Range("loguniform", (1e-5, 0.1)), "mosaic": Range("uniform", (0.0, 1.0))}, {})
    defaults = {"lr0": 0.001, "mosaic": 1.0, "box": 7.5}
    for low, expected in ((1e-5, True), (0.01, False)):
        space.ranges["lr0"] = Range("loguniform", (low, 0.1))
        chosen = search.searcher(name, space, 0, defaults)
        if name == "random":
            register_trainable("x", lambda config: None)
            chosen.add_configurations(
                {"sweep": {"run": "x", "config": search.param_space(name, space), "num_samples": 2}}
            )
            first, second = chosen.next_trial().config, chosen.next_trial().config
        else:
            chosen.set_search_properties("fitness", "max", search.param_space(name, space))
            first, second = chosen.suggest("1"), chosen.suggest("2")
        assert (first == {"lr0": 0.001, "mosaic": 1.0}) is expected
        assert first != second and second["lr0"] >= low


def test_importance_finds_what_matters() -> None:
    """Optuna's evaluator looks at the lowest values; taken as it is, it would rank what makes trials bad."""
    generator = random.Random(0)
    found = []
    for number in range(1, 201):
        config = {"lr0": generator.uniform(0, 1), "box": generator.uniform(0, 1)}
        # lr0 makes the best trials, and box the worst.
        best = [{"epoch": 1, "fitness": 1 - abs(config["lr0"] - 0.3) - (config["box"] > 0.8)}]
        found.append(Trial(number, str(number), config, "done", best))
    weights = importance(found, {name: Range("uniform", (0.0, 1.0)) for name in ("lr0", "box")})
    assert next(iter(weights)) == "lr0" and weights["lr0"] > 0.7
    assert importance(found[:3], {"lr0": Range("uniform", (0.0, 1.0))}) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["optuna", "genetic", "pbt"])
def test_each_search_finishes(tune: Tune, data: Path, tmp_path: Path, kind: str) -> None:
    chosen = ("--scheduler", "pbt") if kind == "pbt" else ("--search", kind, "--scheduler", "asha")
    lines = space(tmp_path, lr0="uniform 0.0005 0.01", mosaic="uniform 0 1", close_mosaic="int 0 2")
    where = ("--data", data, "--output", tmp_path / "out", "--space", lines)
    code, err = tune(*where, *SMALL, *chosen, "--samples", "3", "--epochs", "4")
    assert code == 0, err
    rows = trials(tmp_path / "out")
    assert [row["trial"] for row in rows] == [1, 2, 3]
    assert all(row["status"] in ("done", "stopped") and row["epochs"] for row in rows)
    assert (tmp_path / "out" / "best" / "best.pt").exists()


@pytest.mark.slow
def test_plain_training_and_a_failed_sweep(tune: Tune, data: Path, tmp_path: Path) -> None:
    """`--samples 1 --space none` is one training; with every trial failed the exit code is 3, and says so."""
    one = ("--samples", "1", "--space", "none", "--epochs", "1")
    assert tune("--data", data, *SMALL, *one, "--output", tmp_path / "one", "--train", "lr0=0.002")[0] == 0
    (row,) = trials(tmp_path / "one")
    assert row["status"] == "done" and not row["config"]
    code, err = tune("--data", data, *SMALL, *one, "--output", tmp_path / "two", "--train", "lr0=1e6")
    assert code == 3 and "1 of 1 trials failed" in err
    assert not (tmp_path / "two" / "best").exists() and (tmp_path / "two" / "report.html").exists()


@pytest.mark.slow
def test_a_sweep_in_a_store(tune: Tune, data: Path, tmp_path: Path, s3: S3) -> None:
    bucket = s3.bucket("sweeps")
    arguments = (
        "--samples",
        "2",
        "--search",
        "random",
        "--epochs",
        "2",
        "--space",
        space(tmp_path, lr0="uniform 0 0.1"),
    )
    code, err = tune("--data", data, *SMALL, *arguments, "--output", "s3://sweeps/one", *s3.options())
    assert code == 0, err
    assert len(trials(bucket / "one")) == 2 and (bucket / "one" / "best" / "best.pt").exists()


@pytest.mark.slow
def test_best_is_a_model_everywhere(
    tune: Tune, tmp_path: Path, annotate: Callable[..., tuple[int, str]], one_ray: str
) -> None:
    """best/ as it stands, in a job, an evaluation, an export, and the service."""
    from ray import serve

    from serve.app import app
    from serve.arguments import Arguments

    data, best = make_data(tmp_path / "data"), tmp_path / "out" / "best"
    plain = ("--samples", "1", "--space", "none", "--epochs", "1", "--train", "lr0=1e-5", "--imgsz", "320")
    assert tune("--data", data, "--model", WEIGHTS / "detect.pt", *plain, "--output", best.parent)[0] == 0
    assert str(ROOT).encode() not in (best / "best.pt").read_bytes()  # may be given to others
    pictures = data.parent / "val" / "images"
    exact = {"precision": "fp32", "imgsz": 320}
    job = shardsight.annotate(str(pictures), output=str(tmp_path / "job"), yolo=str(best), **exact)
    rows = {Path(row["id"]).name: row for row in rows_of(tmp_path / "job")}
    assert not job.errors and len(rows) == 8 and sum(len(row["detections"]) for row in rows.values()) > 8
    report = shardsight.evaluate(data, output=tmp_path / "evaluation", yolo=[best], rounds=0, **exact)
    assert report.models[0]["figures"]["boxes"]["measures"]["mAP50-95"]["value"] > 0.5
    exports = shardsight.export(best, format="openvino", output=tmp_path / "exports", imgsz=320)
    (export,) = exports.exports
    assert annotate(pictures, "--output", tmp_path / "again", "--yolo", f"{exports.out}/{export.name}")[0] == 0
    assert len(rows_of(tmp_path / "again")) == 8

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(Arguments(yolo=str(best), **exact)), name="shardsight")
    try:
        for path in sorted(pictures.iterdir()):
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/annotate", files={"image": (path.name, path.read_bytes())}, timeout=60
            )
            assert [one["label"] for one in answer.json()["detections"]] == [
                one["label"] for one in rows[path.name]["detections"]
            ]
    finally:
        serve.shutdown()


@pytest.mark.slow
def test_nothing_leaves_the_machine(data: Path, tmp_path: Path) -> None:
    """No process of a sweep connects to another machine, or asks for the address of one."""
    noted = tmp_path / "noted"
    ours = ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(ROOT / "tests" / "watch_network"), "NOTED": str(noted)}
    environment["RAY_USAGE_STATS_REPORT_INTERVAL_S"] = "1"  # else telemetry would begin after this test
    reach = "import socket; socket.socket().connect_ex(('192.0.2.1', 9))"  # what the test must see
    subprocess.run(["timeout", "2", sys.executable, "-c", reach], env=environment)
    assert "192.0.2.1" in noted.read_text()
    noted.unlink()
    where = ("--data", data, "--output", tmp_path / "out", "--samples", "2", "--epochs", "1")
    command = [sys.executable, "-m", "tune.yolo", *map(str, (*where, *SMALL))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not noted.exists(), noted.read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_driver_loses_no_trial(tmp_path: Path) -> None:
    """The driver is killed ten times, and each second time all processes of its Ray with it, after random numbers of
    epochs, and the same command goes on: no trial is lost, none begins again what the state must have, and the table is
    that of a sweep that nothing happened to."""
    tables = []
    for name, kills in (("whole", 0), ("killed", 10)):
        data, out = make_data(tmp_path / name), tmp_path / f"{name}-out"
        begun, generator = data.with_name("begun"), random.Random(5)
        arguments = ("--search", "random", "--scheduler", "none", "--samples", "4", "--epochs", "20")
        lines = space(tmp_path, lr0="loguniform 1e-3 1e-2")
        where = ("--data", data, "--output", out, "--space", lines, "--callbacks", "tests.tune_callbacks:note")
        highest: dict[str, int] = {}  # epoch of each trial that has begun
        for left in range(kills, -1, -1):
            begun.write_text("")
            driver = _start(*SMALL, *arguments, *where)
            if left:
                # Of 80 epochs, no more than 70 begin before the last kill.
                _wait(driver, begun, generator.randint(0, 7), generator.uniform(0, 1))
                assert driver.poll() is None
                ray = psutil.Process(driver.pid).children(recursive=True) if left % 2 else []
                for process in (psutil.Process(driver.pid), *ray):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            assert driver.wait(900) == (-signal.SIGKILL if left else 0)
            first: dict[str, int] = {}
            for line in begun.read_text().splitlines():
                trial, epoch = line.rpartition("_")[2].split()
                first.setdefault(trial, int(epoch))
                # Of the epoch before, the driver may have begun the next and not yet written it down.
                assert first[trial] >= highest.get(trial, 0) - 1, f"trial {trial} begins at {epoch}, after {highest}"
            for line in begun.read_text().splitlines():
                trial, epoch = line.rpartition("_")[2].split()
                highest[trial] = int(epoch)
        tables.append(trials(out))
        assert [[epoch["epoch"] for epoch in row["history"]] for row in tables[-1]] == [list(range(1, 21))] * 4
    assert tables[0] == tables[1]


def _wait(driver: subprocess.Popen[bytes], begun: Path, epochs: int, seconds: float) -> None:
    """Until so many epochs have begun, and then so long; without epochs, so many parts of the time to start up."""
    deadline = time.monotonic() + (10 * seconds if not epochs else float("inf"))
    while driver.poll() is None and time.monotonic() < deadline:
        if epochs and len(begun.read_text().splitlines()) >= epochs:
            deadline, epochs = time.monotonic() + seconds / 4, 0
        time.sleep(0.01)


def _start(*arguments: Any) -> subprocess.Popen[bytes]:
    """The command as a process, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tune.yolo", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
