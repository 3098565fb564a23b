"""A recompute without its last product: the same gradients, bit for bit, and nothing left out that something needs."""

import gc
import threading

import pytest
import torch
from torch import nn

import lowtide
from helpers import FlopCount, tiny_batch, tiny_model
from lowtide.fused.last_product import LastProduct

LEFT_OUT = ["llama", "qwen3", "gpt_neox", "gpt2", "cohere", "granite"]
NEEDED = ["gemma2", "gemma3"]  # a norm follows the MLP
FAMILIES = [*LEFT_OUT, *NEEDED, "mixtral", "qwen3_moe"]


def trained(family, leaves_out, monkeypatch, steps=3, **options):
    dtype, dropout = options.pop("dtype", torch.float32), options.pop("dropout", 0.0)
    model = tiny_model(family, **options.pop("settings", {})).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    torch.manual_seed(0)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer, **options)
    with monkeypatch.context() as patch:
        if not leaves_out:
            patch.setattr(LastProduct, "_is_watched", lambda _: True)
        for _ in range(steps):
            engine.backward(model(**tiny_batch()).loss)
            optimizer.step()
    flops = [runner.last_product.flops for runner in engine._runners]
    return model.state_dict(), flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_bits(family, dtype, monkeypatch):
    got, flops = trained(family, True, monkeypatch, dtype=dtype)
    expected, none = trained(family, False, monkeypatch, dtype=dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not any(none)
    if family in LEFT_OUT:
        assert all(flops)
    if family in NEEDED:
        assert not any(flops)


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 1}, {"clip_grad_norm": 0.5}], ids=["micro-batches", "clipped"]
)
def test_weights_are_the_same_bits_in_every_pass(options, monkeypatch):
    got, flops = trained("llama", True, monkeypatch, **options)
    expected, _ = trained("llama", False, monkeypatch, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(flops)


def test_dropout_behind_it_draws_the_same_numbers(monkeypatch):
    got, _ = trained("gpt2", True, monkeypatch, dropout=0.3)
    expected, _ = trained("gpt2", False, monkeypatch, dropout=0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    without, _ = trained("gpt2", True, monkeypatch)
    assert not torch.equal(got["lm_head.weight"], without["lm_head.weight"])


class Block(nn.Module):
    """Two layers; ``tail`` is what follows the second."""

    def __init__(self, tail=lambda block, x: x):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.tail = tail

    def forward(self, x):
        return x + self.tail(self, self.second(self.first(x).relu()))


def gradients(block, product, x):
    x = x.clone().requires_grad_()
    out = product.run(lambda: block(x)) if product is not None else block(x)
    found = torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out), allow_unused=True)
    return [None if each is None else each.clone() for each in found]


@pytest.mark.parametrize(
    ("tail", "left_out"),
    [
        (lambda block, x: x, True),
        (lambda block, x: 2.0 * x.reshape(-1, 4).reshape(x.shape), True),
        (lambda block, x: block.norm(x), False),
        (lambda block, x: x * x, False),
        (lambda block, x: x.tanh(), False),
    ],
    ids=["sum", "scale", "norm", "square", "tanh"],
)
def test_what_follows_decides(tail, left_out):
    block = Block(tail)
    product, x = LastProduct(block), torch.randn(3, 4)
    expected = gradients(block, None, x)
    for number in range(4):
        torch.testing.assert_close(gradients(block, product, x), expected, rtol=0, atol=0)
        assert product.flops == (2 * 3 * 6 * 4 if left_out and number else 0)


def test_a_block_that_goes_another_way_later_is_run_again():
    counter = [0]

    def tail(block, x):
        counter[0] += 1
        return x * x if counter[0] > 2 else x

    block = Block(tail)
    product, x = LastProduct(block), torch.randn(3, 4)
    for _ in range(2):
        gradients(block, product, x)
    assert product.flops
    found = gradients(block, product, x)
    assert counter[0] == 4 and not product.flops
    torch.testing.assert_close(found, gradients(block, None, x), rtol=0, atol=0)


def test_a_layer_that_is_called_more_often_than_before_is_seen():
    times = [2]

    def tail(block, x):
        for _ in range(times[0] - 1):
            x = block.second(block.first(x).relu())
        return x

    block = Block(tail)
    product, x = LastProduct(block), torch.randn(3, 4)
    for _ in range(2):
        gradients(block, product, x)
    assert product.flops
    for count in (1, 3):
        times[0] = count
        torch.testing.assert_close(gradients(block, product, x), gradients(block, None, x), rtol=0, atol=0)


def test_hooks_of_others_see_real_values():
    block = Block()
    product, x, seen = LastProduct(block), torch.randn(3, 4), []
    for _ in range(2):
        gradients(block, product, x)
    handle = block.second.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    gradients(block, product, x)
    assert not product.flops
    torch.testing.assert_close(seen[0], block.second(block.first(x).relu()).detach())
    handle.remove()
    gradients(block, product, x)
    assert product.flops


