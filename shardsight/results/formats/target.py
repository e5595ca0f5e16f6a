"""Where a data set is written: a folder, or a prefix in a store."""

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

from shardsight.results.formats.sample import Picture
from shardsight.storage import Storage, is_remote

AT_A_TIME = 16  # requests to a store


class Target:
    """Writes files by their names below `folder`, several at a time into a store; a context manager, at whose end all
    of them are written. Raises OSError and the errors of Storage."""

    def __init__(self, folder: str, storage: Storage) -> None:
        self.folder, self.storage = folder.rstrip("/"), storage
        self.remote = is_remote(folder)
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "Target":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with self._pool:
            if not failed:
                self.wait()

    def wait(self) -> None:
        """Until all that was written is there."""
        while self._pending:
            self._pending.popleft().result()

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def write(self, name: str, data: bytes) -> None:
        if self.remote:
            self._pending.append(self._pool.submit(self.storage.write, self.path(name), data))
            while len(self._pending) > 2 * AT_A_TIME:
                self._pending.popleft().result()
            return
        with open(self._local(name), "wb") as file:
            file.write(data)

    def put(self, name: str, picture: Picture) -> None:
        """A picture, as a link where that is wanted."""
        if picture.link and not self.remote:
            os.symlink(picture.link, self._local(name))
        else:
            self.write(name, picture.data)

    def write_json(self, name: str, value: Any) -> None:
        """After all that was written before it, and before all that comes: it may say what is there."""
        self.wait()
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False).encode())
        self.wait()

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file to be written piece by piece, which is there once it is whole."""
        folder = None if self.remote else os.path.dirname(self._local(name))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as place:
            whole = os.path.join(place, "file")
            with open(whole, "wb") as file:
                yield file
            if self.remote:
                path = self.path(name).partition("://")[2]
                self.storage.filesystem(self.folder).put_file(whole, path)
            else:
                os.replace(whole, self._local(name))

    def make_folder(self, name: str) -> None:
        """An empty folder, of which a store knows nothing."""
        if not self.remote:
            os.makedirs(self.path(name), exist_ok=True)

    def _local(self, name: str) -> str:
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path


class Values:
    """A JSON array, or with keys an object, that is kept in a temporary file until it is its turn."""

    def __init__(self, brackets: str = "[]") -> None:
        self.brackets = brackets
        self.count = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the object)

    def add(self, value: Any, key: str | None = None) -> None:
        text = "" if key is None else f"{json.dumps(key)}: "
        self._file.write(f"{',' * bool(self.count)}\n{text}{json.dumps(value)}".encode())
        self.count += 1

    def copy_to(self, file: IO[bytes]) -> None:
        start, end = self.brackets[0], self.brackets[1]
        file.write(start.encode())
        self._file.seek(0)
        shutil.copyfileobj(self._file, file, 1 << 20)
        file.write(f"\n{end}".encode())


def write_document(target: Target, name: str, fields: dict[str, Any]) -> None:
    """A JSON object, some fields of which may be Values."""
    with target.open(name) as file:
        for number, (key, value) in enumerate(fields.items()):
            file.write(f"{',' if number else '{'}\n{json.dumps(key)}: ".encode())
            if isinstance(value, Values):
                value.copy_to(file)
            else:
                file.write(json.dumps(value).encode())
        file.write(b"}\n")
