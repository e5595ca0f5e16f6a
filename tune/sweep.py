"""A sweep with Ray Tune that can be killed at any moment: its trials, its state, its table, its best model.

After each event (a trial begins, an epoch ends, a trial ends) the state of Tune's controller, its searcher and its
scheduler is written to `state.tar` in one atomic write. Tune's own files of state are several, written one after the
other and up to ten seconds late; a driver killed meanwhile would lose trials, or begin them twice.
"""

import io
import json
import logging
import math
import os
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from shardsight import cluster
from shardsight.errors import Fault, UsageError
from shardsight.results.lock import lock
from shardsight.storage import Storage, StorageError, explain, is_remote
from tune.space import Range

TRIALS = "trials"  # the folder of Tune's files, and of TensorBoard's
_STATE, _JSON, _TABLE = "state.tar", "sweep.json", "trials.parquet"
_CHECKPOINTS = 2  # of each trial: the one that the state names, and the one that the next state will name
_FAILURES = 3  # how often the process of a trial may die
_ASHA = ("_brackets", "_trial_info", "_num_stopped")  # what ASHA knows of the trials so far
_OF_TUNE = ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "RAY_AIR_NEW_OUTPUT")
_VERSIONS = ("ray", "optuna", "torch", "numpy")


@dataclass
class Trial:
    """A trial, and what it reported.

    status: pending, running, done, stopped (by the scheduler), or failed. epochs: one dict an epoch. started: how
    often, as after each death of its process. checkpoint: its newest, below the sweep's folder.
    """

    number: int
    id: str
    config: dict[str, Any]
    status: str = "pending"
    epochs: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    traceback: str | None = None
    started: int = 0
    checkpoint: str | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """Its best epoch."""
        return max(self.epochs, key=lambda epoch: float(epoch["fitness"]), default=None)

    @property
    def fitness(self) -> float | None:
        """The best of its epochs; None before the first has ended."""
        return float(self.best["fitness"]) if self.best else None

    @property
    def seconds(self) -> float:
        return float(sum(epoch.get("seconds", 0.0) for epoch in self.epochs))

    @property
    def ended(self) -> bool:
        return self.status in ("done", "stopped", "failed")


Report = Callable[[list[Trial], dict[str, Range], dict[str, Any]], str]  # trials, ranges, sweep.json → a page


class Watcher(Protocol):
    """Is told of a sweep's progress."""

    def update(self, trials: list[Trial], total: int) -> None:
        """The trials so far, of so many."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep is. It maximises `fitness`, which `trainable` reports for each `epoch`.

    out: a folder or a prefix. configuration: what another run must have in common to go on with this one. about: what
    sweep.json and best.json say of the data. searcher, scheduler: make one, which knows nothing yet. space: of Tune.
    ranges: the same for the report. samples: as Tune counts them; total: trials. cpus, gpus: of each trial; by default
    one GPU, where there are any; where a trial has several workers, of each. packages: whose versions sweep.json tells,
    besides those that every sweep has.
    """

    out: str
    storage: Storage
    configuration: dict[str, Any]
    about: dict[str, Any]
    trainable: Callable[[dict[str, Any]], None]
    searcher: Callable[[], Any]
    scheduler: Callable[[], Any]
    space: dict[str, Any]
    ranges: dict[str, Range]
    samples: int
    total: int
    epochs: int
    cpus: float
    gpus: float | None = None
    workers: int = 1
    packages: tuple[str, ...] = ()
    loggers: Callable[[], list[Any]] = list
    verbose: bool = False

    def path(self, name: str) -> str:
        return f"{self.out.rstrip('/')}/{name}"


@dataclass(frozen=True)
class Result:
    """What a sweep left. content: of sweep.json."""

    trials: list[Trial]
    content: dict[str, Any]

    @property
    def status(self) -> str:
        """`done`, `failed`, or `interrupted`."""
        return str(self.content["status"])


