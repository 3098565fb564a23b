"""Whether it fits: what a model takes, and what this machine has."""

from .footprint import Footprint, StepShape, Unit, footprint, num_parameters, weights_bytes
from .hardware import (
    available_host_bytes,
    computes_bfloat16,
    device_available_bytes,
    peak_resident_bytes,
    resident_bytes,
)

__all__ = [
    "Footprint",
    "StepShape",
    "Unit",
    "available_host_bytes",
    "computes_bfloat16",
    "device_available_bytes",
    "footprint",
    "num_parameters",
    "peak_resident_bytes",
    "resident_bytes",
    "weights_bytes",
]
