"""Encoded video → its frames, as PyAV decodes them one after the other.

A frame's index is its rank in decoded order and its time the decoder's pts: neither follows from a frame rate, nor from
the number of frames that a container claims. Where the stream's packets tell which frames there are, groups of pictures
in which none is wanted are not decoded; what packets promise is compared with what the decoder then gives.
"""

import heapq
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter

from shardsight.results.coverage import within
from shardsight.row import Failure

ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg")
MAX_PIXELS = 178_956_970  # of a frame, as of a picture

# FFmpeg's demuxers that may open a file. Others are of pictures, or of playlists, which would open other files.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc"
# Those whose packets tell the frames. AVI stores no pts, raw streams nothing at all.
_INDEXED = {"mov", "matroska", "mpegts", "mpeg"}
_PICTURES = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1", b"miaf", b"avif", b"avis"}
_PICTURES |= {b"crx ", b"jp2 ", b"jpx ", b"jpm "}
_TS_PACKETS = ((0, 188), (4, 192))  # offset of the first sync byte, bytes of a packet
_BUFFER = 1 << 20  # bytes of one read; FFmpeg's 32 KiB would be a request each on object storage
_GROUP_PACKETS, _GROUP_BYTES = 3000, 64 << 20  # of a group of pictures: above that, it is decoded as it comes
_SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element that holds all others
_UNKNOWN = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video; at most one is set, and none means every frame.

    fps: the first frame at or after each k/fps seconds from the first frame's time; up to a millisecond earlier where
    the container rounds to such ticks. every: frames 0, N, 2N … keyframes: only those.
    """

    fps: float | None = None
    every: int | None = None
    keyframes: bool = False


@dataclass(frozen=True)
class Part:
    """Of a video, from one keyframe up to another.

    first, stop: numbers of its sampled frames, half-open. Of a part that is the whole video, `stop` is 2³¹-1: how many
    there are shows when they are decoded. index: of its first frame among all. start, end: pts of its keyframe and of
    the next part's, in the stream's time base; None at the start and the end of the video. origin, previous: pts of the
    video's first frame, and of the frame before the part.
    """

    first: int = 0
    stop: int = _UNKNOWN
    index: int = 0
    start: int | None = None
    end: int | None = None
    origin: int | None = None
    previous: int | None = None


@dataclass(frozen=True)
class VideoFrame:
    """One sampled frame.

    number: its rank among the sampled frames. index: its rank among all of the video's frames in display order.
    pts_seconds: as stored, without subtracting the start time; without a pts, from the rank and the average rate.
    frame: RGB uint8 (h, w, 3), as shown (rotated), in full or scaled down; fields of interlaced video stay woven. None
    with a failure. width, height: of the frame in full, as shown. last: of the video's sampled frames.
    """

    number: int
    index: int
    pts_seconds: float
    frame: np.ndarray | None
    width: int
    height: int
    failure: Failure | None = None
    last: bool = False


def is_video(data: bytes) -> bool:
    """Whether a file that begins with `data`, of 512 bytes or more, is a video: MP4, Matroska, AVI, MPEG-TS or -PS."""
    if data[4:8] == b"ftyp":
        return data[8:12] not in _PICTURES
    if data[4:8] in (b"moov", b"mdat", b"wide"):
        return True
    if data.startswith((b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3")):
        return True
    if data[:4] == b"RIFF":
        return data[8:12] == b"AVI "
    # MPEG-TS has packets of 188 bytes; Blu-rays and camcorders put 4 bytes before each.
    return any(data[at::size][:3] == b"GGG" for at, size in _TS_PACKETS)


def split(file: BinaryIO, sampling: Sampling, frames: int = 1200) -> list[Part]:
    """The parts of a video, of at least `frames` frames each, that `read` can read alone.

    One part for a short video, and where the stream does not allow more: AVI, raw streams, pts that fall, intra
    refresh. Reads the whole file. Raises Failure for what is no video, and the file's own OSError.
    """
    source = _Source(file)
    with _open(source) as container:
        stream = _stream(container)
        if _format(container) not in _INDEXED:
            return [Part()]
        try:
            parts = _parts(container, stream, sampling, frames)
            for part in parts[1:]:
                _check_start(container, stream, part)
        except (_UnreliableError, av.error.FFmpegError, Failure):
            source.check()
            return [Part()]
        return parts


@dataclass(frozen=True)
class Extent:
    """How much a video holds, by its header and its packets. width, height: pixels. frames, seconds: of the sampled
    frames and of all from the first to the last; None where only decoding tells."""

    width: int
    height: int
    frames: int | None = None
    seconds: float | None = None


def extent(file: BinaryIO, sampling: Sampling) -> Extent:
    """Decodes nothing. Raises Failure for what is no video, and the file's own OSError."""
    source = _Source(file)
    with _open(source) as container:
        stream = _stream(container)
        found = Extent(stream.codec_context.width, stream.codec_context.height)
        if _format(container) not in _INDEXED:
            return found
        counter, first, last = _Counter(sampling, stream, Part()), None, 0
        try:
            for group in _groups(_packets(container, stream, Part()), Part()):
                for pts in group.shown:
                    counter.take(pts, pts == group.key)
                    first, last = pts if first is None else first, pts
        except (_UnreliableError, av.error.FFmpegError):
            source.check()
            return found
        return replace(found, frames=counter.number, seconds=float((last - (first or 0)) * counter.time_base))


