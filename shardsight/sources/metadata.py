"""What stands beside a picture, as JSON."""

import base64
import json
from typing import Any

MAX_BINARY = 1 << 10  # bytes that metadata holds as base64; of more it holds their number
MAX_TEXT = 16 << 20  # characters, likewise


def as_json(value: Any) -> str:
    """JSON that any parser takes."""
    return dumps(plain(value))


def dumps(value: Any) -> str:
    """`value` as of `plain`."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def plain(value: Any) -> Any:
    """A value as JSON has it: null for NaN and infinities, base64 for up to 1 KiB of bytes, `(N bytes)` for more, and
    text for whatever else JSON has no form for."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN is not less either
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode() if len(value) <= MAX_BINARY else f"({len(value):,} bytes)"
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"({len(text):,} characters)"
