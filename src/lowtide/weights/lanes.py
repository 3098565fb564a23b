"""Lanes: copies that run beside the computation, one after the other, each after what it depends on.

On a GPU a lane is a stream, and what depends on a copy is held back by events, without the host waiting. On a CPU a lane is a
thread. The homes are written against these two methods only, ``submit`` of a lane and ``wait`` of a transfer, so that what
is tested here with threads (and with copies that land late) is what runs on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch


class Transfer(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """What is computed after this sees the copy finished. Raises the error that ended the copy."""

    def synchronize(self) -> None:
        """The host waits until the copy is finished. Raises the error that ended it."""

    def finished(self) -> bool:
        """It is over; does not wait."""


class Lane(Protocol):
    """Runs copies in the order they are submitted."""

    def submit(self, copy: Callable[[], None], after: Sequence[Transfer | None] = ()) -> Transfer:
        """Start a copy as soon as those before it in this lane, and those in ``after``, are finished."""

    def marker(self) -> Transfer | None:
        """Stands for all that has been computed up to now, as something to come ``after``; None where nothing is pending."""

    def close(self) -> None:
        """Wait for everything and stop."""


class ThreadTransfer:
    """A copy in a thread. To wait for it is to wait on the host, where computation on a CPU goes on from."""

    def __init__(self, future: Future[None]) -> None:
        self.future = future

    def wait(self) -> None:
        """See :class:`Transfer`."""
        self.future.result()

    synchronize = wait

    def finished(self) -> bool:
        """See :class:`Transfer`."""
        return self.future.done()


class ThreadLane:
    """A thread that copies. A copy that failed makes all that come after it fail with the same error.

    Args:
        name: of the thread.
        device: where the computation runs that its copies depend on; None for the CPU.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"lowtide-{name}")
        self._error: BaseException | None = None

    def submit(self, copy: Callable[[], None], after: Sequence[Transfer | None] = ()) -> Transfer:
        """See :class:`Lane`."""
        return ThreadTransfer(self._pool.submit(self._run, copy, tuple(after)))

    def _run(self, copy: Callable[[], None], after: tuple[Transfer | None, ...]) -> None:
        if self._error is not None:
            raise self._error
        try:
            for transfer in after:
                if transfer is not None:
                    transfer.synchronize()
            copy()
        except BaseException as error:
            self._error = error
            raise

    def marker(self) -> Transfer | None:
        """See :class:`Lane`. Computation on a CPU is over when the host gets here."""
        return _computed(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        """See :class:`Lane`."""
        self._pool.shutdown(wait=True)


class StreamTransfer:
    """A copy on a stream. To wait for it is to make the current stream wait; the host goes on."""

    def __init__(self, event: Any, device: torch.device) -> None:
        self.event, self.device = event, device

    def wait(self) -> None:
        """See :class:`Transfer`."""
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def synchronize(self) -> None:
        """See :class:`Transfer`."""
        self.event.synchronize()

    def finished(self) -> bool:
        """See :class:`Transfer`."""
        return bool(self.event.query())


class StreamLane:
    """A CUDA stream that copies between pinned host memory and the device.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._lock = threading.Lock()

    def submit(self, copy: Callable[[], None], after: Sequence[Transfer | None] = ()) -> Transfer:
        """See :class:`Lane`. ``copy`` must only queue work (``non_blocking=True``)."""
        with self._lock, torch.cuda.stream(self.stream):
            for transfer in after:
                if transfer is not None:
                    transfer.wait()  # this stream is the current one
            copy()
            event = torch.cuda.Event()
            event.record(self.stream)
        return StreamTransfer(event, self.device)

    def marker(self) -> Transfer | None:
        """See :class:`Lane`."""
        return _computed(self.device)

    def close(self) -> None:
        """See :class:`Lane`."""
        self.stream.synchronize()


def _computed(device: torch.device) -> StreamTransfer:
    """All that has been queued on the current stream."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return StreamTransfer(event, device)


def make_lane(device: torch.device, name: str, *, blocks_host: bool = False) -> Lane:
    """A lane for copies to or from this device.

    Args:
        device: a torch device.
        name: of the thread, if it is one.
        blocks_host: what is submitted waits on the host (for a disk), so that it needs a thread on every device.
    """
    return StreamLane(device) if device.type == "cuda" and not blocks_host else ThreadLane(name, device)
