"""What the model says of machines that nobody here has measured."""

from __future__ import annotations

from lowtide.planning import Limits, Option, Sharding, Speeds, one_rank, rank_shape, sharded_time, step_time
from lowtide.planning.better_buy import several_ranks
from lowtide.planning.speeds import ASSUMED

from .machines import (
    A100_SOURCE,
    GIB,
    H100_SOURCE,
    MACHINES,
    OF_PEAK_BUS,
    OF_PEAK_MEMORY,
    RTX4090,
    SYSTEM_BYTES,
    USABLE,
    Machine,
)
from .published import fitted_efficiency, fitted_link
from .shapes import homes, step_shape
from .tables import number, table

MODELS = ("Llama 3.2 1B", "Llama 3.2 3B", "Llama 3.1 8B", "Qwen3 14B", "Qwen3 32B", "LLaMA 65B", "Llama 3.1 70B")
BATCH, SEQ_LEN = 16, 1024
DISK_BYTES = 500 * 10**9
TOKENS = 10_000_000
HEAD = ("machine", "model", "weights", "GiB of a card", "GiB of host memory", "GB of disk", "tokens/s", "hours for 10M tokens", "bound by", "tokens a step that hide transfers")  # fmt: skip


def row(machine: Machine, model: str) -> list[str]:
    """A line of the table."""
    shape = step_shape(model, BATCH, SEQ_LEN, optimizer="adalomo")
    speeds = machine.speeds(fitted_efficiency())
    limits = Limits(int(USABLE * machine.device), machine.host - SYSTEM_BYTES, DISK_BYTES)
    hidden = ""
    if machine.cards == 1:
        option, plan = one_rank(shape, limits=limits, speeds=speeds)
        if plan is not None:
            tokens = plan.time.tokens_to_hide
            hidden = "never" if tokens is None else f"{tokens:,}" if tokens else ""
    else:
        link = machine.between_cards(fitted_link())
        option = several_ranks(shape, Sharding(machine.cards), limits=limits, speeds=speeds, link=link)
    return [machine.name, model, *_cells(option, hidden)]


def _cells(option: Option, hidden: str) -> list[str]:
    if option.footprint is None or not option.fits:
        return ["does not fit", *[""] * (len(HEAD) - 3)]
    used = option.footprint.totals()
    home = option.home if option.num_ranks == 1 else f"shared, {option.home}"
    hours = TOKENS / option.tokens_per_s / 3600
    places = [
        f"{used['device'] / GIB:.1f}",
        f"{option.num_ranks * used['host'] / GIB:.0f}",
        f"{used['disk'] / 1e9:.0f}",
    ]
    return [home, *places, number(option.tokens_per_s), number(hours), option.bottleneck, hidden]


def predictions(machines: tuple[Machine, ...] = MACHINES, models: tuple[str, ...] = MODELS) -> list[list[str]]:
    """All lines."""
    return [row(machine, model) for machine in machines for model in models]


def predictions_table() -> str:
    """All machines and models."""
    return table(HEAD, predictions())


def machines_table() -> str:
    """What is assumed of each."""
    rows = []
    for machine in MACHINES:
        efficiency = fitted_efficiency() if machine.efficiency is None else machine.efficiency
        link = "" if machine.cards == 1 else f"{machine.between_cards(fitted_link()).rank_s / 1e9:.3g}"
        cells = [
            machine.name,
            f"{machine.peak / 1e12:g}",
            f"{efficiency:.2f}",
            f"{machine.memory / 1e9:g}",
            f"{machine.pcie / 1e9:.0f}",
            link,
        ]
        rows.append([*cells, f"{machine.device / GIB:.0f}", f"{machine.host / GIB:.0f}", machine.source])
    head = ("machine", "peak, TFLOP/s", "of it in products", "memory, GB/s", "PCIe, GB/s", "link, GB/s, used", "GiB of a card", "GiB of host memory", "source of peak and memory")  # fmt: skip
    used = (
        f"Used of that: {OF_PEAK_BUS:.0%} of PCIe, {OF_PEAK_MEMORY:.0%} of the memory's bandwidth (in updates), {USABLE:.0%} of a card's memory, all of the host's but "
        f"{SYSTEM_BYTES / GIB:.0f} GiB. Disk: {DISK_BYTES / 1e9:.0f} GB that read {ASSUMED['disk_read'] / 1e9:.0f} and write {ASSUMED['disk_write'] / 1e9:.0f} GB/s. "
        f"Efficiency of the A100: {A100_SOURCE}; of the H100: {H100_SOURCE}. "
        f"A step: {BATCH} sequences of {SEQ_LEN} tokens over all cards together, AdaLomo, bfloat16, no clipping, no padding."
    )
    return f"{table(head, rows)}\n\n{used}"


