"""What the driver of a job spends on inputs and on the evidence of results: `python -m benchmarks.scale`."""

import time
from collections.abc import Callable

import numpy as np
import psutil

from shardsight.results.coverage import Coverage, UnitCoverage, hashes
from shardsight.sources.listing import PAGE, Listing
from shardsight.storage import Entry, Storage

LOOSE, UNITS, RECORDS = 2_000_000, 100_000, 10_000
VERSION = f"{1:016x}"


def main() -> None:
    listing = Listing([], Storage())
    spent("a loose picture, listed", LOOSE, lambda: _list(listing, LOOSE, "pictures/{:09}.jpg"))
    spent("a tar, listed", UNITS, lambda: _list(listing, UNITS, "shards/{:06}.tar"))
    footers: list[Coverage] = []
    spent("a footer of one tar", UNITS, lambda: footers.extend(map(_footer, range(UNITS))))
    began = time.perf_counter()
    Coverage.union(footers)
    print(f"their union: {time.perf_counter() - began:.1f} s; one is {len(footers[0].dumps())} bytes")
    names = np.sort(hashes(f"s3://bucket/pictures/{n:09}.jpg" for n in range(RECORDS)))
    loose = Coverage({}, names, np.ones(RECORDS, "<u8"), RECORDS)
    print(f"a footer of {RECORDS:,} loose pictures: {len(loose.dumps()):,} bytes")


def _list(listing: Listing, count: int, name: str) -> None:
    for start in range(0, count, PAGE):
        listing._add([Entry(f"s3://bucket/{name.format(n)}", 100, VERSION) for n in range(start, start + PAGE)], None)


def _footer(number: int) -> Coverage:
    unit = UnitCoverage([(0, RECORDS)], {}, {}, RECORDS, VERSION)
    return Coverage.loads(Coverage({f"s3://bucket/shards/{number:06}.tar": unit}, rows=RECORDS).dumps())


def spent(what: str, count: int, work: Callable[[], None]) -> None:
    """Print memory and time of each of `count` things."""
    process, began = psutil.Process(), time.perf_counter()
    before = process.memory_info().rss
    work()
    memory = process.memory_info().rss - before
    print(f"{what}: {memory / count:,.0f} bytes, {(time.perf_counter() - began) / count * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
