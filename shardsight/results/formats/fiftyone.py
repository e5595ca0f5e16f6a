"""FiftyOne's own form on a disk: data/ and labels.json."""

from collections.abc import Iterable
from typing import Any

from shardsight.results.formats.geometry import xywh
from shardsight.results.formats.sample import Contents, Found, Report, Sample
from shardsight.results.formats.target import Target, Values, write_document


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """A FiftyOneImageDetectionDataset, boxes as shares x, y, width, height; of a classifier's results a
    FiftyOneImageClassificationDataset. Neither can hold masks or keypoints: FiftyOne reads those from COCO."""
    labels = Values("{}")
    for sample in samples:
        assert sample.picture
        target.put(f"data/{sample.file}", sample.picture)
        if contents.classes:
            assert sample.category is not None
            labels.add({"label": contents.names[sample.category], **_confidence(sample.score)}, sample.name)
        else:
            labels.add([_label(found, sample, contents.names) for found in sample.found], sample.name)
        report.written.update(pictures=1, objects=len(sample.found))
    write_document(target, "labels.json", {"classes": contents.names, "labels": labels})
    if contents.masks or contents.keypoints or contents.corners:
        report.notes.append("masks, keypoints and angles are not part of this format: FiftyOne reads them from COCO")


def _label(found: Found, sample: Sample, names: list[str]) -> dict[str, Any]:
    x1, y1, x2, y2 = found.box
    box = xywh((*sample.relative(x1, y1), *sample.relative(x2, y2)))
    attributes = {} if found.track_id is None else {"track_id": found.track_id}
    return {"label": names[found.category], "bounding_box": box, **_confidence(found.score), "attributes": attributes}


def _confidence(score: float | None) -> dict[str, float]:
    return {} if score is None else {"confidence": score}
