"""Gradients of linear layers that are applied while they are made: the same weights as with gradients that are made first.

On any machine, with a stand-in for the product by tiles (``tests/optim/test_product.py`` has that itself), and with the product where there is AMX.
"""

import math

import pytest
import torch
from torch import nn

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.fused import linear
from lowtide.fused.slot import Slot
from lowtide.fused.turned import transposed_product
from lowtide.models import loss
from lowtide.optim import lost_updates
from lowtide.optim.kernels import native, product

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C compiler (cc, gcc or clang)")


class StandIn:
    """What :class:`product.TiledProduct` does, by torch."""

    def __init__(self, left, right):
        self.made, self.made_norm = transposed_product(left, right), math.nan

    @classmethod
    def of(cls, left, right, scratch):
        assert scratch(64).numel() == 64
        found = cls(left, right)
        return found if math.isfinite(found.norm()) else None

    def norm(self):
        self.made_norm = native.norm(self.made)
        return self.made_norm

    def into(self, out):
        out.copy_(self.made)
        return self.norm()

    def at(self, rows, cols):
        return self.made[rows, cols].float()

    def lomo_step(self, param, **options):
        native.lomo_step(param, self.made, **options)
        return self.norm()


@pytest.fixture(params=["stand-in", "tiles"], autouse=True)
def kind(request, monkeypatch):
    monkeypatch.setattr(linear, "_FEWEST", 1)
    monkeypatch.setattr(linear, "computes_16bit", lambda: True)
    monkeypatch.setattr(product, "_FEWEST", 1)
    if request.param == "stand-in":
        monkeypatch.setattr(linear, "TiledProduct", StandIn)
        monkeypatch.setattr(loss, "TiledProduct", StandIn)
    elif not product.allowed():
        pytest.skip("needs a processor with AMX")
    return request.param


class Taken:
    """Counts the gradients that were never seen; without ``apply`` they are all made first."""

    def __init__(self, monkeypatch):
        self.number, self.apply = 0, True
        original = Slot.take_product

        def counted(slot, product):
            found = self.apply and original(slot, product)
            self.number += found
            return found

        monkeypatch.setattr(Slot, "take_product", counted)


@pytest.fixture
def taken(monkeypatch):
    return Taken(monkeypatch)


def model_of(**changes):
    return tiny_model("llama", torch.bfloat16, hidden_size=64, intermediate_size=128, **changes)


def trained(rule=None, steps=3, batch=tiny_batch, tie_word_embeddings=True, **options):
    """(Weights, norms, share of lost updates, state of the optimizer)."""
    model = model_of(tie_word_embeddings=tie_word_embeddings)
    optimizer = (rule or (lambda params: lowtide.Lomo(params, lr=0.05)))(model.parameters())
    engine = lowtide.fuse(model, optimizer, **options)
    norms = []
    for step in range(steps):
        engine.backward(model(**batch(step)).loss)
        optimizer.step()
        norms.append(engine.grad_norm)
    engine.remove()
    share = optimizer.lost_updates.share() if hasattr(optimizer, "lost_updates") else None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, norms, share, optimizer.state_dict()["state"]


CASES = [
    ({}, {}, True),
    ({"weight_decay": 0.1, "rounding": "nearest"}, {}, True),
    ({"rounding": "compensated"}, {}, True),
    ({}, {"clip_grad_norm": 0.5}, True),
    ({}, {"clip_grad_norm": 0.5, "clip_memory_bytes": 2**30}, False),
    ({}, {"clip_grad_value": 0.01}, False),
    ({}, {"clip_grad_norm": 1.0, "clip": "adaptive", "clip_warmup_steps": 1}, True),  # in the warm-up
    ({}, {"micro_batch_size": 3}, False),
    ({}, {"micro_batch_size": 8}, True),
    ({}, {"loss_scale": 1024.0}, True),
]


