"""Units → tables of decoded frames: reading and decoding in one process, with no copy between them."""

import ctypes
import json
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shardsight.decode.pictures import decode
from shardsight.row import FRAME, PLACE, ROW, SECONDS, Failure
from shardsight.sources import Record, read
from shardsight.storage import Storage

TABLE = pa.schema([*ROW, *PLACE, *FRAME, *((name, pa.float64()) for name in SECONDS)])
BYTES, ROWS = 64 << 20, 256  # of frames and of rows that wait to be handed on


class Input(Protocol):
    """What a model makes of a picture."""

    def enough(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) below which a picture would lose what the model could see."""

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """The frame of a picture of width × height, no larger than the model needs it."""


@dataclass(frozen=True)
class Largest:
    """What several models need of a picture; each makes its own input of it."""

    inputs: tuple[Input, ...]

    def enough(self, width: int, height: int) -> tuple[int, int]:
        widths, heights = zip(*(input.enough(width, height) for input in self.inputs), strict=True)
        return max(widths), max(heights)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        return frame


@dataclass(frozen=True)
class Load:
    """Reads and decodes units.

    input: the model's, whose size the frames need not exceed; at their own size without. scaled: decode JPEGs no larger
    than it.
    keep_images: leave the encoded bytes in the row.
    """

    storage: Storage
    input: Input | None = None
    scaled: bool = True
    keep_images: bool = False

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table with pickled Units in the column `unit` → tables of TABLE."""
        default_fatal_signals()
        rows: list[dict[str, Any]] = []
        held = 0
        for pickled in batch["unit"].to_pylist():
            for record in read(pickle.loads(pickled), self.storage):
                rows.append(self.row(record))
                held += len(rows[-1].get("frame") or b"") + len(rows[-1]["image"] or b"")
                if held > BYTES or len(rows) == ROWS:
                    yield self.table(rows)
                    rows, held = [], 0
        yield self.table(rows)

    def row(self, record: Record) -> dict[str, Any]:
        """One record as a row of TABLE; what cannot be decoded has an `error` and no frame."""
        row: dict[str, Any] = {
            **{"id": record.id, "uri": record.uri, "metadata": record.metadata, "error": None},
            **{"image": record.data if self.keep_images else None},
            **{"unit": record.unit, "record": record.index, "last_record": record.last, "version": record.version},
            **{
                "frame_number": 0,
                "last_frame": True,
                "ignored": json.dumps(record.ignored) if record.ignored else None,
            },
            **{"read_clock_seconds": record.seconds[0], "read_cpu_seconds": record.seconds[1]},
        }
        if record.failure:
            return row | {"error": record.failure.row("read")}
        clock, cpu = time.perf_counter(), time.thread_time()
        try:
            frame, width, height = self.decode(record.data or b"")
            # Not as a memoryview, which pyarrow 25 never lets go of.
            row |= {"width": width, "height": height, "frame": frame.tobytes()}
            row |= {"frame_width": frame.shape[1], "frame_height": frame.shape[0]}
        except Exception as error:  # of whatever kind: it is this picture's, and no other must suffer
            row["error"] = Failure.of(error).row("decode")
        clock, cpu = time.perf_counter() - clock, time.thread_time() - cpu
        return row | {"decode_clock_seconds": clock, "decode_cpu_seconds": cpu}

    def decode(self, data: bytes) -> tuple[np.ndarray, int, int]:
        """Encoded bytes → frame, RGB uint8 (h, w, 3), and the picture's own (width, height)."""
        frame, width, height = decode(data, self.input.enough if self.input and self.scaled else None)
        frame = self.input.shrink(frame, width, height) if self.input else frame
        return np.ascontiguousarray(frame), width, height

    @staticmethod
    def table(rows: list[dict[str, Any]]) -> pa.Table:
        """Rows as of `row`, whatever they lack null → a table of TABLE."""
        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in TABLE]
        return pa.Table.from_arrays(columns, schema=TABLE)


def default_fatal_signals() -> None:
    """Let a fatal signal end the process, at the start of each of Ray's. Ray's own handler writes a stack trace; where
    that faults in turn, it is called again without end: the process lives on, and the job waits for it."""
    libc = ctypes.CDLL(None)  # signal.signal works in the main thread only
    for fatal in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV):
        libc.signal(int(fatal), int(signal.SIG_DFL))
