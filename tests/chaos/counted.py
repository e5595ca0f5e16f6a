"""The job, noting in the file $COUNTED the id of each picture and each video's frame that it decodes, and splitting
videos into parts of $PART frames: python -m tests.chaos.counted …"""

import os
import sys
from typing import Any

from shardsight import pipeline
from shardsight.cli import annotate
from shardsight.decode import split
from shardsight.decode.frames import Load
from shardsight.decode.video import VideoFrame
from shardsight.models import selection
from shardsight.sources import Record


class Counted(Load):
    def row(self, record: Record) -> dict[str, Any]:
        return note(super().row(record))

    def frame(self, record: Record, frame: VideoFrame) -> dict[str, Any]:
        return note(super().frame(record, frame))


def note(row: dict[str, Any]) -> dict[str, Any]:
    with open(os.environ["COUNTED"], "a") as file:
        file.write(row["id"] + "\n")
    return row


if __name__ == "__main__":
    selection.Load = Counted  # type: ignore[misc]
    if part := os.environ.get("PART"):
        split.LONG, pipeline.FRAMES = 0, int(part)
    sys.exit(annotate())
