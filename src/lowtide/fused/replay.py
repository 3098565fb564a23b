"""What a recompute must repeat besides the arithmetic: random numbers and automatic mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class RandomState:
    """The state of the random generators that a block on ``device`` can draw from, as it is now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.accelerator = torch.get_device_module(device) if device.type != "cpu" else None
        self.accelerator_state = self.accelerator.get_rng_state(device) if self.accelerator is not None else None

    def restore(self) -> None:
        """Make the generators continue from here."""
        torch.set_rng_state(self.host)
        if self.accelerator is not None:
            self.accelerator.set_rng_state(self.accelerator_state, self.device)


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """The recompute replays old random numbers; what comes after it continues as if nothing had happened."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


def autocast_state(device_type: str) -> dict[str, Any]:
    """Arguments for ``torch.autocast`` that repeat what is in force now, but for its cache.

    The cache would keep a 16-bit copy of every weight until the outermost context is left, and a block uses a weight once in a micro-batch.
    """
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": False,
    }
