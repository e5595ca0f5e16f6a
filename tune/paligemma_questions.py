"""Labelled sets as questions to PaliGemma: boxes, masks and phrases by `detect` or `segment`, all else as it is."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pycocotools import mask as rle

from shardsight.errors import UsageError
from shardsight.models.paligemma.masks import MaskEncoder, crop
from shardsight.models.paligemma.prompts import SEPARATOR, class_prompts, detect_answer
from shardsight.sources.kinds import SHARDS, kind_of
from shardsight.storage import Storage
from shardsight.truth import BOXES, Sample, Thing, Truth, read
from shardsight.truth.labels import CROWD, NO_AREA, NO_MASK, OUTSIDE
from shardsight.truth.text import read_shards

SEMICOLON = "labels with a `;`, which separates objects, or empty ones; left out"
NO_AREA_LEFT_OUT = "boxes without area; left out"
CROWD_LEFT_OUT = "crowds; left out"
NO_MASK_LEFT_OUT = "objects without a mask; left out"
_TOLD = {OUTSIDE: "boxes that reach out of their picture; cut to it"}
_NOMINAL = 1024  # pixels of a side, where labels are shares of it: masks become 64×64 all the same


def read_questions(path: str, split: str, encoder: MaskEncoder | None, storage: Storage) -> Truth:
    """split: to be read of a set that names several. encoder: of masks; without it, objects are asked for by `detect`.
    Raises UsageError."""
    if _has_shards(path, storage):
        return read_shards(path, storage)
    return as_questions(read(path, storage, "segment" if encoder else "detect", split), encoder)


def _has_shards(path: str, storage: Storage) -> bool:
    """Whether it is a tar or Parquet file, a glob of them, or a folder that holds some and no data.yaml."""
    if kind_of(path) in SHARDS or not storage.is_folder(path) or storage.exists(f"{path}/data.yaml"):
        return kind_of(path) in SHARDS
    return any(kind_of(entry.uri) in SHARDS for entry in storage.walk(path))


def as_questions(truth: Truth, encoder: MaskEncoder | None = None) -> Truth:
    """Labelled objects by `detect` of all classes, NAMES at a time, or of each one's phrase; with an encoder by
    `segment`.

    Left out are boxes without area, crowds, and with an encoder what has no mask. Raises UsageError for sets without
    boxes, and of unknown sizes.
    """
    phrased = any(thing.phrase for sample in truth.samples for thing in sample.things)
    if truth.task == "text" and not (phrased and encoder):
        return truth
    if truth.task not in (*BOXES, "text"):
        raise UsageError(
            "PaliGemma is trained on questions with answers, or on labelled boxes, and not on whole classes"
        )
    lost: dict[str, list[str]] = defaultdict(list)
    known = {id: name for id, name in truth.names.items() if name.strip() and not SEPARATOR.search(name)}
    for sample in truth.samples if len(known) < len(truth.names) else ():
        strange = [truth.names[thing.class_id] for thing in sample.things if thing.class_id not in known]
        lost[SEMICOLON] += [f"{sample.id}: {name}" for name in strange]
    truth = replace(truth, names=known)
    samples = [replace(one, asked=_asked(one, truth, encoder, lost)) for one in truth.samples]
    told = {_TOLD.get(reason, reason): names for reason, names in truth.faults.items()}
    told = {reason: names for reason, names in told.items() if reason not in (NO_AREA, CROWD, NO_MASK)}
    return Truth("text", {}, samples, told | lost, splits=truth.splits)


def _asked(
    sample: Sample, truth: Truth, encoder: MaskEncoder | None, lost: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Prompt → right answers. lost: reason → names, added to."""
    width, height = (_NOMINAL, _NOMINAL) if truth.normalised else (sample.width, sample.height)
    if not width or not height:
        raise UsageError(f"{sample.id} has no width and height in the labels: add them")
    things = [thing.scaled(width, height) if truth.normalised else thing for thing in sample.things]
    form = "segment" if encoder else "detect"
    asked: dict[str, list[str]] = {}
    if truth.task == "text":
        parts = [(f"{form} {thing.phrase}", [(thing, "")]) for thing in things]
    else:
        parts = [
            (prompt, [(thing, truth.names[thing.class_id]) for thing in things if thing.class_id in part])
            for prompt, part in class_prompts(truth.names, form)
        ]
    for prompt, named in parts:
        objects = list(_encoded(named, width, height, encoder, sample.id, lost))
        answer, empty = detect_answer(objects, width, height)
        if empty:
            lost[NO_AREA_LEFT_OUT] += [sample.id] * empty
        if answer or truth.task != "text":
            asked.setdefault(prompt, []).append(answer)
    return asked


def _encoded(
    things: Iterable[tuple[Thing, str]],
    width: int,
    height: int,
    encoder: MaskEncoder | None,
    name: str,
    lost: dict[str, list[str]],
) -> Iterator[tuple[Sequence[float], str, Sequence[int]]]:
    """Box, label and codes of each, without those that have no answer."""
    for thing, label in things:
        if thing.crowd:
            lost[CROWD_LEFT_OUT].append(name)
        elif encoder is None:
            yield thing.box, label, ()
        elif (mask := thing.rle(width, height)) is None:
            lost[NO_MASK_LEFT_OUT].append(name)
        elif (cut := crop(rle.decode(mask), thing.box)) is None:
            lost[NO_AREA_LEFT_OUT].append(name)
        else:
            yield thing.box, label, encoder.encode(cut[None])[0].tolist()
