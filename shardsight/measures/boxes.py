"""Objects found in pictures against the true ones: COCO's average precision of boxes, masks and keypoints, and the same
of oriented boxes; what is confused with what; and what a score is worth.

Found and true objects are matched by pycocotools, and once: a class at an IoU threshold is then a list of scores, each
right, wrong or ignored, from which any sample of the pictures has its average precision.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shardsight.errors import UsageError
from shardsight.measures import bootstrap
from shardsight.measures.bootstrap import figure
from shardsight.truth import Sample, Thing, Truth

Found = Mapping[str, Sequence[Mapping[str, Any]]]  # Sample.id → detections, as a row has them
Sizes = Mapping[str, tuple[int, int]]  # Sample.id → width, height in pixels, as shown
IOU_TYPES = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of a picture that count, as in COCO
AREAS = {"boxes": ("small", "medium", "large"), "masks": ("small", "medium", "large"), "keypoints": ("medium", "large")}
VAL = "mAP50-95 as val"
UNKNOWN = (640, 640)  # pixels of a picture that cannot be read
CONFIDENCES = np.linspace(0, 1, 1001)
CALIBRATED = 0.05  # detections of lower scores, which are no use to anybody, say nothing about the others
BINS = 10
WORK = 4e9  # numbers that a bootstrap goes through, at most
EPS = np.spacing(1)
BODY = 0.53  # of a box, the share that the object in it takes up on average, by which ultralytics measures keypoints


@dataclass(frozen=True)
class Matches:
    """A class's detections in the order of their scores, over all pictures.

    scores: (n,); right, ignored: bool (10, n), at each of THRESHOLDS; pictures: (n,), index of each one's; positives:
    (pictures,), the number of true objects.
    """

    scores: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    pictures: np.ndarray
    positives: np.ndarray

    def precision(self, weights: np.ndarray | None = None, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(precision (thresholds, 101) at RECALLS, recall (thresholds,)), as pycocotools accumulates them.

        NaN of a class without true objects. weights: (pictures,), how often each picture counts.
        """
        right, ignored = self.right[rows], self.ignored[rows]
        positives = self.positives.sum() if weights is None else self.positives @ weights
        if not positives:
            return np.full((len(right), len(RECALLS)), np.nan), np.full(len(right), np.nan)
        times = 1 if weights is None else weights[self.pictures]
        true = np.cumsum((right & ~ignored) * times, axis=1, dtype=float)
        false = np.cumsum((~right & ~ignored) * times, axis=1, dtype=float)
        recall = true / positives
        precision = true / (true + false + EPS)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = np.zeros((len(right), len(RECALLS)))
        for row, (values, at) in enumerate(zip(precision, recall, strict=True)):
            places = np.searchsorted(at, RECALLS, side="left")
            inside = places < len(values)
            found[row, inside] = values[places[inside]]
        return found, recall[:, -1] if recall.shape[1] else np.zeros(len(right))

    def integral(self) -> np.ndarray:
        """(thresholds,): average precision as ultralytics' `val` has it: the area under precision, with a straight line
        between one detection's recall and the next, instead of COCO's mean of the precision at RECALLS."""
        areas = np.zeros(len(THRESHOLDS))
        for row, (right, ignored) in enumerate(zip(self.right, self.ignored, strict=True)):
            true = np.cumsum(right[~ignored])
            if len(true) and true[-1]:
                recall = true / self.positives.sum()
                precision = np.maximum.accumulate((true / np.arange(1, len(true) + 1))[::-1])[::-1]
                at = np.concatenate([[0], recall, [recall[-1], 1]])
                areas[row] = np.trapezoid(np.interp(RECALLS, at, np.concatenate([[1], precision, [0, 0]])), RECALLS)
        return areas


