"""Inputs → the units that are left. Nothing that is listed is opened, but lists, and what `--limit` has to count."""

import glob
import os
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np
from fsspec.utils import glob_translate

from shardsight.results.coverage import Coverage, Hashes, hashes, versions
from shardsight.sources.files import AHEAD
from shardsight.sources.kinds import LISTS, VIDEOS, kind_of, read
from shardsight.sources.lists import read_list
from shardsight.sources.tar import reason
from shardsight.sources.units import InputError, Unit, absolute, printable, resolve
from shardsight.sources.web import is_web
from shardsight.storage import Entry, Storage, StorageError, explain, is_hidden, is_remote

GROUP = 256  # loose files in a unit
PAGE = 10_000  # entries looked at together
RESULTS = re.compile(r"/results/part-[0-9a-f]{24}\.parquet$")  # as results.writer names its files


@dataclass(frozen=True)
class _Page:
    """Loose files. names: compressed, as a million paths are 100 MB. hashes, versions: as Coverage has them."""

    names: bytes
    hashes: np.ndarray
    versions: np.ndarray

    def select(self, which: np.ndarray) -> Iterator[tuple[str, str | None]]:
        """(path or uri, version) of those chosen, bool (n,)."""
        names = pickle.loads(zlib.decompress(self.names))
        for index in np.flatnonzero(which).tolist():
            version = int(self.versions[index])
            yield names[index], f"{version:016x}" if version else None


@dataclass
class Listing:
    """What there is, listed once, when it is first asked for.

    files: every loose file. units: the name of every tar and Parquet file. ignored: reason → how many files that were
    found hold no pictures. exclude: prefix of the job's own output.
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
        """List. Raises InputError where an input holds nothing, or cannot be listed."""
        if self._listed:
            return
        room = self.limit
        inputs = iter(self.inputs)
        entries = chain.from_iterable(map(self._begin, inputs))
        while room != 0 and (batch := list(islice(entries, PAGE))):
            room = self._add(batch, room)
        for text in inputs:  # beyond the limit, but they must not be wrong
            self._begin(text)
        self._listed = True

    def changed(self, done: Coverage) -> tuple[set[str], np.ndarray]:
        """Units, and hashes of loose files, that are done in another version than they have now. Raises InputError."""
        self.check()
        units = set()
        for name, unit in self._units.items():
            before = done.units[name].version if name in done.units else None
            if before and unit.version and before != unit.version:
                units.add(name)
        files = [page.hashes[done.changed(page.hashes, page.versions)] for page in self._pages]
        return units, np.concatenate([np.empty(0, "S16"), *files])

    def left(self, done: Coverage) -> Iterator[Unit]:
        """The work that `done` lacks. Raises InputError."""
        self.check()
        for name, unit in self._units.items():
            if not done.complete(name):
                yield replace(unit, skip=done.units[name].records if name in done.units else [])
        left = chain.from_iterable(page.select(~done.has(page.hashes)) for page in self._pages)
        while group := list(islice(left, GROUP)):
            files, of = zip(*group, strict=True)
            yield Unit("files", files=files, versions=of)

    def _add(self, batch: list[Entry], room: int | None) -> int | None:
        """Take up what is new, and no more than there is room for; returns what room is left."""
        loose = [entry for entry in batch if _kind(entry.uri) == "files"]
        found = hashes(printable(entry.uri) for entry in loose)
        new = self.files.add(found, room)
        room = None if room is None else room - int(new.sum())
        if new.any():
            kept = [entry for entry, is_new in zip(loose, new.tolist(), strict=True) if is_new]
            names = zlib.compress(pickle.dumps([entry.uri for entry in kept]), 1)
            self._pages.append(_Page(names, found[new], versions(entry.version for entry in kept)))
        shards = {printable(entry.uri): entry for entry in batch if _kind(entry.uri) != "files"}
        for name, entry in self._with_versions({n: e for n, e in shards.items() if n not in self._units}):
            if room == 0:
                break
            unit = Unit(
                _kind(entry.uri),
                entry.uri,
                uri_column=self.uri_column,
                image_column=self.image_column,
                folder=os.getcwd(),
                version=entry.version,
            )
            if room is not None:
                unit = replace(unit, stop=sum(1 for _ in islice(read(unit, self.storage, payload=False), room)))
                room -= unit.stop or 0
            self._units[name] = unit
            self.units.append(name)
        return room

    def _with_versions(self, shards: dict[str, Entry]) -> Iterator[tuple[str, Entry]]:
        """Of a list's entries in a store, which no listing has told, one request each."""

        def ask(entry: Entry) -> Entry:
            if entry.version or not is_remote(entry.uri):
                return entry
            try:
                return self.storage.info(entry.uri)
            except (FileNotFoundError, PermissionError, ValueError):  # its reader will say so
                return entry

        with ThreadPoolExecutor(AHEAD) as pool:
            yield from zip(shards, pool.map(ask, shards.values()), strict=True)

    def _begin(self, text: str) -> Iterator[Entry]:
        before = self.ignored.copy()
        entries = self._expand(absolute(text))
        first = next(entries, None)
        if first is None:
            others = ", ".join(f"{count:,} {why}" for why, count in (self.ignored - before).items())
            but = others and f", but {others}"
            raise InputError(f"{text} holds no pictures, tars or Parquet files{but}: give another input")
        return chain([first], entries)

    def _expand(self, uri: str) -> Iterator[Entry]:
        try:
            if self.storage.is_folder(uri):
                yield from self._found(self.storage.walk(uri, hidden=True), uri)
            elif self.storage.exists(uri):
                if uri.lower().endswith(VIDEOS):
                    raise InputError(f"{uri} is a video, which this version cannot read: give pictures")
                yield from self._of_list(uri) if uri.lower().endswith(LISTS) else [self.storage.info(uri)]
            elif glob.has_magic(uri):
                yield from self._matches(uri)
            else:
                raise InputError(f"{uri} does not exist: check the name")
        except InputError:
            raise
        except (OSError, ValueError, StorageError) as error:
            raise InputError(explain(uri, error)) from error

    def _found(self, entries: Iterable[Entry], root: str) -> Iterator[Entry]:
        """What may hold pictures, of what was not named but found below `root`."""
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
            except (OSError, ValueError):  # which reading it will say
                yield Entry(entry, None, None)

    def _matches(self, uri: str) -> Iterator[Entry]:
        """Of a glob."""
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
            elif not uri.endswith("**"):  # which has matched what is in it, too
                yield from self._found(self.storage.walk(match, hidden=True), fixed)


def _kind(uri: str) -> str:
    """Of what is read in any case, be it by its ending no picture."""
    return "files" if is_web(uri) else kind_of(uri) or "files"
