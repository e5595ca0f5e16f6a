"""Paths and uris as people write them, in inputs, lists and columns by one rule."""

import os
from urllib.parse import unquote

from shardsight.sources.units import InputError
from shardsight.storage import is_remote


def absolute(text: str) -> str:
    """An input's path as the workers can open it; a store's uri as it is. Raises InputError."""
    if is_remote(text):
        return text
    path = _local(text)
    if "://" in path:
        raise InputError(f"{text} is neither a path nor a store's uri: uris of the web go into a list")
    return os.path.abspath(os.path.expanduser(path))


def resolve(entry: str, source: str, folder: str) -> str:
    """What an entry of a list or a cell of a column names.

    A uri of another scheme than file: is taken as it is. A relative path is one from `folder`, where the command
    runs, if there is something; else one beside `source`, the list or Parquet file.
    """
    path = _local(entry)
    if "://" in path or os.path.isabs(path):
        return path
    if is_remote(source):
        return f"{source.rpartition('/')[0]}/{path}"
    here = os.path.join(folder, os.path.expanduser(path))
    return os.path.normpath(here if os.path.exists(here) else os.path.join(os.path.dirname(source), path))


def _local(text: str) -> str:
    """file:///a%20b, file://localhost/a and Hadoop's file:/a as paths; anything else as it is."""
    if not text.startswith("file:/"):
        return text
    path = text.removeprefix("file:").removeprefix("//localhost")
    if path.startswith("//"):
        path = path[2:]
        if not path.startswith("/"):  # another machine's
            return text
    return unquote(path, errors="surrogateescape")
