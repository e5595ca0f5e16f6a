"""Inputs → units of work → records of encoded bytes, one bad record never costing another."""

from shardsight.sources.files import ShardFile, open_file
from shardsight.sources.kinds import pictures, read
from shardsight.sources.listing import Listing
from shardsight.sources.metadata import as_json
from shardsight.sources.units import MAX_BYTES, InputError, Record, Unit, absolute, names_video, pack, printable, unpack

__all__ = [
    "MAX_BYTES",
    "InputError",
    "Listing",
    "Record",
    "ShardFile",
    "Unit",
    "absolute",
    "as_json",
    "names_video",
    "open_file",
    "pack",
    "pictures",
    "printable",
    "read",
    "unpack",
]
