import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.optim import rounding
from lowtide.optim.rounding import (
    compensation_like,
    mix_key,
    noise16,
    paired_slices,
    read_compensated,
    round_compensated_,
    round_stochastic_,
)

SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def rounded(value, dtype, key=1, offset=0):
    target = torch.empty(value.shape, dtype=dtype)
    round_stochastic_(target, value.clone(), key, offset)
    return target


def test_bfloat16_keeps_small_updates_on_average_and_nearest_loses_them():
    ends = {}
    for mode in ("stochastic", "nearest"):
        weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = lowtide.Lomo([weight], lr=1e-3, rounding=mode)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[mode] = weight.detach().float()
    assert torch.all(ends["nearest"] == 1.0)
    # One step rounds with a variance of at most (2^-8)^2 / 4, independently: 200 steps, then the mean over 4096 elements.
    standard_error = (200 * (2.0**-8) ** 2 / 4 / 4096) ** 0.5
    assert abs(ends["stochastic"].mean().item() - 0.8) < 5 * standard_error
    assert ends["stochastic"].std().item() < 2 * (200 * (2.0**-8) ** 2 / 4) ** 0.5


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("value", [1.0009765, -0.3337, 3e-6, -2.1e-7, 1234.567, 6.1e-5])
def test_unbiased(dtype, value):
    count = 2**16
    value = torch.full((count,), value, dtype=torch.float32)
    result = rounded(value, dtype).double()
    neighbours = result.unique()
    assert len(neighbours) <= 2
    gap = (neighbours.max() - neighbours.min()).item()
    assert abs(result.mean().item() - value[0].double().item()) <= 5 * gap / 2 / count**0.5


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_representable_values_and_specials_are_kept(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    value = every.float()
    for key in range(3):
        result = rounded(value, dtype, key)
        finite = value.isfinite()
        assert torch.equal(result[finite], every[finite])
        assert torch.equal(result.float()[value.isinf()], value[value.isinf()])
    assert rounded(torch.tensor([float("nan")]), dtype).isnan().all()


def test_float16_does_not_overflow_by_rounding_up():
    value = torch.full((1000,), 65503.9)
    assert rounded(value, torch.float16).isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.integers(1, 200), st.integers(-(2**31), 2**31 - 1))
def test_noise_does_not_depend_on_slices(numel, cut, key):
    cut = min(cut, numel)
    whole = noise16(numel, key, 0, torch.device("cpu"))
    parts = torch.cat([noise16(min(cut, numel - s), key, s, torch.device("cpu")) for s in range(0, numel, cut)])
    assert torch.equal(whole, parts)


def test_noise_is_uniform_and_differs_between_keys():
    noise = noise16(2**20, mix_key(0, 1, 2), 0, torch.device("cpu")).to(torch.int64) + 2**15
    counts = torch.bincount(noise >> 8, minlength=256).double()
    expected = 2**20 / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 150 < chi_squared < 380  # 255 degrees of freedom: 255 +- 23
    other = noise16(2**20, mix_key(0, 1, 3), 0, torch.device("cpu")).to(torch.int64) + 2**15
    assert abs(torch.corrcoef(torch.stack([noise.double(), other.double()]))[0, 1]) < 0.005
    assert abs(torch.corrcoef(torch.stack([noise[:-1].double(), noise[1:].double()]))[0, 1]) < 0.005
    assert len({mix_key(0, p, s) for p in range(100) for s in range(100)}) == 10_000


@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
def test_result_does_not_depend_on_slice_size_or_threads(rule, monkeypatch):
    start = torch.randn(37, 53).bfloat16()
    grad = torch.randn(37, 53).bfloat16()
    ends = []
    for numel, threads in ((2**18, 1), (106, 1), (530, 2)):
        monkeypatch.setattr(rounding, "CPU_SLICE_NUMEL", numel)
        torch.set_num_threads(threads)
        weight = torch.nn.Parameter(start.clone())
        optimizer = rule([weight], lr=0.1, rounding_seed=7)
        for _ in range(3):
            weight.grad = grad.clone()
            optimizer.step()
        ends.append(weight.detach().clone())
    torch.set_num_threads(1)
    if rule is lowtide.Lomo:
        assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    else:  # its sums over slices come in another order, so a few roundings may fall the other way
        assert (ends[0] != ends[1]).float().mean() < 0.01 and (ends[0] != ends[2]).float().mean() < 0.01


