"""What stands beside a picture, in a tar's sample or a Parquet row, as JSON."""

import base64
import json
from typing import Any

import pyarrow as pa

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
        return value if abs(value) < float("inf") else None  # false for NaN, too
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode() if len(value) <= MAX_BINARY else f"({len(value):,} bytes)"
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"({len(text):,} characters)"


def values(column: pa.Array) -> list[Any]:
    """The cells of an Arrow column as Python's values, as text what Python has no type for."""
    try:
        return column.to_pylist()
    except Exception:  # of any kind; one such cell must not cost the others
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    if not cell.is_valid:
        return None
    if isinstance(cell, pa.ExtensionScalar | pa.DictionaryScalar):
        return _value(cell.value)
    if isinstance(cell, pa.StructScalar):
        return {field.name: _value(cell[index]) for index, field in enumerate(cell.type)}
    if isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar | pa.MapScalar):
        return [_value(entry) for entry in cell.values]
    try:
        return cell.as_py()
    except Exception:
        return _text(cell)


def _text(cell: pa.Scalar) -> str | None:
    """Of text that is not UTF-8, dates outside of Python's years, and unknown time zones."""
    try:
        if isinstance(cell, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
            return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        if pa.types.is_timestamp(cell.type) and cell.type.tz:
            utc = pa.scalar(cell.value, pa.timestamp(cell.type.unit))
            return f"{utc.cast(pa.string()).as_py()} UTC"
        return str(cell.cast(pa.string()).as_py())
    except Exception:
        return None
