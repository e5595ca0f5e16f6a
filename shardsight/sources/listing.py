"""Inputs → the units that are left.

Listing opens no files but lists, Parquet files that the user names, and shards whose records `--limit` counts.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np
from fsspec.utils import glob_translate

from shardsight.results.coverage import Coverage, Hashes, UnitCoverage, hashes, versions
from shardsight.sources.files import AHEAD
from shardsight.sources.kinds import LISTS, kind_of, read
from shardsight.sources.lists import read_list
from shardsight.sources.parquet import is_results
from shardsight.sources.tar import reason
from shardsight.sources.units import InputError, Unit, absolute, names_video, pack, printable, resolve, unpack
from shardsight.sources.web import is_web
from shardsight.storage import Entry, Storage, StorageError, explain, is_hidden, is_remote

GROUP = 256  # loose files in a unit, at most
FEWEST = 16  # in one of a few files: less than a batch makes Ray's part of the work larger
PAGE = 10_000  # entries looked at together
RESULTS = re.compile(r"/results/part-[0-9a-f]{24}\.parquet$")  # as results.writer names its files


@dataclass(frozen=True)
class _Page:
    """Loose files. names: packed, as a million paths take 100 MB. hashes, versions: as Coverage has them."""

    names: bytes
    hashes: np.ndarray
    versions: np.ndarray

    def select(self, which: np.ndarray) -> Iterator[tuple[str, str | None]]:
        """(path or uri, version) of some files. which: bool (n,)."""
        names = unpack(self.names)
        for index in np.flatnonzero(which).tolist():
            version = int(self.versions[index])
            yield names[index], f"{version:016x}" if version else None


@dataclass
class Listing:
    """The inputs' files, listed once, when they are first needed.

    limit: on the number of records. exclude: prefix of the job's own output, which is not listed. files: every loose
    picture. units: the name of every video, tar and Parquet file. ignored: reason → how many of the files found hold
    neither pictures nor videos.
    """

    inputs: list[str]
    storage: Storage
    uri_column: str | None = None
    limit: int | None = None
    exclude: str | None = None
    image_column: str | None = None
    files: Hashes = field(default_factory=Hashes)
    units: list[str] = field(default_factory=list)
    ignored: "Counter[str]" = field(default_factory=Counter)
    _units: dict[str, Unit] = field(default_factory=dict)
    _pages: list[_Page] = field(default_factory=list)
    _listed: bool = False

    def check(self) -> None:
        """List. Raises InputError if an input holds no pictures or cannot be listed."""
        if self._listed:
            return
        remaining = self.limit
        inputs = iter(self.inputs)
        entries = chain.from_iterable(map(self._entries, inputs))
        while remaining != 0 and (batch := list(islice(entries, PAGE))):
            remaining = self._add(batch, remaining)
        for text in inputs:  # beyond the limit, but still to be checked
            self._entries(text)
        self._listed = True

    def changed(self, done: Coverage) -> tuple[set[str], np.ndarray]:
        """Units, and hashes of loose files, that are done, but have been written anew since. Raises InputError."""
        self.check()
        units = set()
        for name, unit in self._units.items():
            before = done.units[name].version if name in done.units else None
            if before and unit.version and before != unit.version:
                units.add(name)
        files = [page.hashes[done.changed(page.hashes, page.versions)] for page in self._pages]
        return units, np.concatenate([np.empty(0, "S16"), *files])

    def left(self, done: Coverage, readers: int | None = None) -> Iterator[Unit]:
        """The units, or parts of them, that are not done yet; of loose files, each of so many readers gets four groups
        where there are enough. readers: by default as many as this machine has cores. Raises InputError."""
        self.check()
        for name, unit in self._units.items():
            if not done.complete(name):
                before = done.units.get(name, UnitCoverage())
                lengths = {record: before.lengths[record] for record in before.frames if record in before.lengths}
                yield replace(unit, skip=before.records, frames=before.frames, lengths=lengths)
        which = [~done.has(page.hashes) for page in self._pages]
        size = min(GROUP, max(FEWEST, sum(map(np.count_nonzero, which)) // (4 * (readers or os.cpu_count() or 1))))
        left = chain.from_iterable(map(_Page.select, self._pages, which))
        while group := list(islice(left, size)):
            names, known = zip(*group, strict=True)
            yield Unit("files", files=names, versions=known)

    def sample(self, count: int) -> list[Unit]:
        """At most `count` units, evenly spread over the inputs: half of them loose files, one each, and half others,
        where there are both."""
        self.check()
        units = list(self._units.values())
        half = -(-count // 2) if units and len(self.files) else count
        chosen = [units[index] for index in spread(len(units), half)]
        which = np.zeros(len(self.files), bool)
        which[spread(len(which), half)] = True
        parts = np.split(which, np.cumsum([len(page.hashes) for page in self._pages])[:-1]) if self._pages else []
        for page, part in zip(self._pages, parts, strict=True):
            chosen += [Unit("files", files=(name,), versions=(version,)) for name, version in page.select(part)]
        return chosen

    def _add(self, batch: list[Entry], remaining: int | None) -> int | None:
        """Add the entries that are new, of at most `remaining` records; returns how many then remain."""
        loose = [entry for entry in batch if _kind(entry.uri) == "files"]
        found = hashes(printable(entry.uri) for entry in loose)
        new = self.files.add(found, remaining)
        remaining = None if remaining is None else remaining - int(new.sum())
        if new.any():
            kept = [entry for entry, is_new in zip(loose, new.tolist(), strict=True) if is_new]
            names = pack([entry.uri for entry in kept])
            self._pages.append(_Page(names, found[new], versions(entry.version for entry in kept)))
        shards = {printable(entry.uri): entry for entry in batch if _kind(entry.uri) != "files"}
        shards = {name: entry for name, entry in shards.items() if name not in self._units}
        with ThreadPoolExecutor(AHEAD) as pool:
            for name, entry in zip(shards, pool.map(self._with_version, shards.values()), strict=True):
                if remaining == 0:
                    break
                unit = Unit(
                    _kind(entry.uri),
                    entry.uri,
                    uri_column=self.uri_column,
                    image_column=self.image_column,
                    folder=os.getcwd(),
                    version=entry.version,
                    size=entry.size,
                )
                if remaining is not None:
                    count = sum(1 for _ in islice(read(unit, self.storage, payload=False), remaining))
                    unit, remaining = replace(unit, stop=count), remaining - count
                self._units[name] = unit
                self.units.append(name)
        return remaining

    def _with_version(self, entry: Entry) -> Entry:
        """Asks the store for the version of a list's entry, which no listing has given."""
        if entry.version or not is_remote(entry.uri):
            return entry
        try:
            return self.storage.info(entry.uri)
        except (FileNotFoundError, PermissionError, ValueError):  # its reader will report it
            return entry

    def _entries(self, text: str) -> Iterator[Entry]:
        """The files of an input. Raises InputError at once if there are none."""
        before = self.ignored.copy()
        entries = self._expand(absolute(text))
        first = next(entries, None)
        if first is None:
            others = ", ".join(f"{count:,} {why}" for why, count in (self.ignored - before).items())
            but = others and f", but {others}"
            raise InputError(f"{text} holds no pictures, videos, tars or Parquet files{but}: give another input")
        return chain([first], entries)

    def _expand(self, uri: str) -> Iterator[Entry]:
        try:
            if self.storage.is_folder(uri):
                yield from self._found(self.storage.walk(uri, hidden=True), uri)
            elif self.storage.exists(uri):
                yield from self._named(uri)
            elif glob.has_magic(uri):
                yield from self._matches(uri)
            else:
                raise InputError(f"{uri} does not exist: check the name")
        except InputError:
            raise
        except (OSError, ValueError, StorageError) as error:
            raise InputError(explain(uri, error)) from error

    def _named(self, uri: str) -> Iterator[Entry]:
        """A file that is itself an input, or lists inputs."""
        if kind_of(uri) == "parquet" and is_results(uri, self.storage):
            raise InputError(f"{uri} holds the results of a job, which are no input: give the pictures themselves")
        yield from self._of_list(uri) if uri.lower().endswith(LISTS) else [self.storage.info(uri)]

    def _found(self, entries: Iterable[Entry], root: str) -> Iterator[Entry]:
        """Those of the files found below a folder or prefix that may hold pictures; the others are counted."""
        for entry in entries:
            if (self.exclude and entry.uri.startswith(self.exclude)) or RESULTS.search(entry.uri):
                self.ignored["results of Shardsight"] += 1
            elif is_hidden(entry.uri, root):
                self.ignored["hidden files"] += 1
            elif kind_of(entry.uri):
                yield entry
            else:
                self.ignored[reason(entry.uri.rpartition("/")[2])] += 1

    def _of_list(self, uri: str) -> Iterator[Entry]:
        folder = os.getcwd()
        for text in read_list(uri, self.storage, self.uri_column, self.ignored):
            entry = resolve(text, uri, folder)
            try:
                yield Entry(entry, None, None) if "://" in entry else self.storage.info(entry)
            except (OSError, ValueError):  # its reader will report it
                yield Entry(entry, None, None)

    def _matches(self, uri: str) -> Iterator[Entry]:
        """Those of a glob."""
        fixed = re.split(r"[*?\[]", uri, maxsplit=1)[0].rpartition("/")[0]
        if is_remote(uri):
            pattern = re.compile(glob_translate(uri))
            yield from self._found(
                (entry for entry in self.storage.walk(fixed, hidden=True) if pattern.match(entry.uri)), fixed
            )
            return
        for match in sorted(glob.iglob(uri, recursive=True)):
            if not os.path.isdir(match):
                yield from self._found([self.storage.info(match)], fixed)
            elif not uri.endswith("**"):  # which matches the files in it, too
                yield from self._found(self.storage.walk(match, hidden=True), fixed)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted), dtype=int)).tolist()


def _kind(uri: str) -> str:
    """The kind of an input that is read whatever its ending."""
    if names_video(uri):
        return "video"
    return "files" if is_web(uri) else kind_of(uri) or "files"
