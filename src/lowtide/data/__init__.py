"""Data: files become records (as written), records become examples (tokens with labels), examples become batches."""

from .batches import Batches, pack_lengths, split_held_out
from .record import Record
from .records import Source, read_records, read_sources
from .tokens import Example, TokenStats, as_completion, encode_records

__all__ = [
    "Batches",
    "Example",
    "Record",
    "Source",
    "TokenStats",
    "as_completion",
    "encode_records",
    "pack_lengths",
    "read_records",
    "read_sources",
    "split_held_out",
]
