"""Models larger than the memory of the card: the planner chooses homes under a limit, and what it predicted stands beside what was."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig

from lowtide.planning import Limits, Plan, Speeds, available_host_bytes, find_speeds, make_plan
from lowtide.planning.planner import find_plan, micro_batches
from lowtide.units import format_bytes

from .context import Context, limit_device_memory
from .measure import planned, setup_of, step_shape, train_and_report
from .models import llama_config, num_parameters

# Of what is free: what else the machine does, and what a prediction may be off by.
_USABLE_DEVICE, _USABLE_HOST, _USABLE_DISK = 0.92, 0.95, 0.9
# The paper's figures for the same models, all GPUs together (table 2, RTX 3090 of 24 GB, batch 1 x 1024).
_PAPER = {"7b": "770 on one", "13b": "132 on two", "30b": "46 on four", "65b": "39 on eight"}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A plan, and the step it is for."""

    config: LlamaConfig
    batch_size: int
    seq_len: int
    plan: Plan


def capped(context: Context, name: str, cap_gib: float) -> None:
    """One model under one limit, in the largest batch for which there is a plan."""
    memory = limit_device_memory(context, cap_gib)
    with tempfile.TemporaryDirectory(dir=context.directory) as folder:
        chosen = choose(context, name, memory["usable"], Path(folder))
        homes = Counter(home for _, home in chosen.plan.homes)
        described = ", ".join(f"{count} {home}" for home, count in homes.items())
        total = llama_config(context, name).num_hidden_layers
        layers = chosen.config.num_hidden_layers
        shortened = f"only {layers} of {total} layers fit here; " if layers < total else ""
        batch, seq = chosen.batch_size, chosen.seq_len
        note = f"{shortened}{batch} x {seq} tokens, micro-batch {chosen.plan.micro_batch_size}, block inputs {chosen.plan.block_inputs}"
        context.row(
            f"{name}, {cap_gib:g} GiB", status="begun", homes=described, note=note, cap=memory["cap"], **planned(chosen.plan.footprint)
        )  # fmt: skip
        train_and_report(
            context, f"{name}, {cap_gib:g} GiB", chosen.config, setup_of(chosen.plan, batch, seq, Path(folder) / "weights"),
            most_steps=3, plan_step_s=f"{chosen.plan.time.step_s:.3f}", homes=described, cap=memory["cap"],
            note=f"{note}; LOMO paper: {_PAPER[name]} RTX 3090", **planned(chosen.plan.footprint),
        )  # fmt: skip


def choose(context: Context, name: str, usable: int, folder: Path) -> Chosen:
    """The largest batch for which there is a plan: with host memory alone, else with the disk, else with fewer layers.

    Args:
        usable: bytes of device memory.
        folder: on the disk that may hold weights.

    Raises:
        MemoryError: not even two layers fit.
    """
    config = llama_config(context, name)
    seq = 32 if context.rehearse else 1024
    free_disk = int(_USABLE_DISK * psutil.disk_usage(str(folder)).free)
    speeds, why = _speeds(context, folder), "weights and block inputs alone are more than there is room for"
    while True:
        for disk in (0, free_disk):
            for batch in (8, 4, 2, 1):
                limits = dataclasses.replace(_limits(context, config, usable, batch, seq), disk=disk)
                # Weights and block inputs, 2 bytes each: without room for these there is no need to plan.
                least = num_parameters(config) + batch * seq * config.hidden_size * config.num_hidden_layers
                if 2 * least > limits.device + limits.host + disk:
                    continue
                plan = find_plan(
                    step_shape(context, config, batch, seq), limits=limits, speeds=speeds, keep_activations=0
                )
                if plan is None:
                    why = f"no plan for {batch} x {seq}"
                    continue
                return Chosen(config, batch, seq, plan)
        if config.num_hidden_layers <= 2:
            raise MemoryError(f"{name} under {format_bytes(usable)} of device memory: {why}")
        config = llama_config(
            context, name, num_layers=config.num_hidden_layers - max(1, config.num_hidden_layers // 20)
        )


def _limits(context: Context, config: LlamaConfig, usable: int, batch: int, seq: int) -> Limits:
    """What a plan may take. A rehearsal has so little that part of the layers must live elsewhere."""
    host = int(_USABLE_HOST * available_host_bytes())
    if context.rehearse:
        shape = step_shape(context, config, batch, seq)
        ways = [(size, place) for size in micro_batches(batch) for place in ("device", "host")]
        whole = min(
            shape.footprint("device", micro_batch_size=size, block_inputs=place).totals()["device"]
            for size, place in ways
        )
        return Limits(whole - 1, host, 0)
    return Limits(int(_USABLE_DEVICE * usable), host, 0)


@cache
def _measured(dtype: torch.dtype, device: str, folder: Path) -> Speeds:
    return find_speeds(dtype=dtype, device=device, directory=folder)


def _speeds(context: Context, folder: Path) -> Speeds:
    if context.rehearse:
        # So slow a bus that what moves decides, as it does for a real model: else a larger micro-batch is as good as a layer at home.
        found = find_speeds(dtype=context.dtype, device="cpu", measure=False)
        return dataclasses.replace(found, to_device=1e6, from_device=1e6)
    return _measured(context.dtype, "cuda", folder)


def long_sequences(context: Context, cap_gib: float = 24) -> None:
    """How many tokens of one sequence fit, and what they cost: 7B under a limit, the length doubled until it does not go on."""
    memory = limit_device_memory(context, cap_gib)
    config = llama_config(context, "7b")
    seq, last = (64 if context.rehearse else 8192), 0.0
    for _ in range(3 if context.rehearse else 6):
        # Products grow with the length, attention with its square.
        if context.seconds_left() < 4 * 2 * last + 5:
            context.row(f"{seq} tokens", status="not run", note="no time left")
            return
        case = f"7b, {cap_gib:g} GiB, 1 x {seq}"
        try:
            with tempfile.TemporaryDirectory(dir=context.directory) as folder:
                plan = make_plan(
                    step_shape(context, config, 1, seq),
                    limits=_limits(context, config, memory["usable"], 1, seq),
                    speeds=_speeds(context, context.directory), keep_activations=0,
                )  # fmt: skip
                setup = setup_of(plan, 1, seq, Path(folder) / "weights")
                seconds = train_and_report(
                    context, case, config, setup, most_steps=1, cap=memory["cap"],
                    plan_step_s=f"{plan.time.step_s:.3f}", homes=f"{plan.count('device')} device, {plan.count('host')} host",
                    note=f"block inputs {plan.block_inputs}", **planned(plan.footprint),
                )  # fmt: skip
        except MemoryError as error:
            context.row(case, status="does not fit", cap=memory["cap"], note=f"says the planner: {error}")
            return
        except torch.OutOfMemoryError:
            context.row(case, status="out of memory", cap=memory["cap"], note="although there was a plan")
            return
        last, seq = seconds[-1], 2 * seq
