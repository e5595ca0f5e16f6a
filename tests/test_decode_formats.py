"""Every format and layout: its own pixels, or an error that names what is not supported."""

import base64
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shardsight.decode import pictures
from shardsight.decode.pictures import ENDINGS, decode, stored_size
from shardsight.row import Failure
from tests.encoded import chunk, opencv, picture, save, tiff, turned

RGB = np.asarray(picture())
GREY = np.asarray(picture().convert("L"))[:, :, None]
SHADES = np.repeat(GREY, 3, 2)
CMYK = np.asarray(picture().convert("CMYK"))
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "MPO", "TGA"]
FORMATS += ["ICO", "QOI", "DDS", "PCX", "SGI", "IM", "BLP", "ICNS"]
# 32 × 16, the left half red and the right half blue, turned by a quarter by its orientation.
HEIC = base64.b85decode(
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0005UZDn*}000000000XXk=`10000000000aA{+700000000000000000000G-"
    "+&aV*mgE07O6l0ssL300001>i_`&00000005r=0ssI200N2t0RR9100000Bme*aIB98aW&i*H00062000$fZf0cy000000RRAKc4ILB0"
    "000LX>Mj^0ssI300IC2MR;ju000004sdC7Z2$lO00031009PRaB^?}008A_aAR)(004Dpc4I>U18@KU0FVFx0000U@BsY%`1k+-"
    "4+CHT0RR|40Sp2E{{wIU00RJ!0009300RIXx&lC90096gLID8-"
    "Z~y=U0FVFx0{{R603M(qfd!W8uA1iHA)vs3000bt00093gkk^z00u+>!E?ch0000JV{dG7ZewhC0096E00w{n000zeb8uw<00000002M"
    "$002M$001asY+-"
    "N!001BW00031000mG00061|Nr0s00092|Nqbc00062000nhX?SS>000032nYxO000STa&L440000PX>e^}0000000001009Pp0s{qvh5"
    "!Hn8fkK6W&i*H000004r63<V*mmG0RRC2007HvWMOmw005gP0k0Dwoy{2d5cg;Q>%0~Jm1{rqH@R&8@xrIyw=G}#%=e@edipDQ!W^Bq&"
    "jJWpxKdb=LcJJ2ruOF;dS%`=g!3C0lsKFjI#^KdsJb8`^{*r6JLswEfTy{G-"
    "B{x0F`R7@4UeYRch1|BksvILE`p1I%NeQ8vRa(ikVyy}0}W34-z`J1*0fqEg81trG4a_3i#4dJk7fV>00u>PX=VTbO-"
    "%qQ000080099K00RI30096700000000"
)


def failure(data: bytes) -> Failure:
    with pytest.raises(Failure) as caught:
        decode(data)
    return caught.value


def difference(data: bytes, expected: np.ndarray) -> float:
    frame, width, height = decode(data)
    assert frame.shape == expected.shape == (height, width, 3)
    assert frame.dtype == np.uint8 and frame.flags.c_contiguous
    return float(np.abs(frame.astype(int) - expected).mean())


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format: str) -> None:
    """A folder of AVIF, JPEG 2000 or Netpbm files is a folder of pictures."""
    image = picture(size=(64, 64))
    image = image.quantize(64) if format == "BLP" else image
    sizes = {"sizes": [(64, 64)]} if format == "ICO" else {}
    data = save(image, format, **sizes)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert difference(data, expected) < 1
    assert stored_size(data) == expected.shape[1::-1]


def test_heic() -> None:
    """What an iPhone takes, upright; libheif has turned it, and its EXIF must not turn it again."""
    frame, width, height = decode(HEIC)
    assert (width, height) == (16, 32)
    assert stored_size(HEIC) == (16, 32)
    assert np.abs(frame[:14].astype(int) - [255, 0, 0]).max() < 4
    assert np.abs(frame[18:].astype(int) - [0, 0, 255]).max() < 4
    assert failure(HEIC[:300]).type == "CorruptImage"


