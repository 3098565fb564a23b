"""A model that is trained in evaluation mode, in which transformers loads it: blocks do nothing, and nobody would notice."""

import pytest
import torch

import lowtide
from helpers import Snapshot, same_weights, tiny_batch, tiny_model

WARNING = "the model is in evaluation mode"


def fused(model, **options):
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    return optimizer, lowtide.fuse(model, optimizer, **options)


def test_it_is_warned_of_once_and_the_result_is_right(caplog):
    model, plain = tiny_model().eval(), tiny_model().eval()
    optimizer, engine = fused(model, micro_batch_size=2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        engine.backward(model(**tiny_batch(step)).loss)
        optimizer.step()
        plain(**tiny_batch(step)).loss.backward()
        sgd.step()
        sgd.zero_grad()
    assert caplog.text.count(WARNING) == 1 and "call model.train()" in caplog.text
    assert same_weights(model, plain)


def test_training_mode_and_evaluation_between_steps_are_not_warned_of(caplog):
    model = tiny_model()
    optimizer, engine = fused(model)
    for step in range(2):
        loss = model(**tiny_batch(step)).loss
        model.eval()
        with torch.no_grad():
            model(**tiny_batch(9))
        engine.backward(loss)  # made in training mode, whatever the mode is now
        optimizer.step()
        model.train()
    assert WARNING not in caplog.text


def test_a_plain_backward_pass_is_warned_of_too(caplog):
    model = tiny_model().eval()
    optimizer, _ = fused(model)
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    assert caplog.text.count(WARNING) == 1


@pytest.mark.parametrize("plain", [False, True])
def test_with_weights_elsewhere_it_is_refused_before_anything_changes(tmp_path, plain):
    model = tiny_model()
    before = Snapshot(model)
    optimizer, engine = fused(model, weights=tmp_path / "w")
    model.eval()
    loss = model(**tiny_batch()).loss
    with pytest.raises(RuntimeError, match=r"computed in evaluation mode.*call model\.train\(\)"):
        (loss.backward if plain else lambda: engine.backward(loss))()
    model.train()
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    engine.remove()
    other = tiny_model()
    _, same = fused(other)
    same.backward(other(**tiny_batch()).loss)
    assert same_weights(model, other) and not same_weights(model, before)


def test_measuring_is_refused_too(tmp_path):
    model = tiny_model().eval()
    _, engine = fused(model, weights=tmp_path / "w", clip_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="computed in evaluation mode"):
        engine.measure_norm(model(**tiny_batch()).loss)
