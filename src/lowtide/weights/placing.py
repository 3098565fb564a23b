"""Puts the weights of a model where they are to live, block by block, and makes the home that serves them from there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .disk import DiskStore
from .home import DeviceHome
from .host import HostStore
from .layout import BlockLayout, Part
from .streamed import Store, StreamedHome

DEVICE, HOST = "device", "cpu"  # everything else is a directory


class LazyWeights(Protocol):
    """Where weights come from that have not been loaded yet."""

    def __call__(self, name: str) -> Tensor:
        """The values of one parameter, any dtype, on the CPU.

        Raises:
            OSError: they cannot be read.
        """


class MixedHome:
    """Some blocks here, some there: each is served by its own home.

    Args:
        homes: by block.
    """

    def __init__(self, homes: dict[nn.Module, DeviceHome | StreamedHome]) -> None:
        self._homes = homes

    def fetch(self, block: nn.Module) -> None:
        """See :class:`lowtide.fused.block.Home`."""
        self._homes[block].fetch(block)

    def release(self, block: nn.Module) -> None:
        """See :class:`lowtide.fused.block.Home`."""
        self._homes[block].release(block)

    def write_back(self, block: nn.Module) -> None:
        """See :class:`lowtide.fused.block.Home`."""
        self._homes[block].write_back(block)

    @property
    def streamed(self) -> list[StreamedHome]:
        """The homes among them that move weights."""
        return list({id(h): h for h in self._homes.values() if isinstance(h, StreamedHome)}.values())

    def tensors(self) -> dict[str, Tensor]:
        """All streamed parameters by name, where they live; to be read only."""
        found: dict[str, Tensor] = {}
        for home in self.streamed:
            found.update(home.tensors())
        return found

    def parts(self) -> list[Part]:
        """The same in parts, one a block, none of which comes into memory before it is asked for."""
        return [part for home in self.streamed for part in home.parts()]

    def discard(self) -> None:
        """After :meth:`close`: remove working copies on disk. Parameters that are mapped from them stay usable on POSIX."""
        for home in self.streamed:
            home.store.discard()

    def close(self, whole: bool = True) -> None:
        """Give all parameters values that an ordinary model can work with; see :class:`StreamedHome`."""
        with ExitStack() as stack:
            for home in self.streamed:
                stack.callback(home.close, whole)


def place(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    home_of: Callable[[nn.Module], str],
    device: torch.device | None,
) -> MixedHome:
    """Move the weights of every block to its home, and everything else to the device.

    Blocks that share parameters share a home, that of the first; parameters used outside of blocks stay on the device. A model
    whose weights have not been loaded (``model.lowtide_source``) gets them now, block by block.

    Args:
        model: any module.
        blocks: in the order of the forward pass.
        home_of: ``"device"``, ``"cpu"`` or a directory, for every block; one directory in all.
        device: where blocks are computed; None leaves every parameter where it is, for homes on the device only.

    Raises:
        ValueError: several directories are named.
        MemoryError, OSError: there is not enough room; see the stores.
    """
    names = {param: name for name, param in model.named_parameters()}
    source: LazyWeights | None = getattr(model, "lowtide_source", None)

    def value_of(name: str, param: Tensor) -> Tensor:
        return param.data if source is None else source(name)

    outside = _used_outside(model, blocks)
    groups = _groups(blocks, outside)
    by_home: dict[str, list[tuple[list[nn.Module], list[nn.Parameter]]]] = {}
    for members, params in groups:
        place_name = os.fspath(home_of(members[0])) if params else DEVICE
        by_home.setdefault(place_name, []).append((members, params))
    if len([name for name in by_home if name not in (DEVICE, HOST)]) > 1:
        raise ValueError(f"weights can live in one directory, and several are named: {', '.join(sorted(by_home))}")
    homes: dict[nn.Module, Any] = {}
    try:
        _fill(homes, by_home, blocks, names, value_of, device)
        streamed = {p for name, entries in by_home.items() if name != DEVICE for _, params in entries for p in params}
        for param, name in names.items():
            if param not in streamed and (source is not None or device is not None):
                param.data = value_of(name, param).to(device or param.device, param.dtype)
    except BaseException:
        MixedHome(homes).close()  # what has been moved gets its values back
        MixedHome(homes).discard()
        raise
    if device is not None:
        _move_buffers(model, device)
    if source is not None:
        del model.lowtide_source
    return MixedHome(homes)


def _fill(
    homes: dict[nn.Module, Any],
    by_home: Mapping[str, Sequence[tuple[list[nn.Module], list[nn.Parameter]]]],
    blocks: Sequence[nn.Module],
    names: Mapping[nn.Parameter, str],
    value_of: Callable[[str, Tensor], Tensor],
    device: torch.device | None,
) -> None:
    """Make the homes one after the other, each in ``homes`` as soon as it has its weights."""
    for place_name, entries in by_home.items():
        if place_name == DEVICE:
            homes.update(dict.fromkeys((m for members, _ in entries for m in members), DeviceHome()))
            continue
        layouts = [BlockLayout([(names[param], param) for param in params]) for _, params in entries]
        assert device is not None
        store = _store(place_name, device)
        store.adopt(layouts, value_of)
        number_of = {member: number for number, (members, _) in enumerate(entries) for member in members}
        members_of = {block: number_of[block] for block in blocks if block in number_of}
        homes.update(dict.fromkeys(members_of, StreamedHome(layouts, members_of, store, device)))


def _store(place_name: str, device: torch.device) -> Store:
    if place_name == HOST:
        return HostStore(pinned=device.type == "cuda")
    return DiskStore(Path(place_name), device)


def _used_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Parameter]:
    inside = {id(module) for block in blocks for module in block.modules()}
    return {p for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}


def _groups(
    blocks: Sequence[nn.Module], outside: set[nn.Parameter]
) -> list[tuple[list[nn.Module], list[nn.Parameter]]]:
    """(blocks, their parameters), blocks that share a parameter together, in the order of the first of them."""
    groups: list[tuple[list[nn.Module], dict[nn.Parameter, None]]] = []
    for block in blocks:
        params = dict.fromkeys(param for param in block.parameters() if param not in outside)
        joined = [group for group in groups if group[1].keys() & params.keys()]
        if not joined:
            groups.append(([block], params))
            continue
        first = joined[0]
        for members, others in joined[1:]:
            first[0].extend(members)
            first[1].update(others)
        first[0].append(block)
        first[1].update(params)
        groups = [group for group in groups if group is first or group not in joined]
    return [(members, list(params)) for members, params in groups]


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def by_name(model: nn.Module, blocks: Iterable[nn.Module], wanted: Mapping[str, str]) -> Callable[[nn.Module], str]:
    """Homes from a mapping by module name; the name of a module stands for all blocks in it, "" for all. Others: the device.

    Raises:
        ValueError: a name that is no block, holds none and is in none.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = list(blocks)

    def home_of(block: nn.Module) -> str:
        name = names.get(block, "")
        while name and name not in wanted:
            name = name.rpartition(".")[0]
        return wanted.get(name, DEVICE)

    known = {prefix for block in blocks for prefix in _prefixes(names.get(block, ""))}
    for name in wanted:
        if name not in known:
            raise ValueError(f"weights= names {name!r}, which is no block of this model and holds none")
    return home_of


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
