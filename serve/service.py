"""The deployments: Gateway, which checks, reads and decodes requests, and the replicas of the models that it calls."""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from serve.arguments import Arguments, Options, VideoOptions
from serve.pictures import STATUS, Pictures, public, without_error
from serve.problem import Problem
from serve.videos import TABLE_BYTES, Video, read
from shardsight.decode.frames import Load
from shardsight.models import selection
from shardsight.models.info import ModelDied
from shardsight.models.paligemma.answers import Generated
from shardsight.models.paligemma.prompts import Prompt, Sampling
from shardsight.models.selection import ModelInfos
from shardsight.models.yolo.info import YoloInfo
from shardsight.models.yolo.trackers import tracker_settings
from shardsight.row import Failure, without_frames
from shardsight.storage import Storage

# (conf, iou, max_det, classes), as in ultralytics.
Thresholds = tuple[float, float, int, tuple[int, ...] | None]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
READY_SECONDS = 2.0  # a replica that answers later is not ready


def pack(table: pa.Table) -> pa.Buffer:
    """As one Arrow stream, since Ray's own pickling of a table with so many columns takes milliseconds."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def unpack(packed: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(packed).read_all()


class Replica:
    """A model in a process of its own. Once the whole model has failed, Serve's health check replaces the process."""

    failed: str = ""

    def check_health(self) -> None:
        if self.failed:
            raise ModelDied(self.failed)

    async def ready(self) -> None:
        """Raises ModelDied."""
        self.check_health()

    @contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Raises ModelDied, also where an earlier call has."""
        self.check_health()
        try:
            yield
        except ModelDied as error:
            self.failed = str(error)
            raise


class YoloReplica(Replica):
    """arguments: of Yolo."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from shardsight.models.yolo.model import Yolo

        self.model, self.lock = Yolo(**arguments), threading.Lock()
        self.sizes = metrics.Histogram("shardsight_yolo_batch", "Pictures of a batch", BATCHES)
        self.seconds = metrics.Histogram("shardsight_yolo_seconds", "The model's time for a batch", SECONDS)
        if self.model.compiles:
            _ = self.model.compiled.alone, self.model.compiled.together  # else compiled for the first requests

    async def __call__(self, packed: pa.Buffer, thresholds: list[Thresholds]) -> pa.Buffer:
        """A packed table of Load and the thresholds of each row → the same without frames, with `detections`,
        `classes` or `error`. Raises ModelDied."""
        with self.noting_failure():
            return await asyncio.to_thread(self.compute, packed, thresholds)

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

    async def video(
        self, video: Video, thresholds: Thresholds, tracker: tuple[str, dict[str, Any]] | None, frames: bool
    ) -> AsyncIterator[pa.Buffer]:
        """A video → packed tables of its rows in order with `detections`, `classes` or `error`. tracker: name and
        settings. frames: keep them, for the next model. Raises ModelDied, Failure."""
        with self.noting_failure():
            tracking = await asyncio.to_thread(self.tracker, *tracker) if tracker else None
            async with aclosing(read(video)) as tables:
                async for table in tables:
                    found = await asyncio.to_thread(self.follow, table, thresholds, tracking)
                    yield pack(found if frames else without_frames(found))

    def tracker(self, name: str, config: dict[str, Any]) -> Any:
        """See Yolo. Not in the event loop, which health checks need, as it waits for what is being computed."""
        with self.lock:
            return self.model.tracker(name, config)

    def follow(self, table: pa.Table, thresholds: Thresholds, tracking: Any) -> pa.Table:
        """The next table of a video. Raises ModelDied."""
        with self.lock:
            self.model.set_thresholds(*thresholds)
            self.model.set_tracking(tracking)
            try:
                return self.model(table)
            finally:
                self.model.set_tracking(None)


