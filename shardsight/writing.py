"""Rows from the flow → full results files, with a bounded number of writes in flight."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from shardsight.isolate import DEATHS, is_death
from shardsight.results.writer import Results, Written

# Rows are written when a file is full, and at the latest after so much: a killed job loses no more.
BYTES, SECONDS = 128 << 20, 20.0
# Writes in flight. With a slow store, the blocks of more would fill Ray's object store; instead the flow waits.
WRITES = 4


@dataclass
class _Pending:
    """Blocks to write, as bundles of Ray Data hold them. skip: rows of the first block that are already written."""

    blocks: deque[Any] = field(default_factory=deque)
    skip: int = 0

    @property
    def rows(self) -> int:
        return sum(block.metadata.num_rows for block in self.blocks) - self.skip

    @property
    def size(self) -> int:
        return sum(block.metadata.size_bytes for block in self.blocks)

    def take(self, count: int) -> tuple[int, list[Any]]:
        """The next `count` rows: the index of the first in its block, and references to the blocks."""
        begin, end, taken = self.skip, self.skip + count, []
        while end > 0:
            taken.append(self.blocks[0].ref)
            rows = self.blocks[0].metadata.num_rows
            if end < rows:
                break
            end -= rows
            self.blocks.popleft()
        self.skip = end
        return begin, taken


@ray.remote(num_cpus=0)
def _write(results: Results, rows_per_file: int, begin: int, count: int, *blocks: pa.Table) -> Written:
    return results.write(pa.concat_tables(blocks).slice(begin, count), rows_per_file)


def _written(writes: list[Any]) -> list[Written]:
    """What these writes wrote, but for those whose rows were lost with a node: the footers show what is missing."""
    found = []
    for write in writes:
        try:
            found.append(ray.get(write))
        except DEATHS as error:
            if not is_death(error):
                raise
    return found


def run(
    rows: Dataset,
    results: Results,
    rows_per_file: int,
    waited: Callable[[float], None] = lambda _: None,
    labels: dict[str, str] | None = None,
) -> Iterator[tuple[int, list[Written]]]:
    """Write rows as they come; yields how many came and what was written. If interrupted, writes those that came.

    Files hold `rows_per_file` rows; what is left over is written with later rows, or when SECONDS or BYTES are reached.
    waited: is told of seconds in which the flow waited for writes. labels: of the nodes that may write.
    """
    pending, last_write = _Pending(), time.monotonic()
    writing: list[Any] = []

    def write(count: int) -> Any:
        begin, blocks = pending.take(count)
        return _write.options(label_selector=labels).remote(results, rows_per_file, begin, count, *blocks)

    try:
        for bundle in rows.iter_internal_ref_bundles():
            pending.blocks.extend(bundle.blocks)
            due = pending.size >= BYTES or time.monotonic() - last_write >= SECONDS
            count = pending.rows if due else pending.rows // rows_per_file * rows_per_file
            if count:
                if len(writing) >= WRITES:
                    begun = time.monotonic()
                    ray.wait(writing, num_returns=len(writing) - WRITES + 1)
                    waited(time.monotonic() - begun)
                writing.append(write(count))
                last_write = time.monotonic()
            finished, writing = ray.wait(writing, num_returns=len(writing), timeout=0) if writing else ([], [])
            yield bundle.num_rows() or 0, _written(finished)
    finally:
        if pending.rows:
            writing.append(write(pending.rows))
        begun = time.monotonic()
        last = _written(writing)
        waited(time.monotonic() - begun)
    yield 0, last
