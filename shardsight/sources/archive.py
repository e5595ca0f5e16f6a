"""Members of a tar, plain or compressed, to its very end, and what its links mean.

tarfile remembers all that it has read, ends quietly where an archive is damaged or another one is joined to it, and
follows a link by reading everything; this does neither.
"""

import io
import posixpath
import tarfile
import tempfile
from array import array
from collections.abc import Iterator

import numpy as np

from shardsight.row import Failure, digest
from shardsight.sources.compression import CHUNK, decompressed
from shardsight.sources.shard import ShardFile
from shardsight.sources.units import MAX_BYTES, too_large

Member = tarfile.TarInfo
BLOCK = tarfile.BLOCKSIZE
MAX_LINKS = 40  # that lead to each other, as Linux has it
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}


class Archive:
    """Iterates over its members. Raises Failure where the file is no tar, or where it cannot be read on.

    cut: the archive ends within the member that was read last, whose Failure has said so.
    """

    def __init__(self, file: ShardFile) -> None:
        self.shard = file
        head = file.peek(8)[:8]
        if not head:
            raise Failure("EmptyFile", "the file holds no bytes")
        content = decompressed(file)
        self.compressed = content is not None
        self.file: io.BufferedReader = content or file
        self.cut = False
        self._skipped: Member | None = None
        self._index: _Index | None = None
        try:
            self.tar = tarfile.open(fileobj=self.file, mode="r:")  # noqa: SIM115  (closed with the file)
        except Exception as error:
            other = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)
            reason = f"not a tar: {error}"
            if other:
                reason = f"compressed with {other}, where plain tars, gzip and zstd are read: compress it anew"
            raise Failure("NotATar", reason) from None

    def __iter__(self) -> Iterator[Member]:
        try:
            for member in _members(self.tar, self.file):
                yield member
                if self.cut:
                    return
        except Failure:
            self.shard.check()
            # A member that ends too early is one failure, be it read or only skipped.
            if not self._skipped or self._has(self._skipped):
                raise

    def skip(self, member: Member) -> None:
        """Instead of `read`."""
        self._skipped = None if _is_link(member) or member.size > MAX_BYTES else member

    def read(self, member: Member) -> bytes:
        """Its content, of a link that of what it leads to. Raises Failure."""
        self._skipped = None
        link = _is_link(member)
        try:
            return self._links().read(member) if link else _content(self.tar, member)
        except Failure as failure:
            self.shard.check()
            self.cut = failure.type == "TruncatedTar" and not link
            raise

    def _has(self, member: Member) -> bool:
        """Whether the file holds all of a member's bytes."""
        try:
            self.file.seek(member.offset_data + member.size - 1)
            return member.size == 0 or bool(self.file.read(1))
        except Exception:
            self.shard.check()
            return False

    def _links(self) -> "_Index":
        if self._index is None:
            if self.compressed:  # as links lead back and forth, and each way back would start anew
                self.file = self.tar.fileobj = _unpacked(self.file)
            self._index = _Index(self.file)
            self.shard.check()
        return self._index


