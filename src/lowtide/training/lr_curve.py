"""What a learning-rate range test says: pure arithmetic on its curve, the loss after each step against the step's rate.

Smith 2017 (arXiv 1506.01186, section 3.3) reads two marks off such a curve: where the loss begins to fall, and where it
becomes ragged or rises. Fine-tuning blurs the first, because the loss of an answer's format falls at almost any rate,
and the steepest slope, a popular third mark, then lies far too low. Two marks hold still under noise, and they are
estimates of the same thing made from different parts of the curve:

- the rate where the smoothed loss is lowest. There a step's progress just makes up for the noise that it adds;
- a tenth of the rate from which on the loss stays above where it began.

The recommendation is their geometric mean. The loss is smoothed as a logarithm, since a single step of a noisy stretch
can be ten times as bad as its neighbours, by a Gaussian in the logarithm of the rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# Standard deviation of the smoothing, in factors of ten of the rate.
_SMOOTHING_DECADES = 0.15
# The loss has diverged when so many of the last so many steps are above the limit.
_ABOVE, _OF_LAST = 3, 5
_SAFETY = 10.0
# A smaller share of the first loss than this is no fall.
_LEAST_FALL = 0.005
# Marks closer to an end of the range than this factor lie outside it, for all one knows.
_EDGE = 2.0
_ROUND = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a curve says.

    Attributes:
        recommended: the highest rate of a schedule to train with, rounded; None if the loss never fell.
        lr_lowest: rate at which the smoothed loss is lowest.
        lr_diverged: rate from which on the loss stayed above the first one; None if that did not happen.
        smoothed: the smoothed loss at every rate; not-a-number where the loss is not finite.
        warnings: why the recommendation deserves no trust, in sentences for people; empty if it does.
    """

    recommended: float | None
    lr_lowest: float
    lr_diverged: float | None
    smoothed: list[float]
    warnings: list[str]


def sweep_rates(start: float, end: float, num_steps: int) -> list[float]:
    """Rates from ``start`` to ``end``, each the same factor above the one before."""
    return [start * (end / start) ** (step / (num_steps - 1)) for step in range(num_steps)]


def divergence(losses: Sequence[float], loss_before: float) -> int | None:
    """The index of the step from which on the loss is lost, or None.

    That is the first of three steps, out of five in a row, that end above ``loss_before`` by more than a tenth, or
    a step whose loss is not finite.
    """
    limit = 1.1 * loss_before + 0.1
    for last, loss in enumerate(losses):
        if not math.isfinite(loss):
            return last
        above = [index for index in range(max(0, last - _OF_LAST + 1), last + 1) if losses[index] > limit]
        if len(above) >= _ABOVE:
            return above[0]
    return None


def read_curve(rates: Sequence[float], losses: Sequence[float], loss_before: float) -> Reading:
    """Recommend a rate.

    Args:
        rates: learning rate of each step, rising.
        losses: loss after each step, on the same sequences every time, in nats per counted token.
        loss_before: the same loss before the first step; above 0 and finite.
    """
    smoothed = _smooth(rates, losses, loss_before)
    known = [index for index, loss in enumerate(smoothed) if math.isfinite(loss)]
    lowest = min(known, key=smoothed.__getitem__, default=0)
    diverged = divergence(losses, loss_before)
    lr_lowest, lr_diverged = rates[lowest], None if diverged is None else rates[diverged]
    if not known or smoothed[lowest] > (1 - _LEAST_FALL) * loss_before:
        return Reading(None, lr_lowest, lr_diverged, smoothed, [_never_fell(rates[0], rates[-1], lr_diverged)])
    recommended = lr_lowest if lr_diverged is None else math.sqrt(lr_lowest * lr_diverged / _SAFETY)
    warnings = _warnings(rates, lr_lowest, lr_diverged)
    return Reading(_rounded(recommended), lr_lowest, lr_diverged, smoothed, warnings)


def _smooth(rates: Sequence[float], losses: Sequence[float], loss_before: float) -> list[float]:
    # Below a hundredth of the first loss everything is learnt, and ratios mean nothing.
    floor = 0.01 * loss_before
    points = [
        (math.log10(rate), math.log(loss + floor))
        for rate, loss in zip(rates, losses, strict=True)
        if math.isfinite(loss)
    ]
    smoothed = []
    for rate, loss in zip(rates, losses, strict=True):
        if not math.isfinite(loss):
            smoothed.append(math.nan)
            continue
        at = math.log10(rate)
        weights = [math.exp(-0.5 * ((x - at) / _SMOOTHING_DECADES) ** 2) for x, _ in points]
        mean = sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) / sum(weights)
        smoothed.append(math.exp(mean) - floor)
    return smoothed


def _warnings(rates: Sequence[float], lr_lowest: float, lr_diverged: float | None) -> list[str]:
    warnings = []
    if lr_diverged is None:
        warnings.append(
            f"the loss never diverged up to {rates[-1]:.2g}, so the rate rests on where it was lowest ({lr_lowest:.2g}) "
            "alone; a higher one may work as well"
        )
    if lr_lowest >= rates[-1] / _EDGE and lr_diverged is None:
        warnings.append(f"the loss was still falling at the end of the range ({rates[-1]:.2g})")
    if lr_diverged is not None and lr_diverged <= rates[0] * _SAFETY:
        warnings.append(
            f"the loss diverged at {lr_diverged:.2g}, close to where the range begins ({rates[0]:.2g}); look at the data, "
            "or use clip_grad_norm"
        )
    return warnings


def _never_fell(start: float, end: float, lr_diverged: float | None) -> str:
    if lr_diverged is None:
        return (
            f"the loss never fell at any rate from {start:.2g} to {end:.2g}: the model may know this data already, or "
            "the data has nothing to learn in it"
        )
    return (
        f"the loss never fell before it diverged at {lr_diverged:.2g}: the model may know this data already, or the "
        "batches are too small and too different"
    )


def _rounded(rate: float) -> float:
    """The nearest of 1, 1.5, 2, 3, 5, 7 times a power of ten, by ratio: more digits would promise too much."""
    power = 10.0 ** math.floor(math.log10(rate))
    digit = min(_ROUND, key=lambda digit: abs(math.log(digit * power / rate)))
    return float(f"{digit * power:.2g}")
