"""Gradients of linear layers in one place in memory: the same weights as with autograd's own, and left alone where they cannot be."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.fused import linear, turned
from lowtide.fused.slot import Slot
from lowtide.optim import FusibleOptimizer
from lowtide.optim.kernels import native

FAMILIES = ["llama", "qwen3", "gpt_neox", "gemma2", "mixtral", "qwen3_moe"]


@pytest.fixture(autouse=True)
def tiny_weights_too(monkeypatch):
    monkeypatch.setattr(linear, "_FEWEST", 1)
    monkeypatch.setattr(linear, "computes_16bit", lambda: True)
    # Products of turned factors are rounded otherwise in the last bit.
    monkeypatch.setattr(turned, "multiplies_tiles", lambda: False)


class Taken:
    """Counts the gradients that came from the room."""

    def __init__(self, monkeypatch):
        self.number = 0
        original = Slot.take_borrowed

        def counted(slot, grad):
            self.number += 1
            original(slot, grad)

        monkeypatch.setattr(Slot, "take_borrowed", counted)


def trained(model, in_place, rule="lomo", steps=3, batches=None, **options):
    optimizer = {
        "lomo": lambda: lowtide.Lomo(model.parameters(), lr=0.05),
        "adalomo": lambda: lowtide.AdaLomo(model.parameters(), lr=0.01),
        "adamw": lambda: lowtide.PerParameter(torch.optim.AdamW, model.parameters(), lr=0.01),
    }[rule]()
    engine = lowtide.fuse(model, optimizer, **options)
    norms = []
    with patch.object(linear, "_is_plain", linear._is_plain if in_place else lambda *_: False):
        for step in range(steps):
            engine.backward(model(**(batches[step] if batches else tiny_batch(step))).loss)
            optimizer.step()
            norms.append(engine.grad_norm)
    engine.remove()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, norms


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_bits(family, monkeypatch):
    taken = Taken(monkeypatch)
    expected, norms = trained(tiny_model(family, torch.bfloat16), False)
    assert taken.number == 0
    got, found = trained(tiny_model(family, torch.bfloat16), True)
    assert taken.number >= 3 * 3 * (2 if "mo" in family else 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert found == norms


@pytest.mark.parametrize(
    ("rule", "options", "takes"),
    [
        ("lomo", {"micro_batch_size": 3}, True),
        ("lomo", {"clip_grad_norm": 0.5}, True),
        ("lomo", {"clip_grad_norm": 0.5, "clip_memory_bytes": 2**30}, False),
        ("lomo", {"clip_grad_value": 0.01}, True),
        ("lomo", {"clip_grad_norm": 1.0, "clip": "adaptive", "clip_warmup_steps": 1}, True),
        ("adalomo", {}, True),
        ("adalomo", {"clip_grad_norm": 0.5, "micro_batch_size": 5}, True),
        ("adamw", {}, False),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_every_kind_of_pass_has_the_same_bits(rule, options, takes, monkeypatch):
    taken = Taken(monkeypatch)
    expected, norms = trained(tiny_model("llama", torch.bfloat16), False, rule, **options)
    got, found = trained(tiny_model("llama", torch.bfloat16), True, rule, **options)
    assert bool(taken.number) == takes
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert found == norms


def test_autocast_to_the_dtype_of_the_weights(monkeypatch):
    taken = Taken(monkeypatch)
    found = []
    for in_place in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(trained(tiny_model("llama", torch.bfloat16), in_place))
    assert taken.number
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    taken.number = 0
    with torch.autocast("cpu", torch.bfloat16):  # weights are converted at every use
        trained(tiny_model("llama", torch.float32), True)
    assert taken.number == 0


class Body(nn.Module):
    """A model of one block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


