"""Where lowtide keeps what can be made again: tokens, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """$LOWTIDE_CACHE, or lowtide's folder in $XDG_CACHE_HOME or ~/.cache. Without a home a path that nothing can be written to."""
    own = os.environ.get("LOWTIDE_CACHE")
    if own:
        return Path(own).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "lowtide"
    except RuntimeError:  # no home
        return Path(os.devnull) / "lowtide"
