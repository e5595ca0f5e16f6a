"""From the flow to files: full ones, with a bounded number of writes in flight."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from shardsight import writing
from shardsight.results.writer import Results
from shardsight.storage import Storage
from tests.conftest import place
from tests.test_results import ids, rows


class SlowStorage(Storage):
    """Writes slowly, and records in its folder how many writes are in flight at the same time."""

    def write(self, uri: str, data: bytes) -> None:
        folder = Path(self.options["folder"])
        mark = folder / f"under-way-{os.urandom(8).hex()}"
        mark.touch()
        (folder / f"seen-{len(list(folder.glob('under-way-*')))}").touch()
        time.sleep(0.3)
        super().write(uri, data)
        mark.unlink()

    def __reduce__(self) -> Any:
        return SlowStorage, (self.options, self.retry_seconds)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(str(tmp_path / "out"), Storage())
    results.prepare()
    return results


def blocks(*sizes: int) -> ray.data.Dataset:
    """Rows of loose files in blocks of these sizes."""
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    tables = [
        rows([place(None, n) for n in range(begin, begin + size)]) for begin, size in zip(begins, sizes, strict=True)
    ]
    return ray.data.from_arrow(tables)


def test_files_are_full(one_ray: None, results: Results) -> None:
    """Blocks with slightly more rows than a file must not leave a tiny file each, which slow down readers."""
    progress = list(writing.run(blocks(7, 7, 0, 7, 7, 25, 2), results, 6))
    assert sum(count for count, _ in progress) == 55
    assert sum(written.coverage.rows for _, finished in progress for written in finished) == 55
    assert sorted(coverage.rows for _, coverage in results.files()) == [1, *[6] * 9]
    assert ids(results) == sorted(f"None#{n}@0" for n in range(55))


def test_writes_in_flight_are_bounded(one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow store slows the flow down, instead of filling the memory with blocks to write."""
    monkeypatch.setattr(writing, "WRITES", 2)
    results = Results(str(tmp_path / "out"), SlowStorage({"folder": str(tmp_path)}))
    results.prepare()
    list(writing.run(blocks(*[4] * 8), results, 4))
    assert {path.name for path in tmp_path.glob("seen-*")} <= {"seen-1", "seen-2"}
    assert len(ids(results)) == 32


def test_an_interrupt_writes_what_has_come(one_ray: None, results: Results) -> None:
    """A Ctrl-C costs no row that the models have finished."""

    class Interrupted:
        """A dataset of some blocks, then an interrupt."""

        def iter_internal_ref_bundles(self) -> Iterator[Any]:
            yield from blocks(3, 4).iter_internal_ref_bundles()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(writing.run(Interrupted(), results, 5))  # type: ignore[arg-type]
    assert sorted(coverage.rows for _, coverage in results.files()) == [2, 5]


def test_a_write_that_is_lost(one_ray: str) -> None:
    """With the node that had its rows: another pass finds them missing, where the job would have ended."""

    @ray.remote(max_retries=0)
    def write(what: str) -> str:
        if what == "dies":
            os._exit(1)
        if what == "raises":
            raise ValueError
        return what

    assert writing._written([write.remote("a"), write.remote("dies"), write.remote("b")]) == ["a", "b"]
    with pytest.raises(ValueError):
        writing._written([write.remote("raises")])
