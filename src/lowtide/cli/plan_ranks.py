"""``lowtide plan --ranks``: what each of several ranks holds, and whether they are the better buy."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from .arguments import UsageError
from .quantities import at_least, rate

if TYPE_CHECKING:
    from ..planning import Footprint, Limits, Link, Option, Plan, Sharding, Speeds, StepShape

# In the order of the checks: each means nothing without --ranks.
_FLAGS = ("ranks_per_node", "link_bandwidth", "node_bandwidth", "reduce_dtype")


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for several ranks."""
    group = parser.add_argument_group("several GPUs that share the model, or machines with --device cpu")
    group.add_argument(
        "--ranks",
        type=at_least(2),
        metavar="N",
        help="so many, each with the memory and the speeds named here; --batch-size is of all together, --micro-batch-size of each",
    )
    group.add_argument(
        "--ranks-per-node",
        type=at_least(1),
        metavar="M",
        help="spread the weights within groups of M only, each with a whole copy (default: over all)",
    )
    group.add_argument(
        "--link-bandwidth",
        type=rate,
        metavar="RATE",
        help="bytes a second between them, each way, as 12GB/s (default: that of PCIe; 1.25GB/s with --device cpu)",
    )
    group.add_argument(
        "--node-bandwidth",
        type=rate,
        metavar="RATE",
        help="the same between groups of --ranks-per-node, for each rank (default: as --link-bandwidth)",
    )
    group.add_argument(
        "--reduce-dtype",
        choices=("float32", "weights"),
        help="in which gradients are added up over ranks, as in lowtide train (default: float32)",
    )


def check_ranks(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: flags that contradict each other.
    """
    if args.ranks is None:
        for name in _FLAGS:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} means nothing without --ranks")
        return
    if args.keep_activations:
        raise UsageError("--keep-activations is for one process, as in lowtide train: leave it out with --ranks")
    if args.batch_size < args.ranks:
        raise UsageError(
            f"--batch-size is that of all ranks together, and {args.batch_size} cannot be shared by {args.ranks}: raise it"
        )
    if args.ranks_per_node is not None and args.ranks % args.ranks_per_node:
        raise UsageError(
            f"--ranks {args.ranks} cannot be divided into groups of --ranks-per-node {args.ranks_per_node}"
        )
    if args.node_bandwidth is not None and args.ranks_per_node in (None, args.ranks):
        raise UsageError("--node-bandwidth is between groups, and there is one: give --ranks-per-node")


@dataclasses.dataclass(frozen=True)
class RankAnswer:
    """What is said about several ranks.

    Attributes:
        options: one rank, then more and more of them.
        better: which is the better buy; None if nothing fits.
        sentence: why.
        whole: bytes of one rank that has the whole model and the whole batch.
        sharding: how the ranks share the model.
        link: between them.
    """

    options: tuple[Option, ...]
    better: Option | None
    sentence: str
    whole: Footprint
    sharding: Sharding
    link: Link

    @property
    def footprint(self) -> Footprint:
        """Of each of the ranks that were asked for."""
        found = self.options[-1].footprint
        assert found is not None
        return found

    def shown(self) -> dict[str, Any]:
        """Arguments of the report."""
        return {"options": self.options, "sentence": self.sentence, "whole": self.whole, "link": self.link}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sharding = self.sharding
        return {
            "num_ranks": sharding.num_ranks,
            "ranks_per_node": sharding.ranks_per_node,
            "reduce_dtype": "weights" if sharding.reduce_dtype == "weights" else "float32",
            "link": dataclasses.asdict(self.link),
            "options": [option.to_dict() for option in self.options],
            "better_buy": None if self.better is None else self.better.num_ranks,
            "sentence": self.sentence,
        }


def plan_ranks(
    args: argparse.Namespace, shape: StepShape, limits: Limits, speeds: Speeds
) -> tuple[Plan | None, RankAnswer]:
    """The plan for one rank, if there is one, and the comparison.

    Raises:
        MemoryError: nothing fits, on one rank or several.
    """
    from ..planning import Sharding, better_buy, compare_ranks, find_link, one_rank

    reduce_dtype = "weights" if args.reduce_dtype == "weights" else "auto"
    sharding = Sharding(args.ranks, args.ranks_per_node, reduce_dtype)
    link = find_link(speeds, shape.device, {"rank_s": args.link_bandwidth, "node_s": args.node_bandwidth})
    weights, size = {"cpu": "host"}.get(args.weights, args.weights), args.micro_batch_size
    single, plan = one_rank(shape, limits=limits, speeds=speeds, weights=weights, micro_batch_size=size)
    options = compare_ranks(
        shape, sharding, single=single, limits=limits, speeds=speeds, link=link, weights=weights, micro_batch_size=size
    )
    better, sentence = better_buy(options, "machine" if shape.device == "cpu" else "GPU")
    if better is None:
        raise MemoryError(f"no plan fits: {_needs(options, limits)}. {sentence}")
    whole = shape.footprint(micro_batch_size=size)
    return plan, RankAnswer(options, better, sentence, whole, sharding, link)


def _needs(options: tuple[Option, ...], limits: Limits) -> str:
    from ..units import format_bytes

    last = options[-1]
    assert last.footprint is not None
    used = format_bytes(last.footprint.totals()["device"])
    return f"each of {last.num_ranks} would take {used} where {format_bytes(limits.device)} may be used"
