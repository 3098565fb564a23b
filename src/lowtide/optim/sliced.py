"""Gradients of a vocabulary matrix that come in slices of rows, and are never held as a whole.

The gradient of an output head is a product that can be made again for any rows; that of an embedding is zero except for the rows of
the tokens in the batch. A rule that walks over the rows once (Lomo) or a few times (AdaLomo) needs no more than that.

Shape letters: V = rows (vocabulary), H = columns, r = rows of a slice.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .prepare import Prepare

if TYPE_CHECKING:
    from .kernels.product import TiledProduct

# Elements of a slice of a gradient: 8 MiB in 16 bits. Products of fewer rows would run slower.
MAX_SLICE_NUMEL = 2**22
_FEWEST_ROWS = 128


class SlicedGradient(abc.ABC):
    """A gradient [V, H] that is made slice by slice, as often as it is asked for; every time the same.

    Attributes:
        num_rows: V.
        slice_rows: rows that are made at a time.
        weight: the matrix, for those that are computed with it.
    """

    num_rows: int
    slice_rows: int
    weight: Tensor

    @abc.abstractmethod
    def part(self, rows: slice) -> Tensor:
        """The gradient [r, H] of some rows, a new tensor: 16-bit or float32."""

    def use_weight(self, weight: Tensor) -> None:
        """The matrix as it will be found when slices are made."""
        self.weight = weight

    def row_slices(self) -> Iterator[slice]:
        """All rows, a slice after the other."""
        for start in range(0, self.num_rows, self.slice_rows):
            yield slice(start, min(start + self.slice_rows, self.num_rows))

    def parts(self, all_rows: bool = True) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """(rows, their gradient [r, H]), each row once. Rows are a slice, or int64 [r] and in order.

        Args:
            all_rows: rows whose gradient is zero come, too; otherwise they may be left out.
        """
        for rows in self.row_slices():
            yield rows, self.part(rows)

    def unmade_parts(
        self, all_rows: bool, scratch: Callable[[int], Tensor]
    ) -> Iterator[tuple[slice | Tensor, Tensor | TiledProduct]]:
        """The same, where a slice may be a product that has not been made, of whole rows in one piece.

        Args:
            all_rows: see :meth:`parts`.
            scratch: memory for one product, see :meth:`TiledProduct.of`.
        """
        yield from self.parts(all_rows)


def rows_at_a_time(num_rows: int, num_columns: int) -> int:
    """How many rows of a gradient make a slice."""
    return max(1, min(num_rows, max(_FEWEST_ROWS, MAX_SLICE_NUMEL // max(1, num_columns))))


class Piece(NamedTuple):
    """A slice of a gradient, with what is to be done to it before it is used.

    Attributes:
        rows: a slice, or int64 [r].
        grad: [r, H]; for rules with ``takes_products`` it may be a product that has not been made.
    """

    rows: slice | Tensor
    grad: Tensor | TiledProduct
    prepare: Prepare | None


class Pieces(Protocol):
    """What a rule is given in the place of a gradient.

    Attributes:
        again: the rest of an update that was begun in this step: rows that it left as they were.
    """

    again: bool

    @property
    def broken(self) -> bool:
        """The last walk was broken off, because a slice was not finite: nothing more is to be updated."""

    def __iter__(self) -> Iterator[Piece]:
        """Walk over all slices; the next walk makes them again."""
