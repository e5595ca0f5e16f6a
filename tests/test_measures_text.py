"""Captions, answers and read text against the reference implementations.

The expected values of captions are what pycocoevalcap 1.2 gives (Stanford's PTBTokenizer, CIDEr-D and BLEU), those of
VQA what https://github.com/GT-Vision-Lab/VQA gives, run on 2026-11-26.
"""

from collections.abc import Sequence
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsight.measures import text, vqa
from shardsight.measures.captions import tokens
from shardsight.truth import Sample, Truth

CAPTIONS = [
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    ("Two dogs (one black) play with a frisbee!", "two dogs -lrb- one black -rrb- play with a frisbee"),
    ("It's a t-shirt that costs $3.50 at 10:30 a.m.", "it 's a t-shirt that costs $ 3.50 at 10:30 a.m."),
    ("Don't walk; can't stop, won't stop.", "do n't walk ca n't stop wo n't stop"),
    ("A 'stop' sign -- red and white -- near the U.S. flag.", "a stop sign red and white near the u.s. flag"),
    ("rock 'n' roll band's drum-kit", "rock 'n' roll band 's drum-kit"),
    ("The children's toys; 3rd shelf, 2/3 full...", "the children 's toys 3rd shelf 2/3 full"),
    ("e-mail me@example.com or visit www.x.org", "e-mail me@example.com or visit www.x.org"),
    ("Mr. Smith & Mrs. Jones eat fish-and-chips.", "mr. smith & mrs. jones eat fish-and-chips"),
    ("I cannot see the cat, gonna leave", "i can not see the cat gon na leave"),
    ('"Hello" says the 5-year-old boy', "hello says the 5-year-old boy"),
    ("a cup of coffee, e.g. espresso, 1,000 beans", "a cup of coffee e.g. espresso 1,000 beans"),
    ("café with naïve art", "café with naïve art"),
    ("she'd've thought they're here", "she 'd 've thought they 're here"),
    ("One [red] {blue} ball 50% off", "one -lsb- red -rsb- -lcb- blue -rcb- ball 50 % off"),
    ("St. Mary's church in the '80s", "st. mary 's church in the '80s"),
    ("A man/woman standing", "a man/woman standing"),
    ("half-eaten pizza on a plate.", "half-eaten pizza on a plate"),
    ("What is this?! A cat...", "what is this ?! a cat"),
    ("no. 5 bus on 5th Ave.", "no. 5 bus on 5th ave."),
    ("A dog's bowl, a cat's toy & the dogs' house", "a dog 's bowl a cat 's toy & the dogs house"),
    ("I'd say it'll rain, we've an umbrella", "i 'd say it 'll rain we 've an umbrella"),
    ("they wanna eat but gotta run", "they wan na eat but got ta run"),
    ("ten-year-old girl with 3-D glasses", "ten-year-old girl with 3-d glasses"),
    ("A clock reads 12:45 p.m.", "a clock reads 12:45 p.m."),
    ('He said: "wow" (twice)', "he said wow -lrb- twice -rrb-"),
    ("A bus, No. 42, passes by.", "a bus no. 42 passes by"),
    ("Two men/women ride bikes...", "two men/women ride bikes"),
    ("semi-truck; pick-up truck; SUV", "semi-truck pick-up truck suv"),
    ("The sign says 'Open 24/7'!!", "the sign says open 24/7 !!"),
    ("A Boeing 747-400 on the runway", "a boeing 747-400 on the runway"),
    ("Dr. Who's box isn't blue", "dr. who 's box is n't blue"),
    ("mother-in-law cooks; isn't that great?", "mother-in-law cooks is n't that great"),
    ("50,000 people at Wembley Stadium", "50,000 people at wembley stadium"),
    ("A pizza with 1/2 cheese", "a pizza with 1/2 cheese"),
    ("what's up, y'all?", "what 's up y' all"),
    ("black-and-white photo of N.Y.C. streets", "black-and-white photo of n.y.c. streets"),
    ("cannot couldn't shouldn't", "can not could n't should n't"),
    ("a #1 sign and @ sign", "a # 1 sign and @ sign"),
    ("A $5 bill, 10% tip & a tie", "a $ 5 bill 10 % tip & a tie"),
    ("several bananas , a knife .", "several bananas a knife"),
    ("A person ' s hand", "a person s hand"),
    ("man in a T - shirt", "man in a t shirt"),
    ("WOMAN HOLDING UMBRELLA", "woman holding umbrella"),
    ("a cat sitting on a laptop computer", "a cat sitting on a laptop computer"),
]
ANSWERS: list[tuple[str, dict[str, int], float]] = [
    ("yes", {"yes": 10}, 1.0),
    ("Yes.", {"yes": 9, "no": 1}, 1.0),
    ("two", {"2": 5, "two": 3, "3": 2}, 1.0),
    ("a dog", {"dog": 3, "the dog": 2, "puppy": 5}, 1.0),
    ("dont know", {"don't know": 2, "unknown": 8}, 0.6),
    ("10,000", {"10000": 8, "10,000": 2}, 1.0),
    ("red/white", {"red white": 3, "red and white": 7}, 0.9),
    ("t-shirt", {"t shirt": 5, "tshirt": 5}, 1.0),
    ("none", {"0": 7, "zero": 3}, 1.0),
    ("2.5", {"2.5": 6, "2 1/2": 4}, 1.0),
    ("U.S.A.", {"usa": 5, "us": 5}, 1.0),
    ("hes running", {"he's running": 3, "running": 7}, 0.9),
    ("blue ", {"blue": 10}, 1.0),
    ("BLUE", {"blue": 10}, 0.0),
    ("BLUE", {"blue": 9, "navy": 1}, 1.0),
    ("what? (yes)", {"what yes": 4, "yes": 6}, 1.0),
    ("it is 5-6", {"it is 5 6": 3, "it is 56": 7}, 0.9),
    ("yall'd've", {"y'all'd've": 4, "x": 6}, 1.0),
    ("somebody'd", {"somebodyd": 4, "x": 6}, 1.0),
    ("the", {"": 5, "the": 5}, 1.0),
    ("new\tline", {"new line": 4, "other": 6}, 1.0),
    ("couldntve", {"couldn't've": 4, "couldntve": 6}, 1.0),
]


