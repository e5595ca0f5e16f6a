"""Pictures as Python has them → the rows that a job gives for their files."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demo.scenes import Scene
from shardsight.decode.frames import Load
from shardsight.models.table import Stopwatch, from_pictures, with_results
from shardsight.models.yolo.letterbox import Letterbox
from shardsight.models.yolo.model import Yolo
from shardsight.row import ROW, frames_of
from shardsight.sources import Record
from shardsight.storage import Storage
from tests.conftest import PHOTOGRAPHS, WEIGHTS

LETTERBOX = Letterbox((640, 640))


@pytest.fixture(scope="module")
def yolo() -> Yolo:
    return Yolo(str(WEIGHTS / "detect.pt"), conf=0.05)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def shown(picture: Any) -> np.ndarray:
    """The frame that a model gets of a picture."""
    ((_, frame),) = frames_of(from_pictures(picture, LETTERBOX))
    return frame


def test_bytes_give_the_rows_of_the_job(yolo: Yolo, jpegs: list[bytes]) -> None:
    """But for what a picture without a file does not have: id and uri."""
    data = [path.read_bytes() for path in PHOTOGRAPHS] + jpegs[:4] + [b"no picture", b""]
    load = Load(Storage(), yolo.input)
    table = yolo(load.table([load.row(Record(None, n, None, None, data=each)) for n, each in enumerate(data)]))
    rows = yolo(data)
    assert rows == table.select(ROW.names).to_pylist()
    assert [row["error"] and (row["error"]["stage"], row["error"]["type"]) for row in rows[-2:]] == [
        ("decode", "NotAnImage"),
        ("decode", "EmptyFile"),
    ]


def test_every_kind_of_picture_gives_the_same_row(yolo: Yolo, some_scenes: list[Scene]) -> None:
    """Alone and in a list with others; also an array that is a view of another."""
    array = some_scenes[0].image
    image = Image.fromarray(array)
    (row,) = yolo(encoded(image))
    assert row["detections"] and (row["width"], row["height"]) == image.size
    view = np.ascontiguousarray(array[:, ::-1])[:, ::-1]
    assert yolo([image, array, view, bytearray(encoded(image)), memoryview(encoded(image))]) == [row] * 5
    assert yolo(image) == yolo(array) == yolo((array,)) == [row]
    assert yolo([]) == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB", "I;16"])
def test_pillow_pictures_are_seen_as_their_files_are(mode: str) -> None:
    """Alpha over white, 16 bits cut to 8, palettes and grey as colours."""
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values, "RGBA").convert(mode)
    assert (shown(image) == shown(encoded(image))).all()


def test_grey_of_16_bits_is_seen_as_its_file_is() -> None:
    """Of a PGM, in which Pillow takes them for integers of 32."""
    data = b"P5 3 2 65535\n" + np.arange(0, 60_000, 10_000).astype(">u2").tobytes()
    assert (shown(Image.open(io.BytesIO(data))) == shown(data)).all()


@pytest.mark.parametrize(("name", "format"), [("a picture", None), ("TIFF", "TIFF")])
def test_a_picture_without_a_defined_brightness_is_told_by_its_format(name: str, format: str | None) -> None:
    image = Image.new("F", (4, 4))
    picture = Image.open(io.BytesIO(encoded(image, format))) if format else image
    said = f"{name} of floating-point numbers, which have no defined brightness"
    assert from_pictures(picture, LETTERBOX)["error"].to_pylist()[0]["message"] == said


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillow_pictures_are_turned_as_their_files_are(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)), exif=exif)
    image = Image.open(io.BytesIO(data))
    assert shown(image).shape[:2] == ((3, 2) if orientation >= 5 else (2, 3))
    assert (shown(image) == shown(data)).all()


def test_a_pillow_picture_that_cannot_be_read_is_an_error_row(yolo: Yolo) -> None:
    """Pillow reads a file's pixels only when they are asked for."""
    data = PHOTOGRAPHS[0].read_bytes()
    cut, whole = yolo([Image.open(io.BytesIO(data[:20_000])), Image.open(io.BytesIO(data))])
    assert cut["error"]["stage"] == "decode" and "truncated" in cut["error"]["message"]
    assert whole["error"] is None and whole["detections"] is not None


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("picture.jpg", "not str"),
        (None, "not NoneType"),
        ({"image": b""}, "not dict"),
        (np.zeros((4, 4, 3)), r"not float64 and \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"not uint8 and \(4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"not uint8 and \(2, 4, 4, 3\)"),
        (np.zeros((3, 4, 4), np.uint8), r"not uint8 and \(3, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"not uint8 and \(0, 4, 3\)"),
    ],
)
def test_what_is_no_picture_is_a_type_error(wrong: Any, found: str) -> None:
    """As it is a mistake in the program, which no row should hide."""
    for each in (wrong, [np.zeros((4, 4, 3), np.uint8), wrong]):
        with pytest.raises(TypeError, match=f"^expected .*{found}$"):
            from_pictures(each, LETTERBOX)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20), st.floats(0, 100), st.floats(0, 100))
def test_seconds_are_shared_among_the_rows_that_were_computed(
    rows: list[tuple[bool, bool]], clock: float, cpu: float
) -> None:
    """(computed, failed): rows that were not computed, or failed, have none; and what other columns hold stays."""
    table = from_pictures([np.full((1, 1, 3), n, np.uint8) for n in range(len(rows))], LETTERBOX)
    computed = [n for n, (done, _) in enumerate(rows) if done]
    error = {"stage": "yolo", "type": "RuntimeError", "message": "no"}
    errors = [error if failed else None for _, failed in rows]
    found = [None if failed or not done else [] for done, failed in rows]
    after = with_results(table, "yolo", {"detections": found}, errors, computed, (clock, cpu))
    assert after.schema == table.schema
    assert after["detections"].to_pylist() == found and after["error"].to_pylist() == errors
    assert after["frame"].equals(table["frame"])
    for kind, total in (("clock", clock), ("cpu", cpu)):
        spent = after[f"yolo_{kind}_seconds"].to_pylist()
        assert spent == [total / len(computed) if done and not failed else None for done, failed in rows]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1))
def test_overlapping_calls_are_counted_once(spans: list[tuple[int, int]]) -> None:
    """As vLLM computes several tables at a time: their seconds together are those in which any was computed."""
    calls = [(float(start), float(start + length)) for start, length in spans]
    watch = Stopwatch()
    ends: Iterator[float] = iter(sorted(end for _, end in calls))
    watch.now = lambda: (lambda now: (now, now))(next(ends))  # type: ignore[method-assign]
    counted = sum(watch.since((start, start))[0] for start, _ in sorted(calls, key=lambda call: call[1]))
    assert counted == len({second for start, end in calls for second in range(int(start), int(end))})
