"""How the parameters of a block lie in one flat buffer, so that a block moves as one piece; and what stands in their place
while they are away.

A parameter that is away keeps its shape, dtype and device, but holds one NaN that all its elements share: code that reads it
by mistake gets NaN, and writing to it is an error of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .pinned import pinned_buffer

# Blocks begin and end at multiples of this: what direct I/O asks for, and the size of a page.
PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter in the buffer.

    Attributes:
        name: in the model.
        shape, dtype: of the parameter.
        offset: of its first byte in the buffer, a multiple of its element size.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The parameter's values in a buffer, uint8 and one-dimensional."""
        return buffer[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters and buffers of a model that are saved together, so that never more of them are in memory.

    Attributes:
        names: in the model.
        load: gives their values by name, on any device; to be dropped before the next part is asked for.
        stored: (file, place of the first byte, number of bytes) if they lie on the disk one after another, in this order, from the
            beginning of a page to the end of one.
    """

    names: tuple[str, ...]
    load: Callable[[], dict[str, Tensor]]
    stored: tuple[Path, int, int] | None = None


class BlockLayout:
    """The parameters that move together, one after the other without gaps.

    Args:
        params: (name in the model, parameter); each once.
    """

    def __init__(self, params: Sequence[tuple[str, nn.Parameter]]) -> None:
        # Large elements first: then every offset is a multiple of the element size.
        ordered = sorted(params, key=lambda entry: -entry[1].element_size())
        self.params = [param for _, param in ordered]
        self.pieces: list[Piece] = []
        offset = 0
        for name, param in ordered:
            self.pieces.append(Piece(name, param.shape, param.dtype, offset))
            offset += self.pieces[-1].num_bytes
        self.used_bytes = offset
        self.num_bytes = -(-offset // PAGE_BYTES) * PAGE_BYTES

    @property
    def name(self) -> str:
        """Of its first parameter, for messages."""
        return self.pieces[0].name

    def fill(self, buffer: Tensor, values: Iterable[Tensor]) -> None:
        """Copy the values of all pieces, in their order, into a buffer of uint8."""
        for piece, value in zip(self.pieces, values, strict=True):
            if value.shape != piece.shape:
                raise ValueError(
                    f"{piece.name} has shape {tuple(value.shape)}, but the model wants {tuple(piece.shape)}"
                )
            piece.view(buffer).copy_(value)

    def point_at(self, buffer: Tensor) -> None:
        """Make the parameters views of a buffer on their device."""
        for param, piece in zip(self.params, self.pieces, strict=True):
            param.data = piece.view(buffer)

    def point_away(self, device: torch.device) -> None:
        """Put stand-ins in the place of the parameters."""
        for param, piece in zip(self.params, self.pieces, strict=True):
            param.data = stand_in(piece.shape, piece.dtype, device)


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that takes the memory of one element: NaN (or the largest integer)."""
    value = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full((1,) * len(shape), value, dtype=dtype, device=device).expand(tuple(shape))


def aligned_buffer(num_bytes: int, device: torch.device, pinned: bool = False) -> Tensor:
    """Bytes that begin at a page, as direct I/O and fast copies want them; uint8 [num_bytes], uninitialised or zero."""
    if pinned:
        return pinned_buffer(num_bytes)
    raw = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % PAGE_BYTES
    return raw[start : start + num_bytes]
