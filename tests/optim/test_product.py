"""Products by tiles (AMX) that are applied while they are made, against torch's products and the kernels for whole gradients."""

import math

import pytest
import torch

from lowtide.optim.kernels import native, product
from lowtide.optim.kernels.product import TiledProduct

pytestmark = pytest.mark.skipif(not product.allowed(), reason="needs a processor with AMX, and a C compiler")

# [T, O, I]: tokens that fill no tile, parts that end early, rows for one thread only, blocks of a part of the columns
SHAPES = [
    (1, 32, 32),
    (31, 64, 96),
    (32, 96, 288),
    (33, 320, 544),
    (1000, 256, 2048),
    (1024, 1600, 320),
    (1500, 96, 256),
    (2048, 64, 320),
]
KEY, START = -123456789, 4242 * 2


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(product, "_FEWEST", 1)
    scratch.given.clear()
    yield
    assert all((behind == 0x7F).all() for behind in scratch.given)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Scratch:
    """Memory with something in it, so that what is not written shows, and with something behind it that must stay."""

    def __init__(self):
        self.given = []

    def __call__(self, num_bytes):
        whole = torch.full((num_bytes + 4096,), 0x7F, dtype=torch.uint8)
        self.given.append(whole[num_bytes:])
        return whole[:num_bytes]


scratch = Scratch()


def factors(tokens, rows, cols):
    generator = torch.Generator().manual_seed(tokens)
    left = torch.randn(tokens, rows, generator=generator) * 0.01
    return left.bfloat16(), torch.randn(tokens, cols, generator=generator).bfloat16()


def weight(rows, cols):
    """[rows, cols] with numbers on all sides that must stay."""
    whole = torch.randn((rows + 2) * cols, generator=torch.Generator().manual_seed(9)).bfloat16()
    return whole, whole[cols:-cols].view(rows, cols)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_torchs(shape, threads):
    left, right = factors(*shape)
    exact = left.double().t() @ right.double()
    whole, out = weight(*shape[1:])
    before = whole.clone()
    found = TiledProduct.of(left, right, scratch)
    assert found is not None and found.shape == out.shape
    norm = found.into(out)
    # bfloat16 has 8 bits; sums in float32 lose little where terms cancel.
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + exact.abs().max() * 1e-5).all()
    assert norm == pytest.approx(out.double().norm().item(), rel=1e-5)
    cols = shape[2]
    assert torch.equal(whole[:cols], before[:cols]) and torch.equal(whole[-cols:], before[-cols:])
    torchs = torch.mm(left.t(), right)
    assert (out != torchs).float().mean() < 0.01


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_has_the_bits_of_the_kernel_for_gradients(shape, rounding, threads):
    left, right = factors(*shape)
    rows, cols = shape[1:]
    whole, fast = weight(rows, cols)
    fast[0, 3], fast[-1, -1], fast[1, 0] = math.nan, math.inf, -0.0
    slow, before = fast.clone(), whole.clone()
    rest = [None, None]
    if rounding == "compensated":
        made = torch.randint(-(2**15), 2**15, (rows, cols), generator=torch.Generator().manual_seed(3)).to(torch.int16)
        rest = [made.clone(), made.clone()]
    options = {"lr": 0.3, "decay": 0.99, "rounding": rounding, "key": KEY, "start": START}
    grad, version = torch.empty(rows, cols, dtype=torch.bfloat16), fast._version
    assert TiledProduct.of(left, right, scratch).into(grad) == TiledProduct.of(left, right, scratch).norm()
    norm = TiledProduct.of(left, right, scratch).lomo_step(fast, compensation=rest[0], **options)
    assert fast._version > version, "autograd has to see that the weight has changed"
    native.lomo_step(slow, grad, compensation=rest[1], **options)
    assert torch.equal(fast.view(torch.int16), slow.view(torch.int16))
    assert rest[0] is None or torch.equal(*rest)
    assert torch.equal(whole[:cols], before[:cols]) and torch.equal(whole[-cols:], before[-cols:])
    assert not torch.equal(fast.view(torch.int16), before[cols:-cols].view(rows, cols).view(torch.int16))
    assert TiledProduct.of(left, right, scratch).norm() == norm


def test_some_elements():
    left, right = factors(70, 96, 64)
    places = (slice(0, 96, 6), slice(0, 60, 4))
    torch.testing.assert_close(
        TiledProduct.of(left, right, scratch).at(*places), (left.float().t() @ right.float())[places]
    )


def test_the_number_of_threads_changes_nothing():
    left, right = factors(100, 1600, 544)
    found, before = [], torch.get_num_threads()
    for number in (1, 2, 3, 5):
        torch.set_num_threads(number)
        out = torch.empty(1600, 544, dtype=torch.bfloat16)
        found.append((TiledProduct.of(left, right, scratch).into(out), out))
    torch.set_num_threads(before)
    assert all(norm == found[0][0] and torch.equal(out, found[0][1]) for norm, out in found)


def test_factors_that_are_parts_of_matrices(threads):
    left, right = factors(70, 200, 300)
    left, right = left[:, 8:136], right[:, 40:264]
    out = torch.empty(128, 224, dtype=torch.bfloat16)
    TiledProduct.of(left, right, scratch).into(out)
    copied = torch.empty_like(out)
    TiledProduct.of(left.contiguous(), right.contiguous(), scratch).into(copied)
    assert torch.equal(out, copied)
    torch.testing.assert_close(out, torch.mm(left.t(), right), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("which", [0, 1])
def test_what_may_not_be_finite_is_left_to_torch(value, which):
    for place in [(0, 0), (40, 70), (69, 95)]:
        both = factors(70, 96, 96)
        both[which][place] = value
        assert TiledProduct.of(*both, scratch) is None


def test_what_it_does_not_take(monkeypatch):
    left, right = factors(70, 96, 64)
    assert TiledProduct.of(left, right, scratch) is not None
    assert TiledProduct.of(left[:, :95], right, scratch) is None
    assert TiledProduct.of(left, right[:, :40], scratch) is None
    assert TiledProduct.of(left.float(), right.float(), scratch) is None
    assert TiledProduct.of(left.half(), right.half(), scratch) is None
    assert TiledProduct.of(left[:, ::3], right, scratch) is None
    assert TiledProduct.of(left[:0], right[:0], scratch) is None
    assert TiledProduct.of(left.expand(70, 96), torch.nn.Parameter(right), scratch) is None
    many = product._MOST_TOKENS + 1
    assert TiledProduct.of(left[:1].repeat(many, 1), right[:1].repeat(many, 1), scratch) is None
    monkeypatch.setattr(product, "_FEWEST", 96 * 64 + 1)
    assert TiledProduct.of(left, right, scratch) is None
    monkeypatch.setattr(product, "_FEWEST", 96 * 64)
    assert TiledProduct.of(left, right, scratch) is not None
    monkeypatch.setattr(product, "allowed", lambda: False)
    assert TiledProduct.of(left, right, scratch) is None
