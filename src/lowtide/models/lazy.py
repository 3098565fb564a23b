"""Models whose weights are not loaded: they stay in the files and are read one by one, when a home takes them in.

So a model that is larger than the memory can be given a home on disk, and none is ever there twice. This works for
checkpoints whose tensors are named like the model's parameters; others (some mixtures of experts, whose experts transformers joins)
are loaded in the ordinary way.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..weights.layout import stand_in
from ..weights.safetensors_file import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class SafetensorsWeights:
    """Tensors in safetensors files, read with positioned reads: not mapped, so that they take memory only while they are used.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._entries: dict[str, tuple[Path, dict[str, Any], int]] = {}
        for path in paths:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            self._entries.update({name: (path, entry, 8 + size) for name, entry in header.items()})
        self.aliases: dict[str, str] = {}  # names in the model, to names here

    @property
    def names(self) -> set[str]:
        """Of all tensors in the files."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, by its name in the files."""
        return tuple(self._entries[name][1]["shape"])

    def __call__(self, name: str) -> Tensor:
        """See :class:`lowtide.weights.LazyWeights`."""
        path, entry, start = self._entries[self.aliases.get(name, name)]
        begin, end = entry["data_offsets"]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if end > begin:
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            with path.open("rb", buffering=0) as file:
                file.seek(start + begin)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError(f"{path} was truncated: {name} ends after {done} of {len(view)} bytes")
                    done += count
                with suppress(AttributeError):
                    os.posix_fadvise(file.fileno(), start + begin, end - begin, os.POSIX_FADV_DONTNEED)
        return tensor


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config with stand-ins for all its parameters, on the CPU, in evaluation mode.

    ``model.lowtide_source`` must be set before it is fused: what gives each parameter's values by its name.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):  # buffers are computed, not loaded
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if param not in made:
                value = stand_in(param.shape, param.dtype, torch.device("cpu"))
                made[param] = nn.Parameter(value, requires_grad=param.requires_grad)
            module._parameters[name] = made[param]
    model.tie_weights()
    return model.eval()


def lazy_model(
    directory: Path, files: list[Path], config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel | None:
    """The model in a directory with its weights left in the files, or None if they are not named as in the model."""
    from transformers import GenerationConfig

    weights = SafetensorsWeights(files)
    model: Any = skeleton(config, dtype, trust_remote_code=trust_remote_code)
    named = _names_in_model(model, weights.names)
    if named is None:
        return None
    names = {param: name for name, param in model.named_parameters()}
    wanted: dict[str, list[str]] = {}  # every parameter once, under all the names that it has
    for name, param in model.named_parameters(remove_duplicate=False):
        wanted.setdefault(names[param], []).append(name)
    persistent = set(model.state_dict()) - {name for all_names in wanted.values() for name in all_names}
    wanted.update({name: [name] for name in persistent})
    for name, all_names in wanted.items():
        found = next((named[each] for each in all_names if each in named), None)
        if found is None:
            return None
        weights.aliases[name] = found
    _check_shapes(model, weights)
    for name in persistent:
        model.get_buffer(name).copy_(weights(name))
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.lowtide_source = weights
    return model


def _check_shapes(model: nn.Module, weights: SafetensorsWeights) -> None:
    """
    Raises:
        ValueError: a tensor in the files has another shape than in the model.
    """
    state = model.state_dict()
    for name, stored in weights.aliases.items():
        if (shape := weights.shape(stored)) != tuple(state[name].shape):
            raise ValueError(f"{stored} has shape {shape} in the files and {tuple(state[name].shape)} in the model")


def _names_in_model(model: Any, names: set[str]) -> dict[str, str] | None:
    """Names in the model, to names in the files; None if transformers would compute a weight from several or cut one up."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # before 5.0, or after a change there: only names that are the same
        return {name: name for name in names}
    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings: list[Any] = [each for each in transforms if not isinstance(each, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            return None
        found[renamed] = name
    return found
