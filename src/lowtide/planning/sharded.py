"""What one of several ranks holds that share a model (``lowtide.shard``, FSDP2), moment by moment.

The step outside the blocks and the blocks' working sets are traced as for one process, with a rank's part of the batch. On top of them
come the weights that FSDP2 has gathered and its buffers (torch 2.13, ``_fsdp_param_group.py`` and ``_fsdp_collectives.py``):

- A gather has one buffer for all parameters of a unit, and copies each of them out of it. In a forward pass the buffer lives until the
  next unit's weights are copied, in a backward pass only for the copy.
- Behind a unit's backward its weights are freed, its gradients are copied into a buffer in the reduce dtype, and freed; the sums of this
  rank's rows come into a second one. The first stays until the next unit's gradients are sent.
- On a GPU the next unit's gather has begun while a unit computes. On a CPU it has not, and no buffer outlives its use but that of a gather
  in a forward pass, which lives until the next one (``weights/host_comm.py``).

Units are the embedding, each decoder layer and the head; embedding and head are one if they are tied, which stays gathered between its
two uses in either direction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..optim.base import SIXTEEN_BIT
from .footprint import Footprint, sum_bytes
from .moments import Moment
from .step_shape import StepShape, trims_around
from .tracing import GATHERED, GRADIENTS, HEAP_BELOW, SENT, STATE, TEMPORARIES, WEIGHTS, Bytes, added
from .updates import state_bytes, temporary_bytes


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How ranks share a model; see :func:`lowtide.shard`.

    Attributes:
        num_ranks: processes, each with a GPU of its own (or a machine, on CPUs).
        ranks_per_node: the rows of a parameter are spread over so many, and each such group has a copy; None for all ranks.
        reduce_dtype: ``auto`` (float32 where weights are 16-bit) or ``weights``.
        offload: rows and optimizer state are in host memory, and are updated there.

    Raises:
        ValueError: the ranks cannot be divided, or a number is out of range.
    """

    num_ranks: int
    ranks_per_node: int | None = None
    reduce_dtype: str = "auto"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {self.num_ranks}")
        if self.ranks_per_node is not None and (self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node):
            raise ValueError(f"{self.num_ranks} ranks cannot be divided into groups of {self.ranks_per_node}")
        if self.reduce_dtype not in ("auto", "weights"):
            raise ValueError(f"reduce_dtype must be auto or weights, got {self.reduce_dtype!r}")

    @property
    def num_shards(self) -> int:
        """Ranks that hold different rows."""
        return self.ranks_per_node or self.num_ranks

    def reduce_itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of an element of a gradient on its way between ranks, of weights of this dtype."""
        return 4 if self.reduce_dtype == "auto" and dtype in SIXTEEN_BIT else dtype.itemsize


def rank_shape(shape: StepShape, sharding: Sharding) -> StepShape:
    """The step as the rank with the most rows of the batch sees it.

    Raises:
        ValueError: the batch has fewer rows than there are ranks.
    """
    if shape.batch_size < sharding.num_ranks:
        raise ValueError(
            f"batch_size is that of all ranks together, and {shape.batch_size} cannot be shared by {sharding.num_ranks}"
        )
    rows = -(-shape.batch_size // sharding.num_ranks)
    return shape.resized(batch_size=rows, seq_len=shape.seq_len, gathered=True)


def sharded_footprint(
    shape: StepShape,
    num_ranks: int,
    *,
    micro_batch_size: int | None = None,
    ranks_per_node: int | None = None,
    reduce_dtype: str = "auto",
    offload: bool = False,
) -> Footprint:
    """Bytes by kind and place of one rank, at the moment when its device holds most.

    Args:
        shape: of the step of all ranks together.
        num_ranks, ranks_per_node, reduce_dtype, offload: see :class:`Sharding`. One rank is the ordinary step in one process.
        micro_batch_size: samples of a rank that go through a block at a time; None for all of them.

    Raises:
        ValueError: the batch or the ranks cannot be divided, or a number is out of range.
    """
    sharding = Sharding(num_ranks, ranks_per_node, reduce_dtype, offload)
    if num_ranks == 1:
        return shape.footprint("host" if offload else "device", micro_batch_size=micro_batch_size)
    return rank_footprint(rank_shape(shape, sharding), sharding, micro_batch_size)


def rank_footprint(rank: StepShape, sharding: Sharding, micro_batch_size: int | None = None) -> Footprint:
    """The same for the step of :func:`rank_shape`, which remembers what it has traced."""
    size = min(micro_batch_size or rank.batch_size, rank.batch_size)
    params = list(rank.model.parameters())
    rows = [own_rows(param, sharding.num_shards) for param in params]
    state = sum(state_bytes(part, rank.optimizer, rank.rounding) for part in rows)
    kept = {WEIGHTS: sum_bytes(rows), STATE: state}
    peak = _RankStep(rank, sharding, size).peak()
    if sharding.offload and rank.device != "cpu":
        units = [_UnitBytes.of(module, sharding, rank) for module in _modules(rank)]
        largest = max(unit.gradients or unit.sums for unit in units)
        return Footprint(peak, added(kept, {GRADIENTS: largest}), {})
    return Footprint(added(peak, kept), {}, {})


def own_rows(param: Tensor, num_shards: int) -> Tensor:
    """The rows that a rank holds of a parameter, padded as FSDP2 pads them, on the meta device."""
    if not param.dim():
        return param
    return torch.empty((-(-param.shape[0] // num_shards), *param.shape[1:]), dtype=param.dtype, device="meta")


def unit_elements(module: nn.Module, num_shards: int) -> int:
    """Elements of a unit's parameters as they are gathered: every rank sends as much as the one with the most rows."""
    return num_shards * sum(own_rows(param, num_shards).numel() for param in module.parameters())


