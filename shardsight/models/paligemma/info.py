"""What is known of a PaliGemma before it is loaded, so that the driver stays free of torch and vLLM."""

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shardsight.models.info import ModelError

_FILES = ["*.json", "*.safetensors", "*.model", "*.npz"]  # of a repository that are asked for
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Square:
    """PaliGemma's input: the whole picture, squashed to size × size by Hugging Face's processor."""

    size: int

    def enough(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) below which a picture would lose what the model could see."""
        return min(self.size, width), min(self.size, height)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """As it is: the processor's antialiased scaling needs all of it."""
        return frame


@dataclass(frozen=True)
class PaliGemmaInfo:
    """input: what frames become for it. vocabulary: number of tokens. image_tokens: that a picture takes.

    parameters: their number. kv_values: numbers that are kept of each token while a request runs. length: most tokens
    of a request, which must not outgrow Gemma 2's sliding window. sha256: of the weights' files.
    """

    path: str
    input: Square
    vocabulary: int
    image_tokens: int
    parameters: int
    kv_values: int
    length: int
    sha256: str


def locate(model: str, revision: str | None = None) -> str:
    """The folder of a model: as named, or what Hugging Face's hub has under the name. Raises ModelError."""
    if Path(model).is_dir():
        return model
    if Path(model).exists() or model.count("/") != 1 or model[0] in "/.~":
        raise ModelError(
            f"there is no folder {model}: give a folder with config.json, or a name on the hub, as ORG/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"there is no folder {model}, and the hub does not give it: {first}") from error


def inspect(model: str, revision: str | None = None) -> PaliGemmaInfo:
    """What a PaliGemma is, from its folder's JSON and the heads of its weights. Raises ModelError."""
    path = Path(locate(model, revision))
    return _inspect(str(path), max((file.stat().st_mtime_ns for file in path.iterdir()), default=0))


@lru_cache
def _inspect(folder: str, changed: int) -> PaliGemmaInfo:
    """Once for each state of the files: hashing gigabytes takes a while."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: give the folder of a PaliGemma")
    try:
        config = json.loads((path / "config.json").read_text())
        if config.get("model_type") != "paligemma":
            raise ModelError(
                f"{folder} is a {config.get('model_type')}, not a PaliGemma: its model_type must be paligemma"
            )
        size = int(_size(path, config))
        vision, text = config["vision_config"], config["text_config"]
        # What a field is where config.json leaves it out, as in Google's own of PaliGemma 1.
        second = text.get("model_type") == "gemma2"
        head = text.get("head_dim", 256)
        kv_heads = text.get("num_key_value_heads", 4 if second else 1)
        layers = text.get("num_hidden_layers", 26 if second else 18)
        window = text.get("sliding_window", 4096 if second else None)
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"{folder} holds no *.safetensors: save its weights in that format")
        return PaliGemmaInfo(
            path=folder,
            input=Square(size),
            vocabulary=int(text.get("vocab_size", config.get("vocab_size", 257152))),
            image_tokens=(size // int(vision.get("patch_size", 14))) ** 2,
            parameters=sum(math.prod(shape) for file in weights for shape in shapes(file).values()),
            kv_values=2 * layers * kv_heads * head,
            length=min(int(text.get("max_position_embeddings", 8192)), window or 8192),
            sha256=_sha256(weights),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{folder} cannot be read as a PaliGemma: {type(error).__name__}: {error}") from error


def _size(path: Path, config: dict[str, Any]) -> int:
    """The side of the model's input; both files must agree, as positions are learned."""
    size = config["vision_config"].get("image_size", 224)
    processor = path / "preprocessor_config.json"
    if not processor.is_file():
        processor = path / "processor_config.json"  # transformers 5 puts it there
    state = json.loads(processor.read_text())
    state = state.get("image_processor", state)
    if state["size"]["height"] != size or state["size"]["width"] != size:
        raise ModelError(
            f"{path} scales pictures to {state['size']}, but its model sees {size} pixels: correct one of both"
        )
    return int(size)


def shapes(file: Path) -> dict[str, list[int]]:
    """Name → shape of the weights in a safetensors file, by its head: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        head = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return {name: tensor["shape"] for name, tensor in head.items() if name != "__metadata__"}


def _sha256(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def fits(info: PaliGemmaInfo, precision: str, available: int, tokens: int, devices: int = 1) -> None:
    """Whether weights and one request of so many tokens have room on each device. Raises ModelError.

    available: bytes of a device. A tenth of the weights is added for what is computed in between.
    """
    weights = info.parameters * BYTES[precision] * 1.1 / devices
    needed = weights + tokens * info.kv_values * BYTES[precision]
    if needed > available:
        raise ModelError(
            f"{info.path} takes {needed / 2**30:.1f} GiB in {precision}, and {available / 2**30:.1f} are free: "
            "use a smaller model, a shorter precision, or more devices"
        )
