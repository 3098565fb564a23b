import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowtide.training import make_schedule

NAMES = ("linear", "cosine", "constant")


def test_linear_with_warm_up_step_by_step():
    factor = make_schedule("linear", 10, warmup_ratio=0.2)
    assert [factor(step) for step in range(10)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_cosine_is_half_a_wave():
    factor = make_schedule("cosine", 4)
    assert [factor(step) for step in range(5)] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0.1464466, 0])


def test_constant_stays_after_the_warm_up():
    factor = make_schedule("constant", 8, warmup_ratio=0.25)
    assert [factor(step) for step in range(8)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])


@given(st.sampled_from(NAMES), st.integers(1, 300), st.floats(0, 0.99))
def test_no_step_is_wasted_and_the_peak_is_reached(name, num_steps, warmup_ratio):
    factor = make_schedule(name, num_steps, warmup_ratio)
    factors = [factor(step) for step in range(num_steps)]
    assert all(0 < value <= 1 for value in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_beyond_the_end_it_stays_at_zero(name):
    assert make_schedule(name, 5)(50) == pytest.approx(0)


def test_works_in_lambda_lr():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule("linear", 4))
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize("arguments", [("linaer", 5, 0.0), ("linear", 0, 0.0), ("linear", 5, 1.0), ("linear", 5, -0.1)])
def test_refuses(arguments):
    with pytest.raises(ValueError):
        make_schedule(*arguments)
