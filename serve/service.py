"""The deployments: Gateway, which checks, reads and decodes what comes, and the models that it asks, a replica each."""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from serve.arguments import Arguments, Options
from serve.guard import Problem
from serve.pictures import Pictures, public, without_error
from shardsight.decode.frames import Load
from shardsight.models.info import ModelDied
from shardsight.models.lineup import Lineup
from shardsight.models.paligemma.prompts import Prompt
from shardsight.row import Failure, without_frames
from shardsight.storage import Storage

# (conf, iou, max_det, classes), as in ultralytics.
Thresholds = tuple[float, float, int, tuple[int, ...] | None]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
READY_SECONDS = 2.0  # within which a replica has to answer to be ready


@dataclass(frozen=True)
class Sampling:
    """How PaliGemma's tokens are chosen, and where its answer ends, as in OpenAI's protocol. temperature: 0 takes the
    likeliest token. stop: texts before which the answer ends."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


def pack(table: pa.Table) -> pa.Buffer:
    """For the way between processes: Ray's own pickling of a table with so many columns takes milliseconds."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def unpack(packed: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(packed).read_all()


class Replica:
    """A model's process. Once the model has failed as a whole, Serve's health check ends it and starts another."""

    failed: str = ""

    def check_health(self) -> None:
        if self.failed:
            raise ModelDied(self.failed)

    async def ready(self) -> None:
        """Raises ModelDied."""
        self.check_health()


