"""The videos of a job's page: their rows, and their frames as small videos."""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardsight.decode import video
from shardsight.decode.video import Sampling
from shardsight.row import FRAME_OF_VIDEO, ROW, Failure, video_of, without_pictures
from shardsight.sources import open_file, pictures
from shardsight.storage import Storage, StorageError, explain
from shardsight.viewer.mp4 import Limits, SmallVideo, encode, small_size
from shardsight.viewer.page import thumbnail

SIDE = 640
FRAMES, BYTES = 2400, 32 << 20  # of all videos of a page together
LEAST_FRAMES, MOST_FRAMES = 60, 300  # of one of them


def videos_of(ids: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(ids, FRAME_OF_VIDEO, "")


class Videos:
    """firsts: a row of each video. files: the results files with rows of a video, by its id. job: the job's record."""

    def __init__(
        self, firsts: list[dict[str, Any]], files: Mapping[str, set[str]], job: Mapping[str, Any], storage: Storage
    ) -> None:
        self.firsts = {video_of(row["id"]): row for row in firsts}
        self.files, self.storage = files, storage
        asked = job["configuration"]
        self.sampling = Sampling(asked.get("fps"), asked.get("every"), bool(asked.get("keyframes")))
        self.image_column = asked.get("image_column")
        share = max(1, len(self.firsts))
        self.limits = Limits(SIDE, max(LEAST_FRAMES, min(MOST_FRAMES, FRAMES // share)), BYTES // share)

    def items(self) -> dict[str, dict[str, Any]]:
        """Of each video, by its id, what `page` shows: no more than its first frames."""
        rows = self._rows()
        found = {}
        for id, made in self._small(rows):
            own, problem, picture, uri = rows[id], None, None, None
            if isinstance(made, SmallVideo):
                kept = set(made.indices)
                own = [row for row in own if row["frame_index"] in kept]
                picture, uri = thumbnail(made.first, SIDE), made.uri
                if own[-1] is not rows[id][-1] or len(rows[id]) > self.limits.frames:
                    problem = f"The first {len(own)} frames are shown."
            else:
                own = own[: self.limits.frames]
                problem = f"The video cannot be shown: {made}"
            frames = {"model": None, "row": own[0], "frames": own}
            found[id] = {"picture": picture, "video": uri, "problem": problem, "rows": [frames]}
        return found

    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        """Of each video the first rows without an error, one more than may be shown."""
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        wanted = pa.array(list(self.firsts), pa.string())
        columns = [name for name in ROW.names if name != "image"]
        for path in sorted(set().union(*(self.files[id] for id in self.firsts))):
            with self.storage.open(path) as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=columns):
                    kept = pc.and_(pc.is_in(videos_of(batch["id"]), wanted), pc.is_valid(batch["frame_index"]))
                    for row in batch.filter(pc.and_(kept, pc.is_null(batch["error"]))).to_pylist():
                        rows[video_of(row["id"])].append(without_pictures(row))
                for own in rows.values():
                    own.sort(key=lambda row: row["frame_index"])
                    del own[self.limits.frames + 1 :]
        return rows

    def _small(self, rows: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, SmallVideo | str]]:
        """(id, the small video or why there is none). Each tar and Parquet file is read once."""
        shards = [row | {"id": id} for id, row in self.firsts.items() if id.startswith(f"{row['uri']}#")]
        left = set(self.firsts)
        for id in left - {row["id"] for row in shards}:
            yield id, self._encoded(rows[id], self.firsts[id]["uri"])
            left.remove(id)
        reason = ""
        try:
            for id, data in pictures(shards, self.storage, self.image_column):
                yield id, data.message if isinstance(data, Failure) else self._encoded(rows[id], data)
                left.remove(id)
        except StorageError as error:
            reason = explain(shards[0]["uri"], error)
        yield from ((id, reason) for id in left)

    def _encoded(self, rows: list[dict[str, Any]], source: str | bytes) -> SmallVideo | str:
        """source: the video, or where it is."""
        try:
            file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open_file(source, self.storage)
            with file:
                wanted = {row["frame_index"] for row in rows[: self.limits.frames]}
                frames = video.read(file, self.sampling, lambda width, height: small_size(width, height, SIDE))
                with closing(frames):
                    return encode(frames, wanted, self.limits) or "it has none of these frames any more"
        except StorageError as error:
            return explain(str(rows[0]["uri"]), error)
        except Exception as error:  # of any kind, as in a job: it concerns this video alone
            return Failure.of(error).message
