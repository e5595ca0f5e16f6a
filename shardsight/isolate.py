"""Process records one at a time, in processes that may die: for records that an earlier pass lost.

A record that kills its process twice while it is alone in it becomes an error row; its neighbours get their rows.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from shardsight.actors import Annotator, Stage
from shardsight.decode.frames import Load, default_fatal_signals
from shardsight.decode.split import Split
from shardsight.errors import Fault
from shardsight.models.info import ModelDied
from shardsight.results.coverage import first_outside, merge
from shardsight.row import ERROR, Failure, with_column, without_frames
from shardsight.sources import Record, Unit, printable, read, unpack

# Of processes and nodes. An object is lost with the node that holds it.
DEATHS = (WorkerCrashedError, RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
# Where Ray Data logs the errors that it ignores (max_errored_blocks).
IGNORED_ERRORS = "ray.data._internal.execution.streaming_executor_state"
ATTEMPTS = 2  # the out-of-memory killer may have meant another process
IN_A_ROW = 5  # records whose processes died; then the records are not the cause


def is_death(error: BaseException) -> bool:
    """Whether a process or node died, rather than raised: an actor whose class does not start has raised."""
    return isinstance(error, DEATHS) and not getattr(error, "actor_init_failed", False)


@contextmanager
def only_deaths() -> Iterator[None]:
    """Make a dataset that ignores errors ignore only deaths of processes and nodes, and raise any other error. What is
    changed of Ray Data's settings meanwhile does not stay.

    Ray Data can only ignore errors up to a number of them. It logs each ignored error in the thread that runs the
    dataset, and what a logging filter raises there ends the dataset.
    """

    def check(entry: logging.LogRecord) -> bool:
        error = entry.exc_info[1] if entry.exc_info else None
        if error is not None and not is_death(error):
            raise error
        return True

    logger = logging.getLogger(IGNORED_ERRORS)
    before = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = logging.getLogger("ray.data").isEnabledFor(logging.ERROR)
    logger.addFilter(check)
    try:
        with DataContext.current(DataContext.get_current().copy()):
            yield
    finally:
        logger.removeFilter(check)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def isolated(blocks: Dataset, load: Load, stages: Sequence[Stage]) -> Dataset:
    """Tables of a unit each → annotated rows, by Isolate."""

    labels, tracks = stages[0].labels, stages[0].tracks
    split = None if load.clips or tracks else Split(load.storage, load.sampling)

    def start(stage: Stage) -> Any:
        return ray.remote(Annotator).options(**stage.options).remote(stage, True)

    return blocks.map_batches(
        Isolate,
        fn_constructor_args=(load, [(stage.kind, partial(start, stage)) for stage in stages], tracks, labels, split),
        compute=ActorPoolStrategy(min_size=1, max_size=max(stage.initial for stage in stages)),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        label_selector=labels,
    )


class Isolate:
    """Units → rows. It has processes of its own: one that reads and decodes, and an actor for each of `models`.

    models: (stage, what starts it), in the order in which a row meets them. tracks: the first of them keeps identities
    through a video, so that a video ends where it kills that process. labels: of the nodes where reading may run.
    split: of long videos, whose parts earlier passes may have done.
    """

    def __init__(
        self,
        load: Load,
        models: Sequence[tuple[str, Callable[[], Any]]],
        tracks: bool = False,
        labels: dict[str, str] | None = None,
        split: Split | None = None,
    ) -> None:
        self.load, self.start, self.tracks, self.labels, self.split = load, models, tracks, labels, split
        self.models: dict[int, Any] = {}
        self.dead = 0  # records in a row

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table with packed Units in the column `unit`, and which are `long` → annotated rows. Raises Fault,
        ModelDied."""
        for packed in self.parts(batch)["unit"].to_pylist():
            yield from self.unit(unpack(packed))

    def parts(self, batch: pa.Table) -> pa.Table:
        """The same with the parts of long videos, unless splitting them ends its process each time."""
        for _ in range(ATTEMPTS if self.split and any(batch["long"].to_pylist()) else 0):
            with suppress(*DEATHS):
                return ray.get(_parts.options(label_selector=self.labels).remote(self.split, batch))
        return batch

    def unit(self, unit: Unit) -> Iterator[pa.Table]:
        suspect, deaths = ("", 0), 0
        while True:
            reading = _Reading(unit)
            try:
                yield from self.rows(reading)
                if not reading.abandoned:
                    return
                unit = reading.left()
            except DEATHS as error:
                if not is_death(error):
                    raise
                unit = reading.left()
                # If no record was announced, reading itself kills the process, and the unit ends there.
                record = reading.current or replace(_next(unit), last=True)
                done, length = unit.frames.get(record.index, []), unit.lengths.get(record.index)
                record = replace(record, done=done, length=length)
                number = record.first_left
                deaths = deaths + 1 if (record.id, number) == suspect else 1
                suspect = record.id, number
                if deaths < ATTEMPTS:
                    continue
                failure, stage = self.failure(record.id, error), "decode" if reading.current else "read"
                for row in self.load.lost(record, number, failure, stage=stage):
                    yield without_frames(self.load.table([row]))
                unit = unit.without([record.index])
                if not reading.current and unit.kind != "files":
                    return

    def rows(self, reading: "_Reading") -> Iterator[pa.Table]:
        """The rows of the unit, until its reader dies or, with tracking, a process that has followed a video so far."""
        for item in _one_by_one.options(label_selector=self.labels).remote(reading.unit, self.load):
            content = ray.get(item)
            if isinstance(content, Record):
                reading.current = content
                continue
            if content is None:
                reading.end()
                continue
            assert reading.current
            row = self.annotate(content, reading.current.id)
            reading.frames.append(row["frame_number"][0].as_py())
            if self.tracks and 0 not in self.models and not row["last_frame"][0].as_py():
                reading.abandoned = True
                yield with_column(row, "last_frame", pa.array([True]))
                return
            yield row

    def annotate(self, table: pa.Table, id: str) -> pa.Table:
        """One frame's row after all stages, or an error row from the stage that it killed."""
        for number, (stage, start) in enumerate(self.start):
            # Another process would not know the identities of the frames before.
            follows = self.tracks and number == 0 and table["frame_number"][0].as_py() > 0
            for attempt in range(ATTEMPTS if follows else 1, ATTEMPTS + 1):
                try:
                    model = self.models.get(number) or start()
                    self.models[number] = model
                    table = ray.get(model.__call__.remote(table))
                    break
                except ModelDied:  # by no record's fault
                    ray.kill(self.models.pop(number))
                    if attempt == ATTEMPTS:
                        raise
                except DEATHS as error:
                    if not is_death(error):
                        raise
                    self.models.pop(number, None)
                    if attempt == ATTEMPTS:
                        errors = pa.array([self.failure(id, error).row(stage)], ERROR)
                        return with_column(without_frames(table), "error", errors)
        self.dead = 0
        return table

    def failure(self, id: str, error: Exception) -> Failure:
        """Why a record has no result, after it has killed its processes. Raises Fault."""
        self.dead += 1
        if self.dead == IN_A_ROW:
            sentence = f"{IN_A_ROW} inputs in a row have killed the processes that worked on them, the last one {id}"
            raise Fault(f"{sentence}: look for a lack of memory or a broken installation")
        kind = "OutOfMemory" if isinstance(error, OutOfMemoryError) else "ProcessDied"
        return Failure(kind, "its process died each time, even when it worked on nothing else")


