"""The layout of a TIFF's first page, and which decoder reads it correctly."""

import struct
from dataclasses import dataclass

from shardsight.decode.exif import ORIENTATION, byte_order, entries, is_big
from shardsight.row import Failure

_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8
_MAX_COUNT = 3 << 16  # values of a tag: a palette of 16 bits
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_COLOURS = {0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr"}
_COLOURS |= {8: "CIELab", 9: "ICCLab", 10: "ITULab"}
_RAW_COLOURS = (32803, 34892)  # colour filter array, LinearRaw
# Tags of size, bits, compression, colours, strips, tiles, palette, extra samples, JPEG and YCbCr.
_PIXEL_TAGS = {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332}
_PIXEL_TAGS |= {338, 339, 347, *range(512, 522), *range(529, 533)}
_BITS = 258
_ORIENTATIONS = {(n,) for n in range(1, 9)}


@dataclass(frozen=True)
class Layout:
    """Of the first page; values of tags as in TIFF 6.0."""

    width: int
    height: int
    bits: int
    bands: int
    colours: int  # PhotometricInterpretation
    separate: bool  # PlanarConfiguration: each band in a plane of its own
    compressed: bool
    formats: frozenset[int]  # SampleFormat: 1 unsigned, 2 signed, 3 floating point, 4 undefined, 5 and 6 complex
    extra: tuple[int, ...]  # ExtraSamples: 0 unspecified, 1 and 2 alpha
    orientation: int  # as EXIF's
    palette_of_bytes: bool  # as old programs wrote it, instead of 16 bits
    raw: bool  # a camera's raw photograph, whose first page is at best a preview

    @staticmethod
    def read(data: bytes) -> "Layout":
        """Raises Failure without a width or height."""
        tags = _tags(data)
        width, height = (tags.get(tag, (0,))[0] for tag in (256, 257))
        if not width or not height:
            raise Failure("CorruptImage", f"a TIFF whose directory cannot be read, of {len(data):,} bytes")
        first = {tag: values[0] for tag, values in tags.items()}
        colours = first.get(262, _BLACK_IS_ZERO)
        preview = bool(first.get(254, 0) & 1) and 330 in tags
        return Layout(
            width,
            height,
            bits=max(tags.get(_BITS, (1,))),
            bands=first.get(277, 1),
            colours=colours,
            separate=first.get(284, 1) == 2,
            compressed=first.get(259, 1) != 1,
            formats=frozenset(tags.get(339, (1,))),
            extra=tags.get(338, ()),
            # libtiff, and so OpenCV, ignores the tag unless it holds one valid number.
            orientation=tags[ORIENTATION][0] if tags.get(ORIENTATION) in _ORIENTATIONS else 1,
            palette_of_bytes=colours == _PALETTE and max(tags.get(320, (256,))) < 256,
            raw=preview or 50706 in tags or data[8:10] == b"CR" or colours in _RAW_COLOURS,
        )

    def __str__(self) -> str:
        colours = _COLOURS.get(self.colours, f"PhotometricInterpretation {self.colours}")
        return f"{colours} TIFF of {self.bands} × {self.bits} bits{', in planes' if self.planes else ''}"

    @property
    def planes(self) -> bool:
        return self.separate and self.bands > 1

    def check(self) -> None:
        """Raises Failure for raw photographs, and for numbers that have no defined brightness."""
        if self.raw:
            raise Failure("UnsupportedImage", "a camera's raw photograph; only developed pictures are decoded")
        kinds = {2: "signed numbers", 3: "floating-point numbers", 5: "complex numbers", 6: "complex numbers"}
        for kind in kinds.keys() & self.formats:
            raise Failure("UnsupportedImage", f"{self} that are {kinds[kind]}, which have no defined brightness")
        if self.bits > 16:
            raise Failure("UnsupportedImage", f"{self}; at most 16 are decoded")

    @property
    def pillow_misreads(self) -> bool:
        """Pillow 13 decodes wrong pixels, without an error."""
        return (
            (self.bits == 16 and (self.planes or self.colours == _WHITE_IS_ZERO))
            or self.palette_of_bytes
            or (self.colours == _YCBCR and not self.compressed)
        )

    @property
    def opencv_reads(self) -> bool:
        """OpenCV 5 decodes the right pixels or none.

        Not with alpha, by which it multiplies the colours, or with three or more grey bands, of which it takes one.
        """
        if self.bits not in (1, 8, 16) or {1, 2} & set(self.extra):
            return False
        if self.colours in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
            return self.bands == 1 or (self.bands == 2 and not self.separate)
        return self.bands == {_RGB: 3, _PALETTE: 1, _YCBCR: 3}.get(self.colours)


def without_metadata(data: bytes) -> bytes:
    """The same file with one page, and only the tags that its pixels need: the others are overwritten in place.

    Pillow reads every tag before it decodes, and refuses a picture for errors in some.
    """
    bare, order = bytearray(data), byte_order(data)
    entry, offset = ("HHQ8x", "Q") if is_big(data) else ("HHI4x", "I")
    end = None
    for at, tag, *_ in entries(data):
        if tag not in _PIXEL_TAGS:
            struct.pack_into(order + entry, bare, at, 65535, 1, 1)
        end = at + struct.calcsize(order + entry)
    if end and end + struct.calcsize(offset) <= len(data):  # the next directory's offset: there is none
        struct.pack_into(order + offset, bare, end, 0)
    return bytes(bare)


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Tag → its values, of unsigned integers. Raises Failure where the file ends before BitsPerSample."""
    found: dict[int, tuple[int, ...]] = {}
    order = byte_order(data)
    for _, tag, kind, count, value in entries(data):
        if kind not in _TYPES or not 0 < count <= _MAX_COUNT:
            continue
        layout = f"{order}{count}{_TYPES[kind]}"
        size = struct.calcsize(layout)
        if size > len(value):
            start = int.from_bytes(value, "big" if order == ">" else "little")
            value = data[start : start + size]
        if size <= len(value):
            found.setdefault(tag, struct.unpack_from(layout, value))
        elif tag == _BITS:
            raise Failure("TruncatedImage", f"the TIFF ends too early, after {len(data):,} bytes")
    return found
