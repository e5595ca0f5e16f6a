"""Long videos → their parts, so that several readers work on them."""

from dataclasses import dataclass, replace

import pyarrow as pa

from shardsight.decode import video
from shardsight.decode.video import Sampling
from shardsight.results.coverage import merge
from shardsight.row import Failure
from shardsight.sources import ShardFile, Unit, open_file, pack, unpack
from shardsight.storage import Storage

LONG = 16 << 20  # bytes, above which a video is split
FRAMES = 1200  # of a part, at least


def is_long(unit: Unit) -> bool:
    """Whether a unit is a video that is worth its splitting, for which its packets are read once more."""
    return unit.kind == "video" and (unit.size or 0) > LONG


@dataclass(frozen=True)
class Split:
    """storage, sampling: as of Load. frames: of a part, at least."""

    storage: Storage
    sampling: Sampling
    frames: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A table with packed Units in the column `unit` → the same, of long videos one for each part that is left."""
        units = map(unpack, batch["unit"].to_pylist())
        parts = [part for unit in units for part in (self.parts(unit) if is_long(unit) else [unit])]
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
