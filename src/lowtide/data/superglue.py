"""SuperGLUE as multiple choice: reading the tasks of the LOMO paper (arXiv 2306.09782, section 4.2) and CB, and splitting them.

Read from the official files (``RTE/train.jsonl``, ``RTE/val.jsonl``; super.gluebenchmark.com) or from the Hugging Face hub. The official
test files have no answers, so what is reported is measured on the validation file, as in the paper. Rates and steps are to be
chosen on ``dev``, a part of the training file that is not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..log import get_logger
from .choices import ChoiceItem, hold_out, sample
from .json_files import json_line_rows
from .superglue_tasks import TASKS, Task

_logger = get_logger(__name__)

HUB_ID = "aps/super_glue"
SPLITS = ("train", "dev", "test")
# Of the training file, held out for choosing settings where it is small.
_DEV_SHARE = 0.2
# BoolQ's training file is missing in some copies: then this share of its validation file is trained on.
_TRAIN_SHARE = 2500 / 3270
# Follows no seed: what is reported must not depend on one.
_SEED_OF_TRAIN_SHARE = 0


@dataclass(frozen=True)
class TaskData:
    """The items of a task.

    Attributes:
        train: to train on.
        dev: of the training file, to choose settings with; not trained on.
        test: of the validation file, to report.
        note: what is unusual about them, or nothing.
    """

    train: list[ChoiceItem]
    dev: list[ChoiceItem]
    test: list[ChoiceItem]
    note: str = ""

    def split(self, name: str) -> list[ChoiceItem]:
        """One of ``SPLITS``."""
        found: list[ChoiceItem] = getattr(self, name)
        return found


def load_superglue(
    name: str,
    source: str | Path | None = None,
    *,
    num_train: int = 1000,
    num_dev: int = 1000,
    num_test: int = 1000,
    seed: int = 0,
) -> TaskData:
    """Training, development and test items of one task.

    Rows that share a passage (BoolQ, MultiRC) or a text (WSC) are never on both sides of a split that is made here, so that these dev
    sets may be a few items smaller than asked for. The dev set follows from ``num_train``, ``num_dev`` and the seed: one that was made
    with others has items that were trained on.

    Args:
        name: a key of ``TASKS``.
        source: a directory with the official files of the task, or with one folder a task; None for the hub.
        num_train, num_dev, num_test: at most so many, drawn by the seed; the paper's are 1000 and 1000.
        seed: of the draw. Where there is no training file, the cut of the validation file does not follow it.

    Raises:
        ValueError: there is no such task, a number is below 1, a file is not in the official layout (with file and line), or there are
            too few examples for the splits.
        FileNotFoundError: there are no such files.
        ConnectionError: the hub cannot be reached.
    """
    if name not in TASKS:
        raise ValueError(f"superglue/{name} is no task; there are {', '.join(f'superglue/{task}' for task in TASKS)}")
    if min(num_train, num_dev, num_test) < 1:
        raise ValueError(f"the numbers of examples must be at least 1, got {num_train}, {num_dev} and {num_test}")
    task, note = TASKS[name], ""
    place, trained, tested = _from_hub(task) if source is None else _from_files(task, Path(source).expanduser())
    if not trained:
        everything = tested
        tested, trained = hold_out(everything, round(_TRAIN_SHARE * len(everything)), _SEED_OF_TRAIN_SHARE)
        note = (
            f"{task.folder} has no training file here: {len(trained)} rows of its validation file are trained on and the other "
            f"{len(tested)} tested, which is not comparable with published figures"
        )
        if not tested:
            raise _too_few(task, place, everything, "there is no train.jsonl, and test, dev and training examples")
        _logger.warning("%s", note)
    rest, dev = _without_dev(task, trained, num_train, num_dev, seed + 1)
    if not rest:
        raise _too_few(task, place, trained, "dev and training examples")
    return TaskData(sample(rest, num_train, seed), dev, sample(tested, num_test, seed), note)


def _without_dev(
    task: Task, items: list[ChoiceItem], num_train: int, num_dev: int, seed: int
) -> tuple[list[ChoiceItem], list[ChoiceItem]]:
    """Items that may be trained on, and the dev set."""
    share, spare = max(1, round(_DEV_SHARE * len(items))), len(items) - num_train
    num_dev = min(num_dev, max(share, spare))
    if not task.shared:
        return hold_out(items, num_dev, seed)
    # A passage of MultiRC has sixty answers: a thousand of a hundred passages say more than all that there are about seventeen.
    rest, held_out = hold_out(items, max(num_dev, min(share, spare)), seed)
    return rest, sample(held_out, num_dev, seed)


def _too_few(task: Task, place: str, items: list[ChoiceItem], wanted: str) -> ValueError:
    """The error for items that cannot be split."""
    number = f"{len(items)} {'example' if len(items) == 1 else 'examples'}"
    among = f" about {len({item.group for item in items})} {task.shared}(s)" if task.shared else ""
    return ValueError(
        f"{place}: {wanted} cannot be made of {number}{among}; add examples{f' of another {task.shared}' if task.shared else ''}"
    )


def _from_files(task: Task, folder: Path) -> tuple[str, list[ChoiceItem], list[ChoiceItem]]:
    """The file that is split, items of the training file (empty if there is none) and of the validation file."""
    found = next((each for each in (folder / task.folder, folder) if (each / "val.jsonl").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds no {task.folder}/val.jsonl and no val.jsonl: name the directory with SuperGLUE's official files"
        )
    train, test = found / "train.jsonl", found / "val.jsonl"
    if not train.is_file():
        return str(test), [], read_file(task, test)
    return str(train), read_file(task, train), read_file(task, test)


def read_file(task: Task, path: Path) -> list[ChoiceItem]:
    """All items of one official file.

    Raises:
        ValueError: a line is not what the task has, or nothing is left; with file and line.
    """
    items: list[ChoiceItem] = []
    what = f"no line of {task.folder} with answers"
    with path.open("rb") as file:
        for row in json_line_rows(path, file, wanted=f"this is {what}"):
            if isinstance(row.content, ValueError):
                raise row.content
            try:
                items += task.read(row.content)
            except ValueError as error:
                raise ValueError(f"{path}:{row.line}: {error}; this is {what}") from None
    if not items:
        raise ValueError(f"{path}: no examples (the file is empty)")
    return items


def _from_hub(task: Task) -> tuple[str, list[ChoiceItem], list[ChoiceItem]]:
    from datasets import load_dataset

    place = f"{HUB_ID} ({task.name})"
    try:
        found = load_dataset(HUB_ID, task.name)
    except Exception as error:  # datasets raises whatever its storage raises
        raise ConnectionError(
            f"{place} cannot be loaded from the Hugging Face hub: {str(error).splitlines()[0] if str(error) else error!r}; "
            "name a directory with the official files"
        ) from error
    items: dict[str, list[ChoiceItem]] = {"train": [], "validation": []}
    for split, ours in items.items():
        for number, row in enumerate(found[split], start=1):
            try:
                ours += task.read(row)
            except ValueError as error:
                raise ValueError(f"{place}, {split}: row {number}: {error}") from None
    return place, items["train"], items["validation"]
