"""Between the disk and a GPU: two pinned buffers a direction, one filled while the other is emptied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .direct_io import DirectFile
from .lanes import Lane, Transfer, make_lane
from .layout import aligned_buffer

_BUFFER_BYTES = 64 * 1024**2


class Staging:
    """Moves blocks between files and the device in pieces. Called in the home's lanes, one for each direction.

    Args:
        device: where the blocks are computed.
        lanes: for copies to the device and from it; None for the usual ones.
        buffer_bytes: of each of the four buffers, in whole pages.
    """

    def __init__(
        self, device: torch.device, lanes: tuple[Lane, Lane] | None = None, buffer_bytes: int = _BUFFER_BYTES
    ) -> None:
        self._to_device, self._from_device = lanes or (make_lane(device, "to-device"), make_lane(device, "from-device"))
        self._buffers = [aligned_buffer(buffer_bytes, torch.device("cpu"), device.type == "cuda") for _ in range(4)]
        self.buffer_bytes = buffer_bytes

    def read(self, file: DirectFile, start: int, target: Tensor) -> None:
        """From a place in a file to the device; returns when it is there."""
        under_way: list[Transfer | None] = [None, None]
        for number, offset, num_bytes in self._pieces(target):
            before = under_way[number % 2]
            if before is not None:
                before.synchronize()  # the buffer is free again
            buffer = self._buffers[number % 2][:num_bytes]
            file.read(buffer, start + offset)
            under_way[number % 2] = self._to_device.submit(_Copy(target[offset : offset + num_bytes], buffer))
        for transfer in under_way:
            if transfer is not None:
                transfer.synchronize()

    def write(self, file: DirectFile, start: int, source: Tensor) -> None:
        """From the device to a place in a file; returns when it is there."""
        waiting: tuple[Transfer, Tensor, int] | None = None
        for number, offset, num_bytes in self._pieces(source):
            buffer = self._buffers[2 + number % 2][:num_bytes]
            transfer = self._from_device.submit(_Copy(buffer, source[offset : offset + num_bytes]))
            if waiting is not None:
                _land(waiting, file)
            waiting = (transfer, buffer, start + offset)
        if waiting is not None:
            _land(waiting, file)

    def _pieces(self, whole: Tensor) -> Iterator[tuple[int, int, int]]:
        """(number, offset, bytes) of each piece."""
        for number, offset in enumerate(range(0, whole.numel(), self.buffer_bytes)):
            yield number, offset, min(self.buffer_bytes, whole.numel() - offset)


class _Copy:
    """A copy to be run in a lane."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = target, source

    def __call__(self) -> None:
        self.target.copy_(self.source, non_blocking=True)


def _land(waiting: tuple[Transfer, Tensor, int], file: DirectFile) -> None:
    transfer, buffer, offset = waiting
    transfer.synchronize()
    file.write(buffer, offset)
