"""Metadata turns a picture, and never costs its pixels."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shardsight.decode.pictures import decode
from shardsight.row import Failure
from tests.encoded import chunk, exif, opencv, picture, save, segment, tiff, turned

JPEG = save(picture(), "JPEG", quality=95)
PNG = save(picture(), "PNG")
BEFORE, AFTER = PNG.index(b"IDAT") - 4, len(PNG) - 12  # the pixels
STORED = np.asarray(picture())
SCAN = JPEG.index(b"\xff\xda")


def with_segments(*segments: bytes, jpeg: bytes = JPEG) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def app1(block: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + block)


def same_as_opencv(data: bytes) -> None:
    expected = opencv(data)
    frame, width, height = decode(data)
    assert expected is not None and frame.shape == expected.shape == (height, width, 3)
    assert (frame == expected).all()


def test_importing_changes_nothing() -> None:
    """Pillow's limits protect the rest of a user's program."""
    code = """if True:
        from PIL import Image, ImageFile, PngImagePlugin
        import cv2
        def state():
            limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
            return limits, ImageFile.LOAD_TRUNCATED_IMAGES, Image.open, cv2.imread, cv2.getNumThreads()
        before = state()
        from shardsight.decode.pictures import decode
        import sys
        decode(bytes.fromhex(sys.argv[1]))
        assert state() == before
    """
    subprocess.run([sys.executable, "-c", code, PNG.hex()], check=True, timeout=60)


def test_a_replaced_image_open_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """ultralytics' own, for a file that Pillow does not know, runs pip."""
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("called"))
    for format in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "TGA", "ICO"):
        decode(save(picture(), format))
    with pytest.raises(Failure, match="NotAnImage"):
        decode(b"hello, I am text")


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_orientations(format: str, number: int) -> None:
    """A phone's picture is stored lying down; boxes are of what people see."""
    options = {"lossless": True} if format == "WEBP" else {}
    data = save(picture(), format, exif=b"Exif\0\0" + exif(number), **options)
    frame = decode(data)[0]
    assert np.abs(frame.astype(int) - turned(STORED, number)).mean() < 12
    if format != "AVIF":  # OpenCV 5 does not turn these; Pillow and the browsers do
        same_as_opencv(data)


def test_orientation_wherever_it_stands() -> None:
    """Cameras' previews, profiles and comments may come first, and are often larger than 64 KiB."""
    profile = [segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 2]) + bytes(64_986)) for n in (1, 2)]
    comment = segment(0xFE, b"c" * 65_533)
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
    turn = app1(exif(6))
    for data in (
        with_segments(turn, *profile),
        with_segments(*profile, turn),
        with_segments(comment, comment, turn),
        with_segments(xmp, turn),
        with_segments(b"\xff\xff\xff" + turn),  # fill bytes
        with_segments(segment(0xE5, turn), turn),  # one in another segment's payload does not count
        JPEG[:SCAN] + turn + JPEG[SCAN:],
    ):
        assert decode(data)[1:] == (24, 40)
        same_as_opencv(data)
    same_as_opencv(with_segments(segment(0xE5, turn)))


def test_odd_exif_is_read_as_opencv_reads_it() -> None:
    """Boxes by ultralytics and by us are then of the same picture."""
    blocks = [
        exif(6, order, kind, count) for order in "<>" for kind in (0, 1, 3, 4, 7, 8, 9, 77) for count in (0, 1, 2)
    ]
    blocks += [exif(number) for number in (0, 9, 99, 65535)]
    blocks += [exif(6)[:cut] for cut in (2, 8, 10, 14, 19, 20, 22)]
    blocks += [b"II\x2b\0" + exif(6)[4:], b"XX*\0" + exif(6)[4:], exif(6)[:4] + b"\xff\xff\xff\x7f" + exif(6)[8:]]
    for block in blocks:
        same_as_opencv(with_segments(app1(block)))
    for first, second in [(exif(6), exif(1)), (exif(1), exif(6)), (b"xx", exif(6)), (exif(9), exif(6))]:
        same_as_opencv(with_segments(app1(first), app1(second)))


