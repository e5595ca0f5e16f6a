"""JPEGs, decoded by libjpeg-turbo, which can scale them down meanwhile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shardsight.decode import exif
from shardsight.row import Failure

# (width, height) of a picture → the (width, height) that a model needs of it.
NeededSize = Callable[[int, int], tuple[int, int]]

_END = b"\xff\xd9"
_SCAN, _COMMENT, _JFIF, _EXIF, _ADOBE = 0xDA, 0xFE, 0xE0, 0xE1, 0xEE
_APPLICATION = range(0xE0, 0xF0)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_DECODABLE = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # baseline, sequential and progressive, Huffman or arithmetic
# libjpeg's warnings that mean missing or wrong pixels. Any other costs none.
_DAMAGE = ("remature end", "bad Huffman code", "bad arithmetic code", "instead of RST")


@dataclass(frozen=True)
class Jpeg:
    """What a JPEG's header says. width, height: as stored, before EXIF orientation."""

    data: bytes
    width: int
    height: int
    components: int
    process: int  # the marker of the frame's header, SOF0 to SOF15
    precision: int  # bits
    orientation: int

    @staticmethod
    def read(data: bytes) -> "Jpeg":
        """Raises Failure without a frame header."""
        orientation, process, frame = None, 0, b""
        for marker, start, end in _segments(data):
            if marker == _EXIF and orientation is None and data[start : start + 6] == b"Exif\0\0":
                orientation = exif.orientation(data[start + 6 : end])
            elif marker in _FRAMES and not process:
                process, frame = marker, data[start:end]
        if len(frame) < 6:
            raise Failure("CorruptImage", f"a JPEG whose header cannot be read, of {len(data):,} bytes")
        height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
        return Jpeg(data, width, height, frame[5], process, frame[0], orientation or 1)

    def decode(self, needed_size: NeededSize | None) -> tuple[np.ndarray, int, int] | None:
        """As pictures.decode; None for what libjpeg-turbo's own interface refuses, such as unusual subsampling.

        Raises Failure.
        """
        if not self.width or not self.height:
            return None
        turned = self.orientation >= 5
        shown = (self.height, self.width) if turned else (self.width, self.height)
        needed = needed_size(*shown) if needed_size else (0, 0)
        need_width, need_height = needed[::-1] if turned else needed
        least = {"min_width": min(need_width, self.width), "min_height": min(need_height, self.height)}
        colours = "CMYK" if self.components == 4 else "RGB"

        def pixels(data: bytes, strict: bool = True) -> np.ndarray:
            return simplejpeg.decode_jpeg(data, colours, strict=strict, **least)

        try:
            frame: np.ndarray | None = pixels(self.data)
        except (ValueError, KeyError):  # KeyError: a colour space that simplejpeg has no name for
            frame = self._despite_warnings(pixels)
        if frame is None:
            return None
        if colours == "CMYK":  # Adobe stores it inverted, and every decoder expects that
            frame = np.array(Image.frombytes("CMYK", frame.shape[1::-1], (~frame).tobytes()).convert("RGB"))
        return exif.upright(frame, self.orientation), *shown

    def _despite_warnings(self, pixels: Callable[..., np.ndarray]) -> np.ndarray | None:
        """The frame, if libjpeg's warnings cost no pixels; None where it cannot decode. Raises Failure."""
        message = ""
        # Second with the end marker, which many cameras leave out.
        for data in (bare := self.without_metadata(), bare + _END):
            try:
                return pixels(data)
            except (ValueError, KeyError) as error:
                message = str(error)
            if "remature end" not in message:
                break
        else:
            raise Failure("TruncatedImage", f"the JPEG ends too early, after {len(self.data):,} bytes")
        if any(words in message for words in _DAMAGE):
            raise Failure("CorruptImage", f"damaged JPEG: {message}")
        try:
            return pixels(data, strict=False)
        except (ValueError, KeyError):
            return None

    def without_metadata(self) -> bytes:
        """Only the segments that the pixels need. libjpeg reports one warning: if that is about a profile, a version
        or bytes between segments, nothing would tell that pixels are missing too."""
        kept = [self.data[:2]]
        for marker, start, end in _segments(self.data):
            payload = self.data[start:end]
            if marker == _SCAN:
                kept.append(self.data[start - 4 :])
            elif marker == _JFIF and payload[:5] == b"JFIF\0":  # means YCbCr
                kept.append(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
            elif marker == _ADOBE and payload[:5] == b"Adobe" and len(payload) >= 12:  # means RGB, YCbCr, CMYK or YCCK
                transform = payload[11] if payload[11] in (0, 1, 2) else (2 if self.components == 4 else 1)
                kept.append(b"\xff\xee\0\x0e" + payload[:11] + bytes([transform]))
            elif marker not in _APPLICATION and marker != _COMMENT:
                kept.append(self.data[start - 4 : end])
        return b"".join(kept)

    def unsupported(self) -> str | None:
        """Why neither libjpeg-turbo nor Pillow decodes it, by its header; None for ordinary JPEGs."""
        if self.precision != 8:
            return f"a JPEG of {self.precision} bits; only 8 are decoded"
        if self.process not in _DECODABLE:
            return (
                f"a lossless or hierarchical JPEG (SOF{self.process - 0xC0}); only baseline and progressive are decoded"
            )
        return "a JPEG without its height (DNL)" if not self.height else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of payload) up to the first scan. Skips bytes between segments, as libjpeg does."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF):
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no payload
            at += 2
        elif marker == _END[1]:
            return
        else:
            end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
            yield marker, at + 4, end
            if marker == _SCAN:
                return
            at = end
