"""Folders: which files of a directory are data, and of them which are meant for training.

Where a folder holds structured files (JSON, CSV, Parquet), it is a data set with papers beside it: Markdown, licences and
the like are not data. Files that are named after a split, ``test.jsonl`` or ``validation/0001.parquet``, belong to that one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..log import get_logger
from .rows import JSON_SUFFIXES, TABLE_SUFFIXES
from .wording import shown

logger = get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + TABLE_SUFFIXES
TRAIN, HELD_OUT = "train", "held out"

_PAPERS = re.compile(r"(readme|licen[cs]e|changelog|notice)([-_. ].*)?")
_FACTS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # what ``datasets`` writes beside the data
# Data that is not read, as it is or inside: said of a directory, where nobody would miss it.
_UNREAD = re.compile(
    r".*\.(arrow|feather|orc|avro|xlsx?|ods|ndjson|tar|zip|7z|pkl|npy|npz|(jsonl?|csv|tsv|txt|parquet)\.(gz|bz2|xz|zst|lz4))",
    re.I,
)
_SPLITS = {"train": TRAIN, "training": TRAIN} | dict.fromkeys(
    ("test", "validation", "valid", "val", "dev", "eval", "evaluation"), HELD_OUT
)


def data_files(directory: Path, *, held_out: bool = False) -> list[Path]:
    """The data files below a directory, sorted; hidden files and folders (``.git``, ``.cache``) are not data.

    What is left out is told in one line.

    Args:
        directory: searched with its subdirectories.
        held_out: the files are for evaluation: those named after a test or validation split, if there are any; otherwise all but
            those of the training split, if there are others. For training, test and validation files are left out.

    Raises:
        FileNotFoundError: there are none, or none but those of test and validation splits.
    """
    there = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    there = [path for path in there if not any(part.startswith(".") for part in _inside(path, directory).parts)]
    found = [path for path in there if path.suffix.lower() in SUFFIXES]
    unread = [path for path in there if path.suffix.lower() not in SUFFIXES and _UNREAD.fullmatch(path.name)]
    structured = any(path.suffix.lower() not in TEXT_SUFFIXES for path in found)
    papers, data = _divided(found, lambda path: structured and _is_paper(path))
    if not data:
        beside = f"; {_names(unread, directory)} cannot be read: unpack or convert them" if unread else ""
        raise FileNotFoundError(f"{directory}: holds no {', '.join(SUFFIXES)} file{beside}")
    splits = {path: split_of(_inside(path, directory)) for path in data}
    if held_out and HELD_OUT in splits.values():
        # In a directory that is trained on, too, files without a split's name are what is trained on.
        wanted, others = _divided(data, lambda path: splits[path] == HELD_OUT)
    else:
        others, wanted = _divided(data, lambda path: splits[path] == (TRAIN if held_out else HELD_OUT))
    if not wanted and held_out:
        others, wanted = [], data
    if not wanted:
        raise FileNotFoundError(
            f"{directory}: holds test and validation files only ({_names(others, directory)}); name the files that are to be "
            "trained on, and they are taken all the same"
        )
    of_training = all(splits[path] == TRAIN for path in others)
    what = (
        ("of the training split" if of_training else "not of a test or validation split")
        if held_out
        else "of test or validation splits"
    )
    _tell(directory, {"no data": papers, what: others, "cannot be read: unpack or convert them": unread})
    return wanted


def split_of(path: Path) -> str | None:
    """The split that a file is named after, or a folder that it is in: TRAIN, HELD_OUT or None. ``path`` begins in the data folder."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        # test.jsonl, test-00000-of-00002.parquet, test_sft.json; testimony.jsonl is named after something else
        first = re.split(r"[-_.]", part.lower(), maxsplit=1)[0]
        if first in _SPLITS:
            return _SPLITS[first]
    return None


def _is_paper(path: Path) -> bool:
    name = path.name.lower()
    is_text = path.suffix.lower() in TEXT_SUFFIXES
    state = name == "state.json" and (path.parent / "dataset_info.json").exists()  # of ``save_to_disk``
    return path.suffix.lower() == ".md" or name in _FACTS or state or (is_text and _PAPERS.fullmatch(name) is not None)


def _tell(directory: Path, left_out: Mapping[str, Sequence[Path]]) -> None:
    """By the reason why."""
    parts = [f"{_names(paths, directory)} ({why})" for why, paths in left_out.items() if paths]
    if parts:
        logger.warning("%s: left out %s; a file that is named itself is taken anyway", directory, " and ".join(parts))


def _names(paths: Sequence[Path], directory: Path) -> str:
    return shown([str(_inside(path, directory)) for path in paths])


def _inside(path: Path, directory: Path) -> Path:
    return path.relative_to(directory)


def _divided(paths: Sequence[Path], test: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Those that the test holds for, and the others."""
    held = {path for path in paths if test(path)}
    return [path for path in paths if path in held], [path for path in paths if path not in held]
