"""PaliGemma's prompts, checked; how answers are sampled; and boxes, codes and labels from an answer's token ids."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from shardsight.errors import UsageError

# A `;` next to a space separates names; inside a word it belongs to the name.
SEPARATOR = re.compile(r"\s+;\s*|\s*;\s+|\s*;$")
_FORMS = {
    "caption": "caption LANG",
    "cap": "cap LANG",
    "describe": "describe LANG",
    "answer": "answer LANG QUESTION",
    "question": "question LANG ANSWER",
    "detect": "detect NAME ; NAME",
    "segment": "segment NAME ; NAME",
}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")
BINS, LOCATIONS, CODES = 1024, 4, 16
NOISE = "noise"  # label of the boxes that a model trained with --noise-boxes answers besides its own
_PART = re.compile(r"((?:<loc\d{4}>)*)\s*((?:<seg\d{3}>)*)\s*(.*)", re.DOTALL)
NAMES = 20  # in a prompt of `detect` about all classes of a set


class PromptError(UsageError, ValueError):
    """A prompt that PaliGemma was not trained to take: one sentence for the user."""


@dataclass(frozen=True)
class Prompt:
    """text: without the newline that ends it for the model. names: of the objects to find, in their order."""

    text: str
    names: tuple[str, ...] = ()

    @staticmethod
    def of(text: str) -> "Prompt":
        """One of the forms in Google's guide, or free text, as PaliGemma 2 mix takes. Raises PromptError.

        A form without its arguments is refused.
        """
        text = text.strip()
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if not text:
            raise PromptError("the prompt is empty: give one, as 'caption en'")
        if re.search("[\ud800-\udfff]", text):
            raise PromptError(f"{text!r} is not Unicode: it has a lone surrogate")
        if "\n" in text:
            raise PromptError(f"a newline ends a prompt, and {text!r} has one inside: give it on one line")
        if found := re.search(r"<(image|bos|eos|pad|unk)>", text):
            raise PromptError(f"{found[0]} is added by the model itself: leave it out of {text!r}")
        form = _FORMS.get(word)
        language, _, tail = rest.partition(" ")
        if form and (not rest or (word in ("answer", "question") and _LANGUAGE.fullmatch(language) and not tail)):
            raise PromptError(f"{text!r} lacks its rest: write {form}")
        if word not in ("detect", "segment"):
            return Prompt(text)
        names = tuple(name.strip() for name in SEPARATOR.split(rest))
        if not all(names):
            raise PromptError(f"{text!r} has an empty name: write {form}")
        return Prompt(text, names)


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, as in OpenAI's API.

    max_tokens: at most the model's own, which is the default. temperature: 0 takes the likeliest token. top_p: share of
    the probability that is drawn from, the likeliest tokens first. seed: the same one gives the same answer, whatever
    else is in the batch. stop: texts before which the answer ends.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """loc, seg: token id → its number. decode: ids → text."""

    loc: dict[int, int]
    seg: dict[int, int]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Found:
    """One well-formed sequence of an answer: `<loc>` ×4, perhaps `<seg>` ×16, perhaps a label.

    locations: y1, x1, y2, x2, of 0 to 1023. codes: of the mask, 0 to 127; empty without one.
    score: the geometric mean of the probabilities of the label's tokens; of the locations', where it has no label.
    """

    locations: tuple[int, ...]
    codes: tuple[int, ...]
    label: str | None
    score: float


def find(ids: Sequence[int], logprobs: Sequence[float], vocabulary: Vocabulary, names: Sequence[str]) -> list[Found]:
    """The objects in an answer, of token ids and their log-probabilities. names: that the prompt asked for.

    Left out, as invalid to big_vision's evaluators: another number of locations or codes in a row; a box without area.
    So are noise boxes, unless they are asked for.
    """
    kinds = ["l" if token in vocabulary.loc else "s" if token in vocabulary.seg else "t" for token in ids]
    found = []
    # Locations, then codes after nothing but space, then text up to the next location or code.
    for match in re.finditer(r"(l+)(t*)(s*)(t*)", "".join(kinds)):
        where, space, codes, after = (ids[slice(*match.span(group))] for group in range(1, 5))
        start, text = match.start(4), after
        if not codes or vocabulary.decode(space).strip():  # codes after text belong to no box
            codes, start, text = [], match.start(2), space
        if len(where) != LOCATIONS or len(codes) not in (0, CODES):
            continue
        y1, x1, y2, x2 = places = tuple(vocabulary.loc[token] for token in where)
        if y2 <= y1 or x2 <= x1:
            continue
        label, count = _label(text, vocabulary)
        scored = logprobs[start : start + count] if label else logprobs[slice(*match.span(1))]
        if not label and len(names) == 1:
            label = names[0]
        if label == NOISE and NOISE not in names:
            continue
        numbers = tuple(vocabulary.seg[token] for token in codes)
        found.append(Found(places, numbers, label or None, math.exp(fmean(scored))))
    return found


def _label(ids: Sequence[int], vocabulary: Vocabulary) -> tuple[str, int]:
    """The label at the start of `ids`, up to a separator, and how many tokens it takes."""
    label = SEPARATOR.split(vocabulary.decode(ids), maxsplit=1)[0].rstrip()
    count = next((n for n in range(len(ids)) if len(vocabulary.decode(ids[:n])) >= len(label)), len(ids))
    return label.lstrip(), count


def parts_of(answer: str) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
    """(locations, codes, all else) of each object in a right answer, as it is written, which may be wrong."""
    found = []
    for part in SEPARATOR.split(answer):
        match = _PART.fullmatch(part)
        assert match
        bins, codes = (tuple(int(digits) for digits in re.findall(r"\d+", match[n])) for n in (1, 2))
        found.append((bins, codes, match[3].strip()))
    return found


def decode_box(locations: Sequence[int], width: int, height: int) -> tuple[float, float, float, float]:
    """Bins y1, x1, y2, x2 → x1, y1, x2, y2 in pixels: bin / 1023 of the side, as big_vision's round(1023 × share) has
    it. Others divide by 1024, which is a tenth of a percent less."""
    y1, x1, y2, x2 = (location / (BINS - 1) for location in locations)
    return x1 * width, y1 * height, x2 * width, y2 * height


def encode_box(box: Sequence[float], width: float, height: float) -> str | None:
    """The reverse: x1, y1, x2, y2 in pixels, cut to the picture → `<loc>` ×4; None where bins leave it no area."""
    shares = (value / side for value, side in zip(box, (width, height) * 2, strict=True))
    x1, y1, x2, y2 = (round(min(max(share, 0.0), 1.0) * (BINS - 1)) for share in shares)
    return "".join(f"<loc{one:04}>" for one in (y1, x1, y2, x2)) if x2 > x1 and y2 > y1 else None


def detect_answer(
    things: Iterable[tuple[Sequence[float], str, Sequence[int]]], width: float, height: float
) -> tuple[str, int]:
    """(the right answer to `detect` or `segment`, how many boxes are left out as they have no area) of boxes in pixels,
    their labels, and the codes of their masks or none: by their upper edges, from top to bottom."""
    encoded = [
        (encode_box(box, width, height), label, "".join(f"<seg{one:03}>" for one in codes))
        for box, label, codes in things
    ]
    said = sorted((tokens, label, codes) for tokens, label, codes in encoded if tokens)
    return " ; ".join(f"{tokens}{codes} {label}".rstrip() for tokens, label, codes in said), len(encoded) - len(said)


def class_prompts(names: Mapping[int, str], form: str = "detect") -> list[tuple[str, list[int]]]:
    """(a prompt that asks for NAMES of the classes at most, their ids), of all classes of a set."""
    ids = list(names)
    parts = [ids[n : n + NAMES] for n in range(0, len(ids), NAMES)]
    return [(f"{form} {' ; '.join(names[one] for one in part)}", part) for part in parts]