class PaliGemmaReplica(Replica):
    """arguments: of PaliGemma, whose engine adds each request to the batch that it is computing."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from shardsight.models.paligemma.model import PaliGemma

        self.model = PaliGemma(**arguments)
        self.tokens = metrics.Counter("shardsight_paligemma_tokens", "Tokens of answers")

    async def annotate(self, packed: pa.Buffer, prompts: list[str], regions: bool, max_tokens: int) -> pa.Buffer:
        """A packed table of Load → the same without frames, with `answers`, its detections' `text`, or
        `error`. Raises ModelDied."""
        with self.noting_failure():
            asked = self.model.ask_about(unpack(packed), [Prompt.of(text) for text in prompts], regions, max_tokens)
            waiting = [asyncio.wrap_future(future) for *_, future in asked.questions]
            try:
                await asyncio.gather(*waiting, return_exceptions=True)
                if tokens := sum(len(one.result().ids) for one in waiting if not one.exception()):
                    self.tokens.inc(tokens)
                return pack(without_frames(self.model.answered(asked)))
            finally:
                for one in waiting:
                    one.cancel()

    async def whole(self, frame: np.ndarray, text: str, sampling: Sampling) -> dict[str, Any]:
        """What `generate` ends with; a call whose result is no stream takes Serve less time. Raises ModelDied,
        Failure."""
        prompt = Prompt.of(text)
        with self.noting_failure():
            return self._end(await asyncio.wrap_future(self.model.ask(frame, prompt, sampling)), prompt, [])

    async def generate(self, frame: np.ndarray, text: str, sampling: Sampling) -> AsyncIterator[dict[str, Any]]:
        """The answer so far, after each token and at its end: `text`, `tokens`, `logprobs` and `finish_reason`; at the
        end also `prompt_tokens`. Raises ModelDied, Failure."""
        loop, generated = asyncio.get_running_loop(), asyncio.Queue[Any]()
        prompt, tokens = Prompt.of(text), list[str]()

        def put(one: Any) -> None:
            loop.call_soon_threadsafe(generated.put_nowait, one)

        with self.noting_failure():
            future = self.model.ask(frame, prompt, sampling, put)
            future.add_done_callback(lambda _: put(None))
            try:
                while (one := await generated.get()) is not None:
                    yield self._part(one, tokens)
                yield self._end(future.result(), prompt, tokens)
            finally:
                future.cancel()

    def _part(self, one: Generated, tokens: list[str]) -> dict[str, Any]:
        """tokens: as text, of the parts before; it gains the new ones."""
        reader = self.model.reader
        tokens.extend(reader.vocabulary.decode([token]) for token in one.ids[len(tokens) :])
        so_far = {"text": reader.text(one), "tokens": tokens[: len(one.ids)], "logprobs": one.logprobs}
        return so_far | {"finish_reason": None}

    def _end(self, whole: Generated, prompt: Prompt, tokens: list[str]) -> dict[str, Any]:
        self.tokens.inc(len(whole.ids))
        used = self.model.info.image_tokens + 1 + len(self.model.encode(prompt.text))
        return self._part(whole, tokens) | {"finish_reason": whole.finish_reason, "prompt_tokens": used}


class Gateway:
    """What the routes call. handles: of the models' deployments, by the models' names. keys: digests."""

    def __init__(
        self, arguments: Arguments, models: ModelInfos, keys: list[bytes], handles: dict[str, DeploymentHandle]
    ) -> None:
        self.arguments, self.models, self.keys, self.handles = arguments, models, keys, handles
        self.pictures = Pictures(arguments, Storage(arguments.storage, retry_seconds=arguments.deadline / 4))
        self.probes: dict[str, asyncio.Task[bool]] = {}
        self.videos = 0  # that are processed

    async def ready(self, *names: str) -> bool:
        """Whether replicas of these models answer; of all models by default."""
        return all(await asyncio.gather(*map(self._ready, names or self.models)))

    async def _ready(self, name: str) -> bool:
        """One probe at a time, shared by all that ask: without a replica, probes would fill the queue of requests."""
        if name not in self.probes or self.probes[name].done():
            self.probes[name] = asyncio.create_task(self._probe(name))
        return await asyncio.shield(self.probes[name])

    async def _probe(self, name: str) -> bool:
        response = self.handles[name].ready.remote()
        try:
            await asyncio.wait_for(response, READY_SECONDS)
        except BackPressureError:
            return True  # busy
        except Exception as error:
            logging.getLogger("shardsight").info("%s is not ready: %r", name, error)
            response.cancel()
            return False
        return True

    async def whole(self, name: str, frame: np.ndarray, text: str, sampling: Sampling) -> dict[str, Any]:
        """As PaliGemmaReplica.whole. Raises Problem."""
        found: dict[str, Any] = await _result(self.handles[name].whole.remote(frame, text, sampling))
        return found

    async def generate(
        self, name: str, frame: np.ndarray, text: str, sampling: Sampling
    ) -> AsyncIterator[dict[str, Any]]:
        """As PaliGemmaReplica.generate. Raises Problem."""
        response = self.handles[name].options(stream=True).generate.remote(frame, text, sampling)
        try:
            with _failures_as_problems():
                async for part in response:
                    yield part
        finally:
            response.cancel()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0, max_concurrent_batches=2)
    async def detect(self, rows: list[dict[str, Any]], thresholds: list[Thresholds]) -> list[dict[str, Any]]:
        """YoloReplica for several requests in one call: those that arrive during two calls are the next one's.

        Batched here, since a call between processes takes as long as the model does. Raises Problem.
        """
        asked = pack(Load.table(rows))
        found = unpack(await _result(self.handles["yolo"].remote(asked, thresholds)))
        return [row | one for row, one in zip(rows, found.to_pylist(), strict=True)]

    async def row(self, name: str, data: bytes, options: Options) -> dict[str, Any]:
        """The public row. Raises Problem, with the row in it where it has an `error`."""
        models = self._selected(options)
        row = await self.pictures.row(name, data, models, options.on)
        for model in models:
            if model == "yolo":
                row = await self.detect(row, options.thresholds)
            else:
                (row,) = await self._answered(model, [row], options)
            row = without_error(row)
        return public(row)

    async def rows(self, name: str, data: bytes, options: VideoOptions) -> list[dict[str, Any]]:
        """The public rows of a video's frames, in order. Raises Problem, with all rows in it where one has an
        `error`."""
        models = self._selected(options)
        if self.videos >= self.arguments.max_videos:
            raise Problem(429, f"{self.videos} videos are being processed already: try again later", retry_after=5)
        self.videos += 1
        found: list[dict[str, Any]] = []
        try:
            with _failures_as_problems():
                async with aclosing(self._detected(self._video(name, data, models, options), models, options)) as parts:
                    async for table in parts:
                        rows = table.to_pylist()
                        for model in (name for name in models if name != "yolo"):
                            rows = await self._answered(model, rows, options)
                        found += map(public, rows)
        finally:
            self.videos -= 1
        for error in filter(None, (row["error"] for row in found)):
            raise Problem(STATUS.get(error["type"], 422), error["message"], rows=found)
        return found

    def _video(self, name: str, data: bytes, models: ModelInfos, options: VideoOptions) -> Video:
        """A video as the job decodes it for these models."""
        asked = options.model_dump(include={"on", "fps", "every", "keyframes", "track"})
        asked |= {"clip_frames": None, "track_config": self._track_config(options)}
        load = selection.loader(models, self.arguments.model_copy(update=asked), self.pictures.storage)
        limits = self.arguments.max_video_seconds, self.arguments.max_frames, self.arguments.max_pixels
        return Video(name, data, replace(load, size=TABLE_BYTES), *limits)

    def _track_config(self, options: VideoOptions) -> str | dict[str, Any] | None:
        """The settings of the server's own tracker, if that is the one."""
        return self.arguments.track_config if options.track == self.arguments.track else None

    async def _detected(
        self, video: Video, models: ModelInfos, options: VideoOptions
    ) -> AsyncGenerator[pa.Table, None]:
        """Tables of a video's rows, by one replica of YOLO, as its tracker must see all frames. Raises as a replica."""
        if "yolo" not in models:
            async with aclosing(read(video)) as tables:
                async for table in tables:
                    yield table
            return
        config = self._track_config(options)
        tracker = (options.track, tracker_settings(options.track, config)) if options.track else None
        replica = self.handles["yolo"].options(stream=True)
        response = replica.video.remote(video, options.thresholds, tracker, len(models) > 1)
        try:
            async for packed in response:
                yield unpack(packed)
        finally:
            response.cancel()

    async def _answered(self, model: str, rows: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
        """Rows of Load with the answers of a PaliGemma. Raises Problem."""
        prompts = options.prompt or ["caption en"]
        asked = pack(Load.table(rows)), prompts, options.on == "regions", options.max_tokens
        answered = unpack(await _result(self.handles[model].annotate.remote(*asked))).to_pylist()
        return [row | one for row, one in zip(rows, answered, strict=True)]

    def _selected(self, options: Options) -> ModelInfos:
        """The models that these options ask for. Raises Problem."""
        asks = bool(options.prompt) or options.on == "regions"
        models = {name: model for name, model in self.models.items() if asks or name == "yolo"}
        if asks and list(models) == ["yolo"]:
            raise Problem(422, "prompt: this server has no PaliGemma to ask")
        if not models:
            raise Problem(422, "prompt: missing, and this server has only PaliGemma: give one, as caption en")
        if options.on == "regions" and ("yolo" not in models or len(options.prompt) > 1):
            raise Problem(422, "on: regions takes one prompt, and a server with both models")
        if isinstance(options, VideoOptions) and options.track:
            yolo = models.get("yolo")
            if not isinstance(yolo, YoloInfo) or yolo.task == "classify":
                raise Problem(422, "track: this server has no YOLO that finds boxes, which a tracker follows")
        return models


@contextmanager
def _failures_as_problems() -> Iterator[None]:
    """Raises Problem for what a call of a replica may raise."""
    try:
        yield
    except BackPressureError:
        raise Problem(429, "the model's queue is full: try again later", retry_after=1) from None
    except Failure as error:
        raise Problem(STATUS.get(error.type, 422), error.message) from None
    except (RayActorError, DeploymentUnavailableError, ModelDied):
        raise Problem(503, "the model has failed and is being restarted: try again", retry_after=5) from None


async def _result(response: Any) -> Any:
    """A replica's result; cancelled with the caller. Raises Problem."""
    try:
        with _failures_as_problems():
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
