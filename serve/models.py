"""The job's models as Serve's replicas: the same classes, with many requests in one batch."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pyarrow as pa
from ray.util import metrics

from shardsight.models.info import ModelDied
from shardsight.models.paligemma.prompts import Prompt
from shardsight.row import without_frames

# (conf, iou, max_det, classes), as in ultralytics.
Thresholds = tuple[float, float, int, tuple[int, ...] | None]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]


def pack(table: pa.Table) -> pa.Buffer:
    """For the way between processes: Ray's own pickling of a table with so many columns takes milliseconds."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def unpack(packed: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(packed).read_all()


class Detector:
    """A YOLO."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from shardsight.models.yolo.model import Yolo

        self.model, self.turn = Yolo(**arguments), threading.Lock()
        self.sizes = metrics.Histogram("shardsight_yolo_batch", "Pictures of a batch", BATCHES)
        self.seconds = metrics.Histogram("shardsight_yolo_seconds", "The model's time for a batch", SECONDS)
        if self.model.compiles:
            _ = self.model.compiled  # made on first use, which is to be now

    async def __call__(self, packed: pa.Buffer, thresholds: list[Thresholds]) -> pa.Buffer:
        """A packed load.TABLE, and how to look at each row → the same without frames, with `detections`, `classes` or
        `error`."""
        return await asyncio.to_thread(self.compute, packed, thresholds)

    def compute(self, packed: pa.Buffer, thresholds: list[Thresholds]) -> pa.Buffer:
        started, table = time.perf_counter(), unpack(packed)
        groups: dict[Thresholds, list[int]] = defaultdict(list)
        for index, each in enumerate(thresholds):
            groups[each].append(index)
        found: list[pa.Table] = []
        with self.turn:
            for each, indices in groups.items():
                self.model.set_thresholds(*each)
                found.append(self.model(table if len(groups) == 1 else table.take(indices)))
        order = np.argsort([index for indices in groups.values() for index in indices])
        self.sizes.observe(len(table))
        self.seconds.observe(time.perf_counter() - started)
        return pack(without_frames(pa.concat_tables(found)).take(order))


class Speaker:
    """A PaliGemma, whose engine takes each request into the batch that it is computing."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from shardsight.models.paligemma.model import PaliGemma

        self.model = PaliGemma(**arguments)
        self.dead = ""
        self.tokens = metrics.Counter("shardsight_paligemma_tokens", "Tokens of answers")

    def check_health(self) -> None:
        if self.dead:
            raise RuntimeError(self.dead)

    async def annotate(self, packed: pa.Buffer, prompts: list[str], regions: bool, max_tokens: int) -> pa.Buffer:
        """A packed load.TABLE of one row → the same without frames, with `answers`, its detections' `text`, or
        `error`."""
        table = unpack(packed)
        asked = self.model.ask_about(table, [Prompt.of(text) for text in prompts], regions, max_tokens)
        waiting = [asyncio.wrap_future(future) for *_, future in asked.questions]
        try:
            await asyncio.gather(*waiting, return_exceptions=True)
            if tokens := sum(len(one.result().ids) for one in waiting if not one.exception()):
                self.tokens.inc(tokens)
            return pack(without_frames(self.model.answered(asked)))
        except ModelDied as error:
            self.dead = str(error)
            raise
        finally:
            asked.cancel()

    async def speak(
        self, frame: np.ndarray, text: str, max_tokens: int, temperature: float, stream: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """What there is of one answer, after each token with `stream`, or at its end: `text`, and of all tokens so far
        `tokens` and `logprobs`."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Any]()
        prompt = Prompt.of(text)

        def hear(generated: Any) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, generated)

        future = self.model.ask(frame, prompt, max_tokens, temperature, hear if stream else None)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(heard.put_nowait, None))
        reader = self.model.reader
        tokens: list[str] = []

        def said(generated: Any) -> dict[str, Any]:
            tokens.extend(reader.vocabulary.decode([token]) for token in generated.ids[len(tokens) :])
            text = reader.text(generated)
            return {"text": text, "tokens": tokens, "logprobs": generated.logprobs, "finish_reason": None}

        try:
            while (generated := await heard.get()) is not None:
                yield said(generated)
            done = future.result()
            self.tokens.inc(len(done.ids))
            used = self.model.info.image_tokens + 1 + len(self.model.encode(prompt.text))
            yield said(done) | {"finish_reason": done.finish_reason, "prompt_tokens": used}
        except ModelDied as error:
            self.dead = str(error)
            raise
        finally:
            future.cancel()
