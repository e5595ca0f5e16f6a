"""Generated tokens → answers: text, cut at stop texts, and rows with boxes and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from shardsight.models.info import ModelError
from shardsight.models.paligemma.info import MASKS
from shardsight.models.paligemma.masks import MaskDecoder, paste
from shardsight.models.paligemma.prompts import Found, Prompt, Vocabulary, decode_box, find


@dataclass(frozen=True)
class Generated:
    """An answer so far. ids: of its tokens, with the one that ends it. logprobs: of these.

    finish_reason: `stop` or `length`; None before the end. text: up to a stop text; None where none was given.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    text: str | None = None


class Answers:
    """Reads answers. Masks are decoded where the model's folder holds `vae-oid.npz`. Raises ModelError, MaskError."""

    def __init__(self, tokenizer: Any, folder: str) -> None:
        self.vocabulary = _vocabulary(tokenizer, folder)
        path = Path(folder) / MASKS
        self.masks = MaskDecoder.load(path) if path.exists() else None

    def text(self, generated: Generated) -> str:
        """Without special tokens."""
        text = self.vocabulary.decode(generated.ids) if generated.text is None else generated.text
        return text.strip()

    def row(
        self, prompt: Prompt, generated: Generated, width: int, height: int, frames: list[int] | None = None
    ) -> dict[str, Any]:
        """A row of ANSWER. width, height: of the picture, pixels. frames: frame_index of each of a clip."""
        ids, logprobs = generated.ids, generated.logprobs
        return {
            "prompt": prompt.text,
            "text": self.text(generated),
            "detections": [
                self._detection(found, prompt, width, height)
                for found in find(ids, logprobs, self.vocabulary, prompt.names)
            ],
            "finish_reason": generated.finish_reason,
            "score": fmean(logprobs) if logprobs else None,
            "frames": frames,
        }

    def _detection(self, found: Found, prompt: Prompt, width: int, height: int) -> dict[str, Any]:
        x1, y1, x2, y2 = box = decode_box(found.locations, width, height)
        class_id = prompt.names.index(found.label) if found.label in prompt.names else None
        row: dict[str, Any] = {"label": found.label, "class_id": class_id, "score": found.score}
        row |= {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        if found.codes and self.masks:
            mask = self.masks.decode(np.array([found.codes]))[0]
            row["mask"] = paste(mask, box, width, height)
        return row

    def cut(self, generated: Generated, stop: Sequence[str]) -> Generated:
        """The answer up to the first stop text: its `text`, and the tokens for it (see visible)."""
        ids, decode = generated.ids, self.vocabulary.decode
        text, stopped = visible(decode(ids), stop, generated.finish_reason is not None)
        reason = "stop" if stopped else generated.finish_reason
        count = len(ids)
        if stopped or reason is None:
            while count and len(decode(ids[: count - 1])) >= len(text):
                count -= 1
        return Generated(ids[:count], generated.logprobs[:count], reason, text)


def visible(text: str, stop: Sequence[str], finished: bool) -> tuple[str, bool]:
    """(the text up to the first stop text, whether there was one), as OpenAI defines `stop`.

    Of an unfinished text, an end that may be the beginning of a stop text is held back.
    """
    if ends := [at for one in stop if (at := text.find(one)) >= 0]:
        return text[: min(ends)], True
    if finished:
        return text, False
    held = max((size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)
    return text[: len(text) - held], False


def _vocabulary(tokenizer: Any, folder: str) -> Vocabulary:
    ids = tokenizer.get_vocab()
    try:
        return Vocabulary(
            loc={ids[f"<loc{number:04}>"]: number for number in range(1024)},
            seg={ids[f"<seg{number:03}>"]: number for number in range(128)},
            decode=lambda part: tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        )
    except KeyError as error:
        raise ModelError(
            f"{folder}: the tokenizer lacks {error.args[0]}: save the model with PaliGemmaProcessor"
        ) from None
