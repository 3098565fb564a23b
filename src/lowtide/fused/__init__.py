"""When a weight changes: the engine that updates every parameter inside the backward pass, block by block."""

from .block import BlockRunner, Home
from .clipping import AdaptiveClip
from .engine import Engine
from .loss_scale import LossScale

__all__ = ["AdaptiveClip", "BlockRunner", "Engine", "Home", "LossScale"]
