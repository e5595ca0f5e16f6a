"""What the decoder is trained on: many questions about one picture, in one sequence.

The picture's tokens are written once, and each question with its answer sees the picture and itself alone, at
the places that it would have alone. So a dozen questions cost twice what one does. The picture cannot see the
questions then, as PaliGemma's does; so some are trained alone too, with the mask of `generate`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

from demo.paligemma_data import Drawn
from demo.paligemma_tower import GRID, near_bins
from demo.questions import QUESTIONS, ask, caption, detect, ocr, segment
from demo.scenes import KINDS

PICTURE = GRID * GRID
# Kinds of tokens that the loss is averaged over, with their weights.
LOOKS = 2  # the decoder's layer in which the first head of each group is taught to look at what is asked about
PARTS = {"caption": 2.0, "ocr": 3.0, "answer": 3.0, "loc": 4.0, "seg": 2.0, "list": 1.0}
WORTH = PARTS | {"look": 1.0}


def conversation(drawn: Drawn, codes: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """(prefix, suffix) of every form. codes: int (n, 16), of the shapes' masks."""
    shapes = drawn.shapes
    yield caption(shapes)
    yield ocr(shapes)
    for about in QUESTIONS:
        pair = ask(shapes, about, rng)
        if pair:
            yield pair
    yield detect(shapes)
    some = sorted(rng.choice(len(KINDS), int(rng.integers(1, len(KINDS))), replace=False))
    yield detect(shapes, [KINDS[n] for n in some])
    kinds = [shape.kind for shape in shapes]
    for _ in range(2):
        kind = kinds[rng.integers(len(kinds))] if rng.random() < 0.95 else KINDS[rng.integers(len(KINDS))]
        yield segment(shapes, kind, list(codes))


class Written(NamedTuple):
    """A question with its answer: token ids; how many of them are prefix; and of each the label, -100 in the prefix,
    the index in PARTS, and the number of the shape to look at for its label, -1 for none."""

    ids: list[int]
    prefix: int
    labels: list[int]
    parts: list[int]
    looks: list[int]


class Writer:
    """(prefix, suffix) → token ids, labels, kinds of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._newline = tokenizer.convert_tokens_to_ids("\n")
        self._between = tokenizer.convert_tokens_to_ids("▁;▁")
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.loc0, self.seg0 = (tokenizer.convert_tokens_to_ids(name) for name in ("<loc0000>", "<seg000>"))

    def write(self, prefix: str, suffix: str, about: Sequence[int] = ()) -> Written:
        """about: numbers of the shapes that the answer names, in its order."""
        question = [self._bos, *self._encode(prefix).ids, self._newline]
        answer = [*self._encode(suffix).ids, self._eos]
        labels = [-100] * (len(question) - 1) + answer
        form = prefix.split()[0]
        looks = [-1] * (len(question) - 1) + [*self._looks(form, answer[:-1], about), -1]
        return Written(
            question + answer[:-1], len(question), labels, [self._part(form, label) for label in labels], looks
        )

    def _looks(self, form: str, answer: list[int], about: Sequence[int]) -> list[int]:
        if not about:
            return [-1] * len(answer)
        if form == "ocr":  # a word a token
            return list(about)
        # What comes between two boxes is known from the second.
        numbers = np.cumsum([token == self._between for token in answer])
        return [about[number] for number in numbers]

    def _part(self, form: str, label: int) -> int:
        name = form
        if form in ("detect", "segment"):
            name = "list"
            if self.loc0 <= label < self.loc0 + 1024:
                name = "loc"
            elif self.seg0 <= label < self.seg0 + 128:
                name = "seg"
        return list(PARTS).index(name)


def pack(written: Sequence[Written]) -> dict[str, np.ndarray]:
    """One picture's questions, one after the other: int64 (length,) each."""
    lengths = [len(one.ids) for one in written]
    return {
        **{
            name: np.concatenate([getattr(one, name) for one in written]).astype(np.int64)
            for name in ("ids", "labels", "parts", "looks")
        },
        "prefix": np.concatenate([np.arange(len(one.ids)) < one.prefix for one in written]).astype(np.int64),
        "segment": np.repeat(np.arange(len(written)), lengths),
        "place": np.concatenate([np.arange(length) for length in lengths]),
    }


def collate(packed: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    longest = max(len(one["ids"]) for one in packed)
    padding = {"ids": 0, "labels": -100, "parts": 0, "looks": -1, "prefix": 0, "segment": -1, "place": 0}
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
        self._looking = model.model.language_model.layers[LOOKS].self_attn
        self._looking.register_forward_pre_hook(self._remember, with_kwargs=True)
        self._seen: tuple[torch.Tensor, Any] | None = None

    def _remember(self, _: nn.Module, __: tuple[()], given: dict[str, Any]) -> None:
        self._seen = given["hidden_states"], given["position_embeddings"]

    def forward(
        self, features: torch.Tensor, batch: dict[str, torch.Tensor], owner: torch.Tensor, alone: bool
    ) -> dict[str, torch.Tensor]:
        """features: projected, (n, PICTURE, width). owner: the shape that each patch belongs to, -1 for none, int
        (n, PICTURE). alone: a question a sequence, which the picture sees."""
        gemma = self.model.model.language_model
        hidden = torch.cat([features, self.model.get_input_embeddings()(batch["ids"])], 1)
        picture = torch.arange(PICTURE).expand(len(features), -1)
        places = torch.cat([picture, PICTURE + batch["place"]], 1) + 1
        mask = mask_of(batch, alone)
        out = gemma(inputs_embeds=hidden, attention_mask=mask, position_ids=places, use_cache=False)
        asked = batch["labels"] != -100
        labels, parts = batch["labels"][asked], batch["parts"][asked]
        logs = F.log_softmax(self.model.lm_head(out.last_hidden_state[:, PICTURE:][asked]).float(), -1)
        losses = -logs.gather(1, labels[:, None])[:, 0]
        located = parts == list(PARTS).index("loc")
        bins = labels[located] - self.loc0
        blurred = -(logs[located][:, self.loc0 : self.loc0 + 1024] * near_bins(bins)).sum(1)
        losses = losses.masked_scatter(located, blurred)
        found = {
            name: losses[parts == number].mean() for number, name in enumerate(PARTS) if bool((parts == number).any())
        }
        return found | self._look(batch["looks"], owner, mask)

    def _look(self, looks: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """How little the first head of each group looks at the shape that the label is about."""
        assert self._seen is not None
        hidden, (cos, sin) = self._seen
        attention = self._looking
        queries = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        keys = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries[:, :: attention.num_key_value_groups], keys, cos, sin)
        rows = PICTURE + torch.arange(looks.shape[1])
        scores = (queries[:, :, rows] @ keys.mT).float() * attention.scaling
        logs = scores.masked_fill(~mask[:, :, rows], -torch.inf).log_softmax(-1)[..., :PICTURE]
        right = (owner[:, None, :] == looks[:, :, None]) & (looks[:, :, None] >= 0)
        seen = logs.masked_fill(~right[:, None], -torch.inf)[right.any(-1)[:, None].expand(-1, logs.shape[1], -1)]
        return {"look": -seen.logsumexp(-1).mean()} if len(seen) else {}


def mask_of(batch: dict[str, torch.Tensor], alone: bool) -> torch.Tensor:
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
