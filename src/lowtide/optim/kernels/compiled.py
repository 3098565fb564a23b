"""Compiling ``cpu.c`` and ``product.h``: once for a processor and a compiler, kept in lowtide's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

from ...cache_folder import default_cache_folder

_SOURCE = Path(__file__).with_name("cpu.c")
_INCLUDED = Path(__file__).with_name("product.h")
_FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fPIC"]
_COMPILE_TIMEOUT_S = 120


def compiled(compiler: str, anew: bool = False) -> Path:
    """The shared library, from the cache or made now.

    Args:
        compiler: a command, with flags if need be.
        anew: make it in any case.

    Raises:
        OSError: no way to compile it worked, or there is no room; the last line of what the compiler said.
        subprocess.TimeoutExpired: the compiler hangs.
    """
    openmp = _openmp_of_torch()
    signed = hashlib.sha256(_SOURCE.read_bytes() + _INCLUDED.read_bytes())
    for part in (compiler, *_FLAGS, *openmp, platform.machine(), *platform.libc_ver(), _processor()):
        signed.update(part.encode() + b"\0")
    name = f"cpu-{signed.hexdigest()[:24]}.so"
    folder = _cache_folder()
    if not anew and (folder / name).exists():
        return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = _compile(compiler, openmp, Path(scratch))
        made.replace(folder / name)  # whoever is second replaces it by the same
    return folder / name


def _compile(compiler: str, openmp: list[str], scratch: Path) -> Path:
    """With threads if the compiler can, for this processor if it can."""
    command = [*compiler.split(), *_FLAGS]
    tries = [
        ["-march=native", "-mprefer-vector-width=512", "-fopenmp", "-DLOWTIDE_TILES"],
        ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
        ["-march=native", "-fopenmp"],
        ["-mcpu=native", "-fopenmp"],
        ["-fopenmp"],
        ["-march=native"],
        [],
    ]
    problem: subprocess.CalledProcessError | None = None
    for extra in tries:
        threads = openmp if "-fopenmp" in extra else []
        # Linked in a second step: with -fopenmp there the compiler would link a library of its own.
        link = [
            *compiler.split(),
            "-shared",
            "kernels.o",
            "-o",
            "kernels.so",
            *(threads or ["-fopenmp"] * ("-fopenmp" in extra)),
            "-lm",
        ]
        try:
            for step in ([*command, *extra, "-c", str(_SOURCE), "-o", "kernels.o"], link):
                subprocess.run(step, cwd=scratch, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
            ctypes.CDLL(str(scratch / "kernels.so"))
        except subprocess.CalledProcessError as error:
            problem = error
        except OSError as error:
            problem = subprocess.CalledProcessError(1, link, stderr=str(error).encode())
        else:
            return scratch / "kernels.so"
    assert problem is not None
    lines = (problem.stderr or b"").decode(errors="replace").strip().splitlines()
    raise OSError(lines[-1] if lines else str(problem))


def _openmp_of_torch() -> list[str]:
    """The OpenMP library that torch has loaded: with a second one its idle threads would be in the way of torch's."""
    root = Path(torch.__file__).parent
    found = glob.glob(str(root / "lib" / "libgomp*.so*")) + glob.glob(str(root.parent / "torch.libs" / "libgomp*.so*"))
    return found if len(found) == 1 else []


@functools.cache
def _processor() -> str:
    """What tells processors apart that share a cache: code for one may not run on another."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _cache_folder() -> Path:
    folder = default_cache_folder() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lowtide-kernels-"))
