import math
import random

import pytest

from lowtide.training.lr_curve import divergence, read_curve, sweep_rates

RATES = sweep_rates(1e-5, 1.0, 76)


def noisy_bowl(seed, lowest=1e-3, breaks_at=2e-2, start=8.0):
    """Falls to a twentieth at ``lowest``, rises from there, and is above the start from ``breaks_at`` on.

    A rate that hardly changes the weights hardly makes the loss scatter.
    """
    rng = random.Random(seed)
    losses = []
    for rate in RATES:
        below = math.log10(lowest / rate)
        loss = start * math.exp(-3 * max(0.0, 1 - below / 2)) if below > 0 else start * 0.05 * 10 ** (-below)
        loss = loss if rate < breaks_at else start * 2
        losses.append(loss * math.exp(rng.gauss(0, 0.5 * min(1.0, rate / 1e-4))))
    return losses


def test_rates_rise_by_one_factor():
    rates = sweep_rates(1e-3, 10.0, 5)
    assert rates == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 10.0])


@pytest.mark.parametrize("seed", range(10))
def test_noise_moves_the_recommendation_little(seed):
    reading = read_curve(RATES, noisy_bowl(seed), 8.0)
    assert reading.warnings == []
    assert 7e-4 <= reading.recommended <= 3e-3
    assert reading.recommended < reading.lr_diverged


def test_divergence_needs_three_of_five_or_a_number_that_is_none():
    assert divergence([1.0, 5.0, 1.0, 1.0, 5.0, 1.0], 2.0) is None
    assert divergence([1.0, 5.0, 1.0, 5.0, 5.0], 2.0) == 1
    assert divergence([1.0, 2.2, 2.2, 2.2], 2.0) is None
    assert divergence([1.0, float("nan"), 1.0], 2.0) == 1
    assert divergence([1.0, float("inf")], 2.0) == 1


def test_without_divergence_the_lowest_loss_counts_and_trust_ends():
    losses = [8.0 * min(1.0, (1e-3 / rate) ** 0.3) for rate in RATES]
    reading = read_curve(RATES, losses, 8.0)
    assert reading.lr_diverged is None
    assert reading.recommended == pytest.approx(reading.lr_lowest, rel=0.3)
    assert "never diverged up to 1" in reading.warnings[0]
    assert "still falling at the end" in reading.warnings[1]


@pytest.mark.parametrize("last", [2.0, 9.0])
def test_a_loss_that_never_falls_gets_no_recommendation(last):
    losses = [2.0] * 60 + [last] * 16
    reading = read_curve(RATES, losses, 2.0)
    assert reading.recommended is None
    (warning,) = reading.warnings
    assert "never fell" in warning
    assert ("diverged" in warning) == (last > 2.0)


def test_divergence_at_the_beginning_is_not_trusted():
    losses = [1.0, 0.5, 0.5, 0.5, 9.0, 9.0, 9.0]
    reading = read_curve(RATES[: len(losses)], losses, 1.0)
    assert reading.recommended is not None
    assert "close to where the range begins" in reading.warnings[0]


def test_a_perfect_loss_is_no_trouble():
    losses = [max(0.0, 1.0 - 0.05 * step) for step in range(76)]
    assert read_curve(RATES, losses, 1.0).recommended is not None


@pytest.mark.parametrize("losses", [[float("nan")], [0.9, float("inf")]])
def test_few_points(losses):
    reading = read_curve(RATES[: len(losses)], losses, 1.0)
    assert len(reading.smoothed) == len(losses)
    assert reading.lr_diverged == RATES[len(losses) - 1]
