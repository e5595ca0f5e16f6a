"""What is read: units of work, the records that they hold, and the paths by which users name them."""

import os
import pickle
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from shardsight.decode import video
from shardsight.errors import UsageError
from shardsight.results.coverage import Ranges, first_outside, merge
from shardsight.row import Failure
from shardsight.storage import is_remote

MAX_BYTES = 1 << 30  # of one encoded record

# (position, id if it is known yet) → whether the record is to be read, and not only counted.
Wanted = Callable[[int, str | None], bool]


class InputError(UsageError):
    """The request names something that cannot be read: one sentence for the user."""


@dataclass(frozen=True)
class Unit:
    """What one task reads from its start: a tar, a Parquet file, a video or a part of it, or a group of loose files
    (`uri` is then None).

    kind: a key of sources.kinds.KINDS. versions: of `files`, in their order. skip: positions of records that are done.
    frames: record → frames that are done, of videos that are done in part; lengths: of some of them, how many there
    are. stop: the number of records to which `--limit` cuts it. part: of a video. uri_column, image_column: of a
    Parquet file, as the user named them. folder: the job's working directory, for relative paths in a Parquet file.
    version, size in bytes: of the file `uri`.
    """

    kind: str
    uri: str | None = None
    files: tuple[str, ...] = ()
    versions: tuple[str | None, ...] = ()
    skip: Ranges = field(default_factory=list)
    frames: dict[int, Ranges] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    stop: int | None = None
    part: video.Part | None = None
    uri_column: str | None = None
    image_column: str | None = None
    folder: str | None = None
    version: str | None = None
    size: int | None = None

    def without(self, positions: Iterable[int]) -> "Unit":
        """The unit less some of its records. Positions in a group of loose files then start at 0 again."""
        if self.kind != "files":
            return replace(self, skip=merge([*self.skip, *((position, position + 1) for position in positions)]))
        gone = set(positions)
        kept = [position for position in range(len(self.files)) if position not in gone]
        return replace(
            self,
            files=tuple(self.files[position] for position in kept),
            versions=tuple(self.versions[position] for position in kept) if self.versions else (),
        )


def pack(paths: Unit | list[str]) -> bytes:
    """For the driver, which holds all paths of a job: with its version one takes 180 bytes, packed 15."""
    return zlib.compress(pickle.dumps(paths), 1)


def unpack(packed: bytes) -> Any:
    """What was packed."""
    return pickle.loads(zlib.decompress(packed))


@dataclass(frozen=True)
class Record:
    """One encoded picture or video, `data`; or a video that is yet to be opened, `video_uri`; or the `failure` that
    explains why there is none.

    unit, index: its place. last: whether it is the unit's last record. version: of the file that it is read from, if
    known. part, done, length: of a video, the part that is wanted, the numbers of the frames that are done, and how
    many there are, if known. ignored: with the last record, how many entries of the unit hold no picture, by reason.
    seconds: (wall clock, CPU) that reading took.
    """

    unit: str | None
    index: int
    id: str
    uri: str
    data: bytes | None = None
    video_uri: str | None = None
    failure: Failure | None = None
    metadata: str | None = None
    last: bool = False
    version: str | None = None
    part: video.Part | None = None
    done: Ranges = field(default_factory=list)
    length: int | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def first_left(self) -> int:
        """The number of its first frame that is not done."""
        return first_outside(self.done, self.part.first if self.part else 0)


def printable(uri: str) -> str:
    """A path whose bytes are not UTF-8 as text that Arrow can hold; any other as it is."""
    try:
        return uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
        return uri.encode("utf-8", "backslashreplace").decode()


def names_video(uri: str) -> bool:
    """Whether a path or uri has a video's ending; in one of the web, before its query."""
    path = urlsplit(uri).path if uri.startswith(("http://", "https://")) else uri
    return path.lower().endswith(video.ENDINGS)


def too_large(size: int) -> Failure:
    return Failure("TooManyBytes", f"{size:,} bytes, where at most {MAX_BYTES:,} are read")


def absolute(text: str) -> str:
    """An input's path, made absolute for the workers; a store's uri as it is. Raises InputError."""
    if is_remote(text):
        return text
    path = _local(text)
    if "://" in path:
        raise InputError(f"{text} is neither a path nor a store's uri: uris of the web go into a list")
    return os.path.abspath(os.path.expanduser(path))


def resolve(entry: str, source: str, folder: str) -> str:
    """The path or uri that an entry of a list or a cell of a column names.

    A uri of another scheme than file: is taken as it is. A relative path starts at `folder`, the job's working
    directory, if something is there; else beside `source`, the list or Parquet file.
    """
    path = _local(entry)
    if "://" in path or os.path.isabs(path):
        return path
    if is_remote(source):
        return f"{source.rpartition('/')[0]}/{path}"
    here = os.path.join(folder, os.path.expanduser(path))
    return os.path.normpath(here if os.path.exists(here) else os.path.join(os.path.dirname(source), path))


def _local(text: str) -> str:
    """file:///a%20b, file://localhost/a and Hadoop's file:/a as paths; anything else as it is."""
    if not text.startswith("file:/"):
        return text
    path = text.removeprefix("file:").removeprefix("//localhost")
    if path.startswith("//"):
        path = path[2:]
        if not path.startswith("/"):  # a file of another machine
            return text
    return unquote(path, errors="surrogateescape")
