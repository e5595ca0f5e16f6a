"""Loose files: a picture each."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from shardsight.row import Failure
from shardsight.sources import web
from shardsight.sources.shard import ANSWERS, failure_of, size_of
from shardsight.sources.units import MAX_BYTES, Record, Unit, printable, too_large
from shardsight.storage import Storage, is_remote

AHEAD = 16  # remote files asked for at once


def read_files(unit: Unit, storage: Storage) -> Iterator[Record]:
    versions = unit.versions or (None,) * len(unit.files)

    def record(item: tuple[int, tuple[str, str | None]]) -> Record:
        clock, cpu = time.perf_counter(), time.thread_time()
        position, (uri, version) = item
        name = printable(uri)
        made = Record(None, position, name, name, version=version)
        try:
            made = replace(made, data=fetch(uri, storage))
        except Failure as failure:
            made = replace(made, failure=failure)
        return replace(made, seconds=(time.perf_counter() - clock, time.thread_time() - cpu))

    items = enumerate(zip(unit.files, versions, strict=True))
    yield from ahead(record, items, remote=any("://" in uri for uri in unit.files))


def ahead(make: Callable[[Any], Record], items: Iterable[Any], remote: bool) -> Iterator[Record]:
    """In order; what is remote, several at a time."""
    if not remote:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def fetch(uri: str, storage: Storage) -> bytes:
    """A picture's bytes, from wherever. Raises Failure; other errors are a store's that no record caused."""
    if web.is_web(uri):
        return web.fetch(uri)
    if is_remote(uri):
        return _fetch_remote(uri, storage)
    if "://" in uri:
        raise Failure("UnsupportedUri", f"{printable(uri)} is neither a path nor a uri of a store or of the web")
    try:
        if (size := size_of(uri)) > MAX_BYTES:
            raise too_large(size)
        return storage.read(uri)
    except (OSError, ValueError) as error:
        raise failure_of(uri, error) from None


def _fetch_remote(uri: str, storage: Storage) -> bytes:
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket or not key:
        raise Failure("UnsupportedUri", f"{printable(uri)} names no object: it takes a bucket and a key")
    try:
        return storage.read(uri)
    except (*ANSWERS, ValueError) as error:
        raise failure_of(uri, error) from None
