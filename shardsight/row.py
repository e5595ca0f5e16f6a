"""The row: one Arrow schema for every job, and what travels with a row until it is written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

DETECTION = pa.struct(
    [
        ("label", pa.string()),
        ("class_id", pa.int32()),
        ("score", pa.float32()),
        # Pixels of the original picture.
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("track_id", pa.int64()),
        ("angle", pa.float32()),  # radians, of an oriented box; x1 … y2 are then its envelope
        # x, y of an oriented box's four corners, always 8 numbers; not a list of fixed size in Arrow, which
        # pyarrow cannot read back from Parquet where some are null.
        ("corners", pa.list_(pa.float32())),
        # COCO's compressed RLE.
        ("mask", pa.struct([("height", pa.int32()), ("width", pa.int32()), ("counts", pa.string())])),
        ("keypoints", pa.list_(pa.struct([("x", pa.float32()), ("y", pa.float32()), ("score", pa.float32())]))),
        ("text", pa.string()),
    ]
)
CLASS = pa.struct([("label", pa.string()), ("class_id", pa.int32()), ("score", pa.float32())])
ANSWER = pa.struct(
    [
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("detections", pa.list_(DETECTION)),
        ("finish_reason", pa.string()),
        ("score", pa.float32()),  # mean log-probability
    ]
)
ERROR = pa.struct([("stage", pa.string()), ("type", pa.string()), ("message", pa.string())])

ROW = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frame_index", pa.int32()),
        ("pts_seconds", pa.float64()),
        ("detections", pa.list_(DETECTION)),
        ("classes", pa.list_(CLASS)),
        ("answers", pa.list_(ANSWER)),
        ("metadata", pa.string()),
        ("image", pa.binary()),
        ("error", ERROR),
    ]
)

# Where a row stands in the work (see Unit and Record in sources): a record of a unit, None for a loose file, and a
# frame of the record, 0 of a picture. version: of the file that it was read from. ignored: with a unit's last row, how
# many of its entries hold no picture, by reason, as JSON.
PLACE = [
    *[("unit", pa.string()), ("record", pa.int64()), ("last_record", pa.bool_())],
    *[("frame_number", pa.int32()), ("last_frame", pa.bool_()), ("version", pa.string()), ("ignored", pa.string())],
]
# RGB uint8, row after row, and its size, which is the model's rather than the picture's.
FRAME = [("frame", pa.large_binary()), ("frame_width", pa.int32()), ("frame_height", pa.int32())]
STAGES = ("read", "decode", "yolo", "paligemma")
# What each stage spent on a row: by the clock, and of CPU time.
SECONDS = [f"{stage}_{kind}_seconds" for stage in STAGES for kind in ("clock", "cpu")]


@dataclass(eq=False)
class Failure(Exception):
    """Why a record has no result; becomes the row's `error`.

    type is a short name to count by (`TruncatedImage`), message a sentence for people.
    """

    type: str
    message: str

    @staticmethod
    def of(error: Exception) -> "Failure":
        """An exception that nobody foresaw, as a failure."""
        return error if isinstance(error, Failure) else Failure(type(error).__name__, str(error) or repr(error))

    def row(self, stage: str) -> dict[str, str]:
        return {"stage": stage, "type": self.type, "message": self.message[:1000]}


def frame_of(data: bytes | pa.Buffer, height: int, width: int) -> np.ndarray:
    """What FRAME holds → RGB uint8 (h, w, 3), without copying it."""
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def frames_of(table: pa.Table) -> Iterator[tuple[int, np.ndarray]]:
    """(row, RGB uint8 (h, w, 3)) of the rows that have a frame and no error, without copying it."""
    columns = (table[name] for name in ("frame", "frame_height", "frame_width", "error"))
    for index, (frame, height, width, error) in enumerate(zip(*columns, strict=True)):
        if frame.is_valid and not error.is_valid:
            yield index, frame_of(frame.as_buffer(), height.as_py(), width.as_py())


def without_frames(table: pa.Table) -> pa.Table:
    return table.drop_columns([name for name, _ in FRAME])


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """The table with another content of a column."""
    return table.set_column(table.schema.get_field_index(name), name, column)


def version_of(*facts: object) -> str:
    """What tells one state of a file from another, such as its size and time, or its ETag: 16 hexadecimal digits."""
    return digest("\0".join(map(str, facts)))[:8].hex()


def digest(id: str) -> bytes:
    """16 bytes that stand for an id: among a billion ids two agree with a chance of 1 in 10^21."""
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
