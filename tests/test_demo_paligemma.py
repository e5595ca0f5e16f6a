"""The demo's PaliGemma: small, and loadable by everyone."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

from demo.questions import DETECT_ALL
from demo.scenes import KINDS
from tests.conftest import WEIGHTS

FOLDER = WEIGHTS / "paligemma"


def test_the_folder_is_small_and_names_no_place() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert all(path.stat().st_size < 10e6 for path in files)
    for path in files:
        if path.suffix == ".json":
            assert not re.search(r"(/tmp|/home|/root|/work)/", path.read_text()), path
    model = PaliGemmaForConditionalGeneration.from_pretrained(FOLDER)
    assert model.num_parameters() < 12e6 and model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text",
    [
        "a red circle that says moon",
        "<loc0001><loc0020><loc0300><loc1023><seg007> star ; <loc0000>",
        "café & co.; größer 7 漢",
    ],
)
def test_the_tokenizer_gives_back_what_it_got(text: str) -> None:
    words = AutoProcessor.from_pretrained(FOLDER).tokenizer
    assert words.decode(words(text)["input_ids"], skip_special_tokens=True) == text
    assert words.unk_token_id not in words(text)["input_ids"]


def test_prompts_are_tokenised_alike_everywhere() -> None:
    """Picture, <bos>, prompt, newline: with the processor, and with the tokens one by one as vLLM puts them."""
    made = AutoProcessor.from_pretrained(FOLDER)
    words = made.tokenizer
    ids = made(images=np.zeros((9, 9, 3), np.uint8), text=f"<image>{DETECT_ALL}")["input_ids"][0]
    newline = words.get_vocab()["\n"]
    prompt = words(DETECT_ALL, add_special_tokens=False)["input_ids"]
    assert ids == [words.convert_tokens_to_ids("<image>")] * made.image_seq_length + [
        words.bos_token_id,
        *prompt,
        newline,
    ]
    assert len(prompt) == 2 * len(KINDS)  # a word is a token, and so is " ; "
