"""Frames of videos as PyAV decodes them from start to end, whatever is skipped, split, cut or broken."""

import gc
import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardsight.decode import pictures, video
from shardsight.decode.video import Part, Sampling, VideoFrame, is_video, read, split
from shardsight.row import Failure
from tests.encoded import picture, save

CLIPS = Path(__file__).parent / "data" / "videos"
EVERY = Sampling()
SAMPLINGS = [EVERY, Sampling(every=5), Sampling(every=40), Sampling(fps=1), Sampling(fps=7)]
SAMPLINGS += [Sampling(keyframes=True)]
# Of the clips with a video, those that cannot be split.
ALONE = {"b-frames.avi", "mpeg4.avi", "raw.h264", "size-changes.h264", "intra-refresh.mp4", "intra-refresh.ts"}
ALONE |= {"discontinuity.ts", "edit-list.mp4", "sound.mp4", "vfr.mp4", "interlaced.mp4"}  # the last four are short
WITHOUT_VIDEO = {"only-sound.m4v", "cover.mp4", "make.sh", "README.md"}
NAMES = sorted(path.name for path in CLIPS.iterdir() if path.name not in WITHOUT_VIDEO)


def clip(name: str) -> bytes:
    return (CLIPS / name).read_bytes()


def frames(data: bytes, sampling: Sampling = EVERY, **options: Any) -> list[VideoFrame]:
    return list(read(io.BytesIO(data), sampling, **options))


def encode(codec: str, format: str, count: int = 30, size: tuple[int, int] = (64, 48), **more: Any) -> bytes:
    """A clip of moving noise, with a keyframe each 10 frames."""
    file, rate = io.BytesIO(), more.pop("rate", 25)
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    noise = noise.repeat(8, 0).repeat(8, 1)[: size[1], : size[0]]
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=more.pop("options", {}))
        stream.width, stream.height, stream.pix_fmt = *size, more.pop("pix_fmt", "yuv420p")
        stream.codec_context.gop_size = 10
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(noise, index, 1)), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@cache
def decoded(data: bytes) -> list[tuple[int, float, np.ndarray, bool]]:
    """(index, seconds, frame, whether it is a keyframe) as PyAV decodes them, up to the first error."""
    found = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate = stream.average_rate or 25

        def every() -> Iterator[Any]:
            try:
                yield from container.decode(stream)
            except av.error.InvalidDataError:  # the decoder still holds some
                yield from stream.codec_context.decode(None)

        for index, frame in enumerate(every()):
            seconds = float(index / rate) if frame.pts is None else float(frame.pts * stream.time_base)
            shown = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            found.append((index, seconds, shown, bool(frame.key_frame)))
    return found


def expected(data: bytes, sampling: Sampling) -> list[tuple[int, float, np.ndarray, bool]]:
    every = decoded(data)
    if sampling.keyframes:
        return [one for one in every if one[3]]
    if sampling.fps:
        found, beat = [], -1
        for one in every:
            if (now := int((one[1] - every[0][1] + 1e-3) * sampling.fps)) > beat:
                found.append(one)
                beat = now
        return found
    return every[:: sampling.every or 1]


def check(got: list[VideoFrame], wanted: list[tuple[int, Any]]) -> None:
    assert [frame.failure for frame in got if frame.failure] == []
    assert [(frame.number, frame.index) for frame in got] == [(number, one[0]) for number, one in wanted]
    for frame, (_, (_, seconds, shown, _)) in zip(got, wanted, strict=True):
        assert frame.pts_seconds == pytest.approx(seconds, abs=1e-9)
        assert frame.frame is not None
        assert (frame.height, frame.width) == shown.shape[:2]
        assert np.array_equal(frame.frame, shown)


def last(got: list[VideoFrame]) -> list[int]:
    return [frame.number for frame in got if frame.last]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "discontinuity.ts"])
