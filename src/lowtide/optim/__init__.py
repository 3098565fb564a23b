"""How a weight changes: update rules that can step one parameter at a time, fused into the backward pass or not."""

from .adalomo import AdaLomo
from .base import FusibleOptimizer
from .lomo import Lomo
from .per_parameter import PerParameter

__all__ = ["AdaLomo", "FusibleOptimizer", "Lomo", "PerParameter"]
