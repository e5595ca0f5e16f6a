"""EXIF's orientation, and the directories of TIFF, of which EXIF is one."""

import struct
from collections.abc import Iterator

import numpy as np

ORIENTATION = 0x0112


def entries(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """(position, tag, type, count, value or its offset) of the first directory of a TIFF, BigTIFF or EXIF block.

    Ends where the data ends or makes no sense: what stands before is still of use.
    """
    order = byte_order(data)
    if not order:
        return
    start, number, entry = ("Q", "Q", "HHQ8s") if is_big(data) else ("I", "H", "HHI4s")
    try:
        (at,) = struct.unpack_from(order + start, data, 8 if is_big(data) else 4)
        (count,) = struct.unpack_from(order + number, data, at)
        at += struct.calcsize(order + number)
        for _ in range(count):
            yield at, *struct.unpack_from(order + entry, data, at)
            at += struct.calcsize(order + entry)
    except (struct.error, OverflowError):
        return


def byte_order(data: bytes) -> str:
    """struct's sign for it; empty for what is no TIFF."""
    return {b"II*\0": "<", b"II+\0": "<", b"MM\0*": ">", b"MM\0+": ">"}.get(data[:4], "")


def is_big(data: bytes) -> bool:
    return b"+" in data[2:4]


def orientation(exif: bytes) -> int | None:
    """1 to 8 (1 for any other number); None where the block says nothing of it.

    Two bytes of the value count, whatever type the entry claims, and the other two may be missing, as in
    OpenCV and so in ultralytics.
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
    if orientation in (2, 3, 7, 8):
        frame = frame[:, ::-1] if orientation in (2, 3) else frame[::-1]
    if orientation in (3, 4, 6, 7):
        frame = frame[::-1] if orientation in (3, 4) else frame[:, ::-1]
    return np.ascontiguousarray(frame)
