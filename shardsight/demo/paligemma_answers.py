"""Ask the demo's PaliGemma about scenes with Hugging Face's own `generate`, to measure it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from shardsight.demo.questions import DETECT_ALL, QUESTIONS, ask, seen
from shardsight.demo.scenes import Scene
from shardsight.demo.writers import jpeg
from shardsight.paligemma.masks import MaskDecoder, paste


def prompts(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """caption, ocr, two questions, all boxes, and the masks of a kind that is there."""
    shapes = seen(scene)
    yield "caption en"
    yield "ocr"
    asked: list[str] = []
    while len(asked) < 2:
        pair = ask(shapes, QUESTIONS[rng.integers(len(QUESTIONS))], rng)
        if pair and pair[0] not in asked:
            asked.append(pair[0])
    yield from asked
    yield DETECT_ALL
    yield f"segment {shapes[rng.integers(len(shapes))].kind}"


class Asked:
    """A model folder, ready to be asked."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

        self._model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(folder)
        self._masks = MaskDecoder.load(folder / "vae-oid.npz")
        words = self._processor.tokenizer
        self._loc0, self._seg0 = (words.convert_tokens_to_ids(name) for name in ("<loc0000>", "<seg000>"))

    def __call__(self, scenes: Sequence[Scene], seed: int = 0, batch: int = 16) -> dict[str, list[dict[str, Any]]]:
        """Greedy answers by scene name, as records.ANSWER has them."""
        rng = np.random.default_rng(seed)
        pairs = [(scene, prompt) for scene in scenes for prompt in prompts(scene, rng)]
        pairs.sort(key=lambda pair: (pair[1].split()[0], len(pair[1])))  # of one length together
        answers: dict[str, list[dict[str, Any]]] = {scene.name: [] for scene in scenes}
        for start in range(0, len(pairs), batch):
            some = pairs[start : start + batch]
            for (scene, prompt), answer in zip(some, self._ask(some), strict=True):
                answers[scene.name].append({"prompt": prompt, **answer})
        return answers

    @torch.inference_mode()
    def _ask(self, pairs: Sequence[tuple[Scene, str]]) -> Iterator[dict[str, Any]]:
        pictures = [simplejpeg.decode_jpeg(jpeg(scene)) for scene, _ in pairs]
        texts = [f"<image>{prompt}" for _, prompt in pairs]
        inputs = self._processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        inputs.pop("labels", None)
        made = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=220, output_logits=True, return_dict_in_generate=True
        )
        logs = torch.stack(made.logits, 1).log_softmax(-1)
        ids = made.sequences[:, inputs["input_ids"].shape[1] :]
        chosen = logs.gather(2, ids[:, :, None])[:, :, 0]
        for (scene, _), row, scores in zip(pairs, ids.tolist(), chosen.tolist(), strict=True):
            length = row.index(1) if 1 in row else len(row)
            text = self._processor.tokenizer.decode(row[:length], skip_special_tokens=True)
            found = list(self._detections(row[:length], scores, scene))
            yield {"text": text, "detections": found, "score": float(np.mean(scores[: length + 1]))}

    def _detections(self, ids: list[int], scores: list[float], scene: Scene) -> Iterator[dict[str, Any]]:
        """`<loc>`×4 [`<seg>`×16] label; a detection's score is the likelihood of its label."""
        height, width = scene.image.shape[:2]
        at = 0
        while at < len(ids):
            bins, codes = self._run(ids, at, self._loc0, 1024, 4), self._run(ids, at + 4, self._seg0, 128, 16)
            if len(bins) < 4:
                at += 1
                continue
            at += 20 if len(codes) == 16 else 4
            y1, x1, y2, x2 = (value / 1023 for value in bins)
            box = x1 * width, y1 * height, x2 * width, y2 * height
            if at < len(ids) and y2 > y1 and x2 > x1:
                label = self._processor.tokenizer.decode(ids[at]).strip()
                mask = paste(self._masks.decode(np.array([codes]))[0], box, width, height) if len(codes) == 16 else None
                edges = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
                yield {"label": label, "score": float(np.exp(scores[at])), **edges, "mask": mask}

    def _run(self, ids: list[int], start: int, first: int, count: int, length: int) -> list[int]:
        """Up to `length` neighbouring tokens of a kind, as numbers."""
        found: list[int] = []
        for id in ids[start : start + length]:
            if not first <= id < first + count:
                break
            found.append(id - first)
        return found
