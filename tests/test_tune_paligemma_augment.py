"""Augmentation that keeps boxes and masks true, and noise boxes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PaliGemmaProcessor

from demo.scenes import Scene
from shardsight.models.paligemma.answers import Answers, Generated
from shardsight.models.paligemma.info import inspect
from shardsight.models.paligemma.masks import crop
from shardsight.models.paligemma.prompts import Prompt, decode_box, detect_answer, encode_box, parts_of
from shardsight.storage import Storage
from tests import small_paligemma
from tests.test_masks import VQVAE
from tune.paligemma_augment import LEAST_SEEN, Masks, augment, with_noise
from tune.paligemma_data import Changes, Collator, Draw, Example

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}
PROMPT = "detect red ; blue"


@st.composite
def pictures(draw: st.DrawFn) -> tuple[np.ndarray, str]:
    """A picture with two rectangles, the second perhaps over the first's edge, and its answer."""
    height, width = draw(st.integers(40, 300)), draw(st.integers(40, 300))
    frame, things = np.zeros((height, width, 3), np.uint8), []
    for half, (name, colour) in enumerate(COLOURS.items()):  # one in each half, so that both are whole
        low, high = half * (width // 2), (half + 1) * (width // 2)
        x1 = draw(st.integers(low, high - 8))
        x2 = draw(st.integers(x1 + 8, high))
        y1 = draw(st.integers(0, height - 8))
        y2 = draw(st.integers(y1 + 8, height))
        frame[y1:y2, x1:x2] = colour
        things.append(((x1, y1, x2, y2), name, ()))
    return frame, detect_answer(things, width, height)[0]


@given(pictures(), st.sampled_from([("flip",), ("crop",), ("flip", "crop")]), st.integers(0, 1 << 30))
@settings(max_examples=300)
def test_boxes_stay_true(picture: tuple[np.ndarray, str], changes: tuple[str, ...], seed: int) -> None:
    """What a box covered it covers afterwards, to a pixel of 224; what a crop hides is not asked for any more."""
    frame, answer = picture
    made, said = augment(frame, PROMPT, answer, changes, np.random.default_rng(seed), None)  # type: ignore[arg-type]
    height, width = made.shape[:2]
    told = {label: decode_box(bins, 224, 224) for bins, _, label in parts_of(said)}
    assert told and [*told] == [label for _, _, label in parts_of(said)]
    assert said == " ; ".join(sorted(said.split(" ; ")))
    for name, colour in COLOURS.items():
        rows, columns = np.nonzero((made == colour).all(2))
        before = (frame == colour).all(2).sum()
        if name not in told:
            assert len(rows) < LEAST_SEEN * before * 1.2
            continue
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen * 224 / [width, height, width, height] - told[name]).max() <= 1, (seen, told[name])
    if changes == ("flip",):
        assert (made == frame).all() or (made == frame[:, ::-1]).all()


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("ocr", "STOP"),
        ("caption en", "a car"),
        ("answer en where is the car?", "here"),
        ("detect left car", "<loc0010><loc0020><loc0500><loc0700>"),
        ("detect the Rightmost one", "<loc0010><loc0020><loc0500><loc0700>"),
        ("detect car ; top hat", "<loc0010><loc0020><loc0500><loc0700> car"),
        ("segment car", "<loc0010><loc0020><loc0500><loc0700>" + "<seg001>" * 16 + " car"),  # without a VQ-VAE
    ],
)
def test_what_must_not_be_changed(prompt: str, answer: str) -> None:
    """Words in a mirror, a caption of what a crop loses, what is left, and codes, which nothing here can mirror."""
    frame = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    for seed in range(20):
        made, said = augment(frame, prompt, answer, ("flip", "crop"), np.random.default_rng(seed), None)
        assert made is frame and said == answer


def test_nothing_to_find_stays_nothing() -> None:
    frame = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    made = [augment(frame, "detect car", "", ("flip", "crop"), np.random.default_rng(seed), None) for seed in range(9)]
    assert all(said == "" for _, said in made) and len({frame.shape for frame, _ in made}) > 5


def test_masks_stay_true(some_scenes: list[Scene]) -> None:
    """Mirrored and cut, the codes still draw the shape that is in the picture."""
    masks, overlaps = Masks.load(VQVAE), []
    for number, scene in enumerate(some_scenes[:12]):
        height, width = scene.image.shape[:2]
        shape = max(scene.shapes, key=lambda shape: shape.mask.sum())
        cut = crop(shape.mask, shape.box)
        assert cut is not None
        answer, _ = detect_answer([(shape.box, "it", masks.encode(cut))], width, height)
        marked = np.repeat(shape.mask[:, :, None], 3, 2).astype(np.uint8)
        for seed in range(number, number + 4):
            made, said = augment(marked, "segment it", answer, ("flip", "crop"), np.random.default_rng(seed), masks)
            ((bins, codes, _),) = parts_of(said)
            box = decode_box(bins, made.shape[1], made.shape[0])
            there = crop(made[:, :, 0], box)
            assert there is not None
            there, drawn = there > 0.5, masks.decode(codes)
            overlaps.append((there & drawn).sum() / (there | drawn).sum())
    assert np.mean(overlaps) > 0.85 and min(overlaps) > 0.5, (np.mean(overlaps), min(overlaps))


