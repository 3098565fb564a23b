"""Several ranks for people: what each holds by kind, and what one, two, four and more of them come to."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..planning import KINDS, Footprint, Limits, Link, Option
from ..units import format_bytes, format_count
from .plan_table import format_seconds


def ranks_report(
    options: Sequence[Option], sentence: str, whole: Footprint, link: Link, *, limits: Limits, on_cpu: bool
) -> RenderableType:
    """What :func:`rich.print` shows.

    Args:
        options: one rank, then more and more of them.
        sentence: which is the better buy.
        whole: of one rank that has the whole model and the whole batch.
        link: between them.
        limits: of the memory of each.
        on_cpu: the ranks are machines, not GPUs.
    """
    rates = f"Between them {link.rank_s / 1e9:.3g} GB/s each way ({link.source})"
    if link.node_s != link.rank_s:
        rates += f", {link.node_s / 1e9:.3g} GB/s between nodes"
    speed = f"{rates}; the other speeds are those of one of them."
    return Group(
        _by_kind(options[-1], whole, limits, on_cpu),
        _by_count(options, on_cpu),
        Text(speed),
        Text(sentence, style="bold"),
    )


def _by_kind(option: Option, whole: Footprint, limits: Limits, on_cpu: bool) -> Table:
    each = option.footprint
    assert each is not None
    what = "machine" if on_cpu else "GPU"
    table = Table(title=f"Each of {option.num_ranks} {what}s, at the fullest moment of a step", title_justify="left")
    columns = [(f"one {what} with all of it", whole.device), (f"each of {option.num_ranks}", each.device)]
    if each.host:
        columns.append(("and in host memory", each.host))
    table.add_column("kind")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for kind in KINDS:
        if any(kind in of for _, of in columns):
            table.add_row(kind, *(format_bytes(of[kind]) if kind in of else "-" for _, of in columns))
    table.add_section()
    table.add_row("total", *(format_bytes(sum(of.values())) for _, of in columns), style="bold")
    room = [limits.device, limits.device, limits.host][: len(columns)]
    table.add_row("may be used", *(format_bytes(size) for size in room))
    return table


def _by_count(options: Sequence[Option], on_cpu: bool) -> Table:
    what = "machine" if on_cpu else "GPU"
    table = Table(title=f"One {what}, and more that share the model and the batch", title_justify="left")
    for name, justify in (
        (f"{what}s", "right"),
        ("weights", "left"),
        ("fits", "left"),
        (f"memory of each {what}", "right"),
        ("a step", "right"),
        ("tokens/s", "right"),
        (f"of each {what}", "right"),
        ("bound by", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for option in options:
        if option.footprint is None:
            table.add_row(str(option.num_ranks), "-", "no", *["-"] * 5)
            continue
        table.add_row(
            str(option.num_ranks),
            option.home if option.num_ranks == 1 else f"shared, {option.home}",
            "yes" if option.fits else "no",
            format_bytes(option.footprint.totals()["device"]),
            format_seconds(option.step_s),
            format_count(option.tokens_per_s),
            format_count(option.tokens_per_rank_s),
            option.bottleneck,
        )
    return table