def measure(truth: Truth, found: Found, sizes: Sizes, kind: str) -> dict[str, Any]:
    """kind: boxes, masks, keypoints or oriented.

    measures: name → figure (see bootstrap); mAP50-95, mAP50, mAP75, small, medium, large, AR, and VAL, the mAP50-95
    by the integral of ultralytics' `val`, of 0 to 1. classes: [{name, objects, mAP50-95, mAP50, best_conf}].
    curve: {class, or "": precision at IoU 0.5 for each of RECALLS}. best_conf: {conf, f1, precision, recall}.
    calibration: {error, bins: [{score, right, count}]}. pictures: id → F1 at best_conf. resamples: of the intervals.
    """
    matched = _oriented(truth, found, sizes) if kind == "oriented" else _matched(truth, found, sizes, kind)
    everything = matched["all"]
    measures, classes, curves = _average_precision(truth, everything)
    for area in AREAS.get(kind, ()):
        values = [np.nanmean(one.precision()[0]) if one.positives.sum() else np.nan for one in matched[area]]
        measures[area] = figure(_mean(values))
    measures["AR"] = figure(_mean([one.precision()[1].mean() for one in everything]))
    measures[VAL] = figure(_mean([one.integral().mean() for one in everything if one.positives.sum()]))
    best = _best_conf(everything, classes)
    return {
        **{"measures": measures, "classes": classes, "curve": curves, "best_conf": best},
        **{"calibration": _calibration(everything), "pictures": _of_pictures(truth, everything, best["conf"])},
        "resamples": _resamples(everything),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


# --- Matching


def _matched(truth: Truth, found: Found, sizes: Sizes, kind: str) -> dict[str, list[Matches]]:
    """Area → the matches of each class of truth.names, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        right = COCO()
        right.dataset = coco_of(truth, sizes, kind)
        right.createIndex()
        results = results_of(truth, found, kind)
        evaluation = COCOeval(right, right.loadRes(results) if results else COCO(), IOU_TYPES[kind])
        if not results:
            evaluation.cocoDt.dataset = {"images": right.dataset["images"], "annotations": [], "categories": []}
            evaluation.cocoDt.createIndex()
        params = evaluation.params
        if kind == "keypoints":
            params.kpt_oks_sigmas = truth.sigmas
        evaluation.evaluate()
    pictures, matched = len(truth.samples), {}
    step = len(params.areaRng) * pictures
    most = params.maxDets[-1]
    for number, area in enumerate(params.areaRngLbl):
        starts = {one: k * step + number * pictures for k, one in enumerate(params.catIds)}  # which are sorted
        matched[area] = [
            _of_class(evaluation.evalImgs[starts[one] : starts[one] + pictures], most) for one in truth.names
        ]
    return matched


def _of_class(evaluated: Sequence[dict[str, Any] | None], most: int) -> Matches:
    positives = np.zeros(len(evaluated), int)
    parts: list[tuple[np.ndarray, ...]] = []
    for index, one in enumerate(evaluated):
        if one is None:
            continue
        positives[index] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
        scores = np.asarray(one["dtScores"][:most], float)
        right = np.asarray(one["dtMatches"])[:, :most] != 0
        ignored = np.asarray(one["dtIgnore"])[:, :most] != 0
        parts.append((scores, right, ignored, np.full(len(scores), index)))
    return _in_order(parts, positives)


def _in_order(parts: Sequence[tuple[np.ndarray, ...]], positives: np.ndarray) -> Matches:
    """(scores, right, ignored, pictures) of each picture → Matches, the surest first."""
    parts = [part for part in parts if len(part[0])]
    if not parts:
        none = np.zeros((len(THRESHOLDS), 0), bool)
        return Matches(np.zeros(0), none, none, np.zeros(0, int), positives)
    scores, right, ignored, pictures = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="mergesort")
    return Matches(scores[order], right[:, order], ignored[:, order], pictures[order], positives)


def things_of(truth: Truth, sample: Sample, sizes: Sizes) -> list[Thing]:
    """A picture's true objects in pixels."""
    if not truth.normalised:
        return sample.things
    return [thing.scaled(*sizes.get(sample.id, UNKNOWN)) for thing in sample.things]


def class_ids(truth: Truth) -> dict[str, int]:
    """Name, in lower case → class id of the truth, the first of that name. Models' labels are matched by name."""
    return {name.strip().lower(): number for number, name in reversed(truth.names.items())}


def coco_of(truth: Truth, sizes: Sizes, kind: str) -> dict[str, Any]:
    """The labelled set as COCO's JSON. Where the labels give no areas, they are those of masks or boxes; of keypoints
    BODY of the box, as ultralytics has it."""
    masks, share = kind == "masks", BODY if kind == "keypoints" else 1.0
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, sample in enumerate(truth.samples, 1):
        width, height = (
            (sample.width, sample.height) if sample.width and sample.height else sizes.get(sample.id, UNKNOWN)
        )
        images.append({"id": number, "file_name": sample.id, "width": width, "height": height})
        for thing in things_of(truth, sample, sizes):
            x1, y1, x2, y2 = thing.box
            mask = thing.rle(width, height) if masks or thing.crowd else None
            area = float(rle.area(mask)) if mask and masks else share * (x2 - x1) * (y2 - y1)
            points = [value for point in thing.points or () for value in point]
            points += [0.0] * (3 * truth.keypoints - len(points))  # of objects that have fewer: not labelled
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": number, "category_id": thing.class_id},
                    **{"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area if thing.area is None else thing.area},
                    **{"iscrowd": int(thing.crowd), "keypoints": points},
                    "num_keypoints": sum(1 for point in thing.points or () if point[2] > 0),
                }
                | ({"segmentation": mask or _empty(width, height)} if masks else {})
            )
    categories = [{"id": number, "name": name} for number, name in truth.names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def results_of(truth: Truth, found: Found, kind: str) -> list[dict[str, Any]]:
    """Detections of the classes that the truth has, as COCO's results. Raises UsageError for other keypoints."""
    ids, results = class_ids(truth), []
    for number, sample in enumerate(truth.samples, 1):
        for one in found.get(sample.id, ()):
            class_id = ids.get((one["label"] or "").strip().lower())
            if class_id is None or (kind == "keypoints" and not one["keypoints"]):
                continue
            result: dict[str, Any] = {"image_id": number, "category_id": class_id, "score": one["score"] or 0.0}
            if kind == "masks":
                mask = one["mask"]
                size = [mask["height"], mask["width"]] if mask else [1, 1]
                result["segmentation"] = {"size": size, "counts": mask["counts"]} if mask else _empty(1, 1)
            elif kind == "keypoints":
                if len(one["keypoints"]) != truth.keypoints:
                    raise UsageError(
                        f"labelled objects have {truth.keypoints} keypoints, and the model finds "
                        f"{len(one['keypoints'])}: give labels and a model with the same keypoints"
                    )
                result["keypoints"] = [v for p in one["keypoints"] for v in (p["x"], p["y"], p["score"] or 0.0)]
            else:
                result["bbox"] = [one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]]
            results.append(result)
    return results


