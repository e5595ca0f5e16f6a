"""What the decoder is trained on: many questions about one picture, in one sequence.

The picture's tokens are written once, and each question with its answer sees the picture and itself alone, at
the places that it would have alone. So a dozen questions cost twice what one does. The picture cannot see the
questions then, as PaliGemma's does; so some are trained alone too, with the mask of `generate`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shardsight.demo.paligemma_data import Drawn
from shardsight.demo.paligemma_tower import GRID, near_bins
from shardsight.demo.questions import QUESTIONS, ask, caption, detect, ocr, segment
from shardsight.demo.scenes import KINDS

PICTURE = GRID * GRID
# Kinds of tokens that the loss is averaged over, with their weights.
PARTS = {"caption": 2.0, "ocr": 1.5, "answer": 2.5, "loc": 4.0, "seg": 0.5, "list": 1.0}


def words(drawn: Drawn, codes: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """(prefix, suffix) of every form that is answered in words."""
    yield caption(drawn.shapes)
    yield ocr(drawn.shapes)
    for about in QUESTIONS:
        pair = ask(drawn.shapes, about, rng)
        if pair:
            yield pair


def conversation(drawn: Drawn, codes: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """The same, and lists of boxes and masks. codes: int (n, 16), of the shapes' masks."""
    shapes = drawn.shapes
    yield from words(drawn, codes, rng)
    yield detect(shapes)
    some = sorted(rng.choice(len(KINDS), int(rng.integers(1, len(KINDS))), replace=False))
    yield detect(shapes, [KINDS[n] for n in some])
    kinds = [shape.kind for shape in shapes]
    for _ in range(2):
        kind = kinds[rng.integers(len(kinds))] if rng.random() < 0.95 else KINDS[rng.integers(len(KINDS))]
        yield segment(shapes, kind, list(codes))


class Writer:
    """(prefix, suffix) → token ids, labels, kinds of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._newline = tokenizer.convert_tokens_to_ids("\n")
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.loc0, self.seg0 = (tokenizer.convert_tokens_to_ids(name) for name in ("<loc0000>", "<seg000>"))

    def write(self, prefix: str, suffix: str) -> tuple[list[int], int, list[int], list[int]]:
        """Token ids; how many of them are prefix; the label of each, -100 in the prefix; its index in PARTS."""
        question = [self._bos, *self._encode(prefix).ids, self._newline]
        answer = [*self._encode(suffix).ids, self._eos]
        labels = [-100] * (len(question) - 1) + answer
        form = prefix.split()[0]
        return question + answer[:-1], len(question), labels, [self._part(form, label) for label in labels]

    def _part(self, form: str, label: int) -> int:
        name = form
        if form in ("detect", "segment"):
            name = "list"
            if self.loc0 <= label < self.loc0 + 1024:
                name = "loc"
            elif self.seg0 <= label < self.seg0 + 128:
                name = "seg"
        return list(PARTS).index(name)


def pack(written: Sequence[tuple[list[int], int, list[int], list[int]]]) -> dict[str, np.ndarray]:
    """One picture's questions, one after the other: int64 (length,) each."""
    ids, labels, parts = (np.concatenate([one[n] for one in written]).astype(np.int64) for n in (0, 2, 3))
    lengths = [len(one[0]) for one in written]
    prefix = np.concatenate([np.arange(len(one[0])) < one[1] for one in written]).astype(np.int64)
    return {
        "ids": ids,
        "labels": labels,
        "parts": parts,
        "prefix": prefix,
        "segment": np.repeat(np.arange(len(written)), lengths),
        "place": np.concatenate([np.arange(length) for length in lengths]),
    }


def collate(packed: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    longest = max(len(one["ids"]) for one in packed)
    padding = {"ids": 0, "labels": -100, "parts": 0, "prefix": 0, "segment": -1, "place": 0}
    return {
        name: torch.from_numpy(
            np.stack([np.pad(one[name], (0, longest - len(one[name])), constant_values=fill) for one in packed])
        )
        for name, fill in padding.items()
    }


class Teacher(nn.Module):  # type: ignore[misc]
    """The losses of a PaliGemma on packed questions, by PARTS."""

    def __init__(self, model: Any, loc0: int) -> None:
        super().__init__()
        self.model, self.loc0 = model, loc0

    def forward(self, features: torch.Tensor, batch: dict[str, torch.Tensor], alone: bool) -> dict[str, torch.Tensor]:
        """features: projected, (n, PICTURE, width). alone: a question a sequence, which the picture sees."""
        gemma = self.model.model.language_model
        hidden = torch.cat([features, self.model.get_input_embeddings()(batch["ids"])], 1)
        picture = torch.arange(PICTURE).expand(len(features), -1)
        places = torch.cat([picture, PICTURE + batch["place"]], 1) + 1
        out = gemma(inputs_embeds=hidden, attention_mask=_mask(batch, alone), position_ids=places, use_cache=False)
        asked = batch["labels"] != -100
        labels, parts = batch["labels"][asked], batch["parts"][asked]
        logs = F.log_softmax(self.model.lm_head(out.last_hidden_state[:, PICTURE:][asked]).float(), -1)
        losses = -logs.gather(1, labels[:, None])[:, 0]
        located = parts == list(PARTS).index("loc")
        bins = labels[located] - self.loc0
        blurred = -(logs[located][:, self.loc0 : self.loc0 + 1024] * near_bins(bins)).sum(1)
        losses = losses.masked_scatter(located, blurred)
        return {
            name: losses[parts == number].mean() for number, name in enumerate(PARTS) if bool((parts == number).any())
        }


def _mask(batch: dict[str, torch.Tensor], alone: bool) -> torch.Tensor:
    """bool (n, 1, PICTURE + length, the same): which token (row) sees which (column)."""
    segment, prefix = batch["segment"], batch["prefix"].bool()
    count, length = segment.shape
    order = torch.arange(length)
    same = segment[:, :, None] == segment[:, None, :]
    mask = torch.zeros(count, PICTURE + length, PICTURE + length, dtype=torch.bool)
    mask[:, :, :PICTURE] = True
    mask[:, PICTURE:, PICTURE:] = same & (prefix[:, None, :] | (order[None, :] <= order[:, None]))
    if alone:
        mask[:, :PICTURE, PICTURE:] = prefix[:, None, :]
    return mask[:, None]