@pytest.mark.parametrize(("rule", "options", "takes"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_the_same_bits_as_gradients_that_are_made_first(rule, options, takes, taken):
    def make(params):
        return lowtide.Lomo(params, lr=0.05, **rule)

    taken.apply = False
    expected, norms, share, states = trained(make, **options)
    taken.apply = True
    got, found, found_share, found_states = trained(make, **options)
    assert (taken.number > 0) == takes
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert found == pytest.approx(norms, rel=1e-5)
    assert found_share == share
    torch.testing.assert_close(found_states, states, rtol=0, atol=0)


def test_every_layer_of_a_block_is_taken(taken):
    trained(steps=1)
    assert taken.number == 21


def test_updates_that_leave_no_trace_are_still_counted(taken, monkeypatch):
    monkeypatch.setattr(lost_updates, "_ONE_IN", 1)  # every parameter
    shares = []
    for apply in (True, False):
        taken.apply = apply
        shares.append(trained(lambda params: lowtide.Lomo(params, lr=1e-3, rounding="nearest"))[2])
    assert shares[0] == shares[1] and 0.1 < shares[0] < 1
    assert taken.number


class Made:
    """Counts the head's slices that were never seen."""

    def __init__(self, monkeypatch):
        self.number, self.apply = 0, True
        original = loss._HeadGradient.unmade_parts

        def counted(gradient, all_rows, scratch):
            for rows, grad in original(gradient, all_rows, scratch):
                if isinstance(grad, torch.Tensor) or self.apply:
                    self.number += not isinstance(grad, torch.Tensor)
                    yield rows, grad
                    continue
                made = torch.empty(rows.stop - rows.start, gradient.weight.shape[1], dtype=torch.bfloat16)
                grad.into(made)
                yield rows, made

        monkeypatch.setattr(loss._HeadGradient, "unmade_parts", counted)


@pytest.mark.parametrize(
    ("options", "takes", "rounding", "slices"),
    [
        ({}, True, "stochastic", 1),
        ({}, True, "nearest", 3),
        ({}, True, "compensated", 3),
        ({"clip_grad_norm": 0.5}, True, "stochastic", 3),
        ({"clip_grad_value": 0.01}, False, "stochastic", 3),
        ({"loss_scale": 64.0}, True, "stochastic", 3),
    ],
    ids=str,
)
def test_slices_of_a_head(options, takes, rounding, slices, monkeypatch):
    made = Made(monkeypatch)
    monkeypatch.setattr(
        loss, "_slice_width", lambda num_tokens, weight: weight.shape[0] // (2 * slices) * 2 if slices == 1 else 32
    )
    found = []
    for made.apply in (True, False):
        found.append(
            trained(
                lambda params: lowtide.Lomo(params, lr=0.05, rounding=rounding, weight_decay=0.1),
                tie_word_embeddings=False,
                vocabulary_slices=True,
                **options,
            )
        )
    assert (made.number >= 3 * slices) == takes, made.number
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("name", ["adalomo", "adamw", "subclass", "slices", "object", "class"])
def test_rules_that_want_the_gradient_get_it(name, taken, monkeypatch):
    seen = []

    class SeesSlices(lowtide.Lomo):
        def update_slices(self, param, pieces, group):
            seen.extend(piece.grad.shape for piece in pieces)

    def sees(optimizer):
        original = optimizer.update_param
        optimizer.update_param = lambda *args: seen.append(args[1].shape) or original(*args)
        return optimizer

    if name == "class":
        original = lowtide.Lomo._update
        monkeypatch.setattr(
            lowtide.Lomo, "_update", lambda self, *args: seen.append(args[1].shape) or original(self, *args)
        )

    class Sees(lowtide.Lomo):
        def _update(self, param, grad, group, prepare):
            seen.append(grad.shape)
            super()._update(param, grad, group, prepare)

    rule = {
        "adalomo": lambda params: lowtide.AdaLomo(params, lr=0.01),
        "adamw": lambda params: lowtide.PerParameter(torch.optim.AdamW, params, lr=0.01),
        "subclass": lambda params: Sees(params, lr=0.01),
        "slices": lambda params: SeesSlices(params, lr=0.01),
        "object": lambda params: sees(lowtide.Lomo(params, lr=0.01)),
        "class": lambda params: lowtide.Lomo(params, lr=0.01),
    }[name]
    trained(rule, steps=1, tie_word_embeddings=False, vocabulary_slices=name == "slices")
    assert taken.number == 0
    assert name in ("adalomo", "adamw") or len(seen) >= (2 if name == "slices" else 21)


def test_weights_that_move_have_the_bits_of_those_that_stay(taken, tmp_path):
    expected = trained()[0]
    number = taken.number
    got = trained(weights=f"{tmp_path}/")[0]
    assert taken.number == 2 * number > 0
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x):
        return self.two(Broken.apply(self.one(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


def test_a_gradient_that_is_not_finite_is_not_applied(taken):
    model = Body().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer, blocks=[model.block])
    engine.backward(model(torch.ones(3, 5, 64, dtype=torch.bfloat16)).float().sum())
    optimizer.step()
    after = model.state_dict()
    assert taken.number == 1 and engine.step_partial
    assert torch.equal(after["block.one.weight"], before["block.one.weight"])
    assert not torch.equal(after["block.two.weight"], before["block.two.weight"])


def test_the_memory_is_given_back_after_the_pass():
    model = model_of()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer)
    engine.backward(model(**tiny_batch()).loss)
    assert engine.room._scratch is None and engine.room._room is None
    room = linear.GradientRoom()
    first = room.scratch(100)
    assert first.numel() == 100 and room.scratch(60).data_ptr() == first.data_ptr()
    assert room.scratch(200).numel() == 200
    room.release()
    assert room._scratch is None