def read(
    file: BinaryIO,
    sampling: Sampling,
    needed_size: Callable[[int, int], tuple[int, int]] | None = None,
    part: Part | None = None,
    done: Sequence[tuple[int, int]] = (),
) -> Generator[VideoFrame, None, None]:
    """The sampled frames of a video, or of a part of it, in display order, but for those whose numbers are in `done`.

    needed_size: given the (width, height) shown, the (width, height) that the model needs; frames are then scaled down,
    keeping their aspect, to no less than that.

    Raises only the file's own OSError. Where the video is damaged or cut, or if it is none, the last frame is one with
    a failure, at the number where that happens, be it in `done`, and the time of the frame before.
    """
    source, part, given, images = _Source(file), part or Part(), 0, _Images(needed_size)
    for by_packets in (True, False):
        reader = _Reader(source, sampling, part, done, given)
        try:
            for frame in _rows(reader, images, by_packets):
                yield frame
                given = frame.number + 1
            return
        except _UnreliableError:  # then all is decoded
            continue


def _rows(reader: "_Reader", images: "_Images", by_packets: bool) -> Iterator[VideoFrame]:
    """The frames of a pass, the last one marked. Raises _UnreliableError and OSError."""
    before: VideoFrame | None = None  # held back, as only the next one tells whether it is the last
    failure = None
    with closing(reader.frames(by_packets)) as frames:
        while failure is None:
            try:
                number, index, seconds, frame = next(frames)
                reader.source.check()  # FFmpeg may go on without what could not be read
            except StopIteration:
                break
            except _UnreliableError:
                reader.source.check()
                raise
            except Exception as error:  # whatever PyAV raises is this video's failure
                failure = error if isinstance(error, Failure) else Failure("DamagedVideo", _said(error))
                break
            if before:
                yield before
                before = None
            row = VideoFrame(number, index, seconds, None, *_shown_size(frame))
            size = images.size(row.width, row.height)
            try:
                before = replace(row, frame=images.rgb(frame, size))
            except Exception as error:
                failure, reader.number, reader.index = Failure("DamagedVideo", _said(error)), number, index
    reader.source.check()
    if before:
        yield replace(before, last=before.number == reader.last_number)
    if failure:
        number = max(reader.number, reader.given)  # a second pass, of all, may fail before what the first gave
        row = VideoFrame(number, reader.index, reader.seconds, None, reader.width, reader.height)
        yield replace(row, failure=failure, last=True)


class _Images:
    """PyAV's frames → RGB, by one converter: PyAV makes a new one for each frame otherwise, of many megabytes."""

    def __init__(self, needed_size: Callable[[int, int], tuple[int, int]] | None) -> None:
        self.needed_size, self.reformatter = needed_size, VideoReformatter()

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to convert to, of the same aspect, for a frame of that size."""
        if not self.needed_size:
            return width, height
        need_width, need_height = self.needed_size(width, height)
        scale = max(Fraction(need_width, width), Fraction(need_height, height))
        if scale >= 1:
            return width, height
        return max(1, math.ceil(width * scale)), max(1, math.ceil(height * scale))

    def rgb(self, frame: Any, size: tuple[int, int]) -> np.ndarray:
        """RGB uint8 (h, w, 3) of that (width, height) as shown."""
        turns = _turns(frame)
        width, height = size[::-1] if turns % 2 else size
        options: dict[str, Any] = {"format": "rgb24", "threads": 1}
        if (width, height) != (frame.width, frame.height):
            options |= {"width": width, "height": height, "interpolation": Interpolation.AREA}
        return np.rot90(self.reformatter.reformat(frame, **options).to_ndarray(), turns)


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, by which the frame is shown."""
    return frame.rotation // 90 % 4


