"""``--dry-run``: a few real steps, and what they took beside what the planner said, kind by kind. Nothing is kept.

On a CPU the peak is the resident set above what the process held with everything imported and a tiny model trained; on a GPU what
torch allocated. Weights, pools, optimizer state, gradients and block inputs are counted from the objects themselves; the rest is
what the peak leaves.
"""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..fusing import Engine, fuse
from ..optim import Lomo
from ..planning import Footprint, peak_resident_bytes
from ..weights.home import resident_bytes
from .config import TrainConfig
from .memory_trace import GRADIENTS, KEPT, STATE, WEIGHTS, MemoryTrace
from .planned import predicted
from .run import prepare
from .setup import existing_folder, resolve_device, without_cache

POOLS, REST = "pools", "one block's work, logits, temporaries, allocator"


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a dry run found; all in bytes.

    Attributes:
        predicted, measured: by kind, on the device (on a CPU, in memory).
        predicted_peak, measured_peak: their sums; measured above the baseline.
        baseline: the process with everything imported; 0 on a GPU.
        losses: of the steps.
        step_s: seconds of the last step.
        predicted_step_s: what the planner expects, if it was asked.
        homes: number of blocks by home.
    """

    predicted: dict[str, int]
    measured: dict[str, int]
    predicted_peak: int
    measured_peak: int
    baseline: int
    losses: list[float]
    step_s: float
    predicted_step_s: float | None
    homes: dict[str, int]


def dry_run(config: TrainConfig, num_steps: int = 2) -> DryRun:
    """Prepare a run as ``train`` does, take steps on its largest batch, and measure. Writes only a working copy, and removes it.

    Args:
        config: the settings.
        num_steps: at least 1; the optimizer state is complete after the first.

    Raises:
        What ``train`` raises before its first step.
    """
    import time

    config.validate()
    if config.lora_rank:
        raise ValueError(
            "a dry run shows what the planner says, and the planner does not know adapters: leave lora_rank out"
        )
    device = resolve_device(config.device)
    with tempfile.TemporaryDirectory(
        dir=existing_folder(Path(config.output).expanduser().absolute().parent), prefix=".lowtide-dry-run-"
    ) as folder:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        _warm_up(device)
        baseline = _begin(device)
        run = prepare(config, Path(folder))
        engine, losses, seconds = run.engine, [], 0.0
        batch = max((batch for _, batch in run.batches()), key=lambda each: each["input_ids"].numel())
        try:
            trace = MemoryTrace(engine, run.optimizers, device)
            with without_cache(run.model):
                for number in range(num_steps):
                    with trace() if number == num_steps - 1 else nullcontext():
                        start = time.perf_counter()
                        loss = run.model(**batch).loss
                        engine.backward(loss)
                        for optimizer in run.optimizers:
                            optimizer.step()
                        losses.append(loss.item())
                        seconds = time.perf_counter() - start
                peak = _peak(device) - baseline
            found = predicted(config, device, run.placement)
            measured, homes = _counted(engine, trace), _homes(engine)
        finally:
            engine.remove()
            engine.home.discard()
    measured[REST] = max(0, peak - sum(measured.values()))
    plan = run.placement.plan
    return DryRun(
        predicted=_by_kind(found),
        measured=measured,
        predicted_peak=found.totals()["device"],
        measured_peak=peak,
        baseline=baseline,
        losses=losses,
        step_s=seconds,
        predicted_step_s=None if plan is None else plan.time.step_s,
        homes=homes,
    )


def _by_kind(footprint: Footprint) -> dict[str, int]:
    kinds = {WEIGHTS, POOLS, STATE, GRADIENTS, KEPT}
    found = {kind: footprint.device.get(kind, 0) for kind in (WEIGHTS, POOLS, STATE, GRADIENTS, KEPT)}
    found[REST] = sum(value for kind, value in footprint.device.items() if kind not in kinds)
    return found


def _counted(engine: Engine, trace: MemoryTrace) -> dict[str, int]:
    pools = sum(slot.buffer.nbytes for home in engine.home.streamed for slot in home._slots)
    return {
        WEIGHTS: trace.most[WEIGHTS] - pools,
        POOLS: pools,
        STATE: trace.most[STATE],
        GRADIENTS: trace.most[GRADIENTS],
        KEPT: trace.most[KEPT],
    }


def _homes(engine: Engine) -> dict[str, int]:
    streamed = {home.store.kind: len(home.layouts) for home in engine.home.streamed}
    moving = {member for home in engine.home.streamed for member in home.members}
    rest = sum(runner.block not in moving for runner in engine._runners) + engine.num_kept
    return {"device": rest, **streamed} if rest > 0 else streamed


def _warm_up(device: str) -> None:
    """Load what is loaded on first use, so that it counts as the baseline."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        model: Any = LlamaForCausalLM(config)
        model.to(device).train()
        optimizer = Lomo(model.parameters(), lr=1e-3)
        engine = fuse(model, optimizer)
        ids = torch.randint(3, 64, (2, 8)).to(device)
        engine.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        engine.remove()


def _begin(device: str) -> int:
    """Measure the peak from here on; returns what is held already."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    except OSError:
        return peak_resident_bytes()
    return resident_bytes()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_resident_bytes()
