"""How float32 results get into one 16-bit parameter: a reader and writer for each kind of rounding.

A rule works in slices: it reads the float32 value of a slice, changes it, and writes it back. The offset is that of the
slice's first element in the flattened parameter, or in the part of it that this rank holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rounding import compensation_like, read_compensated, round_compensated_, round_stochastic_
from .shards import like_param, local_part

COMPENSATION = "compensation"  # its name in the optimizer's state


class Nearest:
    """Rounds to the nearest number: small updates are lost."""

    def kernel_options(self, param: Tensor) -> dict[str, Any]:
        """Arguments that say the same to the kernels in ``kernels/``, which see the parameter in this shape."""
        return {"rounding": "nearest"}

    def read(self, param: Tensor, offset: int) -> Tensor:
        """Float32 value of a slice of the parameter, as a new tensor."""
        return param.to(torch.float32)

    def write(self, target: Tensor, value: Tensor, offset: int) -> None:
        """Write a slice; ``value`` may be destroyed."""
        target.copy_(value)


class Stochastic(Nearest):
    """Rounds up or down at random, without bias.

    Args:
        key: of this parameter and step, see :func:`lowtide.optim.rounding.mix_key`.
        start: place of the first element that is here in the whole parameter, so that the noise is the same whoever holds it.
    """

    def __init__(self, key: int, start: int = 0) -> None:
        self.key, self.start = key, start

    def kernel_options(self, param: Tensor) -> dict[str, Any]:
        """See :class:`Nearest`."""
        return {"rounding": "stochastic", "key": self.key, "start": self.start}

    def write(self, target: Tensor, value: Tensor, offset: int) -> None:
        """Write a slice; destroys ``value``."""
        round_stochastic_(target, value, self.key, self.start + offset)


class Compensated(Nearest):
    """Keeps what is rounded away in the optimizer's state.

    Args:
        param: the parameter.
        state: its optimizer state, where ``compensation`` is made when it is missing.
    """

    def __init__(self, param: Tensor, state: dict[str, Any]) -> None:
        if COMPENSATION not in state:
            state[COMPENSATION] = like_param(param, compensation_like(local_part(param)), param.shape)
        self.compensation = local_part(state[COMPENSATION])

    def kernel_options(self, param: Tensor) -> dict[str, Any]:
        """See :class:`Nearest`."""
        return {"rounding": "compensated", "compensation": self.compensation.view(param.shape)}

    def _slice(self, param: Tensor, offset: int) -> Tensor:
        return self.compensation.view(-1)[offset : offset + param.numel()].view(param.shape)

    def read(self, param: Tensor, offset: int) -> Tensor:
        """Float32 value of a slice, what was rounded away before included."""
        return read_compensated(param, self._slice(param, offset))

    def write(self, target: Tensor, value: Tensor, offset: int) -> None:
        """Write a slice; destroys ``value``."""
        round_compensated_(target, value, self._slice(target, offset))


Writer = Nearest