class Stop(torch.autograd.Function):
    """Passes values on, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return None


class Block(nn.Module):
    """Two layers; ``kind`` says what is odd about them."""

    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.one, self.two = (nn.Linear(8, 8, bias=bias, dtype=torch.bfloat16) for bias in (True, False))
        self.fixed = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x):
        if self.kind == "twice":
            return self.two(self.one(self.one(x).tanh()).tanh())
        if self.kind == "elsewhere":
            return self.two(self.one(x).tanh()) + self.one.weight.sum(0)
        if self.kind == "in place":
            return self.two(self.one(x).mul_(0.5).add_(1.0)).mul_(0.5)
        if self.kind == "broken":
            hidden = self.one(x).tanh()
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: grad * float("inf"))
            return self.two(hidden)
        if self.kind == "gradient inside":
            out = self.two(self.one(x).tanh())
            if torch.is_grad_enabled():
                z = x.detach().requires_grad_()
                aside = self.one(z).tanh().sum()
                out.register_hook(lambda grad: grad + torch.autograd.grad(aside, z)[0].mean())
            return out
        if self.kind == "differentiated twice":
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                energy = self.two(self.one(z).tanh()).sum()
                return torch.autograd.grad(energy, z, create_graph=torch.is_grad_enabled())[0] + x
        if self.kind == "stopped":
            return self.two(x) + Stop.apply(self.one(x))
        if self.kind == "checkpoint":
            return self.two(checkpoint(lambda y: self.one(y).tanh(), x, use_reentrant=False))
        if self.kind == "two dimensions":
            return self.two(self.one(x.flatten(0, 1)).tanh()).view(x.shape)
        if self.kind == "not contiguous":
            return self.two(self.one(x.transpose(0, 1)).tanh().transpose(0, 1))
        if self.kind == "not all":
            return self.fixed(self.one(x).tanh())
        if self.kind == "keywords":
            return functional.linear(functional.linear(x, weight=self.one.weight, bias=self.one.bias), self.two.weight)
        return self.two(self.one(x).tanh())


def step_of(model, blocks, lr=0.5, **options):
    """Weights after one step of Lomo without rounding at random."""
    optimizer = lowtide.Lomo([p for p in model.parameters() if p.requires_grad], lr=lr, rounding="nearest")
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    if blocks is None:
        model(x).float().square().sum().backward()
        optimizer.step()
    else:
        engine = lowtide.fuse(model, optimizer, blocks=blocks, **options)
        engine.backward(model(x).float().square().sum())
        optimizer.step()
        engine.remove()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("plain", 2), ("twice", 1), ("elsewhere", 1), ("in place", 2), ("checkpoint", 1), ("two dimensions", 2),
        ("not contiguous", 2), ("not all", 1), ("keywords", 1), ("gradient inside", 2), ("differentiated twice", 0), ("stopped", 1),
    ],
)  # fmt: skip
def test_odd_blocks(kind, number, monkeypatch):
    taken = Taken(monkeypatch)
    model = Body(Block(kind)).train()
    expected = step_of(copy.deepcopy(model), None)
    got = step_of(model, [model.block])
    assert taken.number == number
    reordered = kind == "not contiguous"  # the bias' gradient is summed in another order
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-6 if reordered else 0)


def test_hooks_of_the_user_see_and_change_the_gradient(monkeypatch):
    taken = Taken(monkeypatch)
    models = [Body(Block()).train() for _ in range(2)]
    for model in models:
        model.block.one.weight.register_hook(lambda grad: grad * 0.5)
    seen = []
    models[1].block.two.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
    expected = step_of(models[0], None)
    got = step_of(models[1], [models[1].block])
    assert taken.number == 0 and len(seen) == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_somebody_who_keeps_what_autograd_saves_gets_what_torch_saves(monkeypatch):
    taken = Taken(monkeypatch)
    shapes = []

    class Watched(Block):
        def forward(self, x):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
                return super().forward(x)

    model = Body(Watched()).train()
    step_of(model, [model.block])
    assert taken.number == 0 and shapes


def test_a_gradient_that_is_not_finite_is_not_applied(monkeypatch):
    taken = Taken(monkeypatch)
    model = Body(Block("broken")).train()
    before = copy.deepcopy(model.block)
    optimizer = lowtide.Lomo([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = lowtide.fuse(model, optimizer, blocks=[model.block])
    engine.backward(model(torch.ones(3, 5, 8, dtype=torch.bfloat16)).float().sum())
    optimizer.step()
    assert taken.number == 2 and engine.step_partial
    assert torch.equal(model.block.one.weight, before.one.weight) and torch.equal(model.block.one.bias, before.one.bias)
    assert not torch.equal(model.block.two.weight, before.two.weight)


def test_the_room_is_gone_after_the_pass_and_shared_by_the_blocks(monkeypatch):
    rooms = []
    original = linear.GradientRoom.of
    monkeypatch.setattr(
        linear.GradientRoom, "of", lambda self, weight: rooms.append(original(self, weight).data_ptr()) or original(self, weight)
    )  # fmt: skip
    model = tiny_model("llama", torch.bfloat16)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer)
    engine.backward(model(**tiny_batch()).loss)
    assert len(rooms) == 21 and len(set(rooms)) == 1  # the largest weight of a block comes first
    assert engine.room._room is None
    optimizer.step()


def test_the_room_is_gone_after_an_error_and_fits_the_block(monkeypatch):
    model = Body(Block()).train()
    optimizer = lowtide.Lomo([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = lowtide.fuse(model, optimizer, blocks=[model.block])
    monkeypatch.setattr(Slot, "take_borrowed", lambda slot, grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(model(torch.ones(3, 5, 8, dtype=torch.bfloat16)).float().sum())
    assert engine.room._room is not None
    optimizer.step()
    assert engine.room._room is None
    room = linear.GradientRoom()
    assert room.of(torch.empty(4, 5)).shape == (4, 5)
    room.fit(20)
    assert room._room is not None
    room.fit(19)
    assert room._room is None


def test_products_by_tiles_end_to_end(monkeypatch):
    taken = Taken(monkeypatch)
    expected, norms = trained(tiny_model("llama", torch.bfloat16), False, steps=1)
    monkeypatch.setattr(turned, "multiplies_tiles", lambda: True)
    monkeypatch.setattr(turned, "_FEWEST", 1)
    got, found = trained(tiny_model("llama", torch.bfloat16), True, steps=1)
    assert taken.number == 21
    assert found == pytest.approx(norms, rel=1e-3)
    differing = sum((got[name] != expected[name]).sum().item() for name in got)
    assert differing < 0.01 * sum(tensor.numel() for tensor in got.values())
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)


def test_a_rule_of_somebody_else_may_keep_gradients(monkeypatch):
    class Keeps(lowtide.Lomo):
        may_keep_gradients = FusibleOptimizer.may_keep_gradients

        def _update(self, param, grad, group, prepare):
            self.kept = [*getattr(self, "kept", ()), (grad, grad.clone())]
            super()._update(param, grad, group, prepare)

    taken = Taken(monkeypatch)
    model = tiny_model("llama", torch.bfloat16)
    optimizer = Keeps(model.parameters(), lr=0.05)
    lowtide.fuse(model, optimizer).backward(model(**tiny_batch()).loss)
    assert taken.number == 0 and len(optimizer.kept) >= 21
    assert all(torch.equal(grad, copied) for grad, copied in optimizer.kept)


def test_small_weights_and_other_dtypes_are_autograds(monkeypatch):
    taken = Taken(monkeypatch)
    model = tiny_model("llama")
    trained(model, True)
    assert taken.number == 0
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    assert not any(isinstance(runner.linear_layers.taken(), linear._Mode) for runner in engine._runners)
    monkeypatch.setattr(linear, "_FEWEST", 2**16)
    trained(tiny_model("llama", torch.bfloat16), True)
    assert taken.number == 0


def test_weights_that_move_have_the_bits_of_those_that_stay(monkeypatch, tmp_path):
    taken = Taken(monkeypatch)
    expected, _ = trained(tiny_model("llama", torch.bfloat16), True)
    number = taken.number
    got, _ = trained(tiny_model("llama", torch.bfloat16), True, weights=f"{tmp_path}/")
    assert taken.number == 2 * number > 0
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (32, 32), (64, 96), (65, 33), (31, 100), (1000, 257)])
def test_transposes(shape):
    if not native.available():
        pytest.skip("needs a C compiler (cc, gcc or clang)")
    whole = torch.randn(shape[0], shape[1] + 40).bfloat16()
    for matrix in (whole, whole[:, 7 : 7 + shape[1]], whole[::2]):
        found = native.transposed(matrix)
        assert found.is_contiguous() and torch.equal(found, matrix.t())


@pytest.mark.parametrize("compiled", [True, False])
def test_products_of_turned_factors(compiled, monkeypatch):
    monkeypatch.setattr(turned, "multiplies_tiles", lambda: True)
    monkeypatch.setattr(turned, "_FEWEST", 1)
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    left, right = torch.randn(300, 130).bfloat16(), torch.randn(300, 70).bfloat16()
    exact = left.double().t() @ right.double()
    found, room = turned.transposed_product(left, right), torch.empty(130, 70, dtype=torch.bfloat16)
    # Half a unit in the last place of bfloat16, and as much for sums in float32.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)
    assert turned.transposed_product(left, right, out=room) is room and torch.equal(room, found)
    # What it is not for goes the usual way.
    narrow = left.float()
    assert torch.equal(turned.transposed_product(narrow, right.float()), narrow.t() @ right.float())
