"""The home of weights that stay on the device they are computed on."""

from __future__ import annotations

from torch import nn


class DeviceHome:
    """Weights are always at hand: there is nothing to move."""

    def fetch(self, block: nn.Module) -> None:
        """Nothing to do."""

    def release(self, block: nn.Module) -> None:
        """Nothing to do."""

    def write_back(self, block: nn.Module) -> None:
        """Nothing to do."""
