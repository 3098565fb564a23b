"""Data: files become records (as written), records become examples (tokens with labels), examples become batches."""

from .batches import Batches, pack_lengths, split_held_out
from .choices import ChoiceItem, as_records, majority_share
from .encoding import TokenStats, encode_records
from .record import Record
from .records import Source, read_records, read_sources
from .superglue import TaskData, load_superglue
from .superglue_tasks import TASKS
from .tokens import Example, as_completion

__all__ = [
    "TASKS",
    "Batches",
    "ChoiceItem",
    "Example",
    "Record",
    "Source",
    "TaskData",
    "TokenStats",
    "as_completion",
    "as_records",
    "encode_records",
    "load_superglue",
    "majority_share",
    "pack_lengths",
    "read_records",
    "read_sources",
    "split_held_out",
]
