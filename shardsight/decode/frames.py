"""Units → tables of decoded frames. Reading and decoding share a process, so that no encoded bytes are copied."""

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
from shardsight.row import FRAME, PLACE, ROW, SECONDS, Failure, frame_columns
from shardsight.sources import Record, read
from shardsight.storage import Storage

TABLE = pa.schema([*ROW, *PLACE, *FRAME, *((name, pa.float64()) for name in SECONDS)])
BYTES, ROWS = 64 << 20, 256  # of one table, at most by about a picture more


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
class Load:
    """Reads and decodes units.

    input: the model's, for which frames are shrunk; without, they keep their size. scaled: decode JPEGs no larger than
    the model needs. keep_images: keep the encoded bytes in the row.
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
        """One record as a row of TABLE, where missing columns are null; a failure is an `error` and no frame."""
        row: dict[str, Any] = {"id": record.id, "uri": record.uri, "metadata": record.metadata, "error": None}
        row |= {"unit": record.unit, "record": record.index, "last_record": record.last, "version": record.version}
        row |= {"frame_number": 0, "last_frame": True}
        row |= {"ignored": json.dumps(record.ignored) if record.ignored else None}
        row |= {"image": record.data if self.keep_images else None}
        row |= {"read_clock_seconds": record.seconds[0], "read_cpu_seconds": record.seconds[1]}
        if record.failure:
            return row | {"error": record.failure.row("read")}
        clock, cpu = time.perf_counter(), time.thread_time()
        try:
            row |= frame_columns(*self.decode(record.data or b""))
        except Exception as error:  # whatever a decoder raises is an error of this picture alone
            row["error"] = Failure.of(error).row("decode")
        clock, cpu = time.perf_counter() - clock, time.thread_time() - cpu
        return row | {"decode_clock_seconds": clock, "decode_cpu_seconds": cpu}

    def decode(self, data: bytes) -> tuple[np.ndarray, int, int]:
        """Encoded bytes → frame, RGB uint8 (h, w, 3), and the full picture's width and height. Raises Failure."""
        frame, width, height = decode(data, self.input.needed_size if self.input and self.scaled else None)
        return self.input.shrink(frame, width, height) if self.input else frame, width, height

    @staticmethod
    def table(rows: list[dict[str, Any]]) -> pa.Table:
        """Rows as from `row` → a table of TABLE."""
        return pa.Table.from_pylist(rows, TABLE)


def default_fatal_signals() -> None:
    """Let a fatal signal end this process; to be called at the start of a process of Ray.

    Ray's own handler writes a stack trace. If that faults too, the handler is called again without end: the process
    never dies, and the job waits for it forever.
    """
    libc = ctypes.CDLL(None)  # signal.signal works in the main thread only
    for fatal in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV):
        libc.signal(int(fatal), int(signal.SIG_DFL))
