"""What a part is given: the device, sizes, a place for files, and where its rows go."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

GIB = 1024**3
# Columns of the results, in the order of the CSV file. Bytes are bytes; predictions of the planner begin with plan_.
FIELDS = (
    "date", "commit", "device", "driver", "torch", "transformers", "part", "case", "status", "parameters", "tokens", "step_s",
    "plan_step_s", "tokens_per_s", "mfu", "allocated", "plan_device", "reserved", "outside_torch", "cap", "pinned", "plan_host", "resident",
    "ratio", "homes", "note",
)  # fmt: skip


@dataclasses.dataclass
class Context:
    """Of one part, in its own process.

    Attributes:
        part: its name.
        rehearse: on the CPU with tiny sizes; device memory is neither limited nor measured.
        directory: for weights on disk.
        output: for files that are kept, such as traces.
        deadline: ``time.monotonic()`` at which the part should have ended.
        send: takes a row.
    """

    part: str
    rehearse: bool
    directory: Path
    output: Path
    deadline: float
    send: Callable[[dict[str, Any]], None]

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return torch.device("cpu") if self.rehearse else torch.device("cuda", torch.cuda.current_device())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16

    def row(self, case: str, *, status: str = "ok", **values: Any) -> None:
        """Report a case; reporting it again replaces it in the table."""
        self.send({"part": self.part, "case": case, "status": status, **values})

    def seconds_left(self) -> float:
        """Of the part's time."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what is not used any more, and begin to measure peaks anew."""
        gc.collect()
        if not self.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def limit_device_memory(context: Context, cap_gib: float) -> dict[str, int]:
    """Let this process have no more of the card than a smaller one would offer.

    What CUDA itself takes (context, libraries, their workspaces) counts: torch's allocator gets the rest, and refuses more. The
    limit is tried out at once.

    Args:
        cap_gib: of the imagined card.

    Returns:
        ``cap``, ``outside_torch`` (bytes that CUDA takes, and whoever else uses the card) and ``usable``.
    """
    cap = int(cap_gib * GIB)
    if context.rehearse:
        return {"cap": cap, "outside_torch": 0, "usable": cap}
    torch.cuda.init()
    _load_libraries(context)
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, (cap - outside) / total)))
    with contextlib.suppress(torch.OutOfMemoryError):
        torch.empty(cap - outside + 64 * 1024**2, dtype=torch.uint8, device=context.device)
        if cap < total:
            raise AssertionError(f"a limit of {cap} bytes of device memory does not hold")
    return {"cap": cap, "outside_torch": outside, "usable": cap - outside}


def _load_libraries(context: Context) -> None:
    """What a step uses: products and attention, there and back. They take memory that torch does not know of."""
    square = torch.ones(4096, 4096, device=context.device, dtype=context.dtype, requires_grad=True)
    heads = (square @ square).view(1, 32, 4096, 128)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).float().mean().backward()
    del square, heads
    context.synchronize()
    context.free()


@contextlib.contextmanager
def copies_on_a_cpu(context: Context) -> Iterator[None]:
    """In a rehearsal weights and block inputs are copied as if the CPU were a card, so that it takes the same path."""
    if not context.rehearse:
        yield
        return
    import lowtide.fusing

    patched = {"_only_real_moves": lambda wanted, device: wanted, "_copies_needed": lambda device: True}
    real = {name: getattr(lowtide.fusing, name) for name in patched}
    vars(lowtide.fusing).update(patched)
    try:
        yield
    finally:
        vars(lowtide.fusing).update(real)
