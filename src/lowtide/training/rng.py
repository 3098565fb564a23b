"""The random state of every generator that a run may draw from, as plain values for JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ranks import Ranks


def random_state() -> dict[str, Any]:
    """Of torch on the CPU and on every GPU, of Python and of numpy."""
    numpy_state: Any = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Take over what :func:`random_state` gave. GPUs that are not there any more are left out."""
    torch.set_rng_state(_tensor(state["torch"]))
    for number, text in enumerate(state["cuda"][: torch.cuda.device_count() if torch.cuda.is_available() else 0]):
        torch.cuda.set_rng_state(_tensor(text), number)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def of_ranks(ranks: Ranks) -> list[dict[str, Any]]:
    """What :func:`random_state` gives on every rank but the first; empty where there is one."""
    if ranks.size == 1:
        return []
    found: list[Any] = [None] * ranks.size
    torch.distributed.all_gather_object(found, random_state())
    return found[1:]
