"""What the demo trains on and is tested on: characters and their kinds, or a file of the user's own."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..data import Record, read_records, split_held_out
from ..data.character_kinds import KINDS, make_split

NUM_HELD_OUT = 400
# A prompt/completion file with at most so many different completions is a multiple choice, scored by accuracy.
_MOST_CHOICES = 20
# Held-out text beyond this would take longer to score than to train on.
_HELD_OUT_CHARACTERS = 40_000
_HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Material:
    """Training and held-out data, in memory and in files.

    Attributes:
        title: what it is, in a few words.
        held_out_note: what is held out, in one sentence.
        train_file: JSONL to train on.
        held_out_file: JSONL that is held out.
        held_out: the records of ``held_out_file``.
        choices: the possible completions if the score is an accuracy, else nothing.
        num_train: records to train on.
    """

    title: str
    held_out_note: str
    train_file: Path
    held_out_file: Path
    held_out: list[Record]
    choices: tuple[str, ...]
    num_train: int


def character_material(directory: Path, num_train: int, seed: int) -> Material:
    """The demo's own material, written to ``directory``."""
    train, held_out = make_split(num_train, NUM_HELD_OUT, seed)
    num_families = len({character.family for character in held_out})
    note = (
        f"{len(held_out)} characters, as many of each kind, whose names begin with one of {num_families} words "
        "(most of them scripts) that no name in the training data begins with"
    )
    files = [directory / "train.jsonl", directory / "held_out.jsonl"]
    for file, characters in zip(files, (train, held_out), strict=True):
        _write_rows(file, [character.row() for character in characters])
    return Material(
        title=f"kinds of Unicode {unicodedata.unidata_version} characters, to be told from their names "
        f"({', '.join(KINDS)}; Python's module unicodedata)",
        held_out_note=note,
        train_file=files[0],
        held_out_file=files[1],
        held_out=read_records(files[1]),
        choices=tuple(f" {kind}" for kind in KINDS),
        num_train=len(train),
    )


def own_material(data: str, directory: Path, seed: int) -> Material:
    """A user's file, split into two files in ``directory``.

    Raises:
        FileNotFoundError, ValueError: as ``read_records``; or there is too little to hold a part out.
    """
    records = read_records(data)
    train, held_out, note = _split(records, data, seed)
    files = [directory / "train.jsonl", directory / "held_out.jsonl"]
    for file, some in zip(files, (train, held_out), strict=True):
        _write_rows(file, [_row(record) for record in some])
    return Material(
        title=f"{len(records)} records of {data}" if len(records) > 1 else data,
        held_out_note=note,
        train_file=files[0],
        held_out_file=files[1],
        held_out=held_out,
        choices=_choices(records),
        num_train=len(train),
    )


def _split(records: list[Record], data: str, seed: int) -> tuple[list[Record], list[Record], str]:
    """(training, held out, what is held out)."""
    few_texts = records[0].text is not None and len(records) < 10
    if few_texts:
        train, held_out = map(list, zip(*(_cut_text(record) for record in records), strict=True))
        note = f"the last {_HELD_OUT_SHARE:.0%} of the text"
    else:
        fraction = min(_HELD_OUT_SHARE * 2, max(NUM_HELD_OUT / len(records), 1e-9))
        train, held_out = split_held_out(records, fraction, seed)
        note = f"{len(held_out)} of the {len(records)} records of {data}, drawn at random"
    if held_out[0].text is not None:
        held_out = _shortened(held_out)
    return train, held_out, note


def _cut_text(record: Record) -> tuple[Record, Record]:
    """Everything but the end, and the end, cut between lines or at least between words where there are any."""
    text = record.text or ""
    at = int(len(text) * (1 - _HELD_OUT_SHARE))
    for separator in ("\n", " "):
        found = text.find(separator, at)
        if 0 <= found < len(text) - 1:
            at = found + 1
            break
    parts = text[:at], text[at:]
    if not all(part.strip() for part in parts):
        raise ValueError(f"{record.where}: the text is too short to hold a part of it out; give more of it")
    train, held_out = (dataclasses.replace(record, text=part) for part in parts)
    return train, held_out


def _shortened(records: list[Record]) -> list[Record]:
    """The beginnings of the texts, about ``_HELD_OUT_CHARACTERS`` in all."""
    kept, room = [], _HELD_OUT_CHARACTERS
    for record in records:
        text = (record.text or "")[:room]
        if text.strip():
            kept.append(dataclasses.replace(record, text=text))
        room -= len(text)
        if room <= 0:
            break
    return kept


def _choices(records: list[Record]) -> tuple[str, ...]:
    completions = {record.completion for record in records if record.completion is not None}
    is_choice = 2 <= len(completions) <= min(_MOST_CHOICES, len(records) // 2)
    return tuple(sorted(completions)) if is_choice else ()


def _row(record: Record) -> dict[str, object]:
    if record.instruction is not None and record.messages is not None:
        instruction, context = record.instruction
        return {"instruction": instruction, "input": context, "output": record.messages[-1]["content"]}
    keys = ("text", "messages", "prompt", "completion")
    return {key: getattr(record, key) for key in keys if getattr(record, key) is not None}


def _write_rows(file: Path, rows: Sequence[dict[str, object]] | Sequence[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("x", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
