"""The weights of a model as safetensors files in Hugging Face's layout, written part by part, so that saving takes the memory of one
decoder layer and no more, wherever the weights live. Of a model with adapters (``lora.py``) these are its own weights, under the names
they have without adapters.

transformers keeps some models in memory otherwise than in files (experts of mixtures are joined, a few tensors renamed). That is
undone part by part; how the files will look is found out beforehand on the meta device, where tensors have no memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..weights.cloning import can_clone
from ..weights.layout import Part
from ..weights.safetensors_file import Entry, clone_file, read_pieces, write_file
from ..weights.sharding import for_the_first
from .blocks import find_blocks
from .lora import base_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARD_BYTES = 2 * 1024**3
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(model: PreTrainedModel, directory: Path, parts: Sequence[Part] | None = None) -> dict[str, str]:
    """Write all weights of a model, and the index if there are several files.

    Args:
        model: of transformers.
        directory: exists, and holds no weights.
        parts: where the values come from; None for the model itself.

    Returns:
        SHA-256 of each file of weights, by its name.

    Raises:
        OSError: the disk is full or failed.
    """
    shards = _plan(model, parts_of(model) if parts is None else parts, directory)
    names = [_SINGLE] if len(shards) == 1 else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in _count(shards)]
    digests, weight_map = {}, {}
    for name, shard in zip(names, shards, strict=True):
        entries = [entry for planned in shard for entry in planned.entries]
        stored = shard[0].part.stored
        digest = clone_file(directory / name, entries, stored) if stored and shard[0].cloned else None
        digests[name] = digest or write_file(directory / name, entries, _pieces(model, shard))
        weight_map.update({entry[0]: name for entry in entries})
    if len(shards) > 1:
        total = sum(planned.num_bytes for shard in shards for planned in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digests


def parts_of(model: torch.nn.Module, known: Sequence[Part] = ()) -> list[Part]:
    """What is to be saved of a model, tied weights once: a part for each decoder layer, and one for the rest.

    Args:
        model: whose own tensors are taken for what is not in ``known``.
        known: parts that come from elsewhere.
    """
    names = _saved_names(model)
    left = dict.fromkeys(names)
    for part in known:
        for name in part.names:
            left.pop(name, None)
    modules = {module: name for name, module in model.named_modules()}
    parts = list(known)
    for block in find_blocks(model):
        prefix = modules[block] + "."
        inside = tuple(name for name in left if name.startswith(prefix))
        for name in inside:
            del left[name]
        if inside:
            parts.append(_own(model, inside))
    return [_own(model, tuple(left)), *parts] if left else parts


def _own(model: torch.nn.Module, names: tuple[str, ...]) -> Part:
    def load() -> dict[str, Tensor]:
        state = _state(model)
        found = {name: for_the_first(state[name]) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return Part(names, load)


def _saved_names(model: torch.nn.Module) -> list[str]:
    """Names of parameters and persistent buffers, one for each tensor, without those that transformers would not save."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    params = dict(model.named_parameters(remove_duplicate=False))
    first = {name for name, _ in model.named_parameters()}
    return [
        as_base
        for name, as_base in base_names(model, model.state_dict()).items()
        if as_base not in ignored and (name not in params or name in first)
    ]


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by the names that :func:`_saved_names` gives."""
    state = model.state_dict()
    return {as_base: state[name] for name, as_base in base_names(model, state).items()}


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A part, and what it becomes in the file.

    Attributes:
        part: of the model.
        entries: in the file.
        as_stored: that is nothing but the bytes that lie on the disk already.
        cloned: and the file system can let both share them.
    """

    part: Part
    entries: list[Entry]
    as_stored: bool
    cloned: bool

    @property
    def num_bytes(self) -> int:
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.entries)


def _plan(model: PreTrainedModel, parts: Sequence[Part], directory: Path) -> list[list[_Planned]]:
    """For every file its parts."""
    state = _state(model)
    stored = next((part.stored for part in parts if part.stored), None)
    clones = stored is not None and can_clone(stored[0], directory)
    planned = []
    for part in parts:
        on_meta = {name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta") for name in part.names}
        found = as_in_files(model, on_meta)
        names = {id(tensor): name for name, tensor in found.items()}
        renamed = len(found) == len(on_meta) and all(id(tensor) in names for tensor in on_meta.values())
        as_stored = part.stored is not None and renamed
        if as_stored:  # in the order in which they lie there
            ordered = [(names[id(tensor)], tensor) for tensor in on_meta.values()]
        else:
            ordered = sorted(found.items(), key=lambda item: -item[1].dtype.itemsize)
        entries: list[Entry] = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered]
        planned.append(_Planned(part, entries, as_stored, clones and as_stored))
    # Tensors of several dtypes would not be aligned behind another part's.
    alone = len({dtype for each in planned for _, dtype, _ in each.entries}) > 1
    shards: list[list[_Planned]] = []
    for each in planned:
        size = sum(other.num_bytes for other in shards[-1]) if shards else 0
        if not shards or alone or each.cloned or shards[-1][0].cloned or size + each.num_bytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(each)
    return shards


def _pieces(model: PreTrainedModel, shard: Sequence[_Planned]) -> Iterator[Tensor]:
    """The bytes of a file, with as little of them in memory as can be."""
    for planned in shard:
        if planned.as_stored and planned.part.stored is not None:
            yield from read_pieces(planned.part.stored, planned.num_bytes)
            continue
        values = as_in_files(model, planned.part.load())
        for name, dtype, shape in planned.entries:
            if values[name].dtype != dtype or tuple(values[name].shape) != tuple(shape):
                found = f"{values[name].dtype} {tuple(values[name].shape)}"
                raise ValueError(f"{name} was to be {dtype} of shape {tuple(shape)}, not {found}")
            yield values.pop(name)


def as_in_files(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in the model, as a checkpoint of this model on the hub has them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 files were as models are
        return dict(tensors)
    return dict(revert_weight_conversion(model, tensors))


def _count(items: Sequence[Any]) -> range:
    return range(1, len(items) + 1)
