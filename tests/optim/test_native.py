"""The C kernels for the CPU against their PyTorch twins, bit for bit."""

import pytest
import torch

from lowtide.optim.kernels import native
from lowtide.optim.rounding import read_compensated, round_compensated_, round_stochastic_

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C compiler (cc, gcc or clang)")

NUMEL = 3 * 2**15 + 77  # several chunks, and a rest that is no whole vector
KEY, START = -123456789, 4242 * 2 + 1


def numbers(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(NUMEL, generator=generator)
    found[::97] *= 1e-6
    found[5], found[6] = float("inf"), -0.0
    return found.to(dtype)


def twin(param, value, rounding, rest):
    if rounding == "nearest":
        param.copy_(value)
    elif rounding == "stochastic":
        round_stochastic_(param, value, KEY, START)
    else:
        round_compensated_(param, value, rest)


def same(one, two):
    nan = one.isnan()
    return torch.equal(nan, two.isnan()) and torch.equal(one[~nan].view(torch.int16), two[~nan].view(torch.int16))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"inv_scale": 0.25, "clip_value": 0.3, "coefficient": 0.7}], ids=["plain", "prepared"]
)
@pytest.mark.parametrize("cols", [37, 1030])
def test_lomo_for_some_rows_is_that_for_all_with_zeros_elsewhere(rounding, grad_dtype, options, cols, monkeypatch):
    monkeypatch.setattr(native, "_ONE_THREAD", 1)
    shape = (95, cols)
    fast, slow = (numbers(2)[: 95 * cols].reshape(shape).clone() for _ in range(2))
    fast[fast.isinf()] = slow[slow.isinf()] = 1.0
    rows = torch.tensor([0, 3, 4, 50, 94])
    whole = torch.zeros(shape, dtype=grad_dtype)
    whole[rows] = numbers(1, grad_dtype)[7 : 7 + 5 * cols].reshape(5, cols)
    rests = [None, None]
    if rounding == "compensated":
        rests = [torch.zeros(shape, dtype=torch.int16) for _ in range(2)]
    how = {"lr": 0.01, "rounding": rounding, "key": KEY, "start": START, **options}
    version = fast._version
    native.lomo_step(fast, whole[rows], rows=rows, compensation=rests[0], **how)
    native.lomo_step(slow, whole, compensation=rests[1], **how)
    assert fast._version > version
    assert same(fast, slow)
    assert rests[0] is None or torch.equal(*rests)
    native.lomo_step(fast, whole[:0], rows=rows[:0], compensation=rests[0], **how)
    assert same(fast, slow)
    with pytest.raises(IndexError, match="of a matrix that has 95"):
        native.lomo_step(fast, whole[rows], rows=rows + 1, compensation=rests[0], **how)
    assert same(fast, slow)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"inv_scale": 0.25, "clip_value": 0.3, "coefficient": 0.7}], ids=["plain", "prepared"]
)
def test_lomo(rounding, grad_dtype, options):
    grad = numbers(1, grad_dtype)
    grad[11] = float("nan")
    fast, slow = numbers(2), numbers(2)
    rests = [
        torch.randint(-(2**15), 2**15, (NUMEL,), generator=torch.Generator().manual_seed(3)).to(torch.int16)
        for _ in range(2)
    ]
    rest = rests if rounding == "compensated" else [None, None]
    version = fast._version
    native.lomo_step(
        fast, grad, lr=0.01, decay=0.99, rounding=rounding, key=KEY, start=START, compensation=rest[0], **options
    )
    assert fast._version > version, "autograd has to see that the weight has changed"
    value = slow.float() if rest[1] is None else read_compensated(slow, rest[1])
    used = grad.float() * options.get("inv_scale", 1.0)
    if "clip_value" in options:
        used = used.clamp(-options["clip_value"], options["clip_value"]) * options["coefficient"]
    value.mul_(0.99).add_(used, alpha=-0.01)
    twin(slow, value, rounding, rest[1])
    assert same(fast, slow)
    if rest[0] is not None:
        finite = slow.isfinite()
        assert torch.equal(rest[0][finite], rest[1][finite])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_adalomo_and_rounding_alone(rounding):
    grad = numbers(1)[: 3 * 50 * 101].view(3, 50, 101)
    fast, slow = (numbers(2)[: grad.numel()].clone().view(grad.shape) for _ in range(2))
    rests = [torch.zeros(grad.shape, dtype=torch.int16) if rounding == "compensated" else None for _ in range(2)]
    row, col = torch.rand(3, 50), torch.rand(3, 101)
    scale, decay = torch.tensor(0.02), torch.tensor(0.98)
    native.adalomo_step(
        fast, grad, row, col, scale, decay, rounding=rounding, key=KEY, start=START, compensation=rests[0]
    )
    value = slow.float() if rests[1] is None else read_compensated(slow, rests[1])
    value.mul_(decay).sub_((grad.float() * row.unsqueeze(2)).mul_(col.unsqueeze(1)).mul_(scale))
    alone = value.clone()
    twin(slow, value, rounding, rests[1])
    assert same(fast, slow)
    target, rest = torch.empty_like(slow), None if rests[1] is None else torch.zeros_like(rests[1])
    native.round_into(target, alone, rounding=rounding, key=KEY, start=START, compensation=rest)
    assert same(target, slow)


@pytest.mark.parametrize("start", [0, 1, 1023, 2**31 - 7, 2**32 - 3000])
@pytest.mark.parametrize("numel", [1, 2, 1023, 1024, 1025, 2999])
def test_noise_is_that_of_the_position_in_the_whole_tensor(start, numel):
    """Two elements share a number of the hash, and the noise is made for a tile at a time."""
    value = numbers(1, torch.float32)[:numel]
    found, wanted = (torch.empty(numel, dtype=torch.bfloat16) for _ in range(2))
    native.round_into(found, value, rounding="stochastic", key=KEY, start=start)
    round_stochastic_(wanted, value.clone(), KEY, start)
    assert same(found, wanted)


def test_norm_does_not_depend_on_threads():
    grad = numbers(1)
    grad[5] = 1.0
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.norm(grad))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2] == pytest.approx(grad.double().norm().item(), rel=1e-6)
    grad[7] = float("nan")
    assert native.norm(grad) != native.norm(grad)


def test_wrong_arguments_are_no_memory_errors():
    param = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        native.lomo_step(param, torch.zeros(7, dtype=torch.bfloat16), lr=0.1, rounding="nearest")
    with pytest.raises(AssertionError):
        native.lomo_step(param, param.clone(), lr=0.1, rounding="compensated", compensation=torch.zeros(8).half())


def test_a_damaged_file_in_the_cache_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWTIDE_CACHE", str(tmp_path))
    native._library.cache_clear()
    try:
        assert native.available()
        (made,) = (tmp_path / "kernels").glob("*.so")
        made.unlink()  # not written over: it is mapped
        made.write_bytes(b"no library")
        native._library.cache_clear()
        assert native.available()
    finally:
        monkeypatch.undo()
        native._library.cache_clear()


def test_without_a_compiler_there_are_none(monkeypatch):
    monkeypatch.setenv("LOWTIDE_NATIVE", "0")
    native._library.cache_clear()
    try:
        assert not native.available() and not native.takes(torch.zeros(4, dtype=torch.bfloat16))
    finally:
        monkeypatch.undo()
        native._library.cache_clear()
