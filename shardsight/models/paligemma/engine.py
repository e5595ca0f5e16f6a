"""PaliGemma in vLLM: frames and prompts → answers, with one engine that many calls keep busy together."""

import os

# The engine in this process: our prompts' lengths reach it, and it starts in a fifth of the time.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import functools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from transformers import AutoTokenizer
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from shardsight.models.info import ModelDied, ModelError, computes_bf16
from shardsight.models.paligemma.info import fits, inspect, shapes
from shardsight.models.paligemma.masks import MaskDecoder, paste
from shardsight.models.paligemma.plugin import loaded
from shardsight.models.paligemma.prompts import Found, Prompt, Vocabulary, decode_box, find
from shardsight.models.paligemma.routing import Route
from shardsight.row import ANSWER, DETECTION, ERROR, Failure, frames_of, with_column, without_frames

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BLOCK = 128  # tokens of vLLM's smallest piece of a request's memory, on a CPU
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA, that vLLM has kernels for


@dataclass(frozen=True)
class Generated:
    """One answer as it came: token ids, an end included, their log-probabilities, and `stop` or `length`."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class _Request:
    frame: np.ndarray
    ids: list[int]
    future: "Future[Generated]"
    params: SamplingParams
    hear: Callable[[Generated], None] | None


@dataclass(frozen=True)
class Asked:
    """What a table's pictures are being asked: (row, its region, prompt, answer to come). since: clock, CPU."""

    table: pa.Table
    answers: list[list[dict[str, Any]] | None]
    detections: list[list[dict[str, Any]] | None]
    questions: list[tuple[int, dict[str, Any] | None, Prompt, "Future[Generated]"]]
    since: tuple[float, float]

    def cancel(self) -> None:
        """Nobody waits for it any more: the engine forgets what is not answered yet."""
        for *_, future in self.questions:
            future.cancel()