SEGMENTS = st.one_of(
    st.builds(segment, st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE]), st.binary(max_size=60)),
    st.builds(lambda size: segment(0xFE, bytes(size)), st.integers(0, 65_533)),
    st.builds(lambda end: segment(0xE2, b"ICC_PROFILE\0" + end), st.binary(max_size=4)),
    st.builds(lambda end: segment(0xE0, b"JFXX\0" + end), st.binary(max_size=10)),
    st.builds(lambda end: segment(0xE2, b"MPF\0" + end), st.binary(max_size=20)),
)


@given(st.lists(SEGMENTS, max_size=5), st.integers(1, 8), st.sampled_from("<>"), st.lists(SEGMENTS, max_size=3))
@settings(max_examples=150)
def test_any_segments_around_exif(before: list[bytes], number: int, order: str, after: list[bytes]) -> None:
    data = with_segments(*before, app1(exif(number, order)), *after)
    assert (decode(data)[0] == turned(decode(JPEG)[0], number)).all()


@pytest.mark.parametrize(
    "data",
    [
        JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\7"),
        with_segments(segment(0xE2, b"ICC_PROFILE\0\3\2")),
        with_segments(segment(0xEE, b"Adobe\0d\0\0\0\0\7")),
        with_segments(segment(0xEE, b"Adobe\0d\0\0\0\0\7"), jpeg=JPEG[:2] + JPEG[20:]),
        JPEG[:20] + bytes(7) + JPEG[20:],
        JPEG[:20] + b"\xff\xe5\0\1" + JPEG[20:],
        JPEG[:-2] + b"xyz" + JPEG[-2:],
        JPEG + JPEG,
    ],
)
def test_libjpegs_warnings_cost_no_pixels(data: bytes) -> None:
    """Pillow and OpenCV show these whole."""
    same_as_opencv(data)
    assert (decode(data)[0] == decode(JPEG)[0]).all()


