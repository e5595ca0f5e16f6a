"""Encoded pictures that the tests of decoding share, and the pieces to make odd ones of."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 10, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opencv(data: bytes) -> np.ndarray | None:
    """RGB, as cv2.imread shows it by default."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """By the table of the EXIF standard: where row 0 and column 0 of what is stored are shown."""
    transposed = image.transpose(1, 0, 2)
    return [
        *(image, image[:, ::-1], image[::-1, ::-1], image[::-1]),
        *(transposed, transposed[:, ::-1], transposed[::-1, ::-1], transposed[::-1]),
    ][orientation - 1]


def exif(number: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """An EXIF block with nothing but the orientation, of TIFF's type `kind`."""
    value = struct.pack(f"{order}I" if kind in (4, 9) else f"{order}Hxx", number)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        f"{order}IHHHI4sI", 8, 1, 0x0112, kind, count, value, 0
    )


def segment(marker: int, payload: bytes) -> bytes:
    """Of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def chunk(kind: bytes, payload: bytes, wrong: bool = False) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload) ^ wrong)


def tiff(
    pixels: np.ndarray,
    colours: int,
    *,
    order: str = "<",
    big: bool = False,
    separate: bool = False,
    bits: int | None = None,
    tags: dict[int, tuple[int, Any]] | None = None,
) -> bytes:
    """An uncompressed TIFF or BigTIFF of pixels (H, W, bands), packed where bits says 1 or 4.

    tags: more of them, {tag: (type, numbers or bytes)}.
    """
    height, width, bands = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order))
    strips = [data[:, :, band].tobytes() for band in range(bands)] if separate else [data.tobytes()]
    if bits == 1:
        strips = [np.packbits(pixels[:, :, 0], axis=1).tobytes()]
    elif bits == 4:
        strips = [(pixels[:, ::2, 0] << 4 | pixels[:, 1::2, 0]).tobytes()]
    depth = bits or pixels.dtype.itemsize * 8
    long, unit = (16, 8) if big else (4, 4)
    entries: dict[int, tuple[int, Any]] = {
        **{256: (3, [width]), 257: (3, [height]), 258: (3, [depth] * bands), 259: (3, [1]), 262: (3, [colours])},
        **{273: (long, [0] * len(strips)), 277: (3, [bands]), 278: (3, [height])},
        **{279: (long, [len(strip) for strip in strips]), 284: (3, [2 if separate else 1])},
        **(tags or {}),
    }
    start = 16 if big else 8
    number = "Q" if big else "H"
    free = start + struct.calcsize(f"<{number}") + len(entries) * (20 if big else 12) + unit
    blob = b""

    def place(piece: bytes) -> int:
        nonlocal blob
        blob += piece + bytes(len(piece) % 2)
        return free + len(blob) - len(piece) - len(piece) % 2

    entries[273] = long, [place(strip) for strip in strips]
    directory = struct.pack(order + number, len(entries))
    size = "Q" if big else "I"
    form = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 7: "B", 11: "f", 12: "d", 16: "Q"}
    for tag, (kind, values) in sorted(entries.items()):
        value = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{form[kind]}", *values)
        count = len(values) // (2 if kind == 5 else 1)
        value = value.ljust(unit, b"\0") if len(value) <= unit else struct.pack(order + size, place(value))
        directory += struct.pack(f"{order}HH{size}", tag, kind, count) + value
    head = (b"II" if order == "<" else b"MM") + (
        struct.pack(f"{order}HHHQ", 43, 8, 0, 16) if big else struct.pack(f"{order}HI", 42, 8)
    )
    return head + directory + bytes(unit) + blob
