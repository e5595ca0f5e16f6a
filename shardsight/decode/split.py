"""Long videos → their parts, so that several readers work on them."""

from dataclasses import dataclass, replace

import pyarrow as pa

from shardsight.decode import video
from shardsight.decode.frames import default_fatal_signals
from shardsight.decode.video import Sampling
from shardsight.results.coverage import merge
from shardsight.row import Failure
from shardsight.sources import ShardFile, Unit, open_file, pack, unpack
from shardsight.storage import Storage

LONG = 16 << 20  # bytes, above which a video is split
FRAMES = 1200  # of a part, at least


def is_long(unit: Unit) -> bool:
    """Whether a unit is a video large enough to split, which reads its packets once more."""
    return unit.kind == "video" and (unit.size or 0) > LONG


@dataclass(frozen=True)
class Split:
    """storage, sampling: as of Load. frames: of a part, at least."""

    storage: Storage
    sampling: Sampling
    frames: int = FRAMES

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A table with packed Units in the column `unit`, and which are `long` → those, and of long ones one for each
        part that is left."""
        default_fatal_signals()
        units = zip(map(unpack, batch["unit"].to_pylist()), batch["long"].to_pylist(), strict=True)
        parts = [part for unit, long in units for part in (self.parts(unit) if long else [unit])]
        return pa.table({"unit": pa.array(map(pack, parts), pa.binary())})

    def parts(self, unit: Unit) -> list[Unit]:
        """The parts of a video that are left. Raises the errors of Storage."""
        try:
            with open_file(unit.uri or "", self.storage) as file:
                try:
                    parts = video.split(file, self.sampling, self.frames)
                except Failure:
                    if isinstance(file, ShardFile):
                        file.check()
                    raise
        except Failure:  # its reader will report it
            return [unit]
        done = unit.frames.get(0, [])
        return [replace(unit, part=part) for part in parts if merge([*done, (part.first, part.stop)]) != done]
