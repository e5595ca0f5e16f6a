"""Files that gzip or zstd has compressed, told by how they begin, as one reads any other."""

import gzip
import io
from collections.abc import Callable
from typing import Any

import zstandard

CHUNK = 1 << 20
KEPT = 64 << 10  # of what was read last, to which going back costs nothing

_CODECS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\x28\xb5\x2f\xfd": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
}


def decompressed(file: io.BufferedReader) -> io.BufferedReader | None:
    """The content of a compressed file, None where it is not one."""
    head = file.peek(4)
    codec = next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)
    return io.BufferedReader(_Decompressed(file, codec), CHUNK) if codec else None


class _Decompressed(io.RawIOBase):
    """Going back further than what is kept starts anew."""

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
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("where a compressed file ends is not known before it is read")
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        if self.position < self.begin:
            self._start()
        return self.position

    def readinto(self, buffer: Any) -> int:
        while (offset := self.position - self.begin) >= len(self.kept):
            chunk = self.stream.read1(CHUNK)  # not `read`, which loses what comes before damage
            if not chunk:
                return 0
            self.begin += max(0, len(self.kept) - KEPT)
            self.kept = self.kept[-KEPT:] + chunk
        part = self.kept[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)
