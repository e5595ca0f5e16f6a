"""PaliGemma: tables of frames, or pictures, → answers to prompts."""

import os

# The engine in this process: our prompts' lengths reach it, and it starts in a fifth of the time. vLLM reads these when
# it is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer

from shardsight.models.info import ModelDied, computes_bf16
from shardsight.models.paligemma.answers import Answers, Generated
from shardsight.models.paligemma.engine import Engine, Limits, Request
from shardsight.models.paligemma.info import inspect, request_length
from shardsight.models.paligemma.prompts import Prompt
from shardsight.models.paligemma.routing import Route
from shardsight.models.table import Picture, Stopwatch, from_pictures, to_rows, with_results
from shardsight.row import Failure, frames_of


@dataclass(frozen=True)
class Asked:
    """What a table's pictures are being asked: (row, its region, prompt, answer to come). since: see Stopwatch."""

    table: pa.Table
    answers: list[list[dict[str, Any]] | None]
    detections: list[list[dict[str, Any]] | None]
    questions: list[tuple[int, dict[str, Any] | None, Prompt, "Future[Generated]"]]
    since: tuple[float, float]

    def cancel(self) -> None:
        """Nobody waits for it any more: the engine drops what is not answered yet."""
        for *_, future in self.questions:
            future.cancel()


