"""The search for the fastest configuration: the choice under noise, what it writes, and one search from end to end."""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from demo.scenes import scenes
from demo.writers import write
from serve.app import app
from serve.arguments import Arguments
from shardsight.models.yolo.info import YoloInfo
from shardsight.models.yolo.letterbox import Letterbox
from shardsight.settings import parse, parse_as
from tests.conftest import WEIGHTS, in_process, rows_of, start_job
from tune.throughput import command, report
from tune.throughput.choice import Final, Rounds, Trial, choose, interval, is_faster, pareto, ratio
from tune.throughput.configurations import Configuration, as_yaml, space_of
from tune.throughput.request import Settings

ROUNDS = 16
DEFAULTS = Configuration("/models/best.pt")


class Machine:
    """Made-up timings. speeds: true pictures per second by trial's number. noise: standard deviation of a round's
    logarithm. busy: the share of rounds that another process makes up to four times as slow."""

    def __init__(self, speeds: list[float], noise: float, busy: float = 0.0, seed: int = 0) -> None:
        self.speeds, self.noise, self.busy = speeds, noise, busy
        self.random = np.random.default_rng(seed)

    def rate(self, number: int) -> float:
        slower = self.random.uniform(1, 4) if self.random.random() < self.busy else 1.0
        return float(self.speeds[number - 1] / slower * np.exp(self.random.normal(0, self.noise)))

    def rounds(self, one: int, other: int, count: int) -> Rounds:
        return [(self.rate(one), self.rate(other)) for _ in range(count)]

    def duel(self, challenger: Trial, incumbent: Trial) -> Final:
        numbers = challenger.number, incumbent.number
        return Final(*numbers, self.rounds(*numbers, ROUNDS))

    def trials(self, accuracies: list[float]) -> list[Trial]:
        """Screened against the defaults, the first."""
        found = []
        for number, accuracy in enumerate(accuracies, 1):
            rounds = [(1.0, 1.0)] if number == 1 else self.rounds(number, 1, 4)
            found.append(Trial(number, replace(DEFAULTS, batch_size=number), "done", accuracy, rounds))
        return found


@pytest.mark.parametrize(("noise", "busy"), [(0.02, 0.0), (0.15, 0.0), (0.05, 0.5), (0.5, 0.3)])
def test_noise_never_chooses_what_is_slower_than_the_defaults(noise: float, busy: float) -> None:
    """On a busy machine, the best of 20 noisy figures is nearly always one of something that is no faster."""
    lucky = 0
    for seed in range(50):
        speeds = [100.0, *np.linspace(60, 98, 20)]
        machine = Machine(speeds, noise, busy, seed)
        trials = machine.trials([0.5] * len(speeds))
        chosen, _ = choose(trials, 0.3, machine.duel)
        assert chosen is trials[0], (seed, speeds[chosen.number - 1])
        lucky += any((trial.ratio or 0) > 1 for trial in trials[1:])
    assert lucky or noise < 0.1  # the screening alone would have been wrong


@pytest.mark.parametrize(("noise", "busy"), [(0.03, 0.0), (0.1, 0.2)])
def test_what_is_clearly_faster_is_chosen(noise: float, busy: float) -> None:
    machine = Machine([100.0, 90.0, 190.0, 104.0], noise, busy)
    chosen, finals = choose(machine.trials([0.5] * 4), 0.3, machine.duel)
    assert chosen.number == 3 and finals[0].won and ratio(finals[0].rounds) == pytest.approx(1.9, rel=0.1)


def test_a_small_gain_is_not_chosen() -> None:
    """What is 3 % faster in its rounds, however surely, may be slower in the next job."""
    machine = Machine([100.0, 103.0], 0.001)
    chosen, finals = choose(machine.trials([0.5] * 2), 0.3, machine.duel)
    assert chosen.number == 1 and not finals
    assert not is_faster(machine.rounds(2, 1, ROUNDS))


def test_accuracy_is_kept() -> None:
    """A configuration that is fast because it sees little is on the front, and is not chosen."""
    machine = Machine([100.0, 400.0, 200.0, 150.0], 0.02)
    trials = machine.trials([0.5, 0.45, 0.4971, 0.4969])
    assert choose(trials, 0.3, machine.duel)[0].number == 3
    assert choose(trials, 0.0, machine.duel)[0].number == 1
    assert choose(trials, 5.0, machine.duel)[0].number == 2


def test_a_finalist_that_fails_is_not_chosen() -> None:
    machine = Machine([100.0, 200.0], 0.01)
    trials = machine.trials([0.5, 0.5])
    assert choose(trials, 0.3, lambda one, other: Final(one.number, other.number, []))[0] is trials[0]


