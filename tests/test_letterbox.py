"""Our geometry against ultralytics' own."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsight.models.yolo.letterbox import Letterbox


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    imgsz=st.tuples(st.integers(1, 25), st.integers(1, 25)).map(lambda sides: (sides[0] * 32, sides[1] * 32)),
    minimal=st.booleans(),
)
@settings(max_examples=300)
def test_placement_equals_ultralytics(width: int, height: int, imgsz: tuple[int, int], minimal: bool) -> None:
    """A pixel of difference in the padding moves every box of every picture of that shape."""
    from ultralytics.data.augment import LetterBox

    theirs = LetterBox(imgsz, auto=minimal, stride=32).get_params({"img": np.empty((height, width, 3), np.uint8)})
    box = Letterbox(imgsz, 32, minimal).place(width, height)
    assert box.inner == tuple(theirs["new_unpad"])
    assert (box.left, box.top) == (theirs["left"], theirs["top"])
    assert box.outer == (
        box.inner[0] + theirs["left"] + theirs["right"],
        box.inner[1] + theirs["top"] + theirs["bottom"],
    )


@given(width=st.integers(1, 200), height=st.integers(1, 200), seed=st.integers(0, 9))
@settings(max_examples=60)
def test_shrinking_first_changes_no_pixel(width: int, height: int, seed: int) -> None:
    """Frames are brought to the model's size before they travel: what the model sees must be the same."""
    from ultralytics.data.augment import LetterBox

    frame = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    letterbox = Letterbox((64, 96), 32)
    box = letterbox.place(width, height)
    canvas = np.empty((box.outer[1], box.outer[0], 3), np.uint8)
    letterbox.draw(letterbox.shrink(frame, width, height), box, canvas)
    assert (canvas == LetterBox((64, 96), auto=True, stride=32)(image=frame)).all()
