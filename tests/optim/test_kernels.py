"""Each kernel against its plain PyTorch twin: on the card if there is one, else in Triton's interpreter (conftest.py)."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowtide
from lowtide.optim import kernels
from lowtide.optim.prepare import Prepare
from lowtide.optim.rounding import mix_key, noise16, read_compensated, round_compensated_, round_stochastic_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
ROUNDINGS = ["nearest", "stochastic", "compensated"]
KEY = mix_key(0, 3, 1)
NAN = float("nan")

# Share of elements that may end at the neighbouring number. The arithmetic is the same, so none should; a compiler for
# another card may still contract a product and a sum.
OFF_BY_ONE = {"cpu": 0.0, "cuda": 1e-3}

# numpy's remarks in the interpreter: inf - inf, numbers too large for float16.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

needs_kernels = pytest.mark.skipif(
    not kernels.available(DEVICE),
    reason="needs triton (Linux: pip install -e '.[dev]') and a CUDA device, or TRITON_INTERPRET=1 for its interpreter",
)


def compensation_of(param):
    """A compensation such as earlier steps leave behind."""
    if param.dtype == torch.bfloat16:
        return torch.randint(-(2**15), 2**15, param.shape, device=DEVICE).to(torch.int16)
    return (param.float() * torch.randn(param.shape, device=DEVICE)).half()


def read(param, compensation):
    return param.float() if compensation is None else read_compensated(param, compensation)


def write(param, value, rounding, compensation):
    value = value.clone()  # the twins destroy it
    if rounding == "nearest":
        param.copy_(value)
    elif rounding == "stochastic":
        round_stochastic_(param, value, KEY)
    else:
        round_compensated_(param, value, compensation)


def prepared(grad, inv_scale, clip_value, coefficient):
    grad = grad.float() * inv_scale
    if clip_value is not None:
        grad = grad.clamp(-clip_value, clip_value)
    return grad * coefficient


@functools.cache
def fuses():
    """Whether ``tl.fma`` rounds once: always on a card, in newer versions of the interpreter."""
    param = torch.full((1,), -1.0, dtype=torch.bfloat16, device=DEVICE)
    rest = torch.zeros(1, dtype=torch.int16, device=DEVICE)
    factor = 1.0 + 2.0**-12
    grad = torch.full((1,), factor, device=DEVICE)
    kernels.lomo_step(param, grad, lr=-factor, rounding="compensated", compensation=rest)
    return read(param, rest).item() == factor * factor - 1.0


def multiply_add(x, y, z):
    """float32 ``x * y + z``, rounded once if the kernels do so; torch's own depends on the processor."""
    return (x.double() * y.double() + z.double()).float() if fuses() else x * y + z


def assert_same(got, expected):
    assert torch.equal(got.isnan(), expected.isnan())
    bits = [x.masked_fill(x.isnan(), 0).view(torch.int16).int() for x in (got, expected)]
    distance = (bits[0] - bits[1]).abs()
    assert distance.max() <= (1 if OFF_BY_ONE[DEVICE.type] else 0)
    assert distance.float().mean() <= OFF_BY_ONE[DEVICE.type]


def assert_same_pair(got, got_rest, expected, expected_rest):
    """Weight and compensation; where single bits of the sum may differ, the sum is compared, not its halves."""
    if got_rest is None or not OFF_BY_ONE[DEVICE.type]:
        assert_same(got, expected)
        assert got_rest is None or torch.equal(got_rest, expected_rest)
    else:
        torch.testing.assert_close(
            read(got, got_rest), read(expected, expected_rest), rtol=2.0**-18, atol=2.0**-24, equal_nan=True
        )