def run(sweep: Sweep, watcher: Watcher, report: Report) -> Result:
    """Run a sweep, or go on with it. report: makes report.html.

    Raises UsageError, and Fault where a fault stops it: one sentence. The same sweep goes on from there.
    """
    if not is_remote(sweep.out):
        Path(sweep.out).mkdir(parents=True, exist_ok=True)
    with lock(sweep.out, sweep.storage):
        data = {"data": sweep.about.get("data")}
        before = earlier(sweep.out, sweep.storage, sweep.configuration, data, "the data set has")
        if before.get("status") == "done":
            return Result(_restored(sweep), before)
        cluster.join(sweep.verbose)
        if sweep.gpus is None:
            sweep = replace(sweep, gpus=1.0 if ray.cluster_resources().get("GPU") else 0.0)
        _check_resources(sweep)
        content = {
            **{
                "status": "running",
                "started": before.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            },
            **{"configuration": sweep.configuration, **sweep.about},
            **{"versions": {name: version(name) for name in (*_VERSIONS, *sweep.packages)}, "total": sweep.total},
        }
        state, reason, error = _State(sweep, watcher), None, None
        _save(sweep, content)
        began = time.monotonic()
        try:
            _tune(sweep, state)
        except Exception as raised:
            reason, error = _reason(sweep, raised), raised
        content["status"] = "failed" if reason else "done" if state.ended else "interrupted"
        content["seconds"] = round(before.get("seconds", 0.0) + time.monotonic() - began, 1)
        _finish(sweep, state.ordered, content | ({"reason": reason} if reason else {}), report)
        if error:
            raise Fault(reason) from error
        return Result(state.ordered, json.loads(sweep.storage.read(sweep.path(_JSON))))


def report_failure(error: Exception, said: str | None = None, epoch: int = 1) -> None:
    """Of a trainable that catches an exception: end its trial with a row that tells of it, as after an exception Tune
    would try again what fails again. said: instead of the exception's type and message."""
    said = said or f"{type(error).__name__}: {' '.join(str(error).split())}"
    told = "".join(traceback.format_exception(error))
    tune.report({"error": said[:1000], "traceback": told, "fitness": 0.0, "epoch": epoch})


def earlier(
    out: str, storage: Storage, configuration: dict[str, Any], about: dict[str, Any], things: str
) -> dict[str, Any]:
    """What sweep.json says; {} where there is no sweep yet. Raises UsageError if it is another sweep's.

    about: what else has to be the same. things: what that is, as `the data set has`.
    """
    path = f"{out.rstrip('/')}/{_JSON}"
    if not storage.exists(path):
        return {}
    before: dict[str, Any] = json.loads(storage.read(path))
    old, new = before["configuration"], json.loads(json.dumps(configuration))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UsageError(
                f"{out} has a sweep with {name} {old.get(name)}, not {new.get(name)}: "
                "give the same settings, choose another --output, or start again with --overwrite"
            )
    if any(before.get(name) != value for name, value in json.loads(json.dumps(about)).items()):
        raise UsageError(f"{things} changed since the sweep in {out} began: choose another --output, or --overwrite")
    return before


def clear(out: str, storage: Storage) -> None:
    """Delete what is there of an earlier sweep, its sweep.json last. Nothing else is touched."""
    remove(out, storage, (TRIALS, "best"), (_STATE, _TABLE, "report.html", _JSON))


def remove(out: str, storage: Storage, folders: Sequence[str], files: Sequence[str] = ()) -> None:
    """What is there of these in a folder, in their order."""
    for folder in (f"{out.rstrip('/')}/{name}" for name in folders):
        for entry in list(storage.walk(folder, hidden=True)) if storage.is_folder(folder) else []:
            storage.remove(entry.uri)
    for file in (f"{out.rstrip('/')}/{name}" for name in files):
        if storage.exists(file):
            storage.remove(file)


