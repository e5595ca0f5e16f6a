"""Pictures of one class each: how often the model's first, or one of its first five, is the right one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardsight.measures import bootstrap
from shardsight.measures.boxes import calibration, class_ids
from shardsight.truth import Truth

FIRST = 5


def measure(truth: Truth, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """found: Sample.id → the row's `classes`, best first; a picture without any is wrong.

    measures: top-1 and top-5; classes: [{name, objects, top-1}]; confusion, whose last column is of no answer, or
    of one that the truth has no class for; calibration; pictures: id → 1 or 0; resamples.
    """
    ids, numbers = class_ids(truth), {class_id: n for n, class_id in enumerate(truth.names)}
    counts = np.zeros((len(numbers) + 1, len(numbers) + 1), int)
    first, among, scores = [], [], []  # scores: of the best class, NaN where there is none
    for sample in truth.samples:
        answers = [(ids.get(one["label"].strip().lower()), one["score"]) for one in found.get(sample.id) or ()]
        labels = [label for label, _ in answers]
        first.append(float(labels[:1] == [sample.class_id]))
        among.append(float(sample.class_id in labels[:FIRST]))
        scores.append(answers[0][1] if answers else np.nan)
        best = labels[0] if labels else None
        counts[numbers[sample.class_id or 0], len(numbers) if best is None else numbers[best]] += 1
    ones, said = np.ones(len(first)), np.isfinite(scores)
    classes = [
        {"name": name, "objects": int(row.sum()), "top-1": float(row[n] / row.sum()) if row.sum() else None}
        for n, (name, row) in enumerate(zip(truth.names.values(), counts, strict=False))
    ]
    return {
        "measures": {"top-1": bootstrap.ratio(first, ones), "top-5": bootstrap.ratio(among, ones)},
        **{"classes": classes, "confusion": {"labels": list(truth.names.values()), "counts": counts.tolist()}},
        "calibration": calibration(np.array(scores)[said], np.array(first, bool)[said]),
        "pictures": dict(zip((sample.id for sample in truth.samples), first, strict=True)),
        "resamples": bootstrap.RESAMPLES,
    }
