"""WebDataset: tars in which a sample's files share a name: the picture, and what was found in it as .json."""

import io
import json
import tarfile
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from shardsight.results.formats.sample import Contents, Report, Sample
from shardsight.results.formats.target import Target

SAMPLES = 1000  # of a tar, at most


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """shard-NNNNNN.tar. Boxes are x1, y1, x2, y2 in pixels; a classifier's results have the class's number as .cls."""
    remaining = iter(samples)
    for first in remaining:
        number = report.written["tars"]
        with target.open(f"shard-{number:06}.tar") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for sample in chain([first], islice(remaining, SAMPLES - 1)):
                assert sample.picture
                _add(tar, sample.file, sample.picture.data)
                _add(tar, f"{sample.name}.json", json.dumps(_content(sample, contents.names)).encode())
                if sample.category is not None:
                    _add(tar, f"{sample.name}.cls", str(sample.category).encode())
                report.written.update(pictures=1, objects=len(sample.found))
        report.written["tars"] += 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _content(sample: Sample, names: list[str]) -> dict[str, Any]:
    head = {"id": sample.id, "uri": sample.uri, "width": sample.width, "height": sample.height}
    head |= {"frame_index": sample.frame_index, "pts_seconds": sample.pts_seconds}
    objects: list[dict[str, Any]] = [
        {"label": names[found.category], "class_id": found.category, **_known(vars(found), but="category")}
        for found in sample.found
    ]
    if sample.category is None:
        return _known(head) | {"objects": objects}
    return _known(head | {"label": names[sample.category], "class_id": sample.category, "score": sample.score})


def _known(values: dict[str, Any], but: str = "") -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and name != but}
