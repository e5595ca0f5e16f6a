"""What the first page of a TIFF holds, and which decoder shows it rightly."""

import struct
from dataclasses import dataclass

from shardsight.decode.exif import ORIENTATION, byte_order, entries, is_big
from shardsight.row import Failure

_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8
_LONGEST = 3 << 16  # a palette of 16 bits
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_COLOURS = {
    **{_WHITE_IS_ZERO: "WhiteIsZero", _BLACK_IS_ZERO: "BlackIsZero", _RGB: "RGB", _PALETTE: "palette"},
    **{4: "mask", 5: "CMYK", _YCBCR: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab"},
}
_RAW_COLOURS = (32803, 34892)  # colour filter array, LinearRaw
# Size, bits, compression, colours, strips, tiles, palette, extra samples, JPEG's and YCbCr's own.
_OF_PIXELS = {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332}
_OF_PIXELS |= {338, 339, 347, *range(512, 522), *range(529, 533)}
_BITS = 258
_ORIENTATIONS = {(n,) for n in range(1, 9)}


@dataclass(frozen=True)
class Layout:
    """Of the first page; numbers as in TIFF 6.0."""

    width: int
    height: int
    bits: int
    bands: int
    colours: int  # PhotometricInterpretation
    separate: bool  # a plane a band
    compressed: bool
    formats: frozenset[int]  # SampleFormat: 1 unsigned, 2 signed, 3 floating point, 4 undefined, 5 and 6 complex
    extra: tuple[int, ...]  # ExtraSamples: 0 unspecified, 1 and 2 alpha
    orientation: int  # as EXIF's
    palette_of_bytes: bool  # as old programs wrote it, instead of 16 bits
    raw: bool  # a camera's: the first page is then a preview, if it can be shown at all

    @staticmethod
    def read(data: bytes) -> "Layout":
        """Raises Failure where there is no size."""
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
            # libtiff, and so OpenCV, wants just one number.
            orientation=tags[ORIENTATION][0] if tags.get(ORIENTATION) in _ORIENTATIONS else 1,
            palette_of_bytes=colours == _PALETTE and max(tags.get(320, (256,))) < 256,
            raw=preview or 50706 in tags or data[8:10] == b"CR" or colours in _RAW_COLOURS,
        )

    def __str__(self) -> str:
        colours = _COLOURS.get(self.colours, f"PhotometricInterpretation {self.colours}")
        planes = ", a plane each" if self.separate and self.bands > 1 else ""
        return f"{colours} TIFF of {self.bands} × {self.bits} bits{planes}"

    def check(self) -> None:
        """Raises Failure for numbers that have no defined brightness, and for raw photographs."""
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
        planes = self.separate and self.bands > 1
        return (
            (self.bits == 16 and (planes or self.colours == _WHITE_IS_ZERO))
            or self.palette_of_bytes
            or (self.colours == _YCBCR and not self.compressed)
        )

    @property
    def opencv_reads(self) -> bool:
        """OpenCV 5 decodes the right pixels or none.

        Left out: alpha, by which it multiplies, and three and more grey bands, of which it takes the first.
        """
        if self.bits not in (1, 8, 16) or {1, 2} & set(self.extra):
            return False
        if self.colours in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
            return self.bands == 1 or (self.bands == 2 and not self.separate)
        return self.bands == {_RGB: 3, _PALETTE: 1, _YCBCR: 3}.get(self.colours)


def without_metadata(data: bytes) -> bytes:
    """The first page alone, and of its tags those alone that its pixels need; all else is overwritten in place.

    Pillow reads all the others, too, before it shows a picture, and refuses it for some of them.
    """
    bare, order = bytearray(data), byte_order(data)
    entry, nothing = ("HHQ8x", "Q") if is_big(data) else ("HHI4x", "I")
    after = None
    for at, tag, *_ in entries(data):
        if tag not in _OF_PIXELS:
            struct.pack_into(order + entry, bare, at, 65535, 1, 1)
        after = at + struct.calcsize(order + entry)
    if after and after + struct.calcsize(nothing) <= len(data):
        struct.pack_into(order + nothing, bare, after, 0)
    return bytes(bare)


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Those of whole numbers, each with one at least. Raises Failure where the file ends before the bits' number."""
    found: dict[int, tuple[int, ...]] = {}
    order = byte_order(data)
    for _, tag, kind, count, value in entries(data):
        if kind not in _TYPES or not 0 < count <= _LONGEST:
            continue
        form = f"{order}{count}{_TYPES[kind]}"
        if struct.calcsize(form) > len(value):
            start = int.from_bytes(value, "big" if order == ">" else "little")
            value = data[start : start + struct.calcsize(form)]
        if struct.calcsize(form) <= len(value):
            found.setdefault(tag, struct.unpack_from(form, value))
        elif tag == _BITS:
            raise Failure("TruncatedImage", f"the TIFF ends too early, after {len(data):,} bytes")
    return found
