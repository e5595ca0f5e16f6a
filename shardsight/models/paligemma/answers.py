"""What PaliGemma generates → answers: text cut at stop texts, and rows with boxes and masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardsight.models.info import ModelError
from shardsight.models.paligemma.masks import MaskDecoder, paste
from shardsight.models.paligemma.prompts import Found, Prompt, Vocabulary, decode_box, find


@dataclass(frozen=True)
class Generated:
    """One answer, or what there is of it: token ids, an end included, and their log-probabilities.

    finish_reason: `stop` or `length`; None while there is more to come. text: what may be shown, where stop texts were
    given; else None, and the ids say all.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    text: str | None = None


class Answers:
    """Reads answers with the tokenizer of a model, and decodes masks where its folder holds `vae-oid.npz`.

    Raises ModelError, MaskError.
    """

    def __init__(self, tokenizer: Any, folder: str) -> None:
        self.vocabulary = _vocabulary(tokenizer)
        path = Path(folder) / "vae-oid.npz"
        self.masks = MaskDecoder.load(path) if path.exists() else None

    def text(self, generated: Generated) -> str:
        """What an answer says, without the tokens that begin and end one."""
        text = self.vocabulary.decode(generated.ids) if generated.text is None else generated.text
        return text.strip()

    def row(self, prompt: Prompt, generated: Generated, width: int, height: int) -> dict[str, Any]:
        """A row of ANSWER, of a picture of width × height pixels."""
        ids, logprobs = generated.ids, generated.logprobs
        return {
            "prompt": prompt.text,
            "text": self.text(generated),
            "detections": [
                self._detection(found, prompt, width, height)
                for found in find(ids, logprobs, self.vocabulary, prompt.names)
            ],
            "finish_reason": generated.finish_reason,
            "score": math.fsum(logprobs) / len(logprobs) if logprobs else None,
        }

    def _detection(self, found: Found, prompt: Prompt, width: int, height: int) -> dict[str, Any]:
        box = decode_box(found.locations, width, height)
        row: dict[str, Any] = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
        class_id = prompt.names.index(found.label) if found.label in prompt.names else None
        row |= {"label": found.label, "class_id": class_id, "score": found.score}
        if found.codes and self.masks:
            mask = self.masks.decode(np.array([found.codes]))[0]
            row["mask"] = paste(mask, box, width, height)
        return row

    def cut(self, generated: Generated, stop: Sequence[str]) -> Generated:
        """The answer up to the first of the stop texts, with `text`, and the tokens that it takes.

        While there is more to come, an end that may begin a stop text is held back.
        """
        ids, decode = generated.ids, self.vocabulary.decode
        text, stopped = visible(decode(ids), stop, generated.finish_reason is not None)
        reason = "stop" if stopped else generated.finish_reason
        count = len(ids)
        if stopped or reason is None:
            while count and len(decode(ids[: count - 1])) >= len(text):
                count -= 1
        return Generated(ids[:count], generated.logprobs[:count], reason, text)


def visible(text: str, stop: Sequence[str], finished: bool) -> tuple[str, bool]:
    """(What of an answer may be shown, whether a stop text has ended it).

    As OpenAI defines `stop`: the answer ends before the stop text. Unless it is finished, what may begin one is not
    shown yet.
    """
    if ends := [at for one in stop if (at := text.find(one)) >= 0]:
        return text[: min(ends)], True
    if finished:
        return text, False
    held = max((size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)
    return text[: len(text) - held], False


def _vocabulary(tokenizer: Any) -> Vocabulary:
    ids = tokenizer.get_vocab()
    try:
        return Vocabulary(
            loc={ids[f"<loc{number:04}>"]: number for number in range(1024)},
            seg={ids[f"<seg{number:03}>"]: number for number in range(128)},
            decode=lambda part: tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        )
    except KeyError as error:
        raise ModelError(f"its tokenizer lacks {error.args[0]}: save it with PaliGemmaProcessor") from None
