"""Pictures as people see them, and broken ones as errors."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shardsight.decode.pictures import MAX_PIXELS, decode
from shardsight.row import Failure
from tests.conftest import PHOTOGRAPHS
from tests.encoded import picture, save
from tests.test_annotate import huge_png


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_photographs_equal_opencv(path: Path) -> None:
    """ultralytics decodes with OpenCV: equal pixels are where equal boxes begin."""
    frame, width, height = decode(path.read_bytes())
    assert (frame == cv2.imread(str(path))[:, :, ::-1]).all()
    assert (height, width) == frame.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, format: str) -> None:
    """A phone's picture is stored lying down; boxes are of what people see."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(picture(), format, exif=exif)
    frame, width, height = decode(data)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert frame.shape == expected.shape == (height, width, 3)
    assert np.abs(frame.astype(int) - expected).max() <= 2
    assert (orientation < 5) == (width > height)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats(format: str) -> None:
    frame, _, _ = decode(save(picture(), format))
    assert np.abs(frame.astype(int) - np.array(picture())).mean() < 12


def test_grey_palette_bits_and_cmyk() -> None:
    grey = picture().convert("L")
    as_rgb = np.array(grey.convert("RGB"))
    assert (decode(save(grey, "PNG"))[0] == as_rgb).all()
    assert (decode(save(grey.convert("1"), "PNG"))[0] == np.array(grey.convert("1").convert("RGB"))).all()
    deep = Image.fromarray(np.array(grey, np.uint16) * 257)
    for format in ("PNG", "TIFF"):
        assert (decode(save(deep, format))[0] == as_rgb).all(), format
    palette = picture().quantize(16)
    assert (decode(save(palette, "PNG"))[0] == np.array(palette.convert("RGB"))).all()
    colours = np.random.default_rng(0).integers(0, 65535, (5, 7, 3), np.uint16)
    deep_rgb = cv2.imencode(".png", colours)[1].tobytes()
    assert (decode(deep_rgb)[0][:, :, ::-1] == colours >> 8).all()
    cmyk = save(picture().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(cmyk)[0].astype(int) - np.array(picture())).mean() < 12
    grey_jpeg = save(grey, "JPEG", quality=95)
    assert np.abs(decode(grey_jpeg)[0].astype(int) - as_rgb).mean() < 12


def test_alpha_lies_over_white() -> None:
    for format in ("PNG", "WEBP"):
        image = picture().convert("RGBA")
        image.putalpha(Image.fromarray(np.full((24, 40), 128, np.uint8)))
        frame = decode(save(image, format, **({"lossless": True} if format == "WEBP" else {})))[0]
        expected = 255 - (255 - np.array(picture()).astype(float)) * 128 / 255
        assert np.abs(frame - expected).max() <= 2
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (decode(save(clear, "PNG"))[0] == 255).all()
    keyed = picture().quantize(16)
    assert (decode(save(keyed, "PNG", transparency=keyed.getpixel((0, 0))))[0][0, 0] == 255).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = save(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data)[0].astype(int) - [255, 0, 0]).max() <= 6, format


@given(width=st.integers(1, 400), height=st.integers(1, 400), target=st.integers(1, 400))
@settings(max_examples=80)
def test_scaled_decoding_is_never_too_small(width: int, height: int, target: int) -> None:
    """Reduced decoding that went below the model's size would blur every picture unseen."""
    data = save(picture(size=(width, height)), "JPEG")
    scale = min(1.0, target / max(width, height))
    need = max(1, round(width * scale)), max(1, round(height * scale))
    frame, w, h = decode(data, lambda *_: need)
    assert (w, h) == (width, height)
    assert frame.shape[1] >= need[0] and frame.shape[0] >= need[1]
    assert frame.shape[1] <= width and frame.shape[0] <= height


def failure(data: bytes) -> str:
    with pytest.raises(Failure) as caught:
        decode(data)
    assert caught.value.message
    return caught.value.type


def test_broken_pictures() -> None:
    """Each is an error with a name, and none is a grey half of a picture."""
    photograph = PHOTOGRAPHS[0].read_bytes()
    assert failure(b"") == "EmptyFile"
    assert failure(b"hello, I am text") == "NotAnImage"
    assert failure(huge_png()) == "TooManyPixels"
    for cut in (len(photograph) // 4, len(photograph) // 2, len(photograph) - 2000):
        assert failure(photograph[:cut]) == "TruncatedImage"
    assert failure(photograph[:100]) == "CorruptImage"
    for format in ("PNG", "WEBP", "TIFF", "BMP"):
        data = save(picture(size=(400, 300)), format)
        assert failure(data[: len(data) // 2]) in ("TruncatedImage", "CorruptImage", "NotAnImage"), format
    progressive = save(Image.open(PHOTOGRAPHS[0]), "JPEG", progressive=True)
    assert failure(progressive[: len(progressive) // 2]) == "TruncatedImage"
    assert MAX_PIXELS < 60_000 * 60_000


def test_harmless_damage_is_forgiven() -> None:
    """Files that every viewer shows whole: no end marker, or junk around it."""
    photograph = PHOTOGRAPHS[0].read_bytes()
    whole = decode(photograph)[0]
    for data in (photograph[:-2], photograph + b"junk", photograph[:-2] + b"\0\0\0" + photograph[-2:]):
        assert (decode(data)[0] == whole).all()


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"]), st.integers(0, 400))
@settings(max_examples=150)
def test_garbage_never_raises_anything_else(junk: bytes, format: str, at: int) -> None:
    data = bytearray(save(picture(), format))
    data[at : at + len(junk)] = junk
    try:
        frame, width, height = decode(bytes(data))
        assert frame.shape == (height, width, 3) and frame.dtype == np.uint8
    except Failure:
        pass