def _empty(width: int, height: int) -> dict[str, Any]:
    made = rle.encode(np.zeros((height, width), np.uint8, order="F"))
    return {"size": made["size"], "counts": made["counts"].decode()}


def _oriented(truth: Truth, found: Found, sizes: Sizes) -> dict[str, list[Matches]]:
    """Of oriented boxes, whose IoU is that of ultralytics (see probiou); not DOTA's of polygons."""
    ids = class_ids(truth)
    parts: dict[int, list[tuple[np.ndarray, ...]]] = {number: [] for number in truth.names}
    positives = {number: np.zeros(len(truth.samples), int) for number in truth.names}
    for index, sample in enumerate(truth.samples):
        true = [thing for thing in things_of(truth, sample, sizes) if thing.corners]
        mine = sorted((one for one in found.get(sample.id, ()) if one["corners"]), key=lambda one: -(one["score"] or 0))
        labels = [ids.get((one["label"] or "").strip().lower()) for one in mine]
        for number in truth.names:
            own = [one for one, label in zip(mine, labels, strict=True) if label == number][:MOST]
            corners = [thing.corners for thing in true if thing.class_id == number]
            positives[number][index] = len(corners)
            iou = probiou([one["corners"] for one in own], corners)
            scores = np.array([one["score"] or 0.0 for one in own], float)
            right = _greedy(iou)
            parts[number].append((scores, right, np.zeros_like(right), np.full(len(own), index)))
    return {"all": [_in_order(parts[number], positives[number]) for number in truth.names]}


def _greedy(iou: np.ndarray) -> np.ndarray:
    """IoUs (n found, the surest first, m true) → bool (10, n): which of them take a true one, each its best free."""
    right = np.zeros((len(THRESHOLDS), len(iou)), bool)
    for row, threshold in enumerate(THRESHOLDS):
        free = np.ones(iou.shape[1], bool)
        for index, own in enumerate(iou):
            open_ones = np.where(free, own, -1.0)
            if len(own) and open_ones.max() >= threshold:
                free[open_ones.argmax()] = False
                right[row, index] = True
    return right


def probiou(found: Sequence[Any], true: Sequence[Any]) -> np.ndarray:
    """(n, 8), (m, 8) corners → (n, m): 1 minus the Hellinger distance of the boxes as Gaussians (arXiv 2106.06072)."""
    if not len(found) or not len(true):
        return np.zeros((len(found), len(true)))
    (x1, y1, a1, b1, c1), (x2, y2, a2, b2, c2) = (_gaussians(boxes) for boxes in (found, true))
    x, y = x1[:, None] - x2, y1[:, None] - y2
    a, b, c = a1[:, None] + a2, b1[:, None] + b2, c1[:, None] + c2
    eps = 1e-7
    below = a * b - c**2 + eps
    distance = (a * y**2 + b * x**2) / below / 4 + (c * -x * y) / below / 2
    inner = np.clip(a1 * b1 - c1**2, 0, None)[:, None] * np.clip(a2 * b2 - c2**2, 0, None)
    distance += np.log((a * b - c**2) / (4 * np.sqrt(inner) + eps) + eps) / 2
    return 1 - np.sqrt(1 - np.exp(-np.clip(distance, eps, 100)) + eps)


