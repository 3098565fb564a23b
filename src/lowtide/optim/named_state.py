"""The state of an optimizer by parameter name, in two parts: tensors, which go to a safetensors file, and plain values for JSON.

torch's own ``state_dict`` numbers the parameters, so that it fits only an optimizer that lists them in the same order; and loading
it has every tensor twice for a while. Here each one is put in its place as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .base import FusibleOptimizer
from .shards import like_param, local_part, rows_of

_SEPARATOR = ":"  # in no name of a parameter
_ON_HOST = "tensors on the host"


def named_state(
    optimizer: Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors by ``parameter:entry``, plain values by parameter and entry). Of sharded parameters these are ``DTensor``.

    Entries that are on the CPU while their parameter is not, as torch's counts of steps, are noted in the plain values.

    Args:
        optimizer: any, after any number of steps.
        names: of its parameters.

    Raises:
        TypeError: an entry is neither a tensor nor something that JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for param, state in optimizer.state.items():
        for entry, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[param]}{_SEPARATOR}{entry}"] = value
                if value.is_cpu and not param.is_cpu:
                    plain.setdefault(names[param], {}).setdefault(_ON_HOST, []).append(entry)
            else:
                _check_plain(names[param], entry, value)
                plain.setdefault(names[param], {})[entry] = value
    return tensors, plain


def load_named_state(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Callable[[], Tensor]],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put back what :func:`named_state` gave, into an optimizer that has not taken a step.

    Args:
        optimizer: over the same parameters.
        names: of its parameters.
        tensors: what loads each tensor, on any device.
        plain: the other values.

    Raises:
        ValueError: a name that this model does not train.
    """
    params = {name: param for param, name in names.items()}
    for key, load in tensors.items():
        name, _, entry = key.rpartition(_SEPARATOR)
        param = _known(params, name)
        on_host = entry in plain.get(name, {}).get(_ON_HOST, ())
        value = load()
        if isinstance(optimizer, FusibleOptimizer) and optimizer.state_is_sharded(param, entry, value.shape):
            own = value[rows_of(param)].to(local_part(param).device, copy=True)  # the rest of it must not be kept
            optimizer.state[param][entry] = like_param(param, own, value.shape)
        else:
            optimizer.state[param][entry] = value.to("cpu" if on_host else param.device)
    for name, entries in plain.items():
        param = _known(params, name)
        optimizer.state[param].update({entry: value for entry, value in entries.items() if entry != _ON_HOST})


def parameter_of(key: str) -> str:
    """The parameter's name in the name of a tensor that :func:`named_state` gave."""
    return key.rpartition(_SEPARATOR)[0]


def _known(params: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in params:
        raise ValueError(f"the saved optimizer state has {name!r}, which this model does not train")
    return params[name]


def _check_plain(name: str, entry: str, value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            _check_plain(name, entry, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(name, entry, inner)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(
            f"the optimizer keeps a {type(value).__name__} in {entry!r} of {name}, which no checkpoint can hold: only tensors, "
            "numbers, text and lists of them can be saved without running code when they are loaded"
        )