def example_table() -> str:
    """The terms of one step, with their sizes."""
    model, machine = "Llama 3.1 8B", RTX4090
    shape = step_shape(model, BATCH, SEQ_LEN, optimizer="adalomo")
    clipped = step_shape(model, BATCH, SEQ_LEN, optimizer="adalomo", exact_clipping=True)
    speeds = machine.speeds(fitted_efficiency())
    host, disk, two = (
        step_time(each, homes(each, home), "device", speeds)
        for each, home in ((shape, "host"), (shape, "disk"), (clipped, "host"))
    )
    tokens = BATCH * SEQ_LEN
    sharding = Sharding(8)
    link = sharded_time(rank_shape(shape, sharding), sharding, speeds, machine.between_cards(fitted_link()))
    rows = [
        ["operations", f"{host.flops / 1e12:,.0f} TFLOP, {host.flops / tokens / 1e9:.1f} GFLOP a token", f"{speeds.flops / 1e12:.0f} TFLOP/s", f"{host.compute_s - host.update_s:.2f}"],
        ["operations with exact clipping", f"{two.flops / 1e12:,.0f} TFLOP", f"{speeds.flops / 1e12:.0f} TFLOP/s", f"{two.compute_s - two.update_s:.2f}"],
        ["update", f"{host.update_s * _memory(speeds) / 1e9:.0f} GB, {host.update_s * _memory(speeds) / shape.num_parameters:.0f} bytes a parameter", f"{_memory(speeds) / 1e9:.0f} GB/s", f"{host.update_s:.2f}"],
        ["weights over PCIe, the busier direction", f"{host.bus_bytes / 1e9:.1f} GB", f"{speeds.to_device / 1e9:.0f} GB/s", f"{host.bus_s:.2f}"],
        ["the same with exact clipping", f"{two.bus_bytes / 1e9:.1f} GB", f"{speeds.to_device / 1e9:.0f} GB/s", f"{two.bus_s:.2f}"],
        ["weights from and to disk", f"{disk.disk_read_bytes / 1e9:.1f} and {disk.disk_write_bytes / 1e9:.1f} GB", f"{speeds.disk_read / 1e9:.0f} and {speeds.disk_write / 1e9:.0f} GB/s", f"{disk.disk_s:.2f}"],
        ["first block, which nothing hides, from host memory", "", f"{speeds.to_device / 1e9:.0f} GB/s", f"{host.exposed_s:.2f}"],
        ["eight ranks: weights gathered", f"{link.gather_bytes / 1e9:.1f} GB to each", f"{fitted_link() / 1e9:.1f} GB/s", f"{link.gather_bytes / fitted_link():.2f}"],
        ["eight ranks: gradients scattered, float32", f"{link.scatter_bytes / 1e9:.1f} GB to each", f"{fitted_link() / 1e9:.1f} GB/s", f"{link.scatter_bytes / fitted_link():.2f}"],
    ]  # fmt: skip
    step = (
        f"{model}, {BATCH} x {SEQ_LEN} tokens, AdaLomo, bfloat16, {machine.name}. With weights in host memory a step takes {host.step_s:.2f} s, bound by "
        f"{host.bottleneck}; from disk {disk.step_s:.2f} s, bound by {disk.bottleneck}. Transfers from host memory are hidden from "
        f"{host.tokens_to_hide:,} tokens a step on, from disk from {disk.tokens_to_hide:,}."
    )
    return f"{table(('term', 'amount in a step', 'speed', 'seconds alone'), rows)}\n\n{step}"


def _memory(speeds: Speeds) -> float:
    assert speeds.memory is not None
    return speeds.memory
