"""A record at a time, each in a process that may end: what a pass over everything has lost.

A record that ends its process, alone and twice, becomes an error row; its neighbours get their rows.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from shardsight.decode.frames import Load, let_signals_kill
from shardsight.row import ERROR, Failure, with_column, without_frames
from shardsight.sources import Record, Unit, printable, read

ENDED = (WorkerCrashedError, RayActorError, OutOfMemoryError, NodeDiedError)
ATTEMPTS = 2  # what ends a process once may have been unlucky
IN_A_ROW = 5  # records; when as many end their processes, it is not the records


class Hopeless(Exception):
    """Processes end whatever they are given: one sentence for the user."""


class Careful:
    """Units → rows. It has processes of its own: one that reads and decodes, and an actor for each of `models`.

    models: (stage, what starts it), in the order in which a row meets them.
    """

    def __init__(self, load: Load, models: Sequence[tuple[str, Callable[[], Any]]]) -> None:
        self.load, self.start = load, models
        self.models: dict[int, Any] = {}
        self.condemned = 0  # records in a row

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table with pickled Units in the column `unit` → annotated rows."""
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
            except ENDED as error:
                unit = unit.without(done)
                # Where nothing was announced, it is the reading that ends the process, and the unit ends there.
                record = current or replace(_next(unit), last=True)
                deaths = deaths + 1 if record.id == suspect else 1
                suspect = record.id
                if deaths < ATTEMPTS:
                    continue
                row = self.load.row(replace(record, failure=Failure("", "")))
                yield self.condemn(self.load.table([row]), record.id, "decode" if current else "read", error)
                unit = unit.without([record.index])
                if not current and unit.kind != "files":
                    return

    def annotate(self, table: pa.Table, id: str) -> pa.Table:
        """One record's row through all stages, or to the one that it does not survive."""
        for number, (stage, start) in enumerate(self.start):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    model = self.models.get(number) or start()
                    self.models[number] = model
                    table = ray.get(model.__call__.remote(table))
                    break
                except ENDED as error:
                    self.models.pop(number, None)
                    if attempt == ATTEMPTS:
                        return self.condemn(table, id, stage, error)
        self.condemned = 0
        return table

    def condemn(self, table: pa.Table, id: str, stage: str, error: Exception) -> pa.Table:
        """The row of a record that has ended its processes."""
        self.condemned += 1
        if self.condemned == IN_A_ROW:
            raise Hopeless(
                f"processes end at whatever they are given, last at {id}: look for a lack of memory or a broken "
                "installation"
            )
        kind = "OutOfMemory" if isinstance(error, OutOfMemoryError) else "ProcessDied"
        failure = Failure(kind, f"its process ended each of the {ATTEMPTS} times that it was tried alone")
        errors = pa.array([failure.row(stage)], ERROR)
        return with_column(without_frames(table), "error", errors)


@ray.remote(num_cpus=1, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=1)
def _one_by_one(unit: Unit, load: Load) -> Iterator[Record | pa.Table]:
    """Of each record its place, and then its row: the place has arrived before the record can end the process."""
    let_signals_kill()
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
