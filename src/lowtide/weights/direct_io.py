"""Positioned reads and writes that go past the page cache, so that memory use is what it says and the cache stays the user's.

Where the operating system or the file system has no direct I/O, pages are read through the cache and dropped from it at once.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from torch import Tensor

# Bytes in one request: large enough for any disk, small enough that an error is noticed soon.
_REQUEST_BYTES = 16 * 1024**2


class DirectFile:
    """A file of fixed size, read and written in whole pages from and to buffers that begin at a page.

    Args:
        path: of the file, which exists.

    Raises:
        OSError: it cannot be opened for reading and writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        direct = _open_direct(path)
        self.direct = direct is not None
        self._descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0)) if direct is None else direct

    def read(self, target: Tensor, offset: int) -> None:
        """Fill ``target``, uint8 on the CPU, from a place in the file.

        Raises:
            OSError: the disk failed, or the file ends too soon.
        """
        view = memoryview(target.numpy().data)
        done = 0
        while done < len(view):
            part = view[done : done + _REQUEST_BYTES]
            try:
                count = os.preadv(self._descriptor, [part], offset + done)
            except OSError as error:
                if self._without_direct_io(error):
                    continue
                raise OSError(error.errno, f"reading {self.path} failed: {error.strerror}") from error
            if count == 0:
                raise OSError(
                    errno.EIO,
                    f"{self.path} was truncated: {len(view)} bytes were wanted at {offset}, and it ends after {done} of them",
                )
            done += count
        self._drop_pages(offset, len(view))

    def write(self, source: Tensor, offset: int) -> None:
        """Write ``source``, uint8 on the CPU, to a place in the file.

        Raises:
            OSError: the disk failed or is full.
        """
        view = memoryview(source.numpy().data)
        done = 0
        while done < len(view):
            try:
                done += os.pwritev(self._descriptor, [view[done : done + _REQUEST_BYTES]], offset + done)
            except OSError as error:
                if self._without_direct_io(error):
                    continue
                raise OSError(error.errno, f"writing {self.path} failed: {error.strerror}") from error
        if not self.direct:
            os.fsync(self._descriptor)  # only pages that are on the disk can be dropped
            self._drop_pages(offset, len(view))

    def flush(self) -> None:
        """Make sure that everything is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; calling it twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _without_direct_io(self, error: OSError) -> bool:
        """Some file systems open files for direct I/O and then refuse it: go on through the cache."""
        if not self.direct or error.errno != errno.EINVAL:
            return False
        descriptor = os.open(self.path, os.O_RDWR)
        os.close(self._descriptor)
        self._descriptor, self.direct = descriptor, False
        return True

    def _drop_pages(self, offset: int, num_bytes: int) -> None:
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _open_direct(path: Path) -> int | None:
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
    descriptor = None
    if sys.platform == "darwin":
        import fcntl

        descriptor = os.open(path, os.O_RDWR)
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


def reserve(path: Path, num_bytes: int, mode: int = 0o600) -> None:
    """Make a file of this size whose room on the disk is taken, so that later writes cannot find the disk full.

    Args:
        path: of the file, which does not exist.
        num_bytes: of it.
        mode: who may use it, if the umask does not forbid it.

    Raises:
        FileExistsError: there is such a file.
        OSError: the disk is full.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.truncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """Make sure that names made in a directory are on the disk."""
    if os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