def _shown_size(frame: Any) -> tuple[int, int]:
    return (frame.height, frame.width) if _turns(frame) % 2 else (frame.width, frame.height)


class _UnreliableError(Exception):
    """The stream's packets do not tell which frames it has."""


class _CorruptError(Exception):
    """A frame was decoded only in part."""


class _Source:
    """A file for FFmpeg, which may take an error of reading for the end of the file: it is kept to be raised."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error, self.ended = file, None, False
        file.seek(0)

    error: OSError | None
    ended: bool  # the last read was at the end

    def read(self, size: int) -> bytes:
        try:
            data = self.file.read(size)
        except OSError as error:
            self.error = error
            raise
        self.ended = len(data) < size
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self.file.seek(offset, whence)
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        return self.file.tell()

    def check(self) -> None:
        if self.error:
            raise self.error


def _open(source: _Source) -> Any:
    """A container. Raises Failure."""
    source.seek(0)
    head = source.read(512)
    source.seek(0)
    try:
        options = {"format_whitelist": _FORMATS}
        return av.open(source, buffer_size=_BUFFER, options=options, metadata_errors="replace")
    except Exception as error:
        source.check()
        if not head:
            raise Failure("NotAVideo", "the file holds no bytes") from None
        if not is_video(head):
            raise Failure("NotAVideo", f"no video format that is known; the data begins with {head[:16]!r}") from None
        if source.ended:
            raise Failure("TruncatedVideo", f"the file ends before the video's index: {_said(error)}") from None
        raise Failure("DamagedVideo", f"the video cannot be opened: {_said(error)}") from None


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _is_cut(source: _Source) -> bool:
    """Whether a Matroska file is shorter than it says: its demuxer takes that for the end. Live streams say nothing."""
    source.seek(0)
    head = source.read(512)

    def size(at: int) -> tuple[int, int]:
        """An element's number of bytes, and where they begin; a size of ones alone is unknown, taken for none."""
        length = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + length]) & ((1 << 7 * length) - 1)
        return 0 if value == (1 << 7 * length) - 1 else value, at + length

    header, at = size(4)
    at += header
    if head[at : at + 4] != _SEGMENT:
        return False
    segment, at = size(at + 4)
    return at + segment > source.seek(0, 2)


