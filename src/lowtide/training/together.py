"""A run on several processes that ``torchrun`` has started: each takes its rows of every batch, the first one writes and speaks.

Whatever may fail on one rank alone (a file, a disk, memory) is followed by a word with the others, so that none of them waits for one
that has given up.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.tokens import IGNORED
from ..ranks import ALONE, Ranks
from ..weights.layout import Part
from ..weights.sharding import whole_tensor
from .config import TrainConfig

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Another process of this run has failed, and says why."""


class RankLostError(RuntimeError):
    """Another process of this run is gone, or does not answer."""


def started_by_torchrun() -> bool:
    """There are several processes, and the environment says how they find each other."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """All processes of the run, connected for as long as this is entered; this one alone if there are no others.

    Raises:
        RankLostError: another one died, or did not answer within ``rank_timeout``.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield Ranks()  # by whoever called us
        return
    if not started_by_torchrun():
        yield ALONE
        return
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(seconds=config.rank_timeout_seconds)
    try:
        _connect("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout)
        ranks = Ranks()
        yield ranks
    except RuntimeError as error:
        if _is_lost(error):
            rank = os.environ.get("RANK", "?")
            raise RankLostError(
                f"rank {rank}: another process of this run is gone or did not answer within {config.rank_timeout} ({_first_line(error)}). "
                "Its own message says why; go on from the last checkpoint with resume latest"
            ) from error
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _connect(backend: str, timeout: datetime.timedelta) -> None:
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # On one machine torchrun keeps its store over a restart, with the addresses of processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"lowtide/{attempt}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _is_lost(error: RuntimeError) -> bool:
    """What torch.distributed raises where a peer is gone."""
    kinds = tuple(
        kind
        for name in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
        if (kind := getattr(torch.distributed, name, None)) is not None
    )
    text = str(error).lower()
    known = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "socket")
    return isinstance(error, kinds) or (type(error) is RuntimeError and any(word in text for word in known))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def agree(ranks: Ranks, error: BaseException | None) -> None:
    """Behind something that may have failed on some ranks: all go on, or none.

    Args:
        ranks: all of them call this.
        error: what this rank has come to.

    Raises:
        OtherRankError: another one has failed. This one's error is raised as it is.
    """
    if ranks.size == 1:
        if error is not None:
            raise error
        return
    failed = ranks.sum([float(error is not None and rank == ranks.rank) for rank in range(ranks.size)])
    if error is not None:
        raise error
    first = next((rank for rank, flag in enumerate(failed) if flag), None)
    if first is not None:
        raise OtherRankError(f"rank {ranks.rank} ends because rank {first} has failed: see its message")


def on_all(ranks: Ranks, function: Callable[[], T]) -> T:
    """Call it on every rank; all of them go on when it has returned everywhere.

    Raises:
        OtherRankError: it failed on another one. This one's error is raised as it is.
    """
    value, error = None, None
    try:
        value = function()
    except Exception as failure:
        error = failure
    agree(ranks, error)
    return value  # type: ignore[return-value]


def on_first(ranks: Ranks, function: Callable[[], T]) -> T | None:
    """Call it on the first rank alone; the others wait for it, and get None."""
    return on_all(ranks, lambda: function() if ranks.is_first else None)


def one_after_another(ranks: Ranks, function: Callable[[], T]) -> T:
    """Call it on the first rank of every machine and then on the others, which find in a cache what the first ones have made."""
    if ranks.size == 1:
        return function()
    is_first_here = int(os.environ.get("LOCAL_RANK", str(ranks.rank))) == 0
    value = on_all(ranks, lambda: function() if is_first_here else None)
    return on_all(ranks, lambda: value if value is not None else function())


def own_rows(batch: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of a batch, as many as any other's or one more or less.

    Where there are fewer rows than ranks, some have the first row with nothing in it to be counted: they have to take part.

    Args:
        batch: int64 [B, S] each; ``labels`` among them.
        ranks: over which it is spread.
    """
    count = batch["labels"].shape[0]
    rows = slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)
    if rows.start < rows.stop:
        return {name: value[rows] for name, value in batch.items()}
    return {
        name: torch.full_like(value[:1], IGNORED) if name == "labels" else value[:1] for name, value in batch.items()
    }


def random_seed(seed: int, rank: int) -> int:
    """Of a rank's generators; the first one's is the run's, so that one process is the case of one rank."""
    return seed if rank == 0 else (seed * 0x9E3779B1 + rank * 0x85EBCA6B) % 2**31


def written_by_first(
    ranks: Ranks,
    parts: Sequence[Part],
    tensors: Mapping[str, Tensor],
    write: Callable[[Sequence[Part], Callable[[str], Tensor]], T],
) -> T | None:
    """Have the first rank write what is spread over all of them, one part after the other.

    All gather each part when the first one asks for it. If writing fails the others are not left waiting: the rest is gathered all
    the same, and then all know.

    Args:
        ranks: all of them call this.
        parts: of the model, which ``write`` loads in this order, each once.
        tensors: by name, which ``write`` then asks for, in this order.
        write: gets the parts, and what gives a tensor by its name.

    Returns:
        What it returned; None on the other ranks.

    Raises:
        OSError: it could not be written; on the other ranks, too.
    """
    if ranks.size == 1:
        return write(parts, tensors.__getitem__)
    names = {name: number for number, name in enumerate(tensors, start=len(parts))}
    loads: list[Callable[[], Any]] = [part.load for part in parts]
    gathering = _Gathering([*loads, *(partial(whole_tensor, tensor) for tensor in tensors.values())])
    gathered = [dataclasses.replace(part, load=partial(gathering.take, n)) for n, part in enumerate(parts)]
    value, error = None, None
    if ranks.is_first:
        try:
            value = write(gathered, lambda name: gathering.take(names[name]))
        except Exception as failure:
            error = failure
    gathering.rest()
    try:
        agree(ranks, error)
    except OtherRankError as failed:
        raise OSError(str(failed)) from failed
    return value


class _Gathering:
    """What all ranks gather together, in one order.

    Args:
        loads: collective calls.
    """

    def __init__(self, loads: Sequence[Callable[[], Any]]) -> None:
        self._loads, self._next = loads, 0

    def take(self, number: int) -> Any:
        """The next one."""
        assert number == self._next, "ranks gather everything once, in order"
        self._next += 1
        return self._loads[number]()

    def rest(self) -> None:
        """Take part in those that are left."""
        while self._next < len(self._loads):
            self.take(self._next)
