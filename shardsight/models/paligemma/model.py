"""PaliGemma: tables of frames, or pictures, → answers to prompts."""

import os

# Read by vLLM when it is imported. With its engine in this process, prompts' lengths reach the attention (see prefix),
# and it starts in a fifth of the time.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer

from shardsight.models.info import ModelDied, automatic
from shardsight.models.paligemma.answers import Answers, Generated
from shardsight.models.paligemma.engine import Engine, Limits, Request
from shardsight.models.paligemma.info import inspect, request_length
from shardsight.models.paligemma.prompts import Prompt, PromptError, Sampling
from shardsight.models.paligemma.routing import Route
from shardsight.models.table import Picture, Stopwatch, from_pictures, to_rows, with_results
from shardsight.row import Failure, clips_of, crop_of, frames_of
from shardsight.storage import Storage

GREEDY = Sampling()


@dataclass(frozen=True)
class Asked:
    """A table whose answers are being computed. questions: (row, detection, prompt, answer). clips: row → frame_index
    of each frame of its clip. since: of Stopwatch."""

    table: pa.Table
    answers: list[list[dict[str, Any]] | None]
    detections: list[list[dict[str, Any]] | None]
    questions: list[tuple[int, dict[str, Any] | None, Prompt, "Future[Generated]"]]
    clips: dict[int, list[int]]
    since: tuple[float, float]


