"""A request's video: its limits, and its decoding as in the job, in a process that may die or be killed."""

import io
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from shardsight.decode.frames import Load, default_fatal_signals
from shardsight.decode.video import extent
from shardsight.isolate import DEATHS
from shardsight.row import Failure
from shardsight.sources import Record

TABLE_BYTES = 8 << 20  # of frames: what a call of a model gets


@dataclass(frozen=True)
class Video:
    """An encoded video. load: which of its frames, at which size. seconds, frames, pixels: what it may have at most."""

    name: str
    data: bytes
    load: Load
    seconds: float
    frames: int
    pixels: int

    def tables(self) -> Iterator[pa.Table]:
        """Tables of decode.frames.TABLE. Raises Failure where it is no video, or too large."""
        found = extent(io.BytesIO(self.data), self.load.sampling)
        self._check(found.width * found.height, found.seconds or 0, found.frames or 0)
        return self.load.tables(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Checked again, as only decoding tells what some videos hold."""
        first = None
        for number, row in enumerate(self.load.frames(Record(None, 0, self.name, self.name, self.data, last=True))):
            if row["error"] is None:
                first = row["pts_seconds"] if first is None else first
                self._check(row["width"] * row["height"], row["pts_seconds"] - first, number + 1)
            yield row

    def _check(self, pixels: int, seconds: float, frames: int) -> None:
        if pixels > self.pixels:
            raise Failure("TooManyPixels", f"frames of {pixels:,} pixels; at most {self.pixels:,} are decoded here")
        if seconds > self.seconds:
            raise Failure("TooManySeconds", f"a video of {seconds:.1f} s or more; at most {self.seconds:g} s are read")
        if frames > self.frames:
            found = f"{frames} frames or more; at most {self.frames} of a video are annotated here"
            raise Failure("TooManyFrames", f"{found}: ask for fewer with fps, every or keyframes")


async def read(video: Video) -> AsyncGenerator[pa.Table, None]:
    """Its tables, decoded a little ahead in a process of its own, which is killed once nobody reads on.

    Raises Failure.
    """
    tables = _decode.remote(video)
    try:
        async for table in tables:
            yield await table
    except Failure as failure:  # as Ray raises it, it would not pass another process
        raise Failure(failure.type, failure.message) from None
    except DEATHS:
        raise Failure("DecoderDied", "the process that decoded the video died: it cannot be decoded here") from None
    finally:
        ray.cancel(tables, force=True)


# No CPU is reserved: the models' replicas may have them all.
@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=2)
def _decode(video: Video) -> Iterator[pa.Table]:
    default_fatal_signals()
    yield from video.tables()
