"""Ask a PaliGemma about scenes, to measure it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from demo.questions import DETECT_ALL, QUESTIONS, ask, seen
from demo.scenes import Scene
from demo.writers import jpeg
from shardsight.models.paligemma.prompts import Prompt


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


def answers(folder: Path, scenes: Sequence[Scene], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Greedy answers of the model in a folder by scene name, as records.ANSWER has them."""
    from shardsight.models.paligemma.model import PaliGemma  # vLLM, which takes seconds and changes its process

    model, rng = PaliGemma(str(folder), precision="fp32"), np.random.default_rng(seed)
    asked = []
    for scene in scenes:
        frame = simplejpeg.decode_jpeg(jpeg(scene))
        asked += [(scene, prompt, model.ask(frame, prompt)) for prompt in map(Prompt.of, prompts(scene, rng))]
    found: dict[str, list[dict[str, Any]]] = {scene.name: [] for scene in scenes}
    for scene, prompt, future in asked:
        height, width = scene.image.shape[:2]
        found[scene.name].append(model.reader.row(prompt, future.result(), width, height))
    model.close()
    return found
