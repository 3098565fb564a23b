"""Data: files become records (as written), records become examples (tokens with labels), examples become batches."""

from .batches import Batches, pack_lengths, split_held_out
from .records import Record, read_records
from .tokens import Example, TokenStats, encode_records

__all__ = [
    "Batches",
    "Example",
    "Record",
    "TokenStats",
    "encode_records",
    "pack_lengths",
    "read_records",
    "split_held_out",
]
