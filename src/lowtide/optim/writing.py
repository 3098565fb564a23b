"""How float32 results get into one 16-bit parameter: a reader and writer for each kind of rounding.

A rule works in slices: it reads the float32 value of a slice, changes it, and writes it back. The offset is that of the
slice's first element in the flattened parameter, or in the part of it that this rank holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rounding import (
    compensation_like,
    noise16_of_rows,
    read_compensated,
    round_compensated_,
    round_stochastic_,
    round_with_noise_,
)
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

    def of_rows(self, rows: slice | Tensor, num_columns: int) -> Nearest:
        """The writer of some rows of this matrix, [r, num_columns], as if they were a parameter.

        Args:
            rows: a slice, or int64 [r]; then they are written into a copy, and :meth:`put_back` follows.
            num_columns: of the matrix.
        """
        return self

    def put_back(self) -> None:
        """The copy of these rows has been written."""

    @property
    def takes_kernels(self) -> bool:
        """Whether ``kernel_options`` say all there is."""
        return True


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

    def of_rows(self, rows: slice | Tensor, num_columns: int) -> Nearest:
        """See :class:`Nearest`."""
        if isinstance(rows, slice):
            return Stochastic(self.key, self.start + rows.start * num_columns)
        return _StochasticRows(self.key, rows, num_columns)


class _StochasticRows(Nearest):
    """Rows from here and there, whose noise is that of their place in the matrix."""

    def __init__(self, key: int, rows: Tensor, num_columns: int) -> None:
        self.key, self.rows, self.num_columns = key, rows, num_columns

    @property
    def takes_kernels(self) -> bool:
        return False

    def write(self, target: Tensor, value: Tensor, offset: int) -> None:
        noise = noise16_of_rows(self.rows, self.num_columns, self.key, offset, value.numel())
        round_with_noise_(target, value, noise.view(value.shape))


class Compensated(Nearest):
    """Keeps what is rounded away in the optimizer's state.

    Args:
        compensation: see :func:`lowtide.optim.rounding.compensation_like`; of the rows that are here.
    """

    def __init__(self, compensation: Tensor) -> None:
        self.compensation = compensation
        self._put_back: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, param: Tensor, state: dict[str, Any]) -> Compensated:
        """For a parameter, in whose optimizer state ``compensation`` is made when it is missing."""
        if COMPENSATION not in state:
            state[COMPENSATION] = like_param(param, compensation_like(local_part(param)), param.shape)
        return cls(local_part(state[COMPENSATION]))

    def of_rows(self, rows: slice | Tensor, num_columns: int) -> Nearest:
        """See :class:`Nearest`."""
        if isinstance(rows, slice):
            return Compensated(self.compensation[rows])
        found = Compensated(self.compensation.index_select(0, rows))
        found._put_back = self.compensation, rows
        return found

    def put_back(self) -> None:
        """See :class:`Nearest`."""
        if self._put_back is not None:
            whole, rows = self._put_back
            whole.index_copy_(0, rows, self.compensation)

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
