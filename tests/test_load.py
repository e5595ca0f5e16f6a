"""Records → tables of frames."""

from collections.abc import Iterator
from dataclasses import replace

import psutil
import pyarrow as pa
import pytest

from shardsight.decode import frames as loading
from shardsight.decode.frames import Load
from shardsight.models import selection
from shardsight.settings import Models
from shardsight.sources import Record, Unit, pack
from shardsight.storage import Storage
from tests.conftest import WEIGHTS


@pytest.fixture
def load() -> Load:
    settings = Models(yolo=str(WEIGHTS / "detect.pt"), imgsz=640)
    return selection.loader(selection.inspect(settings), settings, Storage())


def test_frames_are_let_go_of(load: Load, jpegs: list[bytes]) -> None:
    """A process that reads a billion pictures holds no more than those that it hands on."""

    def read(count: int) -> int:
        for number in range(count):
            data = jpegs[number % len(jpegs)]
            assert load.table([load.row(Record(None, 0, "a", "a", data))])["frame"].nbytes > 300_000
        return int(psutil.Process().memory_info().rss)

    before = read(50)
    assert read(400) - before < 40 << 20  # of 200 MB


def test_tables_are_bounded_by_their_bytes(load: Load, jpegs: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def records(*_: object) -> Iterator[Record]:
        return (Record(None, 0, f"{n}", "a", jpegs[n]) for n in range(20))

    monkeypatch.setattr(loading, "read", records)
    load = replace(load, size=2 << 20)
    tables = list(load(pa.table({"unit": [pack(Unit("files"))]})))
    assert sum(len(table) for table in tables) == 20 and len(tables) > 2
    assert all(table["frame"].nbytes < 4 << 20 for table in tables)