@dataclasses.dataclass(frozen=True)
class _UnitBytes:
    """Bytes of a unit.

    Attributes:
        whole: gathered weights, and the buffer of the gather.
        small: the part of them in pieces that come from the allocator's heap.
        sent: buffer of all its gradients in the reduce dtype.
        left: what stays of both until the next unit's gradients are sent.
        sums: this rank's rows of them, as they come.
        gradients: the same in the dtype of the weights; 0 where this is the reduce dtype, and nothing is converted.
        whole_gradients: all of them, before they are sent.
        joined: a copy of them while they are put into the buffer.
        update: temporaries of the update.
    """

    whole: int
    small: int
    sent: int
    left: int
    sums: int
    gradients: int
    whole_gradients: int
    joined: int
    update: int

    @classmethod
    def of(cls, module: nn.Module, sharding: Sharding, rank: StepShape, added_up: bool = False) -> _UnitBytes:
        """Added up: over several micro-batches, in the reduce dtype."""
        params, shards = list(module.parameters()), sharding.num_shards
        rows = [own_rows(param, shards) for param in params]
        itemsize = sharding.reduce_itemsize(rank.dtype)
        converts = itemsize != rank.dtype.itemsize
        elements = sum(part.numel() for part in rows)
        gradients = sum(param.numel() for param in params) * itemsize if added_up else sum_bytes(params)
        pieces = [shards * part.nbytes for part in rows]
        updates = [temporary_bytes(part, rank.optimizer, "cpu" if sharding.offload else rank.device) for part in rows]
        return cls(
            whole=sum(pieces),
            small=sum(piece for piece in pieces if piece < HEAP_BELOW[rank.device]),
            sent=shards * elements * itemsize,
            # between nodes the sums are added up once more, in place
            left=(shards + (shards < sharding.num_ranks)) * elements * itemsize if rank.device != "cpu" else 0,
            sums=elements * itemsize,
            gradients=elements * rank.dtype.itemsize if converts else 0,
            whole_gradients=gradients,
            # On a CPU torch joins tensors first and converts them then.
            joined=gradients if rank.device == "cpu" and converts and not added_up else 0,
            update=max(updates),
        )


def _modules(rank: StepShape) -> list[nn.Module]:
    """Units in the order of the forward pass."""
    return [rank.model.get_submodule(unit.name) for unit in rank.units]


