"""The demo's PaliGemma: small, loadable by everyone, and trained with the mask that it is used with."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor, PaliGemmaForConditionalGeneration

from demo.paligemma_data import SIZE, draw, draw_shards
from demo.paligemma_model import PATCH, WIDTH, build, parameters, processor
from demo.paligemma_talk import LOOKS, PICTURE, Teacher, Writer, collate, mask_of, pack
from demo.paligemma_tower import GRID, augment, targets
from demo.questions import DETECT_ALL, about, detect, locations
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
    assert parameters(model) < 12e6 and model.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(FOLDER).vision_config.image_size // PATCH == GRID


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
    assert ids == [words.convert_tokens_to_ids("<image>")] * PICTURE + [words.bos_token_id, *prompt, newline]
    assert len(prompt) == 2 * len(KINDS)  # a word is a token, and so is " ; "


def test_trained_with_the_mask_of_generate() -> None:
    """Hugging Face's own logits, by its `suffix`, are those that the loss is taken of."""
    torch.manual_seed(0)
    model, made = build().eval(), processor()
    drawn = draw(0, 5)
    prefix, suffix = "answer en what shape is red", "star ; star"
    inputs = made(images=[drawn.image], text=[f"<image>{prefix}"], suffix=[suffix], return_tensors="pt")
    teacher = Teacher(model, Writer(made.tokenizer).loc0)
    written = Writer(made.tokenizer).write(prefix, suffix)
    with torch.no_grad():
        wanted = model(**inputs).loss
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        nobodys = torch.full((1, PICTURE), -1)
        alone = teacher(features, collate([pack([written])]), nobodys, alone=True)["answer"]
        unseen = teacher(features, collate([pack([written])]), nobodys, alone=False)["answer"]
    torch.testing.assert_close(alone, wanted)
    assert abs(unseen - wanted) > 1e-4  # the picture does see the question
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)


def test_packed_questions_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model, made = build().eval(), processor()
    writer = Writer(made.tokenizer)
    teacher = Teacher(model, writer.loc0)
    pairs = [writer.write("ocr", "moon kite"), writer.write("caption en", "a red star")]
    features, nobodys = torch.randn(1, PICTURE, model.config.text_config.hidden_size), torch.full((1, PICTURE), -1)
    with torch.no_grad():
        together = teacher(features, collate([pack(pairs)]), nobodys, alone=False)
        for name, pair in zip(("ocr", "caption"), pairs, strict=True):
            apart = teacher(features, collate([pack([pair])]), nobodys, alone=False)
            torch.testing.assert_close(together[name], apart[name])


def test_where_to_look() -> None:
    """Each token of an answer belongs to the shape that it names, and the loss is the attention that it lacks."""
    made, drawn = processor(), draw(0, 5)
    writer, shapes = Writer(made.tokenizer), drawn.shapes
    prefix, suffix = detect(shapes)
    numbers = [shapes.index(one) for one in about(prefix, shapes)]
    written = writer.write(prefix, suffix, numbers)
    pairs = zip(written.looks, written.labels, strict=True)
    said = [(look, made.tokenizer.decode([label]).strip()) for look, label in pairs if label >= 0]
    assert [shapes[look].kind for look, word in said if word in KINDS] == [one.kind for one in about(prefix, shapes)]
    located = [word for look, word in said if look == numbers[0] and word.startswith("<loc")]
    assert "".join(located) == locations(shapes[numbers[0]].box) and said[-1] == (-1, "<eos>")

    torch.manual_seed(0)
    model = build().eval()
    eager = build().eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    owner = torch.from_numpy(targets(drawn, [])["owner"])[None]
    features, batch = torch.randn(1, PICTURE, WIDTH), collate([pack([written])])
    with torch.no_grad():
        loss = Teacher(model, writer.loc0)(features, batch, owner, alone=True)["look"]
        ids = torch.tensor([written.ids])
        hidden = torch.cat([features, eager.get_input_embeddings()(ids)], 1)
        mask = torch.zeros(1, 1, hidden.shape[1], hidden.shape[1])
        seen = mask_of(batch, alone=True)
        mask.masked_fill_(~seen, torch.finfo(torch.float32).min)
        places = torch.arange(hidden.shape[1])[None] + 1
        gemma = eager.model.language_model
        attention = gemma(inputs_embeds=hidden, attention_mask=mask, position_ids=places, output_attentions=True)
        heads = attention.attentions[LOOKS][0, ::2, PICTURE:, :PICTURE]
    looks = torch.tensor(written.looks)
    there = looks >= 0
    right = (heads * (owner[0] == looks[:, None])).sum(-1)[:, there]
    torch.testing.assert_close(loss, -right.log().mean(), rtol=1e-4, atol=1e-4)


def test_what_patches_are_asked_is_true() -> None:
    """After cutting and printing more words: the shape in each patch, its box, and the letters in it."""
    rng = np.random.default_rng(0)
    asked = 0
    for index in range(12):
        drawn, readable = augment(draw(index, 6), rng, words=True)
        found = targets(drawn, readable)
        for patch in range(GRID * GRID):
            kind = found["kind"][patch]
            if kind < len(KINDS):
                one = next(s for s in drawn.shapes if np.allclose(s.box, found["box"][patch], atol=1e-6))
                x, y = (patch % GRID + 0.5) / GRID, (patch // GRID + 0.5) / GRID
                reach = 0.5 / GRID + 0.01
                assert one.kind == KINDS[kind]
                assert one.box[0] - reach < x < one.box[2] + reach and one.box[1] - reach < y < one.box[3] + reach
                asked += 1
        words = found["word here"].reshape(GRID, GRID)
        for word, (x1, y1, x2, y2) in readable:
            rows, columns = slice(int(y1 * GRID), int(y2 * GRID) + 1), slice(int(x1 * GRID), int(x2 * GRID) + 1)
            letters = found["letters"].reshape(GRID, GRID, 26)[rows, columns].max((0, 1))
            assert (words[rows, columns] < 30).any() and all(letters[ord(letter) - ord("a")] for letter in word)
    assert asked > 200


def test_shards_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_shards(tmp_path, range(0), 1)
    (tmp_path / "00000.json").write_text("[]")
    draw_shards(tmp_path, range(1), 1)  # is there already: nothing is drawn, which would take seconds
    assert not (tmp_path / "00000-images.npy").exists()
