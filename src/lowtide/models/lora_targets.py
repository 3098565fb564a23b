"""Which layers of a model get an adapter: the same that peft finds, but wrong names are refused with the right ones, before
anything is changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FALLBACK_TARGETS = ("q_proj", "v_proj")  # of architectures that peft has no default for
ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the head


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a class of this name is among a module's: peft and transformers need not be imported to find out."""
    return any(base.__name__ == name for base in type(module).__mro__)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_a(module, "Conv1D")  # GPT-2's linear layer, whose weight is [N, M]


def resolve_targets(model: PreTrainedModel, targets: Sequence[str] | None) -> str | tuple[str, ...]:
    """Targets as peft takes them: names, a pattern for whole names, or ``all-linear``. None for peft's own, see ``add_lora``.

    Raises:
        ValueError: there are none.
    """
    if targets is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT

        found = OF_PEFT.get(model.config.model_type, FALLBACK_TARGETS)
        return found if isinstance(found, str) else tuple(found)
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names:
        raise ValueError("targets must name at least one layer, or be None")
    return ALL_LINEAR if names == (ALL_LINEAR,) else names


def matching_layers(model: PreTrainedModel, targets: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that peft will find for these targets, by name.

    Raises:
        ValueError: a name that no layer has.
    """
    modules = dict(model.named_modules())
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        return {name: module for name, module in modules.items() if _is_linear(module) and module is not head}
    if isinstance(targets, str):
        return {name: module for name, module in modules.items() if re.fullmatch(targets, name)}
    found: dict[str, nn.Module] = {}
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if _is_linear(module)})
    for target in targets:
        of_target = {name: each for name, each in modules.items() if name == target or name.endswith(f".{target}")}
        if not of_target:
            near = difflib.get_close_matches(target.rpartition(".")[2], leaves, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"no layer of the model is named {target!r}{hint}, so it cannot get an adapter; its linear layers are {', '.join(leaves)}"
            )
        found |= of_target
    return found


def check_layers(model: PreTrainedModel, layers: Mapping[str, nn.Module], rank: int) -> None:
    """See that all of them can have an adapter of this rank, which can be merged.

    Raises:
        ValueError: there are none, one is not linear or shares its weight, or the rank is out of range.
    """
    if not layers:
        raise ValueError("no layer of the model matches what peft adapts in its architecture: name some with targets")
    uses: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            uses[id(param)] = uses.get(id(param), 0) + 1
    for name, layer in layers.items():
        if not _is_linear(layer):
            raise ValueError(f"{name} is a {type(layer).__name__}, and adapters go on linear layers only")
        weight: Any = layer.weight
        if uses[id(weight)] > 1:
            raise ValueError(
                f"{name} shares its weight with another module, which merging its adapter would change, too: leave it out"
            )
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(
                f"rank must be at least 1 and at most {min(weight.shape)}, the smaller side of {name}, got {rank}"
            )
