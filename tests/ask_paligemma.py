"""Engines in a process of their own, as vLLM changes what it is loaded into: torch's threads, the environment."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.small_paligemma import Frames

ROOT = Path(__file__).parent.parent


@dataclass
class Asked:
    """How an engine is made and asked. pairs: (frame or frames, prompt). alone: each once the one before is answered.

    little: give it memory for a few requests, less than run at once.
    """

    model: Path
    pairs: list[tuple[Frames, str]]
    arguments: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    little: bool = False


@dataclass
class Answered:
    """answers: (ids, log-probabilities) of each pair. preempted: how often a request was. encoded: how many pictures
    went through the vision tower."""

    answers: list[tuple[list[int], list[float]]]
    preempted: int
    encoded: int


def ask(asked: list[Asked], folder: Path, stock: bool = False) -> list[Answered]:
    """One engine after the other. stock: with vLLM's own PaliGemma, as though our plugin were not there."""
    (folder / "asked").write_bytes(pickle.dumps((asked, stock)))
    command = [sys.executable, "-m", "tests.ask_paligemma", str(folder)]
    environment = os.environ | ({"VLLM_PLUGINS": "none"} if stock else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answered: list[Answered] = pickle.loads((folder / "answered").read_bytes())
    return answered


def main(folder: Path) -> None:
    from vllm.model_executor.models.paligemma import PaliGemmaForConditionalGeneration
    from vllm.v1.core.sched.scheduler import Scheduler

    from shardsight.models.paligemma.model import PaliGemma  # isort: split
    from shardsight.models.paligemma import engine
    from shardsight.models.paligemma.prompts import Prompt

    preempted = encoded = 0
    original, encode = Scheduler._preempt_request, PaliGemmaForConditionalGeneration._image_pixels_to_features

    def counted_pixels(self: Any, tower: Any, pixels: Any) -> Any:
        nonlocal encoded
        encoded += len(pixels)
        return encode(self, tower, pixels)

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return original(*arguments, **named)

    Scheduler._preempt_request = counted
    PaliGemmaForConditionalGeneration._image_pixels_to_features = counted_pixels
    asked, stock = pickle.loads((folder / "asked").read_bytes())
    if stock:
        engine.loaded = lambda: True
    answered = []
    for one in asked:
        preempted = 0
        free, fits = engine.Limits.free, engine.fits
        if one.little:
            engine.fits = lambda *_: None
            engine.Limits.free = lambda self: 0
        # One thread: two wait for each other longer than such small models take.
        model = PaliGemma(str(one.model), precision="fp32", threads=1, **one.arguments)
        engine.Limits.free, engine.fits = free, fits
        encoded = 0  # vLLM has tried it with the largest batch
        if one.alone:
            results = [model.ask(frame, Prompt.of(prompt)).result() for frame, prompt in one.pairs]
        else:
            futures = [model.ask(frame, Prompt.of(prompt)) for frame, prompt in one.pairs]
            results = [future.result() for future in futures]
        answered.append(Answered([(result.ids, result.logprobs) for result in results], preempted, encoded))
        model.close()
    (folder / "answered").write_bytes(pickle.dumps(answered))


if __name__ == "__main__":
    from tests import ask_paligemma

    ask_paligemma.main(Path(sys.argv[1]))  # not of __main__: its classes are pickled
