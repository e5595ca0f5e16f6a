"""VQA's accuracy, as its official evaluation computes it (https://github.com/GT-Vision-Lab/VQA)."""

import re
from collections.abc import Sequence

FEW = 4
_TWICE = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""
_ONCE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
# As written without one of its apostrophes → with it.
_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _ONCE.split()},
    **{word[:at] + word[at + 1 :]: word for word in _TWICE.split() for at, letter in enumerate(word) if letter == "'"},
    "somebody'd": "somebodyd",  # so in the original
}
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalised(answer: str) -> str:
    """In lower case, without punctuation and articles, numbers to ten as digits, contractions with apostrophes."""
    thousands = re.search(r"\d,\d", answer)
    bare = answer
    for mark in _PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer or thousands
        bare = bare.replace(mark, "" if apart else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)  # the original passes a flag in place of a count, which is 32
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def accuracy(answer: str, answers: Sequence[str], leave_one_out: bool = True) -> float:
    """The mean, over each person left out, of a third for each of the others who said the same, at most 1.

    leave_one_out: if False, a third for each of all persons, as big_vision has it for OKVQA. With fewer than four
    answers, where either rule would punish agreement, 1 if one of them is the same. As in the original, answers are
    normalised only where people disagree.
    """
    answer, others = _spaces(answer), [_spaces(one) for one in answers]
    if len(set(others)) > 1 or len(others) < FEW:
        answer, others = normalised(answer), [normalised(one) for one in others]
    same = sum(one == answer for one in others)
    if len(others) < FEW:
        return float(same > 0)
    if not leave_one_out:
        return min(1.0, same / 3)
    return sum(min(1.0, (same - (one == answer)) / 3) for one in others) / len(others)


def _spaces(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
