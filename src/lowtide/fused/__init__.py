"""When a weight changes: the engine that updates every parameter inside the backward pass, block by block."""

from .block import BlockRunner, Home
from .engine import Engine

__all__ = ["BlockRunner", "Engine", "Home"]