class YoloReplica(Replica):
    """A YOLO. arguments: of its class."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from shardsight.models.yolo.model import Yolo

        self.model, self.lock = Yolo(**arguments), threading.Lock()
        self.sizes = metrics.Histogram("shardsight_yolo_batch", "Pictures of a batch", BATCHES)
        self.seconds = metrics.Histogram("shardsight_yolo_seconds", "The model's time for a batch", SECONDS)
        if self.model.compiles:
            _ = self.model.compiled  # made on first use, which is to be now

    async def __call__(self, packed: pa.Buffer, thresholds: list[Thresholds]) -> pa.Buffer:
        """A packed load.TABLE and the thresholds of each row → the same without frames, with `detections`, `classes` or
        `error`. Raises ModelDied."""
        self.check_health()
        try:
            return await asyncio.to_thread(self.compute, packed, thresholds)
        except ModelDied as error:
            self.failed = str(error)
            raise

    def compute(self, packed: pa.Buffer, thresholds: list[Thresholds]) -> pa.Buffer:
        started, table = time.perf_counter(), unpack(packed)
        groups: dict[Thresholds, list[int]] = defaultdict(list)
        for index, each in enumerate(thresholds):
            groups[each].append(index)
        found: list[pa.Table] = []
        with self.lock:
            for each, indices in groups.items():
                self.model.set_thresholds(*each)
                found.append(self.model(table if len(groups) == 1 else table.take(indices)))
        order = np.argsort([index for indices in groups.values() for index in indices])
        self.sizes.observe(len(table))
        self.seconds.observe(time.perf_counter() - started)
        return pack(without_frames(pa.concat_tables(found)).take(order))


class PaliGemmaReplica(Replica):
    """A PaliGemma, whose engine adds each request to the batch that it is computing. arguments: of its class."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from shardsight.models.paligemma.model import PaliGemma

        self.model = PaliGemma(**arguments)
        self.tokens = metrics.Counter("shardsight_paligemma_tokens", "Tokens of answers")

    async def annotate(self, packed: pa.Buffer, prompts: list[str], regions: bool, max_tokens: int) -> pa.Buffer:
        """A packed load.TABLE of one row → the same without frames, with `answers`, its detections' `text`, or `error`.
        Raises ModelDied."""
        table = unpack(packed)
        asked = self.model.ask_about(table, [Prompt.of(text) for text in prompts], regions, max_tokens)
        waiting = [asyncio.wrap_future(future) for *_, future in asked.questions]
        try:
            await asyncio.gather(*waiting, return_exceptions=True)
            if tokens := sum(len(one.result().ids) for one in waiting if not one.exception()):
                self.tokens.inc(tokens)
            return pack(without_frames(self.model.answered(asked)))
        except ModelDied as error:
            self.failed = str(error)
            raise
        finally:
            asked.cancel()

    async def generate(
        self, frame: np.ndarray, text: str, sampling: Sampling, stream: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """What there is of one answer, after each token with `stream`, or at its end: `text`, and of all tokens so far
        `tokens` and `logprobs`. Raises ModelDied, Failure."""
        loop, generated = asyncio.get_running_loop(), asyncio.Queue[Any]()
        prompt, reader = Prompt.of(text), self.model.reader

        def put(one: Any) -> None:
            loop.call_soon_threadsafe(generated.put_nowait, one)

        future = self.model.ask(
            frame,
            prompt,
            sampling.max_tokens,
            sampling.temperature,
            put if stream else None,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
        )
        future.add_done_callback(lambda _: put(None))
        tokens: list[str] = []

        def part(one: Any) -> dict[str, Any]:
            tokens.extend(reader.vocabulary.decode([token]) for token in one.ids[len(tokens) :])
            so_far = {"text": reader.text(one), "tokens": tokens[: len(one.ids)], "logprobs": one.logprobs}
            return so_far | {"finish_reason": None}

        try:
            while (one := await generated.get()) is not None:
                yield part(one)
            whole = future.result()
            self.tokens.inc(len(whole.ids))
            used = self.model.info.image_tokens + 1 + len(self.model.encode(prompt.text))
            yield part(whole) | {"finish_reason": whole.finish_reason, "prompt_tokens": used}
        except ModelDied as error:
            self.failed = str(error)
            raise
        finally:
            future.cancel()


class Gateway:
    """What the routes are made of: rows, frames, answers and readiness.

    handles: of the models' deployments, by their names in the lineup. keys: digests of those that may ask.
    """

    def __init__(
        self, arguments: Arguments, models: Lineup, keys: list[bytes], handles: dict[str, DeploymentHandle]
    ) -> None:
        self.arguments, self.models, self.keys, self.handles = arguments, models, keys, handles
        self.pictures = Pictures(arguments, Storage(arguments.storage, retry_seconds=arguments.deadline / 4))
        self.probes: dict[str, asyncio.Task[bool]] = {}

    async def ready(self, *names: str) -> bool:
        """Whether replicas of these models answer; of all models by default."""
        return all(await asyncio.gather(*map(self._ready, names or self.models)))

    async def _ready(self, name: str) -> bool:
        """One question at a time, however many ask: without a replica, questions wait where requests wait."""
        if name not in self.probes or self.probes[name].done():
            self.probes[name] = asyncio.create_task(self._probe(name))
        return await asyncio.shield(self.probes[name])

    async def _probe(self, name: str) -> bool:
        response = self.handles[name].ready.remote()
        try:
            await asyncio.wait_for(response, READY_SECONDS)
        except BackPressureError:
            return True  # it has enough to do
        except Exception as error:
            logging.getLogger("shardsight").info("%s is not ready: %r", name, error)
            response.cancel()
            return False
        return True

    async def generate(
        self, name: str, frame: np.ndarray, text: str, sampling: Sampling, stream: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """As PaliGemmaReplica.generate. Raises Problem."""
        response = self.handles[name].options(stream=True).generate.remote(frame, text, sampling, stream)
        try:
            async for part in response:
                yield part
        except _KNOWN as error:
            raise _problem(error) from None
        finally:
            response.cancel()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0, max_concurrent_batches=2)
    async def detect(self, rows: list[dict[str, Any]], thresholds: list[Thresholds]) -> list[dict[str, Any]]:
        """As YoloReplica, of several requests in one call: what comes during two calls is the next. Raises Problem.

        Together here, since a call from process to process takes as long as the model does.
        """
        asked = pack(Load.table(rows))
        found = unpack(await _result(self.handles["yolo"].remote(asked, thresholds)))
        return [row | one for row, one in zip(rows, found.to_pylist(), strict=True)]

    async def row(self, name: str, data: bytes, options: Options) -> dict[str, Any]:
        """The row of the contract. Raises Problem, with the row in it where its `error` says what is wrong."""
        models = self._asked(options)
        row = await self.pictures.row(name, data, models, options.on)
        prompts = options.prompt or ["caption en"]
        classes = None if options.classes is None else tuple(options.classes)
        for model in models:
            if model == "yolo":
                row = await self.detect(row, (options.conf, options.iou, options.max_det, classes))
            else:
                asked = pack(Load.table([row])), prompts, options.on == "regions", options.max_tokens
                (answered,) = unpack(await _result(self.handles[model].annotate.remote(*asked))).to_pylist()
                row |= answered
            row = without_error(row)
        return public(row)

    def _asked(self, options: Options) -> Lineup:
        """The models that these options ask for. Raises Problem."""
        asks = bool(options.prompt) or options.on == "regions"
        models = {name: model for name, model in self.models.items() if asks or name == "yolo"}
        if asks and list(models) == ["yolo"]:
            raise Problem(422, "prompt: this server has no PaliGemma to ask")
        if not models:
            raise Problem(422, "prompt: this server has PaliGemma alone, which has to be asked something")
        if options.on == "regions" and ("yolo" not in models or len(options.prompt) > 1):
            raise Problem(422, "on: regions takes one prompt, and a server with both models")
        return models


_KNOWN = (BackPressureError, RayActorError, DeploymentUnavailableError, ModelDied, Failure)


async def _result(response: Any) -> Any:
    """A replica's result. Nobody waiting any more, it need not be computed. Raises Problem."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except _KNOWN as error:
        raise _problem(error) from None


def _problem(error: Exception) -> Problem:
    if isinstance(error, BackPressureError):
        return Problem(429, "the model has more to do than it can: try again later", after=1)
    if isinstance(error, Failure):
        return Problem(422, error.message)
    return Problem(503, "the model has just failed, and is started anew: try again", after=5)