def test_what_drifts_falls_on_both() -> None:
    """A machine that gets slower and slower, or a throttled one, is neither's fault."""
    drifting = [100 * 0.9**n for n in range(2 * ROUNDS)]
    equal = [tuple(drifting[2 * n : 2 * n + 2][:: -1 if n % 2 else 1]) for n in range(ROUNDS)]
    assert not is_faster(equal)  # type: ignore[arg-type]
    low, high = interval(equal)  # type: ignore[arg-type]
    assert low < 1 < high


def test_the_front_is_what_nothing_beats() -> None:
    speeds, accuracies = [1.0, 2.0, 2.0, 3.0, 0.5], [0.5, 0.4, 0.45, 0.3, 0.5]
    trials = [
        Trial(number, DEFAULTS, "done", accuracy, [(speed, 1.0)])
        for number, (speed, accuracy) in enumerate(zip(speeds, accuracies, strict=True), 1)
    ]
    failed = Trial(6, DEFAULTS, "failed", None, error="no memory")
    assert pareto([*trials, failed]) == {1, 3, 4}


@pytest.mark.parametrize(
    ("configuration", "gpus"),
    [
        (DEFAULTS, 0.0),
        (Configuration("/models/best.pt", "pytorch", (480, 640), "fp32", False, 32, 2), 0.0),
        (Configuration("/models/best.pt", "openvino:int8", (480, 480), batch_size=8), 0.0),
        (Configuration("/models/best.pt", "pytorch", (320, 320), batch_size=128, actors=2), 1.0),
    ],
)
def test_best_yaml_is_taken_by_job_and_service(tmp_path: Path, configuration: Configuration, gpus: float) -> None:
    """Both would otherwise refuse it, or the service would compute something else than was measured."""
    wanted = configuration.settings("/models/this", gpus)
    (tmp_path / "best.yaml").write_text(as_yaml(wanted, gpus, "why: a comment"))
    job = parse(["pictures", "--output", "out", "--config", str(tmp_path / "best.yaml")]).model_dump()
    assert {name: job[name] for name in wanted} == wanted
    content = yaml.safe_load((tmp_path / "best.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    service = Arguments(**application.args).model_dump()
    for name in ("yolo", "imgsz", "precision", "scaled_decode", "batch_size"):
        assert service[name] == job[name]
    if gpus:
        assert (service["gpus"], service["replicas"]) == (0.5, 2)


def test_what_is_tried_begins_with_the_defaults() -> None:
    arguments = ["--yolo", "best.pt", "--yolo", "small.onnx", "--data", "data.yaml", "--output", "out"]
    given = ["--format", "openvino:int8,onnx", "--imgsz", "640,320", "--batch-size", "16,64"]
    settings = parse_as(Settings, [*arguments, *given])
    inputs = {"best.pt": Letterbox((640, 640)), "small.onnx": Letterbox((640, 640), minimal=False)}
    infos = {path: YoloInfo(path, "detect", {}, inputs[Path(path).name], {}, "") for path in settings.yolo}
    space = space_of(settings, infos, gpus=0.0, usual=1, fits=[2])
    variants = space.variants()
    assert variants[0] == Configuration(settings.yolo[0]) and len(set(variants)) == len(variants)
    assert {one.format for one in variants} == {"pytorch", "openvino:int8", "onnx:fp32"}
    for format, own in (("pytorch", None), ("onnx:fp32", (640, 640))):
        assert {one.imgsz for one in variants if one.format == format} == {own, (320, 320)}
    assert [one for one in variants if one.model == settings.yolo[1]] == [
        Configuration(settings.yolo[1], scaled_decode=scaled) for scaled in (True, False)
    ]
    loads = [(one.batch_size, one.actors) for one in space.loads(variants[0])]
    assert loads == [(None, 2), (64, None), (64, 2)]


def test_table_and_report_tell_of_every_trial(tmp_path: Path) -> None:
    """One that failed, too, with its reason; and the report loads nothing from elsewhere."""
    machine = Machine([100.0, 200.0], 0.01)
    trials = machine.trials([0.5, 0.5])
    trials.append(Trial(3, Configuration("/models/best.pt", "onnx:int8"), "failed", error="no <memory>"))
    chosen, finals = choose(trials, 0.3, machine.duel)
    content: dict[str, Any] = {
        **{"started": "2026-01-01", "measure": "mAP50-95", "seconds": 60, "left_out": ["engine needs a GPU"]},
        **{"machine": {"cpu": "a CPU", "cores": 2, "gpu": None}, "models": {"/models/best.pt": "abc"}, "versions": {}},
        "data": {"path": "data.yaml", "sha256": "def", "pictures": 24},
        "best": {"trial": 2, "name": "best.pt batch 2", "accuracy": 0.5, "times_as_fast": 2.0},
    }
    content["best"]["sentence"] = report.sentence(content, trials[0])
    page = report.page(trials, finals, chosen, content)
    for said in ("best.pt batch 2: 2.00 times as fast as the defaults", "no \\u003cmemory>", "engine needs a GPU"):
        assert said in page
    assert not re.search(r'(src|href)="?https?:', page)
    (tmp_path / "trials.parquet").write_bytes(report.table_of(trials, chosen))
    rows = duckdb.sql(f"select name, front, best, error from '{tmp_path}/trials.parquet' order by trial").fetchall()
    assert rows == [
        ("best.pt batch 1", False, False, None),
        ("best.pt batch 2", True, True, None),
        ("best.pt onnx int8", False, False, "no <memory>"),
    ]


@pytest.fixture
def tune(one_ray: str, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; its exit code and what it said."""
    return in_process(command.main, capfd)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.yaml"], "does not exist"),
        (["--yolo", "nowhere.pt"], "there are no weights at"),
        (["--format", "tflite"], "there is no tflite: choose from pytorch, "),
        (["--format", "onnx:int4"], "onnx has no int4: choose from fp32, fp16, int8"),
        (["--imgsz", "16"], "expected 32 or more, not 16"),
        (["--rounds", "3"], "--rounds"),
        (["--actors", "4000"], "--actors 4000: this cluster has no room"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    tune: Callable[..., tuple[int, str]], tmp_path: Path, arguments: list[str], said: str
) -> None:
    write(scenes(2, 5), tmp_path / "data", "coco")
    data, out = tmp_path / "data/annotations.json", tmp_path / "out"
    given = ["--yolo", WEIGHTS / "detect.pt", "--data", data, "--output", out]
    if arguments[0] == "--yolo":
        given = given[2:]
    code, err = tune(*given, *arguments)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    assert not (out / report.JSON).exists()


TINY = (
    *("--format", "onnx", "--imgsz", "192", "--precision", "bf16", "--decode", "scaled"),
    *("--batch-size", "16", "--rounds", "10", "--seconds", "0.2", "--within", "100"),
)


def _trials(out: Path) -> list[dict[str, Any]]:
    if not (out / report.JSON).exists():
        return []
    found: list[dict[str, Any]] = json.loads((out / report.JSON).read_text()).get("trials", [])
    return found


def _kill_when(begun: Callable[[], bool], *arguments: Any) -> None:
    """Kill the search and its whole Ray, as soon as there is so much of it."""
    driver = start_job(*arguments, module="tune.throughput")
    ends = time.monotonic() + 280
    while not begun():
        assert driver.poll() is None and time.monotonic() < ends, driver.communicate()
        time.sleep(0.1)
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait()


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_its_choice_is_a_configuration(
    tune: Callable[..., tuple[int, str]], annotate: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    write(scenes(24, 5), tmp_path / "data", "coco")
    out = tmp_path / "out"
    request = ["--yolo", WEIGHTS / "detect.pt", "--data", tmp_path / "data/annotations.json", "--output", out, *TINY]
    for count in (1, 3):  # within the second evaluation, and within an export or its evaluation
        _kill_when(lambda count=count: len(_trials(out)) >= count, *request)  # type: ignore[misc]
    before = _trials(out)
    code, err = tune(*request)
    assert code == 0, err
    timed = ("status", "rounds", "memory", "seconds")
    for one, other in zip(before, _trials(out), strict=False):  # measured once
        assert one == (other if one["status"] == "done" else other | {name: one[name] for name in timed})
    relation = duckdb.sql(f"select * from '{out}/trials.parquet' order by trial")
    rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    assert [row["status"] for row in rows] == ["done"] * len(rows) and not any(row["error"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows) >= 4
    assert all(row["pictures_per_second"] > 0 and row["peak_memory_mb"] > 0 for row in rows)
    accuracy = {row["name"]: row["accuracy"] for row in rows}
    assert accuracy["detect.pt onnx fp32 384"] == pytest.approx(accuracy["detect.pt"], abs=0.03)
    assert accuracy["detect.pt onnx fp32 192"] == pytest.approx(accuracy["detect.pt 192"], abs=0.03)
    (best,) = (row for row in rows if row["best"])
    assert best["name"] == json.loads((out / report.JSON).read_text())["best"]["name"]
    assert annotate(tmp_path / "data", "--output", tmp_path / "job", "--config", out / "best.yaml")[0] == 0
    assert len(rows_of(tmp_path / "job")) == 24
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load((out / report.BEST).read_text())).applications
    assert app(Arguments(**application.args))
    measured = _trials(out)
    assert tune(*request)[0] == 0 and _trials(out) == measured  # nothing is measured again
    code, err = tune(*request, "--imgsz", "224")
    assert code == 2 and "has a sweep with imgsz [192], not [192, 224]" in err
