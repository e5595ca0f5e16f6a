"""EXIF orientation, and the tag directories of TIFF, whose format EXIF uses too."""

import struct
from collections.abc import Iterator

import numpy as np

ORIENTATION = 0x0112


def entries(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """(position, tag, type, count, value or its offset) of the first directory of a TIFF, BigTIFF or EXIF block.

    Stops without an error where the data ends or cannot be read: the entries before are still of use.
    """
    order = byte_order(data)
    if not order:
        return
    offset, number, entry = ("Q", "Q", "HHQ8s") if is_big(data) else ("I", "H", "HHI4s")
    try:
        (at,) = struct.unpack_from(order + offset, data, 8 if is_big(data) else 4)
        (count,) = struct.unpack_from(order + number, data, at)
        at += struct.calcsize(order + number)
        for _ in range(count):
            yield at, *struct.unpack_from(order + entry, data, at)
            at += struct.calcsize(order + entry)
    except (struct.error, OverflowError):
        return


def byte_order(data: bytes) -> str:
    """`<` or `>`, as in the module struct; empty where the data is not TIFF."""
    return {b"II*\0": "<", b"II+\0": "<", b"MM\0*": ">", b"MM\0+": ">"}.get(data[:4], "")


def is_big(data: bytes) -> bool:
    """Whether it is BigTIFF, whose offsets and counts have 64 bits."""
    return b"+" in data[2:4]


def orientation(exif: bytes) -> int | None:
    """EXIF orientation, 1 to 8, and 1 for any other number; None without the tag.

    As OpenCV and so ultralytics read it: from two bytes, whatever the entry's type; the two after may be missing.
    """
    for _, tag, _, _, value in entries(exif + b"\0\0"):
        if tag == ORIENTATION:
            (found,) = struct.unpack_from(byte_order(exif) + "H", value)
            return found if 1 <= found <= 8 else 1
    return None


def upright(frame: np.ndarray, orientation: int) -> np.ndarray:
    """A frame (H, W, C) as stored → as shown, contiguous."""
    if orientation >= 5:
        frame = frame.transpose(1, 0, 2)
    vertical = -1 if orientation in (3, 4, 7, 8) else 1
    horizontal = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(frame[::vertical, ::horizontal])
