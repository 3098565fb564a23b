"""Writing safetensors files in one pass: the header first, then every tensor from where it is, in bounded pieces.

The room is reserved before the first byte, so that a full disk shows at once. While one piece is on its way to the disk and
into the checksum, the next one is copied; the page cache is left to the user.

Format: https://github.com/huggingface/safetensors, 8 bytes of length, a header in JSON, the data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cloning import clone_range
from .direct_io import DirectFile, reserve
from .layout import PAGE_BYTES, aligned_buffer

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_BUFFER_BYTES = 16 * 1024**2  # of each of two
_READ_BYTES = 8 * 1024**2
_MODE = 0o666  # of saved models, less what the umask takes away

Entry = tuple[str, torch.dtype, Sequence[int]]  # name, dtype and shape of a tensor
Stored = tuple[Path, int, int]  # a file, the place of the first byte there, the number of bytes


def encode_header(entries: Iterable[Entry], align: int = 8) -> bytes:
    """The header of a file whose tensors follow in this order, filled up with spaces to a multiple of ``align`` bytes.

    Raises:
        ValueError: a dtype that the format does not have, or tensors in an order in which one would not be aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is of {dtype}, which safetensors files cannot hold")
        if offset % dtype.itemsize:
            raise ValueError(f"{name} would not be aligned in the file: larger dtypes must come first")
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    total = -(-(len(text) + 8) // align) * align
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


class StreamedFile:
    """A new file of known size that is written from its beginning to its end.

    Args:
        path: of the file, which does not exist.
        num_bytes: of the whole file.

    Raises:
        FileExistsError: there is such a file.
        OSError: the disk is full.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        reserve(path, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES, _MODE)
        self._file = DirectFile(path)
        self._digest = hashlib.sha256()
        self._buffers = [aligned_buffer(_BUFFER_BYTES, torch.device("cpu")) for _ in range(2)]
        self._pending: list[list[Future[None]]] = [[], []]  # of each buffer
        self._threads = [ThreadPoolExecutor(1, f"lowtide-save-{what}") for what in ("disk", "checksum")]
        self._current, self._filled, self._written = 0, 0, 0

    def write(self, tensor: Tensor) -> None:
        """Append the bytes of a tensor, which may be on any device.

        Raises:
            OSError: the disk failed.
        """
        flat = tensor.detach().contiguous().view(-1)
        rest = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
        while rest.numel():
            count = min(rest.numel(), _BUFFER_BYTES - self._filled)
            self._buffers[self._current][self._filled : self._filled + count].copy_(rest[:count])
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == _BUFFER_BYTES:
                self._send()

    def _send(self) -> None:
        buffer, count, offset = self._buffers[self._current], self._filled, self._written
        whole_pages = -(-count // PAGE_BYTES) * PAGE_BYTES  # only the last piece of a file is filled up
        disk, checksum = self._threads
        self._pending[self._current] = [
            disk.submit(self._file.write, buffer[:whole_pages], offset),
            checksum.submit(self._digest.update, memoryview(buffer[:count].numpy().data)),
        ]
        self._written, self._filled, self._current = offset + count, 0, 1 - self._current
        self._wait(self._current)

    def _wait(self, number: int) -> None:
        for future in self._pending[number]:
            future.result()
        self._pending[number] = []

    def finish(self) -> str:
        """Everything is on the disk. Returns the SHA-256 of the file, in hexadecimal digits.

        Raises:
            OSError: the disk failed.
            ValueError: other than ``num_bytes`` were written.
        """
        if self._filled:
            self._send()
        for number in range(2):
            self._wait(number)
        if self._written != self.num_bytes:
            raise ValueError(f"{self.path} was to have {self.num_bytes} bytes, and {self._written} were written")
        os.truncate(self.path, self.num_bytes)
        self._file.flush()
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop, finished or not; calling it twice does no harm."""
        for thread in self._threads:
            thread.shutdown(wait=True)
        self._file.close()
        self._buffers = []


def write_file(path: Path, entries: Sequence[Entry], pieces: Iterable[Tensor]) -> str:
    """Write a safetensors file.

    Args:
        path: of the file, which does not exist.
        entries: name, dtype and shape of every tensor, larger dtypes first.
        pieces: tensors whose bytes are those of all of these, one after the other, cut in any way. Each is asked for when the one
            before it has been copied and dropped.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: the disk is full or failed.
        ValueError: the pieces have more or fewer bytes.
    """
    header = encode_header(entries)
    size = len(header) + sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in entries)
    file = StreamedFile(path, size)
    try:
        file.write(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        iterator = iter(pieces)
        while (piece := next(iterator, None)) is not None:
            file.write(piece)
            del piece
        return file.finish()
    finally:
        file.close()


def read_pieces(stored: Stored, num_bytes: int) -> Iterator[Tensor]:
    """The bytes that lie in a file, in pieces of bounded size (uint8), each valid until the next is asked for.

    Args:
        stored: the file, the place of the first byte, and the number of bytes, in whole pages.
        num_bytes: so many of them.
    """
    path, offset, padded = stored
    buffer, file = aligned_buffer(min(_BUFFER_BYTES, padded), torch.device("cpu")), DirectFile(path)
    try:
        for start in range(0, padded, _BUFFER_BYTES):
            count = min(_BUFFER_BYTES, padded - start)
            file.read(buffer[:count], offset + start)
            yield buffer[: min(count, num_bytes - start)]
    finally:
        file.close()


def clone_file(path: Path, entries: Sequence[Entry], stored: Stored) -> str | None:
    """Write a safetensors file whose data is a copy-on-write clone of what lies in another file.

    Args:
        path: of the file, which does not exist.
        entries: name, dtype and shape of every tensor, in the order in which they lie in the other file.
        stored: that file, the place of the first byte there, and the number of bytes, in whole pages.

    Returns:
        The SHA-256 of the file; None where it cannot be cloned, and then there is no file.

    Raises:
        OSError: the disk is full or failed.
    """
    header = encode_header(entries, align=PAGE_BYTES)
    source, offset, num_bytes = stored
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        os.pwrite(descriptor, header, 0)
        if not clone_range(source, offset, num_bytes, descriptor, len(header)):
            path.unlink()
            return None
        os.truncate(descriptor, len(header) + sum(dtype.itemsize * torch.Size(s).numel() for _, dtype, s in entries))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. One piece is read while the one before it is counted in."""
    digest = hashlib.sha256()
    buffers = [memoryview(bytearray(_READ_BYTES)) for _ in range(2)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, "lowtide-checksum") as thread:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        pending: Future[None] | None = None
        number = 0
        while count := file.readinto(buffers[number]):
            if pending is not None:
                pending.result()
            pending, number = thread.submit(digest.update, buffers[number][:count]), 1 - number
        if pending is not None:
            pending.result()
    return digest.hexdigest()
