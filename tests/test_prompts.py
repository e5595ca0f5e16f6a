"""PaliGemma's prompts and what its answers say, to big_vision's semantics."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsight.models.paligemma.prompts import Found, Prompt, PromptError, Vocabulary, decode_box, find
from tests.small_paligemma import tokenizer

TOKENIZER = tokenizer()
IDS = TOKENIZER.get_vocab()
VOCABULARY = Vocabulary(
    loc={IDS[f"<loc{n:04}>"]: n for n in range(1024)},
    seg={IDS[f"<seg{n:03}>"]: n for n in range(128)},
    decode=lambda ids: TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
)
BOX = "<loc0100><loc0200><loc0300><loc0400>"
OTHER = "<loc0000><loc0001><loc1022><loc1023>"
CODES = "".join(f"<seg{n:03}>" for n in range(112, 128))


def found(text: str, names: Sequence[str] = ()) -> list[Found]:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return find(ids, [-0.5] * len(ids), VOCABULARY, names)


@pytest.mark.parametrize(
    "text, names",
    [
        ("caption en", ()),
        ("  caption zh-TW \n", ()),
        ("cap de", ()),
        ("describe en", ()),
        ("ocr", ()),
        ("answer en What is it?", ()),
        ("question en two", ()),
        ("detect cat", ("cat",)),
        ("detect cat ; fire hydrant ; dog", ("cat", "fire hydrant", "dog")),
        ("detect cat; dog", ("cat", "dog")),
        ("segment Tom;Jerry ; R&B ; café 2", ("Tom;Jerry", "R&B", "café 2")),
        ("Describe the picture, please.", ()),
        ("answer honestly", ()),
        ("detection of what?", ()),
        (f"caption {BOX}", ()),
    ],
)
def test_prompts_taken(text: str, names: tuple[str, ...]) -> None:
    """PaliGemma's forms, and the free text that PaliGemma 2 mix takes."""
    prompt = Prompt.of(text)
    assert prompt.text == text.strip() and prompt.names == names


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty"),
        (" \n", "empty"),
        ("caption", "caption LANG"),
        ("answer en", "answer LANG QUESTION"),
        ("answer", "answer LANG QUESTION"),
        ("question en ", "question LANG ANSWER"),
        ("detect", "detect NAME"),
        ("detect cat ; ; dog", "empty name"),
        ("segment cat ;", "empty name"),
        ("caption en\ncaption de", "newline"),
        ("<image> caption en", "<image>"),
        ("caption \ud800", "not Unicode"),
    ],
)
def test_prompts_refused(text: str, said: str) -> None:
    """One sentence, before a job asks it of a million pictures."""
    with pytest.raises(PromptError, match=said):
        Prompt.of(text)


FIRST, SECOND = (100, 200, 300, 400), (0, 1, 1022, 1023)


@pytest.mark.parametrize(
    "text, names, expected",
    [
        (f"{BOX} cat", ("cat",), [(FIRST, 0, "cat")]),
        (f"{BOX}cat", ("cat",), [(FIRST, 0, "cat")]),
        (f"{BOX} cat ; {OTHER} dog", ("dog", "cat"), [(FIRST, 0, "cat"), (SECOND, 0, "dog")]),
        (f"{BOX} cat {OTHER} dog", (), [(FIRST, 0, "cat"), (SECOND, 0, "dog")]),
        (f"{BOX}{CODES} cat", (), [(FIRST, 16, "cat")]),
        (f"{BOX} {CODES} cat", (), [(FIRST, 16, "cat")]),
        (f"{BOX} cat {CODES}", (), [(FIRST, 0, "cat")]),
        (f"{BOX}{CODES} cat ; {OTHER}{CODES} cat", (), [(FIRST, 16, "cat"), (SECOND, 16, "cat")]),
        (f"here: {BOX} cat", (), [(FIRST, 0, "cat")]),
        (f"{BOX} Tom;Jerry ; {OTHER} R&B", (), [(FIRST, 0, "Tom;Jerry"), (SECOND, 0, "R&B")]),
        (f"{BOX} café 2 ; {OTHER} &amp;x", (), [(FIRST, 0, "café 2"), (SECOND, 0, "&amp;x")]),
        (f"{BOX} fire hydrant", (), [(FIRST, 0, "fire hydrant")]),
        # Without a label: the one name that was asked for, if it was one.
        (f"{BOX}{CODES}", ("cat",), [(FIRST, 16, "cat")]),
        (BOX, ("cat", "dog"), [(FIRST, 0, None)]),
        # Malformed: wrong counts, boxes without area, codes without a box.
        ("<loc0100><loc0200><loc0300> cat", ("cat",), []),
        (f"<loc0100>{BOX} cat", ("cat",), []),
        (f"{BOX}{CODES[:-8]} cat", ("cat",), []),
        (f"{BOX}{CODES}<seg000> cat", ("cat",), []),
        ("<loc0300><loc0200><loc0300><loc0400> cat", ("cat",), []),
        ("<loc0100><loc0400><loc0300><loc0200> cat", ("cat",), []),
        (f"{CODES} cat", ("cat",), []),
        ("a cat on a mat; and a dog", (), []),
        ("", (), []),
        # What is malformed takes nothing else with it.
        (f"<loc0001> cat ; {BOX} cat ; {OTHER}{CODES[:8]} cat", ("cat",), [(FIRST, 0, "cat")]),
    ],
)
def test_answers(text: str, names: tuple[str, ...], expected: list[tuple[tuple[int, ...], int, str | None]]) -> None:
    """Boxes, masks and labels as they stand in an answer."""
    assert [(one.locations, len(one.codes), one.label) for one in found(text, names)] == expected


def test_score_is_the_labels() -> None:
    """The probability of the name, not of where it is, nor of what follows; so detections can be ranked."""
    ids = TOKENIZER.encode(f"{BOX} café ; {OTHER} dog", add_special_tokens=False)
    start, dog = 4, ids.index(IDS["<loc1023>"]) + 1
    label = len(TOKENIZER.encode(" café", add_special_tokens=False))
    logprobs = [-9.0] * len(ids)
    logprobs[start : start + label] = [-0.25] * label
    logprobs[dog:] = [-1.0] * (len(ids) - dog)
    first, second = find(ids, logprobs, VOCABULARY, ())
    assert math.isclose(first.score, math.exp(-0.25)) and math.isclose(second.score, math.exp(-1))


sides = st.integers(1, 5000)


@given(width=sides, height=sides, shares=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_within_half_a_bin(width: int, height: int, shares: list[float]) -> None:
    """Pixels → tokens → text → tokens → pixels."""
    x1, x2 = sorted(share * width for share in shares[:2])
    y1, y2 = sorted(share * height for share in shares[2:])
    locations = [round(1023 * share) for share in (y1 / height, x1 / width, y2 / height, x2 / width)]  # as big_vision
    answer = found("".join(f"<loc{location:04}>" for location in locations) + " cat")
    if locations[0] == locations[2] or locations[1] == locations[3]:
        assert not answer
        return
    assert answer[0].locations == tuple(locations)
    back = decode_box(answer[0].locations, width, height)
    for got, given_, side in zip(back, (x1, y1, x2, y2), (width, height, width, height), strict=True):
        assert abs(got - given_) <= 0.5001 * side / 1023
