"""What Shardsight's service is compared with: `python -m benchmarks.server_contenders NAME MODEL PORT`.

Servers of YOLOv8 take a form with one or more files named `image`, and answer with the boxes of each. They are written
as their own guides write them, decode outside the model's turn, and compute in ultralytics' own way, in fp32, but on
every core, of which ultralytics leaves one to others by itself.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from fastapi import FastAPI, Request, UploadFile
from litserve import LitAPI, LitServer
from litserve import server as litserve_server

from benchmarks.contenders import BATCH, detections, on_every_core
from benchmarks.paligemma import SMALLER, limits

IMGSZ = 640
WAIT = 0.01  # seconds that LitServe waits for a batch to fill


def decoded(data: bytes) -> np.ndarray:
    """BGR, as ultralytics takes it."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def fastapi(model: str, port: int) -> None:
    """An endpoint in FastAPI's pool of threads; the model takes one request after the other."""
    import uvicorn
    from ultralytics import YOLO

    app, yolo, lock = FastAPI(), on_every_core(YOLO(model)), threading.Lock()

    @app.post("/predict")
    def predict(image: list[UploadFile]) -> list[list[dict[str, Any]]]:
        frames = [decoded(one.file.read()) for one in image]
        with lock:
            return [detections(result) for result in yolo.predict(frames, imgsz=IMGSZ, verbose=False)]

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


class Detect(LitAPI):  # type: ignore[misc]  # it has no types
    def setup(self, device: str) -> None:
        from ultralytics import YOLO

        self.model = on_every_core(YOLO(self.weights))

    def decode_request(self, request: Request) -> list[np.ndarray]:
        return [decoded(one.file.read()) for one in request.getlist("image")]

    def batch(self, inputs: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        return inputs

    def predict(self, batch: list[list[np.ndarray]]) -> list[list[list[dict[str, Any]]]]:
        frames = [frame for frames in batch for frame in frames]
        found = iter([detections(result) for result in self.model.predict(frames, imgsz=IMGSZ, verbose=False)])
        return [list(islice(found, len(frames))) for frames in batch]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output


def litserve(model: str, port: int) -> None:
    """A LitAPI, whose server makes batches of what arrives; one worker, as on one device."""
    api = Detect(max_batch_size=BATCH, batch_timeout=WAIT)
    api.weights = model
    litserve_server._MCP_AVAILABLE = False  # its tools for agents do not know the mcp that vLLM brings
    server = LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)


def vllm(model: str, port: int) -> None:
    """vLLM's own server, without its caches of pictures and prefixes, as no picture of a user's comes twice."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text("{{ messages[0]['content'] }}\n")
        of_engine = [f"--{name.replace('_', '-')}={value}" for name, value in limits(SMALLER).items()]
        options = ["--dtype=float32", "--enforce-eager", "--no-enable-prefix-caching", "--mm-processor-cache-gb=0"]
        options += ["--chat-template-content-format=string", f"--chat-template={template}", "--uvicorn-log-level=error"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
        environment = os.environ | {"VLLM_PLUGINS": "none", "VLLM_LOGGING_LEVEL": "ERROR"}
        environment |= {"VLLM_RPC_BASE_PATH": folder}  # its sockets, which it leaves behind
        served = ["--host=127.0.0.1", "--served-model-name=paligemma", *options, *of_engine]
        subprocess.run([*command, *served], env=environment, check=True)


def vllm_all(model: str, port: int) -> None:
    """The same, told to compute on every core: by default it leaves one of them to its scheduler."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
    vllm(model, port)


CONTENDERS: dict[str, Callable[[str, int], None]] = {
    function.__name__: function for function in (fastapi, litserve, vllm, vllm_all)
}

if __name__ == "__main__":
    name, model, port = sys.argv[1:]
    CONTENDERS[name](model, int(port))
