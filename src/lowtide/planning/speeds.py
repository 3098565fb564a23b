"""How fast this machine computes and moves bytes: measured in a second or two, given by the user, or assumed and called so."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..log import get_logger

_logger = get_logger(__name__)

NAMES = ("flops", "to_device", "from_device", "disk_read", "disk_write", "memory")

# Where nothing can be measured. GPU: half the 71 TFLOP/s of an RTX 3090 (NVIDIA GA102 whitepaper, dense, 16 bits with float32
# sums), and four fifths of its 936 GB/s. Bus: 24 of the 32 GB/s of PCIe 4.0 x16. Disk: a common PCIe 3.0 NVMe drive.
# CPU: a few cores with AVX2.
ASSUMED_CPU_FLOPS, ASSUMED_CPU_MEMORY = 100e9, 10e9
ASSUMED = {"flops": 35e12, "to_device": 24e9, "from_device": 24e9, "disk_read": 3e9, "disk_write": 2e9, "memory": 750e9}

_FILE_BYTES = 64 * 1024**2
_REQUEST_BYTES = 16 * 1024**2
_ADDED_BYTES = 64 * 1024**2  # of each of two tensors; larger than caches


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What a step's time is worked out from.

    Attributes:
        flops: floating-point operations a second in large matrix products.
        to_device, from_device: bytes a second between host memory and the device.
        disk_read, disk_write: bytes a second.
        sources: by name, "measured", "given" or "assumed".
        memory: bytes a second between the device and its own memory, where weights are updated; None does not count
            updates.
    """

    flops: float
    to_device: float
    from_device: float
    disk_read: float
    disk_write: float
    sources: Mapping[str, str]
    memory: float | None = None


def find_speeds(
    *,
    dtype: torch.dtype,
    device: str,
    directory: Path | None = None,
    given: Mapping[str, float | None] | None = None,
    measure: bool = True,
) -> Speeds:
    """Each speed as given, else measured where that is possible, else assumed.

    Args:
        dtype: of the computation.
        device: where it takes place; a GPU that is not there is assumed.
        directory: on the disk to measure; a small file is made there and removed again. None measures no disk.
        given: by name (see ``NAMES``), in FLOP or bytes a second; None counts as not given.
        measure: False assumes whatever is not given.
    """
    values = {name: value for name, value in (given or {}).items() if value is not None}
    sources = dict.fromkeys(values, "given")
    here = device == "cpu" or torch.cuda.is_available()
    measurements: list[tuple[tuple[str, ...], Callable[[], tuple[float, ...]]]] = []
    if measure and here:
        measurements.append((("flops",), lambda: (measure_flops(dtype, device),)))
        measurements.append((("memory",), lambda: (measure_memory(device),)))
    if measure and here and device != "cpu":
        measurements.append((("to_device", "from_device"), lambda: measure_transfer(device)))
    if measure and directory is not None:
        measurements.append((("disk_read", "disk_write"), lambda: measure_disk(directory)))
    for names, run in measurements:
        if all(name in values for name in names):
            continue
        try:
            found = dict(zip(names, run(), strict=True))
        except (OSError, RuntimeError) as error:
            _logger.warning("%s could not be measured and is assumed: %s", " and ".join(names), error)
            continue
        sources.update({name: "measured" for name in found if name not in values})
        values = {**found, **values}
    sources = {name: sources.get(name, "assumed") for name in NAMES}
    on_cpu = {"flops": ASSUMED_CPU_FLOPS, "memory": ASSUMED_CPU_MEMORY} if device == "cpu" else {}
    assumed = {**ASSUMED, **on_cpu}
    return Speeds(**{**assumed, **values}, sources=sources)


def measure_flops(dtype: torch.dtype, device: str, *, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a square matrix product: 1024 wide on a CPU, 4096 on a GPU.

    The best of several, because others may be using the machine.
    """
    size = 1024 if device == "cpu" else 4096
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    first @ second  # loads libraries
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _timed(lambda: first @ second, device))
    return 2 * size**3 / best


def measure_memory(device: str) -> float:
    """Bytes a second of the memory of a device: two are read and one is written, as in an update. The best of a few."""
    value, grad = (torch.zeros(_ADDED_BYTES // 4, device=device) for _ in range(2))
    value.add_(grad)  # loads what it needs
    return 3 * _ADDED_BYTES / min(_timed(lambda: value.add_(grad), device) for _ in range(5))


def measure_transfer(device: str, *, num_bytes: int = 256 * 1024**2) -> tuple[float, float]:
    """Bytes a second from pinned host memory to the device, and back."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    to_device = min(_timed(lambda: there.copy_(host, non_blocking=True), device) for _ in range(3))
    from_device = min(_timed(lambda: host.copy_(there, non_blocking=True), device) for _ in range(3))
    return num_bytes / to_device, num_bytes / from_device


def measure_disk(directory: Path) -> tuple[float, float]:
    """Bytes a second (read, write) of the disk of a directory, past the page cache where the system allows that.

    Short: a drive with a cache of its own may be slower in the long run.

    Raises:
        OSError: no file of 64 MiB can be made there.
    """
    handle, name = tempfile.mkstemp(prefix="lowtide-speed-", dir=directory)
    os.close(handle)
    try:
        flags = os.O_RDWR | getattr(os, "O_DIRECT", 0)
        try:
            descriptor = os.open(name, flags)
        except OSError:  # a file system without direct I/O
            descriptor = os.open(name, os.O_RDWR)
        try:
            return _disk_speeds(descriptor)
        finally:
            os.close(descriptor)
    finally:
        os.unlink(name)


def _disk_speeds(descriptor: int) -> tuple[float, float]:
    with contextlib.closing(mmap.mmap(-1, _REQUEST_BYTES)) as buffer:  # begins at a page, as direct I/O asks for
        buffer.write(os.urandom(1024**2) * (_REQUEST_BYTES // 1024**2))
        offsets = range(0, _FILE_BYTES, _REQUEST_BYTES)
        start = time.perf_counter()
        for offset in offsets:
            _whole(os.pwritev(descriptor, [buffer], offset))
        os.fsync(descriptor)
        written = time.perf_counter()
        for offset in offsets:
            _whole(os.preadv(descriptor, [buffer], offset))
        read = time.perf_counter()
    return _FILE_BYTES / (read - written), _FILE_BYTES / (written - start)


def _whole(count: int) -> None:
    if count != _REQUEST_BYTES:
        raise OSError(f"only {count} of {_REQUEST_BYTES} bytes were moved")


def _timed(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
