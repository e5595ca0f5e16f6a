"""From the flow to files: full ones, and no more under way than the store takes."""

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
    """Takes its time to write, and notes in its folder how many writes are under way together."""

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
    """Rows of loose files in blocks of so many."""
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    tables = [
        rows([place(None, n) for n in range(begin, begin + size)]) for begin, size in zip(begins, sizes, strict=True)
    ]
    return ray.data.from_arrow(tables)


def test_files_are_full(one_ray: None, results: Results) -> None:
    """Blocks that are slightly more than a file leave no crumb each, which every later reader would pay for."""
    progress = list(writing.run(blocks(7, 7, 0, 7, 7, 25, 2), results, 6))
    assert sum(count for count, _ in progress) == 55
    assert sum(written.coverage.rows for _, finished in progress for written in finished) == 55
    assert sorted(coverage.rows for _, coverage in results.files()) == [1, *[6] * 9]
    assert ids(results) == sorted(f"None#{n}@0" for n in range(55))


def test_writes_under_way_have_a_bound(one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow store slows the flow down, instead of filling the memory with blocks that wait for it."""
    monkeypatch.setattr(writing, "WRITES", 2)
    results = Results(str(tmp_path / "out"), SlowStorage({"folder": str(tmp_path)}))
    results.prepare()
    list(writing.run(blocks(*[4] * 8), results, 4))
    assert {path.name for path in tmp_path.glob("seen-*")} <= {"seen-1", "seen-2"}
    assert len(ids(results)) == 32


def test_interrupted_it_writes_what_it_has(one_ray: None, results: Results) -> None:
    """A Ctrl-C costs no row that the models have finished."""

    class Interrupted:
        """Some blocks, and then the interrupt."""

        def iter_internal_ref_bundles(self) -> Iterator[Any]:
            yield from blocks(3, 4).iter_internal_ref_bundles()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(writing.run(Interrupted(), results, 5))  # type: ignore[arg-type]
    assert sorted(coverage.rows for _, coverage in results.files()) == [2, 5]
