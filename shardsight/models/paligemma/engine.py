"""vLLM's engine in a thread of its own: requests of many callers → their answers, batched together."""

import itertools
import math
import queue
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import multiproc_executor, uniproc_executor

from shardsight.models.info import ModelDied, ModelError
from shardsight.models.paligemma.answers import Generated
from shardsight.models.paligemma.info import BYTES, PaliGemmaInfo, fits
from shardsight.models.paligemma.plugin import loaded
from shardsight.models.paligemma.prompts import Sampling
from shardsight.row import Failure

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BLOCK = 128  # tokens in a block of vLLM's KV cache on a CPU


@dataclass(frozen=True)
class Request:
    """frames: RGB uint8 (h, w, 3), one picture or several. ids: of the prompt, without pictures and start token.
    listener: called with the answer so far after each token, in the engine's thread. cut: may end an answer before vLLM
    does, by setting its finish_reason."""

    frames: np.ndarray | Sequence[np.ndarray]
    ids: list[int]
    sampling: Sampling
    listener: Callable[[Generated], None] | None = None
    cut: Callable[[Generated], Generated] | None = None
    future: "Future[Generated]" = field(default_factory=Future)

    def params(self) -> SamplingParams:
        each, sampling = self.listener or self.cut, self.sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=max(sampling.top_p, 1e-9),  # vLLM refuses 0, which OpenAI allows
            seed=None if sampling.seed is None else sampling.seed % 2**63,  # vLLM takes -1 for None
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if each else RequestOutputKind.FINAL_ONLY,
        )

    def settle(self, outcome: Generated | Exception) -> None:
        """Set the future, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


@dataclass(frozen=True)
class Limits:
    """precision: fp32, bf16 or fp16. length: tokens of a request, at most. batch_size: requests that run at once.

    devices: that share the model. memory: fraction of a GPU's memory to use. threads: of the CPU. pictures: of a
    request, at most.
    """

    precision: str
    length: int
    batch_size: int
    devices: int
    memory: float
    threads: int
    pictures: int = 1

    def free(self) -> int:
        """Bytes free for the model on a device."""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return int(min(free, total * self.memory))
        # The processes of several devices are all on this machine.
        return int(psutil.virtual_memory().available / self.devices)


class Engine:
    """One model in vLLM. Raises ModelError."""

    def __init__(self, info: PaliGemmaInfo, limits: Limits) -> None:
        self.info, self.limits = info, limits
        fits(info, limits.precision, limits.free(), limits.length, limits.devices)
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.live: dict[str, Request] = {}  # those in vLLM, by its names
        ready: Future[None] = Future()
        # OpenMP's threads belong to the thread that started them: the one that loads is the one that computes.
        self.thread = threading.Thread(target=self._run, args=(ready,), name="paligemma", daemon=True)
        self.thread.start()
        ready.result()

    def submit(self, request: Request) -> "Future[Generated]":
        """A future of the answer, which raises Failure or ModelDied; cancelling it stops the work."""
        self.waiting.put(request)
        if not self.thread.is_alive():
            self._refuse(ModelDied("the engine has ended"))
        return request.future

    def close(self) -> None:
        """Finish all requests, then free the memory."""
        self.waiting.put(None)
        self.thread.join()

    def _run(self, ready: "Future[None]") -> None:
        try:
            engine = load(self.info, self.limits)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        ended = ModelDied("the engine was closed")
        try:
            self._serve(engine)
        except Exception as error:
            ended = ModelDied(f"the engine failed: {type(error).__name__}: {error}")
            ended.__cause__ = error
        self._refuse(ended)

    def _serve(self, engine: LLMEngine) -> None:
        """Compute requests until None is submitted. vLLM gets more of them than it runs, to prepare their pictures."""
        names, is_open = map(str, itertools.count(1)), True
        while is_open or self.live:
            is_open = is_open and self._admit(engine, names)
            self._drop(engine, [name for name, request in self.live.items() if request.future.cancelled()])
            outputs: Any = engine.step() if self.live else ()
            for output in outputs:
                self._pass_on(engine, output)

    def _admit(self, engine: LLMEngine, names: Iterator[str]) -> bool:
        """Hand waiting requests to vLLM up to twice its batch; block if it has none. False once closed."""
        adapter = LoRARequest("adapter", 1, self.info.adapter.path) if self.info.adapter else None
        while len(self.live) < 2 * self.limits.batch_size:
            try:
                request = self.waiting.get(block=not self.live)
            except queue.Empty:
                break
            if request is None:
                return False
            if request.future.cancelled():
                continue
            name, frames = next(names), request.frames
            pictures = [Image.fromarray(one) for one in ([frames] if isinstance(frames, np.ndarray) else frames)]
            prompt: Any = {"prompt_token_ids": list(request.ids), "multi_modal_data": {"image": pictures}}
            try:
                engine.add_request(name, prompt, request.params(), lora_request=adapter)
                self.live[name] = request
            except Exception as error:  # caused by this request alone
                request.settle(Failure.of(error))
        return True

    def _drop(self, engine: LLMEngine, names: list[str]) -> None:
        """Abort requests."""
        if names:
            engine.abort_request(names)
        for name in names:
            del self.live[name]

    def _pass_on(self, engine: LLMEngine, output: Any) -> None:
        """Hand vLLM's output to its request."""
        name, answer = output.request_id, output.outputs[0]
        ids, request = list(answer.token_ids), self.live[name]
        logprobs = [each[token].logprob for each, token in zip(answer.logprobs, ids, strict=True)]
        generated = Generated(ids, logprobs, answer.finish_reason)
        if request.cut:
            generated = request.cut(generated)
        if request.listener:
            request.listener(generated)
        if output.finished:
            del self.live[name]
        elif generated.finish_reason:
            self._drop(engine, [name])
        if generated.finish_reason:
            request.settle(generated)

    def _refuse(self, error: ModelDied) -> None:
        """Settle all requests, running and waiting."""
        for request in self.live.values():
            request.settle(error)
        self.live.clear()
        with suppress(queue.Empty):
            while True:
                if waiting := self.waiting.get(block=False):
                    waiting.settle(error)


