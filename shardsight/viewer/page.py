"""Rows of one or more models as one self-contained HTML file."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
import simplejpeg
from pydantic_core import to_json

_SCRIPTS = ("picture.js", "player.js", "viewer.js", "report.js")
_IMPORT = re.compile(r'^import \{[^}]*\} from "[^"]+";\n', re.MULTILINE)
# Nothing is loaded from elsewhere, even if a label or an answer should become markup.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(data: Mapping[str, Any]) -> str:
    """The page that report.js draws.

    data:
        title, subtitle: texts.
        numbers: [{name, value, good}]. good: whether the value is a good one, or None if it is neither.
        errors: [{stage, type, count, examples: [{id, message}]}].
        items: [{picture, problem, rows: [{model, row}]}], one for each picture. picture: a data uri, or None, and then
            the problem says why. row: as in the results. Rows of several models are shown side by side.
            A video has {picture, video, problem, rows: [{model, row, frames}]}. video: a data uri, or None. frames: a
            row for each of its frames, in order; row: the first of them, whose picture it is.
        layers: [{key, name, labels: [[label, count]], scores: 20 counts}], for the histograms; by default counted from
            the items.
        note: a sentence above the pictures.
    """
    return document(data, _SCRIPTS, ("viewer.css",), "report")


def document(data: Mapping[str, Any], scripts: Sequence[str], styles: Sequence[str], start: str) -> str:
    """A self-contained page: scripts and styles of this folder, and `start`, one of their functions, called with the
    data. Each script uses those before it, and no two have a name in common."""
    source = files(__package__)
    script = "\n".join(_IMPORT.sub("", source.joinpath(name).read_text("utf-8")) for name in scripts)
    style = "\n".join(source.joinpath(name).read_text("utf-8") for name in styles)
    # "<" could end the script element, or begin a comment that hides its end.
    rows = to_json(data, inf_nan_mode="null", bytes_mode="base64").decode().replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light dark"><title>{html.escape(data["title"])}</title>
<style>
{style}</style></head><body>
<noscript>This page draws its pictures with JavaScript: allow it.</noscript>
<script type="application/json" id="data">{rows}</script>
<script type="module">
{script}
{start}(JSON.parse(document.getElementById("data").textContent));
</script></body></html>
"""


def thumbnail(frame: np.ndarray, side: int) -> str:
    """An RGB uint8 (H, W, 3) picture, no larger than `side` pixels, as a data uri of a JPEG."""
    height, width = frame.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.ascontiguousarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
    encoded = simplejpeg.encode_jpeg(small, quality=82, colorspace="RGB")
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
