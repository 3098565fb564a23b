"""Checkpoints on disk: a directory each, which is a model that plain transformers opens, and holds what a run needs to go on.

    OUTPUT/checkpoints/step-00000100/
        model.safetensors, config.json, tokenizer.json, ...
        adapter/                         with LoRA: the adapters, as peft saves them; the model is the one without
        training/optimizer.safetensors   tensors of the optimizer state, by parameter name
        training/state.json              everything else
        training/manifest.json           size and SHA-256 of every file

A checkpoint is written beside its place, made durable, and only then given its name; the manifest comes last. So whatever has the
name ``step-...`` was whole once, and the manifest tells whether it still is. Nothing is ever written into one again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..log import get_logger
from ..models.lazy import SafetensorsWeights
from ..models.saving import flush_tree, written_beside
from ..weights.direct_io import flush_directory
from ..weights.safetensors_file import sha256_of, write_file

_logger = get_logger(__name__)

FOLDER = "checkpoints"  # in the output directory
FORMAT = 1  # of state.json and manifest.json
_TRAINING, _OPTIMIZER, _STATE, _MANIFEST = "training", "optimizer.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


class CorruptCheckpointError(ValueError):
    """A checkpoint is not what was written: torn, cut short, or changed since."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been checked.

    Attributes:
        path: its directory, which is a model directory.
        state: what was in ``state.json``.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that had been taken."""
        return int(self.state["step"])

    def optimizer_tensors(self) -> dict[str, Callable[[], Tensor]]:
        """What loads each tensor of the optimizer state."""
        weights = SafetensorsWeights([self.path / _TRAINING / _OPTIMIZER])
        return {name: partial(weights, name) for name in sorted(weights.names)}


def write_checkpoint(
    folder: Path,
    step: int,
    write_model: Callable[[Path], Mapping[str, str]],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tensor_of: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write a checkpoint and make it durable.

    Args:
        folder: of all checkpoints; it is made if need be.
        step: steps taken.
        write_model: writes the model's files into an empty directory; returns the SHA-256 of those it knows.
        optimizer: tensors of the optimizer state, on any device, as :func:`in_file_order` has them.
        state: everything else, as JSON can hold it.
        tensor_of: gives each of them as a whole, asked for in that order; None where they are.

    Returns:
        Its directory.

    Raises:
        OSError: the disk is full or failed. Nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08}"
    with written_beside(target) as temporary:
        digests = dict(write_model(temporary))
        training = temporary / _TRAINING
        training.mkdir()
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in optimizer.items()]
        tensors = map(tensor_of or optimizer.__getitem__, optimizer)
        digests[f"{_TRAINING}/{_OPTIMIZER}"] = write_file(training / _OPTIMIZER, entries, tensors)
        (training / _STATE).write_text(json.dumps({"format": FORMAT, **state}), encoding="utf-8")
        files = {
            name: {"bytes": path.stat().st_size, "sha256": digests.get(name) or sha256_of(path)}
            for name, path in sorted(_files_of(temporary).items())
        }
        text = json.dumps({"format": FORMAT, "files": files}, indent=1)
        (training / _MANIFEST).write_text(text + "\n", encoding="utf-8")
        flush_tree(temporary)
        if target.exists():  # a run that went back to an earlier checkpoint
            set_aside(target)
    return target


def in_file_order(optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Large elements first, so that every tensor in the file is aligned."""
    return dict(sorted(optimizer.items(), key=lambda item: -item[1].dtype.itemsize))


def read_unchecked(path: Path) -> Checkpoint | None:
    """One that another rank has checked; None if it is not seen from here."""
    if not (path / _TRAINING / _STATE).is_file():
        return None
    return Checkpoint(path, json.loads((path / _TRAINING / _STATE).read_text(encoding="utf-8")))


def read_checkpoint(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint, and read its state.

    Raises:
        CorruptCheckpointError: it is not what was written; the message names the first file that is not.
        FileNotFoundError: there is no checkpoint.
    """
    manifest_path = path / _TRAINING / _MANIFEST
    if not (path.is_dir() and manifest_path.is_file()):
        raise FileNotFoundError(f"{path} is no checkpoint of lowtide: it has no {_TRAINING}/{_MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        form, files = manifest["format"], dict(manifest["files"])
        expected = {_safe(path, name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{manifest_path} is damaged: {error}") from error
    if form != FORMAT:
        raise ValueError(
            f"{path} was written in format {form} of checkpoints, and this version of lowtide reads {FORMAT}"
        )
    _check_files(path, expected)
    state = json.loads((path / _TRAINING / _STATE).read_text(encoding="utf-8"))
    return Checkpoint(path, state)


def _safe(path: Path, name: str) -> Path:
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"it names the file {name!r}, which lies elsewhere")
    return path / name


def _check_files(path: Path, expected: Mapping[Path, tuple[int, str]]) -> None:
    for file, (num_bytes, _) in expected.items():
        if not file.is_file():
            raise CorruptCheckpointError(f"{path} is torn: {file.relative_to(path)} is missing")
        if file.stat().st_size != num_bytes:
            found = file.stat().st_size
            raise CorruptCheckpointError(
                f"{path} is torn: {file.relative_to(path)} has {found} bytes instead of {num_bytes}"
            )
    with ThreadPoolExecutor(2, "lowtide-check") as pool:
        for file, digest in zip(expected, pool.map(sha256_of, expected), strict=True):
            if digest != expected[file][1]:
                raise CorruptCheckpointError(
                    f"{path} is corrupt: {file.relative_to(path)} is not what was written (its SHA-256 differs)"
                )


def list_checkpoints(folder: Path) -> list[Path]:
    """Directories that have the name of a checkpoint, newest first; unchecked."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """Steps taken, of one of :func:`list_checkpoints`."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest one that is whole. Each one that is not is named, set aside (``step-....corrupt``), and passed over."""
    for path in list_checkpoints(folder):
        try:
            return read_checkpoint(path)
        except (CorruptCheckpointError, FileNotFoundError) as error:
            kept = set_aside(path, "corrupt")
            _logger.warning("%s; it is kept as %s and passed over", error, kept.name)
    return None


def set_aside(path: Path, why: str = "replaced") -> Path:
    """Give a checkpoint a name that is not looked for."""
    names = (path.with_name(f"{path.name}.{why}{'' if n == 0 else f'-{n}'}") for n in range(10**6))
    target = next(name for name in names if not name.exists())
    path.rename(target)
    flush_directory(path.parent)
    return target


def keep_newest(folder: Path, count: int) -> None:
    """Delete all checkpoints but the newest ``count``. One that is half deleted has no checkpoint's name."""
    for path in list_checkpoints(folder)[count:]:
        doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that was killed left half written or half deleted in a directory."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if re.fullmatch(r"\.(step-\d{8,}|model|adapter)\.\d+\.(tmp|old)", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _files_of(directory: Path) -> dict[str, Path]:
    return {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
