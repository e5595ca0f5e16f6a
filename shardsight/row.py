"""The row: one Arrow schema for every job, and the columns that go with a row until it is written."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

DETECTION = pa.struct(
    [
        ("label", pa.string()),
        ("class_id", pa.int32()),
        ("score", pa.float32()),
        # Pixels of the original picture, as for all coordinates below.
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("track_id", pa.int64()),
        ("angle", pa.float32()),  # radians, of an oriented box; x1 … y2 are then its envelope
        # x, y of an oriented box's four corners: 8 numbers, but not a fixed-size list, as pyarrow cannot read one with
        # nulls back from Parquet.
        ("corners", pa.list_(pa.float32())),
        # COCO's compressed RLE, of the size of the picture.
        ("mask", pa.struct([("height", pa.int32()), ("width", pa.int32()), ("counts", pa.string())])),
        ("keypoints", pa.list_(pa.struct([("x", pa.float32()), ("y", pa.float32()), ("score", pa.float32())]))),
        ("text", pa.string()),
        ("crop", pa.binary()),  # JPEG of what the box touches
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
        ("frames", pa.list_(pa.int32())),  # of a clip: the frame_index of each of its frames
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

# Which input a row is of (see Unit and Record in sources): the unit, null for a loose file; the record in the unit; the
# frame of the record, 0 for a picture. version: of the file that it was read from. ignored: in a unit's last row, how
# many of its entries hold no picture, by reason, as JSON.
PLACE = [
    ("unit", pa.string()),
    ("record", pa.int64()),
    ("last_record", pa.bool_()),
    ("frame_number", pa.int32()),
    ("last_frame", pa.bool_()),
    ("version", pa.string()),
    ("ignored", pa.string()),
]
# RGB uint8 (h, w, 3) as bytes, and its size, which may be smaller than the picture's.
FRAME = [("frame", pa.large_binary()), ("frame_width", pa.int32()), ("frame_height", pa.int32())]
# In the first row of a clip of a video: its frames, for PaliGemma.
FRAME += [("clip", pa.list_(pa.struct([*FRAME, ("frame_index", pa.int32())])))]
STAGES = ("read", "decode", "yolo", "paligemma")
FRAME_OF_VIDEO = "@[^@]*$"  # in a row's id, what follows its video's id
# Wall-clock and CPU seconds that each stage spent on a row.
SECONDS = [f"{stage}_{kind}_seconds" for stage in STAGES for kind in ("clock", "cpu")]


@dataclass(eq=False)
class Failure(Exception):
    """Why a record has no result: type, a name to count by such as `TruncatedImage`, and message, a sentence."""

    type: str
    message: str

    @staticmethod
    def of(error: Exception) -> "Failure":
        """Any exception as a Failure."""
        return error if isinstance(error, Failure) else Failure(type(error).__name__, str(error) or repr(error))

    def row(self, stage: str) -> dict[str, str]:
        """The value of ERROR."""
        return {"stage": stage, "type": self.type, "message": self.message[:1000]}


def frame_columns(frame: np.ndarray, width: int, height: int) -> dict[str, Any]:
    """A frame, RGB uint8 (h, w, 3), of a picture of width × height → the columns of a row that hold it."""
    # tobytes makes a C-contiguous copy; pyarrow 25 never frees a memoryview.
    row = {"width": width, "height": height, "frame": frame.tobytes()}
    return row | {"frame_width": frame.shape[1], "frame_height": frame.shape[0]}


def frame_of(data: bytes | pa.Buffer, height: int, width: int) -> np.ndarray:
    """The column `frame` of a row → RGB uint8 (h, w, 3), not copied."""
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def frames_of(table: pa.Table) -> Iterator[tuple[int, np.ndarray]]:
    """(row's index, RGB uint8 (h, w, 3), not copied) of the rows with a frame and without an error."""
    columns = (table[name] for name in ("frame", "frame_height", "frame_width", "error"))
    for index, (frame, height, width, error) in enumerate(zip(*columns, strict=True)):
        if frame.is_valid and not error.is_valid:
            yield index, frame_of(frame.as_buffer(), height.as_py(), width.as_py())


def clips_of(table: pa.Table) -> Iterator[tuple[int, list[np.ndarray], list[int]]]:
    """(row's index, RGB uint8 (h, w, 3) of each frame, not copied, and its frame_index) of the rows with a clip and
    without an error."""
    for index, (clip, error) in enumerate(zip(table["clip"], table["error"], strict=True)):
        if clip.is_valid and not error.is_valid:
            frames, heights, widths, indices = (
                clip.values.field(name) for name in ("frame", "frame_height", "frame_width", "frame_index")
            )
            sizes = zip(frames, heights.to_pylist(), widths.to_pylist(), strict=True)
            yield index, [frame_of(frame.as_buffer(), *size) for frame, *size in sizes], indices.to_pylist()


def crop_of(frame: np.ndarray, box: dict[str, Any]) -> np.ndarray:
    """The pixels of an unscaled picture, (h, w, 3), that a detection's box touches; at least one."""
    x1, y1 = max(0, math.floor(box["x1"])), max(0, math.floor(box["y1"]))
    x1, y1 = min(x1, frame.shape[1] - 1), min(y1, frame.shape[0] - 1)
    return frame[y1 : max(y1 + 1, math.ceil(box["y2"])), x1 : max(x1 + 1, math.ceil(box["x2"]))]


def without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the encoded picture and crops that it may hold."""
    detections = row["detections"] and [one | {"crop": None} for one in row["detections"]]
    return row | {"image": None, "detections": detections}


def without_frames(table: pa.Table) -> pa.Table:
    return table.drop_columns([name for name, _ in FRAME])


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """The table with one column replaced."""
    return table.set_column(table.schema.get_field_index(name), name, column)


def video_of(id: str) -> str:
    """The id of the video that a frame's row is of."""
    return re.sub(FRAME_OF_VIDEO, "", id)


def version_of(*facts: object) -> str:
    """16 hexadecimal digits that change with the facts about a file, such as its size and time, or its ETag."""
    return digest("\0".join(map(str, facts)))[:8].hex()


def digest(id: str) -> bytes:
    """A hash of 16 bytes: the chance that any two of a billion ids collide is 1 in 10^21."""
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
