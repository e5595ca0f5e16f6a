"""What is read of a PaliGemma before it is loaded, without torch and vLLM, as the driver does."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shardsight.models.info import ModelError, sha256_of
from shardsight.models.staging import check, stage
from shardsight.settings import Models
from shardsight.storage import Storage, is_remote

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of the LoRA kernels in vLLM
MASKS = "vae-oid.npz"  # what decodes masks
# What decides a model's answers, besides `*.safetensors`. generation_config.json names the tokens that end an answer.
_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", MASKS,
)  # fmt: skip
_COMMIT = re.compile("[0-9a-f]{40}")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Square:
    """The whole picture, resized to size × size by Hugging Face's processor."""

    size: int

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which a picture may be reduced without a loss for the model."""
        return min(self.size, width), min(self.size, height)

    def shrink(self, frame: np.ndarray, width: int, height: int) -> np.ndarray:
        """Unchanged: the processor's antialiased resizing needs all pixels."""
        return frame


@dataclass(frozen=True)
class Adapter:
    """A LoRA as peft saves it. rank: of vLLM's kernel. everywhere: also changes vision tower or projector."""

    path: str
    rank: int
    everywhere: bool


@dataclass(frozen=True)
class PaliGemmaInfo:
    """vocabulary: number of tokens. image_tokens: of a picture. parameters: their number. kv_values: numbers in the KV
    cache for each token. length: tokens of a request, at most. window: tokens in Gemma 2's sliding window, or None.

    files: name → sha256 of all that decides the answers, the adapter's as `adapter/NAME`. sha256: over the weights'.
    hub: name and commit there of a model of Hugging Face's hub, of which `path` is this machine's copy.
    """

    path: str
    input: Square
    vocabulary: int
    image_tokens: int
    parameters: int
    kv_values: int
    length: int
    window: int | None
    adapter: Adapter | None
    files: dict[str, str]
    sha256: str
    hub: tuple[str, str] | None = None


def locate(model: str, revision: str | None = None) -> str:
    """The folder of a model, fetched from Hugging Face's hub where it is a name there. Raises ModelError."""
    if Path(model).is_dir():
        return model
    if Path(model).exists() or model.count("/") != 1 or model[0] in "/.~":
        raise ModelError(
            f"there is no folder {model}: give a folder with config.json, or a name on the hub, as ORG/NAME"
        )
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, model, revision=revision, allow_patterns=[*_FILES, "*.safetensors"])
    try:
        return str(fetch())
    except Exception as error:
        if _COMMIT.fullmatch(revision or ""):  # of one, the hub may be asked although all is here
            with suppress(FileNotFoundError):
                return str(fetch(local_files_only=True))
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"there is no folder {model}, and the hub does not give it: {first}") from error


def inspect(
    model: str,
    revision: str | None = None,
    adapter: str | None = None,
    storage: Storage | None = None,
    files: dict[str, str] | None = None,
) -> PaliGemmaInfo:
    """Read a folder's JSON and the headers of its weights. adapter: folder of a LoRA. Raises ModelError.

    storage: of a model or an adapter in a store, of which a copy is read. files: as PaliGemmaInfo has them, which those
    that are read have to be.
    """
    store, (of_model, of_adapter) = storage or Storage(), _parts(files or {})
    model = str(stage(model, store, of_model)) if is_remote(model) else model
    adapter = str(stage(adapter, store, of_adapter)) if adapter and is_remote(adapter) else adapter
    folder = locate(model, revision)
    if adapter and not Path(adapter).is_dir():
        raise ModelError(f"there is no folder {adapter}: give one with a LoRA adapter, as peft saves it")
    found = sorted(file for part in (folder, adapter) if part for file in Path(part).iterdir() if file.is_file())
    state = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found)
    info = _inspect(folder, adapter, state)
    if files:
        for place, before, now in zip((folder, adapter), (of_model, of_adapter), _parts(info.files), strict=True):
            check(before, now, str(place))
            check(now, before, str(place))  # nor is one there that was not
    return info if folder == model else replace(info, hub=(model, Path(folder).name))


