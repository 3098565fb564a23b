"""Whether it fits: what a model takes, and what this machine has."""

from ..weights.home import resident_bytes
from .better_buy import Option, better_buy, compare_ranks, one_rank
from .comparison import Method, as_method, compare
from .footprint import Footprint, Unit, num_parameters, weights_bytes
from .hardware import (
    available_host_bytes,
    computes_bfloat16,
    device_available_bytes,
    peak_resident_bytes,
)
from .planner import Limits, Plan, make_plan
from .sharded import Sharding, rank_footprint, rank_shape, sharded_footprint
from .sharded_time import Link, ShardedTime, find_link, sharded_time
from .speeds import Speeds, find_speeds
from .step_shape import StepShape, footprint
from .timing import StepTime, step_time
from .tracing import KINDS
from .updates import OPTIMIZERS

__all__ = [
    "KINDS",
    "OPTIMIZERS",
    "Footprint",
    "Limits",
    "Link",
    "Method",
    "Option",
    "Plan",
    "ShardedTime",
    "Sharding",
    "Speeds",
    "StepShape",
    "StepTime",
    "Unit",
    "as_method",
    "available_host_bytes",
    "better_buy",
    "compare",
    "compare_ranks",
    "computes_bfloat16",
    "device_available_bytes",
    "find_link",
    "find_speeds",
    "footprint",
    "make_plan",
    "num_parameters",
    "one_rank",
    "peak_resident_bytes",
    "rank_footprint",
    "rank_shape",
    "resident_bytes",
    "sharded_footprint",
    "sharded_time",
    "step_time",
    "weights_bytes",
]
