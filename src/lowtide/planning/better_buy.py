"""Whether more GPUs, or another home for the weights on one, is the better buy for a model and a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .footprint import Footprint
from .planner import Limits, Plan, find_plan, micro_batches
from .sharded import Sharding, rank_footprint, rank_shape
from .sharded_time import Link, ShardedTime, sharded_time
from .speeds import Speeds
from .step_shape import StepShape

# Throughputs that differ by less are called equal: times are not known better.
_EQUAL = 0.02


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to train with some number of ranks.

    Attributes:
        num_ranks: processes, each with a GPU of its own (or a machine, on CPUs).
        home: where weights live: with one rank "device", "host" or "disk", or several of them joined by " + "; with several ranks
            "device", or "host" for rows in host memory.
        micro_batch_size: samples of a rank that go through a block at a time.
        footprint: of a rank; None for one rank if nothing fits.
        fits: within the limits.
        step_s: seconds of a step of all ranks together.
        tokens_per_s: of all ranks together.
        bottleneck: "compute", "link", "PCIe" or "disk".
        time: what takes how long, with several ranks.
    """

    num_ranks: int
    home: str
    micro_batch_size: int
    footprint: Footprint | None
    fits: bool
    step_s: float
    tokens_per_s: float
    bottleneck: str
    time: ShardedTime | None = None

    @property
    def tokens_per_rank_s(self) -> float:
        """Tokens a second of each rank."""
        return self.tokens_per_s / self.num_ranks

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for numbers that there are not."""
        known = self.footprint is not None
        return {
            "num_ranks": self.num_ranks,
            "home": self.home,
            "fits": self.fits,
            "micro_batch_size": self.micro_batch_size,
            "footprint": self.footprint.to_dict() if self.footprint else None,
            "totals": self.footprint.totals() if self.footprint else None,
            "step_s": self.step_s if known else None,
            "tokens_per_s": self.tokens_per_s if known else None,
            "tokens_per_rank_s": self.tokens_per_rank_s if known else None,
            "bottleneck": self.bottleneck if known else None,
            "time": self.time.to_dict() if self.time else None,
        }


def rank_counts(sharding: Sharding) -> tuple[int, ...]:
    """Numbers of ranks worth comparing: powers of two, and the one that was asked for; whole groups beyond one group."""
    group = sharding.num_shards
    powers = [2**exponent for exponent in range(1, sharding.num_ranks.bit_length())]
    counts = sorted({*powers, sharding.num_ranks} - {1})
    return tuple(n for n in counts if n <= sharding.num_ranks and (n <= group or n % group == 0))


def one_rank(
    shape: StepShape,
    *,
    limits: Limits,
    speeds: Speeds,
    weights: str = "auto",
    micro_batch_size: int | None = None,
) -> tuple[Option, Plan | None]:
    """What the planner chooses for one rank, and its plan; None if nothing fits. Arguments as for ``planner.make_plan``.

    All blocks are computed again, as several ranks do.
    """
    plan = find_plan(
        shape, limits=limits, speeds=speeds, weights=weights, micro_batch_size=micro_batch_size, keep_activations=0
    )
    if plan is None:
        return Option(1, "", micro_batch_size or 1, None, False, 0.0, 0.0, ""), None
    home = " + ".join(home for home in ("device", "host", "disk") if plan.count(home))
    speed = plan.tokens / plan.time.step_s
    size = plan.micro_batch_size
    return Option(1, home, size, plan.footprint, True, plan.time.step_s, speed, plan.time.bottleneck), plan


def several_ranks(
    shape: StepShape,
    sharding: Sharding,
    *,
    limits: Limits,
    speeds: Speeds,
    link: Link,
    weights: str = "auto",
    micro_batch_size: int | None = None,
) -> Option:
    """A model that ranks share, with the largest micro-batch that fits; with the smallest if none does.

    Args:
        shape: of the step of all ranks together.
        sharding: how they share it; whether its rows are in host memory is decided here.
        limits: of the device memory of each rank, and of the host memory of the ranks of a node together.
        speeds: of each rank's machine.
        link: between ranks.
        weights: device; host for rows in host memory; or auto: there if a rank's device has too little memory for them.
        micro_batch_size: samples of a rank that go through a block at a time; None to choose.
    """
    rank = rank_shape(shape, sharding)
    sizes = micro_batches(rank.batch_size) if micro_batch_size is None else (min(micro_batch_size, rank.batch_size),)
    homes = (
        {"auto": ("device", "host"), "host": ("host",)}.get(weights, ("device",))
        if rank.device != "cpu"
        else ("device",)
    )
    tried = []
    for home in homes:
        of = dataclasses.replace(sharding, offload=home == "host")
        for size in sizes:
            footprint = rank_footprint(rank, of, size)
            used = footprint.totals()
            fits = used["device"] <= limits.device and used["host"] * of.num_shards <= limits.host
            tried.append((of, home, size, footprint, fits))
            if fits:
                break
        if fits:
            break
    # If nothing fits, the one that is shown is that with everything on the device.
    of, home, size, footprint, fits = tried[-1] if tried[-1][-1] else tried[len(sizes) - 1]
    time = sharded_time(rank, of, speeds, link)
    speed = shape.batch_size * shape.seq_len / time.step_s
    return Option(sharding.num_ranks, home, size, footprint, fits, time.step_s, speed, time.bottleneck, time)


def compare_ranks(
    shape: StepShape,
    sharding: Sharding,
    *,
    single: Option,
    limits: Limits,
    speeds: Speeds,
    link: Link,
    weights: str = "auto",
    micro_batch_size: int | None = None,
) -> tuple[Option, ...]:
    """One rank, then 2, 4, 8 and so on up to those that were asked for; arguments as for :func:`several_ranks`.

    Args:
        single: of :func:`one_rank`.
    """
    options = [single]
    for count in rank_counts(sharding):
        group = sharding.ranks_per_node
        of = dataclasses.replace(sharding, num_ranks=count, ranks_per_node=group if group and count > group else None)
        options.append(
            several_ranks(
                shape, of, limits=limits, speeds=speeds, link=link, weights=weights, micro_batch_size=micro_batch_size
            )
        )
    return tuple(options)


def better_buy(options: Sequence[Option], what: str = "GPU") -> tuple[Option | None, str]:
    """The option whose ranks do most each (of equal ones that with the fewest), and a sentence that says why.

    Args:
        options: of :func:`compare_ranks`; the first has one rank.
        what: a rank is called: "GPU", or "machine".
    """
    single, several = options[0], [option for option in options[1:] if option.fits]
    most = options[-1]
    if not several and not single.fits:
        return None, f"Nothing fits, neither one {what} nor up to {most.num_ranks} that share the model."
    if not several:
        return (
            single,
            f"One {what} {_with(single)} is the only way that fits: {most.num_ranks} that share the model have too little memory.",
        )
    best = _best(several)
    if not single.fits:
        fewest = several[0]
        also = "" if best is fewest else f", and with {best.num_ranks} each of them does most"
        return (
            best,
            f"One {what} cannot train this at all, whatever the home of its weights; {fewest.num_ranks} that share the model can{also}.",
        )
    times, each = _ratios(best, single)
    if each > 1 + _EQUAL:
        return best, (
            f"{_of(best, what)} are {times} times as fast as one {_with(single)}, so each {what} does {each:.2g} times as much: "
            f"{best.num_ranks} {what}s are the better buy."
        )
    equal = [option for option in several if _ratios(option, single)[1] >= 1 - _EQUAL]
    if equal:
        times, _ = _ratios(equal[-1], single)
        return equal[-1], (
            f"{_of(equal[-1], what)} are {times} times as fast as one {_with(single)}, so each {what} does as much: "
            f"{equal[-1].num_ranks} are as good a buy as one."
        )
    fastest = max(several, key=lambda option: option.tokens_per_s)
    times, each = _ratios(fastest, single)
    if fastest.tokens_per_s < single.tokens_per_s:
        slower = f"{single.tokens_per_s / fastest.tokens_per_s:.2g}"
        return single, (
            f"One {what} {_with(single)} is {slower} times as fast as {fastest.num_ranks} over this link: one {what} is the better buy."
        )
    return single, (
        f"{_of(fastest, what)} are {times} times as fast as one {_with(single)}, so each {what} does only {each:.2g} times as much: one {what} "
        "is the better buy, unless time counts."
    )


def _ratios(option: Option, single: Option) -> tuple[str, float]:
    """How many times as fast as one rank, in words, and how many times as much each does."""
    return f"{option.tokens_per_s / single.tokens_per_s:.2g}", option.tokens_per_rank_s / single.tokens_per_rank_s


def _of(option: Option, what: str) -> str:
    where = ", with its rows in host memory," if option.home == "host" else ""
    return f"{option.num_ranks} {what}s that share the model{where}"


def _best(options: Sequence[Option]) -> Option:
    """Of those whose ranks do equally much the one with the fewest."""
    most = max(option.tokens_per_rank_s for option in options)
    return next(option for option in options if option.tokens_per_rank_s >= (1 - _EQUAL) * most)


def _with(option: Option) -> str:
    places = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
    homes = option.home.split(" + ")
    if homes == ["device"]:
        return "that holds it whole"
    return "with weights " + " and ".join(places[home] for home in homes)
