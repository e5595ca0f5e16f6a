"""Encoded bytes → RGB uint8 (h, w, 3), as a viewer shows the picture."""

import io
import zlib

import cv2
import numpy as np
from PIL import Image

from shardsight.decode import exif
from shardsight.decode.jpeg import Jpeg, NeededSize
from shardsight.decode.tiff import Layout, without_metadata
from shardsight.row import Failure

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 512 MiB of RGB

_DECODED_ENDINGS = """
    jpg jpeg jpe jfif mpo png apng webp gif avif avifs heic heif hif heics heifs bmp dib tif tiff btf tf8
    jp2 j2k j2c jpc jpf jpx pbm pgm ppm pnm tga icb vda vst ico cur icns psd qoi dds pcx dcx sgi rgb rgba bw
    ras xbm xpm fli flc msp blp ftc ftu gbr im pxr
"""
# Pictures that become an UnsupportedImage: raw photographs, floating-point numbers, drawings, and codecs that neither
# Pillow nor OpenCV has.
_UNSUPPORTED_ENDINGS = """
    dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f erf kdc mrw 3fr mef iiq rwl
    pfm hdr exr fits svg svgz eps wmf emf jxl jxr wdp hdp xcf dcm djvu bpg flif
"""
# The endings by which a file counts as a picture, in lower case and with the dot.
ENDINGS = frozenset(f".{ending}" for ending in (_DECODED_ENDINGS + _UNSUPPORTED_ENDINGS).split())

