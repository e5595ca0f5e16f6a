"""A video's annotated frames as a small video for the browser: those frames alone, each at its time."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from shardsight.decode.video import VideoFrame

_TIME_BASE = Fraction(1, 1000)
# H.264 with a keyframe a second, as a viewer goes back and forth; without B-frames, which most browsers play, too.
_CODEC = {"preset": "veryfast", "crf": "27", "bf": "0", "g": "25"}


@dataclass(frozen=True)
class Limits:
    """side: pixels of the longer side. frames, bytes: of a video, at most."""

    side: int
    frames: int
    bytes: int


@dataclass(frozen=True)
class SmallVideo:
    """uri: a data uri of the MP4. first: its first frame, RGB uint8 (h, w, 3). indices: `frame_index` of its frames."""

    uri: str
    first: np.ndarray
    indices: list[int]


def small_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) of the same aspect and no larger, both even, as H.264 wants them."""
    scale = min(1.0, side / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def encode(frames: Iterable[VideoFrame], wanted: set[int], limits: Limits) -> SmallVideo | None:
    """The frames whose index is wanted, up to the limits, the first at 0 s; None if there are none.

    Where two frames have the same time, or it goes back, the later one is a millisecond after the other.
    """
    file, indices, ticks = io.BytesIO(), list[int](), -1
    first: VideoFrame | None = None
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", options=_CODEC)
        stream.pix_fmt, reformatter = "yuv420p", VideoReformatter()
        stream.time_base = stream.codec_context.time_base = _TIME_BASE
        for frame in frames:
            if frame.frame is None or len(indices) == min(limits.frames, len(wanted)) or file.tell() > limits.bytes:
                break
            if frame.index not in wanted:
                continue
            if first is None:
                first = frame
                stream.width, stream.height = small_size(frame.width, frame.height, limits.side)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.frame), format="rgb24")
            picture = reformatter.reformat(picture, stream.width, stream.height, "yuv420p")
            ticks = max(ticks + 1, round((frame.pts_seconds - first.pts_seconds) / _TIME_BASE))
            picture.pts, picture.time_base = ticks, _TIME_BASE
            container.mux(stream.encode(picture))
            indices.append(frame.index)
        if first is None or first.frame is None:
            return None
        container.mux(stream.encode())
    return SmallVideo(f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}", first.frame, indices)