@pytest.mark.parametrize(
    "data, name",
    [
        (b"FUJIFILMCCD-RAW 0201", "raw"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw"),
        (tiff(RGB, 2, tags={254: (4, [1]), 330: (4, [8])}), "raw"),
        (tiff(RGB, 2, tags={50706: (1, [1, 4, 0, 0])}), "raw"),
        (tiff(GREY, 32803), "raw"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (save(picture().convert("F"), "PPM"), "floating-point"),
        (save(picture().convert("I"), "IM"), "32-bit integers"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"CgBI", bytes(4)), "CgBI"),
    ],
)
def test_unsupported_formats_have_a_name(data: bytes, name: str) -> None:
    """ "Not an image" would send people looking for damage in files that are whole."""
    error = failure(data)
    assert error.type == "UnsupportedImage"
    assert name in error.message


def test_endings() -> None:
    """Sources take files by these: a format that is decoded and missing here would be left out of a folder."""
    assert {".jpg", ".jpeg", ".avif", ".jp2", ".ppm", ".pgm", ".mpo", ".tga", ".heic", ".cr2", ".svg"} <= ENDINGS
    assert all(ending == ending.lower() and ending.startswith(".") for ending in ENDINGS)
    Image.init()
    opened = {ending for ending, format in Image.EXTENSION.items() if format in Image.OPEN}
    unlike = {".ps", ".pcd", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".iim", ".fit"}
    assert opened - unlike <= ENDINGS


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_tiff_layouts(order: str, big: bool) -> None:
    """Scanners and microscopes write these; a wrong guess shows a negative, or one band in place of another."""
    deep, deep_grey = RGB.astype(np.uint16) * 257, GREY.astype(np.uint16) * 257
    high = (GREY > 127).astype(np.uint8)
    palette = np.random.default_rng(0).integers(0, 256, (3, 256))
    coloured = palette.T[GREY[:, :, 0]]
    layouts = {
        "RGB": (tiff(RGB, 2, order=order, big=big), RGB),
        "planes": (tiff(RGB, 2, order=order, big=big, separate=True), RGB),
        "16 bits": (tiff(deep, 2, order=order, big=big), RGB),
        "16 bits in planes": (tiff(deep, 2, order=order, big=big, separate=True), RGB),
        "grey": (tiff(GREY, 1, order=order, big=big), SHADES),
        "white is zero": (tiff(255 - GREY, 0, order=order, big=big), SHADES),
        "16 bits of grey": (tiff(deep_grey, 1, order=order, big=big), SHADES),
        "16 bits, white is zero": (tiff(65535 - deep_grey, 0, order=order, big=big), SHADES),
        "one bit": (tiff(high, 1, order=order, big=big, bits=1), SHADES // 128 * 255),
        "one bit, white is zero": (tiff(1 - high, 0, order=order, big=big, bits=1), SHADES // 128 * 255),
        "palette": (tiff(GREY, 3, order=order, big=big, tags={320: (3, (palette * 257).ravel())}), coloured),
        "palette of bytes": (tiff(GREY, 3, order=order, big=big, tags={320: (3, palette.ravel())}), coloured),
        "YCbCr": (tiff(np.asarray(picture().convert("YCbCr")), 6, order=order, big=big, tags={530: (3, [1, 1])}), RGB),
    }
    for name, (data, expected) in layouts.items():
        assert difference(data, expected) < 1, name
        assert stored_size(data) == (40, 24)


@pytest.mark.parametrize("order", "<>")
def test_more_tiff_layouts(order: str) -> None:
    """Those that OpenCV does not decode, by Pillow."""
    six = np.concatenate([RGB, 255 - RGB], 2)
    alpha = np.concatenate([RGB, np.full_like(GREY, 128)], 2)
    half = 255 - (255 - RGB.astype(int)) * 128 / 255
    layouts = {
        "four bits": (tiff(GREY >> 4, 1, order=order, bits=4), (SHADES >> 4) * 17),
        "CMYK": (tiff(CMYK, 5, order=order), RGB),
        "CMYK of 16 bits": (tiff(CMYK.astype(np.uint16) * 257, 5, order=order), RGB),
        "six bands, of which three are colours": (tiff(six, 2, order=order, tags={338: (3, [0, 0, 0])}), RGB),
        "alpha": (tiff(alpha, 2, order=order, tags={338: (3, [2])}), half),
        "grey with another band": (tiff(np.repeat(GREY, 2, 2), 1, order=order, tags={338: (3, [0])}), SHADES),
    }
    for name, (data, expected) in layouts.items():
        assert difference(data, expected) <= 1, name


def test_twelve_bits_are_not_dark() -> None:
    numbers = GREY[:, :, 0].astype(np.uint16) * 16
    first, second = numbers[:, ::2], numbers[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).astype(np.uint8)
    data = tiff(packed.reshape(24, 60, 1), 1, tags={256: (3, [40]), 258: (3, [12])})
    assert difference(data, SHADES) == 0


@pytest.mark.parametrize(
    "pixels, colours, kind, words",
    [
        (GREY.astype(np.uint32), 1, 1, "32 bits"),
        (GREY.astype(np.uint32), 0, 1, "32 bits"),
        (RGB.astype(np.uint32), 2, 1, "32 bits"),
        (GREY.astype(np.int8), 1, 2, "signed"),
        (GREY.astype(np.int16), 1, 2, "signed"),
        (GREY.astype(np.int32), 1, 2, "signed"),
        (GREY.astype(np.float16), 1, 3, "floating-point"),
        (GREY.astype(np.float32), 1, 3, "floating-point"),
        (RGB.astype(np.float32), 2, 3, "floating-point"),
        (GREY.astype(np.float64), 1, 3, "floating-point"),
        (np.repeat(GREY, 6, 2), 1, 1, "6 × 8 bits"),
        (np.repeat(GREY, 6, 2).astype(np.uint16), 2, 1, "6 × 16 bits"),
    ],
)
def test_tiffs_without_a_brightness_are_named(pixels: np.ndarray, colours: int, kind: int, words: str) -> None:
    """A height map or a satellite's bands shown as black would be searched for objects, and found empty."""
    for order in "<>":
        error = failure(tiff(pixels, colours, order=order, tags={339: (3, [kind] * pixels.shape[2])}))
        assert error.type == "UnsupportedImage"
        assert words in error.message


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd"])
def test_compressed_tiffs(compression: str) -> None:
    data = save(picture(), "TIFF", compression=compression)
    assert difference(data, RGB) < 6
    large = save(picture(size=(400, 300)), "TIFF", compression=compression)
    assert failure(large[: len(large) // 2]).type in ("CorruptImage", "TruncatedImage", "UnsupportedImage")


def test_netpbm_and_numbers_of_other_ranges() -> None:
    assert difference(b"P5 40 24 65535 " + (GREY * np.uint16(257)).astype(">u2").tobytes(), SHADES) == 0
    assert difference(b"P5 40 24 1023 " + (GREY * np.uint16(4)).astype(">u2").tobytes(), SHADES) < 2
    assert difference(b"P6 40 24 65535 " + (RGB * np.uint16(257)).astype(">u2").tobytes(), RGB) <= 1
    assert difference(b"P4 40 24 " + np.packbits(GREY[:, :, 0] < 128, axis=1).tobytes(), SHADES // 128 * 255) == 0


def test_transparent_grey() -> None:
    """A PNG of 16 bits may name one grey as transparent."""
    data = save(Image.fromarray(GREY[:, :, 0].astype(np.uint16) * 257), "PNG")
    at = data.index(b"IDAT") - 4
    key = int(GREY[0, 0, 0]) * 257
    keyed = data[:at] + chunk(b"tRNS", struct.pack(">H", key)) + data[at:]
    assert difference(keyed, np.where(GREY[0, 0, 0] == GREY, 255, SHADES)) == 0


@pytest.mark.parametrize("mode", ["CMYK", "YCCK"])
def test_cmyk_jpegs(mode: str) -> None:
    """Print shops send these, inverted as Adobe does; also scaled while decoding, and never half of one."""
    data = save(picture(size=(400, 300)).convert("CMYK"), "JPEG", quality=95)
    frame = decode(data)[0]
    assert np.abs(frame.astype(int) - opencv(data)).max() <= 2
    scaled, width, height = decode(data, lambda *_: (100, 75))
    assert scaled.shape == (75, 100, 3) and (width, height) == (400, 300)
    assert failure(data[: len(data) // 2] + b"\xff\xd9").type == "TruncatedImage"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF", "MPO", "TIFF"])
def test_first_of_several(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = save(frames[0], format, save_all=True, append_images=frames[1:])
    assert difference(data, np.asarray(frames[0])) <= 6


def _sized(format: str, width: int, height: int) -> bytes:
    """A picture's header that says width × height."""
    if format == "TIFF":
        return tiff(RGB, 2, tags={256: (4, [width]), 257: (4, [height])})
    data = bytearray(save(picture(), format, **({"lossless": True} if format == "WEBP" else {})))
    if format == "WEBP":  # of 14 bits at most
        data[21:25] = struct.pack("<I", (width - 1) & 0x3FFF | ((height - 1) & 0x3FFF) << 14)
        return bytes(data)
    at, form = {
        **{"GIF": (6, "<HH"), "BMP": (18, "<ii"), "TGA": (12, "<HH"), "QOI": (4, ">II")},
        **{"JPEG": (data.find(b"\xff\xc0") + 5, ">HH"), "JPEG2000": (data.find(b"\xff\x4f\xff\x51") + 8, ">II")},
        **{"PPM": (0, "")},
    }[format]
    if format == "PPM":
        return b"P6 %d %d 255 " % (width, height) + bytes(100)
    first, second = (height, width) if format == "JPEG" else (width, height)
    data[at : at + struct.calcsize(form)] = struct.pack(form, first, second)
    if format == "JPEG2000":
        ihdr = data.find(b"ihdr") + 4
        data[ihdr : ihdr + 8] = struct.pack(">II", height, width)
    return bytes(data)


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "GIF", "BMP", "TGA", "QOI", "JPEG2000", "PPM", "WEBP"])
def test_decompression_bombs(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the header: a hundred bytes must not claim the memory of a whole machine, by any decoder."""
    monkeypatch.setattr(pictures.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    width = height = 60_000
    if format == "WEBP":
        width = height = 16_384
    error = failure(_sized(format, width, height))
    assert error.type == "TooManyPixels"


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_random_bytes(data: bytes) -> None:
    try:
        decode(data)
    except Failure as error:
        assert error.message


VALID = [save(picture(), name) for name in FORMATS if name not in ("BLP", "ICNS", "ICO")]
VALID += [HEIC, tiff(RGB.astype(np.uint16), 2, separate=True), tiff(GREY, 0, order=">", big=True)]
VALID += [save(picture().quantize(9), "PNG"), save(picture().convert("CMYK"), "JPEG"), save(picture(), "GIF")]


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=500)
def test_mutations(data: bytes, changes: list[tuple[float, bytes, int]], head: bool) -> None:
    """Whatever bytes are changed, put in or lost, in the header or anywhere: a frame or a Failure."""
    for place, put, lost in changes:
        at = int(place * (min(len(data), 120) if head else len(data)))
        data = data[:at] + put + data[at + lost :]
    try:
        frame, width, height = decode(data)
        assert frame.shape == (height, width, 3) and frame.dtype == np.uint8 and frame.size
    except Failure as error:
        assert error.message


def test_orientations_of_tiffs() -> None:
    """OpenCV's rule (libtiff's): one whole number from 1 to 8, of whatever size."""
    for kind, values in [(3, [6]), (4, [6]), (1, [6]), (3, [6, 6]), (2, b"6\0\0\0"), (3, [9]), (5, [6, 1])]:
        for order in "<>":
            data = tiff(RGB, 2, order=order, tags={274: (kind, values)})
            assert difference(data, opencv(data)) == 0, (kind, values)
    for number in range(1, 9):
        for layout in (RGB, RGB.astype(np.uint16) * 257):
            for separate in (False, True):
                data = tiff(layout, 2, separate=separate, tags={274: (3, [number])})
                assert difference(data, turned(RGB, number)) == 0