class PaliGemma:
    """One PaliGemma 1 or 2. Calls from several threads share its batches.

    model: a folder, a prefix in a store, or a name on the hub, of `revision`. prompts: about each picture; with
    `regions`, about the crop of each of its detections. route: selects pictures; all by default. max_tokens,
    prompt_tokens: of an answer and of a prompt, at most. precision: auto (fp16 on CUDA, bf16 on a CPU that computes in
    it, else fp32), fp32, bf16 or fp16. adapter: folder of a LoRA, as peft saves it. devices, batch_size, memory,
    threads: see Limits. clip_frames: pictures in one prompt, at most; above 1, of a video only rows with a `clip` are
    asked about, all of its frames together. prompt_column: of the rows' `metadata`, with a text or a list of them to
    ask instead of `prompts`. storage: options of the model's store, as for the job. files: PaliGemmaInfo's, which its
    own have to be. Raises ModelError, PromptError.
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
        clip_frames: int = 1,
        prompt_column: str | None = None,
        storage: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
    ) -> None:
        self.prompt_column = prompt_column
        self.regions, self.route, self.max_tokens, self.clip_frames = regions, route, max_tokens, clip_frames
        self.prompts = [Prompt.of(prompt) for prompt in prompts]
        self.info = inspect(model, revision, adapter, Storage(storage or {}), files)
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # inspect has fetched all files
        cuda = torch.cuda.is_available()
        self.precision = automatic(cuda) if precision == "auto" else precision
        length = request_length(self.info, prompt_tokens, max_tokens, cuda, clip_frames)
        self.max_prompt_tokens = length - clip_frames * self.info.image_tokens - 1 - max_tokens  # with its newline
        self.tokenizer = AutoTokenizer.from_pretrained(self.info.path)
        self.reader = Answers(self.tokenizer, self.info.path)
        self.encode = functools.lru_cache(4096)(self._encode)
        batch_size, threads = batch_size or (256 if cuda else 32), threads or os.cpu_count() or 1
        limits = Limits(self.precision, length, batch_size, devices, memory, threads, clip_frames)
        self.engine = Engine(self.info, limits)
        self.stopwatch = Stopwatch()

    def close(self) -> None:
        """Finish all requests, then free the memory."""
        self.engine.close()

    def __call__(self, pictures: pa.Table | Picture | Sequence[Picture], prompts: Sequence[str] | None = None) -> Any:
        """A table with FRAME columns → the same with `answers` or `error`; with `regions`, for which frames must be
        unscaled, with a `text` in each detection instead. Pictures (see table.from_pictures) → rows as dicts.

        prompts: instead of the model's own. Raises ModelDied, PromptError.
        """
        if not isinstance(pictures, pa.Table):
            return to_rows(self(from_pictures(pictures, self.info.input), prompts))
        asked = self.prompts if prompts is None else [Prompt.of(prompt) for prompt in prompts]
        return self.answered(self.ask_about(pictures, asked, self.regions))

    def ask_about(
        self, table: pa.Table, prompts: Sequence[Prompt], regions: bool = False, max_tokens: int | None = None
    ) -> Asked:
        """Submit the prompts about each picture or clip of a table, or, with `regions`, about each of a picture's
        detections. A clip is routed by its first frame."""
        detections = table["detections"].to_pylist()
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        metadata = table["metadata"].to_pylist()
        asked = Asked(table, table["answers"].to_pylist(), detections, [], {}, Stopwatch.now())
        for index, frames, numbers in self._subjects(table):
            boxes = detections[index] or []
            subjects: list[tuple[dict[str, Any] | None, Sequence[np.ndarray]]]
            if regions:
                crops = [(box, crop_of(frames[0], box)) for box in boxes]
                subjects = [(box, [crop]) for box, crop in crops if not self.route or self.route.takes(crop, [], 1, 1)]
            elif self.route and not self.route.takes(frames[0], boxes, *sizes[index]):
                continue
            else:
                subjects, asked.answers[index] = [(None, frames)], []
            if numbers:
                asked.clips[index] = numbers
            try:
                own = self._prompts_of(metadata[index]) or prompts
            except PromptError as error:
                asked.questions.append((index, None, Prompt(""), _refused(Failure.of(error))))
                continue
            for region, pictures in subjects:
                for prompt in own:
                    future = self.ask(pictures, prompt, Sampling(max_tokens))
                    asked.questions.append((index, region, prompt, future))
        return asked

    def _prompts_of(self, metadata: str | None) -> list[Prompt]:
        """What a row's own column asks. Raises PromptError."""
        if not self.prompt_column or not metadata:
            return []
        value = json.loads(metadata).get(self.prompt_column)
        texts = value if isinstance(value, list) else [value]
        return [Prompt.of(str(text)) for text in texts if text is not None]

    def _subjects(self, table: pa.Table) -> Iterator[tuple[int, list[np.ndarray], list[int] | None]]:
        """(row's index, frames to be asked about together, frame_index of each; None of a single picture)."""
        in_video = table["frame_index"].is_valid().to_pylist()
        if self.clip_frames > 1:
            yield from clips_of(table)
        for index, frame in frames_of(table):
            if self.clip_frames == 1 or not in_video[index]:
                yield index, [frame], None

    def answered(self, asked: Asked) -> pa.Table:
        """Wait for the answers → the table with them. Raises ModelDied."""
        table, answers, detections = asked.table, asked.answers, asked.detections
        failed, widths, heights = (table[name].to_pylist() for name in ("error", "width", "height"))
        for index, region, prompt, future in asked.questions:
            try:
                size = widths[index], heights[index]
                answer = self.reader.row(prompt, future.result(), *size, asked.clips.get(index))
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
        frames: np.ndarray | Sequence[np.ndarray],
        prompt: Prompt,
        sampling: Sampling = GREEDY,
        listener: Callable[[Generated], None] | None = None,
    ) -> "Future[Generated]":
        """Submit a prompt about an RGB uint8 frame (h, w, 3), or about several together, `clip_frames` at most. The
        future raises Failure or ModelDied; cancelling it stops the work. listener: called with the answer so far after
        each token, in the engine's thread."""
        try:
            ids = self.encode(prompt.text)
        except Failure as failure:
            return _refused(failure)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens or self.max_tokens, self.max_tokens))
        cut = functools.partial(self.reader.cut, stop=sampling.stop) if sampling.stop else None
        return self.engine.submit(Request(frames, ids, sampling, listener, cut))

    def _encode(self, text: str) -> list[int]:
        """As Hugging Face's processor does, without picture and start token, which vLLM adds."""
        ids: list[int] = self.tokenizer.encode(text + "\n", add_special_tokens=False)
        if len(ids) > self.max_prompt_tokens:
            found = f"the prompt takes {len(ids)} tokens, and at most {self.max_prompt_tokens} fit"
            raise Failure("PromptTooLong", found)
        return ids


def _refused(failure: Failure) -> "Future[Generated]":
    refused: Future[Generated] = Future()
    refused.set_exception(failure)
    return refused
