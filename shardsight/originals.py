"""The pictures of a job's rows, read again from where the job read them."""

import io
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import simplejpeg

from shardsight.decode import video
from shardsight.decode.pictures import stored_size
from shardsight.decode.video import Sampling
from shardsight.row import Failure, video_of
from shardsight.sources import Record, open_file, pictures
from shardsight.sources.files import AHEAD, ahead, fetch
from shardsight.sources.web import is_web
from shardsight.storage import Storage

CHANGED = "ChangedInput"  # type of the Failure for a picture that is not the one that the job read

Rows = Mapping[str, Mapping[str, Any]]  # by id: with `uri`, `width`, `height`, `frame_index` and `version`


class Originals:
    """job: the content of its job.json."""

    def __init__(self, job: Mapping[str, Any], storage: Storage) -> None:
        asked = job["configuration"]
        self.sampling = Sampling(asked.get("fps"), asked.get("every"), bool(asked.get("keyframes")))
        self.image_column = asked.get("image_column")
        self.storage = storage
        self._versions: dict[str, str | None] = {}  # of shards and videos

    def read(self, rows: Rows) -> Iterator[tuple[str, bytes | Failure]]:
        """(id, encoded picture, of a video's frame a JPEG; or why there is none), in any order.

        Each tar, Parquet file and video is read once, and no further than needed. A row with a `version` fails if its
        file has another one by now, any other if its picture has another size. Raises StorageError.
        """
        stills = {id: row for id, row in rows.items() if row["frame_index"] is None}
        for id, data in self._stills(stills):
            if isinstance(data, bytes) and not _has_size(data, stills[id]["width"], stills[id]["height"]):
                yield id, _changed()
            else:
                yield id, data
        yield from self._frames({id: row for id, row in rows.items() if row["frame_index"] is not None})

    def _stills(self, rows: Rows) -> Iterator[tuple[str, bytes | Failure]]:
        shards = []
        loose = []
        for id, row in rows.items():
            if not id.startswith(f"{row['uri']}#"):
                loose.append(id)
            elif self._is_changed(row["uri"], row["version"]):
                yield id, _changed()
            else:
                shards.append({"id": id, "uri": row["uri"]})

        def read(id: str) -> Record:
            uri = rows[id]["uri"]
            record = Record(None, 0, id, uri)
            try:
                if id == uri and _differs(rows[id]["version"], _version(uri, self.storage)):
                    raise _changed()
                return replace(record, data=fetch(uri, self.storage))
            except Failure as failure:
                return replace(record, failure=failure)

        for record in ahead(read, loose, AHEAD if any("://" in rows[id]["uri"] for id in loose) else 0):
            yield record.id, record.failure or record.data or b""
        yield from pictures(shards, self.storage, self.image_column)

    def _is_changed(self, uri: str, version: str | None) -> bool:
        """Of a shard or a video, which is asked for once."""
        if uri not in self._versions:
            self._versions[uri] = _version(uri, self.storage)
        return _differs(version, self._versions[uri])

    def _frames(self, rows: Rows) -> Iterator[tuple[str, bytes | Failure]]:
        videos: dict[str, dict[int, str]] = {}  # the video's id → frame_index → the row's id
        for id, row in rows.items():
            videos.setdefault(video_of(id), {})[row["frame_index"]] = id
        shards = []
        for name, ids in videos.items():
            row = rows[next(iter(ids.values()))]
            own = name == row["uri"] or name.startswith(f"{row['uri']}#")  # else the version is that of a list of uris
            if own and self._is_changed(row["uri"], row["version"]):
                yield from ((id, _changed()) for id in ids.values())
            elif name.startswith(f"{row['uri']}#"):
                shards.append({"id": name, "uri": row["uri"]})
            else:
                yield from self._decoded(row["uri"], ids)
        for name, data in pictures(shards, self.storage, self.image_column):
            if isinstance(data, Failure):
                yield from ((id, data) for id in videos[name].values())
            else:
                yield from self._decoded(data, videos[name])

    def _decoded(self, source: str | bytes, ids: dict[int, str]) -> Iterator[tuple[str, bytes | Failure]]:
        """source: the video, or where it is. ids: frame_index → the row's id."""
        left = dict(ids)
        failure = Failure("MissingFrame", "the video does not hold this frame any more")
        first = min(ids) // (self.sampling.every or 1)
        counted = not (self.sampling.fps or self.sampling.keyframes)  # then the index tells which sampled frame it is
        done = [(0, first)] if counted and first else []
        try:
            file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open_file(source, self.storage)
            with file, closing(video.read(file, self.sampling, done=done)) as frames:
                for frame in frames:
                    failure = frame.failure or failure
                    if frame.frame is not None and frame.index in left:
                        yield left.pop(frame.index), jpeg(frame.frame)
                    if not left:
                        return
        except Failure as error:
            failure = error
        yield from ((id, failure) for id in left.values())


def jpeg(frame: np.ndarray) -> bytes:
    """A frame, RGB uint8 (h, w, 3), as `--keep-images` keeps it."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=95))


def _version(uri: str, storage: Storage) -> str | None:
    """A file's version now; None where it cannot be asked for, which reading the file then explains."""
    try:
        return None if is_web(uri) else storage.info(uri).version
    except (FileNotFoundError, PermissionError, ValueError):
        return None


def _differs(then: str | None, now: str | None) -> bool:
    """Whether both versions are known, and another."""
    return bool(then and int(then, 16) and now and then != now)


def _has_size(data: bytes, width: int, height: int) -> bool:
    """Of either orientation, as EXIF may turn the picture."""
    size = stored_size(data)
    return size is not None and sorted(size) == sorted((width, height))


def _changed() -> Failure:
    return Failure(CHANGED, "it has changed since the job read it")