def load(info: PaliGemmaInfo, limits: Limits) -> LLMEngine:
    """Start vLLM, to compute in this thread. Raises ModelError."""
    torch.set_num_threads(limits.threads)
    # Else vLLM, though told to be eager, compiles the rank of a token in C++: three seconds of the first answer.
    torch._dynamo.config.disable = not torch.cuda.is_available()
    if not loaded():
        raise ModelError(
            "vLLM did not load shardsight's plugin, without which PaliGemma gives wrong answers: install the "
            "package (pip install -e .), and let VLLM_PLUGINS, where it is set, name shardsight"
        )
    try:
        with _temporary_store():
            return LLMEngine.from_vllm_config(configured(info, limits), disable_log_stats=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{info.path} cannot be loaded: {first}") from error


def configured(info: PaliGemmaInfo, limits: Limits) -> VllmConfig:
    """vLLM's configuration of a model."""
    cuda = torch.cuda.is_available()
    arguments: dict[str, Any] = {} if cuda else _on_cpu(info, limits)
    if info.adapter:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": info.adapter.rank}
        arguments |= {"enable_tower_connector_lora": info.adapter.everywhere}
    config = EngineArgs(
        model=info.path,
        dtype=DTYPES[limits.precision],  # type: ignore[arg-type]
        max_model_len=limits.length,
        max_num_seqs=limits.batch_size,
        max_num_batched_tokens=max(limits.length, 8192 if cuda else 2048),
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        gpu_memory_utilization=limits.memory,
        mm_processor_cache_gb=0.25,
        limit_mm_per_prompt={"image": limits.pictures},
        tensor_parallel_size=limits.devices,
        distributed_executor_backend="mp" if limits.devices > 1 else "uni",
        disable_log_stats=True,
        **arguments,
    ).create_engine_config()
    if limits.pictures > 1:
        # On a GPU a step is planned while the one before it runs. Without room for the pictures of both, vLLM cuts a
        # prompt off before a picture for which there is none.
        config.scheduler_config.encoder_cache_size *= 2
    return config


def _on_cpu(info: PaliGemmaInfo, limits: Limits) -> dict[str, Any]:
    # Cache for all requests that run at once, in half of the free memory at most: vLLM preempts those without cache.
    token = info.kv_values * BYTES[limits.precision] // limits.devices
    one = (math.ceil(limits.length / BLOCK) + 1) * BLOCK * token
    rest = limits.free() - info.parameters * BYTES[limits.precision]
    memory = max(one, min(limits.batch_size * one, rest // 2))
    return {"kv_cache_memory_bytes": memory, "enforce_eager": True}  # compiling takes a C++ compiler, and minutes


@contextmanager
def _temporary_store() -> Iterator[None]:
    """Put the file by which vLLM's processes find each other into a folder that is removed; vLLM leaves it behind."""
    modules: list[Any] = [uniproc_executor, multiproc_executor]
    before = [module.get_file_store_init_method for module in modules]
    with tempfile.TemporaryDirectory(prefix="shardsight_vllm_") as folder:
        for module in modules:
            module.get_file_store_init_method = lambda: f"file://{folder}/{uuid.uuid4().hex}"
        try:
            yield
        finally:
            for module, original in zip(modules, before, strict=True):
                module.get_file_store_init_method = original
