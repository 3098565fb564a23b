"""A run on several processes that ``torchrun`` has started: each takes its rows of every batch, the first one writes and speaks.

Whatever may fail on one rank alone (a file, a disk, memory) is followed by a word with the others, so that none of them waits for one
that has given up.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.tokens import IGNORED
from ..ranks import ALONE, Ranks
from ..weights.layout import Part
from ..weights.sharding import whole_tensor
from .config import TrainConfig
from .setup import LAUNCH

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
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise ValueError(
                f"{number + 1} or more processes were started on a machine with {count} GPUs: lower --nproc-per-node"
            )
        torch.cuda.set_device(number)
    timeout = datetime.timedelta(seconds=config.rank_timeout_seconds)
    try:
        launch = _connect("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout)
        ranks = Ranks()
        ranks.launch = launch
        yield ranks
    except RuntimeError as error:
        if _is_lost(error):
            rank = os.environ.get("RANK", "?")
            raise RankLostError(
                f"rank {rank}: another process of this run is gone or did not answer within {config.rank_timeout} ({_first_line(error)}). "
                "Its own message says why; go on from the last checkpoint with --resume"
            ) from error
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _connect(backend: str, timeout: datetime.timedelta) -> str:
    """Make the process group; returns what all processes of this launch have in common, over restarts, and no other launch."""
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    launch = store.compare_set("lowtide/launch", "", uuid.uuid4().hex).decode()
    store = torch.distributed.PrefixStore(_meet(store, rank, size, timeout), store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return launch


def _meet(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> str:
    """A prefix for the keys of this attempt, on which all processes that are alive agree.

    torchrun keeps its store over a restart, with the addresses of processes that are gone, and its agents do not count restarts alike. So
    every process has a name of its own; the first waits for the others under its name, and each waits until it finds itself among
    those that the first has met.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("lowtide/attempt", own)
        keys = [f"lowtide/{own}/{other}" for other in range(1, size)]
        store.wait(keys, timeout)
        store.set(f"lowtide/{own}/all", " ".join(store.get(key).decode() for key in keys))
        return f"lowtide/{own}"
    while time.monotonic() < end:
        attempt = store.get("lowtide/attempt").decode()  # perhaps that of an earlier one
        store.set(f"lowtide/{attempt}/{rank}", own)
        everybody = f"lowtide/{attempt}/all"
        if store.check([everybody]) and own in store.get(everybody).decode():
            return f"lowtide/{attempt}"
        time.sleep(0.05)
    raise RuntimeError("timed out: the first process did not come")


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


def note_launch(output: Path, ranks: Ranks) -> None:
    """Have the run in this directory known as that of this launch."""
    if ranks.launch is not None:
        (output / LAUNCH).write_text(ranks.launch)


def started_again(output: Path, ranks: Ranks) -> bool:
    """torchrun has started the processes of the run in this directory again, after one of them had died."""
    try:
        return ranks.launch is not None and (output / LAUNCH).read_text() == ranks.launch
    except OSError:
        return False


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


def same_everywhere(ranks: Ranks, what: str, value: Any) -> None:
    """See that all ranks are about to do the same.

    Args:
        ranks: all of them call this.
        what: it is, for the message.
        value: as JSON can hold it.

    Raises:
        ValueError: the first rank has another one.
        OtherRankError: another rank has.
    """
    if ranks.size == 1:
        return
    own = json.loads(json.dumps(value))
    first = ranks.broadcast(value)

    def compare() -> None:
        if own == first:
            return
        differing = ""
        if isinstance(own, dict) and isinstance(first, dict):
            names = sorted(name for name in own.keys() | first.keys() if own.get(name) != first.get(name))
            differing = ": " + ", ".join(
                f"{name} is {own.get(name)!r} here and {first.get(name)!r} there" for name in names
            )
        raise ValueError(f"{what} of rank {ranks.rank} are not those of rank 0{differing}. All processes need the same")

    on_all(ranks, compare)


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
