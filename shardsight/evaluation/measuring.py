"""What is measured of a model's rows, by the task of the labelled set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardsight.measures import boxes, classify, objects, text
from shardsight.truth import Truth

KINDS = {
    **{"detect": ("boxes",), "segment": ("boxes", "masks"), "pose": ("boxes", "keypoints")},
    **{"obb": ("oriented",), "classify": ("classes",)},
}
DEFAULT_CONF = 0.25  # of the confusion, where no score is the best


@dataclass(frozen=True)
class Rows:
    """A model's rows by picture, as dicts of row.ROW. names: the model's classes; None of a model that names freely."""

    rows: Mapping[str, Mapping[str, Any]]
    names: Sequence[str] | None

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {id: (row["width"], row["height"]) for id, row in self.rows.items() if row["width"] and row["height"]}

    def found(self) -> dict[str, list[Mapping[str, Any]]]:
        """Detections of each picture: YOLO's, and those in PaliGemma's answers."""
        answers = {id: [one for answer in row["answers"] or () for one in answer["detections"] or ()]
                   for id, row in self.rows.items()}  # fmt: skip
        return {id: [*(row["detections"] or ()), *answers[id]] for id, row in self.rows.items()}


def measure(truth: Truth, model: Rows, decode: objects.Decode | None = None) -> dict[str, dict[str, Any]]:
    """Kind → what the module of that kind in measures says. The first kind's `confusion` is of its best score.

    decode: see objects.measure.
    """
    if truth.task == "text":
        answers = {id: {one["prompt"]: one for one in row["answers"] or ()} for id, row in model.rows.items()}
        said = {id: {prompt: one["text"] or "" for prompt, one in own.items()} for id, own in answers.items()}
        return text.measure(truth, said) | objects.measure(truth, answers, model.sizes(), decode)
    if truth.task == "classify":
        return {"classes": classify.measure(truth, {id: row["classes"] or [] for id, row in model.rows.items()})}
    found, sizes = model.found(), model.sizes()
    measured = {kind: boxes.measure(truth, found, sizes, kind) for kind in KINDS[truth.task]}
    first = next(iter(measured.values()))
    conf = first["best_conf"]["conf"]
    conf = DEFAULT_CONF if conf is None else conf
    first["confusion"] = boxes.confusion(truth, found, sizes, conf, truth.task == "obb") | {"conf": conf}
    return measured


def main_of(measured: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """(kind, measure) that decides between models: of the last kind; of text, of the first with a rule of its own."""
    for kind in ("vqa", "caption", "ocr", "referring", "text"):
        if kind in measured:
            return kind, next(iter(measured[kind]["measures"]))
    kind = list(measured)[-1]
    return kind, next(iter(measured[kind]["measures"]))


def classes_of(truth: Truth, model: Rows) -> dict[str, Any]:
    """unknown: {label: detections} of classes that the truth lacks, which are left out of the figures.

    missing: classes of the truth that the model does not have."""
    known = boxes.class_ids(truth)
    labels: Counter[str] = Counter()
    for one in (one for found in model.found().values() for one in found):
        if (one["label"] or "").strip().lower() not in known:
            labels[one["label"] or "(no label)"] += 1
    for name in model.names or ():
        if name.strip().lower() not in known:
            labels.setdefault(name, 0)
    own = {name.strip().lower() for name in model.names or ()}
    missing = [] if model.names is None else [name for name in truth.names.values() if name.strip().lower() not in own]
    return {"unknown": dict(labels.most_common()), "missing": missing}


def pictures_of(truth: Truth, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Sample.id → how right the model is on that picture, 0 to 1, by the main figure's kind."""
    return dict(measured[main_of(measured)[0]]["pictures"]) if measured else {}