def test_equal_to_pyav(name: str, sampling: Sampling) -> None:
    """Read whole, after an interruption, or in parts, the rows are those of a plain decode."""
    data = clip(name)
    wanted = list(enumerate(expected(data, sampling)))
    whole = frames(data, sampling)
    check(whole, wanted)
    assert last(whole) == [len(wanted) - 1]
    done = [(0, len(wanted) // 3), (len(wanted) // 2, len(wanted) // 2 + 2)]
    rest = [one for one in wanted if not any(first <= one[0] < stop for first, stop in done)]
    check(frames(data, sampling, done=done), rest)
    parts = split(io.BytesIO(data), sampling, 13)
    assert (len(parts) == 1) == (name in ALONE)
    found = [frames(data, sampling, part=part) for part in parts]
    check([frame for one in found for frame in one], wanted)
    assert [last(one) for one in found] == [*([] for _ in parts[1:]), [len(wanted) - 1]]
    if len(parts) > 1:
        assert [(part.first, part.stop) for part in parts] == [(one[0].number, one[-1].number + 1) for one in found]


@pytest.mark.parametrize(
    ("codec", "format", "more"),
    [
        ("libx264", "mp4", {"size": (97, 65), "pix_fmt": "yuv444p"}),
        ("libx264", "matroska", {}),
        ("libx265", "mp4", {"options": {"x265-params": "log-level=none"}}),
        ("libvpx-vp9", "webm", {}),
        ("libsvtav1", "mp4", {"size": (64, 64)}),
        ("mpeg4", "avi", {}),
        ("mpeg2video", "mpegts", {}),
        ("mjpeg", "mov", {"pix_fmt": "yuvj420p"}),
    ],
)
def test_codecs_of_pyav(codec: str, format: str, more: dict[str, Any]) -> None:
    data = encode(codec, format, **more)
    assert is_video(data[:512])
    for sampling in (Sampling(), Sampling(every=7), Sampling(keyframes=True)):
        check(frames(data, sampling), list(enumerate(expected(data, sampling))))


def test_two_recordings_one_after_the_other() -> None:
    """pts that go back: every frame counts, and sampling goes on through the second recording."""
    data = clip("discontinuity.ts")
    assert split(io.BytesIO(data), Sampling(), 13) == [Part()]
    check(frames(data), list(enumerate(decoded(data))))
    assert [frame.index for frame in frames(data, Sampling(fps=1))] == [0, 25, 50, 76, 101]


def test_30_frames_a_second_of_matroska() -> None:
    """Its times are rounded to milliseconds: 33 ms is the frame of 1/30 s."""
    data = encode("libx264", "matroska", rate=30)
    assert [frame.index for frame in frames(data, Sampling(fps=30))] == list(range(30))
    assert [frame.index for frame in frames(data, Sampling(fps=15))] == list(range(0, 30, 2))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The packets that decoders are fed."""
    counted, feed = [], video._feed

    def counting(context: Any, packets: Iterable[Any]) -> Iterator[Any]:
        def seen() -> Iterator[Any]:
            for packet in packets:
                counted.extend([packet] if packet is not None else [])
                yield packet

        return feed(context, seen())

    monkeypatch.setattr(video, "_feed", counting)
    return counted


@pytest.mark.parametrize("name", ["whole.mp4", "closed-gop.mkv", "open-gop.ts", "mpeg2.mpg", "vp9.webm"])
def test_what_is_not_wanted_is_not_decoded(name: str, fed: list[Any]) -> None:
    """60 frames with a keyframe each 12: on resuming, sampling, or of keyframes alone."""
    data = clip(name)
    frames(data)
    assert len(fed) == 60
    fed.clear()
    assert len(frames(data, Sampling(keyframes=True))) == len(fed) == len(expected(data, Sampling(keyframes=True)))
    fed.clear()
    assert len(frames(data, done=[(0, 50)])) == 10
    assert len(fed) <= 24
    fed.clear()
    assert len(frames(data, Sampling(every=30))) == 2
    assert len(fed) <= 15
    part = split(io.BytesIO(data), Sampling(), 13)[-1]
    fed.clear()
    frames(data, part=part)
    assert len(fed) <= part.stop - part.first + 3


@pytest.mark.parametrize("name", ["whole.mp4", "rotated.mp4", "mpeg4.avi"])
def test_size(name: str) -> None:
    """No smaller than needed on either side, with the aspect kept, and never enlarged."""
    for full, small in zip(
        frames(clip(name)), frames(clip(name), needed_size=lambda w, h: (w // 3, h // 2)), strict=True
    ):
        assert small.frame is not None and full.frame is not None
        height, width = small.frame.shape[:2]
        assert (small.width, small.height) == (full.width, full.height) == full.frame.shape[1::-1]
        assert height == (small.height + 1) // 2 - (small.height % 2)
        assert abs(width - small.width * height / small.height) <= 1
        assert width >= small.width // 3
        assert abs(small.frame.mean() - full.frame.mean()) < 3
    large = frames(clip(name), needed_size=lambda w, h: (w * 2, h * 2))[0]
    assert large.frame is not None and large.frame.shape == (large.height, large.width, 3)


def test_rotated_is_shown_upright() -> None:
    """A phone's clip: 96×64 stored, turned by its container."""
    assert {(frame.width, frame.height) for frame in frames(clip("rotated.mp4"))} == {(64, 96)}


def test_several_streams() -> None:
    """The first video stream counts, covers do not."""
    assert len(frames(clip("sound.mp4"))) > 20
    for name in ("only-sound.m4v", "cover.mp4"):
        (frame,) = frames(clip(name))
        assert frame.failure is not None and frame.failure.type == "NoVideoStream" and frame.last
        with pytest.raises(Failure, match="no video among the streams"):
            split(io.BytesIO(clip(name)), Sampling())


CUT = {"faststart.mp4", "fragmented.mp4", "closed-gop.mkv", "vp9.webm", "av1.mkv", "mpeg4.avi", "b-frames.avi"}


@pytest.mark.parametrize("name", sorted(CUT))
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(every=5), Sampling(keyframes=True)], ids=str)
def test_cut(name: str, sampling: Sampling) -> None:
    """A download that broke off: what can be read, then one row that says so."""
    data = clip(name)
    cut = data[: len(data) * 55 // 100]
    *good, bad = frames(cut, sampling)
    check(good, list(enumerate(expected(cut, sampling)))[: len(good)])
    assert len(expected(data, sampling)) * 0.3 < len(good) < len(expected(data, sampling))
    if name == "faststart.mp4" and sampling == EVERY:  # those that the decoder still holds at the error, too
        assert len(good) == len(decoded(cut))
    assert last([*good, bad]) == [bad.number] == [len(good)]
    assert bad.frame is None and bad.failure is not None and bad.failure.type == "TruncatedVideo"


def test_a_last_frame_that_stays() -> None:
    """A screen recording's last frame may be shown for seconds: that is no cut file."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(5):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            for packet in stream.encode(frame):
                packet.duration = 25 * 60
                container.mux(packet)
    found = frames(file.getvalue())
    assert [frame.failure for frame in found] == [None] * 5 and last(found) == [4]


def test_cut_behind_the_last_frame() -> None:
    """Only Matroska's index of keyframes is missing: no frame is."""
    assert len(frames(clip("closed-gop.mkv")[:-20])) == 60


def test_cut_before_the_index() -> None:
    (frame,) = frames(clip("whole.mp4")[:9000])
    assert frame.failure is not None and frame.failure.type == "TruncatedVideo" and frame.last


@pytest.mark.parametrize("name", ["faststart.mp4", "closed-gop.mkv", "open-gop.ts"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(every=5)], ids=str)
def test_damaged(name: str, sampling: Sampling) -> None:
    """The damaged place ends the video, or only the part with it."""
    data = bytearray(clip(name))
    at = len(data) * 6 // 10
    data[at : at + 300] = bytes([255]) * 300
    *good, bad = frames(bytes(data), sampling)
    check(good, list(enumerate(expected(bytes(data), sampling)))[: len(good)])
    assert len(good) >= len(expected(clip(name), sampling)) / 2
    assert bad.failure is not None and bad.failure.type == "DamagedVideo" and bad.last and not last(good)
    parts = split(io.BytesIO(clip(name)), sampling, 13)
    found = [frames(bytes(data), sampling, part=part) for part in parts]
    assert [sum(frame.failure is not None for frame in one) for one in found] in ([1, 0], [0, 1])


PLAYLIST = b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"


@pytest.mark.parametrize("data", [b"", b"hello\n" * 200, bytes(5000), PLAYLIST, b"RIFF", save(picture(), "PNG")])
def test_no_video(data: bytes) -> None:
    """A playlist would open other files; a picture is decoded elsewhere."""
    (frame,) = frames(data)
    assert frame.failure is not None and frame.failure.type == "NotAVideo" and frame.last
    with pytest.raises(Failure):
        split(io.BytesIO(data), Sampling())
    assert not is_video(data)


def test_is_video() -> None:
    for name in NAMES:
        assert is_video(clip(name)[:512]) or name.endswith(".h264"), name
    m2ts = b"".join(b"\0\0\0\0" + clip("open-gop.ts")[at : at + 188] for at in range(0, 188 * 10, 188))
    assert is_video(m2ts[:600])
    for brand in (b"heic", b"mif1", b"avif", b"avis"):
        assert not is_video(b"\0\0\0\x18ftyp" + brand + bytes(500))
    for image in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBPVP8 ", b"G" * 20):
        assert not is_video(image + bytes(500))


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before decoding, and for a frame that grows midway."""
    assert video.MAX_PIXELS == pictures.MAX_PIXELS
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48)
    (frame,) = frames(clip("whole.mp4"))
    assert frame.failure is not None and frame.failure.type == "TooManyPixels"
    grows = encode("libx264", "h264", 10) + clip("raw.h264")
    *good, bad = frames(grows)
    assert len(good) == 10 and bad.number == 10 and bad.last
    assert bad.failure is not None and bad.failure.type == "TooManyPixels"


def test_a_store_that_fails() -> None:
    """A network error is not a damaged video."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0:
                raise ConnectionResetError("reset by peer")
            return super().read(min(size or 0, 8192))

    for name in ("whole.mp4", "closed-gop.mkv", "open-gop.ts"):
        for attempt in (lambda file: list(read(file, Sampling())), lambda file: split(file, Sampling())):
            with pytest.raises(ConnectionResetError):
                attempt(Failing(clip(name)))


def test_a_bug_in_the_callers_function_is_no_bad_video() -> None:
    def bug(width: int, height: int) -> tuple[int, int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        frames(clip("whole.mp4"), needed_size=bug)


def test_parts_are_small_and_hashable() -> None:
    """They travel with a unit."""
    parts = split(io.BytesIO(encode("mpeg4", "mp4", 400)), Sampling(fps=5), 100)
    assert len(parts) == 4 and len(set(parts)) == 4
    assert [part.stop for part in parts[:-1]] == [part.first for part in parts[1:]]
    assert parts[-1].stop == 80


def test_memory_is_flat() -> None:
    """Readers that are left early close their container: each would keep megabytes of frames."""
    data = encode("mpeg4", "mp4", 12, (1280, 720))

    def leave() -> int:
        for _ in range(12):
            frames = read(io.BytesIO(data), Sampling())
            next(frames)
            kept.append(frames)
            frames.close()  # type: ignore[attr-defined]
        gc.collect()
        return psutil.Process().memory_info().rss

    kept: list[Any] = []
    before = leave()
    assert leave() - before < 12 << 20


MUTATED = ["whole.mp4", "faststart.mp4", "closed-gop.mkv", "open-gop.ts", "mpeg2.mpg", "mpeg4.avi", "vp9.webm"]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(MUTATED),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=6),
    st.floats(0.05, 1),
    st.sampled_from(SAMPLINGS),
)
@example("open-gop.ts", [(0.9431044333885961, b"\x01")], 1.0, Sampling())  # a stream that comes up at the end
def test_hostile_bytes(name: str, changes: list[tuple[float, bytes]], kept: float, sampling: Sampling) -> None:
    """Whatever the bytes: no exception, rising numbers, and one last frame."""
    data = bytearray(clip(name))
    for place, new in changes:
        at = int(place**2 * len(data))  # more often near the headers
        data[at : at + len(new)] = new
    found = frames(bytes(data[: int(len(data) * kept)]), sampling)
    assert [frame.number for frame in found] == sorted({frame.number for frame in found})
    assert last(found) == [found[-1].number]
    with suppress(Failure):
        assert split(io.BytesIO(bytes(data)), sampling, 13)[0].first == 0


def test_headers_that_lie() -> None:
    """A hundred streams, and a duration of years."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(100)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode(None))
    assert [frame.index for frame in frames(file.getvalue())] == [0]
    data = bytearray(clip("whole.mp4"))
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        at = data.index(box) + offset
        data[at : at + 4] = b"\x7f\xff\xff\xff"
    assert len(frames(bytes(data), Sampling(fps=1))) == 3
