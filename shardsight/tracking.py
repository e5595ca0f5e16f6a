"""Units → tracked rows. A video's frames pass through one process in order; those of several videos are detected in one
batch."""

from collections.abc import Iterator

import pyarrow as pa
import ray

from shardsight.actors import Annotator, Stage
from shardsight.decode.frames import Load, default_fatal_signals
from shardsight.isolate import DEATHS
from shardsight.sources import Unit, pack, unpack

OPEN = 4  # videos that a process tracks at the same time


class TrackingAnnotator:
    """A tracking YOLO in an actor, which has each of its units read and decoded in a process of its own."""

    def __init__(self, load: Load, stage: Stage) -> None:
        self.load, self.annotate = load, Annotator(stage)
        self.read = _read.options(label_selector=stage.labels)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table with packed Units in the column `unit` → rows. If the process that reads a unit dies, the rest of
        its rows are missing."""
        readers = [self.read.remote(unpack(packed), self.load) for packed in batch["unit"].to_pylist()]
        while readers:
            tables = []
            for reader in list(readers):
                try:
                    tables.append(ray.get(next(reader)))
                except (StopIteration, *DEATHS):
                    readers.remove(reader)
            if tables:
                yield self.annotate(pa.concat_tables(tables))


# No CPU is reserved: with too few of them, one reader would wait for another, which waits to be read from.
@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=2)
def _read(unit: Unit, load: Load) -> Iterator[pa.Table]:
    default_fatal_signals()
    yield from load(pa.table({"unit": pa.array([pack(unit)], pa.binary())}))
