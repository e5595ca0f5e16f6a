"""Encoded bytes → RGB uint8 (H, W, 3), as people see the picture."""

import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from shardsight.row import Failure

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 512 MiB of RGB

# Pillow must not refuse by itself what MAX_PIXELS lets through, with another error.
Image.MAX_IMAGE_PIXELS = None

Size = Callable[[int, int], tuple[int, int]]

_DECODED = """
    jpg jpeg jpe jfif mpo png apng webp gif avif avifs heic heif hif heics heifs bmp dib tif tiff btf tf8
    jp2 j2k j2c jpc jpf jpx pbm pgm ppm pnm tga icb vda vst ico cur icns psd qoi dds pcx dcx sgi rgb rgba bw
    ras xbm xpm fli flc msp blp ftc ftu gbr im pxr
"""
# Pictures too, and each an UnsupportedImage: raw photographs, floating-point numbers, drawings, and codecs
# that neither Pillow nor OpenCV has.
_NAMED = """
    dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f erf kdc mrw 3fr mef iiq rwl
    pfm hdr exr fits svg svgz eps wmf emf jxl jxr wdp hdp xcf dcm djvu bpg flif
"""
# The file endings, lower case and with their dot, of what is a picture by its name.
ENDINGS = frozenset(f".{ending}" for ending in (_DECODED + _NAMED).split())

# What libjpeg-turbo says of files that every viewer shows whole; Pillow, which does not stop at that, has
# the last word on them.
_HARMLESS = ("extraneous bytes", "Invalid SOS", "Adobe color transform", "unknown JFIF", "bad ICC")
_END = b"\xff\xd9"


def decode(data: bytes, enough: Size | None = None) -> tuple[np.ndarray, int, int]:
    """Decode the first picture in `data`.

    enough: given the picture's (width, height), the (width, height) that the model needs. A JPEG is
    then decoded at the smallest of libjpeg's scales (eighths) that is no smaller than that.

    Returns the frame and the (width, height) of the picture as shown: after EXIF orientation, alpha
    over white, 16 bits cut to 8, CMYK and palettes converted. Raises Failure.
    """
    if not data:
        raise Failure("EmptyFile", "the file holds no bytes")
    if data[:3] == b"\xff\xd8\xff":
        frame = _decode_jpeg(data, enough)
        if frame is not None:
            return frame
    return _decode_any(data)


def _decode_jpeg(data: bytes, enough: Size | None) -> tuple[np.ndarray, int, int] | None:
    """None for what Pillow has to decide: CMYK and slightly damaged files."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space that simplejpeg has no name for
        raise Failure("CorruptImage", f"a JPEG whose header cannot be read, of {len(data):,} bytes") from None
    _check_size(width, height)
    if colours in ("CMYK", "YCCK"):
        return None
    orientation = _orientation(data)
    turned = orientation >= 5
    shown = (height, width) if turned else (width, height)
    need = enough(*shown) if enough else (0, 0)
    need_width, need_height = need[::-1] if turned else need
    least = {"min_width": min(need_width, width), "min_height": min(need_height, height)}
    try:
        frame = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError as error:
        if any(words in str(error) for words in _HARMLESS):
            return None
        if "remature end" not in str(error):
            raise Failure("CorruptImage", f"damaged JPEG: {error}") from None
        try:  # many cameras leave out the end marker, and nothing else
            frame = simplejpeg.decode_jpeg(data + _END, "RGB", **least)
        except ValueError:
            raise Failure("TruncatedImage", f"the JPEG ends too early, after {len(data):,} bytes") from None
    return _orient(frame, orientation), *shown


def _orientation(data: bytes) -> int:
    """EXIF's 1 to 8; 1 where it is missing or makes no sense."""
    if b"Exif\0\0" not in data[:65536]:
        return 1
    try:
        value = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block says nothing about the picture
        return 1
    return value if value in range(1, 9) else 1


def _orient(frame: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        frame = frame.transpose(1, 0, 2)
    if orientation in (2, 3, 7, 8):
        frame = frame[:, ::-1] if orientation in (2, 3) else frame[::-1]
    if orientation in (3, 4, 6, 7):
        frame = frame[::-1] if orientation in (3, 4) else frame[:, ::-1]
    return np.ascontiguousarray(frame)


def _decode_any(data: bytes) -> tuple[np.ndarray, int, int]:
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:  # not Pillow's own error alone: ultralytics replaces Image.open where it is imported
        raise Failure("NotAnImage", f"no picture format that is known; it begins with {data[:16]!r}") from None
    _check_size(*image.size)
    try:
        image.load()
        frame = _rgb(ImageOps.exif_transpose(image))
    except Failure:
        raise
    except Exception as error:
        truncated = "truncated" in str(error).lower()
        raise Failure("TruncatedImage" if truncated else "CorruptImage", f"{image.format}: {error}") from None
    return frame, frame.shape[1], frame.shape[0]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Failure("TooManyPixels", f"{width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # one channel of 16 bits
        high = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return cv2.cvtColor(high.astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if image.mode == "F":
        raise Failure("UnsupportedImage", f"{image.format} of floating-point numbers has no defined brightness")
    if image.has_transparency_data:
        seen = Image.new("RGBA", image.size, "white")
        seen.alpha_composite(image.convert("RGBA"))
        image = seen
    return np.array(image.convert("RGB"))