def test_paired_slices_cover_everything_once():
    for tensor in (torch.arange(60.0).view(5, 12), torch.arange(60.0).view(12, 5).t()):
        seen = torch.cat([piece.reshape(-1) for piece, _, _ in paired_slices(tensor, tensor, 7)])
        assert torch.equal(seen, tensor.reshape(-1))
        for piece, _, offset in paired_slices(tensor, tensor, 7):
            assert torch.equal(piece.reshape(-1), tensor.reshape(-1)[offset : offset + piece.numel()])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_compensated_keeps_the_value(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.logspace(-30, 30, 4000) if dtype == torch.bfloat16 else torch.logspace(-4, 4, 4000)
    value = torch.randn(4000, generator=generator) * exponents
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407E8000], dtype=torch.int32).view(torch.float32)
    value[:3] = ties  # exactly between two bfloat16 numbers
    target = torch.zeros(4000, dtype=dtype)
    rest = compensation_like(target)
    round_compensated_(target, value.clone(), rest)
    again = read_compensated(target, rest)
    if dtype == torch.bfloat16:
        assert torch.equal(again, value)  # the two halves of float32
    else:
        assert torch.allclose(again, value, rtol=2.0**-22, atol=2.0**-36)
    spacing = (value - value.to(dtype).float()).abs()
    assert ((target.float() - value).abs() <= spacing * 1.001 + 1e-30).all()  # and the weight itself is the nearest


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_compensated_passes_specials_on(dtype):
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(
        torch.float32
    )  # NaN with all kinds of mantissas
    value = torch.cat((bits, torch.tensor([float("inf"), -float("inf"), 0.0])))
    target = torch.zeros(6, dtype=dtype)
    rest = compensation_like(target)
    round_compensated_(target, value.clone(), rest)
    assert target[:3].isnan().all() and target[3:].tolist() == value[3:].tolist()
    assert not rest.to(torch.float32).isnan().any()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rule", ["lomo", "adalomo", "adamw"])
def test_a_thousand_tiny_updates_follow_float32_with_compensation(rule, dtype):
    """Each update is a hundredth of what the dtype can show; nearest rounding loses them all."""

    def run(weights_dtype, rounding=None):
        """(start, end, share of lost updates); start and gradients are numbers of the 16-bit dtype in any case."""
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter((torch.rand(16, 8, generator=generator) + 0.5).to(dtype).to(weights_dtype))
        options = {"lr": 1e-5, "weight_decay": 0.0, "rounding": rounding}
        if rule == "adamw":
            optimizer = lowtide.PerParameter(torch.optim.AdamW, [param], **options)
        else:
            optimizer = {"lomo": lowtide.Lomo, "adalomo": lowtide.AdaLomo}[rule]([param], **options)
        start = param.detach().float().clone()
        for _ in range(1000):
            param.grad = (torch.rand(16, 8, generator=generator) + 0.5).to(dtype).to(weights_dtype)
            optimizer.step()
        end = param.detach().float()
        if rounding == "compensated":
            end = read_compensated(param.detach(), optimizer.state[param]["compensation"])
        return start, end, optimizer.lost_updates.share()

    start, exact, _ = run(torch.float32)
    _, compensated, share = run(dtype, "compensated")
    _, nearest, lost = run(dtype, "nearest")
    assert torch.equal(start, nearest) and lost == 1.0 and share is None
    assert (start - exact).abs().min() > 1e-3
    if dtype == torch.bfloat16 and rule != "adalomo":  # whose rate follows the rounded weights
        assert torch.equal(compensated, exact)
    assert ((compensated - exact).abs() / (start - exact).abs()).max() < 1e-3


@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
def test_compensation_is_part_of_the_state(rule):
    def start():
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(6, 5).to(torch.bfloat16))
        return param, rule([param], lr=1e-3, rounding="compensated")

    def run(param, optimizer, steps):
        for step in steps:
            param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            optimizer.step()

    whole, first, second = start(), start(), start()
    run(*whole, range(20))
    run(*first, range(11))
    second[0].data.copy_(first[0].data)
    second[1].load_state_dict(first[1].state_dict())
    run(*second, range(11, 20))
    assert torch.equal(whole[0], second[0])
    rest, again = whole[1].state[whole[0]]["compensation"], second[1].state[second[0]]["compensation"]
    assert rest.dtype == again.dtype == torch.int16 and torch.equal(rest, again)


@pytest.mark.parametrize("lr, low, high", [(1e-6, 0.99, 1.0), (1.0, 0.0, 0.05)])
def test_share_of_lost_updates(lr, low, high):
    params = [torch.nn.Parameter(torch.randn(40, 40).to(torch.bfloat16)) for _ in range(40)]
    optimizer = lowtide.Lomo(params, lr=lr, rounding="nearest")
    assert optimizer.lost_updates.share() is None
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
            param.grad[0] = 0  # rows that got no gradient were not updated, so nothing of them is lost
        optimizer.step()
    assert low <= optimizer.lost_updates.share() <= high


def test_lost_updates_are_warned_of_once(caplog):
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-7, rounding="nearest")
    engine = lowtide.fuse(model, optimizer)
    for step in range(12):
        engine.backward(model(**tiny_batch(step)).loss)
        optimizer.step()
    assert engine.lost_update_share > 0.9
    assert caplog.text.count("updates are lost") == 1
    exact = tiny_model()
    engine = lowtide.fuse(exact, lowtide.Lomo(exact.parameters()))
    engine.backward(exact(**tiny_batch()).loss)
    assert engine.lost_update_share is None