def _check_resources(sweep: Sweep) -> None:
    """Raises UsageError if no machine can ever run a trial, or a trial's processes."""
    gpus = sweep.gpus or 0.0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [min(one.get("CPU", 0) // sweep.cpus, one.get("GPU", 0) // gpus if gpus else math.inf) for one in nodes]
    if not sum(rooms):
        most = max(nodes, key=lambda one: (one.get("GPU", 0), one.get("CPU", 0)))
        raise UsageError(
            f"no trial could ever run: one needs {sweep.cpus:g} CPUs and {gpus:g} GPUs, and the largest machine has "
            f"{most.get('CPU', 0):g} and {most.get('GPU', 0):g}: lower --cpus-per-trial or --gpus-per-trial"
        )
    if sum(rooms) < sweep.workers:
        raise UsageError(f"no trial could ever run: the cluster has room for {sum(rooms):g} workers: lower --workers")


def _tune(sweep: Sweep, state: "_State") -> None:
    filesystem, root = filesystem_of(sweep)
    resumed = sweep.storage.exists(sweep.path(_STATE))
    if resumed:
        _unpack(sweep, filesystem, root)
    scheduler, searcher = sweep.scheduler(), sweep.searcher()
    state.first = int(isinstance(searcher, BasicVariantGenerator))
    state.watch(scheduler)
    with _settings(sweep.verbose):
        tune.run(
            sweep.trainable,
            **{"name": TRIALS, "storage_path": root, "storage_filesystem": filesystem, "resume": resumed or None},
            **{"config": sweep.space, "num_samples": sweep.samples, "metric": "fitness", "mode": "max"},
            **{"search_alg": searcher, "scheduler": scheduler},
            resources_per_trial=tune.PlacementGroupFactory([{"CPU": sweep.cpus, "GPU": sweep.gpus}] * sweep.workers),
            max_failures=_FAILURES,
            # PBT copies a checkpoint of another trial, which has meanwhile made some more.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_CHECKPOINTS if _is_asha(scheduler) else 5),
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=partial(_folder, first=state.first),
            callbacks=[state, tune.logger.TBXLoggerCallback(), *sweep.loggers()],
            # PBT begins trials anew all the time, and each process takes seconds to come up.
            reuse_actors=isinstance(scheduler, PopulationBasedTraining),
            **{"raise_on_failed_trial": False, "verbose": 3 if sweep.verbose else 0},
        )


def _number(trial: TuneTrial, first: int) -> int:
    """Counted from 1; Tune's tag begins with it, less `first`."""
    return int(trial.experiment_tag.partition("_")[0].partition("@")[0]) + first


def _folder(trial: TuneTrial, first: int) -> str:
    return f"{_number(trial, first):05d}"


def _is_asha(scheduler: Any) -> bool:
    return isinstance(scheduler, AsyncHyperBandScheduler)


def filesystem_of(sweep: Sweep) -> tuple[pafs.FileSystem, str]:
    """pyarrow's filesystem, and the path of the sweep in it."""
    if not is_remote(sweep.out):
        return pafs.LocalFileSystem(), sweep.out
    handler = pafs.FSSpecHandler(sweep.storage.filesystem(sweep.out))
    return pafs.PyFileSystem(handler), sweep.out.partition("://")[2].rstrip("/")


@contextmanager
def _settings(verbose: bool) -> Iterator[None]:
    """Tune's own settings, for the time of a sweep: TensorBoard's files alone, and no output but ours."""
    before = {name: os.environ.get(name) for name in _OF_TUNE}
    levels = {name: logging.getLogger(name).level for name in ("ray.tune", "ray.train")}
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    if not verbose:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _State(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Keeps the trials, and writes the state of the sweep after each event."""

    def __init__(self, sweep: Sweep, watcher: Watcher) -> None:
        self.sweep, self.watcher = sweep, watcher
        self.root = filesystem_of(sweep)[1]
        self.trials: dict[str, Trial] = {}  # by Tune's id
        self.scheduler: Any = None
        self.controller: Any = None
        self.first = 0  # Tune counts the trials of some searchers from 0
        self.changed = False

    @property
    def ordered(self) -> list[Trial]:
        return sorted(self.trials.values(), key=lambda trial: trial.number)

    @property
    def ended(self) -> bool:
        return len(self.trials) >= self.sweep.total and all(trial.ended for trial in self.trials.values())

    def watch(self, scheduler: Any) -> None:
        """The scheduler alone is handed Tune's controller."""
        self.scheduler, add = scheduler, scheduler.on_trial_add

        def on_trial_add(controller: Any, trial: TuneTrial) -> None:
            self.controller = controller
            self._of(trial)
            add(controller, trial)

        scheduler.on_trial_add = on_trial_add

    def _of(self, trial: TuneTrial) -> Trial:
        self.changed = True
        found = self.trials.setdefault(trial.trial_id, Trial(_number(trial, self.first), trial.trial_id, {}))
        found.config = dict(trial.config)
        return found

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        found = self._of(trial)
        found.status, found.started = "running", found.started + 1

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        found = self._of(trial)
        if result.get("partial"):  # a checkpoint within an epoch
            return
        if "error" in result:
            found.error, found.traceback = result["error"], result["traceback"]
            return
        kept = {name: value for name, value in result.items() if "/" in name and not name.startswith("config/")}
        kept |= {name: result[name] for name in ("epoch", "fitness", "last", "batch", "seconds") if name in result}
        if found.epochs and found.epochs[-1]["epoch"] == kept["epoch"]:
            found.epochs.pop()  # a driver that was killed knew of it before it knew of its checkpoint
        found.epochs.append(kept)

    def on_checkpoint(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, checkpoint: Any, **info: Any
    ) -> None:
        self._of(trial).checkpoint = checkpoint.path.removeprefix(self.root).lstrip("/")

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._of(trial).status = "pending"

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        found = self._of(trial)
        last = found.epochs[-1]["last"] if found.epochs else False
        found.status = "failed" if found.error else "done" if last else "stopped"

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        found, error = self._of(trial), trial.get_pickled_error() or trial.get_error()
        said = (str(error).strip().splitlines() or ["its process died"])[0]
        found.status, found.error = "failed", f"its process died {found.started} times: {said}"[:1000]

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self.changed and trials:
            self.changed = False
            self.controller.save_to_dir()
            session = self.controller.experiment_state_file_name.removeprefix("experiment_state-").removesuffix(".json")
            files = [one for one in sorted(Path(trials[0].local_experiment_path).iterdir()) if session in one.name]
            self.sweep.storage.write(self.sweep.path(_STATE), _packed(files))
        self.watcher.update(self.ordered, self.sweep.total)

    def get_state(self) -> dict[str, Any]:
        asha = {name: getattr(self.scheduler, name) for name in _ASHA} if _is_asha(self.scheduler) else {}
        return {"trials": [asdict(trial) for trial in self.trials.values()], "asha": asha}

    def set_state(self, state: dict[str, Any]) -> None:
        self.trials = {one["id"]: Trial(**one) for one in state["trials"]}
        for trial in self.trials.values():
            if not trial.ended:
                trial.status = "pending"
        self.scheduler.__dict__.update(state["asha"])


def _packed(files: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in files:
            if not file.name.startswith("tmp-"):
                tar.add(file, file.name)
    return buffer.getvalue()


def _unpack(sweep: Sweep, filesystem: pafs.FileSystem, root: str) -> None:
    """Put the state where Tune looks for it, instead of what Tune left there."""
    folder = f"{root}/{TRIALS}"
    for found in filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        if found.type == pafs.FileType.File and found.extension in ("json", "pkl"):
            filesystem.delete_file(found.path)
    filesystem.create_dir(folder)
    with tarfile.open(fileobj=io.BytesIO(sweep.storage.read(sweep.path(_STATE)))) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member)
            assert content
            with filesystem.open_output_stream(f"{folder}/{member.name}") as file:
                file.write(content.read())


def _restored(sweep: Sweep) -> list[Trial]:
    """The trials of a sweep that is done."""
    table = pq.read_table(pa.BufferReader(sweep.storage.read(sweep.path(_TABLE))))
    return [
        Trial(
            **{name: row[name] for name in ("status", "error", "traceback", "started", "checkpoint")},
            **{"number": row["trial"], "id": row["id"], "config": row["config"] or {}, "epochs": row["history"]},
        )
        for row in table.to_pylist()
    ]


def _reason(sweep: Sweep, error: Exception) -> str:
    """Why the sweep stopped, as one sentence."""
    if isinstance(error, (UsageError, Fault)):
        return str(error)
    path = sweep.path("error.log")
    try:
        sweep.storage.write(path, "".join(traceback.format_exception(error)).encode())
    except (OSError, StorageError) as another:
        return explain(sweep.out, another)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; {path} has the traceback"


def _finish(
    sweep: Sweep,
    trials: list[Trial],
    content: dict[str, Any],
    report: Report,
) -> None:
    """Write the table, the best model and the report, and sweep.json last."""
    best = best_of(trials)
    content["trials"] = {
        status: sum(trial.status == status for trial in trials)
        for status in ("done", "stopped", "failed", "running", "pending")
    }
    content["best"] = {"trial": best.number, "fitness": best.fitness, "config": best.config} if best else None
    if best:
        _publish(sweep, best, content)
    buffer = pa.BufferOutputStream()
    pq.write_table(table_of(trials), buffer)
    sweep.storage.write(sweep.path(_TABLE), buffer.getvalue().to_pybytes())
    sweep.storage.write(sweep.path("report.html"), report(trials, sweep.ranges, content).encode())
    _save(sweep, content)


def best_of(trials: list[Trial]) -> Trial | None:
    """The trial with the best epoch, of those that kept its model."""
    return max((trial for trial in trials if trial.checkpoint and trial.epochs), key=_fitness, default=None)


def _fitness(trial: Trial) -> float:
    return trial.fitness or 0.0


def _publish(sweep: Sweep, best: Trial, content: Mapping[str, Any]) -> None:
    """Copy the best model to best/, with best.json: what it was trained on, how, and its figures."""
    assert best.best and best.checkpoint
    if not is_remote(sweep.out):
        Path(sweep.path("best")).mkdir(exist_ok=True)
    folder = f"{sweep.path(best.checkpoint)}/best"
    for entry in sweep.storage.walk(folder):
        name = entry.uri[len(folder) + 1 :]
        sweep.storage.write(sweep.path(f"best/{name}"), sweep.storage.read(entry.uri))
    said = {
        **{"trial": best.number, "epoch": best.best["epoch"], "config": best.config},
        "metrics": {
            name: value for name, value in best.best.items() if name not in ("epoch", "last", "seconds", "batch")
        },
        **{name: value for name, value in content.items() if name in ("configuration", "versions", *sweep.about)},
    }
    sweep.storage.write(sweep.path("best/best.json"), (json.dumps(said, indent=1) + "\n").encode())


def table_of(trials: list[Trial]) -> pa.Table:
    """One row a trial. config: its hyperparameters; metrics: of its best epoch; history: of each epoch."""
    rows = [
        {
            **{"trial": trial.number, "id": trial.id, "status": trial.status, "fitness": trial.fitness},
            **{"best_epoch": trial.best["epoch"] if trial.best else None, "epochs": len(trial.epochs)},
            **{"config": _alike(trial.config, trials), "error": trial.error, "traceback": trial.traceback},
            **{"seconds": trial.seconds, "started": trial.started, "checkpoint": trial.checkpoint},
            **{"metrics": trial.best, "history": trial.epochs},
        }
        for trial in trials
    ]
    return pa.Table.from_pylist(rows)


def _alike(config: dict[str, Any], trials: list[Trial]) -> dict[str, Any] | None:
    """Values as text where those of a hyperparameter are of several types."""
    kinds = {name: {type(trial.config.get(name)) for trial in trials} for name in config}
    numbers = ({int}, {float}, {int, float})
    found = {
        name: float(value) if kinds[name] in numbers[1:] else value if len(kinds[name]) == 1 else str(value)
        for name, value in config.items()
    }
    return found or None


def _save(sweep: Sweep, content: Mapping[str, Any]) -> None:
    sweep.storage.write(sweep.path(_JSON), (json.dumps(content, indent=1) + "\n").encode())
