"""A plan for people: bytes by kind and place, other methods beside it, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..planning import KINDS, Method, Plan
from ..units import GIB, format_bytes, format_count, format_duration

_PLACES = ("device", "host", "disk")
_HOMES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


def plan_report(
    plan: Plan, methods: Sequence[Method], *, title: str, on_cpu: bool, num_steps: int | None = None
) -> RenderableType:
    """What :func:`rich.print` shows.

    Args:
        plan: the plan.
        methods: other ways to train.
        title: model and batch, in one line.
        on_cpu: the device is the CPU, so that its memory is the host's.
        num_steps: of a run, for the total that is written to the disk.
    """
    lines = [Text(line) for line in (*_choices(plan, on_cpu), "", *_time(plan), *_disk(plan, num_steps))]
    return Group(Text(title, style="bold"), _by_kind(plan, on_cpu), _by_method(methods), *lines)


def methods_report(methods: Sequence[Method], *, title: str) -> RenderableType:
    """The same without a plan, because nothing fits."""
    return Group(Text(title, style="bold"), _by_method(methods))


def _by_kind(plan: Plan, on_cpu: bool) -> Table:
    names = {"device": "memory" if on_cpu else "device", "host": "host memory", "disk": "disk"}
    places = [place for place in _PLACES if not (on_cpu and place == "host")]
    table = Table(title="This plan, at the fullest moment of a step", title_justify="left")
    table.add_column("kind")
    for place in places:
        table.add_column(names[place], justify="right")
    of = {place: getattr(plan.footprint, place) for place in places}
    for kind in KINDS:
        if any(kind in of[place] for place in places):
            table.add_row(kind, *(format_bytes(of[place][kind]) if kind in of[place] else "-" for place in places))
    totals = plan.footprint.totals()
    table.add_section()
    table.add_row("total", *(format_bytes(totals[place]) for place in places), style="bold")
    table.add_row("may be used", *(format_bytes(getattr(plan.limits, place)) for place in places))
    return table


def _by_method(methods: Sequence[Method]) -> Table:
    table = Table(title="Methods compared, GiB on the device, activations with checkpointing")
    table.title_justify = "left"
    table.add_column("method")
    for name in ("weights", "gradients", "optimizer state", "activations", "total"):
        table.add_column(name, justify="right")
    for method in methods:
        parts = (method.weights, method.gradients, method.state, method.activations, method.total)
        table.add_row(method.name, *(f"{num_bytes / GIB:.2f}" for num_bytes in parts))
    return table


def _choices(plan: Plan, on_cpu: bool) -> list[str]:
    runs = [(home, [name for name, _ in some]) for home, some in groupby(plan.homes, key=lambda pair: pair[1])]
    lines = []
    for home, names in runs:
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        place = "in memory" if on_cpu and home == "device" else _HOMES[home]
        lines.append(f"Weights of {span}: {place}.")
    inputs = "" if on_cpu else f"; their inputs are kept {_HOMES[plan.block_inputs]}"
    lines.append(f"Through a layer {_count(plan.micro_batch_size, 'sequence')} at a time{inputs}.")
    if plan.keep_activations:
        which = f"the last {plan.keep_activations} layers" if plan.keep_activations > 1 else "the last layer"
        lines.append(f"Activations of {which} are kept, as there is room; those of the others are computed again.")
    return lines


def _time(plan: Plan) -> list[str]:
    time = plan.time
    lanes = {"compute": time.compute_s, "PCIe": time.bus_s, "disk": time.disk_s}
    shown = ", ".join(f"{name} {format_seconds(value)}" for name, value in lanes.items() if value)
    lines = [
        f"Expected time of a step: {format_seconds(time.step_s)} ({shown}), {format_count(plan.tokens / time.step_s)} tokens/s; "
        f"bottleneck: {time.bottleneck}."
    ]
    if time.tokens_to_hide is None:
        lines.append(
            "No number of tokens hides the transfers: every token's block inputs take longer than its computation."
        )
    elif time.tokens_to_hide:
        state = "hidden" if time.tokens_to_hide <= plan.tokens else "not hidden"
        lines.append(
            f"Transfers are hidden from {format_count(time.tokens_to_hide)} tokens a step on; at {format_count(plan.tokens)} "
            f"they are {state}."
        )
    lines.append(f"Speeds: {_speeds(plan)}.")
    return lines


def _speeds(plan: Plan) -> str:
    speeds = plan.speeds
    parts = [f"{speeds.flops / 1e9:.4g} GFLOP/s ({speeds.sources['flops']})"]
    if plan.time.bus_s:
        parts.append(f"{speeds.to_device / 1e9:.3g} GB/s to the device ({speeds.sources['to_device']})")
        parts.append(f"{speeds.from_device / 1e9:.3g} GB/s from it ({speeds.sources['from_device']})")
    if plan.time.disk_s:
        parts.append(f"disk {speeds.disk_read / 1e9:.3g} GB/s read ({speeds.sources['disk_read']})")
        parts.append(f"{speeds.disk_write / 1e9:.3g} GB/s written ({speeds.sources['disk_write']})")
    if speeds.memory is not None:
        parts.append(f"{speeds.memory / 1e9:.3g} GB/s of its own memory ({speeds.sources['memory']})")
    return ", ".join(parts)


def _disk(plan: Plan, num_steps: int | None) -> list[str]:
    written = plan.time.disk_write_bytes
    if not written:
        return []
    text = f"Each step writes {written / 1e9:.3g} GB to the disk, 1000 steps {1000 * written / 1e12:.3g} TB"
    if num_steps is not None:
        total = plan.disk_bytes_written(num_steps)
        text += f"; a run of {num_steps} steps {total / 1e12:.3g} TB with the working copy"
    return [f"{text}. An SSD's warranty names the TB it is made for (TBW)."]


def format_seconds(seconds: float) -> str:
    """Two figures of short times, else minutes and hours."""
    return f"{seconds:.2g} s" if seconds < 10 else format_duration(seconds)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