class PaliGemma:
    """One PaliGemma 1 or 2. Calls from several threads share its batches.

    model: a folder, or a name on the hub, of `revision`. prompts: asked of each picture; with `regions`, of the crop of
    each of its detections. route: which of them this model is asked about; all by default. keep_frames: another model
    comes after. max_tokens: of an answer. precision: auto, fp32, bf16 or fp16. adapter: folder of a LoRA, as
    peft saves it. devices: that share the model. batch_size: most requests that run at once. memory: share of a GPU's
    memory to take. threads: of the CPU. prompt_tokens: most of a prompt. Raises ModelError, PromptError.
    """

    def __init__(
        self,
        model: str,
        prompts: Sequence[str] = ("caption en",),
        regions: bool = False,
        route: Route | None = None,
        keep_frames: bool = True,
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
        self.regions, self.route, self.keep_frames = regions, route, keep_frames
        self.prompts = [Prompt.of(prompt) for prompt in prompts]
        self.info = inspect(model, revision)
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what it has was fetched just now
        self.max_tokens, self.devices, self.memory = max_tokens, devices, memory
        self.cuda = torch.cuda.is_available()
        self.precision = _precision(self.cuda) if precision == "auto" else precision
        self.batch_size = batch_size or (256 if self.cuda else 32)
        self.threads = threads or os.cpu_count() or 1
        # Start token and newline are the prompt's too.
        self.length = min(self.info.image_tokens + prompt_tokens + 2 + max_tokens, self.info.length)
        self.room = self.length - self.info.image_tokens - 1 - max_tokens  # for a prompt and its newline
        if self.room < 2:
            raise ModelError(
                f"{model} takes {self.info.length} tokens, {self.info.image_tokens} of them a picture's, which leaves "
                f"no room for a prompt and {max_tokens} of an answer: ask for fewer, or take a lower resolution"
            )
        self.adapter = _adapter(adapter) if adapter else None
        fits(self.info, self.precision, self._free(), self.length, devices)
        self.tokenizer = AutoTokenizer.from_pretrained(self.info.path)
        self.vocabulary = _vocabulary(self.tokenizer)
        self.masks = _masks(self.info.path)
        self.encode = functools.lru_cache(4096)(self._encode)
        self.waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        # OpenMP's threads belong to the thread that started them: the one that loads is the one that computes.
        self.thread = threading.Thread(target=self._run, args=(ready,), name="paligemma", daemon=True)
        self.thread.start()
        ready.result()

    def close(self) -> None:
        """Let the engine finish what it has, and free its memory."""
        self.waiting.put(None)
        self.thread.join()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with FRAME columns → the same, with `answers`, or with `error`, and without frames unless they are kept.

        With `regions`, frames are whole pictures, and each detection gets its `text` instead. Raises ModelDied.
        """
        return self.answered(self.ask_about(table, self.prompts, self.regions))

    def ask_about(
        self, table: pa.Table, prompts: Sequence[Prompt], regions: bool = False, max_tokens: int | None = None
    ) -> Asked:
        """Submit the prompts about each picture of a table, or, with `regions`, about each of its detections."""
        since = time.perf_counter(), time.process_time()
        detections = table["detections"].to_pylist()
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        asked = Asked(table, table["answers"].to_pylist(), detections, [], since)
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
                answer = self.answer(prompt, future.result(), widths[index], heights[index])
            except ModelDied:
                raise
            except Exception as error:
                failed[index], answers[index] = Failure.of(error).row("paligemma"), None
                continue
            if region is not None:
                region["text"] = answer["text"]
            elif (row := answers[index]) is not None:
                row.append(answer)
        rows = {index for index, *_ in asked.questions}
        clock, cpu = time.perf_counter() - asked.since[0], time.process_time() - asked.since[1]
        spent = clock / max(1, len(rows)), cpu / max(1, len(rows))
        table = table if self.keep_frames else without_frames(table)
        table = with_column(table, "answers", pa.array(answers, pa.list_(ANSWER)))
        table = with_column(table, "detections", pa.array(detections, pa.list_(DETECTION)))
        table = with_column(table, "error", pa.array(failed, ERROR))
        for column, seconds in zip(("paligemma_clock_seconds", "paligemma_cpu_seconds"), spent, strict=True):
            before = table[column].to_pylist()  # of another resolution
            done = [seconds if index in rows and not failed[index] else before[index] for index in range(len(table))]
            table = with_column(table, column, pa.array(done, pa.float64()))
        return table

    def ask(
        self,
        frame: np.ndarray,
        prompt: Prompt,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        hear: Callable[[Generated], None] | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> "Future[Generated]":
        """Submit an RGB uint8 frame (h, w, 3) and a prompt. The future raises Failure, or ModelDied; cancelled, it
        costs no more work.

        max_tokens: fewer than the model's own. temperature: 0 takes the likeliest token. hear: is told, in the engine's
        thread, what there is of the answer after each token.
        """
        future: Future[Generated] = Future()
        kind = RequestOutputKind.CUMULATIVE if hear else RequestOutputKind.FINAL_ONLY
        most = min(max_tokens or self.max_tokens, self.max_tokens)
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=most,
            logprobs=0,
            detokenize=False,
            output_kind=kind,
        )
        try:
            ids = self.encode(prompt.text)
            self.waiting.put(_Request(frame, ids, future, params, hear))
            if not self.thread.is_alive():
                self._refuse(ModelDied("the engine has ended"))
        except Failure as failure:
            future.set_exception(failure)
        return future

    def answer(self, prompt: Prompt, generated: Generated, width: int, height: int) -> dict[str, Any]:
        """A row of ANSWER, of a picture of width × height pixels."""
        ids, logprobs = generated.ids, generated.logprobs
        return {
            "prompt": prompt.text,
            "text": self.vocabulary.decode(ids).strip(),
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

    def _encode(self, text: str) -> list[int]:
        """As Hugging Face's processor does, but for picture and start token, which vLLM puts before."""
        ids: list[int] = self.tokenizer.encode(text + "\n", add_special_tokens=False)
        if len(ids) > self.room:
            raise Failure("PromptTooLong", f"the prompt takes {len(ids)} tokens, and there is room for {self.room}")
        return ids

    def _free(self) -> int:
        """Bytes that a device has for the model."""
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            return int(min(free, total * self.memory))
        # The processes of several devices are all on this machine.
        return int(psutil.virtual_memory().available / self.devices)

    def _load(self) -> LLMEngine:
        torch.set_num_threads(self.threads)
        if not loaded():
            raise ModelError(
                "vLLM did not load shardsight's plugin, without which PaliGemma gives wrong answers: install the "
                "package (pip install -e .), and let VLLM_PLUGINS, where it is set, name shardsight"
            )
        arguments: dict[str, Any] = {}
        if self.adapter:
            rank, everywhere = self.adapter[1:]
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            arguments |= {"enable_tower_connector_lora": everywhere}
        if not self.cuda:
            # Room for all that run at once, as far as memory goes: beyond it, requests are computed again.
            token = self.info.kv_values * (4 if self.precision == "fp32" else 2) // self.devices
            one = (math.ceil(self.length / BLOCK) + 1) * BLOCK * token
            rest = self._free() - self.info.parameters * (4 if self.precision == "fp32" else 2)
            arguments["kv_cache_memory_bytes"] = max(one, min(self.batch_size * one, rest // 2))
            arguments["enforce_eager"] = True  # compiling takes a C++ compiler, and minutes
        try:
            return LLMEngine.from_engine_args(
                EngineArgs(
                    model=self.info.path,
                    dtype=DTYPES[self.precision],  # type: ignore[arg-type]
                    max_model_len=self.length,
                    max_num_seqs=self.batch_size,
                    max_num_batched_tokens=max(self.length, 8192 if self.cuda else 2048),
                    enable_chunked_prefill=False,
                    enable_prefix_caching=False,
                    gpu_memory_utilization=self.memory,
                    mm_processor_cache_gb=0.25,
                    tensor_parallel_size=self.devices,
                    distributed_executor_backend="mp" if self.devices > 1 else "uni",
                    disable_log_stats=True,
                    **arguments,
                )
            )
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{self.info.path} cannot be loaded: {first}") from error

    def _run(self, ready: "Future[None]") -> None:
        try:
            engine = self._load()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            self._serve(engine)
            self._refuse(ModelDied("the engine was closed"))
        except ModelDied as error:
            self._refuse(error)

    def _serve(self, engine: LLMEngine) -> None:
        """Compute what is asked until None is. A picture is prepared while others still wait for their turn."""
        live: dict[str, _Request] = {}
        adapter = LoRARequest("adapter", 1, self.adapter[0]) if self.adapter else None
        number, open_ = 0, True
        try:
            while open_ or live:
                while open_ and len(live) < 2 * self.batch_size:
                    try:
                        request = self.waiting.get(block=not live)
                    except queue.Empty:
                        break
                    if request is None:
                        open_ = False
                        break
                    if request.future.cancelled():
                        continue
                    number += 1
                    picture = {"image": Image.fromarray(request.frame)}
                    prompt: Any = {"prompt_token_ids": list(request.ids), "multi_modal_data": picture}
                    try:
                        engine.add_request(str(number), prompt, request.params, lora_request=adapter)
                        live[str(number)] = request
                    except Exception as error:  # this request's own
                        _settle(request, Failure.of(error))
                if gone := [name for name, request in live.items() if request.future.cancelled()]:
                    engine.abort_request(gone)
                    for name in gone:
                        del live[name]
                outputs: Any = engine.step() if live else ()
                for output in outputs:
                    generated, request = _generated(output.outputs[0]), live[output.request_id]
                    if request.hear:
                        request.hear(generated)
                    if output.finished:
                        _settle(live.pop(output.request_id), generated)
        except Exception as error:
            died = ModelDied(f"the engine failed: {type(error).__name__}: {error}")
            for request in live.values():
                _settle(request, died)
            raise died from error

    def _refuse(self, error: ModelDied) -> None:
        while True:
            try:
                request = self.waiting.get(block=False)
            except queue.Empty:
                return
            if request is not None:
                _settle(request, error)


def _settle(request: _Request, outcome: Generated | Exception) -> None:
    if not request.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        request.future.set_exception(outcome)
    else:
        request.future.set_result(outcome)


def _generated(output: Any) -> Generated:
    ids = list(output.token_ids)
    logprobs = [each[token].logprob for each, token in zip(output.logprobs, ids, strict=True)]
    return Generated(ids, logprobs, str(output.finish_reason))


def _crop(frame: np.ndarray, box: dict[str, Any]) -> np.ndarray:
    """What of a whole picture, (h, w, 3), a detection touches, of one pixel at least."""
    x1, y1 = max(0, math.floor(box["x1"])), max(0, math.floor(box["y1"]))
    x1, y1 = min(x1, frame.shape[1] - 1), min(y1, frame.shape[0] - 1)
    return frame[y1 : max(y1 + 1, math.ceil(box["y2"])), x1 : max(x1 + 1, math.ceil(box["x2"]))]


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


def _masks(folder: str) -> MaskDecoder | None:
    """The decoder of `<seg>` codes, where the model's folder holds its weights."""
    path = Path(folder) / "vae-oid.npz"
    return MaskDecoder.load(path) if path.exists() else None


def _adapter(folder: str) -> tuple[str, int, bool]:
    """(folder, rank that vLLM has room for, whether it reaches beyond the language model)."""
    path = Path(folder)
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        names = list(shapes(path / "adapter_model.safetensors"))
        rank = next(rank for rank in RANKS if rank >= int(config["r"]))
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise ModelError(
            f"{folder} is no LoRA adapter: expected adapter_config.json with r up to {RANKS[-1]} and "
            f"adapter_model.safetensors ({type(error).__name__}: {error})"
        ) from error
    if config.get("modules_to_save"):
        raise ModelError(
            f"{folder} replaces whole modules ({config['modules_to_save']}): merge it into the model first"
        )
    return str(path.resolve()), rank, any("vision_tower" in name or "multi_modal_projector" in name for name in names)


def _precision(cuda: bool) -> str:
    """fp16 on CUDA, bf16 on a CPU that computes in it, else fp32."""
    return "fp16" if cuda else "bf16" if computes_bf16() else "fp32"
