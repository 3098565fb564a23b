"""Reading the header of a GGUF file: metadata and where each tensor lies, without touching the tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian). The package
``gguf`` reads it too, but makes five numpy arrays of every word of the vocabulary: seconds of time and 160 MB where the
smallest models take 250 MB.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file.

    Attributes:
        shape: in torch's order, the rows first.
        ggml_type: number of its storage format, ``gguf.GGMLQuantizationType``.
        offset: of its first byte, from the start of the file.
        row_bytes: bytes of one row (all but the last dimension counted as rows).
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
        path: the file.
        metadata: by key, arrays as lists.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it: "llama", "qwen2", ..."""
        return str(self.metadata.get("general.architecture", "unknown"))


# What comes of a header that lies: lengths beyond the end, text that is none, an alignment of zero or of text, arrays in arrays.
_DAMAGE = (
    struct.error, UnicodeDecodeError, MemoryError, OverflowError, KeyError, ZeroDivisionError, TypeError, RecursionError,
)  # fmt: skip


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole GGUF file of a version and with tensor types that can be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model file {path} does not exist")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        try:
            return _read(path, file)
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is damaged or incomplete: its header ends or breaks off at byte {file.tell()}; copy or "
                "download it again"
            ) from error


def _read(path: Path, file: BinaryIO) -> GgufHeader:
    (version,) = _unpack(file, "I")
    if version not in (2, 3):
        raise ValueError(
            f"{path} is of GGUF version {version}, and only 2 and 3 (little endian) can be read; convert it with a "
            "current llama.cpp"
        )
    num_tensors, num_entries = _unpack(file, "QQ")
    metadata = {}
    for _ in range(num_entries):
        key = _string(file)
        metadata[key] = _value(file, *_unpack(file, "I"))
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one part of several; join them with `llama-gguf-split --merge` and give the result"
        )
    listed = [_tensor(file) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, ggml_type, offset in listed:
        entry = TensorEntry(shape, ggml_type, start + offset, _row_bytes(path, name, shape[-1], ggml_type))
        if entry.offset + entry.num_rows * entry.row_bytes > path.stat().st_size:
            raise ValueError(f"{path} is incomplete: it ends before tensor {name}; copy or download it again")
        tensors[name] = entry
    return GgufHeader(path, metadata, tensors)


def _row_bytes(path: Path, name: str, num_columns: int, ggml_type: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path}: tensor {name} has storage type {ggml_type}, which the package gguf does not know"
        ) from None
    return int(num_columns // block_elements * block_bytes)


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    (num_dims,) = _unpack(file, "I")
    dims = _unpack(file, f"{num_dims}Q")
    ggml_type, offset = _unpack(file, "IQ")
    # GGUF writes the dimension that varies fastest first.
    return name, tuple(reversed(dims)) or (1,), ggml_type, offset


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _SCALARS:
        return _unpack(file, _SCALARS[kind])[0]
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise KeyError(kind)
    element, length = _unpack(file, "IQ")
    if element in _SCALARS:
        return list(_unpack(file, f"{length}{_SCALARS[element]}"))
    return [_value(file, element) for _ in range(length)]


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _take(file, length).decode("utf-8")


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, _take(file, struct.calcsize(layout)))


def _take(file: BinaryIO, num_bytes: int) -> bytes:
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise struct.error("end of file")
    return data