def test_a_cut_mask_is_a_part_of_it() -> None:
    """Codes are of a mask within its box: where a crop cuts the box, they have to be others."""
    masks, overlaps = Masks.load(VQVAE), []
    rows, columns = np.mgrid[:200, :240]
    disc = ((rows - 100) / 100) ** 2 + ((columns - 120) / 120) ** 2 < 1
    cut = crop(disc, (0, 0, 240, 200))
    assert cut is not None
    answer, _ = detect_answer([((0, 0, 240, 200), "it", masks.encode(cut))], 240, 200)
    marked = np.repeat(disc[:, :, None], 3, 2).astype(np.uint8)
    for seed in range(20):
        made, said = augment(marked, "segment it", answer, ("crop",), np.random.default_rng(seed), masks)
        ((_, codes, _),) = parts_of(said)
        there = crop(made[:, :, 0], (0, 0, made.shape[1], made.shape[0]))
        assert there is not None
        there, drawn = there > 0.5, masks.decode(codes)
        overlaps.append((there & drawn).sum() / (there | drawn).sum())
    assert np.mean(overlaps) > 0.95  # 0.87 with the codes of the whole


# --- Noise boxes


def test_noise_boxes() -> None:
    """As many as are asked for in all, after the true ones, each of some area."""
    true = " ; ".join(f"{encode_box((n, n, n + 1, n + 2), 9, 9)} car" for n in range(3))
    answers = [with_noise("detect car", true, 8, np.random.default_rng(seed)) for seed in range(20)]
    for answer, count in answers:
        parts = parts_of(answer)
        assert count == 3 and [label for *_, label in parts] == ["car"] * 3 + ["noise"] * 5
        assert sorted(answer.split(" ; ")[:3]) == sorted(true.split(" ; "))
        assert all(y1 < y2 and x1 < x2 for (y1, x1, y2, x2), *_ in parts)
    assert len({answer for answer, _ in answers}) == 20
    assert with_noise("detect car", "", 2, np.random.default_rng(0))[1] == 0
    for prompt, count in (("detect car", 3), ("segment car", 9), ("caption en", 9), ("detect noise ; car", 9)):
        assert with_noise(prompt, true, count, np.random.default_rng(0)) == (true, None)


def test_where_noise_is_is_not_learnt(tmp_path: Path) -> None:
    """Of a noise box its label has a loss, and its coordinates have none; and answers never hold noise to a reader."""
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    Image.fromarray(small_paligemma.pictures(1)[0]).save(tmp_path / "a.png")
    processor = PaliGemmaProcessor.from_pretrained(folder)
    info = inspect(str(folder))
    answer = "<loc0010><loc0020><loc0500><loc1023> car ; <loc0011><loc0020><loc0500><loc1023> dog"
    example = Example(str(tmp_path / "a.png"), "detect car ; dog", (answer,))
    other = Example(example.image, "caption en", ("<loc0001> is a token",))
    collator = Collator(processor, info, Storage(), changes=Changes(noise_boxes=5))
    inputs = collator.train([Draw(example, answer, (1, 2, 3)), Draw(other, other.suffixes[0], (1, 2, 4))])
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    place = torch.isin(ids, collator.locations)
    assert place.sum() == 20 and (labels[place] >= 0).sum() == 8  # two true boxes
    start = int((labels >= 0).nonzero()[0])
    learnt = processor.tokenizer.decode(labels[start:][labels[start:] >= 0])
    assert learnt.count("noise") == 3 and learnt.endswith("<eos>") and learnt.count("<loc") == 8
    assert (labels[start:][~place[start:]] == ids[start:][~place[start:]]).all()
    assert torch.isin(inputs["labels"][1], collator.locations).sum() == 1
    said = ids[start:].tolist()
    row = Answers(processor.tokenizer, str(folder)).row(
        Prompt.of("detect car ; dog"), Generated(said, [-0.1] * len(said), "stop"), 100, 100
    )
    assert sorted(one["label"] for one in row["detections"]) == ["car", "dog"]
    same = [collator.train([Draw(example, answer, (1, 2, n))])["input_ids"].tolist() for n in (3, 3, 4)]
    assert same[0] == same[1] != same[2]
