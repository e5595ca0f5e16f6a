"""Answers in words: captions, questions, read text, and others to the letter."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shardsight.errors import UsageError
from shardsight.measures import bootstrap, vqa
from shardsight.measures.captions import bleu, bleu_parts, cider, ngrams, tokens
from shardsight.truth import Sample, Truth

CLOSE = 0.5  # of ANLS: a distance from which on an answer is simply wrong
_KINDS = {
    **{"caption": "caption", "cap": "caption", "describe": "caption", "answer": "vqa", "ocr": "ocr"},
    **{"detect": "objects", "segment": "objects"},
}
Asked = tuple[str, str, Sequence[str]]  # Sample.id, what the model said, the answers that are right


def kind_of(prompt: str) -> str:
    """caption, vqa, ocr or text, by a prompt's first word. Prompts of `detect` and `segment` are `objects`."""
    return _KINDS.get(prompt.partition(" ")[0], "text")


def measure(truth: Truth, said: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """said: Sample.id → prompt → the answer's text; what is not there is an empty answer.

    Kind → measures (name → figure, see bootstrap), pictures (id → mean over its prompts, see below), prompts (their
    number) and resamples. A figure's interval is over pictures, each with all of its prompts. `exact` is the share of
    answers that are, but for spaces around them, one of the right ones to the letter.

    caption: CIDEr (CIDEr-D; most are 0 to 2, 10 at most) and BLEU-4, of the set; a picture has its CIDEr / 10. In the
    interval of CIDEr, how rare words are stays that of the whole set.
    vqa: accuracy, as VQA's (see vqa.accuracy), and the same without leaving one out; a picture has the first.
    ocr: F1, precision and recall of words whatever their order; CER and WER, edits over the letters and words of the
    nearest right answer, which can exceed 1; ANLS (arXiv 1905.13648), without regard to case. A picture has its F1.
    text: exact.
    """
    asked: dict[str, list[Asked]] = defaultdict(list)
    for sample in truth.samples:
        for prompt, answers in sample.asked.items():
            if (kind := kind_of(prompt)) != "objects":
                asked[kind].append((sample.id, _said(said, sample, prompt), answers or [""]))
    return {kind: _figures(kind, some) for kind, some in asked.items()}


def _said(said: Mapping[str, Mapping[str, str]], sample: Sample, prompt: str) -> str:
    return said.get(sample.id, {}).get(prompt, "").strip()


def _figures(kind: str, asked: Sequence[Asked]) -> dict[str, Any]:
    ids = list(dict.fromkeys(id for id, _, _ in asked))
    number = {id: n for n, id in enumerate(ids)}
    places = [number[id] for id, _, _ in asked]
    scores = _scores(kind, asked)

    def total(name: str) -> np.ndarray:
        """Of each picture's prompts, (pictures, …)."""
        values = np.array([one[name] for one in scores], float)
        sums = np.zeros((len(ids), *values.shape[1:]))
        np.add.at(sums, places, values)
        return sums

    count = total("one")
    measures = {"exact": bootstrap.ratio(total("exact"), count)}
    if kind == "caption":
        measures = {"CIDEr": bootstrap.ratio(total("cider"), count), "BLEU-4": _bleu(total("bleu")), **measures}
    if kind == "vqa":
        loose = bootstrap.ratio(total("loose"), count)
        measures = {"accuracy": bootstrap.ratio(total("right"), count), "accuracy, none left out": loose, **measures}
    if kind == "ocr":
        measures = _reading(total) | {"ANLS": bootstrap.ratio(total("anls"), count), **measures}
    return {
        **{"measures": measures, "pictures": dict(zip(ids, (total("right") / count).tolist(), strict=True))},
        **{"prompts": len(asked), "resamples": bootstrap.RESAMPLES},
    }


def _scores(kind: str, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """What each prompt adds to the figures of its kind; `right` is what its picture's own is the mean of."""
    exact = [float(text in map(str.strip, answers)) for _, text, answers in asked]
    if kind == "caption":
        own = _captions(asked)
    elif kind == "text":
        own = [{"right": value} for value in exact]
    else:
        own = [(_vqa if kind == "vqa" else _ocr)(text, answers) for _, text, answers in asked]
    return [{**one, "exact": value, "one": 1.0} for one, value in zip(own, exact, strict=True)]


def _reading(total: Callable[[str], np.ndarray]) -> dict[str, Any]:
    common, found, true = total("common"), total("found"), total("true")
    return {
        "word F1": bootstrap.ratio(common, found + true, lambda share: 2 * share),
        "word precision": bootstrap.ratio(common, found),
        "word recall": bootstrap.ratio(common, true),
        "CER": bootstrap.ratio(total("letter errors"), total("letters")),
        "WER": bootstrap.ratio(total("word errors"), true),
    }


def _bleu(parts: np.ndarray) -> dict[str, Any]:
    return bootstrap.figure(float(bleu(parts.sum(axis=0))), bleu(bootstrap.weights(len(parts)) @ parts))


def _captions(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    found = [ngrams(tokens(text)) for _, text, _ in asked]
    truth = [[ngrams(tokens(one)) for one in right] for _, _, right in asked]
    return [
        {"cider": value, "bleu": bleu_parts(one, right), "right": value / 10}
        for value, one, right in zip(cider(found, truth), found, truth, strict=True)
    ]


def _vqa(text: str, answers: Sequence[str]) -> dict[str, Any]:
    return {"right": vqa.accuracy(text, answers), "loose": vqa.accuracy(text, answers, leave_one_out=False)}


def _ocr(text: str, answers: Sequence[str]) -> dict[str, Any]:
    """Against the nearest of the right answers; ANLS takes the best of them by its own rule. Raises UsageError."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ModuleNotFoundError:
        raise UsageError("read text is compared with rapidfuzz: pip install 'shardsight[evaluate]'") from None
    right = min((one.strip() for one in answers), key=lambda one: Levenshtein.normalized_distance(text, one))
    words, others = text.split(), right.split()
    common = (Counter(words) & Counter(others)).total()
    near = min(Levenshtein.normalized_distance(text.lower(), one.strip().lower()) for one in answers)
    return {
        **{"letter errors": Levenshtein.distance(text, right), "letters": len(right)},
        **{"word errors": Levenshtein.distance(words, others), "anls": 1 - near if near < CLOSE else 0.0},
        **{"common": common, "found": len(words), "true": len(others)},
        "right": 2 * common / (len(words) + len(others)) if words or others else 1.0,
    }
