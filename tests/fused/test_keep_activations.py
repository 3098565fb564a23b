"""Blocks whose activations are kept instead of being computed again: the same bits, and half the forward passes."""

import pytest
import torch
from torch import nn

import lowtide
from helpers import dropout_model, same_weights, tiny_batch, tiny_model

OPTIONS = {
    "plain": {},
    "exact": {"clip_grad_norm": 0.01},
    "exact, all gradients kept": {"clip_grad_norm": 0.01, "clip_memory_bytes": 10**9},
    "value": {"clip_grad_value": 1e-3},
    "adaptive": {"clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 1},
    "scaled": {"loss_scale": 64.0},
    "whole gradients": {"vocabulary_slices": False},
}


def trained(model, kept, rule=lowtide.Lomo, steps=3, **options):
    """The model after some steps, and what the engine says of the last gradient."""
    optimizer = rule(model.parameters(), lr=0.05 if rule is lowtide.Lomo else 1e-2)
    engine = lowtide.fuse(model, optimizer, keep_activations=kept, **options)
    for step in range(steps):
        torch.manual_seed(step)
        engine.backward(model(**tiny_batch(step)).loss)
        optimizer.step()
    return model, engine.grad_norm


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rule", [lowtide.Lomo, lowtide.AdaLomo])
@pytest.mark.parametrize("kept", [1, 3])
def test_the_same_bits(kept, rule, options):
    expected, norm = trained(tiny_model(), 0, rule, **options)
    found, found_norm = trained(tiny_model(), kept, rule, **options)
    assert same_weights(found, expected)
    assert found_norm == norm
    assert not same_weights(found, tiny_model())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox", "mixtral"])
def test_the_same_bits_in_other_models_and_in_bfloat16(family):
    expected, _ = trained(tiny_model(family, torch.bfloat16), 0)
    assert same_weights(trained(tiny_model(family, torch.bfloat16), 2)[0], expected)


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}], ids=["plain", "exact"])
def test_the_same_random_numbers_in_dropout(options):
    expected, _ = trained(dropout_model(), 0, **options)
    assert same_weights(trained(dropout_model(), 2, **options)[0], expected)


@pytest.mark.parametrize("kept", [0, 1, 3, 1000])
def test_kept_blocks_run_once(kept):
    model = tiny_model()
    runs = [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        original = layer.mlp.forward

        def counted(*args, number=number, original=original, **kwargs):
            runs[number] += 1
            return original(*args, **kwargs)

        layer.mlp.forward = counted
    trained(model, kept, steps=1)
    assert runs == [2 if number < 3 - kept else 1 for number in range(3)]


def test_a_loss_from_before_the_step_is_refused_and_changes_nothing_below():
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer, keep_activations=2)
    stale = model(**tiny_batch(0)).loss
    engine.backward(model(**tiny_batch(1)).loss)
    optimizer.step()
    before = {name: value.clone() for name, value in model.model.layers[:2].state_dict().items()}
    with pytest.raises(RuntimeError):
        engine.backward(stale)
    for name, value in model.model.layers[:2].state_dict().items():
        assert torch.equal(value, before[name])


class Stack(nn.Module):
    """No blocks that anybody would find."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).square().mean()


def test_what_cannot_be_is_refused(tmp_path):
    def fuse(model, **options):
        lowtide.fuse(model, lowtide.Lomo(model.parameters(), lr=0.1), **options)

    with pytest.raises(ValueError, match="at least 0, got -1"):
        fuse(tiny_model(), keep_activations=-1)
    with pytest.raises(ValueError, match="none were found in this model"):
        fuse(Stack(), keep_activations=1)
    with pytest.raises(ValueError, match=r"whole batch.*leave one of them out"):
        fuse(tiny_model(), keep_activations=1, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"weights that live elsewhere.*leave it out"):
        fuse(tiny_model(), keep_activations=1, weights=tmp_path / "weights")
