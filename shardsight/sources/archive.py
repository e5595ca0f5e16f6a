"""The members of a tar, plain or compressed with gzip or zstd, in order and to the end of the file.

tarfile parses them. By itself it would keep every member in memory, stop without an error at a damaged header or where
a second archive is appended, and read the whole archive again for each link.
"""

import gzip
import io
import posixpath
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zstandard

from shardsight.row import Failure, digest
from shardsight.sources.files import ShardFile
from shardsight.sources.units import MAX_BYTES, too_large

Member = tarfile.TarInfo
CHUNK, KEPT = 1 << 20, 64 << 10
MAX_LINKS = 40  # from link to link, as in Linux
_CODECS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\x28\xb5\x2f\xfd": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
}
_UNSUPPORTED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}


class Archive:
    """Iterates over the members of a tar. Raises Failure if the file is not a tar, or where it cannot be read further.

    truncated: the file ends within the member that was last read or skipped.
    """

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        head = shard.peek(8)[:8]
        if not head:
            raise Failure("EmptyFile", "the file holds no bytes")
        codec = next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)
        self.compressed = codec is not None
        self.file: io.BufferedReader = shard
        if codec:
            self.file = io.BufferedReader(_Decompressed(shard, codec), CHUNK)
        self.truncated = False
        self._links: _Links | None = None
        try:
            self.tar = tarfile.TarFile(fileobj=self.file)
        except Exception as error:
            other = next((name for magic, name in _UNSUPPORTED.items() if head.startswith(magic)), None)
            reason = f"not a tar: {error}"
            if other:
                reason = f"compressed with {other}, where a plain tar, gzip or zstd is expected: compress it again"
            raise Failure("NotATar", reason) from None

    def __iter__(self) -> Iterator[Member]:
        try:
            for member in _members(self.tar, self.file):
                yield member
                if self.truncated:
                    return
        except Failure:
            self.shard.check()
            raise

    def read(self, member: Member) -> bytes:
        """The content of a file, or of what a link leads to. Raises Failure."""
        link = _is_link(member)
        try:
            return self._link_targets().read(member) if link else _content(self.tar, member)
        except Failure as failure:
            self.shard.check()
            self.truncated = failure.type == "TruncatedTar" and not link
            raise

    def skip(self, member: Member) -> None:
        """Instead of `read`; the iteration then ends where it would end after `read`."""
        if _is_link(member) or not 0 < member.size <= MAX_BYTES:
            return
        try:
            self.file.seek(member.offset_data + member.size - 1)
            self.truncated = not self.file.read(1)
        except Exception:
            self.shard.check()
            self.truncated = True

    def _link_targets(self) -> "_Links":
        if self._links is None:
            # Links lead back and forth, and a compressed file can only be read forward.
            self._links = _Links(_decompressed_copy(self.file) if self.compressed else self.file)
            self.shard.check()
        return self._links


