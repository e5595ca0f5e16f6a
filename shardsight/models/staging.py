"""Models that lie in object storage, as local copies."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from shardsight.models.info import ModelError, made_once, sha256_of
from shardsight.row import version_of
from shardsight.storage import Entry, Storage, StorageError, explain


def stage(uri: str, storage: Storage, files: Mapping[str, str] | None = None) -> Path:
    """A model's file, or folder, of a store as a local copy, which is fetched once for each version of its objects.

    files: name, or path within the folder → SHA-256, of those that have to be as another node has them. Safe when
    several processes start at once: a copy appears whole. Raises ModelError.
    """
    uri = uri.rstrip("/")
    try:
        single = storage.exists(uri)
        entries = [storage.info(uri)] if single else list(storage.walk(uri))
        if not entries:
            raise ModelError(f"there is no model at {uri}: check the name; nothing is downloaded from elsewhere")
        version = version_of(uri, *(f"{entry.uri} {entry.version}" for entry in entries))
        name = uri.rpartition("/")[2]

        def fetch(folder: Path) -> None:
            for entry in entries:
                within = entry.uri[len(uri) + 1 :]
                _fetch(entry, folder / name / within, storage, (files or {}).get(within or name))

        return made_once("models", version, fetch) / name
    except (OSError, ValueError, StorageError) as error:
        raise ModelError(explain(uri, error)) from error


def _fetch(entry: Entry, path: Path, storage: Storage, sha256: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.open(entry.uri) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if entry.size is not None and path.stat().st_size != entry.size:
        raise ModelError(f"{entry.uri} came with {path.stat().st_size} of {entry.size} bytes: try again")
    if sha256 and sha256_of(path) != sha256:
        raise ModelError(
            f"{entry.uri} is not the file that the job began with: its SHA-256 is another; start the job again"
        )
