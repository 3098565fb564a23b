"""Turns what happens in a run into events, with its times, counts and memory, and hands them to the listeners."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..evaluation import LossResult
from ..optim.shards import local_part
from ..planning.hardware import peak_resident_bytes
from ..weights.home import resident_bytes
from .events import Listener

if TYPE_CHECKING:
    from .result import TrainResult


def memory_bytes(device: str) -> int:
    """Memory in use now: of the CUDA device, what torch allocated; else the resident set of the process."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else resident_bytes()


def peak_memory_bytes(device: str) -> int:
    """The most that ``memory_bytes`` ever was, loading the model included."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_resident_bytes()


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch, padding left out."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def program_bytes(model: nn.Module, device: str) -> int:
    """What the process holds besides the weights: Python, its libraries, data. 0 on a GPU, whose memory they are not in."""
    if device.startswith("cuda"):
        return 0
    storages = (local_part(param).untyped_storage() for param in model.parameters())
    return max(0, resident_bytes() - sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))


class Reporter:
    """Counts steps and tells the listeners, in their order.

    Attributes:
        listeners: called with every event, in this order.
        num_steps: steps taken, skipped ones included.
        num_skipped: steps that updated nothing.
        num_skipped_in_a_row: those, and broken-off ones, since the last good step; overflows of a loss scale that can still fall
            do not count.
    """

    def __init__(self, device: str) -> None:
        self.listeners: list[Listener] = []
        self.num_steps = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self._device = device
        self._start = self._last = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        counts = ("num_steps", "num_skipped", "num_skipped_in_a_row")
        return {"seconds": self.seconds(), **{name: getattr(self, name) for name in counts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; time goes on from there."""
        for name, value in state.items():
            if name != "seconds":
                setattr(self, name, value)
        self._last = time.perf_counter()
        self._start = self._last - state["seconds"]

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    def config(self, **facts: Any) -> None:
        """Report the settings and what they come to."""
        self._tell("config", **facts)

    def step(self, num_tokens: int, loss: float, **facts: Any) -> None:
        """Report one step on so many tokens: ``facts`` are lr, epoch, and what the engine says of it (see ``events.py``)."""
        now = time.perf_counter()
        self.num_steps += 1
        self.num_skipped += facts["skipped"]
        broken = facts["skipped"] or facts.get("partial", False)
        # Overflows are how a loss scale finds its level, as long as it can still fall.
        scale = facts.get("loss_scale")
        if broken and (scale is None or scale <= 1.0 or not math.isfinite(loss)):
            self.num_skipped_in_a_row += 1
        elif not broken:
            self.num_skipped_in_a_row = 0
        speed = num_tokens / max(now - self._last, 1e-9)
        memory = {**self._memory(), "peak_memory_bytes": peak_memory_bytes(self._device)}
        self._tell("train", loss=loss, num_tokens=num_tokens, tokens_per_s=speed, **memory, **facts)
        self._last = time.perf_counter()

    def memory(self, traced: Mapping[str, Any], num_tokens: int) -> None:
        """Report the memory of the step just reported, moment by moment (:class:`MemoryTrace`)."""
        self._tell("memory", num_tokens=num_tokens, **traced)
        self._last = time.perf_counter()

    def evaluation(self, result: LossResult, accuracies: Mapping[str, float]) -> None:
        """Report a held-out score, of a task with its accuracies by scoring. Its time does not count as time of a step."""
        scores = {"loss": result.loss, "perplexity": result.perplexity, "num_tokens": result.num_tokens}
        scores |= {f"accuracy_{name}": value for name, value in accuracies.items()}
        self._tell("eval", **scores, **self._memory())
        self._last = time.perf_counter()

    def samples(self, samples: Sequence[Mapping[str, str]], seconds: float) -> None:
        """Report what the model says to prompts. Its time does not count as time of a step."""
        self._tell("samples", samples=list(samples), seconds=seconds)
        self._last = time.perf_counter()

    def resume(self, checkpoint: str, num_batches: int) -> None:
        """Report that the run goes on from a checkpoint."""
        self._tell("resume", checkpoint=checkpoint, num_batches=num_batches)

    def checkpoint(self, **facts: Any) -> None:
        """Report a checkpoint that was written, or could not be. Its time does not count as time of a step."""
        self._tell("checkpoint", **facts)
        self._last = time.perf_counter()

    def end(self, result: TrainResult) -> None:
        """Report the end."""
        self._tell(
            "end",
            loss_before=result.loss_before and result.loss_before.loss,
            loss_after=result.loss_after and result.loss_after.loss,
            peak_memory_bytes=result.peak_memory_bytes,
            num_skipped=result.num_skipped,
            interrupted=result.interrupted,
            wall_s=result.wall_s,
        )

    def _memory(self) -> dict[str, int]:
        return {"memory_bytes": memory_bytes(self._device)}

    def _tell(self, kind: str, **facts: Any) -> None:
        event = {"event": kind, "step": self.num_steps, "time": self.seconds(), **facts}
        for listener in self.listeners:
            listener(event)
