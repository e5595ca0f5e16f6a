"""ultralytics' trackers and their settings, for a process that does not import it."""

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from shardsight.errors import UsageError

TRACKERS = ("botsort", "bytetrack", "deepocsort", "fasttrack", "ocsort", "tracktrack")  # all that ultralytics ships
_GMC_METHODS = ("sparseOptFlow", "orb", "sift", "ecc", "none")


def tracker_settings(name: str, config: str | dict[str, Any] | None = None) -> dict[str, Any]:
    """Every setting of a tracker: ultralytics' defaults, where `config`, a dict or the path of a YAML file, does not
    give another value. Raises UsageError."""
    if not isinstance(config, str):
        return _with_defaults(name, config or {})
    try:
        given = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--track-config {config} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--track-config {config} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict):
        raise UsageError(f"--track-config {config}: expected settings as `key: value`, found {type(given).__name__}")
    try:
        return _with_defaults(name, given)
    except UsageError as error:
        raise UsageError(f"--track-config {config}: {error}") from error


def needs_pixels(settings: dict[str, Any]) -> bool:
    """Whether a tracker of these settings looks at the frames, which it then needs in full size, and not at the boxes
    alone."""
    return bool(settings.get("gmc_method", "none") != "none")


def _with_defaults(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """ultralytics' settings of a tracker, with those in `given` instead. Raises UsageError."""
    if name not in TRACKERS:
        raise UsageError(f"there is no tracker {name}: choose from {', '.join(TRACKERS)}")
    spec = importlib.util.find_spec("ultralytics")
    if not spec or not spec.origin:
        raise UsageError("tracking needs the Python module ultralytics, which is not installed")
    defaults = yaml.safe_load((Path(spec.origin).parent / f"cfg/trackers/{name}.yaml").read_text(encoding="utf-8"))
    for key, value in given.items():
        if key not in defaults:
            raise UsageError(f"{name} has no setting {key}: choose from {', '.join(defaults)}")
        kinds = {float: (int, float)}.get(type(defaults[key]), (type(defaults[key]),))
        if type(value) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"{key} is {value!r}: expected {expected}, such as {defaults[key]}")
    settings = defaults | given
    if settings["tracker_type"] != name:
        raise UsageError(f"its tracker_type is {settings['tracker_type']}, but the tracker is {name}")
    if settings.get("with_reid"):
        raise UsageError("with_reid needs the weights of a further model, which is not supported: leave it at false")
    if (method := settings.get("gmc_method", "none")) not in _GMC_METHODS:
        raise UsageError(f"gmc_method is {method}: choose from {', '.join(_GMC_METHODS)}")
    return settings
