"""Lists of paths and uris: one a line, a column of CSV, or a value of JSON a line."""

import csv
import io
import json
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterator
from typing import Any

from shardsight.sources.units import InputError
from shardsight.storage import Storage

URI_COLUMNS = ("uri", "url", "path", "file", "image")  # the first that is there
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\v\0"))  # characters that text files do not hold


def read_list(uri: str, storage: Storage, column: str | None, ignored: "Counter[str]") -> Iterator[str]:
    """The paths and uris as they are written.

    Empty lines are skipped, and entries without a path or uri are counted in `ignored`. Raises InputError if the file
    is no such list: not text, not in the format of its ending, or without a path or uri in its first entry.
    """
    with storage.open(uri) as file:
        head = file.read(1 << 12)
        file.seek(0)
        # surrogateescape, as file names in Linux are bytes, which need not be UTF-8.
        encoding = "utf-16" if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
        if encoding != "utf-16" and (head.translate(None, _CONTROL) != head or head.count(0) > len(head) // 10):
            raise InputError(f"{uri} is no text: write paths or uris, one a line, in UTF-8")
        ending = uri.rpartition(".")[2].lower()
        newline = "" if ending == "csv" else "\n"
        errors = "replace" if encoding == "utf-16" else "surrogateescape"
        text = io.TextIOWrapper(file, encoding, errors, newline=newline)
        if ending == "txt":
            yield from filter(None, map(str.strip, text))
            return
        begun = False
        for number, row in _rows_of_csv(uri, text) if ending == "csv" else _rows_of_json(uri, text):
            entry = row if isinstance(row, str) else _entry(row, column)
            if entry:
                begun = True
                yield entry
            elif begun:
                ignored[f"entries of {uri.rpartition('/')[2]} without a path or uri"] += 1
            else:
                raise InputError(_expected(uri, number, row, column))


def _rows_of_csv(uri: str, text: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """(line number, row by column)"""
    reader = csv.DictReader(text, strict=True)
    while True:
        limit = csv.field_size_limit(sys.maxsize)  # applies to the whole process, and is therefore restored below
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{uri} is not CSV in line {reader.line_num}: {error}") from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        yield reader.line_num, row


def _rows_of_json(uri: str, text: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """(line number, value); the value is None for a line that is not JSON, unless it is the first."""
    begun = False
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not begun:
                raise InputError(f"{uri} is not JSON, one value a line: line {number}: {error}") from None
            row = None
        begun = True
        yield number, row


def _entry(row: Any, column: str | None) -> str | None:
    if not isinstance(row, dict):
        return None
    names = (column,) if column else URI_COLUMNS
    return next((row[name].strip() for name in names if isinstance(row.get(name), str)), None)


def _expected(uri: str, line: int, row: Any, column: str | None) -> str:
    if not isinstance(row, dict):
        given = {list: "an array", type(None): "null", bool: "a truth value"}.get(type(row), "a number")
        return f'{uri} has {given} in line {line}, where a path as "text" or an object with one was expected'
    wanted = column or ", ".join(URI_COLUMNS)
    names = [str(name) for name in row if name is not None]
    if not set(names) & {*((column,) if column else URI_COLUMNS)}:
        where = "in its first line" if uri.lower().endswith(".csv") else f"in line {line}"
        return f"{uri} has no column {wanted} {where}, but {', '.join(names)}: name it with --uri-column"
    return f"{uri} has no path or uri in line {line}, in a column {wanted}"
