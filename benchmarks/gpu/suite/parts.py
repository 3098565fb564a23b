"""The list of parts, in the order in which they run: what matters most comes before what takes longest."""

from __future__ import annotations

import functools
import importlib

from .context import Context
from .runner import Part


def _part(
    name: str, about: str, module: str, function: str, *arguments: object, seconds: float, device_gib: float, host_gib: float
) -> Part:  # fmt: skip
    # By name, so that this list is there before torch is.
    return Part(name, about, functools.partial(_call, module, function, arguments), seconds, device_gib, host_gib)


def _call(module: str, function: str, arguments: tuple[object, ...], context: Context) -> None:
    getattr(importlib.import_module(f"suite.{module}"), function)(context, *arguments)


PARTS = (
    _part(
        "parity",
        "the same bits in every home, fused or not; kernels beside their twins",
        "parity",
        "parity",
        seconds=120,
        device_gib=4,
        host_gib=8,
    ),
    _part(
        "resident",
        "LLaMA 7B on the card: speed, MFU, what the update costs",
        "resident",
        "resident",
        seconds=55,
        device_gib=30,
        host_gib=8,
    ),
    _part(
        "65b-24", "LLaMA 65B under 24 GiB", "streamed", "capped", "65b", 24.0, seconds=170, device_gib=24, host_gib=64
    ),
    _part("7b-8", "LLaMA 7B under 8 GiB", "streamed", "capped", "7b", 8.0, seconds=40, device_gib=8, host_gib=24),
    _part("7b-12", "LLaMA 7B under 12 GiB", "streamed", "capped", "7b", 12.0, seconds=40, device_gib=12, host_gib=24),
    _part(
        "overlap",
        "a trace: copies beside the computation",
        "overlap",
        "overlap",
        seconds=30,
        device_gib=12,
        host_gib=16,
    ),
    _part(
        "30b-24", "LLaMA 30B under 24 GiB", "streamed", "capped", "30b", 24.0, seconds=80, device_gib=24, host_gib=48
    ),
    _part(
        "13b-24", "LLaMA 13B under 24 GiB", "streamed", "capped", "13b", 24.0, seconds=45, device_gib=24, host_gib=32
    ),
    _part(
        "clipping",
        "LLaMA 7B: what clipping by norm costs",
        "resident",
        "clipping",
        seconds=55,
        device_gib=36,
        host_gib=8,
    ),
    _part(
        "long",
        "LLaMA 7B under 24 GiB: how long a sequence fits",
        "streamed",
        "long_sequences",
        seconds=70,
        device_gib=24,
        host_gib=32,
    ),
    _part(
        "others",
        "LLaMA 7B in plain PyTorch, with other optimizers",
        "resident",
        "others",
        seconds=60,
        device_gib=60,
        host_gib=8,
    ),
)