def test_hooks_for_saved_tensors_inside_of_a_block_end_it():
    def offloaded(block, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
            return block.second(x).tanh()

    block = Block()
    block.forward = lambda x: x + offloaded(block, block.first(x).relu())
    product, x = LastProduct(block), torch.randn(3, 4)
    for _ in range(3):
        torch.testing.assert_close(gradients(block, product, x), gradients(block, None, x), rtol=0, atol=0)
        assert not product.flops


def test_layers_whose_forward_was_replaced_are_left_alone():
    block = Block()
    own = block.second.forward
    block.second.forward = lambda x: own(x).tanh()
    replaced = block.second.forward
    product, x = LastProduct(block), torch.randn(3, 4)
    for _ in range(3):
        torch.testing.assert_close(gradients(block, product, x), gradients(block, None, x), rtol=0, atol=0)
        assert not product.flops and block.second.forward is replaced


def test_an_error_comes_through_and_nothing_is_left_behind():
    block = Block()
    product = LastProduct(block)
    for _ in range(2):
        gradients(block, product, torch.randn(3, 4))
    assert product.flops
    with pytest.raises(RuntimeError, match="shapes"):
        gradients(block, product, torch.randn(3, 5))
    assert "forward" not in block.second.__dict__
    torch.testing.assert_close(
        gradients(block, product, torch.ones(3, 4)), gradients(block, None, torch.ones(3, 4)), rtol=0, atol=0
    )


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class Adapted(nn.Module):
    """A layer with a matrix of its own and one inside."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))
        self.base = nn.Linear(6, 4)

    def forward(self, x):
        return self.base(x) + (x @ self.down.t()) @ self.up.t()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.attention = nn.Linear(6, 4), nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = self.proj(x)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "layer", [lambda: Activated(6, 4), Adapted, Attention], ids=["activated", "adapted", "attention"]
)
def test_layers_that_do_more_than_one_product(layer):
    block = Block()
    block.second = layer()
    product, x = LastProduct(block), torch.randn(3, 4)
    expected = gradients(block, None, x)
    for _ in range(4):
        torch.testing.assert_close(gradients(block, product, x), expected, rtol=0, atol=0)


class Stashed(torch.autograd.Function):
    """Keeps what it is given without telling autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x + 0.0

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.x


def on_host(block, x):
    with torch.autograd.graph.save_on_cpu():
        return block.norm(x)


def observed(block, x):
    with torch.no_grad():
        block.seen = x.abs().amax()
    return x


def checked(block, x):
    assert x.abs().max() < 1e6
    return x


def masked(block, x):
    return x * (x > 0)


def differentiated(block, x):
    return x + torch.func.grad(lambda y: (y**2).sum())(block.first.weight).sum()


@pytest.mark.parametrize(
    "tail",
    [
        lambda block, x: Stashed.apply(x),
        on_host,
        observed,
        checked,
        masked,
        lambda block, x: x.relu(),
        lambda block, x: x.sigmoid(),
    ],
    ids=["own function", "on host", "observed", "checked", "masked", "relu", "sigmoid"],
)
def test_whatever_reads_it_gets_real_values(tail):
    block = Block(tail)
    product, x = LastProduct(block), torch.randn(3, 4)
    expected = gradients(block, None, x)
    seen = getattr(block, "seen", None)
    for _ in range(4):
        torch.testing.assert_close(gradients(block, product, x), expected, rtol=0, atol=0)
        assert not product.flops
        torch.testing.assert_close(getattr(block, "seen", None), seen, rtol=0, atol=0)


def test_functional_transforms_behind_it_still_run():
    block = Block(differentiated)
    product, x = LastProduct(block), torch.randn(3, 4)
    expected = gradients(block, None, x)
    for _ in range(3):
        torch.testing.assert_close(gradients(block, product, x), expected, rtol=0, atol=0)


def test_hooks_before_a_layer_see_real_values():
    block = Block(lambda block, x: block.drop(x))
    block.drop = nn.Dropout(0.0)
    product, x, seen = LastProduct(block), torch.randn(3, 4), []
    for _ in range(2):
        gradients(block, product, x)
    assert product.flops
    block.drop.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    gradients(block, product, x)
    torch.testing.assert_close(seen[0], block.second(block.first(x).relu()).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_every_implementation(family, implementation, monkeypatch):
    settings = {"experts_implementation": implementation}
    got, _ = trained(family, True, monkeypatch, settings=settings)
    expected, _ = trained(family, False, monkeypatch, settings=settings)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_nothing_stays_behind(family):
    model = tiny_model(family).train()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.01)
    engine = lowtide.fuse(model, optimizer)
    counts = []
    for _ in range(6):
        engine.backward(model(**tiny_batch()).loss)
        optimizer.step()
        counts.append(live_tensors())
    assert counts[2] == counts[3] == counts[4] == counts[5]


def test_another_thread_gets_real_values():
    block = Block()
    product, x, found = LastProduct(block), torch.randn(3, 4), []
    for _ in range(2):
        gradients(block, product, x)
    own = block.forward

    def forward(x):
        other = threading.Thread(target=lambda: found.append(block.second(block.first(x.detach()).relu())))
        other.start()
        other.join()
        return own(x)

    block.forward = forward
    gradients(block, product, x)
    assert product.flops
    torch.testing.assert_close(found[0], block.second(block.first(x).relu()), rtol=0, atol=0)


def test_compiled_layers_are_left_alone():
    block = Block()
    block.second = torch.compile(block.second, backend="eager")
    product = LastProduct(block)
    for _ in range(3):
        product.run(lambda: block(torch.randn(3, 4)))
        assert not product.flops


def test_a_step_has_one_product_less_in_every_block():
    """As many operations fewer as its down projections have."""
    counts = []
    model = tiny_model("llama").train()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.0)
    engine = lowtide.fuse(model, optimizer)
    for _ in range(3):
        with FlopCount() as counter:
            engine.backward(model(**tiny_batch()).loss)
        optimizer.step()
        counts.append(counter.total)
    tokens = tiny_batch()["input_ids"].numel()
    down = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    assert counts[0] - counts[1] == counts[0] - counts[2] == 2 * tokens * down
