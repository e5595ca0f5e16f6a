"""A YOLO network computed by OpenVINO, which takes a CPU less than half the time that torch takes.

OpenVINO's own `convert_model` would say so to its maker's telemetry; the frontend below it does not.
"""

from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class Compiled:
    """network: ultralytics' model, fused and in fp32, with a letterbox as its input; it is changed to its export form.

    stride: of the network; its input's sides are multiples of it. dtype: what it is computed in, where the CPU can.
    Boxes are decoded in fp32 all the same, as OpenVINO keeps what follows the last convolution. threads: of the CPU.
    """

    def __init__(self, network: torch.nn.Module, stride: int, dtype: torch.dtype, threads: int) -> None:
        for module in network.modules():
            if hasattr(module, "export"):
                module.export, module.dynamic = True, True
        example = torch.zeros(2, 3, 3 * stride, 2 * stride)
        with torch.inference_mode(False), torch.no_grad():
            traced = torch.jit.trace(network, example, strict=False, check_trace=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(traced, example_input=(example,))  # has to outlive the conversion
        model = frontend.convert(frontend.load(decoder))
        steps = ov.preprocess.PrePostProcessor(model)
        steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        steps.input().preprocess().convert_element_type(ov.Type.f32).scale(255.0)
        steps.input().model().set_layout(ov.Layout("NCHW"))
        hints = {"INFERENCE_PRECISION_HINT": _PRECISIONS[dtype], "INFERENCE_NUM_THREADS": threads}
        # A picture a thread: threads that share one wait for each other, and longest where others use the cores too.
        hints |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": threads}
        self.queue = ov.AsyncInferQueue(ov.Core().compile_model(steps.build(), "CPU", hints), threads)
        self.queue.set_callback(self._keep)
        self.found: dict[int, list[np.ndarray]] = {}

    def __call__(self, frames: np.ndarray) -> Any:
        """RGB uint8 (n, h, w, 3), sides multiples of the stride → a tensor, or a list where the task has several."""
        for index in range(len(frames)):
            self.queue.start_async({0: frames[index : index + 1]}, index, share_inputs=True)
        self.queue.wait_all()
        parts = zip(*(self.found.pop(index) for index in range(len(frames))), strict=True)
        outputs = [torch.from_numpy(np.concatenate(part)) for part in parts]
        return outputs[0] if len(outputs) == 1 else outputs

    def _keep(self, request: Any, index: int) -> None:
        self.found[index] = [output.data.copy() for output in request.output_tensors]
