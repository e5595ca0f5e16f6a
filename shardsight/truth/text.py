"""Prompts with their right answers: JSONL of image, prefix and suffix, tars and Parquet of the same, or VQA's JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardsight.errors import UsageError
from shardsight.models.paligemma.prompts import CODES, LOCATIONS, Prompt, PromptError
from shardsight.results.coverage import Coverage
from shardsight.sources import Listing, Record
from shardsight.sources import read as records_of
from shardsight.sources.kinds import SHARDS
from shardsight.sources.parquet import holds_text
from shardsight.storage import Storage
from shardsight.truth.labels import MISSING, UNREADABLE, Faults, Sample, Truth
from shardsight.truth.pictures import Pictures

IGNORED = "files that hold no pictures; left out"
NO_QUESTION = "lines without a picture, a prompt or an answer; left out"
NO_PROMPT = "prompts that PaliGemma does not take; left out"
NO_OBJECT = "right answers to detect or segment in which no object can be read; taken for nothing to be found"
ASKED_TWICE = "prompts that are there twice for a picture; their answers are joined"
_OBJECT = re.compile(r"((?:<loc\d{4}>)+)\s*((?:<seg\d{3}>)*)([^<;]*)")


def read_jsonl(path: str, text: str, storage: Storage) -> Truth:
    """Lines of {"image", "prefix", "suffix"}; a suffix is a text, or a list of texts that are all right. Pictures are
    relative to the file. Raises UsageError."""
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            entries.append((f"line {number}", _entry(line)))
    return _truth(path, entries, _places(path, "", entries, storage), Faults())


def read_shards(path: str, storage: Storage) -> Truth:
    """A tar or Parquet file, a folder of them or a glob: each picture with a `prefix` and a `suffix`.

    In Parquet they are columns beside `image`, of bytes, {bytes, path} or text, a path. In a tar they are in the
    sample's .json, or are its files .prefix and .suffix or .txt. Raises UsageError.
    """
    faults, entries, places = Faults(), list[tuple[str, dict[str, Any]]](), dict[str, tuple[Sample, bool]]()
    listing = Listing([path], storage)
    for unit in listing.left(Coverage()):
        if unit.kind not in SHARDS or not unit.uri:
            listing.ignored["pictures and videos beside tars and Parquet files"] += len(unit.files) or 1
            continue
        linked = unit.kind == "parquet" and holds_text(unit.uri, "image", storage)
        for record in records_of(replace(unit, uri_column="image" if linked else None), storage):
            listing.ignored.update(record.ignored)
            if record.failure:
                faults.add(UNREADABLE, f"{record.id} ({record.failure.type})")
                continue
            places[record.id] = (Sample(record.uri) if linked else Sample(record.id, shard=unit.uri)), True
            entries.append((record.id, {"image": record.id} | _asked(record)))
    for reason, count in listing.ignored.items():
        faults.add(IGNORED, f"{count} {reason}")
    return _truth(path, entries, places, faults)


def _asked(record: Record) -> dict[str, Any]:
    """prefix and suffix of a record, as far as they are there."""
    said = json.loads(record.metadata or "{}")
    inside = said.get("json") if isinstance(said.get("json"), dict) else {}
    return {"prefix": said.get("prefix"), "suffix": said.get("suffix", said.get("txt"))} | {
        key: inside[key] for key in ("prefix", "suffix") if key in inside
    }


def _entry(line: str) -> dict[str, Any]:
    """Empty, and thus counted as a fault, where the line is no JSON object."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_vqa(content: Any) -> bool:
    return isinstance(content, dict) and "questions" in content


def read_vqa(path: str, content: Mapping[str, Any], storage: Storage) -> Truth:
    """VQAv2's questions, with `annotations` in the same file or in the one whose name has `annotations` instead of
    `questions`; a picture is `image`, or COCO's name of `image_id`. Raises UsageError."""
    annotations = content.get("annotations")
    if annotations is None:
        other = "annotations".join(path.rsplit("questions", 1))
        if other == path or not storage.exists(other):
            raise UsageError(f"{path} has questions, but no annotations: put them beside it as {other}")
        annotations = json.loads(storage.read(other))["annotations"]
    answers = {
        one["question_id"]: [str(answer["answer"]) for answer in one.get("answers") or ()]
        or [str(one["multiple_choice_answer"])]
        for one in annotations
    }
    subset = content.get("data_subtype", "val2014")
    entries = []
    for question in content["questions"]:
        image = question.get("image") or f"COCO_{subset}_{int(question['image_id']):012d}.jpg"
        prefix = f"answer en {question['question']}"
        right = answers.get(question["question_id"])
        entries.append((f"question {question['question_id']}", {"image": image, "prefix": prefix, "suffix": right}))
    return _truth(path, entries, _places(path, subset, entries, storage), Faults())


Entries = Sequence[tuple[str, Mapping[str, Any]]]  # what a fault of it is named by; image, prefix and suffix


def _places(path: str, part: str, entries: Entries, storage: Storage) -> dict[str, tuple[Sample, bool]]:
    """image → its sample, and whether it is there. part: of the set, after which a folder of pictures may be named."""
    images = list(dict.fromkeys(one["image"] for _, one in entries if isinstance(one.get("image"), str)))
    found = Pictures(path, part, storage).find_all([(one, "") for one in images])
    return {image: (Sample(uri), there) for image, (uri, there) in zip(images, found, strict=True)}


def _truth(path: str, entries: Entries, places: Mapping[str, tuple[Sample, bool]], faults: Faults) -> Truth:
    samples = dict[str, Sample]()
    for name, entry in entries:
        image, prefix, suffix = (entry.get(key) for key in ("image", "prefix", "suffix"))
        if not isinstance(image, str) or not isinstance(prefix, str) or suffix is None or suffix == []:
            faults.add(NO_QUESTION, name)
            continue
        try:
            prompt = Prompt.of(prefix).text
        except PromptError as error:
            faults.add(NO_PROMPT, f"{name}: {error}")
            continue
        sample, there = places[image]
        if sample.id not in samples and not there:
            faults.add(MISSING, sample.id)
        answers = [str(one) for one in suffix] if isinstance(suffix, list) else [str(suffix)]
        if prompt.startswith(("detect ", "segment ")) and answers[0].strip() and not objects_in(prompt, answers[0]):
            faults.add(NO_OBJECT, name)
        asked = samples.setdefault(sample.id, sample).asked
        if prompt in asked:
            faults.add(ASKED_TWICE, f"{name}: {image}, {prompt}")
        asked[prompt] = asked.get(prompt, []) + answers
    if not samples:
        reason = next((f"; {one}: {why}" for why, names in faults.found().items() for one in names), "")
        raise UsageError(f"{path} has nothing with image, prefix and suffix{reason}")
    return Truth("text", {}, list(samples.values()), faults.found())


def objects_in(prompt: str, answer: str) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, bins y1, x1, y2, x2, codes of the mask or none) of each object in an answer to `detect` or `segment`.

    Left out, as in a model's answers: another number of bins or codes, and boxes without area.
    """
    names = Prompt.of(prompt).names
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for match in _OBJECT.finditer(answer):
        bins, codes = (tuple(int(digits) for digits in re.findall(r"\d+", part)) for part in match.group(1, 2))
        if len(bins) == LOCATIONS and len(codes) in (0, CODES) and bins[2] > bins[0] and bins[3] > bins[1]:
            found.append((match[3].strip() or (names[0] if len(names) == 1 else ""), bins, codes))
    return found
