"""What is done to a gradient before a rule uses it: undo the loss scale, clamp, multiply by a clipping coefficient."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Prepare:
    """Made by the engine, one for a step or one for a parameter; called by the rule on slices of the gradient.

    Attributes:
        inv_scale: reciprocal of the loss scale.
        clip_value: every element is then clamped to plus or minus this, or None.
        coefficient: what is then multiplied with; a number, or a zero-dimensional tensor on the gradient's device, which
            nobody reads on the host. NaN there says that this step is broken: the gradient becomes zero.
    """

    inv_scale: float = 1.0
    clip_value: float | None = None
    coefficient: float | Tensor = 1.0

    def __call__(self, grad: Tensor) -> Tensor:
        """Change a gradient slice (any shape, in the dtype that the rule computes in) in place and return it."""
        if self.inv_scale != 1.0:
            grad.mul_(self.inv_scale)
        if self.clip_value is not None:
            grad.clamp_(-self.clip_value, self.clip_value)
        if isinstance(self.coefficient, Tensor):
            return grad.mul_(self.coefficient).nan_to_num_(0.0, 0.0, 0.0)
        return grad if self.coefficient == 1.0 else grad.mul_(self.coefficient)

    @property
    def factor(self) -> float | None:
        """The single number that the whole of it comes to, if it does: then a rule can save a pass over the gradient."""
        if self.clip_value is not None or isinstance(self.coefficient, Tensor):
            return None
        return self.inv_scale * self.coefficient

    @property
    def kernel_options(self) -> dict[str, Any]:
        """Arguments that say the same to the kernels in ``kernels/``, where NaN as coefficient writes nothing."""
        return {"inv_scale": self.inv_scale, "clip_value": self.clip_value, "coefficient": self.coefficient}