class _Links:
    """Resolves links with an index of all members, of 16 bytes each, which is built for archives with links only.

    file: one that can be read in any order.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        file.seek(0)
        self.tar, self.file = tarfile.TarFile(fileobj=file), file
        names, offsets = array("Q"), array("q")
        try:
            for member in _members(self.tar, file):
                if not member.isdir():
                    names.append(_hash(posixpath.normpath(member.name)))
                    offsets.append(member.offset)
        except Failure:  # links to what comes before the damage can still be resolved
            pass
        order = np.argsort(np.array(names, np.uint64), kind="stable")
        self.names, self.offsets = np.array(names, np.uint64)[order], np.array(offsets, np.int64)[order]

    def read(self, link: Member) -> bytes:
        name, before = _target(link), link.offset if link.islnk() else None
        for _ in range(MAX_LINKS):
            found = self._find(name, before)
            if found is None:
                name = self._through_folder(name, link)
            elif _is_link(found):
                name, before = _target(found), found.offset if found.islnk() else None
            else:
                return _content(self.tar, found)
        raise Failure("BrokenLink", f"a link to {link.linkname}, which leads in a circle")

    def _through_folder(self, name: str, link: Member) -> str:
        """The name without its innermost folder that is a symbolic link."""
        parent = posixpath.dirname(name)
        while parent.strip("/"):
            folder = self._find(parent, None)
            if folder and folder.issym():
                return posixpath.normpath(posixpath.join(_target(folder), name[len(parent) + 1 :]))
            parent = posixpath.dirname(parent)
        raise Failure("BrokenLink", f"a link to {link.linkname}, which the archive does not hold")

    def _find(self, name: str, before: int | None) -> Member | None:
        """The last member of a name, as it overwrites the earlier ones. With `before`, the offset of a hard link: the
        last one before it, which is there when the link is unpacked, else the first one after it."""
        key = np.uint64(_hash(name))
        offsets = self.offsets[np.searchsorted(self.names, key) : np.searchsorted(self.names, key, "right")]
        if before is not None:
            earlier = offsets[offsets < before]
            offsets = earlier if len(earlier) else offsets[offsets > before][:1]
        if not len(offsets):
            return None
        self.file.seek(int(offsets[-1]))
        try:
            return Member.fromtarfile(self.tar)
        except (tarfile.TarError, OSError) as error:
            raise Failure("BrokenLink", f"where it leads, the archive cannot be read: {error}") from None


class _Decompressed(io.RawIOBase):
    """The content of a compressed file. Seeking back by more than KEPT bytes decompresses it again from its start.

    It is always decompressed in the same steps: how much of it comes before an error depends on them.
    """

    def __init__(self, file: io.BufferedReader, codec: Callable[[Any], Any]) -> None:
        self.file, self.codec = file, codec
        self.position = 0
        self._start()

    def _start(self) -> None:
        self.file.seek(0)
        self.stream = self.codec(self.file)
        self.kept, self.begin = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("the end of a compressed file is not known before it is read")
        self.position = offset
        if offset < self.begin:
            self._start()
        return offset

    def readinto(self, buffer: Any) -> int:
        while (offset := self.position - self.begin) >= len(self.kept):
            try:
                chunk = self.stream.read1(CHUNK)  # `read` would lose what comes before an error
            except Exception:
                self._start()  # as reading on would leave out what is damaged
                raise
            if not chunk:
                return 0
            self.begin += max(0, len(self.kept) - KEPT)
            self.kept = self.kept[-KEPT:] + chunk
        part = self.kept[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def _decompressed_copy(content: io.BufferedReader) -> io.BufferedReader:
    """A temporary file, to where the content ends or is damaged; the operating system removes it."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the archive)
    content.seek(0)
    while True:
        try:
            chunk = content.read1(CHUNK)
        except Exception:  # Archive's own iteration reports the damage
            break
        if not chunk:
            break
        copy.write(chunk)
    return copy  # type: ignore[return-value]


def _members(tar: tarfile.TarFile, file: io.BufferedReader) -> Iterator[Member]:
    """Those of all archives that are joined in a file. Raises Failure."""
    tar.offset = 0
    file.seek(0)
    while True:
        try:
            member = _next(tar, file)
        except Exception as error:
            reason = f"the archive is cut off or damaged at byte {tar.offset:,} ({error}); what follows is not read"
            raise Failure("TruncatedTar", reason) from None
        if member is None:
            return
        yield member


def _next(tar: tarfile.TarFile, file: io.BufferedReader) -> Member | None:
    """The next member, of the next archive if one ends here; None at the end of the file."""
    if file.tell() != tar.offset:
        file.seek(tar.offset - 1)
        if not file.read(1):
            raise EOFError("unexpected end of data")
    try:
        return Member.fromtarfile(tar)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros ends an archive
        while zeros := file.peek():
            rest = zeros.lstrip(b"\0")
            file.read(len(zeros) - len(rest))
            if rest:
                tar.offset = file.tell()
                return Member.fromtarfile(tar)
        return None
    except tarfile.TruncatedHeaderError:  # type: ignore[attr-defined]
        file.seek(tar.offset)
        if file.read().strip(b"\0"):
            raise
        return None  # part of a block of zeros


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


def _is_link(member: Member) -> bool:
    return member.islnk() or member.issym()


def _target(link: Member) -> str:
    """The path of a hard link starts at the archive's root, that of a symbolic link at its own folder."""
    folder = "" if link.islnk() else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _hash(name: str) -> int:
    return int.from_bytes(digest(name)[:8])
