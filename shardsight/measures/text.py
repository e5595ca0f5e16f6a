"""Answers in words: questions as VQA counts them, reading by its errors in letters and words, others to the letter."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from shardsight.measures import bootstrap
from shardsight.truth import Truth

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": 0, **{word: number for number, word in enumerate(_WORDS)}}
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]")
CLOSE = 0.5  # of ANLS: a distance from which on an answer is simply wrong


def kind_of(prompt: str) -> str:
    """vqa, ocr or text, by a prompt's first word. Prompts of `detect` and `segment` are `objects`."""
    word = prompt.partition(" ")[0]
    return {"answer": "vqa", "ocr": "ocr", "detect": "objects", "segment": "objects"}.get(word, "text")


def measure(truth: Truth, said: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """said: Sample.id → prompt → the answer's text; what is not there is an empty answer.

    Kind → measures, pictures (id → mean of the kind's first measure) and resamples. A figure's interval is over
    pictures, each with all of its prompts.
    """
    scored: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for sample in truth.samples:
        for prompt, answers in sample.asked.items():
            kind = kind_of(prompt)
            if kind != "objects":
                text = said.get(sample.id, {}).get(prompt, "").strip()
                scored[kind][sample.id].append(_SCORES[kind](text, answers))
    return {kind: _figures(kind, pictures) for kind, pictures in scored.items()}


def _figures(kind: str, pictures: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    def total(name: str) -> list[float]:
        return [sum(one[name] for one in scores) for scores in pictures.values()]

    count = [float(len(scores)) for scores in pictures.values()]
    measures = {"exact": bootstrap.ratio(total("exact"), count)}
    if kind == "vqa":
        measures = {"accuracy": bootstrap.ratio(total("accuracy"), count), **measures}
    if kind == "ocr":
        both = [found + true for found, true in zip(total("found"), total("true"), strict=True)]
        measures = {
            "word F1": bootstrap.ratio(total("common"), both, lambda share: 2 * share),
            "word precision": bootstrap.ratio(total("common"), total("found")),
            "word recall": bootstrap.ratio(total("common"), total("true")),
            "CER": bootstrap.ratio(total("letter errors"), total("letters")),
            "WER": bootstrap.ratio(total("word errors"), total("true")),
            **{"ANLS": bootstrap.ratio(total("anls"), count), **measures},
        }
    first = "accuracy" if kind == "vqa" else "exact"
    each = {id: sum(one[first] for one in scores) / len(scores) for id, scores in pictures.items()}
    return {"measures": measures, "pictures": each, "prompts": int(sum(count)), "resamples": bootstrap.RESAMPLES}


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA's: of ten people's answers, the mean over each nine of them of min(1, how many agree / 3).

    With fewer than three answers, 1 or 0."""
    said, right = normalised(text), [normalised(one) for one in answers]
    if len(right) < 3:
        return float(said in right)
    agree = [sum(other == said for other in right[:n] + right[n + 1 :]) for n in range(len(right))]
    return sum(min(1.0, one / 3) for one in agree) / len(right)


def normalised(text: str) -> str:
    """Lower case, without articles and punctuation, small numbers as digits. VQA's own evaluation also has a table of
    contractions, and joins some words at punctuation where this separates them."""
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", _PUNCTUATION.sub(" ", text.lower().replace("'", "")))
    words = [str(_NUMBERS.get(word, word)) for word in text.split() if word not in _ARTICLES]
    return " ".join(words)


def distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Levenshtein's, of letters or words."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        above, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (one != other))
    return row[-1]


def _text(text: str, answers: Sequence[str]) -> dict[str, float]:
    return {"exact": float(text in [one.strip() for one in answers])}


def _vqa(text: str, answers: Sequence[str]) -> dict[str, float]:
    return _text(text, answers) | {"accuracy": vqa_accuracy(text, answers)}


def _ocr(text: str, answers: Sequence[str]) -> dict[str, float]:
    """Against the nearest of the right answers."""
    right = min((one.strip() for one in answers), key=lambda one: distance(text, one))
    words, others = text.split(), right.split()
    errors, longest = distance(text, right), max(len(text), len(right), 1)
    near = errors / longest
    return _text(text, answers) | {
        **{"letter errors": errors, "letters": len(right), "word errors": distance(words, others)},
        **{"common": (Counter(words) & Counter(others)).total(), "found": len(words), "true": len(others)},
        "anls": 1 - near if near < CLOSE else 0.0,
    }


_SCORES = {"text": _text, "vqa": _vqa, "ocr": _ocr}
