"""The models that a request names: what is known of each, what its class is started with, and what they all need."""

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

Lineup = dict[str, YoloInfo | PaliGemmaInfo]  # by `yolo`, `paligemma`, `paligemma 448`


def known(settings: Models) -> Lineup:
    """What is known of each model, in the order in which pictures meet them. Raises ModelError, UsageError."""
    models: Lineup = {}
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


def arguments(models: Lineup, settings: Models) -> dict[str, dict[str, Any]]:
    """What each model's class is started with, by name."""
    found: dict[str, dict[str, Any]] = {}
    sizes = tuple(model.input.size for model in models.values() if isinstance(model, PaliGemmaInfo))
    for name, model in models.items():
        if isinstance(model, PaliGemmaInfo):
            own = paligemma.arguments(settings, model)
            if len(sizes) > 1:
                own["route"] = Route(sizes, model.input.size, settings.small_box, settings.lost_detail)
        else:
            own = yolo.arguments(settings, model)
        found[name] = own
    return found


def load(models: Lineup, settings: Models, storage: Storage, keep_images: bool = False) -> Load:
    """Reading and decoding, at the size that these models need."""
    inputs = tuple(model.input for model in models.values())
    whole = settings.on == "regions"  # are cut out of the original
    return Load(
        storage, inputs[0] if len(inputs) == 1 else Largest(inputs), settings.scaled_decode and not whole, keep_images
    )
