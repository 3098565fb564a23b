"""A model that comes out as it went in: its weights are kept in a temporary file, not in memory, and read back.

The file has no name (where the operating system allows that) and vanishes when it is closed, however the process ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from ..units import format_bytes
from .interrupt import StopAfterStep

# Bytes on their way between the device and the disk at a time.
_SLICE_BYTES = 64 * 1024**2


@contextmanager
def restored_afterwards(model: nn.Module, folder: Path) -> Iterator[None]:
    """Whatever happens to the weights, buffers and training modes of ``model`` inside is undone, bit for bit.

    That holds for errors and Ctrl-C, too. Gradients are dropped.

    Args:
        model: on any device; no tensor is replaced, each is overwritten in place.
        folder: where the temporary file is made, as large as the model.

    Raises:
        OSError: the disk has too little room, which is checked first, or fails.
    """
    tensors = _tensors_of(model)
    modes = [(module, module.training) for module in model.modules()]
    _check_room(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    with tempfile.TemporaryFile(dir=folder, prefix=".lowtide-") as file:
        for tensor in tensors:
            _write(tensor, file)
        try:
            yield
        finally:
            # A Ctrl-C that comes now waits until the model is whole again.
            with StopAfterStep() as stop:
                file.seek(0)
                for tensor in tensors:
                    _read(tensor, file)
                for module, training in modes:
                    module.training = training
                for param in model.parameters():
                    param.grad = None
            if stop.requested:
                raise KeyboardInterrupt


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, shared ones once."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the model's weights are kept in a temporary file of {format_bytes(needed)} meanwhile, but the disk of "
            f"{folder} has {format_bytes(free)} left",
        )


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of a contiguous tensor, of bounded size; a copy of the whole of any other."""
    flat = tensor.reshape(-1)
    return iter(flat.split(max(1, _SLICE_BYTES // tensor.element_size())))


def _write(tensor: Tensor, file: IO[bytes]) -> None:
    for piece in _pieces(tensor):
        file.write(piece.cpu().view(torch.uint8).numpy().data)


def _read(tensor: Tensor, file: IO[bytes]) -> None:
    target = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for piece in _pieces(target):
        buffer = bytearray(piece.numel() * piece.element_size())
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise OSError("the temporary file with the model's weights is cut short")
        if buffer:
            piece.copy_(torch.frombuffer(buffer, dtype=torch.uint8).view(piece.dtype))
    if target is not tensor:
        tensor.copy_(target)
