"""Small videos for tests."""

import io
from collections.abc import Iterable

import av
import numpy as np


def panned(picture: np.ndarray, count: int, step: int = 4) -> Iterable[np.ndarray]:
    """A picture, RGB uint8 (h, w, 3), that moves to the right by so many pixels a frame and comes in again."""
    return (np.roll(picture, number * step, axis=1) for number in range(count))


def numbered(count: int) -> Iterable[np.ndarray]:
    """Pictures, 128 × 96, that say which one each is: its number's bits, from the left, are white and black stripes."""
    for number in range(count):
        bits = [number >> (7 - bit) & 1 for bit in range(8)]
        yield np.broadcast_to(np.repeat(bits, 16)[None, :, None] * np.uint8(255), (96, 128, 3)).astype(np.uint8)


def number_of(picture: np.ndarray) -> int:
    """The number of one of those pictures, (h, 128, 3), after whatever coding."""
    return sum(1 << (7 - bit) for bit in range(8) if picture[:, 16 * bit + 4 : 16 * bit + 12].mean() > 127)


def encode(frames: Iterable[np.ndarray], format: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """RGB uint8 frames (h, w, 3) of one size, 25 a second → a video. options: of the codec, as g for its keyframes."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decoded(data: bytes) -> list[tuple[float, np.ndarray]]:
    """(seconds, RGB uint8 (h, w, 3)) of each frame, as PyAV decodes them one after the other."""
    with av.open(io.BytesIO(data)) as container:
        frames = container.decode(container.streams.video[0])
        return [(float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")) for frame in frames]
