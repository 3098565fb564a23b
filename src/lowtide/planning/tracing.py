"""Counting the bytes that a piece of a model would hold, by running it on tensors without memory.

On the meta device an operation only works out shapes. :class:`MemoryTrace` watches every operation, notes each new storage
and its kind, and is told by the storage itself when it dies. So lifetimes are those of the real program (autograd's saved
tensors, views, in-place operations), and no formula has to know what an architecture does.

What a kernel allocates and frees again inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..fused.matmul16 import tile
from ..optim.base import SIXTEEN_BIT

# What the bytes of a training step are for, in the order in which they are shown.
WEIGHTS, GRADIENTS, STATE = "weights", "gradients", "optimizer state"
KEPT, WORKING, LOGITS, TEMPORARIES, POOLS, GATHERED, SENT, OTHER, ALLOCATOR = (
    "kept block inputs",
    "one block's working set",
    "logits",
    "temporaries of the update",
    "pools",
    "gathered weights",
    "buffers of the link",
    "other",
    "free in the allocator",
)
KINDS = (WEIGHTS, GRADIENTS, STATE, KEPT, WORKING, LOGITS, TEMPORARIES, POOLS, GATHERED, SENT, OTHER, ALLOCATOR)

# On a CPU glibc gives larger pieces back to the system at once. Smaller ones come from its heap, whose free memory stays
# resident until it is trimmed (M_MMAP_THRESHOLD in mallopt(3): the threshold climbs to this as pieces are freed).
HEAP_BELOW = {"cpu": 32 * 1024**2, "cuda": 0}
# Resident bytes of that heap for one in use at its fullest moment: pieces of many sizes leave gaps that the next ones do not fit
# into. mallinfo2 in backward passes of blocks showed 1.3 (llama, 512 wide), 1.5 (mixture, micro-batches) and 1.7 (mixture).
FRAGMENTATION = 1.5
# What blocks before it may have left behind, of what a block takes from the heap (``MemoryTrim`` in ``weights/home.py``).
LEFT_BEHIND = 0.4
# The same where the activations of many blocks are kept: what one step has left free serves the next one badly. SmolLM2's shape, 8 x 128
# tokens, four steps: 1.8 with 15 and with 30 layers; giving free memory back before each step would cost 9 % of its time.
FRAGMENTATION_OF_KEPT = 1.8

Bytes = dict[str, int]  # by kind


class _Entry:
    """A storage: how to see that it is still the same one, its size, what it is for."""

    __slots__ = ("kind", "num_bytes", "reference")

    def __init__(self, reference: weakref.ref[Any], num_bytes: int, kind: str) -> None:
        self.reference, self.num_bytes, self.kind = reference, num_bytes, kind


class MemoryTrace(TorchDispatchMode):
    """While entered, counts the bytes of all storages that operations create, and remembers the largest sum.

    Args:
        answer: what a model is told that asks a tensor for a truth value. transformers asks whether all tokens of a mask
            count, and whether all positions follow one another: True means that it need not make a mask.
        heap_below: pieces of fewer bytes come from a heap whose free memory stays resident; see ``HEAP_BELOW``.
        float32_products: products of 16-bit matrices run in float32 slices, see ``fused/matmul16.py``.

    Attributes:
        live: bytes alive now, by kind.
        peak: the same, at the moment when the sum was largest.
        heap, heap_high: bytes of the heap in use now, and the most of them so far.
    """

    def __init__(self, *, answer: bool = True, heap_below: int = 0, float32_products: bool = False) -> None:
        super().__init__()
        self.answer, self._heap_below, self.float32_products = answer, heap_below, float32_products
        self.heap = self.heap_high = 0
        self.live: Bytes = {}
        self.peak: Bytes = {}
        self._kind = OTHER
        self._total = self._peak_total = 0
        self._known: dict[int, _Entry] = {}  # by address
        self._at_peak: set[_Entry] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.add.Tensor and self._sums_gradients(*args, **(kwargs or {})):
            return args[0].add_(args[1])
        result = _grouped_mm(*args) if func in _GROUPED_MM else func(*args, **(kwargs or {}))
        kind = GRADIENTS if func is torch.ops.aten.embedding_dense_backward.default else self._kind
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), kind)
        if self.float32_products and func in _PRODUCTS and result.dtype in SIXTEEN_BIT:
            first, second = args[-2:]
            self.product(first.shape[0], first.shape[1], second.shape[1])
        return result

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """What is created inside is of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These are counted by somebody else (weights, inputs from outside)."""
        for tensor in tensors:
            self._add(tensor.untyped_storage(), 0, OTHER)

    def retag(self, tensor: Tensor, kind: str) -> None:
        """This tensor's storage counts as ``kind``, at the peak so far, too."""
        entry = self._find(tensor.untyped_storage())
        if entry is None:
            return
        for place in (self.live, self.peak) if entry in self._at_peak else (self.live,):
            place[entry.kind] -= entry.num_bytes
            place[kind] = place.get(kind, 0) + entry.num_bytes
        entry.kind = kind

    def transient(self, extra: Bytes) -> None:
        """Something is used for a moment, on top of what is alive: may be the new peak."""
        total = self._total + self.retained + sum(extra.values())
        if total >= self._peak_total:
            self._peak_total = total
            self.peak = added(self.live, extra, {ALLOCATOR: self.retained})
            self._at_peak = set(self._known.values())

    def product(self, rows: int, inner: int, columns: int) -> None:
        """A product of 16-bit matrices, [rows, inner] and [inner, columns], in float32 slices."""
        if not self.float32_products:
            return
        height, width = tile(rows, inner, columns)
        self.touch(4 * height * inner, 4 * width * inner, 4 * width * height)

    def touch(self, *pieces: int) -> None:
        """Memory in pieces of so many bytes comes and goes within an operation."""
        small = sum(piece for piece in pieces if piece < self._heap_below)
        self.heap_high = max(self.heap_high, self.heap + small)
        self.transient({self._kind: sum(pieces) - small})

    @property
    def retained(self) -> int:
        """Bytes of the heap that are free and still resident."""
        return self.heap_high - self.heap

    def take_peak(self) -> Bytes:
        """The peak so far; from now on another one is looked for, and the heap's free memory has gone back."""
        peak, self._peak_total, self.heap_high = self.peak, 0, self.heap
        self._look()
        return peak

    def _sums_gradients(self, first: Any, second: Any, **_: Any) -> bool:
        """Autograd adds two gradients of one tensor in place where nobody else holds the first; a trace always seems to."""
        if torch._C._current_graph_task_id() == -1 or not isinstance(second, Tensor) or first.shape != second.shape:
            return False
        entry = self._find(first.untyped_storage())
        return entry is not None and entry.num_bytes > 0  # what comes from outside is held there

    def _find(self, storage: torch.UntypedStorage) -> _Entry | None:
        entry = self._known.get(storage._cdata)
        return entry if entry is not None and entry.reference() is storage else None

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        if self._find(storage) is None:
            self._add(storage, storage.nbytes(), kind)

    def _add(self, storage: torch.UntypedStorage, num_bytes: int, kind: str) -> None:
        key = storage._cdata

        def died(_: Any) -> None:
            self._count(self._known.pop(key), -1)

        self._known[key] = entry = _Entry(weakref.ref(storage, died), num_bytes, kind)
        self._count(entry, 1)
        self._look()

    def _count(self, entry: _Entry, sign: int) -> None:
        self.live[entry.kind] = self.live.get(entry.kind, 0) + sign * entry.num_bytes
        self._total += sign * entry.num_bytes
        if entry.num_bytes < self._heap_below:
            self.heap += sign * entry.num_bytes
            self.heap_high = max(self.heap_high, self.heap)

    def _look(self) -> None:
        self.transient({})


def added(*parts: Bytes) -> Bytes:
    """The sum, kind by kind."""
    result: Bytes = {}
    for part in parts:
        for kind, num_bytes in part.items():
            result[kind] = result.get(kind, 0) + num_bytes
    return {kind: num_bytes for kind, num_bytes in result.items() if num_bytes}


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_GROUPED_MM = (torch.ops.aten._grouped_mm.default,)


def _grouped_mm(first: Tensor, second: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    # The product of a mixture's experts. torch 2.13 works out its shape for bfloat16 only; its CPU kernel takes float32 too.
    if first.dim() == second.dim() == 2:  # tokens x rows, tokens x columns: gradients of the experts' weights
        return first.new_empty((offsets.shape[0], first.shape[0], second.shape[1]))
    return first.new_empty((first.shape[0], second.shape[-1]))