def with_specials(tensor):
    """The same tensor with NaN and infinities strewn in."""
    flat = tensor.view(-1)
    for index, value in enumerate((NAN, float("inf"), -float("inf"))):
        flat[index :: max(7, flat.numel() // 5)] = value
    return tensor


def float32_patterns(count=2**14):
    """Random bits as float32, NaN and subnormal numbers included, and values around each edge of the 16-bit numbers."""
    bits = torch.randint(-(2**31), 2**31, (count,), device=DEVICE).to(torch.int32).view(torch.float32)
    scales = torch.tensor([2.0**exponent for exponent in range(-27, 18)], device=DEVICE)
    moderate = (torch.randn(200, 1, device=DEVICE) * scales).view(-1)
    edges = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 65536.0, 3.3895e38, 3.4e38, 2.0**-14, 2.0**-24, 2.0**-25, 6.1e-5]
    odd_nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    edges = torch.cat([torch.tensor([*edges, NAN, float("inf")]), odd_nan]).to(DEVICE)
    return torch.cat([bits, moderate, edges, -edges])


@needs_kernels
@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # numpy's remark on numbers too large for float16
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_round_into(dtype, rounding):
    value = float32_patterns()
    got, expected = torch.empty_like(value, dtype=dtype), torch.empty_like(value, dtype=dtype)
    rests = [compensation_of(got.fill_(1.0)) if rounding == "compensated" else None for _ in range(2)]
    kept = value.clone()
    kernels.round_into(got, value, rounding=rounding, key=KEY, compensation=rests[0])
    write(expected, value, rounding, rests[1])
    assert torch.equal(got.isnan(), value.isnan())
    assert torch.equal(got.isnan(), expected.isnan())
    number = ~got.isnan()  # no arithmetic here, so nothing may differ on any device
    assert torch.equal(got[number].view(torch.int16), expected[number].view(torch.int16))
    assert torch.equal(value.view(torch.int32), kept.view(torch.int32))
    if rounding == "compensated":
        assert torch.equal(*rests)


@needs_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_representable_values_are_kept(dtype, rounding):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype)
    got = torch.zeros_like(every)
    rest = compensation_of(got) if rounding == "compensated" else None
    kernels.round_into(got, every.float(), rounding=rounding, key=KEY, compensation=rest)
    assert torch.equal(got.isnan(), every.isnan())
    assert torch.equal(got[~got.isnan()], every[~every.isnan()])
    assert rest is None or not rest.any()


@needs_kernels
def test_compensated_bfloat16_is_float32():
    value = torch.randn(1000, device=DEVICE)
    param = torch.empty_like(value, dtype=torch.bfloat16)
    rest = torch.empty_like(value, dtype=torch.int16)
    kernels.round_into(param, value, rounding="compensated", compensation=rest)
    assert torch.equal(read(param, rest), value)
    for _ in range(50):
        kernels.lomo_step(param, torch.ones_like(value), lr=1e-6, rounding="compensated", compensation=rest)
        value.sub_(torch.tensor(1e-6))
    torch.testing.assert_close(read(param, rest), value, rtol=0.0, atol=0.0)


@needs_kernels
@pytest.mark.parametrize("shape", [(), (1,), (1023,), (3, 5, 100), (37, 83)])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_lomo_step_of_odd_sizes(shape, dtype, rounding):
    check_lomo(shape, dtype, dtype, rounding)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"decay": 0.99}, {"inv_scale": 2.0**-8}, {"clip_value": 0.5}, "all"])
@pytest.mark.parametrize("coefficient", [1.0, 0.37, "tensor"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_lomo_step_with_options(options, coefficient, dtype, rounding):
    options = {"decay": 0.99, "inv_scale": 1.25, "clip_value": 0.5} if options == "all" else options
    coefficient = torch.tensor(0.37, device=DEVICE) if coefficient == "tensor" else coefficient
    check_lomo((1500,), dtype, dtype, rounding, coefficient=coefficient, **options)


@needs_kernels
@pytest.mark.parametrize("grad_dtype", [*SIXTEEN_BIT, torch.float32])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("specials", [False, True])
def test_lomo_step_of_other_gradients(grad_dtype, dtype, rounding, specials):
    check_lomo((1100,), dtype, grad_dtype, rounding, specials=specials, clip_value=1.0)


def check_lomo(shape, dtype, grad_dtype, rounding, *, specials=False, **options):
    param = torch.randn(shape, device=DEVICE).to(dtype)
    grad = torch.randn(shape, device=DEVICE).to(grad_dtype)
    if specials:
        with_specials(grad)
    rest = compensation_of(param) if rounding == "compensated" else None
    expected, expected_rest = param.clone(), None if rest is None else rest.clone()
    kept = grad.clone()
    kernels.lomo_step(param, grad, lr=0.03, rounding=rounding, key=KEY, compensation=rest, **options)

    value = read(expected, expected_rest).mul_(options.pop("decay", 1.0))
    defaults = {"inv_scale": 1.0, "clip_value": None, "coefficient": 1.0}
    prepared_grad = prepared(grad, **{**defaults, **options})
    value = multiply_add(prepared_grad, torch.tensor(-0.03, device=DEVICE), value)
    write(expected, value, rounding, expected_rest)
    assert_same_pair(param, rest, expected, expected_rest)
    assert torch.equal(grad.isnan(), kept.isnan()) and torch.equal(grad[~grad.isnan()], kept[~kept.isnan()])
    assert param.isnan().any() == specials


SHAPES = [(1, 1, 1), (1, 37, 53), (2, 3, 1030), (130, 3, 3), (7, 5, 1), (3, 1, 33), (2, 600, 2)]


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, (1500,), ()])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_adalomo_step_of_odd_sizes(shape, dtype, rounding):
    check_adalomo(shape, dtype, dtype, rounding)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 20, 35), (1100,)])
