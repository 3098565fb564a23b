"""Sums of squares by row and column: kernel and PyTorch twin against sums in float64."""

import math

import pytest
import torch

from lowtide.optim import squares
from lowtide.optim.kernels import native
from lowtide.optim.prepare import Prepare

EPS = 1e-30
PREPARES = {
    "plain": None,
    "prepared": Prepare(inv_scale=0.25, clip_value=0.3, coefficient=0.7),
    "tensor": Prepare(coefficient=torch.tensor(0.5)),
}
SHAPES = {
    "matrix": (1, 150, 201),
    "one-column": (1, 70, 1),
    "one-row": (1, 1, 4097),
    "experts": (3, 64, 128),
    "convolution": (90, 3, 3),
}


@pytest.fixture(params=["kernel", "twin"])
def way(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(native, "available", lambda: False)
        monkeypatch.setattr(squares, "slice_numel", lambda device: 1000)
    elif not native.available():
        pytest.skip("needs a C compiler (cc, gcc or clang)")
    else:
        monkeypatch.setattr(native, "_ONE_THREAD", 1)
    return request.param


def gradient(shape, dtype):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found.view(-1)[::7] = 0.0
    return found.to(dtype)


def exact(grad, prepare):
    used = grad.double().clone()
    return used if prepare is None else prepare(used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prepare", PREPARES.values(), ids=PREPARES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums(way, shape, prepare, dtype):
    grad = gradient(shape, dtype)
    kept = grad.clone()
    square = exact(grad, prepare).square() + EPS
    by_row, by_column = squares.sums_by_row_and_column(grad, torch.float32, prepare, EPS)
    assert by_row.dtype == by_column.dtype == torch.float32
    torch.testing.assert_close(by_row.double(), square.sum(dim=2), rtol=3e-6, atol=0.0)
    torch.testing.assert_close(by_column.double(), square.sum(dim=1), rtol=3e-6, atol=0.0)
    weights = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(1)) + 0.1
    found = squares.weighted_sums_by_row(grad, weights, prepare)
    torch.testing.assert_close(
        found.double(), ((square - EPS) * weights.double().unsqueeze(1)).sum(dim=2), rtol=3e-6, atol=1e-28
    )
    found = squares.sum_of_squares(grad, torch.float32)
    torch.testing.assert_close(found.double(), grad.double().square().sum(), rtol=3e-6, atol=0.0)
    assert torch.equal(grad, kept)


def test_a_zero_gradient_leaves_eps(way):
    by_row, by_column = squares.sums_by_row_and_column(torch.zeros(2, 5, 70), torch.float32, None, EPS)
    torch.testing.assert_close(by_row, torch.full((2, 5), 70 * EPS), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(by_column, torch.full((2, 70), 5 * EPS), rtol=1e-5, atol=0.0)


def test_a_broken_step_has_a_gradient_of_zeros(way):
    prepare = Prepare(coefficient=torch.tensor(math.nan))
    by_row, _ = squares.sums_by_row_and_column(torch.ones(1, 4, 8), torch.float32, prepare, EPS)
    torch.testing.assert_close(by_row, torch.full((1, 4), 8 * EPS), rtol=1e-5, atol=0.0)
    assert squares.weighted_sums_by_row(torch.ones(1, 4, 8), torch.ones(1, 8), prepare).count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(way, bad):
    grad = torch.ones(1, 130, 70, dtype=torch.bfloat16)
    grad[0, 67, 3] = bad
    by_row, by_column = squares.sums_by_row_and_column(grad, torch.float32, None, EPS)
    assert by_row.isfinite().logical_not().nonzero().tolist() == [[0, 67]]
    assert by_column.isfinite().logical_not().nonzero().tolist() == [[0, 3]]
    assert not squares.sum_of_squares(grad, torch.float32).isfinite()


@pytest.mark.skipif(not native.available(), reason="needs a C compiler (cc, gcc or clang)")
def test_kernel_sums_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(native, "_ONE_THREAD", 1)
    grad, weights = gradient((1, 1000, 333), torch.bfloat16), torch.rand(1, 333)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((*native.sums_by_row_and_column(grad, EPS), native.weighted_sums_by_row(grad, weights)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.skipif(not native.available(), reason="needs a C compiler (cc, gcc or clang)")
def test_only_what_the_kernel_reads_is_given_to_it():
    grad = torch.ones(1, 6, 8)
    assert native.takes_squares(grad)
    assert not native.takes_squares(grad.transpose(1, 2))
    assert not native.takes_squares(grad.double())
    assert not native.takes_squares(grad.half())
    by_row, by_column = squares.sums_by_row_and_column(grad.transpose(1, 2), torch.float32, None, EPS)
    assert by_row.tolist() == [[6.0] * 8] and by_column.tolist() == [[8.0] * 6]
