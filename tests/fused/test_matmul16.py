"""16-bit products in float32 slices: the numbers of a product rounded once, and used inside blocks where they are faster."""

import pytest
import torch
from torch.nn import functional

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.fused import matmul16


@pytest.fixture
def slow_processor(monkeypatch):
    """A processor without instructions for bfloat16."""
    monkeypatch.setattr(matmul16, "computes_16bit", lambda: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 64, 300), (300, 64, 5), (7, 64, 7), (0, 4, 3), (3, 0, 4)])
def test_a_product_is_rounded_once(dtype, rows, inner, columns, monkeypatch):
    monkeypatch.setattr(matmul16, "SLICE_NUMEL", 1000)  # several slices
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).t()
    expected = (a.double() @ b.double()).to(dtype)
    found = matmul16.matmul(a, b)
    assert found.dtype == dtype
    # Float32 sums differ from exact ones where these are near the middle between two 16-bit numbers, so hardly anywhere.
    different = (found != expected).float().mean() if found.numel() else torch.zeros(())
    assert different < 0.01
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    wide = matmul16.matmul(a.float(), b.float())
    assert wide.dtype == torch.float32 and torch.equal(wide, a.float() @ b.float())


def test_forward_and_backward_of_a_layer(slow_processor):
    """Closer to float32 than a plain bfloat16 layer, or as close."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 80), torch.randn(2, 50, 96)
    narrow, y = torch.nn.Linear(96, 80).bfloat16(), x.bfloat16().requires_grad_()
    narrow.load_state_dict(layer.state_dict())
    layer.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    x = y.detach().float().requires_grad_()
    layer(x).square().sum().backward()
    with matmul16.fast_matmuls(narrow.weight):
        narrow(y).square().sum().backward()
    for exact, found in (
        (x.grad, y.grad),
        (layer.weight.grad, narrow.weight.grad),
        (layer.bias.grad, narrow.bias.grad),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, rtol=3e-2, atol=3e-2 * exact.abs().max().item())


@pytest.mark.parametrize("masked", [True, False])
def test_attention(slow_processor, masked):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 16, 8).bfloat16() for _ in range(3)]
    options = {"attn_mask": torch.randn(2, 1, 16, 16).bfloat16()} if masked else {"is_causal": True}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        mask = {k: v.to(dtype) if masked else v for k, v in options.items()}
        with matmul16.fast_matmuls(leaves[0]):
            out = functional.scaled_dot_product_attention(*leaves, **mask)
            out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for exact, found in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, rtol=3e-2, atol=3e-2 * exact.abs().max().item())


def test_only_where_it_is_faster(slow_processor, monkeypatch):
    narrow, wide = torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2)
    kinds = [
        type(matmul16.fast_matmuls(each)).__name__ for each in (narrow, narrow.half(), wide, narrow.to("meta"), None)
    ]
    assert kinds == ["_Float32Products", "_Float32Products", "nullcontext", "nullcontext", "nullcontext"]
    monkeypatch.setattr(matmul16, "computes_16bit", lambda: True)
    assert type(matmul16.fast_matmuls(narrow)).__name__ == "nullcontext"


@pytest.mark.parametrize(("family", "biased"), [("llama", False), ("gpt2", True), ("qwen3_moe", False)])
def test_a_fused_model_uses_them_and_trains_alike(family, biased, monkeypatch):
    """All products of blocks and loss, forward and backward, go the other way; the weights end within bfloat16's precision."""
    results, calls = [], []
    original = matmul16.matmul
    monkeypatch.setattr(matmul16, "matmul", lambda a, b: calls.append(a.shape) or original(a, b))
    for fast in (False, True):
        monkeypatch.setattr(matmul16, "computes_16bit", lambda fast=fast: not fast)
        model = tiny_model(family, torch.bfloat16)
        optimizer = lowtide.Lomo(model.parameters(), lr=0.05, rounding="nearest")
        engine = lowtide.fuse(model, optimizer, micro_batch_size=4)
        for step in range(3):
            engine.backward(model(**tiny_batch(step)).loss)
            optimizer.step()
        engine.remove()
        results.append(torch.cat([param.detach().float().flatten() for param in model.parameters()]))
        assert bool(calls) == fast
    assert len(calls) > 3 * 3 * 4 * 3, "layers, products of each, passes"
    assert (results[0] - results[1]).norm() < 3e-3 * results[0].norm()