def _gaussians(boxes: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """(n, 8) corners → centre x, y and covariance xx, yy, xy, each (n,)."""
    rects = [cv2.minAreaRect(np.array(box, np.float32).reshape(4, 2)) for box in boxes]
    x, y, w, h, angle = (np.array(values, float) for values in zip(*((*c, *s, a) for c, s, a in rects), strict=True))
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    w, h = w**2 / 12, h**2 / 12
    return x, y, w * cos**2 + h * sin**2, w * sin**2 + h * cos**2, (w - h) * cos * sin


# --- Figures


def _resamples(matches: Sequence[Matches]) -> int:
    numbers = max(1, sum(one.right.size for one in matches))
    return int(np.clip(WORK // (8 * numbers), 100, bootstrap.RESAMPLES))


def _average_precision(
    truth: Truth, matches: Sequence[Matches]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[float]]]:
    """(measures, classes, curves) of `measure`."""
    tables = [one.precision()[0] for one in matches]
    present = [n for n, one in enumerate(matches) if one.positives.sum()]
    values = np.array([tables[n].mean(axis=1) for n in present]).reshape(len(present), len(THRESHOLDS))
    drawn = bootstrap.weights(len(truth.samples), _resamples(matches))
    replicates = np.full((len(drawn), len(THRESHOLDS)), np.nan)
    for number, weights in enumerate(drawn):
        own = np.array([matches[n].precision(weights)[0].mean(axis=1) for n in present])
        if own.size and np.isfinite(own).any():
            replicates[number] = np.nanmean(own, axis=0)
    whole = values.mean(axis=0) if len(present) else np.full(len(THRESHOLDS), np.nan)
    measures = {
        "mAP50-95": figure(whole.mean(), replicates.mean(axis=1)),
        "mAP50": figure(whole[0], replicates[:, 0]),
        "mAP75": figure(whole[5], replicates[:, 5]),
    }
    names = list(truth.names.values())
    classes = []
    for n, one in enumerate(matches):
        row = values[present.index(n)] if n in present else None
        figures = (
            {"mAP50-95": None, "mAP50": None}
            if row is None
            else {"mAP50-95": float(row.mean()), "mAP50": float(row[0])}
        )
        classes.append({"name": names[n], "objects": int(one.positives.sum()), **figures})
    curves = {names[n]: tables[n][0].round(4).tolist() for n in present}
    if present:
        curves[""] = np.mean([tables[n][0] for n in present], axis=0).round(4).tolist()
    return measures, classes, curves


def _best_conf(matches: Sequence[Matches], classes: list[dict[str, Any]]) -> dict[str, Any]:
    """The score from which on F1 at IoU 0.5, the mean over the classes, is highest; each class's own into `classes`.

    None where nothing right is found; the middle of several that are as good.
    """
    curves = []
    for one, row in zip(matches, classes, strict=True):
        counted = ~one.ignored[0]
        scores, right = one.scores[counted], one.right[0][counted]
        count = np.searchsorted(-scores, -CONFIDENCES, side="right")  # how many have at least that score
        true = np.concatenate([[0], np.cumsum(right)])[count]
        positives = one.positives.sum()
        row["best_conf"] = None
        if positives:
            curve = np.array([2 * true / (count + positives), true / np.maximum(count, 1), true / positives])
            row["best_conf"] = float(CONFIDENCES[_highest(curve[0])]) if curve[0].any() else None
            curves.append(curve)
    if not np.any(curves):
        return {"conf": None, "f1": None, "precision": None, "recall": None}
    mean = np.mean(curves, axis=0)
    at = _highest(mean[0])
    return {
        "conf": float(CONFIDENCES[at]),
        **dict(zip(("f1", "precision", "recall"), mean[:, at].tolist(), strict=True)),
    }


def _highest(values: np.ndarray) -> int:
    """Where they are highest; the middle one of such places."""
    places = np.flatnonzero(values > values.max() - 1e-12)
    return int(places[len(places) // 2])


def _calibration(matches: Sequence[Matches]) -> dict[str, Any]:
    """Whether a score is the chance to be right, at IoU 0.5, of detections from CALIBRATED on.

    error: the mean distance of both over BINS of the score, weighted by their detections.
    """
    scores = np.concatenate([one.scores[~one.ignored[0]] for one in matches] or [np.zeros(0)])
    right = np.concatenate([one.right[0][~one.ignored[0]] for one in matches] or [np.zeros(0, bool)])
    kept = scores >= CALIBRATED
    return calibration(scores[kept], right[kept])


def calibration(scores: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """{error, bins: [{score, right, count}]} of scores (n,) and whether each is right (n,)."""
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    bins = [
        {"score": float(scores[own].mean()), "right": float(right[own].mean()), "count": int(own.sum())}
        for own in (places == n for n in range(BINS))
        if own.any()
    ]
    error = sum(one["count"] * abs(one["score"] - one["right"]) for one in bins) / len(scores) if bins else None
    return {"error": error, "bins": bins}


def _of_pictures(truth: Truth, matches: Sequence[Matches], conf: float | None) -> dict[str, float]:
    """Sample.id → F1 at IoU 0.5 and that score; 1 where nothing is there and nothing is found."""
    true, found, positives = (np.zeros(len(truth.samples)) for _ in range(3))
    for one in matches:
        counted = ~one.ignored[0] & (one.scores >= (conf or 0.0))
        np.add.at(found, one.pictures[counted], 1)
        np.add.at(true, one.pictures[counted & one.right[0]], 1)
        positives += one.positives
    whole = found + positives
    f1 = np.where(whole > 0, 2 * true / np.maximum(whole, 1), 1.0)
    return {sample.id: float(value) for sample, value in zip(truth.samples, f1, strict=True)}


def confusion(truth: Truth, found: Found, sizes: Sizes, conf: float, oriented: bool = False) -> dict[str, Any]:
    """Which class is taken for which, at IoU 0.5 and a least score: labels, and counts (n + 1, n + 1).

    A row is a true class, a column a found one; the last row is of what is nothing, the last column of what is missed.
    Pairs of the largest IoU match first, whatever their classes; crowds, and what else is found in one, are left out.
    """
    ids, numbers = class_ids(truth), {class_id: n for n, class_id in enumerate(truth.names)}
    last = len(numbers)
    counts = np.zeros((last + 1, last + 1), int)
    for sample in truth.samples:
        true = [one for one in things_of(truth, sample, sizes) if not one.crowd]
        mine = [one for one in found.get(sample.id, ()) if (one["score"] or 0.0) >= conf]
        mine = [one for one in mine if (one["label"] or "").strip().lower() in ids]
        crowds = [one for one in things_of(truth, sample, sizes) if one.crowd]
        crowded = _box_iou(mine, crowds).max(axis=1, initial=0) >= THRESHOLDS[0]
        if oriented:
            iou = probiou([one["corners"] for one in mine], [thing.corners for thing in true])
        else:
            iou = _box_iou(mine, true)
        rows = [numbers[thing.class_id] for thing in true]
        columns = [numbers[ids[one["label"].strip().lower()]] for one in mine]
        pairs = _pairs(iou)
        for own, other in pairs.items():
            counts[rows[other], columns[own]] += 1
        for own in set(range(len(mine))) - pairs.keys():
            counts[last, columns[own]] += not crowded[own]
        for other in set(range(len(true))) - set(pairs.values()):
            counts[rows[other], last] += 1
    return {"labels": list(truth.names.values()), "counts": counts.tolist()}


def _box_iou(found: Sequence[Mapping[str, Any]], true: Sequence[Thing]) -> np.ndarray:
    """(n, m): of boxes; with a crowd, the share of the found box that lies in it, as COCO has it."""
    if not found or not true:
        return np.zeros((len(found), len(true)))
    boxes = [[one["x1"], one["y1"], one["x2"] - one["x1"], one["y2"] - one["y1"]] for one in found]
    others = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (thing.box for thing in true)]
    return np.array(rle.iou(boxes, others, [int(thing.crowd) for thing in true]))


def _pairs(iou: np.ndarray) -> dict[int, int]:
    """Found → true, of the largest IoU first, from 0.5 on."""
    table, pairs = iou.copy(), dict[int, int]()
    while table.size and table.max() >= THRESHOLDS[0]:
        own, other = (int(place) for place in np.unravel_index(table.argmax(), table.shape))
        pairs[own] = other
        table[own], table[:, other] = -1, -1
    return pairs
