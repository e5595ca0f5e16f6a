"""The formats to which ultralytics exports a YOLO, and what each takes. Needs neither torch nor ultralytics."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

# → ultralytics' `quantize`. w8a16 and w8a32: weights of 8 bits, activations of 16 or 32.
PRECISIONS: dict[str, int | str] = {"fp32": 32, "fp16": 16, "int8": 8, "w8a16": "w8a16", "w8a32": "w8a32"}

FILES = ("network.xml", "network.bin")  # of a network that this library itself has converted to OpenVINO
Network = tuple[bytes, bytes]  # their content


@dataclass(frozen=True)
class Format:
    """options: of export, besides imgsz, device and precision. precisions: of PRECISIONS. packages: that it needs, as
    pip takes them; int8_packages: and for weights of 8 bits. machine: `cuda`, `mac`, or the program of a vendor's kit
    that no package index has; empty for any machine. loader: the package that loads an export, where those that write
    one want other versions of packages than this library."""

    options: tuple[str, ...]
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()
    int8_packages: tuple[str, ...] = ()
    machine: str = ""
    loader: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether int8 is calibrated on pictures."""
        return "data" in self.options


_ALL = ("fp32", "fp16", "int8")
_ONNX = ("onnx>=1.12.0,<2.0.0",)
_SIMPLIFY = ("onnx>=1.12.0,<2.0.0", "onnxruntime", "onnxslim>=0.1.82")
_TENSORFLOW = ("tensorflow>=2.0.0,<=2.19.0", "onnx2tf>=1.26.3,<1.29.0", "tf_keras<=2.19.0", "sng4onnx>=1.0.1")
_QUANTIZER = ("ai-edge-quantizer>=0.10.0",)
_LITERT = ("litert-torch>=0.10.0", "ai-edge-litert>=2.3.0")  # of which the first wants pydantic<2.12

# In ultralytics' order. The tests hold options and precisions against its own table.
FORMATS = {
    "torchscript": Format(("batch", "dynamic", "nms"), ("fp32", "fp16")),
    "onnx": Format(("batch", "data", "dynamic", "fraction", "nms", "opset", "simplify"), _ALL, _SIMPLIFY),
    "openvino": Format(
        ("batch", "data", "dynamic", "fraction", "nms"), _ALL, ("openvino>=2024.0.0",), ("nncf>=2.14.0",)
    ),
    "engine": Format(
        ("batch", "data", "dynamic", "fraction", "nms", "opset", "simplify", "workspace"),
        *(_ALL, (*_SIMPLIFY, "tensorrt"), ("nvidia-modelopt[onnx]>=0.44",), "cuda"),
    ),
    "coreml": Format(("batch", "dynamic", "nms"), (*_ALL, "w8a16"), ("coremltools>=9.0",), (), "mac"),
    "coreai": Format(("batch",), ("fp32", "fp16"), ("coreai-torch>=0.4.3",)),
    "saved_model": Format(("batch", "data", "fraction", "nms", "opset"), ("fp32", "int8"), _TENSORFLOW),
    "pb": Format(("batch", "opset"), ("fp32",), _TENSORFLOW),
    "edgetpu": Format(("data", "fraction", "opset"), ("int8",), _TENSORFLOW, (), "edgetpu_compiler"),
    "litert": Format(
        *(("batch", "data", "fraction"), ("fp32", "int8", "w8a16", "w8a32"), _LITERT, _QUANTIZER, "", "ai-edge-litert")
    ),
    "paddle": Format(("batch",), ("fp32",), ("paddlepaddle>=3.0.0,<3.3.0", "x2paddle")),
    "mnn": Format(("batch", "dynamic", "nms", "opset", "simplify"), _ALL, (*_SIMPLIFY, "MNN>=2.9.6")),
    "ncnn": Format(("batch",), ("fp32", "fp16"), ("ncnn", "pnnx==20260526")),
    "imx": Format(
        *(("data", "fraction", "nms"), ("int8",), ("model-compression-toolkit>=2.4.1", "edge-mdt-cl>=1.1.0")),
        *((), "imxconv-pt"),
    ),
    "rknn": Format(
        ("batch", "data", "fraction", "name", "opset", "simplify"), ("fp16", "int8"), ("rknn-toolkit2>=2.3.2,<2.5",)
    ),
    "executorch": Format(("batch",), ("fp32",), ("executorch",)),
    "axelera": Format(("batch", "data", "fraction"), ("int8",), ("axelera-devkit",)),
    "deepx": Format(("data", "opset", "optimize", "simplify"), ("int8",), ("dx_com>=2.4.1",)),
    "qnn": Format(("batch", "data", "fraction", "name", "opset", "simplify"), ("w8a16",), (*_ONNX, "onnxruntime-qnn")),
    "hailo": Format(("conf", "data", "fraction", "iou", "name", "simplify"), ("int8",), ("hailo-dataflow-compiler",)),
    "ascend": Format(("batch", "name", "nms", "opset", "simplify"), ("fp16",), _ONNX, (), "atc"),
    "xilinx": Format(("data", "fraction", "name", "opset", "simplify"), ("int8",), ("amd-quark>=0.13.0,<0.14.0",)),
}


def missing(name: str, precision: str) -> str | None:
    """What this machine lacks for exporting to a format, as one sentence that says what to do; None if nothing."""
    known = FORMATS[name]
    if known.machine == "cuda" and not shutil.which("nvidia-smi"):
        return f"--format {name} needs a machine with an NVIDIA GPU: run this there"
    if known.machine == "mac" and platform.system() != "Darwin":
        return f"--format {name} needs macOS: run this there"
    wanted = known.packages + (known.int8_packages if precision not in ("fp32", "fp16") else ())
    if lacking := [one for one in wanted if not _is_installed(Requirement(one))]:
        several = "packages" if len(lacking) > 1 else "package"
        if known.loader:
            return (
                f"--format {name} needs the {several} {', '.join(lacking)}, which cannot be installed beside this "
                f"library: export with ultralytics in another environment, and load it here with {known.loader}"
            )
        python = os.path.relpath(sys.executable)
        packages = " ".join(f"'{one}'" for one in lacking)
        return f"--format {name} needs the {several} {', '.join(lacking)}: {python} -m pip install {packages}"
    if known.machine not in ("", "cuda", "mac") and not shutil.which(known.machine):
        return f"--format {name} needs its vendor's program {known.machine}, which is not on PATH: install it"
    return None


def _is_installed(wanted: Requirement) -> bool:
    names = (wanted.name, f"{wanted.name}-gpu") if wanted.name == "onnxruntime" else (wanted.name,)
    for name in names:
        try:
            if wanted.specifier.contains(version(name), prereleases=True):
                return True
        except PackageNotFoundError:
            continue
    return False