@pytest.mark.parametrize("options", [{"decay": 0.99}, {"inv_scale": 2.0**-8}, {"clip_value": 0.5}, "all"])
@pytest.mark.parametrize("coefficient", [0.37, "tensor"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_adalomo_step_with_options(shape, options, coefficient, rounding):
    options = {"decay": 0.99, "inv_scale": 1.25, "clip_value": 0.5} if options == "all" else options
    coefficient = torch.tensor(0.37, device=DEVICE) if coefficient == "tensor" else coefficient
    check_adalomo(shape, torch.bfloat16, torch.bfloat16, rounding, coefficient=coefficient, **options)


@needs_kernels
@pytest.mark.parametrize("grad_dtype", [*SIXTEEN_BIT, torch.float32])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("specials", [False, True])
def test_adalomo_step_of_other_gradients(grad_dtype, dtype, rounding, specials):
    check_adalomo((2, 20, 35), dtype, grad_dtype, rounding, specials=specials, clip_value=1.0)


def check_adalomo(shape, dtype, grad_dtype, rounding, *, specials=False, decay=None, **options):
    param = torch.randn(shape, device=DEVICE).to(dtype)
    grad = torch.randn(shape, device=DEVICE).to(grad_dtype)
    if specials:
        with_specials(grad)
    factored = len(shape) == 3
    row = torch.rand(shape[:2], device=DEVICE).add_(0.5) if factored else None
    col = torch.rand((shape[0], shape[2]) if factored else shape, device=DEVICE).add_(0.5)
    scale = torch.tensor(0.0123, device=DEVICE)
    decay = None if decay is None else torch.tensor(decay, device=DEVICE)
    rest = compensation_of(param) if rounding == "compensated" else None
    expected, expected_rest = param.clone(), None if rest is None else rest.clone()
    kernels.adalomo_step(param, grad, row, col, scale, decay, rounding=rounding, key=KEY, compensation=rest, **options)

    value = read(expected, expected_rest)
    if decay is not None:
        value.mul_(decay)
    defaults = {"inv_scale": 1.0, "clip_value": None, "coefficient": 1.0}
    update = prepared(grad, **{**defaults, **options})
    update = (update * row.unsqueeze(2)) * col.unsqueeze(1) if factored else update * col
    value.sub_(update * scale)
    write(expected, value, rounding, expected_rest)
    assert_same_pair(param, rest, expected, expected_rest)
    assert param.isnan().any() == specials


@needs_kernels
@pytest.mark.parametrize("coefficient", [NAN, "tensor"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_a_coefficient_of_nan_skips_the_step(coefficient, dtype):
    coefficient = torch.tensor(NAN, device=DEVICE) if coefficient == "tensor" else coefficient
    param = torch.randn(2, 20, 35, device=DEVICE).to(dtype)
    grad, rest = torch.randn_like(param), compensation_of(param)
    kept, kept_rest = param.clone(), rest.clone()
    options = {"coefficient": coefficient, "rounding": "compensated", "compensation": rest}
    kernels.lomo_step(param, grad, lr=0.1, decay=0.9, **options)
    row, col = torch.ones(2, 20, device=DEVICE), torch.ones(2, 35, device=DEVICE)
    kernels.adalomo_step(param, grad, row, col, torch.tensor(0.1, device=DEVICE), **options)
    assert torch.equal(param, kept) and torch.equal(rest, kept_rest)


@needs_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lomo_step_agrees_with_the_optimizer(dtype, rounding):
    weight = torch.nn.Parameter(torch.randn(70, 45, device=DEVICE).to(dtype))
    weight.grad = torch.randn_like(weight)
    fast = weight.detach().clone()
    lowtide.Lomo([weight], lr=0.1, weight_decay=0.01, rounding=rounding).step()
    kernels.lomo_step(fast, weight.grad, lr=0.1, decay=1.0 - 0.1 * 0.01, rounding=rounding, key=mix_key(0, 0, 1))
    # torch's multiply-add is fused on most processors, that of older versions of Triton's interpreter is not: where the
    # last float32 bits differ, about one element in 2^13 to 2^16 rounds the other way.
    differ = fast != weight.detach()
    assert differ.float().mean() <= 1e-3
    torch.testing.assert_close(fast, weight.detach(), rtol=torch.finfo(dtype).eps, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("shape", [(70, 45), (4, 6, 3, 3), (700,)])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_adalomo_step_agrees_with_the_optimizer(shape, dtype, rounding):
    lr, weight_decay = 0.05, 0.01
    weight = torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype))
    weight.grad = torch.randn_like(weight)
    fast, grad = weight.detach().clone(), weight.grad
    optimizer = lowtide.AdaLomo([weight], lr=lr, weight_decay=weight_decay, rounding=rounding)
    optimizer.step()
    state = optimizer.state[weight]
    if len(shape) >= 2:
        matrices = (-1, *shape[-2:])
        row = state["exp_avg_sq_row"].view(-1, shape[-2])
        row = (row / row.mean(dim=1, keepdim=True)).rsqrt()
        col = state["exp_avg_sq_col"].view(-1, shape[-1]).rsqrt()
        update = grad.float().view(matrices) * row.unsqueeze(2) * col.unsqueeze(1)
    else:
        matrices, row, col = shape, None, state["exp_avg_sq"].rsqrt()
        update = grad.float() * col
    scaled = lr * fast.float().square().mean().sqrt().clamp(min=1e-3)
    scale = scaled / update.square().mean().sqrt().clamp(min=1.0)
    decay = 1.0 - scaled * weight_decay
    options = {"rounding": rounding, "key": mix_key(0, 0, 1)}
    kernels.adalomo_step(fast.view(matrices), grad.view(matrices), row, col, scale, decay, **options)
    # The root mean squares are summed in another order here, so the last float32 bits differ.
    differ = fast != weight.detach()
    assert differ.float().mean() <= 5e-3
    torch.testing.assert_close(fast, weight.detach(), rtol=torch.finfo(dtype).eps, atol=1e-4)


@needs_kernels
def test_every_key_and_large_positions_give_the_noise_of_the_twin():
    from kernel_noise import noise_kernel

    for key in (0, 1, -1, 16, 2**31 - 1, -(2**31), KEY):
        for start in (0, 2**31 - 32, 2**32 - 32, 2**33 - 32, 2**34 + 1):
            position = torch.arange(start, start + 64, dtype=torch.int64, device=DEVICE)
            noise = torch.empty(64, dtype=torch.int16, device=DEVICE)
            noise_kernel[(1,)](position, noise, key, BLOCK=64)
            assert torch.equal(noise, noise16(64, key, start, DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device with 16 GiB of free memory")
def test_weights_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory on the CUDA device")
    numel, tail = 2**31 + 5001, 10_000
    param = torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.full_like(param, 0.5)
    kernels.lomo_step(param, grad, lr=1e-3, rounding="stochastic", key=KEY)
    expected = torch.ones(tail, dtype=torch.bfloat16, device=DEVICE)
    round_stochastic_(expected, torch.ones(tail, device=DEVICE).add_(0.5, alpha=-1e-3), KEY, numel - tail)
    assert torch.equal(param[-tail:], expected)
    assert param.unique().numel() == 2


def test_fits():
    param, grad = torch.zeros(6, 4, dtype=torch.bfloat16), torch.zeros(6, 4)
    assert kernels.fits(param, grad) and kernels.fits(torch.nn.Parameter(param.half()), grad.bfloat16())
    assert not kernels.fits(grad, grad)  # float32 weights need no rounding
    assert not kernels.fits(param, grad.double())
    assert not kernels.fits(param.t(), grad.t()) and not kernels.fits(param, grad.view(4, 6).t())
    assert not kernels.fits(param, grad[:3]) and not kernels.fits(param[:, :2], grad[:, :2])
    assert not kernels.fits(param, grad.to("meta"))


def test_availability(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not kernels.available(torch.device("cpu")) and not kernels.available(torch.device("mps"))
    assert kernels.available(torch.device("cuda")) <= torch.cuda.is_available()


@needs_kernels
def test_empty_weights_are_left_alone():
    param, grad = torch.zeros(0, 4, dtype=torch.bfloat16, device=DEVICE), torch.zeros(0, 4, device=DEVICE)
    kernels.lomo_step(param, grad, lr=0.1, rounding="nearest")
    kernels.round_into(param, grad, rounding="nearest")


def run_python(*arguments, **environment):
    environment = {name: value for name, value in {**os.environ, **environment}.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(lowtide.__file__).parents[1])
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_lowtide_does_not_import_triton():
    run_python("-c", "import sys; sys.modules['triton'] = None; import lowtide, lowtide.optim.kernels")
    code = "import sys, lowtide, lowtide.optim.kernels; print('triton' in sys.modules)"
    assert run_python("-c", code).strip() == "False"


@needs_kernels
def test_every_kernel_compiles_for_a_card_and_fuses_only_where_asked(tmp_path):
    script = Path(__file__).parents[1] / "compile_kernels.py"
    lines = run_python(str(script), TRITON_CACHE_DIR=str(tmp_path)).split("\n")[:-1]
    assert len(lines) == 3 * 2 * 3
    for line in lines:
        assert (int(line.split()[-1]) > 0) == line.startswith("lomo_kernel"), line


@needs_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", ["lomo", "adalomo", "adamw"])
@pytest.mark.parametrize("clipped", [False, True])
def test_rules_give_the_same_with_and_without_kernels(rule, rounding, dtype, clipped, monkeypatch):
    shapes = [(6, 5), (3, 4, 7), (9,), ()]
    ends = []
    for wanted in (kernels.fits, lambda param, grad: False):
        monkeypatch.setattr(kernels, "wanted", wanted)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
        options = {"lr": 0.05, "weight_decay": 0.1, "rounding": rounding}
        if rule == "adamw":
            optimizer = lowtide.PerParameter(torch.optim.AdamW, params, **options)
        else:
            optimizer = {"lomo": lowtide.Lomo, "adalomo": lowtide.AdaLomo}[rule](params, **options)
        prepare = Prepare(0.5, 0.4, torch.tensor(0.7, device=DEVICE)) if clipped else None
        for _ in range(3):
            for param in params:
                with torch.no_grad():
                    optimizer.update_param(param, torch.randn_like(param), optimizer.param_groups[0], prepare)
        ends.append((params, optimizer.state_dict()["state"]))
    (params, state), (expected, expected_state) = ends
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        spacing = torch.finfo(dtype).eps * other.float().abs().clamp(min=2**-6)
        off = (param.float() - other.float()).abs()
        # Moments are the same; a sum in another order may move a value that lies next to a border to the other side.
        assert (off <= spacing * 1.01).all() and (off > 0).float().mean() <= 0.05
        assert set(state[index]) == set(expected_state[index]) if index in expected_state else index not in state


@needs_kernels
@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
def test_a_broken_step_writes_nothing(rule, monkeypatch):
    """The engine hands on NaN as the coefficient once a gradient on the device was not finite."""
    monkeypatch.setattr(kernels, "wanted", kernels.fits)
    param = torch.nn.Parameter(torch.randn(6, 5, device=DEVICE).bfloat16())
    before = param.detach().clone()
    optimizer = rule([param], lr=0.1)
    prepare = Prepare(coefficient=torch.tensor(NAN, device=DEVICE))
    grad = torch.randn_like(param)
    grad[0, 0] = NAN
    with torch.no_grad():
        optimizer.update_param(param, grad, optimizer.param_groups[0], prepare)
    assert torch.equal(param, before)