def measured(asked: Sequence[tuple[str, str, list[str], str | None]]) -> dict[str, Any]:
    """Of (picture, prompt, right answers, answer)."""
    samples: dict[str, Sample] = {}
    said: dict[str, dict[str, str]] = {}
    for picture, prompt, answers, answer in asked:
        samples.setdefault(picture, Sample(picture)).asked[prompt] = answers
        if answer is not None:
            said.setdefault(picture, {})[prompt] = answer
    return text.measure(Truth("text", {}, list(samples.values()), {}), said)


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in result["measures"].items()}


@pytest.mark.parametrize(("caption", "expected"), CAPTIONS)
def test_words_of_captions(caption: str, expected: str) -> None:
    assert " ".join(tokens(caption)) == expected


def test_captions() -> None:
    """Every caption against itself, a neighbour's and one of another length."""
    captions = [caption for caption, _ in CAPTIONS]
    result = measured(
        [
            (str(number), "caption en", [caption, captions[number - 1]], captions[number - number % 3])
            for number, caption in enumerate(captions)
        ]
    )["caption"]
    found = values(result)
    assert list(found) == ["CIDEr", "BLEU-4", "exact"]
    assert found["CIDEr"] == pytest.approx(3.3470834610882436, abs=1e-9)
    assert found["BLEU-4"] == pytest.approx(0.6740009812768548, abs=1e-9)
    assert found["exact"] == pytest.approx(np.mean([number % 3 < 2 for number in range(len(captions))]))
    assert np.mean(list(result["pictures"].values())) == pytest.approx(found["CIDEr"] / 10)
    for figure in result["measures"].values():
        low, high = figure["interval"]
        assert low < figure["value"] < high


def test_short_captions() -> None:
    """Right ones of three words have no four words in a row; pycocoevalcap has a number for that."""
    found = values(measured([(str(n), "caption en", ["two red stars"], "two red stars") for n in range(3)])["caption"])
    assert found == pytest.approx({"CIDEr": 0, "BLEU-4": 1e-6**0.25, "exact": 1})


