"""Rows as they come out of the flow → results files, full ones, and only so many at a time."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from shardsight.results.writer import Results, Written

# A file is written when it is full, or at the latest after so long: what a kill can cost.
BYTES, SECONDS = 128 << 20, 20.0
# Writes under way at once. With a slow store the blocks of more of them would fill the object store; so the flow, and
# with it the models, wait instead.
WRITES = 4


@dataclass
class _Waiting:
    """Blocks that are not yet written: reference, rows and bytes of each. skip: rows of the first that are."""

    blocks: deque[tuple[Any, int, int]] = field(default_factory=deque)
    skip: int = 0

    @property
    def rows(self) -> int:
        return sum(rows for _, rows, _ in self.blocks) - self.skip

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.blocks)

    def take(self, count: int) -> tuple[int, list[Any]]:
        """The blocks that hold the next `count` rows, and where these begin in them."""
        begin, end, taken = self.skip, self.skip + count, []
        while end > 0:
            reference, rows, _ = self.blocks[0]
            taken.append(reference)
            if end < rows:
                break
            end -= rows
            self.blocks.popleft()
        self.skip = end
        return begin, taken


@ray.remote(num_cpus=0)
def _write(results: Results, rows_per_file: int, begin: int, count: int, *blocks: pa.Table) -> Written:
    return results.write(pa.concat_tables(blocks).slice(begin, count), rows_per_file)


def run(rows: Dataset, results: Results, rows_per_file: int) -> Iterator[tuple[int, list[Written]]]:
    """Write rows as they come; yields how many came and what was written. Interrupted, it writes what it has.

    Files hold `rows_per_file` rows; what is over waits for the next ones, but no longer than SECONDS and BYTES allow.
    """
    waiting, since = _Waiting(), time.monotonic()
    writing: list[Any] = []

    def write(count: int) -> Any:
        begin, blocks = waiting.take(count)
        return _write.remote(results, rows_per_file, begin, count, *blocks)

    try:
        for bundle in rows.iter_internal_ref_bundles():
            blocks = ((entry.ref, entry.metadata) for entry in bundle.blocks)
            waiting.blocks.extend((block, about.num_rows, about.size_bytes) for block, about in blocks)
            due = waiting.size >= BYTES or time.monotonic() - since >= SECONDS
            count = waiting.rows if due else waiting.rows // rows_per_file * rows_per_file
            if count:
                if len(writing) >= WRITES:
                    ray.wait(writing, num_returns=len(writing) - WRITES + 1)
                writing.append(write(count))
                since = time.monotonic()
            finished, writing = ray.wait(writing, num_returns=len(writing), timeout=0) if writing else ([], [])
            yield bundle.num_rows() or 0, ray.get(finished)
    finally:
        if waiting.rows:
            writing.append(write(waiting.rows))
        last = ray.get(writing)
    yield 0, last
