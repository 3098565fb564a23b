"""Data: files become records (as written), records become examples (tokens with labels), examples become batches."""

from .batches import Batches, pack_lengths, split_held_out
from .choices import ChoiceItem, as_records, majority_share
from .records import Record, read_records
from .superglue import TASKS, TaskData, load_superglue
from .tokens import Example, TokenStats, encode_records

__all__ = [
    "TASKS",
    "Batches",
    "ChoiceItem",
    "Example",
    "Record",
    "TaskData",
    "TokenStats",
    "as_records",
    "encode_records",
    "load_superglue",
    "majority_share",
    "pack_lengths",
    "read_records",
    "split_held_out",
]