@dataclass
class _Reading:
    """What has been read of a unit. current: the record that is being read. frames: its frames that are done. done:
    records before it. abandoned: it is given up, though its reader lives."""

    unit: Unit
    current: Record | None = None
    done: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    abandoned: bool = False

    def end(self) -> None:
        """All rows of the current record are there: what happens next is not its fault."""
        assert self.current
        self.done.append(self.current.index)
        self.current, self.frames = None, []

    def left(self) -> Unit:
        """The unit without what is done. In a group of loose files, the current one is then the first."""
        if self.current is None:
            return self.unit.without(self.done)
        if self.abandoned:
            return self.unit.without([*self.done, self.current.index])
        left = self.unit.without(self.done)
        ranges = [*left.frames.get(self.current.index, []), *((frame, frame + 1) for frame in self.frames)]
        return replace(left, frames=left.frames | {self.current.index: merge(ranges)})


@ray.remote(num_cpus=1, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=1)
def _one_by_one(unit: Unit, load: Load) -> Iterator[Record | pa.Table | None]:
    """Of each record its place, its rows, and None: the place has arrived before the record can kill the process."""
    default_fatal_signals()
    for record in read(unit, load.storage):
        yield replace(record, data=None)
        for row in load.rows(record):
            yield load.table([row])
        yield None


@ray.remote(num_cpus=1, max_retries=0)
def _parts(split: Split, batch: pa.Table) -> pa.Table:
    return split(batch)


def _next(unit: Unit) -> Record:
    """The record that comes next in a unit, where the reader died before it announced one."""
    if unit.kind == "files":
        name = printable(unit.files[0])
        return Record(None, 0, name, name, version=unit.versions[0] if unit.versions else None)
    assert unit.uri
    name = printable(unit.uri)
    if unit.kind == "video":
        return Record(name, 0, name, name, version=unit.version, part=unit.part)
    position = first_outside(unit.skip, 0)
    return Record(name, position, f"{name}#{position}", name, version=unit.version)
