"""The planner: homes of the blocks, micro-batch, place of the block inputs and which activations are kept, so that a step fits and is fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..units import format_bytes
from ..weights.pool import DEFAULT_NUM_SLOTS
from .footprint import Footprint
from .speeds import Speeds
from .step_shape import StepShape, UntraceableError
from .timing import StepTime, step_time

HOMES = ("device", "host", "disk")
# Of what a plan leaves free, for activations that are kept: the machine has other uses for memory, and predictions are off by some per cent.
_FOR_ACTIVATIONS = 0.5


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes that may be used of each place; on a CPU only ``device`` and ``disk`` count. 0: not at all."""

    device: int
    host: int
    disk: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen, and what it comes to.

    Attributes:
        homes: (name of the module, home) of embedding, decoder layers and head: device, host or disk.
        micro_batch_size: samples that go through a block at a time.
        block_inputs: where the inputs of the blocks are kept: device or host.
        keep_activations: decoder layers, the last ones, whose activations are kept instead of being computed again.
        footprint: bytes by kind and place.
        time: of a step.
        limits: what it had to fit.
        speeds: what the time was worked out from.
        tokens: of a step.
        copy_bytes: of the working copy on disk, which is written once before the first step.
    """

    homes: tuple[tuple[str, str], ...]
    micro_batch_size: int
    block_inputs: str
    keep_activations: int
    footprint: Footprint
    time: StepTime
    limits: Limits
    speeds: Speeds
    tokens: int
    copy_bytes: int

    def disk_bytes_written(self, num_steps: int) -> int:
        """Bytes that a run writes to the disk: the wear of an SSD. Checkpoints are not counted."""
        return self.copy_bytes + num_steps * self.time.disk_write_bytes

    def count(self, home: str) -> int:
        """Units that live there."""
        return sum(where == home for _, where in self.homes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "homes": [list(pair) for pair in self.homes],
            "micro_batch_size": self.micro_batch_size,
            "block_inputs": self.block_inputs,
            "keep_activations": self.keep_activations,
            "footprint": self.footprint.to_dict(),
            "totals": self.footprint.totals(),
            "time": {**self.time.to_dict(), "tokens_per_s": self.tokens / self.time.step_s},
            "limits": dataclasses.asdict(self.limits),
            "speeds": {**dataclasses.asdict(self.speeds), "sources": dict(self.speeds.sources)},
        }


def make_plan(
    shape: StepShape,
    *,
    limits: Limits,
    speeds: Speeds,
    weights: str = "auto",
    micro_batch_size: int | None = None,
    block_inputs: str | None = None,
    keep_activations: int | None = None,
) -> Plan:
    """The fastest plan that fits; of equally fast ones that with the least on disk, the largest micro-batch, and the least that moves.

    Args:
        shape: of the step.
        limits: bytes of each place.
        speeds: of the machine.
        weights: auto, or one home for all blocks: device, host or disk.
        micro_batch_size: None to choose.
        block_inputs: device or host; None to choose.
        keep_activations: decoder layers, see :func:`lowtide.fuse`; None to choose: as many as half of the memory that the plan would
            leave free has room for, if all weights are on the device.

    Raises:
        MemoryError: nothing fits; the message says what would.
        ValueError: an argument is out of range.
    """
    found = find_plan(
        shape,
        limits=limits,
        speeds=speeds,
        weights=weights,
        micro_batch_size=micro_batch_size,
        block_inputs=block_inputs,
        keep_activations=keep_activations,
    )
    if found is None and keep_activations:
        used = shape.keeping(keep_activations).footprint().totals()["device"]
        raise MemoryError(
            f"no plan fits: with activations of {shape.keeping(keep_activations).num_kept} layers kept a step takes {format_bytes(used)}, where "
            f"{format_bytes(limits.device)} may be used: keep fewer, or leave keep_activations out"
        )
    if found is None:
        size = 1 if micro_batch_size is None else micro_batch_size
        raise MemoryError(_nothing_fits(shape, limits, weights, size, _places(shape, block_inputs)))
    return found


def find_plan(
    shape: StepShape,
    *,
    limits: Limits,
    speeds: Speeds,
    weights: str = "auto",
    micro_batch_size: int | None = None,
    block_inputs: str | None = None,
    keep_activations: int | None = None,
) -> Plan | None:
    """The same, or None if nothing fits: to find out what would takes longer than the search.

    Raises:
        ValueError: an argument is out of range.
    """
    if weights not in ("auto", *HOMES):
        raise ValueError(f"weights must be one of auto, {', '.join(HOMES)}, got {weights!r}")
    if micro_batch_size is not None and not 1 <= micro_batch_size <= shape.batch_size:
        raise ValueError(f"micro_batch_size must lie between 1 and the batch size, got {micro_batch_size}")
    if keep_activations:
        if weights not in ("auto", "device"):
            raise ValueError(f"keep_activations is for weights on the device, not on {weights}: leave it out")
        if micro_batch_size not in (None, shape.batch_size):
            raise ValueError("keep_activations keeps those of the whole batch: leave it out, or micro_batch_size")
        shape, micro_batch_size = shape.keeping(keep_activations), shape.batch_size
    search = _Search(shape, limits, weights)
    sizes = micro_batches(shape.batch_size) if micro_batch_size is None else (micro_batch_size,)
    best: tuple[Any, Plan] | None = None
    for size in sizes:
        for inputs in _places(shape, block_inputs):
            for homes in search.candidates(size, inputs):
                plan = _plan(shape, homes, size, inputs, limits, speeds)
                # To the microsecond: what is equal but for rounding is equal. A disk wears; small micro-batches cost more than is
                # worked out here (launches, sums); a bus that is not the bottleneck costs nothing.
                streamed = len(homes) - plan.count("device")
                key = (round(plan.time.step_s, 6), plan.count("disk"), -size, streamed, inputs == "host")
                if best is None or key < best[0]:
                    best = key, plan
    if best is None:
        return None
    return _with_activations(best[1], shape) if keep_activations is None else best[1]


def _with_activations(plan: Plan, shape: StepShape) -> Plan:
    """The same plan with as many activations kept as there is room for."""
    in_parts = plan.micro_batch_size < shape.batch_size
    if in_parts or plan.count("device") < len(plan.homes) or not shape.counts_all_activations:
        return plan
    homes, limits, most = dict(plan.homes), plan.limits, len(shape.blocks)
    used = plan.footprint.totals()["device"]
    room = used + int(_FOR_ACTIVATIONS * (limits.device - used))

    def keeping(number: int) -> Plan:
        return _plan(shape.keeping(number), homes, plan.micro_batch_size, plan.block_inputs, limits, plan.speeds)

    def excess(tried: Plan) -> int:
        totals = tried.footprint.totals()
        return totals["device"] - room if totals["device"] > room or _fits(totals, limits) else 1

    try:
        if excess(best := keeping(1)) > 0:
            return plan
        if most == 1:
            return best
        # Layers take about the same each: from two of them the number is guessed, and then looked at.
        second = keeping(2)
        one = second.footprint.totals()["device"] - best.footprint.totals()["device"]
        number = most if one <= 0 else min(most, 1 - excess(best) // one)
        while number > 1:
            tried = second if number == 2 else keeping(number)
            if (over := excess(tried)) <= 0:
                return tried
            number -= max(1, -(-over // max(1, one)))
        return best
    except UntraceableError:
        return plan


def _places(shape: StepShape, block_inputs: str | None) -> tuple[str, ...]:
    """Where the block inputs may be."""
    if block_inputs is not None:
        return (block_inputs,)
    return ("device", "host") if shape.device != "cpu" else ("device",)


def micro_batches(batch_size: int) -> tuple[int, ...]:
    """Sizes worth trying: the whole batch, then powers of two down to 1."""
    powers = [2**exponent for exponent in range(batch_size.bit_length()) if 2**exponent < batch_size]
    return (batch_size, *reversed(powers))


class _Search:
    """Homes that fit: as many decoder layers on the device as there is room for, the others in host memory or on disk."""

    def __init__(self, shape: StepShape, limits: Limits, weights: str) -> None:
        self.shape, self.limits, self.weights = shape, limits, weights
        self.layers = [unit.name for unit in shape.units if unit.is_layer]
        self.ends = [unit.name for unit in shape.units if not unit.is_layer]

    def candidates(self, size: int, inputs: str) -> Iterator[dict[str, str]]:
        """Homes by name, each of which fits."""
        if self.weights != "auto":
            homes = self._homes(0, 0, self.weights, self.weights, self.weights)
            if self.fits(homes, size, inputs):
                yield homes
            return
        count = len(self.layers)
        everything = self._homes(count, 0, "device", "device", "device")
        if self.fits(everything, size, inputs):
            yield everything
            return
        if self.shape.num_kept:  # such a layer's weights stay on the device, and then all do
            return
        for outer in ("host", "disk") if self.shape.device != "cpu" else ("disk",):
            for ends in ("device", outer):
                # The more on the device, the less elsewhere: the most that the device takes is what may fit.
                most = self._most(count, "device", lambda k, o=outer, e=ends: self._homes(k, 0, o, o, e), size, inputs)
                if most is not None and self.fits(homes := self._homes(most, 0, outer, outer, ends), size, inputs):
                    yield homes
        yield from self._three_homes(size, inputs)

    def _three_homes(self, size: int, inputs: str) -> Iterator[dict[str, str]]:
        """Device and host memory together are too small: what does not fit there goes to the disk."""
        if self.shape.device == "cpu":
            return
        count = len(self.layers)
        if count <= DEFAULT_NUM_SLOTS:
            return
        # With some layers in host memory, so that the buffers of both homes count in full.
        few = DEFAULT_NUM_SLOTS
        on_device = self._most(
            count - few, "device", lambda k: self._homes(k, few, "host", "disk", "disk"), size, inputs
        )
        if on_device is None:
            return
        left = count - on_device
        in_host = self._most(left, "host", lambda k: self._homes(on_device, k, "host", "disk", "disk"), size, inputs)
        if in_host and self.fits(homes := self._homes(on_device, in_host, "host", "disk", "disk"), size, inputs):
            yield homes

    def _homes(self, on_device: int, then: int, second: str, third: str, ends: str) -> dict[str, str]:
        """The first layers on the device, so many more in the second home, the others in the third."""
        homes = dict.fromkeys(self.ends, ends)
        for number, name in enumerate(self.layers):
            homes[name] = "device" if number < on_device else second if number < on_device + then else third
        return {unit.name: homes[unit.name] for unit in self.shape.units}

    def _most(self, count: int, place: str, homes_with: Any, size: int, inputs: str) -> int | None:
        """The largest number with which one place is not over its limit; the memory there grows with it. None if not even 0 is."""
        limit = getattr(self.limits, place)

        def fits(number: int) -> bool:
            used = self.shape.footprint(homes_with(number), micro_batch_size=size, block_inputs=inputs).totals()
            return used[place] <= limit

        if not fits(0):
            return None
        low, high = 0, count
        while low < high:
            middle = (low + high + 1) // 2
            if fits(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def fits(self, homes: dict[str, str], size: int, inputs: str) -> bool:
        """Whether the limits are kept."""
        used = self.shape.footprint(homes, micro_batch_size=size, block_inputs=inputs).totals()
        return _fits(used, self.limits)


def _plan(shape: StepShape, homes: dict[str, str], size: int, inputs: str, limits: Limits, speeds: Speeds) -> Plan:
    footprint = shape.footprint(homes, micro_batch_size=size, block_inputs=inputs)
    return Plan(
        homes=tuple(homes.items()),
        micro_batch_size=size,
        block_inputs=inputs,
        keep_activations=shape.num_kept,
        footprint=footprint,
        time=step_time(shape, homes, inputs, speeds),
        limits=limits,
        speeds=speeds,
        tokens=shape.batch_size * shape.seq_len,
        copy_bytes=sum(footprint.disk.values()),
    )


def _nothing_fits(shape: StepShape, limits: Limits, weights: str, size: int, places: Sequence[str]) -> str:
    home = weights if weights != "auto" else "disk"
    totals = {place: shape.footprint(home, micro_batch_size=size, block_inputs=place).totals() for place in places}
    inputs = min(places, key=lambda place: _excess(totals[place], limits))
    used = totals[inputs]
    names = {"device": "memory" if shape.device == "cpu" else "device memory", "host": "host memory", "disk": "disk"}
    short = [
        f"{format_bytes(used[place])} of {names[place]} where {format_bytes(getattr(limits, place))} may be used"
        for place in HOMES
        if used[place] > getattr(limits, place)
    ]
    what = "even with all weights on disk" if weights == "auto" else f"with weights on {weights}"
    options = []
    without = dataclasses.replace(limits, disk=max(limits.disk, used["disk"]))  # as if there were disk enough
    if short and _fits(used, without):
        options.append(f"allow {format_bytes(used['disk'])} of disk")
    streams = weights != "auto" or limits.disk > 0
    if (smaller := _smaller_that_fits(shape, limits, home if streams else "device", inputs)) is not None:
        options.append(smaller)
    elif not streams and (smaller := _smaller_that_fits(shape, without, home, inputs)) is not None:
        options.append(f"{smaller} with {format_bytes(used['disk'])} of disk")
    hint = " or ".join(options) or "only a smaller model"
    return (
        f"no plan fits: {what} and micro-batches of {size}, a step takes {' and '.join(short)}; this would fit: {hint}"
    )


def _excess(used: dict[str, int], limits: Limits) -> int:
    return sum(max(0, used[place] - getattr(limits, place)) for place in HOMES)


def _fits(used: dict[str, int], limits: Limits) -> bool:
    return all(used[place] <= getattr(limits, place) for place in HOMES)


def _smaller_that_fits(shape: StepShape, limits: Limits, home: str, inputs: str) -> str | None:
    """A smaller batch, else shorter sequences, else both."""
    sizes: list[tuple[int, int]] = [(batch, shape.seq_len) for batch in micro_batches(shape.batch_size)[1:]]
    lengths = [shape.seq_len >> shift for shift in range(1, 12) if shape.seq_len >> shift >= 16]
    for batch, length in [*sizes, *((1, length) for length in lengths)]:
        smaller = shape.resized(batch_size=batch, seq_len=length)
        used = smaller.footprint(home, micro_batch_size=1, block_inputs=inputs).totals()
        if _fits(used, limits):
            shorter = "" if length == shape.seq_len else f" and sequences of {length}"
            return f"batches of {batch}{shorter}"
    return None