class _RankStep:
    """The moments of a rank's step, with what FSDP2 holds in each."""

    def __init__(self, rank: StepShape, sharding: Sharding, micro_batch_size: int) -> None:
        self.rank, self.sharding = rank, sharding
        split = micro_batch_size < rank.batch_size  # embedding and head take all rows at once
        units = [
            _UnitBytes.of(module, sharding, rank, added_up=split and unit.is_layer)
            for module, unit in zip(_modules(rank), rank.units, strict=True)
        ]
        self.embedding = units[0]
        self.tied = rank.units[-1].is_layer
        self.head = units[0] if self.tied else units[-1]
        self.blocks = units[1:] if self.tied else units[1:-1]
        self.prefetches = rank.device != "cpu"
        sums_dtype = torch.float32 if sharding.reduce_itemsize(rank.dtype) != rank.dtype.itemsize else None
        self.working = rank.gathered_working_sets(micro_batch_size, sums_dtype)
        # Whatever belongs to no unit (the final norm) stays gathered for the whole step.
        self.rest = rank.weights_bytes - sum(unit.num_bytes for unit in rank.units)

    def peak(self) -> Bytes:
        """The largest moment; this rank's rows and optimizer state are not in it."""
        step = self.rank.step
        with_link = [self._with_link(number, moment) for number, moment in enumerate(step.moments)]
        before = added(step.before, {GATHERED: self.embedding.whole, SENT: self.embedding.whole})
        whole = dataclasses.replace(step, before=before, moments=tuple(with_link))
        peaks = [whole.peak(self.working, self.working, trims_around(self.rank)), *self._transfers()]
        return added(max(peaks, key=lambda peak: sum(peak.values())), {GATHERED: self.rest})

    def _with_link(self, number: int, moment: Moment) -> Moment:
        """A block begins: its weights are there, and what is left of the unit before it."""
        unit = self.blocks[moment.block]
        held = {GATHERED: unit.whole, SENT: unit.whole if moment.phase == "forward" else self._held(number)}
        tied = self.head.whole if self.tied else 0
        tied_small = self.head.small if self.tied else 0
        after = {GATHERED: tied, SENT: unit.whole if moment.phase == "forward" else unit.left + self._next(number)}
        if self._turns(number):
            # The head's backward: it is whole, and the last block's weights are on their way.
            after = {GATHERED: self.head.whole, SENT: self._next(number)}
        if self._ends(number):
            # The embedding's; behind the first pass of exact clipping the head's comes right after it.
            both = self._turns(number)
            whole = max(self.embedding.whole, self.head.whole if both else 0)
            after = {GATHERED: whole, SENT: max(unit.left, self._next(number) if both else 0)}
        return dataclasses.replace(
            moment,
            live=added(moment.live, held, {GATHERED: tied}),
            heap=moment.heap + unit.small + tied_small,
            after=added(moment.after, after),
            after_heap=(moment.after_heap[0] + tied_small, moment.after_heap[1] + tied_small),
        )

    def _transfers(self) -> Iterator[Bytes]:
        """The moments of gathers and of sums, which are not the model's own."""
        moments, tied = self.rank.step.moments, {GATHERED: self.head.whole if self.tied else 0}
        for number, moment in enumerate(moments):
            unit, following = self.blocks[moment.block], moments[min(number + 1, len(moments) - 1)].live
            if moment.phase == "forward":
                earlier = self.blocks[moment.block - 1] if moment.block else self.embedding
                yield added(moment.live, tied, {SENT: unit.whole + (earlier.whole if self.prefetches else 0)})
            else:
                sent = self._sent_before(number)
                yield added(moment.live, tied, {GATHERED: unit.whole, SENT: unit.whole + self._own_rows(unit) + sent})
                yield from self._sums(unit, added(following, tied), self._next(number), moment.phase)
            if self._turns(number):
                phase = moments[number + 1].phase
                begins = self._without_gradients(following)
                yield added(begins, {GATHERED: self.head.whole, SENT: self.head.whole + self._own_rows(self.head)})
                if not self.tied:
                    yield from self._sums(self.head, following, self._next(number), phase)
            if self._ends(number):
                # With tied weights the head's gradient waits in it for the embedding's.
                if not self.tied:
                    yield added(moment.live, {GATHERED: self.embedding.whole, SENT: self.embedding.whole + unit.left})
                yield from self._sums(self.embedding, self._without_gradients(moment.live), 0, moment.phase)

    def _sums(self, unit: _UnitBytes, live: Bytes, coming: int, phase: str) -> Iterator[Bytes]:
        """A unit's gradients are sent: copied, added up, used."""
        own = unit.sums
        yield added(live, {GRADIENTS: unit.whole_gradients, SENT: unit.sent + unit.joined + coming})
        yield added(live, {SENT: unit.sent + own + coming})
        converted = {GRADIENTS: unit.gradients or own, SENT: unit.left + coming}
        yield added(live, converted, {SENT: own if unit.gradients else 0})
        if phase == "backward" and not (self.sharding.offload and self.rank.device != "cpu"):
            yield added(live, converted, {TEMPORARIES: unit.update})

    def _own_rows(self, unit: _UnitBytes) -> int:
        """A rank's rows on their way from host memory."""
        return unit.whole // self.sharding.num_shards if self.sharding.offload and self.prefetches else 0

    def _held(self, number: int) -> int:
        """Bytes of buffers while a block runs backward."""
        return self._sent_before(number) + self._next(number)

    def _sent_before(self, number: int) -> int:
        """Of the unit before it in the backward pass, whose buffer of gradients is still there."""
        moments = self.rank.step.moments
        if self._turns(number - 1):
            return 0 if self.tied else self.head.left
        return self.blocks[moments[number - 1].block].left

    def _next(self, number: int) -> int:
        """The gather that has begun, behind the beginning of this moment; of the embedding's the first block's backward is the last."""
        moments = self.rank.step.moments
        if not self.prefetches:
            return 0
        if self._ends(number) and not self._turns(number):
            return 0 if self.tied else self.embedding.whole
        following = moments[number + 1]
        return self.blocks[following.block].whole

    def _turns(self, number: int) -> bool:
        """Behind this block comes the head: a backward pass begins."""
        moments = self.rank.step.moments
        return number + 1 < len(moments) and moments[number + 1].phase != moments[number].phase

    def _ends(self, number: int) -> bool:
        """Behind this block comes the embedding: a backward pass ends."""
        moments = self.rank.step.moments
        last = number + 1 == len(moments) or moments[number + 1].phase != moments[number].phase
        return last and moments[number].phase != "forward"

    def _without_gradients(self, live: Bytes) -> Bytes:
        return {kind: size for kind, size in live.items() if kind != GRADIENTS} if self.tied else live
