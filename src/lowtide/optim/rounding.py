"""Rounding a float32 result into 16-bit weights, and slicing tensors so that float32 temporaries stay small.

Round-to-nearest loses every update smaller than half the distance between neighbouring 16-bit numbers: 200 steps of 1e-3
down from 1.0 in bfloat16 stay at 1.0. Stochastic rounding goes up or down with a probability proportional to the
distance, so the expected value is exact (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).
Compensated rounding (Kahan 1965) loses nothing at all: what was rounded away is kept in 2 more bytes a parameter and
added again before the next update. For bfloat16 these bytes are the lower half of the float32 number, so the two
together are float32 weights, exactly.

The noise is a counter-based hash of (key, position in the tensor), not a stateful generator: it does not depend on the
slice size, the number of threads or the device, and nothing has to be stored to continue a run bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "compensated")

# Elements per slice. A float32 slice is 1 MiB on a CPU, which stays in the cache of one core; a GPU wants longer
# kernels, so there it is 64 MiB. Even, because one hash serves two elements.
CPU_SLICE_NUMEL = 2**18
GPU_SLICE_NUMEL = 2**24

COMPENSATION_SCALE_FLOAT16 = 4096.0  # half the spacing of the largest numbers, 16, becomes float16's largest

_MAX_FLOAT16 = 65504.0
_MIN_NORMAL_FLOAT16 = 2.0**-14
_SUBNORMAL_STEP_FLOAT16 = 2.0**-24


def slice_numel(device: torch.device) -> int:
    """How many elements of a tensor on ``device`` are converted to float32 at a time."""
    return CPU_SLICE_NUMEL if device.type == "cpu" else GPU_SLICE_NUMEL


def paired_slices(param: Tensor, grad: Tensor, numel: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut a parameter and its gradient into matching views of at most ``numel`` elements.

    Contiguous tensors are cut as flat vectors; others (channels-last convolutions, transposed views) along their first
    dimension, so that there a slice is at least one row.

    Yields:
        (slice of the parameter, slice of the gradient, index of the first element in the flattened parameter).
    """
    if param.numel() <= numel:
        yield param, grad, 0
        return
    if param.is_contiguous() and grad.is_contiguous():
        flat_param, flat_grad = param.view(-1), grad.view(-1)
        for start in range(0, param.numel(), numel):
            yield flat_param[start : start + numel], flat_grad[start : start + numel], start
        return
    row_numel = param.numel() // param.shape[0]
    rows = max(1, numel // row_numel)
    for row in range(0, param.shape[0], rows):
        yield param[row : row + rows], grad[row : row + rows], row * row_numel


def mix_key(*parts: int) -> int:
    """Hash integers (seed, parameter number, step) into one signed 32-bit key."""
    state = 0x9E3779B9
    for part in parts:
        state = _mix32((state ^ (part & 0xFFFFFFFF)) * 0x85EBCA6B + 0xC2B2AE35)
    return state - 2**32 if state >= 2**31 else state


def _mix32(x: int) -> int:
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _xor_shift_right(x: Tensor, bits: int) -> None:
    # Tensors have no unsigned shift: shift with sign, then clear the copies of the sign bit.
    shifted = torch.bitwise_right_shift(x, bits).bitwise_and_((1 << (32 - bits)) - 1)
    x.bitwise_xor_(shifted)


def _hash_(x: Tensor, key: int) -> None:
    x.mul_(-1640531527).bitwise_xor_(key)  # 2^32 / golden ratio, as a signed number
    for shift, factor in ((16, 0x7FEB352D), (15, -2073254261)):  # the multipliers of the "lowbias32" finaliser
        _xor_shift_right(x, shift)
        x.mul_(factor)
    _xor_shift_right(x, 16)


def noise16(numel: int, key: int, offset: int, device: torch.device) -> Tensor:
    """Uniform 16-bit noise for the elements ``offset`` to ``offset + numel`` of a tensor.

    Args:
        numel: how many elements.
        key: signed 32-bit key of this tensor and step, see :func:`mix_key`.
        offset: position of the first element in the flattened tensor.
        device: where the noise is made.

    Returns:
        int16 [numel], uniform over all 65,536 values.
    """
    first, last = offset // 2, (offset + numel + 1) // 2
    x = torch.arange(first, last, dtype=torch.int32, device=device)
    _hash_(x, key)
    start = offset - 2 * first
    return x.view(torch.int16)[start : start + numel]


def noise16_of_rows(rows: Tensor, num_columns: int, key: int, offset: int, numel: int) -> Tensor:
    """The same noise for elements of some rows of a matrix.

    Args:
        rows: int64 [r], which rows of the matrix; they are looked at as one vector of r * num_columns elements.
        num_columns: of the matrix.
        key: as for :func:`noise16`.
        offset: first element of the vector.
        numel: how many elements.

    Returns:
        int16 [numel].
    """
    place = torch.arange(offset, offset + numel, device=rows.device)
    position = rows[place // num_columns] * num_columns + place % num_columns
    x = (position >> 1).to(torch.int32)
    _hash_(x, key)
    low, high = x.view(torch.int16).view(-1, 2).unbind(1)
    return torch.where(position & 1 == 1, high, low)


def round_stochastic_(target: Tensor, value: Tensor, key: int, offset: int = 0) -> None:
    """Write float32 ``value`` into 16-bit ``target``, rounding up or down at random without bias. Destroys ``value``.

    A value that the target can represent is kept exactly, and NaN and infinity stay what they are.

    Args:
        target: bfloat16 or float16, any shape; written in place.
        value: float32, same shape.
        key: signed 32-bit key of this tensor and step, see :func:`mix_key`.
        offset: position of the first element in the flattened tensor that this is a slice of.
    """
    round_with_noise_(target, value, noise16(value.numel(), key, offset, value.device).view(value.shape))


def round_with_noise_(target: Tensor, value: Tensor, noise: Tensor) -> None:
    """:func:`round_stochastic_` with this noise, int16 of the same shape."""
    if target.dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: add a random lower half (noise + 32768 is uniform in 0..65535), then
        # cut the lower half off. A carry moves the upper half to the next number away from zero.
        _make_nan_canonical_(value)
        value.view(torch.int32).add_(noise).add_(32768).bitwise_and_(-65536)
        target.copy_(value)
    else:
        target.copy_(_stochastic_float16(value, noise))


def _make_nan_canonical_(value: Tensor) -> None:
    """Give every NaN torch's own bits: one with a full mantissa, such as a GPU's, would carry over into a zero.

    Filling costs as much as all the rest, so on a CPU a sum tells first whether it is needed.
    """
    if not (value.is_cpu and math.isfinite(value.sum().item())):
        value.masked_fill_(value.isnan(), torch.nan)


def _stochastic_float16(value: Tensor, noise: Tensor) -> Tensor:
    magnitude = value.abs()
    bits = value.view(torch.int32)
    normal = ((bits + (noise & 0x1FFF)) & ~0x1FFF).view(torch.float32)  # float16 keeps 10 of float32's 23 mantissa bits
    steps = value / _SUBNORMAL_STEP_FLOAT16
    below = steps.floor()
    chance = (noise.to(torch.float32) + 32768.0) / 65536.0
    subnormal = (below + (steps - below > chance)) * _SUBNORMAL_STEP_FLOAT16
    rounded = torch.where(magnitude < _MIN_NORMAL_FLOAT16, subnormal, normal).clamp_(-_MAX_FLOAT16, _MAX_FLOAT16)
    return torch.where(magnitude <= _MAX_FLOAT16, rounded, value)  # infinities and NaN are passed on, not hidden


def compensation_like(param: Tensor) -> Tensor:
    """The state of compensated rounding for a 16-bit parameter whose value is what it holds now: zeros, contiguous.

    Returns:
        int16 for bfloat16 (the lower half of the float32 number, seen as signed), float16 for float16 (4096 times the
        rounding error, so that small errors do not become subnormal).
    """
    dtype = torch.int16 if param.dtype == torch.bfloat16 else torch.float16
    return torch.zeros(param.shape, dtype=dtype, device=param.device)


def read_compensated(param: Tensor, compensation: Tensor) -> Tensor:
    """The float32 value of a 16-bit parameter and its compensation, which have the same shape."""
    if param.dtype == torch.bfloat16:
        value = param.to(torch.float32)
        value.view(torch.int32).add_(compensation)
        return value
    return param.to(torch.float32).add_(compensation, alpha=1.0 / COMPENSATION_SCALE_FLOAT16)


def round_compensated_(target: Tensor, value: Tensor, compensation: Tensor) -> None:
    """Write float32 ``value`` into 16-bit ``target`` and what was rounded away into ``compensation``. Destroys ``value``.

    Args:
        target: bfloat16 or float16, any shape; written in place.
        value: float32, same shape.
        compensation: as from :func:`compensation_like`, same shape; written in place.
    """
    if target.dtype == torch.float16:
        target.copy_(value)
        rest = (
            value.sub_(target).mul_(COMPENSATION_SCALE_FLOAT16).nan_to_num_(0.0, 0.0, 0.0)
        )  # infinity minus infinity is none
        compensation.copy_(rest.clamp_(-_MAX_FLOAT16, _MAX_FLOAT16))
        return
    # The upper half is rounded half away from zero, so that the signed rest always fits 16 bits.
    _make_nan_canonical_(value)
    bits = value.view(torch.int32)
    compensation.copy_(bits)  # keeps the lower 16 bits
    target.copy_(bits.sub_(compensation).view(torch.float32))
