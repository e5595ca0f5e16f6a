"""The tables that models take and give: pictures → rows with frames, and what a model found → columns."""

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from shardsight.decode.frames import Input
from shardsight.decode.pictures import _rgb as rgb
from shardsight.decode.pictures import decode
from shardsight.row import ERROR, FRAME, ROW, SECONDS, Failure, with_column

# One picture as Python has it: encoded bytes, a Pillow picture, or RGB uint8 (h, w, 3).
Picture = bytes | bytearray | memoryview | Image.Image | np.ndarray

_SCHEMA = pa.schema([*ROW, *FRAME, *((name, pa.float64()) for name in SECONDS)])


class Stopwatch:
    """Clock and CPU seconds of calls of one model, which may overlap: what several share is counted once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Of clock and CPU, the spans that are counted, apart from each other and the latest last. A thousand are kept:
        # no call overlaps more that ended before it.
        self._counted = deque[tuple[float, float]](maxlen=1000), deque[tuple[float, float]](maxlen=1000)

    @staticmethod
    def now() -> tuple[float, float]:
        """By the clock, and of this process's CPU time."""
        return time.perf_counter(), time.process_time()

    def since(self, start: tuple[float, float]) -> tuple[float, float]:
        """Seconds (clock, CPU) from `start` until now, without those that were counted for another call."""
        with self._lock:
            clock, cpu = map(_count, self._counted, start, self.now())
        return clock, cpu


def _count(spans: deque[tuple[float, float]], start: float, end: float) -> float:
    """What of start … end is not yet in the spans, none of which ends later; adds it to them."""
    seconds = end - start
    while spans and spans[-1][1] > start:
        first, last = spans.pop()
        seconds -= last - max(first, start)
        start = min(first, start)
    spans.append((start, end))
    return seconds


def with_results(
    table: pa.Table,
    stage: str,
    columns: dict[str, Sequence[Any]],
    errors: Sequence[dict[str, str] | None],
    computed: Collection[int],
    seconds: tuple[float, float],
) -> pa.Table:
    """The table after a model: its frames stay, as a model does not know what comes after it.

    stage: `yolo` or `paligemma`. columns: by name in ROW, a value of each row. errors: of each row, as Failure.row
    gives them. computed: the rows that the model computed; `seconds`, (clock, CPU), are shared evenly among them, and
    stand in those that have no error.
    """
    for name, values in columns.items():
        table = with_column(table, name, pa.array(values, ROW.field(name).type))
    table = with_column(table, "error", pa.array(errors, ERROR))
    for kind, total in zip(("clock", "cpu"), seconds, strict=True):
        name = f"{stage}_{kind}_seconds"
        spent = table[name].to_pylist()
        for index in computed:
            if errors[index] is None:
                spent[index] = total / len(computed)
        table = with_column(table, name, pa.array(spent, pa.float64()))
    return table


def from_pictures(pictures: Picture | Sequence[Picture], input: Input) -> pa.Table:
    """Pictures, one or a list of them → a table of ROW, FRAME and SECONDS, as decoding a job's inputs gives it.

    input: of the model, as in decoding: JPEGs are decoded no larger than it needs. Bytes that cannot be decoded are a
    row with its `error`. Raises TypeError for what is no picture at all.
    """
    many = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    rows = [_row(picture, input) for picture in many]
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in _SCHEMA]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """A table after its models → its rows as dicts with the columns of ROW."""
    return table.select(ROW.names).to_pylist()


def _row(picture: Any, input: Input) -> dict[str, Any]:
    try:
        if isinstance(picture, (bytes, bytearray, memoryview)):
            frame, width, height = decode(bytes(picture), input.enough)
        else:
            frame = _pillow(picture) if isinstance(picture, Image.Image) else _array(picture)
            height, width = frame.shape[:2]
    except Failure as failure:
        return {"error": failure.row("decode")}
    frame = np.ascontiguousarray(input.shrink(frame, width, height))
    row = {"width": width, "height": height, "frame": frame.tobytes()}
    return row | {"frame_width": frame.shape[1], "frame_height": frame.shape[0]}


def _pillow(picture: Image.Image) -> np.ndarray:
    """As decoding a file of it does: oriented by its EXIF, alpha over white. Raises Failure."""
    try:
        return rgb(ImageOps.exif_transpose(picture))
    except OSError as error:  # a picture that Pillow has opened, and whose pixels it reads only now
        raise Failure.of(error) from error


def _array(picture: Any) -> np.ndarray:
    if not isinstance(picture, np.ndarray):
        raise TypeError(
            "expected a picture as encoded bytes, PIL.Image.Image or numpy array, or a list of them, "
            f"not {type(picture).__name__}"
        )
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise TypeError(
            f"expected an RGB array of uint8 and shape (height, width, 3), not {picture.dtype} and {picture.shape}"
        )
    return picture