def test_lengths_of_captions() -> None:
    """BLEU-4 takes the length of the nearest right caption, not of the shortest; the number is pycocoevalcap's."""
    first = ["a red star on a blue field", "a star on it", "two red stars are near a blue circle and a ring"]
    second = ["one big green ring", "a ring is over the large orange star there"]
    asked = [("a", "caption en", first, "a red star on a blue"), ("b", "caption en", second, "one big green")]
    assert values(measured(asked)["caption"])["BLEU-4"] == pytest.approx(0.8007374026702321, abs=1e-9)


@pytest.mark.parametrize(("answer", "answers", "expected"), ANSWERS)
def test_vqa_accuracy(answer: str, answers: dict[str, int], expected: float) -> None:
    people = [one for one, count in answers.items() for _ in range(count)]
    assert vqa.accuracy(answer, people) == pytest.approx(expected, abs=1e-9)


def test_both_rules_of_vqa() -> None:
    """Two of ten say it: the official rule gives 2 × (1/3) and 8 × (2/3) of ten; big_vision's, 2/3."""
    result = measured([("a", "answer en x", ["red"] * 2 + ["blue"] * 8, "red")])["vqa"]
    expected = {"accuracy": 0.6, "accuracy, none left out": 2 / 3, "exact": 1}
    assert values(result) == pytest.approx(expected) and result["pictures"] == {"a": pytest.approx(0.6)}


def test_few_people() -> None:
    """One right answer, as in most JSONL: to leave it out would leave nothing."""
    assert vqa.accuracy("Two.", ["2"]) == 1.0
    assert vqa.accuracy("3", ["2", "two"]) == 0.0


def test_read_text() -> None:
    result = measured(
        [
            ("a", "ocr", ["STOP sign ahead"], "STOP sgn ahead"),
            ("b", "ocr", ["exit", "way out"], "way  in"),
            ("c", "ocr", [""], ""),
            ("d", "ocr", ["lost"], None),
            ("e", "ocr", ["LOUD"], "loud"),
            ("f", "ocr", ["stop"], "shut"),
        ]
    )["ocr"]
    found = values(result)
    assert (found["word precision"], found["word recall"], found["word F1"]) == (3 / 7, 3 / 8, 6 / 15)
    assert found["ANLS"] == pytest.approx((14 / 15 + 4 / 7 + 1 + 0 + 1 + 0) / 6)
    assert found["exact"] == 1 / 6
    assert result["pictures"] == pytest.approx({"a": 2 / 3, "b": 1 / 2, "c": 1, "d": 0, "e": 0, "f": 0})


@given(st.lists(st.tuples(*[st.text("ab ä.", min_size=1).filter(str.strip)] * 2), min_size=1))
def test_errors_of_reading_are_those_of_jiwer(pairs: list[tuple[str, str]]) -> None:
    result = measured([(str(n), "ocr", [truth], said) for n, (truth, said) in enumerate(pairs)])["ocr"]
    truth, said = (list(each) for each in zip(*pairs, strict=True))
    expected = {"CER": jiwer.cer(truth, said), "WER": jiwer.wer(truth, said)}
    assert {name: values(result)[name] for name in expected} == pytest.approx(expected)


def test_a_picture_counts_once() -> None:
    """Its questions are drawn together: their answers are no independent evidence."""
    asked: list[Any] = [("a", "answer en x", ["1"], "1"), ("a", "answer en y", ["2"], "3")]
    result = measured([*asked, ("b", "answer en x", ["1"], "1")])["vqa"]
    assert result["pictures"] == {"a": 0.5, "b": 1.0} and values(result)["accuracy"] == pytest.approx(2 / 3)
    drawn = {round(float(value), 9) for value in result["measures"]["accuracy"]["replicates"]}
    assert drawn == {0.5, round(2 / 3, 9), 1.0} and result["prompts"] == 3  # a twice, both, b twice


def test_kinds() -> None:
    kinds = {"caption en": "caption", "answer en how many": "vqa", "ocr": "ocr", "detect a ; b": "objects"}
    assert {prompt: text.kind_of(prompt) for prompt in kinds} == kinds
    assert text.kind_of("segment a") == "objects" and text.kind_of("what is it") == "text"
    result = measured([("a", prompt, ["x"], "x") for prompt in [*kinds, "what is it"]])
    assert set(result) == {"caption", "vqa", "ocr", "text"} and values(result["text"]) == {"exact": 1}
