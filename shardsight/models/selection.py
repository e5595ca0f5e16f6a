"""The models that the settings select: what each is, the arguments for its class, and how to decode for them all."""

from typing import Any

from shardsight.decode.frames import Largest, Load
from shardsight.errors import UsageError
from shardsight.models.paligemma import info as paligemma
from shardsight.models.paligemma.info import PaliGemmaInfo
from shardsight.models.paligemma.routing import Route
from shardsight.models.yolo import info as yolo
from shardsight.models.yolo.info import YoloInfo
from shardsight.settings import Models
from shardsight.storage import Storage

ModelInfos = dict[str, YoloInfo | PaliGemmaInfo]  # by name: `yolo`, `paligemma`, `paligemma 448`


def inspect(settings: Models) -> ModelInfos:
    """What each model is, in the order in which pictures pass through them. Raises ModelError, UsageError."""
    models: ModelInfos = {}
    if settings.yolo:
        models["yolo"] = yolo.inspect(settings.yolo, settings.imgsz)
    resolutions: dict[int, PaliGemmaInfo] = {}
    for path in settings.paligemma:
        info = paligemma.inspect(path, settings.revision, settings.adapter)
        size = info.input.size
        if size in resolutions:
            raise UsageError(f"{resolutions[size].path} and {path} both see {size} pixels: give one of them")
        resolutions[size] = info
    if settings.resolution != "auto" and resolutions:
        size = int(settings.resolution)
        if size not in resolutions:
            sizes = " and ".join(map(str, sorted(resolutions)))
            raise UsageError(f"--resolution {size}: no --paligemma sees {size} pixels, only {sizes}")
        resolutions = {size: resolutions[size]}
    for size in sorted(resolutions):
        models[f"paligemma {size}" if "paligemma" in models else "paligemma"] = resolutions[size]
    return models


def arguments(models: ModelInfos, settings: Models) -> dict[str, dict[str, Any]]:
    """The keyword arguments for each model's class, by the model's name."""
    found: dict[str, dict[str, Any]] = {}
    sizes = tuple(model.input.size for model in models.values() if isinstance(model, PaliGemmaInfo))
    for name, model in models.items():
        if isinstance(model, YoloInfo):
            found[name] = yolo.arguments(settings, model)
            continue
        found[name] = paligemma.arguments(settings, model)
        if len(sizes) > 1:
            found[name]["route"] = Route(sizes, model.input.size, settings.small_box, settings.lost_detail)
    return found


def loader(models: ModelInfos, settings: Models, storage: Storage, keep_images: bool = False) -> Load:
    """What reads and decodes pictures at the size that these models need."""
    inputs = tuple(model.input for model in models.values())
    scaled = settings.scaled_decode and settings.on != "regions"  # regions are cropped from the original
    return Load(storage, inputs[0] if len(inputs) == 1 else Largest(inputs), scaled, keep_images)
