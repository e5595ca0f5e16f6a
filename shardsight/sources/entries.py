"""What lies below a folder or prefix, until storage says it itself."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from shardsight.row import version_of
from shardsight.storage import Storage, is_remote


class Entry(NamedTuple):
    uri: str
    size: int | None
    version: str | None


def is_hidden(uri: str, root: str) -> bool:
    return "/." in uri[len(root.rstrip("/")) :]


def info(storage: Storage, uri: str) -> Entry:
    if is_remote(uri):
        return Entry(uri, storage.size(uri), None)
    found = os.stat(uri)
    return Entry(uri, found.st_size, version_of(found.st_size, found.st_mtime_ns))


def walk(storage: Storage, uri: str) -> Iterator[Entry]:
    if is_remote(uri):
        yield from (Entry(name, None, None) for name in storage.walk(uri))
    else:
        yield from _walk_local(uri.rstrip("/") + "/")


def _walk_local(folder: str, above: frozenset[str] = frozenset()) -> Iterator[Entry]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        names = [entry.name + "/" * entry.is_dir() for entry in listing]
    for name in sorted(names):
        if name.endswith("/"):
            yield from _walk_local(folder + name, above | {real})
            continue
        try:
            yield info(Storage(), folder + name)
        except OSError:
            yield Entry(folder + name, None, None)
