"""Process records one at a time, in processes that may die: for records that an earlier pass lost.

A record that kills its process twice while it is alone in it becomes an error row; its neighbours get their rows.
"""

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from shardsight.decode.frames import Load, default_fatal_signals
from shardsight.errors import Fault
from shardsight.models.info import ModelDied
from shardsight.row import ERROR, Failure, with_column, without_frames
from shardsight.sources import Record, Unit, printable, read

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
    """Make a dataset that ignores errors ignore only deaths of processes and nodes, and raise any other error.

    Ray Data can only ignore errors up to a number of them. It logs each ignored error in the thread that runs the
    dataset, and what a logging filter raises there ends the dataset.
    """

    def check(entry: logging.LogRecord) -> bool:
        error = entry.exc_info[1] if entry.exc_info else None
        if error is not None and not is_death(error):
            raise error
        return True

    logger = logging.getLogger(IGNORED_ERRORS)
    logger.setLevel(logging.ERROR)
    logger.propagate = logging.getLogger("ray.data").isEnabledFor(logging.ERROR)
    logger.addFilter(check)
    try:
        yield
    finally:
        logger.removeFilter(check)


class Isolate:
    """Units → rows. It has processes of its own: one that reads and decodes, and an actor for each of `models`.

    models: (stage, what starts it), in the order in which a row meets them.
    """

    def __init__(self, load: Load, models: Sequence[tuple[str, Callable[[], Any]]]) -> None:
        self.load, self.start = load, models
        self.models: dict[int, Any] = {}
        self.dead = 0  # records in a row

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table with pickled Units in the column `unit` → annotated rows. Raises Fault, ModelDied."""
        for pickled in batch["unit"].to_pylist():
            yield from self.unit(pickle.loads(pickled))

    def unit(self, unit: Unit) -> Iterator[pa.Table]:
        suspect, deaths = "", 0
        while True:
            current: Record | None = None
            done: list[int] = []
            try:
                for item in _one_by_one.remote(unit, self.load):
                    content = ray.get(item)
                    if isinstance(content, Record):
                        current = content
                        continue
                    assert current
                    yield self.annotate(content, current.id)
                    done.append(current.index)
                    current = None
                return
            except DEATHS as error:
                unit = unit.without(done)
                # If no record was announced, reading itself kills the process, and the unit ends there.
                record = current or replace(_next(unit), last=True)
                deaths = deaths + 1 if record.id == suspect else 1
                suspect = record.id
                if deaths < ATTEMPTS:
                    continue
                row = self.load.row(replace(record, failure=Failure("", "")))
                yield self.give_up(self.load.table([row]), record.id, "decode" if current else "read", error)
                unit = unit.without([record.index])
                if not current and unit.kind != "files":
                    return

    def annotate(self, table: pa.Table, id: str) -> pa.Table:
        """One record's row after all stages, or an error row from the stage that it killed."""
        for number, (stage, start) in enumerate(self.start):
            for attempt in range(1, ATTEMPTS + 1):
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
                        return self.give_up(table, id, stage, error)
        self.dead = 0
        return table

    def give_up(self, table: pa.Table, id: str, stage: str, error: Exception) -> pa.Table:
        """The error row of a record that has killed its processes. Raises Fault."""
        self.dead += 1
        if self.dead == IN_A_ROW:
            sentence = f"processes die whatever they are given, last at {id}"
            raise Fault(f"{sentence}: look for a lack of memory or a broken installation")
        kind = "OutOfMemory" if isinstance(error, OutOfMemoryError) else "ProcessDied"
        failure = Failure(kind, f"its process died each of the {ATTEMPTS} times that it was tried alone")
        errors = pa.array([failure.row(stage)], ERROR)
        return with_column(without_frames(table), "error", errors)


@ray.remote(num_cpus=1, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=1)
def _one_by_one(unit: Unit, load: Load) -> Iterator[Record | pa.Table]:
    """Of each record its place, and then its row: the place has arrived before the record can kill the process."""
    default_fatal_signals()
    for record in read(unit, load.storage):
        yield replace(record, data=None)
        yield load.table([load.row(record)])


def _next(unit: Unit) -> Record:
    """What comes next in a unit whose reader says nothing."""
    if unit.kind == "files":
        name = printable(unit.files[0])
        return Record(None, 0, name, name, version=unit.versions[0] if unit.versions else None)
    assert unit.uri
    name = printable(unit.uri)
    position = unit.skip[0][1] if unit.skip and unit.skip[0][0] == 0 else 0
    return Record(name, position, f"{name}#{position}", name, version=unit.version)