class _Index:
    """Where the members of each name are: 16 bytes a member, as only archives with links need it.

    file: one that can be read in any order.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        file.seek(0)
        self.tar = tarfile.TarFile(fileobj=file)
        names, offsets = array("Q"), array("q")
        try:
            for member in _members(self.tar, file):
                if not member.isdir():
                    names.append(_hash(_normal(member.name)))
                    offsets.append(member.offset)
        except Failure:  # where the archive is damaged; links into what comes before still lead somewhere
            pass
        order = np.lexsort((offsets, names))
        self.names, self.offsets = np.array(names, np.uint64)[order], np.array(offsets, np.int64)[order]

    def read(self, link: Member) -> bytes:
        member = link
        for _ in range(MAX_LINKS):
            found = self._follow(member)
            if found is None:
                raise Failure("BrokenLink", f"a link to {link.linkname}, which the archive does not hold")
            if not _is_link(found):
                return _content(self.tar, found)
            member = found
        raise Failure("BrokenLink", f"a link to {link.linkname}, which leads in a circle")

    def _follow(self, link: Member) -> Member | None:
        """What a link names, maybe through links of folders."""
        name = _target(link)
        for _ in range(MAX_LINKS):
            found = self._find(name, link.offset if link.islnk() else None)
            if found:
                return found
            parents = [name[:at] for at, letter in enumerate(name) if letter == "/" and at]
            linked = ((parent, folder) for parent in reversed(parents) if (folder := self._find(parent, None)))
            parent, folder = next(((parent, folder) for parent, folder in linked if folder.issym()), ("", None))
            if folder is None:
                return None
            name = _normal(posixpath.join(_target(folder), name[len(parent) + 1 :]))
        return None

    def _find(self, name: str, before: int | None) -> Member | None:
        """The last of a name, as unpacking leaves it; or the last `before` an offset, as a hard link means what was
        unpacked by then, else the next one."""
        key = np.uint64(_hash(name))
        first, last = np.searchsorted(self.names, key), np.searchsorted(self.names, key, "right")
        offsets = self.offsets[first:last]
        if before is not None:
            earlier = offsets[offsets < before]
            offsets = earlier if len(earlier) else offsets[offsets > before][:1]
        if not len(offsets):
            return None
        assert self.tar.fileobj
        self.tar.fileobj.seek(int(offsets[-1]))
        try:
            return Member.fromtarfile(self.tar)
        except (tarfile.TarError, OSError) as error:
            raise Failure("BrokenLink", f"where it leads, the archive cannot be read: {error}") from None


def _members(tar: tarfile.TarFile, file: io.BufferedReader) -> Iterator[Member]:
    """Of all archives that are joined in a file. Raises Failure."""
    while True:
        try:
            member = tar.next()
        except Exception as error:
            raise Failure("TruncatedTar", f"the archive ends in the middle of a member: {error}") from None
        tar.members.clear()  # type: ignore[attr-defined]
        if member is None:
            member = _joined(tar, file)
            if member is None:
                return
        yield member


def _joined(tar: tarfile.TarFile, file: io.BufferedReader) -> Member | None:
    """The first member of the archive that follows the end of one, None where the file ends with it."""
    position: int = tar.offset
    try:
        file.seek(position)
        block = file.read(BLOCK)
        # A header begins with a name: where a zero stands, be it the file's last byte, no member follows.
        if block and not block.strip(b"\0"):
            while block and not (rest := block.lstrip(b"\0")):
                position += len(block)
                block = file.read(CHUNK)
            if not block:
                return None
            position += len(block) - len(rest)
            tar.offset = position
            member = tar.next()
            if member:
                tar.members.clear()  # type: ignore[attr-defined]
                return member
    except Exception:
        pass
    raise Failure("TruncatedTar", f"the archive is cut off or damaged at byte {position:,}; what follows is not read")


def _content(tar: tarfile.TarFile, member: Member) -> bytes:
    if member.size > MAX_BYTES:
        raise too_large(member.size)
    stream = tar.extractfile(member)
    if stream is None:
        raise Failure("NotAFile", "neither a file nor a link to one")
    try:
        return stream.read()
    except Exception as error:
        reason = f"the archive ends or is damaged within this member of {member.size:,} bytes: {error}"
        raise Failure("TruncatedTar", reason) from None


def _unpacked(content: io.BufferedReader) -> io.BufferedReader:
    """A temporary file, which the operating system removes, of what can be decompressed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the archive)
    content.seek(0)
    try:
        while chunk := content.read1(CHUNK):
            file.write(chunk)
    except Exception:  # the reader meets the end that is missing
        pass
    file.seek(0)
    return file  # type: ignore[return-value]


def _is_link(member: Member) -> bool:
    return member.islnk() or member.issym()


def _target(link: Member) -> str:
    """A hard link's from the archive's root, a symbolic link's from its own folder."""
    return _normal(link.linkname if link.islnk() else posixpath.join(posixpath.dirname(link.name), link.linkname))


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _hash(name: str) -> int:
    return int.from_bytes(digest(name)[:8])
