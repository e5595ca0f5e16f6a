"""RefCOCO, RefCOCO+ and RefCOCOg as JSON: phrases, each of which refers to one object of COCO's instances.json."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardsight.errors import UsageError
from shardsight.models.paligemma.prompts import SEPARATOR, detect_answer
from shardsight.storage import Storage
from shardsight.truth.coco import read_coco
from shardsight.truth.labels import EMPTY, SAME_NAME, Sample, Truth, split_of

NO_INSTANCE = "phrases about an object that instances.json lacks; left out"
NO_PHRASE = "phrases that are empty, or have a `;`, which separates objects; left out"
ONE_PHRASE = "phrases that are said of several objects of a picture; all of them are right answers"
PICKLES = (".p", ".pkl", ".pickle")


def refuse_pickle(path: str) -> None:
    """RefCOCO's own files. Raises UsageError."""
    if path.endswith(PICKLES):
        convert = "import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb')), open('refs.json', 'w'))"
        raise UsageError(
            f"{path} is a pickle, which could run any program when it is read, and is not read: if you trust it, write "
            f'it as JSON beside its instances.json, python -c "{convert}"'
        )


def is_refs(content: Any) -> bool:
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and {"ann_id", "sentences"} <= first.keys()


def read_refs(path: str, content: Sequence[dict[str, Any]], storage: Storage, split: str | None) -> Truth:
    """[{ann_id, sentences: [{sent or raw}], split}], with instances.json beside it: each phrase is asked for by
    `detect`, and the answer has no label, as in big_vision's refcoco_mask2str. split: as for `read`. Raises UsageError.
    """
    folder = path.rpartition("/")[0]
    beside = f"{folder}/instances.json"
    if not storage.exists(beside):
        raise UsageError(f"{path} has phrases about COCO's objects: put instances.json beside it")
    coco = json.loads(storage.read(beside))
    objects = {one["id"]: one for one in coco["annotations"]}
    splits, chosen = split_of((str(one["split"]) for one in content if one.get("split")), split)
    # Each phrase as an object of a class of its own, so that pictures, boxes and masks are read as COCO's are.
    phrases: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    lost = {NO_INSTANCE: list[str](), NO_PHRASE: list[str](), ONE_PHRASE: list[str]()}
    for ref in content:
        if chosen and ref.get("split") != chosen:
            continue
        for phrase in dict.fromkeys(str(one.get("sent") or one.get("raw") or "").strip() for one in ref["sentences"]):
            name = f"{ref['ann_id']}: {phrase}"
            if ref["ann_id"] not in objects:
                lost[NO_INSTANCE].append(name)
            elif not phrase or SEPARATOR.search(phrase) or "\n" in phrase:
                lost[NO_PHRASE].append(name)
            else:
                number = phrases.setdefault(phrase, len(phrases))
                annotations.append(objects[ref["ann_id"]] | {"id": len(annotations), "category_id": number})
    if not annotations:
        raise UsageError(f"{path} has no phrases about the objects of instances.json")
    asked = {one["image_id"] for one in annotations}
    own = {
        "images": [one for one in coco["images"] if one["id"] in asked],
        "categories": [{"id": number, "name": phrase} for phrase, number in phrases.items()],
        "annotations": annotations,
    }
    truth = read_coco(f"{folder}/instances_train2014.json", own, storage, None)  # of which all pictures are
    samples = [_asked(sample, truth.names, lost[ONE_PHRASE]) for sample in truth.samples]
    faults = {reason: names for reason, names in truth.faults.items() if reason not in (SAME_NAME, EMPTY)}
    faults |= {reason: names for reason, names in lost.items() if names}
    return Truth("text", {}, samples, faults, splits=splits)


def _asked(sample: Sample, phrases: dict[int, str], several: list[str]) -> Sample:
    things = [replace(thing, phrase=phrases[thing.class_id]) for thing in sample.things]
    asked: dict[str, list[str]] = {}
    for thing in things:
        prompt = f"detect {thing.phrase}"
        if not sample.width or not sample.height:
            raise UsageError(f"{sample.id} has no width and height in instances.json: add them")
        if prompt in asked:
            several.append(f"{sample.id}, {thing.phrase}")
        answer, lost = detect_answer([(thing.box, "", ())], sample.width, sample.height)
        if not lost:
            asked.setdefault(prompt, []).append(answer)
    return replace(sample, things=things, asked=asked)
