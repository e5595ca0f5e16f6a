"""What is read: units of work, and the records that they hold."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from shardsight.errors import UsageError
from shardsight.results.coverage import Ranges, merge
from shardsight.row import Failure

MAX_BYTES = 1 << 30  # of one encoded record

# Whether the record at a position, of an id where that is known yet, is to be read and not only counted.
Wanted = Callable[[int, str | None], bool]


class InputError(UsageError):
    """The request names something that cannot be read: one sentence for the user."""


@dataclass(frozen=True)
class Unit:
    """What is read from its start: a tar, a Parquet file, or a group of loose files (`uri` is then None).

    kind: of sources.kinds. versions: of `files`, in their order. skip: positions that are done. stop: where `--limit`
    ends it. uri_column, image_column: of a Parquet file, as the user named them. folder: where the command runs, to
    which relative paths in a Parquet file may refer. version: of the file at `uri`.
    """

    kind: str
    uri: str | None = None
    files: tuple[str, ...] = ()
    versions: tuple[str | None, ...] = ()
    skip: Ranges = field(default_factory=list)
    stop: int | None = None
    uri_column: str | None = None
    image_column: str | None = None
    folder: str | None = None
    version: str | None = None

    def without(self, positions: Iterable[int]) -> "Unit":
        """What is left of it; loose files are then counted anew."""
        if self.kind != "files":
            return replace(self, skip=merge([*self.skip, *((position, position + 1) for position in positions)]))
        gone = set(positions)
        kept = [position for position in range(len(self.files)) if position not in gone]
        return replace(
            self,
            files=tuple(self.files[position] for position in kept),
            versions=tuple(self.versions[position] for position in kept) if self.versions else (),
        )


@dataclass(frozen=True)
class Record:
    """One input. unit and index are its place; `data`, encoded, or `failure` why there is none.

    last: nothing of its unit comes after it. version: of the file that it is read from, where one is known. ignored:
    with the last one, how many entries of the unit hold no picture, by reason. seconds: what reading it took, clock
    and CPU.
    """

    unit: str | None
    index: int
    id: str
    uri: str
    data: bytes | None = None
    failure: Failure | None = None
    metadata: str | None = None
    last: bool = False
    version: str | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)


def printable(uri: str) -> str:
    """A path whose bytes are no UTF-8 as text that Arrow can hold; any other as it is."""
    try:
        return uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a character, as JSON can write it
        return uri.encode("utf-8", "backslashreplace").decode()


def too_large(size: int) -> Failure:
    return Failure("TooManyBytes", f"{size:,} bytes, where at most {MAX_BYTES:,} are read")
