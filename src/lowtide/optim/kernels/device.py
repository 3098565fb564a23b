"""What the kernels share: reading a 16-bit weight as float32, and writing float32 into it, bit for bit like the twins.

bfloat16 is taken apart by hand (it is the upper half of float32), because that gives the same bits on every card and in
Triton's interpreter. Positions are 64-bit, so tensors of more than 2^31 elements work.

Shapes of arguments are examples: a block of 1024 elements, of a weight [4096, 1024] seen as [4194304].
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton lets a kernel use global numbers only if they are marked like this.
_NAN_BFLOAT16 = tl.constexpr(0x7FC0)
_MAX_FLOAT16 = tl.constexpr(65504.0)
_MIN_NORMAL_FLOAT16 = tl.constexpr(2.0**-14)
_SUBNORMAL_STEP_FLOAT16 = tl.constexpr(2.0**-24)
_COMPENSATION_SCALE_FLOAT16 = tl.constexpr(4096.0)
_SUBNORMAL_STEPS_FLOAT16 = tl.constexpr(2.0**24)  # in 1.0


@triton.jit
def as_float32(
    x,  # bfloat16, float16 or float32 [1024]
):
    """The same numbers in float32; exact."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - Triton compiles only one of two branches, but not what follows a return
        return x.to(tl.float32)


@triton.jit
def nearest_bfloat16(
    value,  # float32 [1024]
):
    """Round to nearest, ties to even; returns bfloat16 [1024]."""
    bits = value.to(tl.int32, bitcast=True)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, upper, _NAN_BFLOAT16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def noise16(
    position,  # int64 [1024], in the flattened tensor; taken modulo 2^33, as the twin does
    key,  # int32 scalar
):
    """Noise of the twin of this name, as int32 [1024] whose lower 16 bits are random and whose upper ones are zero."""
    x = (position >> 1).to(tl.uint32) * 0x9E3779B9
    x = x ^ key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    # One hash serves two elements, the lower half first.
    return tl.where((position & 1) == 0, x & 0xFFFF, x >> 16).to(tl.int32)


@triton.jit
def stochastic_bfloat16(
    value,  # float32 [1024]
    noise,  # int32 [1024], 0 to 65535
):
    """Add a random lower half, then cut the lower half off; returns bfloat16 [1024]."""
    upper = (value.to(tl.int32, bitcast=True) + (noise ^ 0x8000)) >> 16
    # A card's own NaN has a full mantissa, which the noise would carry over into a zero.
    return tl.where(value == value, upper, _NAN_BFLOAT16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stochastic_float16(
    value,  # float32 [1024]
    noise,  # int32 [1024], 0 to 65535
):
    """Float16 has its own exponents, subnormal numbers in fixed steps and a largest number; returns float16 [1024]."""
    magnitude = tl.abs(value)
    normal = ((value.to(tl.int32, bitcast=True) + (noise & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True)
    steps = value * _SUBNORMAL_STEPS_FLOAT16
    below = tl.floor(steps)
    chance = (noise ^ 0x8000).to(tl.float32) * (1.0 / 65536.0)
    subnormal = (below + tl.where(steps - below > chance, 1.0, 0.0)) * _SUBNORMAL_STEP_FLOAT16
    rounded = tl.where(magnitude < _MIN_NORMAL_FLOAT16, subnormal, normal)
    rounded = tl.where(rounded > _MAX_FLOAT16, _MAX_FLOAT16, rounded)
    rounded = tl.where(rounded < -_MAX_FLOAT16, -_MAX_FLOAT16, rounded)
    return tl.where(magnitude <= _MAX_FLOAT16, rounded, value).to(tl.float16)  # infinities and NaN are passed on


@triton.jit
def prepared(
    grad,  # bfloat16, float16 or float32 [1024]
    inv_scale,  # float32 scalar
    clip_value,  # float32 scalar, infinity for none
    coefficient,  # float32 scalar
):
    """The gradient unscaled and clipped, float32 [1024]. The factors may be 1.0, which changes no bit."""
    grad = as_float32(grad) * inv_scale
    grad = tl.where(grad > clip_value, clip_value, grad)  # not minimum and maximum: NaN must pass
    grad = tl.where(grad < -clip_value, -clip_value, grad)
    return grad * coefficient


@triton.jit
def read(
    param_ptr,  # bfloat16 or float16 [4194304]
    compensation_ptr,  # int16 or float16 [4194304], or None
    position,  # int64 [1024]
    mask,  # bool [1024]
    ROUNDING: tl.constexpr,
):
    """Value of a block of the weight in float32 [1024], what was rounded away before included."""
    value = as_float32(tl.load(param_ptr + position, mask=mask))
    if ROUNDING == "compensated":
        rest = tl.load(compensation_ptr + position, mask=mask)
        if rest.dtype == tl.int16:
            value = (value.to(tl.int32, bitcast=True) + rest.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            value = value + rest.to(tl.float32) * (1.0 / _COMPENSATION_SCALE_FLOAT16)
    return value


@triton.jit
def write(
    param_ptr,  # bfloat16 or float16 [4194304]
    compensation_ptr,  # int16 or float16 [4194304], or None
    position,  # int64 [1024]
    mask,  # bool [1024]
    value,  # float32 [1024]
    key,  # int32 scalar
    start,  # place of the first element in the whole weight, of which a rank may have a part
    ROUNDING: tl.constexpr,
):
    """Round a block into the weight, and store what was rounded away if the rounding keeps it."""
    place = position + start
    if param_ptr.dtype.element_ty == tl.bfloat16:
        if ROUNDING == "compensated":
            # Half away from zero, so that the signed rest always fits 16 bits.
            bits = tl.where(value == value, value.to(tl.int32, bitcast=True), _NAN_BFLOAT16 << 16)
            upper = (bits + 0x8000) >> 16
            tl.store(compensation_ptr + position, (bits - (upper << 16)).to(tl.int16), mask=mask)
            result = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
        elif ROUNDING == "stochastic":
            result = stochastic_bfloat16(value, noise16(place, key))
        else:
            result = nearest_bfloat16(value)
    else:
        result = stochastic_float16(value, noise16(place, key)) if ROUNDING == "stochastic" else value.to(tl.float16)
        if ROUNDING == "compensated":
            rest = (value - result.to(tl.float32)) * _COMPENSATION_SCALE_FLOAT16
            rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # infinity minus infinity is no error to keep
            rest = tl.where(rest > _MAX_FLOAT16, _MAX_FLOAT16, rest)
            rest = tl.where(rest < -_MAX_FLOAT16, -_MAX_FLOAT16, rest)
            tl.store(compensation_ptr + position, rest.to(tl.float16), mask=mask)
    tl.store(param_ptr + position, result, mask=mask)
