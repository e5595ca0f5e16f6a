"""Units → tables of decoded frames. Reading and decoding share a process, so that no encoded bytes are copied."""

import ctypes
import io
import json
import math
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import simplejpeg

from shardsight.decode import video
from shardsight.decode.pictures import decode
from shardsight.decode.video import Sampling, VideoFrame
from shardsight.results.coverage import Ranges, within
from shardsight.row import FRAME, PLACE, ROW, SECONDS, Failure, frame_columns, frame_of
from shardsight.sources import Record, ShardFile, names_video, open_file, read, unpack
from shardsight.storage import Storage

TABLE = pa.schema([*ROW, *PLACE, *FRAME, *((name, pa.float64()) for name in SECONDS)])
BYTES, ROWS = 32 << 20, 256  # of one table, at most by about a picture more
TRACKED_BYTES = 16 << 20  # where one process holds tables of several videos
ROUNDING = 1e-6  # seconds: times are multiples of fractions such as 1/25
EVERY_FRAME = Sampling()


class Input(Protocol):
    """The input of a model: which size of a picture of width × height it needs."""

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) below which the model would see less detail."""

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """The picture's frame, uint8 (h, w, 3) of any size, no larger than the model needs it."""


@dataclass(frozen=True)
class Largest:
    """The size that suffices for several models, each of which shrinks the frame for itself."""

    inputs: tuple[Input, ...]

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        widths, heights = zip(*(input.needed_size(width, height) for input in self.inputs), strict=True)
        return max(widths), max(heights)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        return frame


