"""Columns of Arrow tables from anywhere: which one holds the pictures, and cells as Python has them."""

from typing import Any

import pyarrow as pa

from shardsight.row import Failure

# Of several columns of bytes, the one of such a name holds the pictures; `image` comes before the others.
KNOWN = {
    *("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes"),
    *("image_bytes", "img_bytes", "image_data", "encoded_image"),
}


def image_field(schema: pa.Schema, uri_column: str | None, image_column: str | None) -> pa.Field:
    """The column of encoded pictures, as bytes or {bytes, path}; or of uris, where such a one is named. Raises
    Failure."""
    named = uri_column or image_column
    if named:
        return _named(schema, named, uri_column is not None)
    found = [field for field in schema if _is_bytes(field.type) or _is_struct(field.type)]
    known = [field for field in found if field.name.lower() in KNOWN]
    known = [field for field in known if field.name == "image"] or known
    found = known if len(known) == 1 else found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(field.name for field in found)
        reason = f"several columns hold bytes ({names}): name the one of the pictures with --image-column"
    elif "image" in schema.names:
        given = ", ".join(str(field.type) for field in schema if field.name == "image")
        reason = f"column image is {given}, where bytes or {{bytes, path}} were expected"
        reason += ": if it lists uris, name it with --uri-column"
    else:
        reason = f"no column of bytes or {{bytes, path}} among {', '.join(schema.names)}"
        reason += ": if one lists uris, name it with --uri-column"
    raise Failure("NoImageColumn", reason)


def _named(schema: pa.Schema, name: str, uris: bool) -> pa.Field:
    fields = [field for field in schema if field.name == name]
    if not fields:
        raise Failure("NoImageColumn", f"no column {name} among {', '.join(schema.names)}")
    for field in fields:
        fixed = pa.types.is_fixed_size_binary(_bare(field.type))
        if _is_text(field.type) if uris else _is_bytes(field.type) or _is_struct(field.type) or fixed:
            return field
    expected = "text" if uris else "bytes or {bytes, path}"
    raise Failure("NoImageColumn", f"column {name} is {fields[0].type}, where {expected} was expected")


def _bare(type: pa.DataType) -> pa.DataType:
    """Without dictionaries and extensions around it."""
    while pa.types.is_dictionary(type) or isinstance(type, pa.BaseExtensionType):
        type = type.value_type if pa.types.is_dictionary(type) else type.storage_type
    return type


def _is_text(type: pa.DataType) -> bool:
    types = pa.types
    return any(is_it(_bare(type)) for is_it in (types.is_string, types.is_large_string, types.is_string_view))


def _is_bytes(type: pa.DataType) -> bool:
    types = pa.types
    return any(is_it(_bare(type)) for is_it in (types.is_binary, types.is_large_binary, types.is_binary_view))


def _is_struct(type: pa.DataType) -> bool:
    bare = _bare(type)
    return pa.types.is_struct(bare) and any(field.name == "bytes" and _is_bytes(field.type) for field in bare)


def values(column: pa.Array) -> list[Any]:
    """Cells as Python has them; what Python has no form for as text."""
    try:
        return column.to_pylist()
    except Exception:  # of whatever kind, as one cell must not cost the others
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    if not cell.is_valid:
        return None
    if isinstance(cell, pa.ExtensionScalar | pa.DictionaryScalar):
        return _value(cell.value)
    if isinstance(cell, pa.StructScalar):
        fields = list(cell.type)
        return {fields[index].name: _value(cell[index]) for index in range(len(fields))}
    if isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar | pa.MapScalar):
        return [_value(entry) for entry in cell.values]
    try:
        return cell.as_py()
    except Exception:
        return _text(cell)


def _text(cell: pa.Scalar) -> str | None:
    """What Python has no form for: text that is no UTF-8, dates beyond its years, time zones that are none."""
    try:
        if _is_text(cell.type):
            return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        if pa.types.is_timestamp(cell.type) and cell.type.tz:
            utc = pa.scalar(cell.value, pa.timestamp(cell.type.unit))
            return f"{utc.cast(pa.string()).as_py()} UTC"
        return str(cell.cast(pa.string()).as_py())
    except Exception:
        return None
