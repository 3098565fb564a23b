"""Finding the blocks of a model: its decoder layers, by themselves for Hugging Face models and by name for others."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

# The base class of every repeated layer in transformers; known by name, so that transformers need not be imported.
_LAYER_CLASS = "GradientCheckpointingLayer"


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Hugging Face model, outermost only, in the order they are registered; else an empty list."""
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not any(base.__name__ == _LAYER_CLASS for base in type(module).__mro__):
            continue
        inside.update(id(child) for child in module.modules())
        blocks.append(module)
    return blocks


def resolve_blocks(model: nn.Module, blocks: Iterable[nn.Module | str]) -> list[nn.Module]:
    """Modules, or names of modules, as a list of blocks. A name of a ``ModuleList`` or ``Sequential`` means its children.

    Raises:
        ValueError: a name is unknown, a module is not part of the model, or a block lies inside another one.
    """
    named = dict(model.named_modules())
    known = {id(module) for module in named.values()}
    resolved: list[nn.Module] = []
    for entry in blocks:
        if isinstance(entry, str):
            if entry not in named:
                near = difflib.get_close_matches(entry, named, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"the model has no module named {entry!r}{hint}")
            module = named[entry]
        else:
            module = entry
            if id(module) not in known:
                raise ValueError(f"a {type(module).__name__} given as a block is not part of the model")
        resolved.extend(module if isinstance(module, nn.ModuleList | nn.Sequential) else [module])
    unique = list({id(module): module for module in resolved}.values())
    owners: set[int] = set()
    for block in unique:
        parts = {id(part) for part in block.modules()}
        if parts & owners:
            raise ValueError(f"blocks overlap: a {type(block).__name__} shares modules with another block")
        owners |= parts
    return unique


def outer_modules(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Embedding and head of a Hugging Face model, those of them that are ordinary ones outside of its blocks."""
    inside = {id(module) for block in blocks for module in block.modules()}
    hf_model: Any = model
    embedding = hf_model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = hf_model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        module
        for module, kind in ((embedding, nn.Embedding), (head, nn.Linear))
        if isinstance(module, kind) and id(module) not in inside
    ]
