"""What PaliGemma answers to `detect` and `segment` against right answers in its own words, `<loc>` and `<seg>`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

from shardsight.measures import bootstrap, boxes
from shardsight.models.paligemma.prompts import decode_box
from shardsight.truth import Sample, Thing, Truth
from shardsight.truth.text import objects_in

Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]  # Sample.id → prompt → answer, as a row has it
Decode = Callable[[Sequence[int], tuple[float, float, float, float], int, int], Mapping[str, Any]]
ENOUGH = 0.5  # IoU from which on a mask is the right one


def measure(truth: Truth, said: Answers, sizes: boxes.Sizes, decode: Decode | None) -> dict[str, dict[str, Any]]:
    """boxes: of `detect`, as boxes.measure, where each prompt of a picture counts as a picture of its own. referring:
    of `segment`, mIoU, the mean over prompts of the IoU of all that is found with all that is right, 0 where nothing
    can be read in the answer, as big_vision counts it; and the share of prompts whose IoU is at least ENOUGH.

    decode: codes (16,), a box in pixels and a picture's width and height → the row's mask; without it, masks are not
    measured. Of a prompt's right answers the first counts. A picture has the mean over its prompts.
    """
    measured = {}
    if any(prompt.startswith("detect ") for sample in truth.samples for prompt in sample.asked):
        measured["boxes"] = _boxes(truth, said, sizes)
    if decode and any(prompt.startswith("segment ") for sample in truth.samples for prompt in sample.asked):
        measured["referring"] = _referring(truth, said, sizes, decode)
    return measured


def _boxes(truth: Truth, said: Answers, sizes: boxes.Sizes) -> dict[str, Any]:
    ids: dict[str, int] = {}
    samples, of, found, of_sizes = [], {}, {}, {}
    for sample in truth.samples:
        for prompt, answers in sample.asked.items():
            if not prompt.startswith("detect "):
                continue
            things = []
            for name, bins, _ in objects_in(prompt, answers[0]):
                class_id = ids.setdefault(name.lower(), len(ids))
                things.append(Thing(class_id, decode_box(bins, 1, 1)))
            key = f"{sample.id} {prompt}"
            samples.append(Sample(key, things=things))
            of[key], found[key] = sample.id, said.get(sample.id, {}).get(prompt, {}).get("detections") or []
            of_sizes[key] = sizes.get(sample.id, boxes.UNKNOWN)
    own = Truth("detect", {number: name for name, number in ids.items()}, samples, {}, normalised=True)
    result = boxes.measure(own, found, of_sizes, "boxes")
    return result | {"pictures": _means((of[key], value) for key, value in result["pictures"].items())}


def _referring(truth: Truth, said: Answers, sizes: boxes.Sizes, decode: Decode) -> dict[str, Any]:
    values: dict[str, list[float]] = defaultdict(list)
    for sample in truth.samples:
        for prompt, answers in sample.asked.items():
            if prompt.startswith("segment "):
                answer = said.get(sample.id, {}).get(prompt, {}).get("text") or ""
                size = sizes.get(sample.id, boxes.UNKNOWN)
                right, mine = (_mask(prompt, one, size, decode) for one in (answers[0], answer))
                values[sample.id].append(_iou(right, mine))
    count = [float(len(own)) for own in values.values()]
    enough = [float(sum(value >= ENOUGH for value in own)) for own in values.values()]
    return {
        "measures": {
            "mIoU": bootstrap.ratio([sum(own) for own in values.values()], count),
            f"IoU ≥ {ENOUGH}": bootstrap.ratio(enough, count),
        },
        **{"pictures": {id: sum(own) / len(own) for id, own in values.items()}, "prompts": int(sum(count))},
        "resamples": bootstrap.RESAMPLES,
    }


def _mask(prompt: str, answer: str, size: tuple[int, int], decode: Decode) -> dict[str, Any] | None:
    """All masks of an answer together, as COCO's RLE; None where it has none."""
    width, height = size
    masks = [
        decode(codes, decode_box(bins, width, height), width, height)
        for _, bins, codes in objects_in(prompt, answer)
        if codes
    ]
    if not masks:
        return None
    merged: dict[str, Any] = rle.merge([{"size": [height, width], "counts": one["counts"]} for one in masks])
    return merged


def _iou(right: dict[str, Any] | None, mine: dict[str, Any] | None) -> float:
    """1 where nothing is to be found, and nothing is."""
    if right is None or mine is None:
        return float(right is mine)
    return float(rle.iou([mine], [right], [0])[0, 0])


def _means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for id, value in values:
        found[id].append(value)
    return {id: float(np.mean(own)) for id, own in found.items()}