def _parts(files: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The model's of PaliGemmaInfo's files, and the adapter's, by their own names."""
    own = {name: digest for name, digest in files.items() if not name.startswith("adapter/")}
    return own, {name.removeprefix("adapter/"): files[name] for name in files.keys() - own.keys()}


def arguments(settings: Models, info: PaliGemmaInfo) -> dict[str, Any]:
    """Of the class PaliGemma."""
    model, revision = info.hub or (info.path, None)  # by its name each node has a copy of its own
    own = {name: getattr(settings, name) for name in ("max_tokens", "precision", "adapter", "storage")}
    own |= {"model": model, "revision": revision, "prompts": settings.prompt, "regions": settings.on == "regions"}
    return own | {"clip_frames": settings.clip_frames or 1, "files": info.files}


@lru_cache
def _inspect(folder: str, adapter: str | None, state: tuple[Any, ...]) -> PaliGemmaInfo:
    """Cached by sizes and times of the files, as hashing takes seconds per gigabyte."""
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
        # With transformers' defaults, as Google's config.json of PaliGemma 1 leaves fields out.
        second = text.get("model_type") == "gemma2"
        head = text.get("head_dim", 256)
        kv_heads = text.get("num_key_value_heads", 4 if second else 1)
        layers = text.get("num_hidden_layers", 26 if second else 18)
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"{folder} holds no *.safetensors: save its weights in that format")
        _check_layers(path, config, weights)
        files = {file.name: sha256_of(file) for file in [*weights, *(path / name for name in _FILES)] if file.is_file()}
        return PaliGemmaInfo(
            path=folder,
            input=Square(size),
            vocabulary=int(text.get("vocab_size", config.get("vocab_size", 257152))),
            image_tokens=(size // int(vision.get("patch_size", 14))) ** 2,
            parameters=sum(math.prod(shape) for file in weights for shape in shapes(file).values()),
            kv_values=2 * layers * kv_heads * head,
            length=int(text.get("max_position_embeddings", 8192)),
            window=text.get("sliding_window", 4096 if second else None),
            adapter=_adapter(adapter) if adapter else None,
            files=files | {f"adapter/{name}": sha256_of(Path(adapter, name)) for name in _ADAPTER if adapter},
            sha256=hashlib.sha256(b"".join(bytes.fromhex(files[file.name]) for file in weights)).hexdigest(),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{folder} cannot be read as a PaliGemma: {type(error).__name__}: {error}") from error


def _adapter(folder: str) -> Adapter:
    path = Path(folder)
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        names = list(shapes(path / "adapter_model.safetensors"))
        rank = next(rank for rank in RANKS if rank >= int(config["r"]))
    except (OSError, ValueError, KeyError, StopIteration, struct.error) as error:
        raise ModelError(
            f"{folder} is no LoRA adapter: expected adapter_config.json with r up to {RANKS[-1]} and "
            f"adapter_model.safetensors ({type(error).__name__}: {error})"
        ) from error
    if config.get("modules_to_save"):
        raise ModelError(
            f"{folder} replaces whole modules ({config['modules_to_save']}): merge it into the model first"
        )
    everywhere = any("vision_tower" in name or "multi_modal_projector" in name for name in names)
    return Adapter(str(path.resolve()), rank, everywhere)


def _check_layers(path: Path, config: dict[str, Any], weights: Sequence[Path]) -> None:
    """Raises ModelError where the weights lack the embedding, or the output layer of an untied model."""
    names = [name for file in weights for name in shapes(file)]
    tied = config.get("tie_word_embeddings", True)
    for layer in ("embed_tokens",) if tied else ("embed_tokens", "lm_head"):
        if not any(name.endswith(f"{layer}.weight") for name in names):
            raise ModelError(
                f"the weights in {path} lack {layer}.weight, and config.json says tie_word_embeddings: {tied}: "
                "save the whole model again"
            )


def _size(path: Path, config: dict[str, Any]) -> int:
    """The side of the model's input. Raises ModelError where model and processor differ, as positions are learned."""
    size = config["vision_config"].get("image_size", 224)
    processor = path / "preprocessor_config.json"
    if not processor.is_file():
        processor = path / "processor_config.json"  # transformers 5 puts it there
    state = json.loads(processor.read_text())
    state = state.get("image_processor", state)
    if state["size"]["height"] != size or state["size"]["width"] != size:
        raise ModelError(
            f"{path} scales pictures to {state['size']}, but its model sees {size} pixels: make the two sizes equal"
        )
    return int(size)


def shapes(file: Path) -> dict[str, list[int]]:
    """Name → shape of the weights in a safetensors file, from its header: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def request_length(info: PaliGemmaInfo, prompt_tokens: int, max_tokens: int, cuda: bool, clip_frames: int = 1) -> int:
    """Tokens of a request, at most: pictures, start token, prompt with its newline, and answer.

    clip_frames: pictures in a prompt, at most. Raises ModelError where not even a prompt of one token fits.
    """
    limit, why, pictures = info.length, "", clip_frames * info.image_tokens
    if cuda and info.window is not None and info.window < limit:
        limit, why = info.window, " on a GPU, where Gemma 2's sliding window limits a request"
    if limit < pictures + 3 + max_tokens:
        whose = "a picture's" if clip_frames == 1 else f"those of a clip's {clip_frames} frames"
        fewer = "fewer" if clip_frames == 1 else "fewer frames"
        raise ModelError(
            f"{info.path} takes {limit} tokens{why}, {pictures} of them {whose}, which leaves too few for "
            f"a prompt and {max_tokens} of an answer: ask for {fewer}, or take a lower resolution"
            + (", or run it on a CPU" if why else "")
        )
    return min(pictures + prompt_tokens + 2 + max_tokens, limit)


def fits(info: PaliGemmaInfo, precision: str, available: int, tokens: int, devices: int = 1) -> None:
    """Raises ModelError unless weights and one request of so many tokens fit the `available` bytes of each device.

    A tenth of the weights is added for activations.
    """
    weights = info.parameters * BYTES[precision] * 1.1 / devices
    halved = ", or --precision bf16" if precision == "fp32" else ""
    needed = weights + tokens * info.kv_values * BYTES[precision]
    if needed > available:
        raise ModelError(
            f"{info.path} takes {needed / 2**30:.1f} GiB in {precision}, and {available / 2**30:.1f} are free: "
            f"use a smaller model{halved}"
        )
