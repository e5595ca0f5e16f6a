"""The search: each variant's accuracy by an evaluation, each configuration's speed against the defaults', the choice.

OUT/sweep.json is written after each trial, and a search that was killed goes on from it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import ray
from rich.console import Console

from shardsight import cluster, exporting, truth
from shardsight.actors import Stage, plan
from shardsight.decode.frames import Load
from shardsight.errors import Fault, UsageError
from shardsight.evaluation import speed
from shardsight.evaluation.recommend import points
from shardsight.evaluation.request import Evaluation
from shardsight.evaluation.run import run as evaluate
from shardsight.job import JobError, raised, versions
from shardsight.models import selection
from shardsight.models.yolo import info as yolo
from shardsight.models.yolo.formats import FORMATS
from shardsight.results.lock import lock
from shardsight.row import Failure
from shardsight.settings import settings as job_settings
from shardsight.settings import settings_as
from shardsight.sources import Record
from shardsight.sources.files import fetch
from shardsight.storage import Storage, StorageError, is_remote
from tune import sweep
from tune.throughput import report
from tune.throughput.choice import Final, Trial, accurate, choose, ratio
from tune.throughput.configurations import PYTORCH, Configuration, Space, as_yaml, space_of
from tune.throughput.request import FREE, Settings
from tune.throughput.timing import CHUNK, Flow, alternate

SCREENING = 4  # rounds of each trial against the defaults
SAMPLE = 256  # pictures of the labelled set on which speed is measured, evenly spread
_OF_TRIALS = (UsageError, JobError, Failure, ray.exceptions.RayError)  # what costs a trial, and not the search


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Search, or go on with it; returns what sweep.json holds. console: is told of each trial.

    Raises UsageError, Fault and KeyboardInterrupt.
    """
    storage = Storage(settings.storage)
    infos = {model: yolo.inspect(model, storage=storage) for model in settings.yolo}
    if len(tasks := {info.task for info in infos.values()}) > 1:
        raise UsageError(f"the models are for {' and '.join(sorted(tasks))}: compare models for one task")
    labelled = truth.read(settings.data, storage, tasks.pop())
    if not is_remote(settings.output):
        os.makedirs(settings.output, exist_ok=True)
    with lock(settings.output, storage), ExitStack() as stack:
        if settings.overwrite:
            done = (report.BEST, report.TABLE, report.PAGE, report.JSON)
            sweep.remove(settings.output, storage, ("accuracy", "models"), done)  # sweep.json last
        cluster.join(settings.verbose)
        return _Run(settings, storage, infos, labelled, console, stack).content()


