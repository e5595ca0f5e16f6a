"""Stop texts in answers that come a piece at a time."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsight.models.info import ModelError
from shardsight.models.paligemma.answers import Answers, visible

letters = st.text("ab.", max_size=4)


@given(st.lists(letters, max_size=12), st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stream_shows_what_the_answer_says(pieces: list[str], stop: list[str]) -> None:
    """What a stream has shown is never taken back, holds no stop text, and lacks nothing that stands before it."""
    shown, stopped = [], False
    for text in accumulate(pieces, initial=""):
        now, stopped = visible(text, stop, finished=False)
        shown.append(now)
        if stopped:
            break
    if not stopped:
        shown.append(visible("".join(pieces), stop, finished=True)[0])
        assert shown[-1] == "".join(pieces)
    assert all(after.startswith(before) for before, after in pairwise(shown))
    assert not any(one in shown[-1] for one in stop)
    assert stopped == any(one in "".join(pieces) for one in stop)


def test_earliest_of_several() -> None:
    assert visible("a cat. a dog", [" a", "cat"], finished=True) == ("a ", True)
    assert visible("a cat", ["cats"], finished=False) == ("a ", False)
    assert visible("a cat", ["cats"], finished=True) == ("a cat", False)


def test_a_tokenizer_without_places_is_told_by_its_folder() -> None:
    """As a Gemma's own is."""
    with pytest.raises(ModelError, match=r"^/models/mine: the tokenizer lacks <loc0000>: save the model with"):
        Answers(SimpleNamespace(get_vocab=dict), "/models/mine")
