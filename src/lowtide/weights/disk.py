"""The store on disk: a working copy of the weights, one safetensors file a block, read and written past the page cache.

The user's own files are never opened for writing. Free space is checked, and then reserved, before the first block is written.
Each file is ``block-00000.safetensors``, with its data beginning at a page, so that a block is one read or one write.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..log import get_logger
from ..units import format_bytes
from .direct_io import DirectFile, flush_directory, reserve
from .layout import PAGE_BYTES, BlockLayout, aligned_buffer
from .safetensors_file import Entry, encode_header
from .staging import Staging
from .working_copy import COMPLETE, WorkingCopy

_logger = get_logger(__name__)

_KEPT_FREE_BYTES = 64 * 1024**2  # of the disk


class DiskStore:
    """Blocks in the files of a directory.

    Args:
        directory: new or empty.
        device: where the blocks are computed; with a GPU they go through a few pinned buffers.

    Raises:
        TornWorkingCopyError, FileExistsError, OSError: see :class:`lowtide.weights.working_copy.WorkingCopy`.
    """

    kind = "disk"

    def __init__(self, directory: str | os.PathLike[str], device: torch.device) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self._copy = WorkingCopy(self.directory)
        self._layouts: list[BlockLayout] = []
        self._files: list[DirectFile] = []
        self._starts: list[int] = []  # of the data in the file, behind the header
        self._staging = Staging(device) if device.type != "cpu" else None
        self.bytes_read = self.bytes_written = 0

    def adopt(self, layouts: Sequence[BlockLayout], value_of: Callable[[str, Tensor], Tensor]) -> None:
        """Write the initial values, block by block. The parameters are not changed.

        Raises:
            OSError: the disk has too little room, or fails. Nothing of the copy is left behind then.
        """
        try:
            self._check_room(layouts)
            size = max(layout.num_bytes for layout in layouts)
            buffers = [aligned_buffer(size, torch.device("cpu")) for _ in range(2)]  # one is filled, one written
            pending: list[Future[None]] = []
            with ThreadPoolExecutor(1, "lowtide-adopt") as thread:
                for number, layout in enumerate(layouts):
                    if number >= 2:
                        pending[number - 2].result()
                    buffer = buffers[number % 2][: layout.num_bytes]
                    values = (value_of(p.name, param) for p, param in zip(layout.pieces, layout.params, strict=True))
                    layout.fill(buffer, values)
                    buffer[layout.used_bytes :] = 0
                    pending.append(thread.submit(self._add, layout, buffer))
                for future in pending[-2:]:
                    future.result()
            flush_directory(self.directory)
        except BaseException:
            self._close_files()
            self._copy.discard()
            raise

    def _check_room(self, layouts: Sequence[BlockLayout]) -> None:
        needed = sum(layout.num_bytes + PAGE_BYTES for layout in layouts)
        free = shutil.disk_usage(self.directory).free
        if needed + _KEPT_FREE_BYTES > free:
            raise OSError(
                f"the working copy of the weights takes {format_bytes(needed)}, but the disk of {self.directory} has "
                f"{format_bytes(free)} left: free some, or name a directory on another disk"
            )

    def _add(self, layout: BlockLayout, data: Tensor) -> None:
        path = self.directory / f"block-{len(self._layouts):05}.safetensors"
        header = _header(layout)
        reserve(path, len(header) + layout.num_bytes)
        with path.open("r+b") as plain:
            plain.write(header)
            os.fsync(plain.fileno())
        file = DirectFile(path)
        self._layouts.append(layout)
        self._files.append(file)
        self._starts.append(len(header))
        file.write(data, len(header))
        self.bytes_written += layout.num_bytes

    def reader(self, number: int, target: Tensor) -> Callable[[], None]:
        """See :class:`lowtide.weights.streamed.Store`."""
        return lambda: self._read(number, target)

    def writer(self, number: int, source: Tensor) -> Callable[[], None]:
        """See :class:`lowtide.weights.streamed.Store`."""
        return lambda: self._write(number, source)

    def _read(self, number: int, target: Tensor) -> None:
        if self._staging is None:
            self._files[number].read(target, self._starts[number])
        else:
            self._staging.read(self._files[number], self._starts[number], target)
        self.bytes_read += target.numel()

    def _write(self, number: int, source: Tensor) -> None:
        if self._staging is None:
            self._files[number].write(source, self._starts[number])
        else:
            self._staging.write(self._files[number], self._starts[number], source)
        self.bytes_written += source.numel()

    def tensors(self, number: int) -> list[Tensor]:
        """Mapped from the file; to be read only."""
        return self._mapped(number, mmap.MAP_SHARED, mmap.PROT_READ)

    def detach(self, number: int) -> list[Tensor]:
        """Mapped from the file, copy on write: the file does not change, but must stay as long as the model is used."""
        return self._mapped(number, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)

    def _mapped(self, number: int, flags: int, protection: int) -> list[Tensor]:
        layout, start = self._layouts[number], self._starts[number]
        with self._files[number].path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), start + layout.num_bytes, flags=flags, prot=protection)
        return [_view(mapped, start + piece.offset, piece.shape, piece.dtype) for piece in layout.pieces]

    def load(self, number: int) -> list[Tensor]:
        """See :class:`lowtide.weights.streamed.Store`."""
        buffer = aligned_buffer(self._layouts[number].num_bytes, torch.device("cpu"))
        self._files[number].read(buffer, self._starts[number])
        return [piece.view(buffer) for piece in self._layouts[number].pieces]

    def stored(self, number: int) -> tuple[Path, int, int] | None:
        """See :class:`lowtide.weights.streamed.Store`."""
        return self._files[number].path, self._starts[number], self._layouts[number].num_bytes

    def flush(self) -> None:
        """Everything is on the disk, and the copy is whole: say so in its marker."""
        for file in self._files:
            file.flush()
        self._copy.mark(COMPLETE)

    def close(self) -> None:
        """Close the files. What is in them stays."""
        self._close_files()
        self._copy.close()

    def discard(self) -> None:
        """Remove the files; parameters that were mapped from them keep them alive where the system allows that."""
        self._close_files()
        self._copy.discard()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()


def _header(layout: BlockLayout) -> bytes:
    """The header of a safetensors file, padded so that the data begins at a page. The padding behind is a tensor, too."""
    entries: list[Entry] = [(piece.name, piece.dtype, piece.shape) for piece in layout.pieces]
    if layout.num_bytes > layout.used_bytes:
        entries.append(("__padding__", torch.uint8, [layout.num_bytes - layout.used_bytes]))
    return encode_header(entries, align=PAGE_BYTES)


def _view(mapped: mmap.mmap, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    import warnings

    with warnings.catch_warnings():  # that a read-only map is not writable: nobody writes
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
