"""What this machine has: memory that is free, and memory that this process takes. All in bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ..fused.matmul16 import computes_16bit

# File names of a control group's limit and usage, and the entry of its memory.stat that counts page cache which the
# kernel gives up before it kills anything. Kernel documentation: admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_host_bytes(*, root: Path = Path("/")) -> int:
    """Host memory that can still be taken without swapping, at most what the control groups of this process allow.

    A container or batch system usually limits a control group to less than the machine has, and kills what passes it.

    Args:
        root: where ``/proc`` and ``/sys`` are; tests put something else there.
    """
    room = [psutil.virtual_memory().available]
    room += [_cgroup_room(group, names) for group, names in _cgroups(root)]
    return max(0, min(room))


def peak_resident_bytes(*, root: Path = Path("/")) -> int:
    """The largest resident set this process ever had.

    Args:
        root: where ``/proc`` is; tests put something else there.
    """
    try:
        # Linux. Its ru_maxrss would not do: a new process inherits the peak of the one that started it.
        lines = (root / "proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined,unused-ignore]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, everything else in KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def computes_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether a device multiplies bfloat16 matrices at a useful speed.

    An x86 processor without AVX-512 does not; there blocks compute their products in float32 (``fused/matmul16.py``).
    """
    return torch.device(device).type != "cpu" or computes_16bit()


def device_available_bytes(device: str | torch.device) -> int:
    """Memory that can still be taken on a device: for CUDA what the driver has free and what torch keeps without use.

    Every other device counts as host memory, which is right for the CPU and for Apple's shared memory.

    Raises:
        RuntimeError: there is no such CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return available_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups this process is in, with all that contain them: the tightest limit counts."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        # "0::/path" for version 2, "5:memory:/path" for version 1
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            mount, names = root / "sys/fs/cgroup", _CGROUP_V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _CGROUP_V1
        else:
            continue
        # Inside a container the path may be one that only the host sees; then its own group is the mount itself.
        group = mount / path.lstrip("/")
        yield mount, names
        while mount in group.parents:
            yield group, names
            group = group.parent


def _cgroup_room(group: Path, names: tuple[str, str, str]) -> int:
    """What a control group may still take; without a limit, or where it cannot be read, more than any machine has."""
    limit_name, usage_name, cache_name = names
    try:
        # "max" means no limit in version 2; version 1 writes a number near 2 ** 63
        limit, usage = int((group / limit_name).read_text()), int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - usage + int(stat.get(cache_name, 0))
    except (OSError, ValueError):
        return sys.maxsize
