"""Where this machine has a model: in place, or as a copy of what lies in object storage."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath

from shardsight.models.info import ModelError, made_once, sha256_of
from shardsight.row import version_of
from shardsight.storage import Entry, Storage, StorageError, explain, is_remote

# Files beside an export that belong to it: ONNX's external data, and the metadata of a TensorFlow graph.
_COMPANIONS = {".onnx": ("{}.data", "{}_data"), ".pb": ("metadata.yaml",)}


def stage(uri: str, storage: Storage, files: Mapping[str, str] | None = None) -> Path:
    """A model's file, or folder: a local one in place; of a store a copy, fetched once for each version of its objects.

    files: name, or path within the folder → SHA-256, of those that have to be as the job began with them. Safe when
    several processes start at once: a copy appears whole. Raises ModelError.
    """
    uri, files = uri.rstrip("/"), files or {}
    try:
        if is_remote(uri):
            return _copy(uri, storage, files)
        path = Path(uri)
        folder = path if path.is_dir() else path.parent
        if path.exists():
            check(files, {name: sha256_of(folder / name) for name in files if (folder / name).is_file()}, str(folder))
        return path
    except (OSError, ValueError, StorageError) as error:
        raise ModelError(explain(uri, error)) from error


def check(files: Mapping[str, str], found: Mapping[str, str], place: str) -> None:
    """Raises ModelError unless each of `files`, name → SHA-256, is found at a place as the job began with it."""
    for name, sha256 in files.items():
        if found.get(name) != sha256:
            raise ModelError(
                f"{place}/{name} is not the file that the job began with: its SHA-256 is another; start the job again"
            )


def companions(name: str) -> list[str]:
    """Names of files that belong to a model's file, where they are beside it."""
    return [one.format(name) for one in _COMPANIONS.get(PurePath(name).suffix.lower(), ())]


def _copy(uri: str, storage: Storage, files: Mapping[str, str]) -> Path:
    above, _, name = uri.rpartition("/")
    single = storage.exists(uri)
    entries = _file(uri, storage) if single else list(storage.walk(uri))
    if not entries:
        raise ModelError(f"there is no model at {uri}: check the name; nothing is downloaded from elsewhere")
    place, kept = above if single else uri, f"{name}.sha256"

    def fetch(folder: Path) -> None:
        found = {}
        for entry in entries:
            within = entry.uri[len(place) + 1 :]
            found[within] = _fetch(entry, (folder if single else folder / name) / within, storage)
        check(files, found, place)  # here, too, as a wrong copy is not kept
        (folder / kept).write_text(json.dumps(found))

    version = version_of(uri, *(f"{entry.uri} {entry.version}" for entry in entries))
    folder = made_once("staged", version, fetch)
    check(files, json.loads((folder / kept).read_text()), place)
    return folder / name


def _file(uri: str, storage: Storage) -> list[Entry]:
    """A model's file, and what belongs to it."""
    found = [storage.info(uri)]
    above, _, name = uri.rpartition("/")
    for one in companions(name):
        with suppress(FileNotFoundError, PermissionError):  # S3 says the second where the keys may not list
            found.append(storage.info(f"{above}/{one}"))
    return found


def _fetch(entry: Entry, path: Path, storage: Storage) -> str:
    """Returns the SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.open(entry.uri) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if entry.size is not None and path.stat().st_size != entry.size:
        raise ModelError(f"{entry.uri} came with {path.stat().st_size} of {entry.size} bytes: try again")
    return sha256_of(path)
