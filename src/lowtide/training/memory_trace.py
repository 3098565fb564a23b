"""The memory of one step by kind, moment by moment: what Figure 2 of the LOMO paper (arXiv 2306.09782) shows, for a user's own run.

Weights, optimizer state, gradients and kept block inputs are counted from the objects themselves where they change: at the borders of
blocks and in the hooks of the gradients. The total comes from the operating system (of a GPU: from torch's allocator), there and every
few milliseconds from a thread. What the counted kinds leave of it are the activations of one block, logits and temporaries, and what
the allocator keeps. Nothing is changed by looking on: the step is the same bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from .report import memory_bytes

if TYPE_CHECKING:
    from ..fused.block import BlockRunner
    from ..fused.slot import Slot
    from ..fusing import Engine

TRACED_STEP = 2  # the first one makes the optimizer's state
WEIGHTS, STATE, GRADIENTS, KEPT = COUNTED = ("weights", "optimizer state", "gradients", "kept block inputs")
_NORM, _UPDATE = "norm of the gradients", "update with the gradients that were kept"
_EVERY_S = 0.002
_MAX_MOMENTS = 300  # of an event
_MAX_HELD = 4096  # while the step is going on: longer steps are looked at less often

Moment = tuple[float, str, int, tuple[int, ...]]


class MemoryTrace:
    """Follows the memory of one step; a context around it.

    Args:
        engine: that takes the step.
        optimizers: all of its optimizers.
        device: as the trainer has it.

    Attributes:
        moments: (seconds since the beginning, where in the step, bytes in all, bytes of each kind in ``COUNTED``), in order.
        most: the most bytes of each kind, whenever that was.
    """

    def __init__(self, engine: Engine, optimizers: Sequence[Optimizer], device: str) -> None:
        self.moments: list[Moment] = []
        self.most = dict.fromkeys(COUNTED, 0)
        self._engine, self._optimizers, self._device = engine, optimizers, device
        self._params = list(engine.model.parameters())
        names = {id(module): name for name, module in engine.model.named_modules()}
        self._names = {runner: names.get(id(runner.block), "a block") for runner in engine._runners}
        self._order = {runner: number for number, runner in enumerate(engine._runners)}
        self._now = dict.fromkeys(COUNTED, 0)
        self._where = ""
        self._kept: dict[BlockRunner, dict[int, int]] = {}  # bytes by address: blocks share their masks
        self._held: dict[Slot, int] = {}  # gradients that wait: sums over micro-batches, or kept for the second pass
        self._fresh = 0  # bytes of the gradient whose hook is running
        self._parts: dict[
            Tensor, int
        ] = {}  # bytes that autograd holds of gradients that are not complete: those of tied weights
        self._start, self._every_s = 0.0, _EVERY_S
        self._lock = threading.Lock()  # around what the thread reads

    @contextmanager
    def __call__(self) -> Iterator[MemoryTrace]:
        """Look on for as long as this is entered."""
        engine, handles, done = self._engine, [], threading.Event()
        for runner in engine._runners:
            handles.append(runner.block.register_forward_pre_hook(self._before(runner), with_kwargs=True))
            handles.append(runner.block.register_forward_hook(self._after(runner)))
        handles.append(engine.model.register_forward_hook(self._at_output))
        names: dict[Tensor, str] = {param: name for name, param in engine.model.named_parameters()}
        for slot in engine._slots.values():
            name = names.get(slot.param, "a parameter")
            _hook(slot, self._at_gradient(slot, name))
            if slot.intake is not None:
                slot.intake.observer = self._at_slice(name)
        engine.room.observer = self._in_room
        self._start = time.perf_counter()
        self._at_border("before the step")
        thread = threading.Thread(target=self._watch, args=(done,), name="lowtide-memory", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()
            self._kept, self._parts = {}, {}
            self._at_border("after the step")
            for handle in handles:
                handle.remove()
            engine.room.observer = None
            for slot in engine._slots.values():
                _hook(slot, slot.on_grad)
                if slot.intake is not None:
                    slot.intake.observer = None

    def to_event(self) -> dict[str, Any]:
        """Of the moments at most 300: of every stretch of the step the fullest, and the one with the most gradients."""
        chosen = thinned(self.moments, _MAX_MOMENTS)
        kinds = {kind: [moment[3][index] for moment in chosen] for index, kind in enumerate(COUNTED)}
        return {
            "seconds": [round(moment[0], 4) for moment in chosen],
            "where": [moment[1] for moment in chosen],
            "total_bytes": [moment[2] for moment in chosen],
            "bytes": kinds,
            "most_bytes": dict(self.most),
        }

    # Hooks ----------------------------------------------------------------------------------------------------------

    def _before(self, runner: BlockRunner) -> Callable[..., None]:
        on_device = self._engine._block_inputs is None

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            storages = [tensor.untyped_storage() for tensor in tensors] if on_device else []
            self._kept[runner] = {storage.data_ptr(): storage.nbytes() for storage in storages}
            self._at_border(f"forward, {self._names[runner]}")

        return hook

    def _after(self, runner: BlockRunner) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._at_border(f"forward, after {self._names[runner]}")

        return hook

    def _at_output(self, module: Any, args: Any, output: Any) -> None:
        """See whatever sends a gradient to a parameter from outside of blocks."""
        loss = getattr(output, "loss", None)
        leaves = [loss] if isinstance(loss, Tensor) else pytree.tree_leaves(output)
        todo = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        seen = set(todo)
        while todo:
            node = todo.pop()
            params = [getattr(follower, "variable", None) for follower, _ in node.next_functions]
            if any(param is not None and param in self._engine._slots for param in params):
                node.register_hook(self._at_parts(params))
            fresh = {follower for follower, _ in node.next_functions if follower is not None} - seen
            seen |= fresh
            todo += fresh

    def _at_parts(self, params: list[Tensor | None]) -> Callable[..., None]:
        def hook(grads: tuple[Tensor | None, ...], _: Any) -> None:
            with self._lock:
                for param, grad in zip(params, grads, strict=True):
                    if param is not None and grad is not None:
                        self._parts[param] = self._parts.get(param, 0) + local_bytes(grad)
            self._take()

        return hook

    def _at_gradient(self, slot: Slot, name: str) -> Callable[[Tensor], None]:
        def on_grad(param: Tensor) -> None:
            self._before_use(slot, name, param.grad)
            slot.on_grad(param)  # the gradient is used, and gone, or added to what is held
            self._after_use(slot)

        return on_grad

    def _before_use(self, slot: Slot, name: str, grad: Tensor | None) -> None:
        running = self._engine._running
        where = f"{self._pass()}, {name if running is None else self._names[running]}"
        if where != self._where:
            self._at_border(where)
        with self._lock:
            self._parts.pop(slot.param, None)
            self._fresh = 0 if grad is None else local_bytes(grad)
        self._take()

    def _after_use(self, slot: Slot) -> None:
        with self._lock:
            self._fresh, self._held[slot] = 0, held_bytes(slot)

    def _in_room(self, slot: Slot, grad: Tensor | None) -> None:
        """Of a gradient that does not come from autograd: before it is used, and after that with None."""
        if grad is None:
            self._after_use(slot)
        else:
            self._before_use(slot, "a parameter", grad)  # of a block, whose name is shown

    def _at_slice(self, name: str) -> Callable[[Tensor], None]:
        """Of a vocabulary matrix: it is gone when the next one comes, or something else."""

        def observer(grad: Tensor) -> None:
            where = f"{self._pass()}, {name}"
            if where != self._where:
                self._at_border(where)
            with self._lock:
                self._fresh = grad.nbytes
            self._take()
            with self._lock:
                self._fresh = 0

        return observer

    def _pass(self) -> str:
        return _NORM if self._engine._measuring else "backward"

    # Counting -------------------------------------------------------------------------------------------------------

    def _at_border(self, where: str) -> None:
        """Something else begins: everything is counted anew, before the thread that watches may give it the new name."""
        self._count_held()
        self._forget_inputs()
        counted = {
            WEIGHTS: weight_bytes(self._params, self._engine),
            STATE: state_bytes(self._optimizers),
            KEPT: sum(dict(pair for held in self._kept.values() for pair in held.items()).values()),
        }
        with self._lock:
            self._where = where
            self._now |= counted
        self._take()

    def _count_held(self) -> None:
        with self._lock:
            self._held = {slot: held_bytes(slot) for slot in self._engine._slots.values()}

    def _forget_inputs(self) -> None:
        """Those of blocks behind the one that is walked: autograd frees them with the graph, unless it is walked again."""
        engine = self._engine
        running = engine._running
        once = engine._kept is not None and engine._kept.fits
        if running is None or (engine._measuring and not once):
            return
        last = self._order[running]
        self._kept = {runner: held for runner, held in self._kept.items() if self._order[runner] <= last}

    def _take(self) -> None:
        with self._lock:
            self._now[GRADIENTS] = self._fresh + sum(self._held.values()) + sum(self._parts.values())
            now = tuple(self._now[kind] for kind in COUNTED)
            for kind, value in zip(COUNTED, now, strict=True):
                self.most[kind] = max(self.most[kind], value)
            self.moments.append((time.perf_counter() - self._start, self._where, memory_bytes(self._device), now))
            if len(self.moments) > _MAX_HELD:
                self.moments = thinned(self.moments, _MAX_HELD // 2)
                self._every_s *= 2

    def _watch(self, done: threading.Event) -> None:
        kept = self._engine._kept
        while not done.wait(self._every_s):
            if kept is not None and not (self._engine._measuring or self._engine._running):
                # What exact clipping has kept of the first pass is used now: no hook tells of it.
                self._where = _UPDATE if self._where.startswith(_NORM) else self._where
                self._count_held()
            self._take()


def thinned(moments: Sequence[Moment], most: int) -> list[Moment]:
    """At most so many of them: the first, the last, and of every stretch the fullest and the one with the most gradients."""
    if len(moments) <= most:
        return list(moments)
    gradients, num_stretches = COUNTED.index(GRADIENTS), (most - 2) // 2
    kept = {0, len(moments) - 1}
    for part in range(num_stretches):
        stretch = range(len(moments) * part // num_stretches, len(moments) * (part + 1) // num_stretches)
        kept.add(max(stretch, key=lambda index: moments[index][2]))
        kept.add(max(stretch, key=lambda index: (moments[index][3][gradients], moments[index][2])))
    return [moments[index] for index in sorted(kept)]


def held_bytes(slot: Slot) -> int:
    """Of gradients that are alive between two hooks: a sum over micro-batches, one that waits for the second pass, or rows of one."""
    kept = slot.engine._kept
    held = None if slot.intake is None or slot.intake.held is None else slot.intake.held.grad
    waiting = (slot.total, None if kept is None else kept._grads.get(slot), held)
    return sum(local_bytes(grad) for grad in waiting if grad is not None)


def _hook(slot: Slot, hook: Callable[[Tensor], None]) -> None:
    """Have it called with the gradient, in place of what is called now."""
    slot.detach()
    slot.handle = slot.param.register_post_accumulate_grad_hook(hook)


def weight_bytes(params: Iterable[Tensor], engine: Engine) -> int:
    """Of the model where it is computed, buffers for weights from elsewhere included; a stand-in for such a weight has one element."""
    storages = (_local(param).untyped_storage() for param in params)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    buffers = (slot.buffer for home in engine.home.streamed for slot in home._slots)
    sizes |= {buffer.untyped_storage().data_ptr(): buffer.nbytes for buffer in buffers}  # parameters may be in them now
    return sum(sizes.values())


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    """Of all tensors that optimizers keep."""
    kept = (state for optimizer in optimizers for state in optimizer.state.values())
    return sum(local_bytes(value) for state in kept for value in state.values() if isinstance(value, Tensor))


def local_bytes(tensor: Tensor) -> int:
    """Of a sharded tensor the part of this process, which is less than its ``nbytes``."""
    return _local(tensor).nbytes


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)
