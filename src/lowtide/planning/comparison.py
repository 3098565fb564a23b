"""Ways to train all parameters side by side: what each keeps in memory, counted as Table 1 of the LOMO paper counts it.

That table (arXiv 2306.09782) has weights, gradients and optimizer state of a whole model and activations with checkpointing:
the inputs of all layers and what one layer holds while it is recomputed. Temporaries of the update are not in it.
"""

from __future__ import annotations

import dataclasses

from .footprint import Footprint
from .step_shape import StepShape
from .tracing import GRADIENTS, KINDS, STATE, WEIGHTS


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train; all numbers are bytes.

    Attributes:
        name: for people.
        weights, gradients, state: of the optimizer; float32 master weights count as state, as in the paper.
        activations: with checkpointing.
    """

    name: str
    weights: int
    gradients: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """Of all four."""
        return self.weights + self.gradients + self.state + self.activations


def compare(shape: StepShape) -> tuple[Method, ...]:
    """AdamW, SGD and plain LOMO for the model and batch of a step.

    Args:
        shape: of the step; its optimizer and dtype do not matter but for activations, which are in its dtype.
    """
    count, largest = shape.num_parameters, max(param.numel() for param in shape.model.parameters())
    activations = checkpointed_activations(shape)
    return (
        Method("AdamW, mixed precision (paper)", 2 * count, 2 * count, 12 * count, activations),
        Method("AdamW, float32", 4 * count, 4 * count, 8 * count, activations),
        Method("AdamW, bfloat16", 2 * count, 2 * count, 4 * count, activations),
        Method("SGD, float32 master (paper)", 2 * count, 2 * count, 4 * count, activations),
        Method("LOMO (paper)", 2 * count, 2 * largest, 0, activations),
    )


def checkpointed_activations(shape: StepShape) -> int:
    """Kept inputs and the working set of the largest layer, whole batch at once, without gradients of weights."""
    return shape.step.kept_bytes + shape.largest_activations


def as_method(name: str, footprint: Footprint) -> Method:
    """A plan's memory on the device in the same four columns: what is none of the others counts as activations."""
    device = footprint.device
    rest = sum(device.get(kind, 0) for kind in KINDS if kind not in (WEIGHTS, GRADIENTS, STATE))
    return Method(name, device.get(WEIGHTS, 0), device.get(GRADIENTS, 0), device.get(STATE, 0), rest)