class PaliGemma:
    """One PaliGemma 1 or 2. Calls from several threads share its batches.

    model: a folder, or a name on the hub, of `revision`. prompts: asked of each picture; with `regions`, of the crop of
    each of its detections. route: which pictures it is asked about; all by default. max_tokens: of an answer.
    precision: auto, fp32, bf16 or fp16. adapter: folder of a LoRA, as peft saves it. devices: that share the model.
    batch_size: most requests that run at once. memory: share of a GPU's memory to take. threads: of the CPU.
    prompt_tokens: most of a prompt. Raises ModelError, PromptError.
    """

    def __init__(
        self,
        model: str,
        prompts: Sequence[str] = ("caption en",),
        regions: bool = False,
        route: Route | None = None,
        max_tokens: int = 256,
        precision: str = "auto",
        revision: str | None = None,
        adapter: str | None = None,
        devices: int = 1,
        batch_size: int | None = None,
        memory: float = 0.9,
        threads: int | None = None,
        prompt_tokens: int = 256,
    ) -> None:
        self.regions, self.route, self.max_tokens = regions, route, max_tokens
        self.prompts = [Prompt.of(prompt) for prompt in prompts]
        self.info = inspect(model, revision, adapter)
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what it has was fetched just now
        cuda = torch.cuda.is_available()
        self.precision = _precision(cuda) if precision == "auto" else precision
        length = request_length(self.info, prompt_tokens, max_tokens, cuda)
        self.most_prompt_tokens = length - self.info.image_tokens - 1 - max_tokens  # its newline included
        self.tokenizer = AutoTokenizer.from_pretrained(self.info.path)
        self.reader = Answers(self.tokenizer, self.info.path)
        self.encode = functools.lru_cache(4096)(self._encode)
        batch_size, threads = batch_size or (256 if cuda else 32), threads or os.cpu_count() or 1
        self.engine = Engine(self.info, Limits(self.precision, length, batch_size, devices, memory, threads))
        self.stopwatch = Stopwatch()

    def close(self) -> None:
        """Let the engine finish what it has, and free its memory."""
        self.engine.close()

    def __call__(self, pictures: pa.Table | Picture | Sequence[Picture], prompts: Sequence[str] | None = None) -> Any:
        """A table with FRAME columns → the same, with `answers`, or with `error`; with `regions`, whose frames are
        whole pictures, each detection gets its `text` instead.

        Pictures, one or a list of them (see table.from_pictures) → a list of rows as dicts.
        prompts: instead of the model's own. Raises ModelDied, PromptError.
        """
        if not isinstance(pictures, pa.Table):
            return to_rows(self(from_pictures(pictures, self.info.input), prompts))
        asked = self.prompts if prompts is None else [Prompt.of(prompt) for prompt in prompts]
        return self.answered(self.ask_about(pictures, asked, self.regions))

    def ask_about(
        self, table: pa.Table, prompts: Sequence[Prompt], regions: bool = False, max_tokens: int | None = None
    ) -> Asked:
        """Submit the prompts about each picture of a table, or, with `regions`, about each of its detections."""
        detections = table["detections"].to_pylist()
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        asked = Asked(table, table["answers"].to_pylist(), detections, [], Stopwatch.now())
        for index, frame in frames_of(table):
            boxes = detections[index] or []
            if regions:
                pictures = [(box, _crop(frame, box)) for box in boxes]
                pictures = [one for one in pictures if not self.route or self.route.takes(one[1], [], 1, 1)]
            elif self.route and not self.route.takes(frame, boxes, *sizes[index]):
                continue
            else:
                pictures, asked.answers[index] = [(None, frame)], []
            for region, picture in pictures:
                for prompt in prompts:
                    asked.questions.append((index, region, prompt, self.ask(picture, prompt, max_tokens)))
        return asked

    def answered(self, asked: Asked) -> pa.Table:
        """The table with what was answered; waits for it. Raises ModelDied."""
        table, answers, detections = asked.table, asked.answers, asked.detections
        failed, widths, heights = (table[name].to_pylist() for name in ("error", "width", "height"))
        for index, region, prompt, future in asked.questions:
            try:
                answer = self.reader.row(prompt, future.result(), widths[index], heights[index])
            except ModelDied:
                raise
            except Exception as error:
                failed[index], answers[index] = Failure.of(error).row("paligemma"), None
                continue
            if region is not None:
                region["text"] = answer["text"]
            elif (row := answers[index]) is not None:
                row.append(answer)
        columns: dict[str, Sequence[Any]] = {"answers": answers, "detections": detections}
        computed = {index for index, *_ in asked.questions}
        return with_results(table, "paligemma", columns, failed, computed, self.stopwatch.since(asked.since))

    def ask(
        self,
        frame: np.ndarray,
        prompt: Prompt,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        listener: Callable[[Generated], None] | None = None,
        *,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> "Future[Generated]":
        """Submit an RGB uint8 frame (h, w, 3) and a prompt. The future raises Failure, or ModelDied; cancelled, it
        costs no more work.

        listener: is told, in the engine's thread, what there is of the answer after each token. The others are those
        of OpenAI's API: max_tokens: fewer than the model's own. temperature: 0 takes the likeliest token. top_p: share
        of the probability that is drawn from, the likeliest tokens first. seed: the same one gives the same answer,
        whatever else is computed. stop: texts before which the answer ends (see Answers.cut).
        """
        most = min(max_tokens or self.max_tokens, self.max_tokens)
        texts = [text for text in stop if text]
        cut = functools.partial(self.reader.cut, stop=texts) if texts else None
        try:
            ids = self.encode(prompt.text)
        except Failure as failure:
            refused: Future[Generated] = Future()
            refused.set_exception(failure)
            return refused
        return self.engine.submit(Request(frame, ids, most, temperature, top_p, seed, listener, cut))

    def _encode(self, text: str) -> list[int]:
        """As Hugging Face's processor does, but for picture and start token, which vLLM puts before."""
        ids: list[int] = self.tokenizer.encode(text + "\n", add_special_tokens=False)
        if len(ids) > self.most_prompt_tokens:
            most = self.most_prompt_tokens
            raise Failure("PromptTooLong", f"the prompt takes {len(ids)} tokens, and at most {most} fit")
        return ids


def _crop(frame: np.ndarray, box: dict[str, Any]) -> np.ndarray:
    """What of a whole picture, (h, w, 3), a detection touches, of one pixel at least."""
    x1, y1 = max(0, math.floor(box["x1"])), max(0, math.floor(box["y1"]))
    x1, y1 = min(x1, frame.shape[1] - 1), min(y1, frame.shape[0] - 1)
    return frame[y1 : max(y1 + 1, math.ceil(box["y2"])), x1 : max(x1 + 1, math.ceil(box["x2"]))]


def _precision(cuda: bool) -> str:
    """fp16 on CUDA, bf16 on a CPU that computes in it, else fp32."""
    return "fp16" if cuda else "bf16" if computes_bf16() else "fp32"
