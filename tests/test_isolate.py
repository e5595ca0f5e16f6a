"""Records that end the process they are in."""

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardsight import isolate
from shardsight.actors import Annotator, Stage
from shardsight.decode.frames import Load
from shardsight.decode.split import Split
from shardsight.decode.video import VideoFrame
from shardsight.errors import Fault
from shardsight.models.yolo.info import inspect
from shardsight.row import Failure, without_frames
from shardsight.sources import Record, Unit, pack
from shardsight.storage import Storage
from tests.clips import encode, numbered
from tests.conftest import PHOTOGRAPHS, job_of, rows_of, write_tar

DEADLY = b"this ends the process"


class DeadlyLoad(Load):
    """A decoder with a fault that no `except` catches."""

    def decode(self, data: bytes) -> tuple[np.ndarray, int, int]:
        if data.endswith(DEADLY):
            os.abort()
        return super().decode(data)


class DeadlyAnnotator(Annotator):
    """A model that does not survive one of the photographs."""

    def __call__(self, table: pa.Table) -> pa.Table:
        if any(id.endswith("zidane.jpg") for id in table["id"].to_pylist()):
            os.abort()
        return super().__call__(table)


@pytest.mark.slow
def test_records_that_end_their_process(
    tmp_path: Path,
    jpegs: list[bytes],
    annotate: Callable[..., tuple[int, str]],
    detector: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each becomes one error row, in every kind of input and in every stage, and costs no neighbour its row."""
    monkeypatch.setattr("shardsight.models.selection.Load", DeadlyLoad)
    monkeypatch.setattr("shardsight.pipeline.Annotator", DeadlyAnnotator)
    monkeypatch.setattr("shardsight.isolate.Annotator", DeadlyAnnotator)
    folder = tmp_path / "in"
    folder.mkdir()
    some = [*jpegs[:3], jpegs[3] + DEADLY, *jpegs[4:8]]
    for index, data in enumerate(some):
        (folder / f"{index}.jpg").write_bytes(data)
    write_tar(folder / "a.tar", [(f"{index}.jpg", data) for index, data in enumerate(some)])
    pq.write_table(pa.table({"image": [*some[:7], some[3]]}), folder / "a.parquet")
    (folder / "zidane.jpg").symlink_to(PHOTOGRAPHS[1])

    code, said = annotate(folder, "--output", tmp_path / "out", "--yolo", detector, "--max-error-rate", 0.5)
    assert code == 0, said
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == job_of(tmp_path / "out")["rows"] == 25
    failed = {id.removeprefix(f"{folder}/"): row["error"]["stage"] for id, row in rows.items() if row["error"]}
    killers = ("3.jpg", "a.tar#3.jpg", "a.parquet#3", "a.parquet#7")
    assert failed == dict.fromkeys(killers, "decode") | {"zidane.jpg": "yolo"}
    assert {row["error"]["type"] for row in rows.values() if row["error"]} == {"ProcessDied"}
    assert rows[f"{folder}/zidane.jpg"]["width"] == 1280
    assert job_of(tmp_path / "out")["exactly_once"] is True


class Echo:
    """A model that finds nothing, at once, and does not survive the frames of `deadly` numbers."""

    def __init__(self, deadly: tuple[int, ...] = ()) -> None:
        self.deadly = deadly

    def __call__(self, table: pa.Table) -> pa.Table:
        if table["frame_number"][0].as_py() in self.deadly:
            os.abort()
        return without_frames(table)


def carefully(
    unit: Unit, load: Load, deadly: tuple[int, ...] = (), tracks: bool = False, split: Split | None = None
) -> list[dict[str, Any]]:
    import ray

    model = ray.remote(Echo).options(num_cpus=0)
    careful = isolate.Isolate(load, [("yolo", lambda: model.remote(deadly))], tracks, split=split)
    return pa.concat_tables(careful(pa.table({"unit": [pack(unit)], "long": [True]}))).to_pylist()


class DeadlyFrames(Load):
    """A decoder that a video's frame kills."""

    def frame(self, record: Record, frame: VideoFrame) -> dict[str, Any]:
        if frame.number == 3:
            os.abort()
        return super().frame(record, frame)


def outcomes(rows: list[dict[str, Any]]) -> list[tuple[int, int, bool, str | None]]:
    errors = [row["error"] and row["error"]["stage"] for row in rows]
    return [
        (row["record"], row["frame_number"], row["last_frame"], error) for row, error in zip(rows, errors, strict=True)
    ]


@pytest.mark.parametrize("done", [[], [(0, 2)]])
def test_a_frame_that_ends_its_process_ends_the_video(
    tmp_path: Path, jpegs: list[bytes], one_ray: None, done: list[tuple[int, int]]
) -> None:
    """The frames before it have their rows, and so has what comes after the video in a tar."""
    write_tar(tmp_path / "a.tar", [("v.mp4", clip(6)), ("x.jpg", jpegs[0])])
    unit = Unit("tar", str(tmp_path / "a.tar"), frames={0: done})
    rows = outcomes(carefully(unit, DeadlyFrames(Storage())))
    before = [(0, number, False, None) for number in range(3) if not done or number >= 2]
    assert rows == [*before, (0, 3, True, "decode"), (1, 0, True, None)]


def test_a_frame_that_ends_its_process_ends_its_part_of_a_long_video(tmp_path: Path, one_ray: None) -> None:
    """Parts after it may be done since an earlier pass: the video goes on there."""
    (tmp_path / "v.mp4").write_bytes(encode(numbered(12), g="1"))
    load = DeadlyFrames(Storage())
    unit = Unit("video", str(tmp_path / "v.mp4"), frames={0: [(0, 2), (6, 12)]})
    rows = carefully(unit, load, split=Split(load.storage, load.sampling, frames=6))
    assert outcomes(rows) == [(0, 2, False, None), *((0, number, False, "decode") for number in (3, 4, 5))]
    assert [row["id"].rpartition("@")[2] for row in rows] == ["2", "3", "4", "5"]


class DeadlyFile(io.FileIO):
    """Whoever reads its end dies."""

    def readinto(self, buffer: Any) -> int:
        if self.tell() > 4 << 20:
            os.abort()
        return super().readinto(buffer)


class DeadlyStorage(Storage):
    def open(self, uri: str) -> Any:
        return DeadlyFile(uri)


def test_a_record_that_has_its_row_is_not_to_blame(tmp_path: Path, jpegs: list[bytes], one_ray: None) -> None:
    """For what comes after it: reading the next one ends the process, and the unit."""
    write_tar(tmp_path / "a.tar", [("0.jpg", jpegs[0]), ("1.jpg", jpegs[1]), ("2.jpg", bytes(16 << 20))])
    rows = carefully(Unit("tar", str(tmp_path / "a.tar")), Load(DeadlyStorage()))
    assert outcomes(rows) == [(0, 0, True, None), (1, 0, True, "read")]
    assert [row["last_record"] for row in rows] == [False, True]


@pytest.mark.slow
def test_a_long_video_that_cannot_be_split_is_read_whole(
    tmp_path: Path, annotate: Callable[..., tuple[int, str]], detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splitting it ends the process each time, and is not tried without end."""
    monkeypatch.setattr("shardsight.decode.split.LONG", 0)
    monkeypatch.setattr("shardsight.pipeline.Split", DeadlySplit)
    monkeypatch.setattr("shardsight.isolate.Split", DeadlySplit)
    (tmp_path / "v.mp4").write_bytes(clip(6))
    code, said = annotate(tmp_path / "v.mp4", "--output", tmp_path / "out", "--yolo", detector)
    assert code == 0, said
    assert len(rows_of(tmp_path / "out")) == 6 and job_of(tmp_path / "out")["exactly_once"] is True


class DeadlySplit(Split):
    def parts(self, unit: Unit) -> list[Unit]:
        os.abort()


def test_a_frame_that_kills_the_model_costs_no_other(tmp_path: Path, one_ray: None) -> None:
    (tmp_path / "v.mp4").write_bytes(clip(4))
    rows = carefully(Unit("video", str(tmp_path / "v.mp4")), Load(Storage()), (1,))
    assert outcomes(rows) == [(0, 0, False, None), (0, 1, False, "yolo"), (0, 2, False, None), (0, 3, True, None)]


def test_a_tracked_video_ends_where_its_tracker_died(tmp_path: Path, jpegs: list[bytes], one_ray: None) -> None:
    """Another process would count identities from one again."""
    write_tar(tmp_path / "a.tar", [("v.mp4", clip(4)), ("w.mp4", clip(2))])
    rows = carefully(Unit("tar", str(tmp_path / "a.tar")), Load(Storage()), (2,), tracks=True)
    assert outcomes(rows) == [
        *[(0, 0, False, None), (0, 1, False, None), (0, 2, True, "yolo")],
        *[(1, 0, False, None), (1, 1, True, None)],
    ]


def clip(frames: int) -> bytes:
    return encode(np.full((64, 64, 3), 20 * number, np.uint8) for number in range(frames))


def test_a_fault_that_hits_everything(
    tmp_path: Path, one_ray: None, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one record after another ends its process, the records are not at fault, and are not condemned."""
    monkeypatch.setattr(isolate, "IN_A_ROW", 2)
    for index in range(2):
        (tmp_path / f"{index}.jpg").write_bytes(DEADLY)
    load = DeadlyLoad(Storage(), inspect(str(detector)).input)
    files = str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg")
    with pytest.raises(Fault, match="2 inputs in a row have killed"):
        carefully(Unit("files", files=files), load)


def test_a_process_that_was_killed_once_condemns_nobody(
    tmp_path: Path, jpegs: list[bytes], one_ray: None, detector: Path
) -> None:
    """The kernel's OOM killer may have meant another process."""

    class Unlucky(Load):
        def decode(self, data: bytes) -> tuple[np.ndarray, int, int]:
            marker = tmp_path / "happened"
            if data == jpegs[1] and not marker.exists():
                marker.touch()
                os.abort()
            return super().decode(data)

    write_tar(tmp_path / "a.tar", [(f"{index}.jpg", data) for index, data in enumerate(jpegs[:4])])
    unit = Unit("tar", str(tmp_path / "a.tar"), skip=[(2, 3)])
    rows = carefully(unit, Unlucky(Storage(), inspect(str(detector)).input))
    assert [(row["record"], row["error"], row["last_record"]) for row in rows] == [
        (0, None, False),
        (1, None, False),
        (3, None, True),
    ]


def test_reading_that_ends_the_process_ends_the_unit(
    tmp_path: Path, jpegs: list[bytes], one_ray: None, detector: Path
) -> None:
    """Nothing says which record it was: the unit is closed with one row that says so, as where a tar is cut off."""

    class Unreadable(Storage):
        def open(self, uri: str) -> Any:
            os.abort()

    (tmp_path / "a.tar").touch()
    unit = Unit("tar", str(tmp_path / "a.tar"), skip=[(0, 2)])
    (row,) = carefully(unit, Load(Unreadable(), inspect(str(detector)).input))
    assert (row["unit"], row["record"], row["last_record"]) == (unit.uri, 2, True)
    assert row["error"]["stage"] == "read" and row["id"] == f"{unit.uri}#2"


def caught() -> set[int]:
    """The fatal signals that this process has a handler for."""
    mask = int(re.findall(r"SigCgt:\t(\w+)", Path("/proc/self/status").read_text())[0], 16)
    return {signal for signal in (4, 6, 7, 8, 11) if mask >> (signal - 1) & 1}


def test_a_fatal_signal_ends_the_process(tmp_path: Path, jpegs: list[bytes], one_ray: None, detector: Path) -> None:
    """Ray's own handler may fault in turn, and is then called for ever: the job would wait for a process that spins."""
    import ray

    class Telling(Load):
        def decode(self, data: bytes) -> tuple[np.ndarray, int, int]:
            raise Failure("Caught", str(caught()))

    write_tar(tmp_path / "a.tar", [("0.jpg", jpegs[0])])
    unit, load = Unit("tar", str(tmp_path / "a.tar")), Telling(Storage(), inspect(str(detector)).input)
    batch = pa.table({"unit": [pack(unit)]})
    (slow,) = carefully(unit, load)
    fresh = ray.remote(Echo).options(num_cpus=0).remote()
    (quick,) = ray.get(fresh.__ray_call__.remote(lambda _: pa.concat_tables(load(batch)).to_pylist()))
    assert [row["error"]["message"] for row in (slow, quick)] == ["set()"] * 2
    stage = Stage("yolo", {"model": str(detector)}, (1, 1), 1, 0, 0, 1)
    model = ray.remote(Annotator).options(num_cpus=0).remote(stage)
    assert ray.get(model.__ray_call__.remote(lambda _: caught())) == set()
    other = ray.remote(Echo).options(num_cpus=0).remote()
    assert ray.get(other.__ray_call__.remote(lambda _: caught())), "Ray has no handler any more: leave them alone"


def test_without() -> None:
    assert Unit("files", files=("a", "b", "c")).without([1]).files == ("a", "c")
    assert Unit("tar", "t", skip=[(0, 2)]).without([2, 5]).skip == [(0, 3), (5, 6)]
