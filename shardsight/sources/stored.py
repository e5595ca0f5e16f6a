"""The encoded pictures of rows of results, read again from where they came."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from shardsight.row import Failure
from shardsight.sources.files import fetch
from shardsight.sources.kinds import KINDS, kind_of
from shardsight.sources.shard import records_of
from shardsight.sources.units import Unit
from shardsight.storage import Storage


def pictures(
    rows: Iterable[dict[str, Any]], storage: Storage, image_column: str | None = None
) -> Iterator[tuple[str, bytes | Failure]]:
    """(id, encoded picture, or why there is none) of rows with `id` and `uri`, in whatever order is the quickest.

    Each tar and Parquet file is read once, no further than its last picture that is asked for; of a Parquet file only
    their row groups. image_column: as the job was told.
    """
    shards: dict[str, set[str]] = {}
    for row in rows:
        id, uri = row["id"], row["uri"]
        if id.startswith(f"{uri}#"):
            shards.setdefault(uri, set()).add(id)
            continue
        try:
            yield id, fetch(uri, storage)
        except Failure as failure:
            yield id, failure
    for uri, ids in shards.items():
        yield from _of_shard(Unit(kind_of(uri) or "tar", uri, image_column=image_column), ids, storage)


def _of_shard(unit: Unit, ids: set[str], storage: Storage) -> Iterator[tuple[str, bytes | Failure]]:
    reader = KINDS[unit.kind].reader
    assert reader
    left = set(ids)
    failure: Failure | None = None
    for record in records_of(reader, unit, storage, lambda _, id: id in left, Counter()):
        if record.id in left:
            yield record.id, record.failure or record.data or b""
            left.remove(record.id)
            if not left:
                return
        elif record.failure:
            failure = record.failure
    for id in left:
        yield id, failure or Failure("NoImages", f"{unit.uri} does not hold it any more")