_RAW = "a camera's raw photograph"
# (offset, magic number, name) of formats that are recognised but not decoded.
_UNSUPPORTED = [
    *((0, magic, _RAW) for magic in (b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM", b"IIRO", b"IIRS", b"IIU\0", b"MMOR")),
    (0, b"II\x1a\0\0\0HEAPCCDR", _RAW),
    (4, b"ftypcrx ", _RAW),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"\xd7\xcd\xc6\x9a", "Windows Metafile"),
    (40, b" EMF", "Enhanced Metafile"),
    (0, b"gimp xcf", "XCF"),
    (0, b"AT&TFORM", "DjVu"),
    (128, b"DICM", "DICOM"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (12, b"CgBI", "Apple's variant of PNG (CgBI)"),
]
# Pillow's plugins that are not used: EPS runs Ghostscript; the others read no pictures, thumbnails alone, or numbers
# without a defined brightness.
_NOT_OPENED = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "SPIDER"}
_NOT_OPENED |= {"IPTC", "MCIDAS", "PCD", "IMT", "XVTHUMB"}
_UNSUPPORTED_WORDS = ("unsupported", "not supported", "unknown", "unimplemented", "cannot handle", "unrecognized")
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1")


def decode(data: bytes, needed_size: NeededSize | None = None) -> tuple[np.ndarray, int, int]:
    """Decode the first picture in `data`.

    needed_size: given the picture's (width, height), the (width, height) that the model needs. A JPEG is then decoded
    at the smallest of libjpeg's scales (eighths) that is no smaller than that.

    Returns the frame, and the full picture's width and height, both after EXIF orientation (as OpenCV reads it). Alpha
    is blended over white, 16 bits are cut to 8, CMYK and palettes converted to RGB. Raises Failure.
    """
    if not data:
        raise Failure("EmptyFile", "the file holds no bytes")
    if data[:3] == _JPEG:
        jpeg = Jpeg.read(data)
        _check_size(jpeg.width, jpeg.height)
        decoded = jpeg.decode(needed_size)
        if decoded:
            return decoded
        frame = _jpeg_by_pillow(jpeg)
    elif exif.byte_order(data):
        frame = _decode_tiff(data)
    else:
        frame = _decode_any(data)
    return frame, frame.shape[1], frame.shape[0]


def stored_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by the header alone, before EXIF orientation.

    None where it cannot be read or, for some formats, is above MAX_PIXELS: decode then raises Failure.
    """
    try:
        if data[:3] == _JPEG:
            jpeg = Jpeg.read(data)
            return jpeg.width, jpeg.height
        if exif.byte_order(data):
            layout = Layout.read(data)
            return layout.width, layout.height
        return _size(data) or _open(_bare_png(data)[0] if data.startswith(_PNG) else data).size
    except Failure:
        return None


def _jpeg_by_pillow(jpeg: Jpeg) -> np.ndarray:
    try:
        frame = rgb(_open(jpeg.without_metadata()))
    except Failure:
        if unsupported := jpeg.unsupported():
            raise Failure("UnsupportedImage", unsupported) from None
        raise
    return exif.upright(frame, jpeg.orientation)


def _decode_tiff(data: bytes) -> np.ndarray:
    layout = Layout.read(data)
    _check_size(layout.width, layout.height)
    layout.check()
    unsupported = Failure("UnsupportedImage", f"{layout} cannot be decoded; convert it to PNG")
    try:
        if layout.pillow_misreads or data[:4] == b"MM\0+":  # Pillow 13 reads a big-endian BigTIFF as an ordinary one
            raise unsupported
        try:
            image = _open(without_metadata(data))
        except Failure:  # the directory could be read above: Pillow does not know the layout
            raise unsupported from None
        return exif.upright(rgb(image, layout.bits), layout.orientation)
    except Failure:
        frame = _opencv(data, cv2.IMREAD_COLOR_RGB) if layout.opencv_reads else None  # OpenCV applies the orientation
        if frame is None:
            raise
        return frame


def _decode_any(data: bytes) -> np.ndarray:
    for offset, magic, name in _UNSUPPORTED:
        if data.startswith(magic, offset):
            raise Failure("UnsupportedImage", f"{name} is not decoded; convert it to PNG or JPEG")
    block = b""
    if data.startswith(_PNG):
        data, block = _bare_png(data)
    try:
        image = _open(data)
        if image.format in ("WEBP", "AVIF"):
            block = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
        frame = rgb(image)
    except Failure:
        if (shown := _by_opencv(data)) is None:
            raise
        frame = shown
    return exif.upright(frame, exif.orientation(block) or 1)


def _by_opencv(data: bytes) -> np.ndarray | None:
    """As OpenCV decodes it, less strict about metadata than Pillow, but not about truncation; None if it fails."""
    size = _size(data)
    if size is None:
        return None
    _check_size(*size)
    frame = _opencv(data, cv2.IMREAD_UNCHANGED)
    if frame is None or frame.dtype != np.uint8 or frame.ndim != 3:
        return None
    colours = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[frame.shape[2]]
    return rgb(Image.fromarray(cv2.cvtColor(frame, colours)))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Failure("TooManyPixels", f"{width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")


def _open(data: bytes) -> Image.Image:
    """As Image.open, which warns of large pictures, and which ultralytics replaces by one that may run pip."""
    Image.init()
    failure = None
    for name in Image.ID:
        factory, accept = Image.OPEN[name]
        accepted = accept(data[:16].ljust(16, b"\0")) if accept else True
        if name in _NOT_OPENED or not accepted or isinstance(accepted, str):
            continue
        try:
            image = factory(io.BytesIO(data), "")
        except Exception as error:
            if accept and not failure:
                failure = _failure(name, error)
            continue
        _check_size(*image.size)
        if 0 in image.size:
            raise Failure("CorruptImage", f"{name}: a picture without pixels")
        return image
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
        return _open_heif(data)
    if b"<svg" in data[:1000]:
        raise Failure("UnsupportedImage", "SVG is not decoded; convert it to PNG or JPEG")
    raise failure or Failure("NotAnImage", f"no picture format that is known; the data begins with {data[:16]!r}")


def _open_heif(data: bytes) -> Image.Image:
    """Upright: libheif applies the orientation."""
    import pi_heif  # not above, as few pictures need it

    try:
        heif = pi_heif.open_heif(data)
        _check_size(*heif.size)
        picture = heif.to_pillow()
    except Failure:
        raise
    except Exception as error:
        raise _failure("HEIF", error) from None
    picture.format = "HEIF"
    return picture


def _failure(name: str, error: Exception) -> Failure:
    """An exception of the decoder of a format, as a Failure whose type is guessed from its message."""
    words = str(error).lower()
    if isinstance(error, Image.DecompressionBombError):
        kind = "TooManyPixels"
    elif "truncated" in words or "not enough image data" in words:
        kind = "TruncatedImage"
    elif isinstance(error, NotImplementedError) or any(word in words for word in _UNSUPPORTED_WORDS):
        kind = "UnsupportedImage"
    else:
        kind = "CorruptImage"
    return Failure(kind, f"{name}: {str(error) or type(error).__name__}")


def rgb(image: Image.Image, bits: int = 16) -> np.ndarray:
    """A Pillow picture → RGB uint8 (h, w, 3), alpha over white. bits: used of 16, for one channel. Raises Failure."""
    name = image.format or "a picture"
    try:
        image.load()
        colours = image if image.mode[0] in "IF" else _over_white(image)
    except Exception as error:
        raise _failure(name, error) from None
    if image.mode.startswith("I;16") or (image.mode == "I" and name == "PPM"):
        numbers = np.asarray(image)
        grey = (numbers >> max(0, bits - 8)).astype(np.uint8)
        if "transparency" in image.info:
            grey[numbers == image.info["transparency"]] = 255
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise Failure("UnsupportedImage", f"{name} of {kind}, which have no defined brightness")
    return np.array(colours)


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = Image.new("RGBA", image.size, "white")
    seen.alpha_composite(image.convert("RGBA"))
    return seen.convert("RGB")


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    """(the PNG with only the chunks that its pixels need, its EXIF block or b"").

    Pillow refuses a picture for errors in its text or profile, or in their checksums.
    """
    kept, block, at, pixels = [_PNG], b"", len(_PNG), False
    while at < len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        payload = data[at + 8 : end - 4]
        intact = kind in (b"eXIf", b"tRNS") and zlib.crc32(kind + payload).to_bytes(4) == data[end - 4 : end]
        if kind == b"eXIf" and intact:
            block = block or payload
        # A critical chunk's name begins with a capital.
        if kind[:1].isupper() or (intact and not pixels and kind == b"tRNS" and _is_transparency(data[25:26], payload)):
            kept.append(data[at:end])
        pixels = pixels or kind == b"IDAT"
        at = len(data) if kind == b"IEND" else end
    return b"".join(kept), block


def _is_transparency(colour_type: bytes, payload: bytes) -> bool:
    """Whether tRNS has the length for its colour type: 0 (grey), 2 (RGB) or 3 (palette); others have no tRNS."""
    return len(payload) in {b"\0": (2,), b"\2": (6,), b"\3": range(1, 257)}.get(colour_type, ())


def _size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of GIF, WebP and JPEG 2000, which OpenCV decodes too; None for other formats."""

    def little(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    if data.startswith(b"GIF8"):
        return little(6, 2), little(8, 2)
    if data[8:16] == b"WEBPVP8X":
        return little(24, 3) + 1, little(27, 3) + 1
    if data[8:16] == b"WEBPVP8 ":
        return little(26, 2) & 0x3FFF, little(28, 2) & 0x3FFF
    if data[8:16] == b"WEBPVP8L":
        return (little(21, 4) & 0x3FFF) + 1, (little(21, 4) >> 14 & 0x3FFF) + 1
    if data[4:12] == b"jP  \r\n\x87\n":
        at = data.find(b"\xff\x4f\xff\x51") + 8  # after the markers SOC and SIZ, its length and capabilities
        return (int.from_bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8])) if at >= 8 else None
    return None


def _opencv(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