def test_a_warning_does_not_hide_missing_pixels() -> None:
    """OpenCV and Pillow show the lower half of these grey, without a word."""
    large = save(picture(size=(160, 120)), "JPEG")
    progressive = save(picture(size=(160, 120)), "JPEG", progressive=True)
    for whole in (large, progressive):
        for end in (b"", b"\xff\xd9"):
            cut = whole[: len(whole) * 2 // 3] + end
            for data in (
                cut,
                cut.replace(b"JFIF\0\1\1", b"JFIF\0\7\7"),
                with_segments(segment(0xE2, b"ICC_PROFILE\0\3\2"), jpeg=cut),
                with_segments(app1(exif(6)), jpeg=cut),
            ):
                with pytest.raises(Failure) as caught:
                    decode(data)
                assert caught.value.type == "TruncatedImage"


@pytest.mark.parametrize("sampling", [0x11, 0x12, 0x14, 0x21, 0x22, 0x31, 0x41, 0x42])
def test_odd_subsampling(sampling: int) -> None:
    """Three columns for one of colour, and the like: Pillow and OpenCV show them."""
    data = bytearray(JPEG)
    data[data.index(b"\xff\xc0") + 11] = sampling
    same_as_opencv(bytes(data) + bytes(20_000))


def test_jpegs_that_nobody_decodes_are_named() -> None:
    frame = JPEG.index(b"\xff\xc0")
    for at, new, words in [(4, b"\x0c", "12 bits"), (1, b"\xc3", "lossless"), (5, b"\0\0", "height")]:
        with pytest.raises(Failure) as caught:
            decode(JPEG[: frame + at] + new + JPEG[frame + at + len(new) :])
        assert caught.value.type == "UnsupportedImage"
        assert words in caught.value.message


LARGE = zlib.compress(b"a" * (2 << 20))
CHUNKS = {
    "text": chunk(b"zTXt", b"k\0\0" + LARGE),
    "international text": chunk(b"iTXt", b"k\0\1\0\0\0" + LARGE),
    "a hundred texts": chunk(b"zTXt", b"k\0\0" + LARGE) * 100,
    "text that is not packed": chunk(b"zTXt", b"k\0\0xyz"),
    "profile": chunk(b"iCCP", b"k\0\0" + LARGE),
    "no profile": chunk(b"iCCP", b""),
    **{f"{kind}, checksum": chunk(kind.encode(), b"abcd", True) for kind in ["tEXt", "iCCP", "gAMA", "eXIf", "tRNS"]},
    **{f"{kind}, short": chunk(kind.encode(), b"1") for kind in ["pHYs", "gAMA", "cHRM", "sRGB", "tIME", "acTL"]},
    **{f"{kind}, garbage": chunk(kind.encode(), bytes(range(50))) for kind in ["eXIf", "tRNS", "bKGD", "hIST", "fcTL"]},
    "XMP's orientation": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6'/>"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_png_chunks(name: str) -> None:
    """Screenshots and stock pictures carry any of these."""
    for at in (33, BEFORE, AFTER):
        assert (decode(PNG[:at] + CHUNKS[name] + PNG[at:])[0] == STORED).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_png_chunks_of_other_modes(mode: str) -> None:
    plain = save(picture().convert("L").convert(mode) if mode == "LA" else picture().convert(mode), "PNG")
    before = plain.index(b"IDAT") - 4
    expected = decode(plain)[0]
    for extra in (CHUNKS["text"], CHUNKS["gAMA, short"], chunk(b"tRNS", bytes(3), True)):
        assert (decode(plain[:before] + extra + plain[before:])[0] == expected).all()


@given(
    st.text("abcdefgxyz", min_size=3, max_size=3),
    st.binary(max_size=80),
    st.booleans(),
    st.sampled_from([33, BEFORE, AFTER]),
)
@settings(max_examples=60)
def test_any_ancillary_chunk(name: str, payload: bytes, wrong: bool, at: int) -> None:
    kind = (name[:2] + name[2].upper()).encode()
    for first in (b"t", b"i"):
        assert (decode(PNG[:at] + chunk(first + kind, payload, wrong) + PNG[at:])[0] == STORED).all()


def test_a_png_without_a_header() -> None:
    with pytest.raises(Failure):
        decode(PNG[:8] + chunk(b"tRNS", b"ab"))


def test_exif_in_png() -> None:
    for at in (33, BEFORE, AFTER):
        for extra in (
            *(chunk(b"eXIf", exif(6)), chunk(b"eXIf", exif(6), True), chunk(b"eXIf", b"Exif\0\0" + exif(6))),
            *(chunk(b"eXIf", exif(6, ">", 4)), chunk(b"eXIf", exif(6)) + chunk(b"eXIf", exif(1))),
        ):
            same_as_opencv(PNG[:at] + extra + PNG[at:])
    for damaged in (PNG[:AFTER], PNG + b"junk"):
        assert (decode(damaged)[0] == STORED).all()


TAGS = {
    "resolution of nothing": {282: (5, [0, 0])},
    "resolution in words": {282: (2, b"abc\0"), 296: (2, b"ab\0")},
    "profile": {34675: (7, b"garbage!")},
    "XMP": {700: (1, b"\xff\xfe")},
    "XMP's orientation": {700: (1, b"<x tiff:Orientation='6'/>")},
    "texts": {270: (2, bytes(range(1, 256))), 305: (3, [1]), 306: (12, [1.0])},
    "EXIF elsewhere": {34665: (4, [99_999_999])},
    "EXIF in itself": {34665: (4, [8])},
    "EXIF in words": {34665: (2, b"abc\0")},
    "GPS": {34853: (4, [1])},
    "directories elsewhere": {330: (4, [9_999_999])},
    "private": {65000: (7, b"\1" * 100), 50000: (11, [1.5])},
    "others": {33723: (7, b"junk"), 34377: (7, b"8BIMjunk"), 297: (3, [0, 0])},
}


@pytest.mark.parametrize("name", TAGS)
def test_tiff_tags(name: str) -> None:
    for order in "<>":
        for big in (False, True):
            data = tiff(STORED, 2, order=order, big=big, tags=TAGS[name])
            assert (decode(data)[0] == STORED).all()
    ifd = tiff(STORED, 2)
    (count,) = struct.unpack("<H", ifd[8:10])
    following = 10 + 12 * count
    for elsewhere in (8, 0x7FFFFFFF):  # the next page is this one, or nowhere
        data = ifd[:following] + struct.pack("<I", elsewhere) + ifd[following + 4 :]
        assert (decode(data)[0] == STORED).all()


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def test_webp_chunks() -> None:
    plain = save(picture(), "WEBP", lossless=True)
    pixels = plain[12:16], plain[20:]
    head = bytes([8 | 32 | 4, 0, 0, 0]) + struct.pack("<I", 39)[:3] + struct.pack("<I", 23)[:3]
    for data in (
        riff((b"VP8X", head), (b"ICCP", b"x"), pixels, (b"EXIF", b"garbage"), (b"XMP ", b"\xff\xfe")),
        riff((b"VP8X", head), pixels),  # says that it has them all
        riff((b"VP8X", head), (b"ABCD", b"xyz"), pixels, (b"EXIF", b""), (b"EXIF", exif(6))),
        riff(pixels, (b"EXIF", b"garbage")),
        riff((b"VP8X", head), pixels)[:-1] + b"\0EXIF\xff\xff\0\0zz",  # ends within its metadata
        plain + b"junk",
    ):
        assert (decode(data)[0] == STORED).all()


GIF = save(picture().quantize(16), "GIF")


@pytest.mark.parametrize(
    "extension",
    [
        *(b"\x21\xfe\3abc\0", b"\x21\xfe" + (b"\xff" + b"a" * 255) * 4000 + b"\0", b"\x21\x77\2hi\0"),
        *(b"\x21\xff\x0bNETSCAPE2.0\1\1\0", b"\x21\xff\1a\0", b"\x21\xff\0", b"\x21\1\x0c" + bytes(12) + b"\2hi\0"),
        b"\x21\xff\x0bICCRGBG1012\5hello\0",
    ],
)
def test_gif_extensions(extension: bytes) -> None:
    at = GIF.index(b",\0\0\0\0", 13 + 3 * 16)
    assert (decode(GIF[:at] + extension + GIF[at:])[0] == decode(GIF)[0]).all()


def box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload) + 8) + kind + payload


