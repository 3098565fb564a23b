"""Copy-on-write clones of file contents, on file systems that have them (btrfs, XFS, bcachefs): no byte is written or takes room until
one of the two is changed.

See ioctl_ficlonerange(2). Elsewhere, and across file systems, the answer is no and the caller copies.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import uuid
from pathlib import Path

from .layout import PAGE_BYTES

_FICLONERANGE = 0x4020940D
_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM)


def clone_range(source: Path, source_offset: int, num_bytes: int, target: int, target_offset: int) -> bool:
    """Make a part of an open file share its contents with a part of another one.

    Args:
        source: a file.
        source_offset, num_bytes, target_offset: whole blocks of the file system, which whole pages are.
        target: descriptor of the other file, open for writing.

    Returns:
        Whether it was done; False where it cannot be.

    Raises:
        OSError: the disk failed or is full.
    """
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    descriptor = os.open(source, os.O_RDONLY)
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", descriptor, source_offset, num_bytes, target_offset))
    except OSError as error:
        if error.errno in _NOT_HERE:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def can_clone(source: Path, directory: Path) -> bool:
    """Whether new files in a directory can be clones of a file, which has at least one page."""
    probe = directory / f".{uuid.uuid4().hex}"
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return clone_range(source, 0, PAGE_BYTES, descriptor, 0)
    finally:
        os.close(descriptor)
        probe.unlink()
