"""Prompts with their right answers: JSONL of image, prefix and suffix, or the JSON of VQA."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardsight.errors import UsageError
from shardsight.models.paligemma.prompts import CODES, LOCATIONS, Prompt, PromptError
from shardsight.storage import Storage
from shardsight.truth.labels import MISSING, Faults, Sample, Truth
from shardsight.truth.pictures import Pictures

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
    return _truth(path, "", entries, storage)


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
    return _truth(path, subset, entries, storage)


def _truth(path: str, part: str, entries: Sequence[tuple[str, Mapping[str, Any]]], storage: Storage) -> Truth:
    """part: of the set, after which a folder of its pictures may be named."""
    faults, samples = Faults(), dict[str, Sample]()
    images = list(dict.fromkeys(one["image"] for _, one in entries if isinstance(one.get("image"), str)))
    places = dict(zip(images, Pictures(path, part, storage).find_all([(one, "") for one in images]), strict=True))
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
        uri, there = places[image]
        if uri not in samples and not there:
            faults.add(MISSING, uri)
        answers = [str(one) for one in suffix] if isinstance(suffix, list) else [str(suffix)]
        if prompt.startswith(("detect ", "segment ")) and answers[0].strip() and not objects_in(prompt, answers[0]):
            faults.add(NO_OBJECT, name)
        asked = samples.setdefault(uri, Sample(uri)).asked
        if prompt in asked:
            faults.add(ASKED_TWICE, f"{name}: {image}, {prompt}")
        asked[prompt] = asked.get(prompt, []) + answers
    if not samples:
        raise UsageError(f"{path} has no line with image, prefix and suffix: write one a question")
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
