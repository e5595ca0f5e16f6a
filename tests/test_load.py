"""Records → tables of frames."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsight.decode import frames as loading
from shardsight.decode.frames import Clips, Largest, Load
from shardsight.decode.video import Part, Sampling
from shardsight.models import selection
from shardsight.models.yolo import int8
from shardsight.results.coverage import Coverage, UnitCoverage, within
from shardsight.row import Failure
from shardsight.settings import Models, Settings
from shardsight.sources import Listing, Record, Unit, pack
from shardsight.storage import Storage
from tests.clips import encode, numbered
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


LENGTH, EACH = 24, 3  # of a video in sampled frames, and the frames of which one is sampled


def _row(number: int) -> dict[str, Any]:
    """A frame that could be decoded."""
    place = {"unit": "v", "record": 0, "last_record": True, "frame_number": number, "last_frame": number == LENGTH - 1}
    return place | {"id": f"v@{EACH * number}", "error": None, "version": None, "ignored": None}


@given(st.data())
def test_a_video_that_fails_somewhere_is_complete(data: st.DataObject) -> None:
    """Whatever its parts, what is done of them, and where they fail: each frame has one row, with an id of its own, and
    no other than the last says that the video ends there."""
    cuts = sorted(data.draw(st.sets(st.integers(1, LENGTH - 1), max_size=3)))
    failing = data.draw(st.sets(st.integers(0, LENGTH - 1), max_size=4))
    rows = [_row(number) for number in data.draw(st.sets(st.integers(0, LENGTH - 1)))]
    load = Load(Storage(), sampling=Sampling(every=EACH))
    for _ in range(2):  # the second time after rows beyond a damage were found to be done
        unit = Coverage.of(rows).units.get("v", UnitCoverage())
        done = unit.frames.get(0, [])
        for first, end in zip([0, *cuts], [*cuts, None], strict=True):
            part = Part(first, end or 2**31 - 1, first * EACH, first or None, end) if cuts else None
            record = Record("v", 0, "v", "v", video_uri="v", last=True, part=part, done=done)
            record = replace(record, length=unit.lengths.get(0))
            fails = min((number for number in failing if first <= number < (end or LENGTH)), default=None)
            stop = (end or LENGTH) if fails is None else fails
            if not unit.complete:
                rows += [_row(number) for number in range(first, stop) if not within(done, number)]
                rows += [] if fails is None else load.lost(record, fails, Failure("Cut", "cut"), fails * EACH)
    found = Coverage.of(rows)
    assert found.complete("v") and found.places == len(rows) == len({row["id"] for row in rows})
    assert [row["frame_number"] for row in rows if row["last_frame"]] == [len(rows) - 1]


def test_clips_of_a_cut_video_that_are_done_in_part() -> None:
    """Clips need frames that are done, too; and where the video is cut, rows behind that are not contradicted."""
    data = encode(numbered(20), "matroska", g="5")
    record = Record("t", 0, "v.mkv", "t", data=data[: len(data) * 3 // 4], last=True)
    cut = [row["frame_number"] for row in Load(Storage()).rows(record)][-1]
    assert 4 < cut < 15
    load = Load(Storage(), clips=Clips(2, 0.2, Largest(())))
    again = replace(record, done=[(0, 3), (cut + 2, cut + 4)])
    rows = [(row["frame_number"], row["last_frame"]) for row in load.rows(again)]
    assert sorted(rows) == [(number, False) for number in range(3, cut + 2)]
    (end,) = load.rows(replace(record, done=[(0, cut + 4)]))
    assert (end["frame_number"], end["last_frame"], end["error"]["stage"]) == (cut + 4, True, "decode")


def test_a_part_of_a_video_that_went_away(tmp_path: Path) -> None:
    """Its frames have rows that say so, and those that are done are not touched."""
    record = Record("v", 0, "v", "v", video_uri=str(tmp_path / "v.mp4"), last=True, done=[(0, 12)])
    load = Load(Storage())
    middle = list(load.rows(replace(record, part=Part(10, 14, 10, 10, 14))))
    assert [(row["id"], row["frame_number"], row["last_frame"]) for row in middle] == [
        ("v@12", 12, False),
        ("v@13", 13, False),
    ]
    (last,) = load.rows(replace(record, part=Part(14, start=14)))
    assert (last["frame_number"], last["last_frame"], last["error"]["stage"]) == (14, True, "read")
    (whole,) = load.rows(replace(record, done=[]))
    assert (whole["id"], whole["frame_number"], whole["last_frame"]) == ("v", 0, True)


@pytest.mark.parametrize("flag", [{"crops": True}, {"track": "botsort"}])
def test_calibration_holds_no_frames_in_full(
    tmp_path: Path, jpegs: list[bytes], flag: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's other stages need them; 192 of a phone's pictures would take 7 GB."""
    (tmp_path / "in.jpg").write_bytes(jpegs[0])
    weights = str(WEIGHTS / "detect.pt")
    settings = Settings(inputs=[str(tmp_path / "in.jpg")], output="out", yolo=weights, keep_images=True, **flag)
    models, listing = selection.inspect(settings), Listing(settings.inputs, Storage())
    assert selection.loader(models, settings, Storage()).input is None
    monkeypatch.setattr(int8, "calibrate", lambda info, settings, units, load: load)
    load = selection.calibrate(models, settings, listing, Storage())
    assert load == Load(Storage(), models["yolo"].input, size=load.size)
