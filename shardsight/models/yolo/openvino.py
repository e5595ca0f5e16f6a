"""A YOLO network run by OpenVINO, which takes less than half of torch's time on a CPU.

It is converted by OpenVINO's frontend, since `openvino.convert_model` sends telemetry.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

from shardsight.models.info import key_of, made_once, sha256_of
from shardsight.models.yolo.formats import FILES, Network

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class Compiled:
    """network: OpenVINO's file, of `converted` or `stored`. dtype: of the computation, where the CPU supports it; boxes
    are decoded in fp32, as OpenVINO keeps it after the last convolution. threads: of the CPU.
    """

    def __init__(self, network: Path, dtype: torch.dtype, threads: int) -> None:
        self.network, self.dtype, self.threads = network, dtype, threads
        self.outputs: dict[int, list[np.ndarray]] = {}

    def __call__(self, frames: np.ndarray) -> Any:
        """RGB uint8 (n, h, w, 3), h and w multiples of the stride → the network's output, or a list of several."""
        queue = self.together if len(frames) > 1 else self.alone
        for index in range(len(frames)):
            queue.start_async({0: frames[index : index + 1]}, index, share_inputs=True)
        queue.wait_all()
        parts = zip(*(self.outputs.pop(index) for index in range(len(frames))), strict=True)
        outputs = [torch.from_numpy(np.concatenate(part)) for part in parts]
        return outputs[0] if len(outputs) == 1 else outputs

    @cached_property
    def together(self) -> ov.AsyncInferQueue:
        """One picture per thread: threads that share one wait for each other, most of all on busy cores."""
        return self._queue({"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": self.threads}, self.threads)

    @cached_property
    def alone(self) -> ov.AsyncInferQueue:
        """All threads for one picture, where there is no other: 19 ms instead of 33 on two cores."""
        return self._queue({"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}, 1)

    def _queue(self, hints: dict[str, Any], requests: int) -> ov.AsyncInferQueue:
        core = ov.Core()
        core.set_property({"CACHE_DIR": str(self.network.parent)})
        hints = {**hints, "INFERENCE_PRECISION_HINT": _PRECISIONS[self.dtype], "INFERENCE_NUM_THREADS": self.threads}
        queue = ov.AsyncInferQueue(core.compile_model(self.network, "CPU", hints), requests)
        queue.set_callback(self._keep)
        return queue

    def _keep(self, request: Any, index: int) -> None:
        self.outputs[index] = [output.data.copy() for output in request.output_tensors]


def converted(network: torch.nn.Module, weights: Path, stride: int) -> Path:
    """A network as OpenVINO's file, kept for the next process.

    network: ultralytics' model, fused and in fp32, for letterboxed input; it is switched to export mode. weights: its
    file. stride: of the network; the input's height and width are multiples of it.
    """
    key = key_of(Path(__file__).parent, sha256_of(weights))
    return made_once("networks", key, lambda folder: _convert(network, stride, folder / FILES[0])) / FILES[0]


def stored(content: Network) -> Path:
    """OpenVINO's file of a network that came in memory."""

    def write(folder: Path) -> None:
        for name, data in zip(FILES, content, strict=True):
            (folder / name).write_bytes(data)

    return made_once("networks", hashlib.sha256(b"".join(content)).hexdigest(), write) / FILES[0]


def quantize(network: Path, inputs: Iterable[np.ndarray], head: int, target: Path) -> None:
    """Write a network in int8, calibrated on `inputs`, RGB uint8 (1, h, w, 3) each.

    head: index of its last module, which decodes boxes: that arithmetic, of pixels in the hundreds, stays as it is, as
    in ultralytics' exports.
    """
    import nncf

    samples = list(inputs)
    names = [rf"__module\.model\.{head}(\.dfl.*)?/.*"]
    quantized = nncf.quantize(
        ov.Core().read_model(network),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        ignored_scope=nncf.IgnoredScope(patterns=names, validate=False),
    )
    ov.save_model(quantized, target, compress_to_fp16=False)


def _convert(network: torch.nn.Module, stride: int, path: Path) -> None:
    """Write the network, for RGB uint8 (n, h, w, 3), as OpenVINO's file."""
    for module in network.modules():
        if hasattr(module, "export"):
            module.export, module.dynamic = True, True
    example = torch.zeros(2, 3, 3 * stride, 2 * stride)
    with torch.inference_mode(False), torch.no_grad():
        traced = torch.jit.trace(network, example, strict=False, check_trace=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=(example,))  # must outlive the model
    model = frontend.convert(frontend.load(decoder))
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).scale(255.0)
    steps.input().model().set_layout(ov.Layout("NCHW"))
    ov.save_model(steps.build(), path, compress_to_fp16=False)
