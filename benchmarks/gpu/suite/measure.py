"""Steps of a fused model, timed, with the memory they take beside what the planner says they take."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import lowtide
from lowtide.models.blocks import find_blocks
from lowtide.optim import FusibleOptimizer
from lowtide.planning import Footprint, Plan, StepShape, peak_resident_bytes
from lowtide.weights import HostInputs, HostStore

from .context import Context, copies_on_a_cpu
from .models import flops_per_token, num_parameters, peak_flops, random_model


class Discard(FusibleOptimizer):
    """Takes every gradient and does nothing with it: a backward pass without updates, in the same engine."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "rounding": "nearest", "rounding_seed": 0})

    def update_param(self, param: Any, grad: Any, group: Any, prepare: Any = None) -> None:
        """Nothing."""


RULES: dict[str, Callable[[Any], FusibleOptimizer]] = {
    "lomo": lambda params: lowtide.Lomo(params, lr=1e-3),
    "adalomo": lambda params: lowtide.AdaLomo(params, lr=1e-4),
    "no update": Discard,
}


@dataclasses.dataclass
class Setup:
    """How a model is fused; the fields after ``seq_len`` are ``fuse``'s."""

    batch_size: int
    seq_len: int
    weights: Any = "device"
    micro_batch_size: int | None = None
    block_inputs: str = "device"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seq_len


class Training:
    """A fused model that takes steps with random tokens.

    Args:
        model: from :func:`random_model`, or one that was fused before.
        rule: see ``RULES``.
    """

    def __init__(self, context: Context, model: Any, setup: Setup, rule: str = "lomo") -> None:
        self.context, self.model, self.setup = context, model, setup
        self.only_first = False
        self.optimizer = RULES[rule](model.parameters())
        with copies_on_a_cpu(context):
            self.engine = lowtide.fuse(
                model, self.optimizer, weights=setup.weights, device=context.device, micro_batch_size=setup.micro_batch_size,
                block_inputs=setup.block_inputs, **setup.options,
            )  # fmt: skip
        context.free()

    def step(self) -> float:
        """Seconds of one step."""
        setup, vocabulary = self.setup, self.model.config.vocab_size
        ids = torch.randint(3, vocabulary, (setup.batch_size, setup.seq_len), device=self.context.device)
        self.context.synchronize()
        start = time.perf_counter()
        self.engine.backward(self.model(input_ids=ids, labels=ids).loss)
        self.optimizer.step()
        self.context.synchronize()
        return time.perf_counter() - start

    def steps(self, most: int, reserve_s: float = 0.0) -> Iterator[list[float]]:
        """One step that does not count, then up to so many, while there is time for another; yields all seconds so far.

        Args:
            reserve_s: of the part's time, left for what comes after.
        """
        warm_up = self.step()
        self.only_first = False
        found: list[float] = []
        for _ in range(most):
            if found and self.context.seconds_left() < reserve_s + 1.2 * found[-1]:
                return
            if not found and self.context.seconds_left() < reserve_s + warm_up:
                self.only_first = True
                yield [warm_up]  # better than nothing
                return
            found.append(self.step())
            yield found

    def memory(self) -> dict[str, int]:
        """Most bytes of torch on the device (in tensors, and altogether), pinned in host memory, and resident in the process."""
        pinned = sum(home.store.num_bytes for home in self.engine.home.streamed if isinstance(home.store, HostStore))
        inputs = self.engine._block_inputs
        pinned += inputs.pool_bytes if isinstance(inputs, HostInputs) else 0
        # The same columns in a rehearsal, so that one that is given twice shows there.
        found = {"pinned": pinned, "resident": peak_resident_bytes(), "outside_torch": 0}
        if not self.context.rehearse:
            found["allocated"], found["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            # with libraries that were loaded meanwhile
            found["outside_torch"] = total - free - torch.cuda.memory_reserved()
        return found

    def speed(self, seconds: list[float]) -> dict[str, Any]:
        """Columns of the table; a step's time is the median."""
        step_s, setup = statistics.median(seconds), self.setup
        found = {
            "parameters": num_parameters(self.model.config),
            "tokens": setup.tokens,
            "step_s": f"{step_s:.4f}",
            "tokens_per_s": f"{setup.tokens / step_s:.1f}",
        }
        if (peak := peak_flops(self.context)) is not None:
            needed = flops_per_token(self.model.config, setup.seq_len) * setup.tokens
            found["mfu"] = f"{needed / step_s / peak:.3f}"
        return found

    def close(self) -> Any:
        """End it; the model can be fused again."""
        model = self.model
        self.engine.remove()
        del self.engine, self.optimizer, self.model
        self.context.free()
        return model


def step_shape(context: Context, config: LlamaConfig, batch_size: int, seq_len: int, **options: Any) -> StepShape:
    """The step for the planner, without padding. A rehearsal is planned as if the CPU were a card, too."""
    return StepShape(
        config, find_blocks=find_blocks, dtype=context.dtype, batch_size=batch_size, seq_len=seq_len, masked=False, device="cuda", **options,
    )  # fmt: skip


def planned(footprint: Footprint) -> dict[str, int]:
    """Columns of a prediction."""
    totals = footprint.totals()
    return {"plan_device": totals["device"], "plan_host": totals["host"]}


def setup_of(plan: Plan, batch_size: int, seq_len: int, directory: Path) -> Setup:
    """What a plan says, as arguments of ``fuse``."""
    places = {"device": "device", "host": "cpu", "disk": str(directory)}
    homes = {name: places[home] for name, home in plan.homes}
    return Setup(
        batch_size, seq_len,
        weights="device" if set(homes.values()) == {"device"} else homes,
        micro_batch_size=None if plan.micro_batch_size == batch_size else plan.micro_batch_size,
        block_inputs="cpu" if plan.block_inputs == "host" else "device",
    )  # fmt: skip


def pressure(context: Context) -> list[str]:
    """Whether torch's allocator had to give memory back and ask again, which stops everything: free memory lay in pieces."""
    retries = 0 if context.rehearse else torch.cuda.memory_stats()["num_alloc_retries"]
    return [f"{retries} allocations tried again"] if retries else []


def train_and_report(
    context: Context, case: str, config: LlamaConfig, setup: Setup, *, most_steps: int, rule: str = "lomo", reserve_s: float = 0.0,
    **columns: Any,
) -> list[float]:  # fmt: skip
    """Fuse a random model, train it, and report after every step; returns the seconds of the steps that count."""
    began, note = time.monotonic(), columns.pop("note", "")
    training = Training(context, random_model(context, config), setup, rule)
    note += f"; weights made and placed in {time.monotonic() - began:.0f} s"
    seconds: list[float] = []
    for seconds in training.steps(most_steps, reserve_s):
        remarks = [note, "first step only"] if training.only_first else [note]
        context.row(
            case,
            **training.speed(seconds),
            **training.memory(),
            note="; ".join([*remarks, *pressure(context)]),
            **columns,
        )
    for param in training.model.parameters():  # or removing the engine would copy those on the card to host memory
        param.data = torch.empty(0, dtype=param.dtype)
    training.close()
    return seconds
