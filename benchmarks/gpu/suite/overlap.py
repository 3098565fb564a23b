"""A trace of a step whose weights come from host memory: how much of the copying is hidden behind the computation."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .context import Context
from .measure import Setup, Training
from .models import llama_config, random_model

Interval = tuple[float, float]


def overlap(context: Context) -> None:
    """Eight layers of the 13B shape, all weights in host memory; the trace opens in Perfetto or chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile

    config = llama_config(context, "13b", num_layers=8)
    batch, seq = (2, 32) if context.rehearse else (8, 1024)
    training = Training(context, random_model(context, config), Setup(batch, seq, weights="cpu", block_inputs="cpu"))
    training.step()
    training.step()
    plain_s = training.step()
    case = f"13b shape, 8 layers, {batch} x {seq}"
    context.row(case, **training.speed([plain_s]), **training.memory(), note="not traced")
    activities = [ProfilerActivity.CPU] if context.rehearse else [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        traced_s = training.step()
    path = context.output / f"trace-{'cpu' if context.rehearse else 'gpu'}.json.gz"
    profiler.export_chrome_trace(str(path))
    found = hidden_copies(read_trace(path))
    if found is None:
        note = "the trace holds no kernels or copies of a card"
    else:
        note = (
            f"copies {found['copy_s']:.4f} s, kernels {found['kernel_s']:.4f} s, copies while nothing was computed {found['exposed_s']:.4f} s; "
            f"traced step {traced_s:.4f} s; {path.name}"
        )
    context.row(
        case, **training.speed([plain_s]), **training.memory(),
        ratio="" if found is None else f"{found['hidden_share']:.3f}", note=f"ratio: share of the copying that is hidden; {note}",
    )  # fmt: skip


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace."""
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def hidden_copies(events: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds of copies between host and device, of kernels, and of copies that no kernel runs beside; None without either."""
    copies, kernels = [], []
    for event in events:
        kind, name = str(event.get("cat", "")).lower(), str(event.get("name", ""))
        if event.get("ph") != "X" or kind not in ("kernel", "gpu_memcpy"):
            continue
        interval = (float(event["ts"]) / 1e6, (float(event["ts"]) + float(event["dur"])) / 1e6)
        if kind == "kernel":
            kernels.append(interval)
        elif "HtoD" in name or "DtoH" in name:
            copies.append(interval)
    if not copies or not kernels:
        return None
    copied, computed = union(copies), union(kernels)
    copy_s, kernel_s = length(copied), length(computed)
    hidden_s = copy_s + kernel_s - length(union([*copied, *computed]))
    return {
        "copy_s": copy_s, "kernel_s": kernel_s, "exposed_s": copy_s - hidden_s, "hidden_share": hidden_s / copy_s if copy_s else 1.0,
    }  # fmt: skip


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time, each covered once."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of intervals that do not overlap, together."""
    return sum(end - start for start, end in intervals)