def _duration(container: Any, stream: Any) -> float | None:
    """Seconds that a Matroska file says its video has."""
    if match := re.fullmatch(r"(\d+):(\d+):([\d.]+).*", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if len(container.streams) > 1:  # the duration may be the sound's
        return None
    return container.duration / av.time_base if container.duration else None


def _format(container: Any) -> str:
    return container.format.name.partition(",")[0]


def _stream(container: Any) -> Any:
    """The first video stream that is no cover, with one thread. Raises Failure."""
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & av.stream.Disposition.attached_pic:
            _check_pixels(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1  # with many, many readers on a machine hang
            return stream
    if container.streams.video and container.streams.video[0].codec_context is None:
        raise Failure("DamagedVideo", "no decoder for the video's codec")
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
    raise Failure("NoVideoStream", f"no video among the streams of the file ({kinds})")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Failure("TooManyPixels", f"{width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")


def _demux(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets that hold data, from where the container stands."""
    # After the last packet PyAV raises IndexError, if streams have come up that the header did not name.
    with suppress(IndexError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def _packets(container: Any, stream: Any, part: Part) -> Iterator[Any]:
    """The stream's packets, in decoding order, from the part's keyframe on. Raises Failure if that is not found."""
    if part.start is None:
        yield from _demux(container, stream)
        return
    # Seeking may go by dts, or land after the keyframe, so further and further back.
    for seconds in (0, 1, 10, 100, 1000, 10_000, 100_000):
        container.seek(part.start - int(seconds / stream.time_base), stream=stream)
        packets = _demux(container, stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts is not None and packet.pts >= part.start:
                if packet.pts == part.start:
                    yield packet
                    yield from packets
                    return
                break
    raise Failure("DamagedVideo", f"the keyframe at {float(part.start * stream.time_base):.3f} s is not found")


@dataclass
class _Group:
    """A keyframe's packet and those up to the next, in decoding order.

    lead: the next keyframe's packet and those after it that are shown before it. shown: pts of the frames that are
    shown from this keyframe up to the next.
    """

    key: int
    packets: list[Any]
    lead: list[Any]
    shown: list[int]


def _runs(packets: Iterable[Any]) -> Iterator[list[Any]]:
    """A keyframe's packet and those up to the next, in decoding order. Raises _UnreliableError."""
    run: list[Any] = []
    size = 0
    for packet in packets:
        if packet.pts is None or not (run or packet.is_keyframe):
            raise _UnreliableError
        if packet.is_keyframe and run:
            yield run
            run, size = [], 0
        run.append(packet)
        size += packet.size
        if len(run) > _GROUP_PACKETS or size > _GROUP_BYTES:
            raise _UnreliableError
    if run:
        yield run


def _groups(packets: Iterable[Any], part: Part) -> Iterator[_Group]:
    """The part's groups of pictures. Raises _UnreliableError where packets do not tell them apart."""
    group: list[Any] = []
    start = part.start
    for run in chain(_runs(packets), [[]]):
        if group:
            yield _group(group, run, start is None)
            start = group[0].pts
        if not run or (part.end is not None and run[0].pts >= part.end):
            return
        group = run


def _group(packets: list[Any], after: list[Any], first: bool) -> _Group:
    key = packets[0].pts
    shown = [packet.pts for packet in packets if not packet.is_discard and packet.pts >= key]
    if first and any(packet.pts < key and not packet.is_discard for packet in packets):
        raise _UnreliableError  # some decoders show these, others do not
    lead: list[Any] = []
    if after:
        end = after[0].pts
        if end <= key or max(shown, default=key) >= end:
            raise _UnreliableError
        early = [at for at, packet in enumerate(after) if not packet.is_discard and packet.pts < end]
        lead = after[: early[-1] + 1] if early else []
        shown += [after[at].pts for at in early]
    shown.sort()
    if (shown and shown[0] < key) or len(set(shown)) < len(shown):
        raise _UnreliableError
    return _Group(key, packets, lead, shown)


def _parts(container: Any, stream: Any, sampling: Sampling, frames: int) -> list[Part]:
    parts, counter = [Part()], _Counter(sampling, stream, Part())
    for group in _groups(_packets(container, stream, Part()), Part()):
        enough = counter.index - parts[-1].index >= frames and counter.number > parts[-1].first
        if enough and group.shown[:1] == [group.key]:
            parts.append(counter.part(group.key))
        for pts in group.shown:
            counter.take(pts, pts == group.key)
    if counter.index - parts[-1].index < frames or counter.number == parts[-1].first:
        parts.pop()
    if len(parts) < 2:
        return [Part()]
    ends = [*((part.first, part.start) for part in parts[1:]), (counter.number, None)]
    return [replace(part, stop=stop, end=end) for part, (stop, end) in zip(parts, ends, strict=True)]


def _check_start(container: Any, stream: Any, part: Part) -> None:
    """Raises _UnreliableError unless the decoder can begin at the part's keyframe."""
    key = next(_packets(container, stream, part))
    frames = list(_feed(stream.codec_context, [key]))
    if not frames or not _is_start(frames[0], part.start):
        raise _UnreliableError


def _is_start(frame: Any, pts: int | None) -> bool:
    # With intra refresh a keyframe is marked too, but it is no whole picture.
    return bool(frame.key_frame and frame.pict_type == PictureType.I and frame.pts == pts)


def _feed(context: Any, packets: Iterable[Any]) -> Iterator[Any]:
    """The frames of packets, and those that are still in the decoder after None and after the last packet.

    Raises what PyAV does, after the frames that were decoded before.
    """
    try:
        for packet in packets:
            if packet is None:
                yield from context.decode(None)
                context.flush_buffers()
            else:
                yield from context.decode(packet)
    except av.error.FFmpegError:
        with suppress(av.error.FFmpegError):
            yield from context.decode(None)
        raise
    yield from context.decode(None)
    context.flush_buffers()


class _Counter:
    """Counts a video's frames in display order, and those that are sampled."""

    def __init__(self, sampling: Sampling, stream: Any, part: Part) -> None:
        self.sampling, self.number, self.index = sampling, part.first, part.index
        self.origin, self.previous = part.origin, part.previous
        self.time_base = Fraction(stream.time_base or Fraction(1, 90_000))
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.beats = Fraction(sampling.fps or 0).limit_denominator(1_000_000) * self.time_base  # of fps, in a tick
        # Matroska rounds 1/30 s to 33 ms, which is not before 1/30 s.
        self.tolerance = min(Fraction(1), Fraction(1, 1000) / self.time_base)

    def ticks(self, pts: int | None, index: int) -> int:
        """pts, or what it would be by the frame's rank."""
        return round(index / self.rate / self.time_base) if pts is None else pts

    def take(self, pts: int | None, key: bool) -> int | None:
        """Count the next frame; its number if it is sampled."""
        ticks = self.ticks(pts, self.index)
        sampled = self._is_sampled(ticks, key)
        self.previous = ticks if self.previous is None else max(ticks, self.previous)  # those of AVI waver
        self.index += 1
        self.number += sampled
        return self.number - 1 if sampled else None

    def _is_sampled(self, ticks: int, key: bool) -> bool:
        if self.sampling.keyframes:
            return key
        if self.sampling.every:
            return self.index % self.sampling.every == 0
        if self.origin is None or self.previous is None:
            self.origin = ticks
            return True
        if not self.sampling.fps:
            return True
        if self.previous - ticks > 1 / self.time_base:  # two recordings one after the other: time goes on
            self.origin -= self.previous - ticks
            self.previous = ticks
        return self._beat(ticks) > self._beat(self.previous)

    def _beat(self, ticks: int) -> int:
        return math.floor((ticks - (self.origin or 0) + self.tolerance) * self.beats)

    def part(self, start: int) -> Part:
        """A part that begins here."""
        return Part(self.number, index=self.index, start=start, origin=self.origin, previous=self.previous)


class _Reader:
    """One pass over a video, or a part of it, for the sampled frames that are not in `done`, from number `given` on."""

    def __init__(
        self, source: _Source, sampling: Sampling, part: Part, done: Sequence[tuple[int, int]], given: int
    ) -> None:
        self.source, self.sampling, self.part, self.done, self.given = source, sampling, part, done, given
        self.number, self.index = part.first, part.index  # of the next frame that is sampled
        self.last_number: int | None = None  # of the video, once it is known
        self.width = self.height = 0
        self.seconds = 0.0  # of the last frame decoded
        self.ended = 0  # pts at which the last packet ends
        self.dts: int | None = None  # of the last packet
        # By packets: number and index of wanted frames by pts, in order, and a heap of the pts that were fed.
        self.wanted: dict[int, tuple[int, int]] = {}
        self.expected: list[int] = []
        self.fed: int | None = None  # dts of the last packet that was fed
        self.start = 0  # pts of the keyframe from which the decoder was fed

    def is_wanted(self, number: int) -> bool:
        return number >= self.given and not within(self.done, number)

    def frames(self, by_packets: bool) -> Generator[tuple[int, int, float, Any], None, None]:
        """(number, index, pts in seconds, PyAV's frame).

        by_packets: do not decode what is not wanted. Raises Failure, what PyAV raises, and by packets
        _UnreliableError.
        """
        with _open(self.source) as container:
            stream = _stream(container)
            self.width, self.height = stream.codec_context.width, stream.codec_context.height
            counter = _Counter(self.sampling, stream, self.part)
            sparse = self.sampling != Sampling() or any(stop > self.part.first for _, stop in self.done)
            packets = self._noting_end(_packets(container, stream, self.part))
            if by_packets and sparse and _format(container) in _INDEXED:
                found = self._by_packets(stream.codec_context, packets, counter)
            else:
                found = self._all(stream.codec_context, packets, counter)
            try:
                for number, index, frame in found:
                    self.seconds = float(counter.ticks(frame.pts, index) * counter.time_base)
                    yield number, index, self.seconds, frame
            except (av.error.FFmpegError, _CorruptError) as error:
                if next(packets, None) is None and self.fed in (None, self.dts):
                    raise Failure("TruncatedVideo", f"the file ends before the video does: {_said(error)}") from None
                raise Failure("DamagedVideo", f"the video is damaged here: {_said(error)}") from None
            self._check_end(container, stream, counter)

    def _noting_end(self, packets: Iterable[Any]) -> Iterator[Any]:
        for packet in packets:
            self.ended = max(self.ended, (packet.pts or 0) + (packet.duration or 0))
            self.dts = packet.dts
            yield packet

    def _check(self, frame: Any) -> None:
        self.width, self.height = _shown_size(frame)
        if frame.is_corrupt:
            raise _CorruptError("the decoder marks the frame as corrupt")
        _check_pixels(frame.width, frame.height)

    def _all(self, context: Any, packets: Iterable[Any], counter: _Counter) -> Iterator[tuple[int, int, Any]]:
        for frame in _feed(context, packets):
            if self.part.start is not None and frame.pts < self.part.start:
                continue
            if self.part.end is not None and frame.pts >= self.part.end:
                break
            self._check(frame)
            number, index = counter.take(frame.pts, frame.key_frame), counter.index - 1
            self.number, self.index = counter.number, counter.index
            if number is not None and self.is_wanted(number):
                yield number, index, frame

    def _by_packets(self, context: Any, packets: Iterable[Any], counter: _Counter) -> Iterator[tuple[int, int, Any]]:
        for frame in _feed(context, self._needed(packets, counter)):
            if frame.pts is not None and frame.pts < self.start:
                continue  # shown before the keyframe, and not decoded in full
            if not self.expected or frame.pts != heapq.heappop(self.expected):
                raise _UnreliableError
            if frame.pts == self.start and not _is_start(frame, self.start):
                raise _UnreliableError
            self._check(frame)
            if found := self.wanted.pop(frame.pts, None):
                yield *found, frame
                self.number, self.index = next(iter(self.wanted.values()), (counter.number, counter.index))
        if self.expected:
            raise _UnreliableError

    def _needed(self, packets: Iterable[Any], counter: _Counter) -> Iterator[Any]:
        """The packets from each keyframe up to the last frame that is wanted; None where some are left out."""
        running, ahead = False, 0  # ahead: packets of the group that were fed with the one before
        for group in _groups(packets, self.part):
            wanted = self._wanted(group, counter)
            sequence = group.packets + group.lead
            need = max((at + 1 for at, packet in enumerate(sequence) if packet.pts in wanted), default=0)
            if need and not running:
                self.start, running = group.key, True
            for packet in sequence[ahead:need]:
                if not packet.is_discard and packet.pts >= self.start:
                    heapq.heappush(self.expected, packet.pts)
                self.fed = packet.dts
                yield packet
            ahead = max(ahead, need) - len(group.packets)
            if ahead < 0 and running:
                yield None
                if self.expected:
                    raise _UnreliableError
                running = False
            ahead = max(ahead, 0) if running else 0

    def _wanted(self, group: _Group, counter: _Counter) -> set[int]:
        """pts of the group's frames that are wanted, which are noted."""
        wanted = set()
        for pts in group.shown:
            number = counter.take(pts, pts == group.key)
            if number is not None and self.is_wanted(number):
                self.wanted[pts] = number, counter.index - 1
                wanted.add(pts)
        self.number, self.index = next(iter(self.wanted.values()), (counter.number, counter.index))
        return wanted

    def _check_end(self, container: Any, stream: Any, counter: _Counter) -> None:
        """Raises Failure where the video, or the part, has fewer frames than it says."""
        self.number, self.index = counter.number, counter.index
        if self.part.end is not None:
            if counter.number < self.part.stop:
                raise Failure("DamagedVideo", f"{self.part.stop - counter.number} frames are missing here")
            return
        entries: Any = stream.index_entries if _format(container) == "mov" else ()
        if len(entries) and self.dts is not None and entries[-1].timestamp > self.dts:
            raise Failure("TruncatedVideo", "the file ends before the frames that its index lists")
        if _format(container) == "matroska" and _is_cut(self.source):
            seconds, duration = float(self.ended * counter.time_base), _duration(container, stream)
            if duration is None or duration - seconds > 1.5 / counter.rate:
                of = f" of {duration:.3f}" if duration else ""
                raise Failure("TruncatedVideo", f"the file is cut, and the video ends after {seconds:.3f}{of} s")
        if counter.number == self.part.first:
            raise Failure("NoFrames", "the video has no frames" if not counter.index else "no frame is a keyframe")
        self.last_number = counter.number - 1