@dataclass(frozen=True)
class Clips:
    """PaliGemma is asked about `count` frames of each `seconds` together: about the first at or after each
    seconds / count; if there are fewer, they are repeated in place."""

    count: int
    seconds: float
    input: Input

    def gather(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A video's rows, in order → the same; the first of each clip follows the others, with its frames in `clip`."""
        first: dict[str, Any] | None = None
        chosen: list[dict[str, Any]] = []
        clip = -1
        for row in rows:
            if row["error"]:
                yield row
                continue
            seconds = row["pts_seconds"] + ROUNDING
            now = math.floor(seconds / self.seconds)
            if first is None or now != clip:
                if first:
                    yield self.with_clip(first, chosen)
                first, chosen, clip = row, [], now
            elif first:
                yield row
            due = clip * self.seconds + len(chosen) * self.seconds / self.count
            if not chosen or (len(chosen) < self.count and seconds >= due):
                frame = frame_of(row["frame"], row["frame_height"], row["frame_width"])
                frame = self.input.shrink(frame, row["width"], row["height"])
                columns = frame_columns(frame, 0, 0)
                names = ("frame", "frame_width", "frame_height")
                chosen.append({name: columns[name] for name in names} | {"frame_index": row["frame_index"]})
        if first:
            yield self.with_clip(first, chosen)

    def with_clip(self, row: dict[str, Any], chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return row | {"clip": [chosen[number * len(chosen) // self.count] for number in range(self.count)]}


@dataclass(frozen=True)
class Load:
    """Reads and decodes units.

    input: the model's, for which frames are shrunk; without, they keep their size. scaled: decode JPEGs and videos no
    larger than the model needs. keep_images: keep the encoded bytes in the row, of a video's frame a JPEG. sampling:
    which frames of a video. size, count: of one table, in bytes and in rows, at most.
    """

    storage: Storage
    input: Input | None = None
    scaled: bool = True
    keep_images: bool = False
    sampling: Sampling = EVERY_FRAME
    clips: Clips | None = None
    size: int = BYTES
    count: int = ROWS

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table with packed Units in the column `unit` → tables of TABLE."""
        default_fatal_signals()
        units = map(unpack, batch["unit"].to_pylist())
        records = chain.from_iterable(read(unit, self.storage) for unit in units)
        return self.tables(chain.from_iterable(map(self.rows, records)))

    def tables(self, rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
        """Rows as from `rows` → tables of TABLE, of about `size`; the last one may be empty."""
        held: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            held.append(row)
            size += len(row.get("frame") or b"") + len(row["image"] or b"")
            size += sum(len(frame["frame"]) for frame in row.get("clip") or [])
            if size > self.size or len(held) == self.count:
                yield self.table(held)
                held, size = [], 0
        yield self.table(held)

    def rows(self, record: Record) -> Iterator[dict[str, Any]]:
        """A record as rows of TABLE, where missing columns are null: of a picture one, of a video one per frame. A
        failure is an `error` and no frame."""
        if record.failure or not _is_video(record):
            yield self.row(record)
        elif self.clips:
            rows = self.clips.gather(self.frames(record, done=[]))
            yield from (row for row in rows if not within(record.done, row["frame_number"]))
        else:
            yield from self.frames(record)

    def row(self, record: Record) -> dict[str, Any]:
        """A picture's row."""
        row = self.blank(record)
        if record.failure:
            return row | {"error": record.failure.row("read")}
        row |= {"image": record.data if self.keep_images else None}
        clock, cpu = time.perf_counter(), time.thread_time()
        try:
            row |= frame_columns(*self.decode(record.data or b""))
        except Exception as error:  # whatever a decoder raises is an error of this picture alone
            row["error"] = Failure.of(error).row("decode")
        clock, cpu = time.perf_counter() - clock, time.thread_time() - cpu
        return row | {"decode_clock_seconds": clock, "decode_cpu_seconds": cpu}

    def frames(self, record: Record, done: Ranges | None = None) -> Iterator[dict[str, Any]]:
        """A video's rows in order, without those of `done`, by default `record.done`. Raises the errors of Storage."""
        try:
            file = (
                io.BytesIO(record.data) if record.data is not None else open_file(record.video_uri or "", self.storage)
            )
        except Failure as failure:
            yield from self.lost(record, record.first_left, failure, stage="read")
            return
        with file:
            needed = self.input.needed_size if self.input and self.scaled else None
            frames = video.read(file, self.sampling, needed, record.part, record.done if done is None else done)
            before = time.perf_counter(), time.thread_time()
            for frame in frames:
                if frame.failure and isinstance(file, ShardFile):
                    file.check()  # of a store that fails, not of the video
                rows: Iterable[dict[str, Any]]
                if frame.failure:
                    rows = self.lost(record, frame.number, frame.failure, frame.index)
                else:
                    rows = [self.frame(record, frame)]
                now = time.perf_counter(), time.thread_time()
                spent = {"decode_clock_seconds": now[0] - before[0], "decode_cpu_seconds": now[1] - before[1]}
                yield from (row | spent for row in rows)
                before = time.perf_counter(), time.thread_time()

    def frame(self, record: Record, frame: VideoFrame) -> dict[str, Any]:
        """The row of a video's frame."""
        assert frame.frame is not None
        row = self.blank(record) | {"id": f"{record.id}@{frame.index}", "frame_index": frame.index}
        row |= {"pts_seconds": frame.pts_seconds, "frame_number": frame.number, "last_frame": frame.last}
        if self.keep_images:
            row["image"] = simplejpeg.encode_jpeg(np.ascontiguousarray(frame.frame), quality=95)
        shrunk = self.input.shrink(frame.frame, frame.width, frame.height) if self.input else frame.frame
        return row | frame_columns(shrunk, frame.width, frame.height)

    def lost(
        self, record: Record, number: int, failure: Failure, index: int | None = None, stage: str = "decode"
    ) -> Iterator[dict[str, Any]]:
        """The error rows of a video that cannot be decoded from its sampled frame `number` on: one, which is then its
        last frame; or, where another part or rows that are done follow, one for each frame before them that is not
        done. index: of that frame among all, where known."""
        part, length = record.part, record.length
        if part and part.end is not None:
            stop = length = part.stop
        else:
            stop = length or max([number + 1, *(stop for _, stop in record.done)])
        left = [each for each in range(number, stop) if not within(record.done, each)]
        for each in left if left or length else [stop]:
            row = self.failed(record, each, failure, index if each == number else None, stage)
            yield row | {"last_frame": length is None and each >= stop - 1}

    def failed(self, record: Record, number: int, failure: Failure, index: int | None, stage: str) -> dict[str, Any]:
        """The error row of a picture, or of a video's sampled frame `number`. index: among all frames, where known."""
        row = self.blank(record) | {"error": failure.row(stage), "frame_number": number}
        if not number and not index:  # there are no frames
            return row
        if index is None and not (self.sampling.fps or self.sampling.keyframes):
            index = number * (self.sampling.every or 1)
        return row | {"frame_index": index, "id": f"{record.id}@{f'#{number}' if index is None else index}"}

    def blank(self, record: Record) -> dict[str, Any]:
        """The columns of a record, as of a picture."""
        row: dict[str, Any] = {"id": record.id, "uri": record.uri, "metadata": record.metadata, "error": None}
        row |= {"unit": record.unit, "record": record.index, "last_record": record.last, "version": record.version}
        row |= {"frame_number": 0, "last_frame": True, "image": None}
        row |= {"ignored": json.dumps(record.ignored) if record.ignored else None}
        return row | {"read_clock_seconds": record.seconds[0], "read_cpu_seconds": record.seconds[1]}

    def decode(self, data: bytes) -> tuple[np.ndarray, int, int]:
        """Encoded bytes → frame, RGB uint8 (h, w, 3), and the full picture's width and height. Raises Failure."""
        frame, width, height = decode(data, self.input.needed_size if self.input and self.scaled else None)
        return self.input.shrink(frame, width, height) if self.input else frame, width, height

    @staticmethod
    def table(rows: list[dict[str, Any]]) -> pa.Table:
        """Rows as from `rows` → a table of TABLE."""
        return pa.Table.from_pylist(rows, TABLE)


def _is_video(record: Record) -> bool:
    if record.video_uri is not None or record.unit is None:  # a loose file was listed as what its name says
        return record.video_uri is not None
    return names_video(record.id) or video.is_video((record.data or b"")[:1024])


def default_fatal_signals() -> None:
    """Let a fatal signal end this process; to be called at the start of a process of Ray.

    Ray's own handler writes a stack trace. If that faults too, the handler is called again without end: the process
    never dies, and the job waits for it forever.
    """
    libc = ctypes.CDLL(None)  # signal.signal works in the main thread only
    for fatal in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV):
        libc.signal(int(fatal), int(signal.SIG_DFL))