@dataclass
class _Run:
    settings: Settings
    storage: Storage
    infos: dict[str, yolo.YoloInfo]
    labelled: truth.Truth
    console: Console
    stack: ExitStack  # ends the defaults' processes
    trials: list[Trial] = field(default_factory=list)
    finals: list[Final] = field(default_factory=list)
    reference: Flow | None = None
    told: int = 0  # steps of this run

    def content(self) -> dict[str, Any]:
        self.out = self.settings.output
        self.gpus = ray.cluster_resources().get("GPU", 0.0)
        self.said = self._earlier()
        try:
            space = self._space()
            self.said["left_out"] = space.left_out
            chosen, finals = self._search(space)
            self._finish(chosen, finals)
        except KeyboardInterrupt:
            self._save("interrupted")
            raise
        except StorageError as error:
            raise Fault(str(error)) from error
        return self.said

    def _earlier(self) -> dict[str, Any]:
        """The start of sweep.json, and the trials that it has. Raises UsageError where it is another search's."""
        task = ray.remote(speed.machine).options(num_cpus=0, num_gpus=min(self.gpus, 1.0))
        machine = ray.get(task.remote())
        samples = self.labelled.samples[: self.settings.limit]
        sha256 = hashlib.sha256(repr(samples).encode()).hexdigest()
        models = {model: info.sha256 for model, info in self.infos.items()}
        content = {"data": {"path": self.settings.data, "sha256": sha256, "pictures": len(samples)}, "models": models}
        configuration = {name: value for name, value in self.settings.record().items() if name not in FREE}
        before = sweep.earlier(self.out, self.storage, configuration, content, "data or models have")
        sweep.earlier(self.out, self.storage, configuration, {"machine": machine}, "the machine has")
        self.trials = [
            Trial(**one | {"configuration": _configuration(one["configuration"]), "rounds": _rounds(one["rounds"])})
            for one in before.get("trials", [])
        ]
        self.finals = [Final(**one | {"rounds": _rounds(one["rounds"])}) for one in before.get("finals", [])]
        self.before, self.began = before.get("seconds", 0.0), time.monotonic()
        started = before.get("started") or datetime.now(UTC).isoformat(timespec="seconds")
        said = {"started": started, "configuration": configuration, "versions": versions(), "machine": machine}
        return {**said, **content, "measure": before.get("measure")}

    def _space(self) -> Space:
        """Raises UsageError for numbers of actors that could never run."""
        default = Configuration(self.settings.yolo[0])
        usual = self._plan(default, default.model)[0].initial
        for count in self.settings.actors:
            if not self._fits(Configuration(default.model, actors=count)):
                raise UsageError(f"--actors {count}: this cluster has no room for them beside decoding: give fewer")
        near = sorted({max(1, usual - 1), usual + 1, 2 * usual} - {usual})
        fits = [count for count in near if self._fits(Configuration(default.model, actors=count))]
        return space_of(self.settings, self.infos, self.gpus, usual, fits)

    def _fits(self, configuration: Configuration) -> bool:
        """Whether a job with it could run: decoding needs a CPU, too."""
        stage = self._plan(configuration, configuration.model)[0]
        cpus, count = ray.cluster_resources().get("CPU", 1.0), stage.initial
        each = stage.cpus if stage.gpus else max(stage.cpus, 1.0)  # less only while other jobs hold the rest
        return bool(each * count + 1 <= cpus and stage.gpus * count <= self.gpus + 1e-6)

    # --- The trials

    def _search(self, space: Space) -> tuple[Trial, list[Final]]:
        variants = space.variants()
        self.steps = 2 * len(variants) + len(space.loads(variants[0])), time.monotonic()
        for variant in variants:
            self._attempt(self._trial(variant), self._score)
        self.chunks = self._chunks(max(CHUNK, *(size or 0 for size in space.batch_sizes)))
        for trial in list(self.trials):
            self._attempt(trial, self._time)
        good = accurate(self.trials, self.settings.within)
        fastest = max(good, key=lambda trial: trial.ratio or 0.0)
        for configuration in space.loads(fastest.configuration.variant):
            trial = self._trial(configuration)
            trial.accuracy = fastest.accuracy
            self._attempt(trial, self._time)
        self._drop_reference()  # whose GPU the finals and further jobs need
        return choose(self.trials, self.settings.within, self._duel)

    def _trial(self, configuration: Configuration) -> Trial:
        """Of this configuration, the earlier one or a new one."""
        for trial in self.trials:
            if trial.configuration == configuration:
                return trial
        self.trials.append(Trial(len(self.trials) + 1, configuration))
        return self.trials[-1]

    def _attempt(self, trial: Trial, measure: Callable[[Trial, str], str]) -> None:
        """Measure a trial, unless that is done. A failure is the trial's, of the defaults a Fault of the search.

        measure: fills in the trial, and says what was found; "" where it was there.
        """
        if trial.status != "pending":
            return
        began, said = time.monotonic(), ""
        try:
            said = measure(trial, self._path(trial.configuration))
        except StorageError:
            raise  # of no trial's fault
        except _OF_TRIALS as error:
            kind, reason = raised(error)
            reason = reason if isinstance(error, (UsageError, JobError)) else f"{kind}: {reason[:500]}"
            self._drop_reference()  # which may be what died
            if trial is self.trials[0]:
                raise Fault(f"the defaults fail, {trial.configuration.name}: {reason}") from error
            trial.status, trial.error = "failed", reason
        trial.seconds = round(trial.seconds + time.monotonic() - began, 1)
        self._save("running")
        if said or trial.error:
            self._tell(f"{trial.configuration.name}: {trial.error or said}")

    def _tell(self, said: str) -> None:
        """With the time left, if further steps take as long as those of this run."""
        steps, began = self.steps
        scored = sum(one.accuracy is not None for one in self.trials if one.configuration == one.configuration.variant)
        made = scored + sum(one.status != "pending" for one in self.trials)
        self.told += 1
        left = (time.monotonic() - began) / self.told * (steps - made) / 60
        self.console.print(f"{said}; about {max(left, 0):.0f} min left", highlight=False, soft_wrap=True)

    def _path(self, configuration: Configuration) -> str:
        """Of the model, or of its export, which is made where it is not there yet. Raises UsageError."""
        if configuration.format == PYTORCH:
            return configuration.model
        assert configuration.imgsz
        name, precision = configuration.format.split(":")
        label = Configuration(configuration.model, configuration.format, configuration.imgsz).name
        place = f"models/{_slug(label, self.settings.yolo.index(configuration.model))}"
        folder = f"{self.out}/{place}"
        if not self.storage.exists(f"{folder}/{exporting.RECORD}"):  # a killed one may have left a part
            sweep.remove(self.out, self.storage, [place])
        dynamic = {"dynamic": True} if "dynamic" in FORMATS[name].options else {}
        options: dict[str, Any] = {"imgsz": list(configuration.imgsz), **dynamic}
        request = exporting.Request(
            *(configuration.model, folder, [name], [precision], options, self.settings.data),
            storage=self.settings.storage,
            compare=False,
        )
        (made,) = exporting.run(request).exports
        if made.reason:
            raise UsageError(made.reason)
        return f"{folder}/{made.name}"

    def _score(self, trial: Trial, path: str) -> str:
        """The main measure, by an evaluation of its own in accuracy/. Raises UsageError, JobError, JobInterrupted."""
        if trial.accuracy is not None:
            return ""
        variant = trial.configuration
        folder = f"{self.out}/accuracy/{_slug(variant.name, self.settings.yolo.index(variant.model))}"
        own = {name: value for name, value in variant.settings(path, self.gpus).items() if name != "yolo"}
        both = {"rounds": 0, "limit": self.settings.limit, "storage": self.settings.storage}
        made = evaluate(settings_as(Evaluation, data=self.settings.data, output=folder, yolo=[path], **both, **own))
        kind, name = made.content["main"]["kind"], made.content["main"]["measure"]
        trial.accuracy = made.models[0]["figures"][kind]["measures"][name]["value"]
        if trial.accuracy is None:
            raise UsageError(f"{name} of {kind} cannot be computed on {self.settings.data}: label more pictures")
        self.said["measure"] = name
        return f"{name} {points(trial.accuracy)}"

    # --- Speed

    def _chunks(self, size: int) -> list[Any]:
        """The sample's encoded pictures in Ray's object store, so many at a time. Raises UsageError."""
        samples = self.labelled.samples[: self.settings.limit]
        records: list[Record] = []
        for index in np.unique(np.linspace(0, len(samples) - 1, SAMPLE).astype(int)):
            try:
                id = samples[index].id
                records.append(Record(None, len(records), id, id, fetch(id, self.storage)))
            except Failure:
                continue  # an error row of the evaluation
        if not records:
            raise UsageError(f"--data {self.settings.data} has no picture that can be read")
        count = -(-len(records) // size)
        return [
            ray.put([records[number % len(records)] for number in range(first * size, (first + 1) * size)])
            for first in range(count)
        ]

    def _plan(self, configuration: Configuration, path: str) -> tuple[Stage, Load]:
        """YOLO's stage and what decodes for it, as a job has them. Raises UsageError."""
        own = configuration.settings(path, self.gpus)
        settings = job_settings(inputs=["-"], output=self.out, storage=self.settings.storage, **own)
        models = selection.inspect(settings)
        actors = {"yolo": settings.yolo_actors, "paligemma": None}
        (stage,) = plan(selection.arguments(models, settings), actors, settings.gpus_per_actor)
        return stage, selection.loader(models, settings, self.storage)

    def _flow(self, configuration: Configuration, path: str) -> Flow:
        return Flow(*self._plan(configuration, path), self.chunks, self.settings.seconds)

    def _time(self, trial: Trial, path: str) -> str:
        """Its speed, alternating with the defaults. Raises the errors of Ray and UsageError."""
        if self.reference is None:
            default = Configuration(self.settings.yolo[0])
            self.reference = self.stack.enter_context(self._flow(default, default.model))
        if trial is self.trials[0]:
            rates = [self.reference.rate() for _ in range(SCREENING)]
            trial.rounds, trial.memory = [(rate, rate) for rate in rates], self.reference.memory()
        else:
            with self._flow(trial.configuration, path) as flow:
                trial.rounds, trial.memory = alternate(flow, self.reference, SCREENING), flow.memory()
        trial.status = "done"
        return f"{ratio(trial.rounds):.2f} times as fast as the defaults"

    def _drop_reference(self) -> None:
        self.stack.close()
        self.reference = None

    def _duel(self, challenger: Trial, incumbent: Trial) -> Final:
        """Raises nothing of a challenger that fails, which then has no rounds."""
        numbers = challenger.number, incumbent.number
        for known in self.finals:
            if (known.challenger, known.incumbent) == numbers and len(known.rounds) == self.settings.rounds:
                return known
        one, other = challenger.configuration, incumbent.configuration
        self.console.print(f"final: {one.name} against {other.name}", highlight=False, soft_wrap=True)
        try:
            with self._flow(one, self._path(one)) as flow, self._flow(other, self._path(other)) as before:
                final = Final(*numbers, alternate(flow, before, self.settings.rounds))
        except _OF_TRIALS:
            final = Final(*numbers, [])
        self.finals.append(final)
        self._save("running")
        return final

    # --- What is left

    def _save(self, status: str) -> None:
        self.said["status"] = status
        self.said["seconds"] = round(self.before + time.monotonic() - self.began, 1)
        self.said["trials"] = [asdict(trial) for trial in self.trials]
        self.said["finals"] = [asdict(final) for final in self.finals]
        self.storage.write(f"{self.out}/{report.JSON}", (json.dumps(self.said, indent=1) + "\n").encode())

    def _finish(self, chosen: Trial, finals: list[Final]) -> None:
        """Write best.yaml, the table and the report, and sweep.json last."""
        self._save("running")  # the report tells its seconds
        times = float(np.prod([ratio(final.rounds) for final in finals if final.won]))
        self.said["best"] = {"trial": chosen.number, "name": chosen.configuration.name, "accuracy": chosen.accuracy}
        self.said["best"] |= {"times_as_fast": times, "within": self.settings.within}
        self.said["best"]["sentence"] = report.sentence(self.said, self.trials[0])
        settings = chosen.configuration.settings(self._path(chosen.configuration), self.gpus)
        if stored := self.settings.record()["storage"]:
            settings["storage"] = stored
        written = {
            report.BEST: as_yaml(settings, self.gpus, self.said["best"]["sentence"]).encode(),
            report.TABLE: report.table_of(self.trials, chosen),
            report.PAGE: report.page(self.trials, finals, chosen, self.said).encode(),
        }
        for name, data in written.items():
            self.storage.write(f"{self.out}/{name}", data)
        self._save("done")


def _slug(name: str, model: int) -> str:
    """As a name of a folder; two models may have one file name."""
    return f"{model + 1}-{name.replace(' ', '-')}"


def _configuration(content: dict[str, Any]) -> Configuration:
    return Configuration(**content | {"imgsz": content["imgsz"] and tuple(content["imgsz"])})


def _rounds(content: list[list[float]]) -> list[tuple[float, float]]:
    return [(one, other) for one, other in content]