def test_jpeg_2000_boxes() -> None:
    plain = save(picture(), "JPEG2000")
    head, stream = plain.index(b"jp2h") - 4, plain.index(b"jp2c") - 4
    inside = plain[head + 8 : stream]
    for extra in (box(b"uuid", b"a"), box(b"xml ", b"\xff\xfe<"), box(b"res ", b"abc"), box(b"asoc", b"junkjunk")):
        for data in (
            plain[:stream] + extra + plain[stream:],
            plain[:head] + box(b"jp2h", inside + extra) + plain[stream:],
            plain + extra,
        ):
            assert (decode(data)[0] == STORED).all()


def test_transparency_survives_bad_metadata() -> None:
    """What shows a picture despite its metadata must not show what was transparent."""
    clear = Image.new("RGBA", (40, 24), (255, 0, 0, 0))
    plain = save(clear, "WEBP", lossless=True, exact=True)
    buffer = io.BytesIO()
    clear.save(buffer, "JPEG2000")
    jp2 = buffer.getvalue()
    head, stream = jp2.index(b"jp2h") - 4, jp2.index(b"jp2c") - 4
    odd = jp2[:head] + box(b"jp2h", jp2[head + 8 : stream] + box(b"res ", b"abc")) + jp2[stream:]
    for data in (plain, plain[:4] + struct.pack("<I", len(plain) + 2) + plain[8:] + b"EXIF\xff\xff\0\0zz", jp2, odd):
        try:
            assert (decode(data)[0] == 255).all()
        except Failure:
            assert data not in (plain, jp2)
