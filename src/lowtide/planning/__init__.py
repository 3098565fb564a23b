"""Whether it fits: what a model takes, and what this machine has."""

from .comparison import Method, as_method, compare
from .footprint import Footprint, Unit, num_parameters, weights_bytes
from .hardware import (
    available_host_bytes,
    computes_bfloat16,
    device_available_bytes,
    peak_resident_bytes,
    resident_bytes,
)
from .planner import Limits, Plan, make_plan
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
    "Method",
    "Plan",
    "Speeds",
    "StepShape",
    "StepTime",
    "Unit",
    "as_method",
    "available_host_bytes",
    "compare",
    "computes_bfloat16",
    "device_available_bytes",
    "find_speeds",
    "footprint",
    "make_plan",
    "num_parameters",
    "peak_resident_bytes",
    "resident_bytes",
    "step_time",
    "weights_bytes",
]
