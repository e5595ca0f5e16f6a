"""The models that the settings select: what each is, the arguments for its class, and how to decode for them all."""

from dataclasses import replace
from typing import Any

from shardsight.decode.frames import BYTES, TRACKED_BYTES, Clips, Input, Largest, Load
from shardsight.decode.video import Sampling
from shardsight.errors import UsageError
from shardsight.models.paligemma import info as paligemma
from shardsight.models.paligemma.info import PaliGemmaInfo
from shardsight.models.paligemma.routing import Route
from shardsight.models.yolo import info as yolo
from shardsight.models.yolo import int8
from shardsight.models.yolo.info import YoloInfo
from shardsight.models.yolo.int8 import Int8
from shardsight.models.yolo.trackers import needs_pixels, tracker_settings
from shardsight.settings import Models, Settings
from shardsight.sources import Listing
from shardsight.storage import Storage, is_remote

ModelInfos = dict[str, YoloInfo | PaliGemmaInfo]  # by name: `yolo`, `paligemma`, `paligemma 448`


def inspect(settings: Models) -> ModelInfos:
    """What each model is, in the order in which pictures pass through them. Raises ModelError, UsageError."""
    models: ModelInfos = {}
    if settings.yolo:
        models["yolo"] = info = yolo.inspect(settings.yolo, settings.imgsz, Storage(settings.storage))
        if (settings.track or _crops(settings)) and info.task == "classify":
            flag = "--track" if settings.track else "--crops"
            raise UsageError(f"{flag}: {info.path} is a classifier, which finds no boxes: give another model")
        if settings.precision == "int8" and not (info.is_export or isinstance(settings, Settings)):
            command = f"jobs.export {info.path} --format openvino --precision int8 --data PICTURES --output DIR"
            raise UsageError(f"--precision int8 takes calibrated weights: give --yolo what {command} writes")
    resolutions: dict[int, PaliGemmaInfo] = {}
    if settings.precision == "int8" and settings.paligemma:
        raise UsageError("--precision int8: PaliGemma is computed in fp32, bf16 or fp16; choose one of them")
    for path in settings.paligemma:
        asked = paligemma.inspect(path, settings.revision, settings.adapter, Storage(settings.storage))
        asked = replace(asked, path=path) if is_remote(path) else asked
        size = asked.input.size
        if size in resolutions:
            raise UsageError(f"{resolutions[size].path} and {path} both see {size} pixels: give one of them")
        resolutions[size] = asked
        if settings.clip_frames:
            paligemma.request_length(asked, 1, settings.max_tokens, cuda=False, clip_frames=settings.clip_frames)
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
            if isinstance(settings, Settings):
                found[name] |= {"multi_label": settings.multi_label, "crops": settings.crops}
            continue
        found[name] = paligemma.arguments(settings, model)
        if isinstance(settings, Settings):
            found[name]["prompt_column"] = settings.prompt_column
        if len(sizes) > 1:
            found[name]["route"] = Route(sizes, model.input.size, settings.small_box, settings.lost_detail)
    return found


def calibrate(models: ModelInfos, settings: Settings, listing: Listing, storage: Storage) -> Int8:
    """The YOLO in int8, by pictures of the inputs. Raises ModelError."""
    info = models["yolo"]
    assert isinstance(info, YoloInfo)
    # YOLO alone computes here, and frames of 12 megapixels, which crops are cut from, would take 7 GB.
    load = replace(loader(models, settings, storage), input=info.input, clips=None, keep_images=False)
    return int8.calibrate(info, settings, listing.sample(int8.SAMPLE), load)


def _crops(settings: Models) -> bool:
    return isinstance(settings, Settings) and settings.crops


def loader(models: ModelInfos, settings: Models, storage: Storage) -> Load:
    """What reads and decodes pictures and videos at the size that these models need."""
    inputs = tuple(model.input for model in models.values())
    input: Input | None = inputs[0] if len(inputs) == 1 else Largest(inputs)
    if _crops(settings) or (settings.track and needs_pixels(tracker_settings(settings.track, settings.track_config))):
        input = None  # frames keep their size
    clips = None
    if settings.clip_frames and settings.clip_seconds:
        clips = Clips(settings.clip_frames, settings.clip_seconds, models["paligemma"].input)
    return Load(
        storage,
        input,
        settings.scaled_decode and settings.on != "regions",  # regions are cropped from the original
        isinstance(settings, Settings) and settings.keep_images,
        Sampling(settings.fps, settings.every, settings.keyframes),
        clips,
        TRACKED_BYTES if settings.track else BYTES,
    )
