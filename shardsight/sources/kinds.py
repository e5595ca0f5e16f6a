"""What kinds of units there are: the one table from a file's ending to what reads it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardsight.decode.pictures import ENDINGS
from shardsight.sources import parquet, tar
from shardsight.sources.files import read_files
from shardsight.sources.shard import Reader, read_shard
from shardsight.sources.units import Record, Unit
from shardsight.storage import Storage


@dataclass(frozen=True)
class Kind:
    """endings: of files' names, in lower case. reader: None where a file is a record by itself."""

    endings: Iterable[str]
    reader: Reader | None


KINDS = {
    "files": Kind(ENDINGS, None),
    "tar": Kind((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tzst"), tar.records),
    "parquet": Kind((".parquet", ".parq"), parquet.records),
}
LISTS = (".txt", ".csv", ".jsonl")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

_KIND_OF = {ending: kind for kind, known in KINDS.items() for ending in known.endings}


def kind_of(uri: str) -> str | None:
    """The kind that a file's ending tells."""
    name = uri[uri.rfind("/") + 1 :].lower()
    last = name.rfind(".")
    if last < 0:
        return None
    return _KIND_OF.get(name[last:]) or _KIND_OF.get(name[name.rfind(".", 0, last) :])


def read(unit: Unit, storage: Storage, payload: bool = True) -> Iterator[Record]:
    """The unit's records in order, without those in `skip`; payload=False leaves the bytes of a shard's unread."""
    reader = KINDS[unit.kind].reader
    return read_files(unit, storage) if reader is None else read_shard(reader, unit, storage, payload)
