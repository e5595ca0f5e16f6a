"""Tars, plain or compressed, as WebDataset's samples: each picture or video is a record, what is beside it metadata."""

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from shardsight.decode import pictures, video
from shardsight.row import Failure, digest
from shardsight.sources.archive import Archive, Member
from shardsight.sources.files import ShardFile
from shardsight.sources.metadata import dumps, plain
from shardsight.sources.units import Record, Unit, Wanted, printable
from shardsight.storage import Storage

ENDINGS = pictures.ENDINGS.union(video.ENDINGS)
SIDECARS = ("json", "txt", "cls", "prefix", "suffix")  # endings of the files that become a sample's metadata
MAX_SIDECAR = 16 << 20  # bytes

# A sample's key and suffix, which begins after the first dot: `dir/b.left.png` has the key `dir/b`.
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


def records(unit: Unit, file: ShardFile, storage: Storage, wanted: Wanted, ignored: "Counter[str]") -> Iterator[Record]:
    """Consecutive members of one key are a sample; each of its pictures is a record with the sample's metadata.
    Raises Failure where the archive cannot be read further."""
    assert unit.uri is not None
    name = printable(unit.uri)
    names: set[int] = set()
    sample = _Sample(ignored)
    position = 0
    archive = Archive(file)
    try:
        for member in archive:
            match = None if member.isdir() or member.isdev() else _SAMPLE.fullmatch(member.name)
            suffix = match[2].lower() if match else ""
            ending = suffix.rpartition(".")[2]
            if not match or (f".{ending}" not in ENDINGS and ending not in SIDECARS):
                ignored[_reason(member)] += 1
                continue
            if match[1] != sample.key or suffix in sample.suffixes:
                yield from sample.records()
                sample = _Sample(ignored, match[1])
            sample.suffixes.add(suffix)
            if ending in SIDECARS:
                sample.add_sidecar(suffix, archive, member, bool(sample.pictures) or wanted(position, None))
                continue
            id = f"{name}#{_unique(printable(member.name), names)}"
            record = Record(name, position, id, name)
            if wanted(position, id):
                record = _with_data(record, archive, member)
            else:
                archive.skip(member)
            sample.pictures.append(record)
            position += 1
    except Failure:
        yield from sample.records()
        raise
    yield from sample.records()


@dataclass
class _Sample:
    ignored: "Counter[str]"
    key: str = ""
    suffixes: set[str] = field(default_factory=set)
    pictures: list[Record] = field(default_factory=list)
    sidecars: "Counter[str]" = field(default_factory=Counter)
    metadata: dict[str, Any] = field(default_factory=dict)

    def add_sidecar(self, suffix: str, archive: Archive, member: Member, wanted: bool) -> None:
        ending = suffix.rpartition(".")[2]
        if member.size > MAX_SIDECAR:
            self.ignored[f".{ending} files of more than {MAX_SIDECAR >> 20} MiB"] += 1
            return
        if wanted:
            try:
                self.metadata[suffix] = _parse(archive.read(member).decode("utf-8-sig", "replace"), ending)
            except Failure as failure:
                if archive.truncated:
                    raise
                self.ignored[f".{ending} files that cannot be read: {failure.type}"] += 1
                return
        self.sidecars[ending] += 1

    def records(self) -> Iterator[Record]:
        if not self.pictures:
            for ending, count in self.sidecars.items():
                self.ignored[f".{ending} files without a picture"] += count
        metadata = dumps(self.metadata) if self.metadata else None
        return (replace(record, metadata=metadata) for record in self.pictures)


def _parse(text: str, ending: str) -> Any:
    """A sidecar's content; its text if it is not what its ending says."""
    try:
        if ending == "json":
            return plain(json.loads(text))
        if ending == "cls" and text.strip().isdecimal():
            return int(text)
    except (ValueError, RecursionError):  # also for numbers of thousands of digits and lists nested as deep
        pass
    return text


def _with_data(record: Record, archive: Archive, member: Member) -> Record:
    try:
        return replace(record, data=archive.read(member))
    except Failure as failure:
        return replace(record, failure=failure)


def _reason(member: Member) -> str:
    """Why a member is no record."""
    if member.isdir():
        return "folders"
    if member.isdev():
        return "devices and pipes"
    return reason(posixpath.basename(member.name))


def reason(name: str) -> str:
    """Why a file of this name is no picture, for counting."""
    if name.startswith("."):
        return "hidden files"
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    return f".{printable(ending)} files" if 0 < len(ending) <= 10 else "files without a known ending"


def _unique(name: str, seen: set[int]) -> str:
    """A member's name; the second of that name in a tar becomes name#2. seen: hashes, smaller than the names."""
    candidate, count = name, 1
    while (key := int.from_bytes(digest(candidate)[:8])) in seen:
        count += 1
        candidate = f"{name}#{count}"
    seen.add(key)
    return candidate
