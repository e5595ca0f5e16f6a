"""Where the pictures of a file of labels lie."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from shardsight.sources import printable
from shardsight.sources.files import AHEAD
from shardsight.storage import Storage, is_remote


class Pictures:
    """Beside the file of labels, in `images/`, in a folder beside it or above it that is named as the part of the set
    (val2017), or where an address says."""

    def __init__(self, path: str, part: str, storage: Storage) -> None:
        self.storage = storage
        folder = path.rpartition("/")[0]
        above = folder.rpartition("/")[0]
        self.folders = [folder, f"{folder}/images", f"{folder}/{part}", f"{above}/{part}", f"{above}/images/{part}"]
        self.folders += [f"{above}/images", above]

    def find_all(self, names: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
        """(name, address or "") → (path or uri, whether it is there) of each, by many requests at once.

        The folder of the first picture that is found is tried first for the others.
        """
        found = []
        for name, url in names:
            found.append(self._find(name, url))
            if found[-1][1]:
                self.folders.sort(key=lambda folder: printable(joined(folder, name)) != found[-1][0])
                break
        with ThreadPoolExecutor(AHEAD) as pool:
            return found + list(pool.map(lambda one: self._find(*one), names[len(found) :]))

    def _find(self, name: str, url: str) -> tuple[str, bool]:
        if "://" in name or name.startswith("/"):
            return printable(name), self._there(name)
        for folder in self.folders:
            if self.storage.exists(uri := joined(folder, name)):
                return printable(uri), True
        if url and (is_remote(url) or self.storage.exists(url)):
            return printable(url), self.storage.exists(url)
        return printable(joined(self.folders[0], name)), False

    def _there(self, uri: str) -> bool:
        """True of an address of another kind than a store's, which only the job can ask."""
        return ("://" in uri and not is_remote(uri)) or self.storage.exists(uri)


def joined(folder: str, name: str) -> str:
    """The path or uri of what a file in `folder` names; keys of objects are used as they are."""
    if "://" in name or name.startswith("/"):
        return name
    uri = f"{folder}/{name.removeprefix('./')}"
    return uri if is_remote(uri) else os.path.normpath(uri)
