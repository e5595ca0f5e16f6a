"""What the models share: pictures → a table of frames, results → columns of it, and the time taken."""

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from shardsight.decode.frames import Input
from shardsight.decode.pictures import decode, rgb
from shardsight.row import ERROR, FRAME, ROW, SECONDS, Failure, frame_columns, with_column

# Encoded bytes, a Pillow picture, or an RGB uint8 array (h, w, 3).
Picture = bytes | bytearray | memoryview | Image.Image | np.ndarray

_SCHEMA = pa.schema([*ROW, *FRAME, *((name, pa.float64()) for name in SECONDS)])


class Stopwatch:
    """Wall-clock and CPU seconds of one model's calls. Calls may overlap: what they share is counted once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (start, end) counted so far of each clock, disjoint and in order. A call overlaps fewer than 1000.
        self._counted = deque[tuple[float, float]](maxlen=1000), deque[tuple[float, float]](maxlen=1000)

    @staticmethod
    def now() -> tuple[float, float]:
        """(wall clock, CPU time of this process), seconds."""
        return time.perf_counter(), time.process_time()

    def since(self, start: tuple[float, float]) -> tuple[float, float]:
        """Seconds (wall clock, CPU) from `start` until now that were not yet counted for another call."""
        with self._lock:
            clock, cpu = map(_count, self._counted, start, self.now())
        return clock, cpu


def _count(spans: deque[tuple[float, float]], start: float, end: float) -> float:
    """Add start … end to spans, none of which ends later. Returns the seconds of it that no span covered."""
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
    """The table with a model's results, and still with its frames, for the model after it.

    stage: `yolo` or `paligemma`. columns: by name in ROW, a value per row. errors: one per row, as from Failure.row.
    computed: indices of the rows that the model computed. seconds: (wall clock, CPU), divided evenly among those, and
    written to the ones without an error.
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


def from_pictures(pictures: Picture | Sequence[Picture], input: Input | None) -> pa.Table:
    """One picture, or a list or tuple of them → a table of ROW, FRAME and SECONDS, as in a job.

    input: the model's; JPEGs are decoded no larger than it needs, without one in full. Bytes that cannot be decoded
    become a row with an `error`. Raises TypeError for other types and for arrays of other shapes.
    """
    many = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    return pa.Table.from_pylist([_row(picture, input) for picture in many], _SCHEMA)


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """A table's rows as dicts with the columns of ROW."""
    return table.select(ROW.names).to_pylist()


def _row(picture: Any, input: Input | None) -> dict[str, Any]:
    try:
        if isinstance(picture, (bytes, bytearray, memoryview)):
            frame, width, height = decode(bytes(picture), input.needed_size if input else None)
        else:
            frame = _pillow(picture) if isinstance(picture, Image.Image) else _array(picture)
            height, width = frame.shape[:2]
    except Failure as failure:
        return {"error": failure.row("decode")}
    return frame_columns(input.shrink(frame, width, height) if input else frame, width, height)


def _pillow(picture: Image.Image) -> np.ndarray:
    """As from a file: after EXIF orientation, alpha over white. Raises Failure."""
    try:
        upright = ImageOps.exif_transpose(picture)
    except OSError as error:  # Pillow reads a file's pixels only now
        raise Failure.of(error) from error
    upright.format = picture.format  # of a copy it is None; it decides how 16 bits are read
    return rgb(upright)


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
