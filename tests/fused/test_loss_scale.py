"""Float16: the loss scale falls, grows back, and training in it ends where float32 does."""

import math
import pydoc_data.topics

import pytest
import torch

import lowtide
from helpers import Snapshot, same_weights, tiny_batch, tiny_model
from lowtide.fused import LossScale


def test_scale_falls_on_overflow_and_grows_back_within_bounds():
    scale = LossScale(2.0**4, growth_interval=3, smallest=2.0, largest=2.0**5)
    seen = []
    for overflow in (False, False, True, False, False, False, True, True, True, *[False] * 15):
        scale.update(overflow)
        seen.append(scale.scale)
    assert seen == [16, 16, 8, 8, 8, 16, 8, 4, 2, 2, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 32]
    again = LossScale(growth_interval=3)
    again.load_state_dict(scale.state_dict())
    assert (again.scale, again.num_good_steps) == (scale.scale, scale.num_good_steps)
    fixed = LossScale.fixed(512.0)
    fixed.update(True)
    assert fixed.scale == 512.0


@pytest.mark.parametrize(
    "bad", [{"initial": 0.5}, {"growth_factor": 0.9}, {"backoff_factor": 0.0}, {"growth_interval": 0}]
)
def test_bad_scales_are_refused(bad):
    with pytest.raises(ValueError):
        LossScale(**bad)


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_scaling_changes_nothing_where_nothing_overflows(clip_grad_norm, micro_batch_size):
    """Powers of two change no digit of a float32 gradient."""
    models, norms = [], []
    for loss_scale in (None, 2.0**10):
        model = tiny_model()
        optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
        options = {"clip_grad_norm": clip_grad_norm, "micro_batch_size": micro_batch_size, "clip_grad_value": 1e-2}
        engine = lowtide.fuse(model, optimizer, loss_scale=loss_scale, **options)
        for step in range(4):
            engine.backward(model(**tiny_batch(step)).loss)
            optimizer.step()
        models.append(model)
        norms.append(engine.grad_norm)
    assert same_weights(*models) and norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_small_gradients_survive_only_with_scaling():
    norms = {}
    for loss_scale in (1.0, "dynamic"):
        model = tiny_model(dtype=torch.float16)
        engine = lowtide.fuse(model, lowtide.Lomo(model.parameters()), loss_scale=loss_scale)
        engine.backward(model(**tiny_batch()).loss * 1e-6)
        norms[loss_scale] = engine.grad_norm
    exact = tiny_model()
    engine = lowtide.fuse(exact, lowtide.Lomo(exact.parameters()))
    engine.backward(exact(**tiny_batch()).loss * 1e-6)
    assert norms["dynamic"] == pytest.approx(engine.grad_norm, rel=0.02)
    assert norms[1.0] < 0.8 * engine.grad_norm


def test_overflow_with_exact_clipping_touches_no_weight():
    model = tiny_model(dtype=torch.float16)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer, clip_grad_norm=1.0, loss_scale=LossScale(2.0**24, largest=2.0**24))
    before = Snapshot(model)
    while engine.loss_scale.scale == 2.0**24 or engine.step_skipped:
        before_scale = engine.loss_scale.scale
        engine.backward(model(**tiny_batch()).loss * 64)
        optimizer.step()
        if engine.step_skipped:
            assert same_weights(before, model) and engine.loss_scale.scale == before_scale / 2
    assert engine.num_skipped_steps > 0 and not same_weights(before, model)


def test_overflow_without_two_passes_is_reported_as_a_partial_step():
    model = tiny_model(dtype=torch.float16)
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer)
    handle = model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.inf)
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    assert engine.step_partial and engine.loss_scale.scale == 2.0**15
    assert all(torch.isfinite(p).all() for p in model.parameters())
    handle.remove()
    engine.backward(model(**tiny_batch()).loss)
    assert not engine.step_partial and engine.loss_scale.scale == 2.0**15


def test_plain_backward_is_refused():
    model = tiny_model(dtype=torch.float16)
    lowtide.fuse(model, lowtide.Lomo(model.parameters()))
    with pytest.raises(RuntimeError, match=r"engine\.backward"):
        model(**tiny_batch()).loss.backward()


def test_float16_autocast_over_float32_weights_trains():
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.1)
    engine = lowtide.fuse(model, optimizer, loss_scale="dynamic")
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**tiny_batch()).loss
        engine.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and not engine.step_skipped


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3", "qwen3"])
def test_norms_softmax_and_loss_do_not_overflow_in_float16(family):
    """Hidden states of 300 have squares beyond float16; sums of 97 exponentials and the loss are float32."""
    model = tiny_model(family, dtype=torch.float16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(300 / model.get_input_embeddings().weight.abs().max())
    engine = lowtide.fuse(model, lowtide.Lomo(model.parameters()), clip_grad_norm=1.0)
    optimizer = engine.optimizers[0]
    for _ in range(16):  # a gradient may overflow by its scale, never by itself
        loss = model(**tiny_batch()).loss
        assert loss.dtype == torch.float32 and math.isfinite(loss.item())
        engine.backward(loss)
        optimizer.step()
        if not engine.step_skipped:
            break
    assert math.isfinite(engine.grad_norm) and engine.grad_norm > 0


def text_batches(num_steps, batch_size=4, seq_len=32):
    """Bytes of the Python language reference, which ships with every CPython."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(len(data) - seq_len, (batch_size,), generator=generator)
        ids = torch.stack([data[start : start + seq_len] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def train_on_text(dtype, clip_grad_norm, num_steps=200):
    """Mean loss of the last 20 of 200 steps, and the loss scales; in float16 five steps overflow in one layer."""
    model = tiny_model(dtype=dtype, vocab_size=256)
    optimizer = lowtide.AdaLomo(model.parameters(), lr=3e-2)
    loss_scale = LossScale(growth_interval=20) if dtype == torch.float16 else None
    engine = lowtide.fuse(model, optimizer, clip_grad_norm=clip_grad_norm, loss_scale=loss_scale)
    overflow = {"now": False}
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * math.inf if overflow["now"] else grad)
    losses, scales, events = [], [], {"skipped": 0, "partial": 0}
    for step, batch in enumerate(text_batches(num_steps)):
        overflow["now"] = dtype == torch.float16 and step in (30, 31, 60, 90, 91)
        before = Snapshot(model)
        loss = model(**batch).loss
        engine.backward(loss)
        optimizer.step()
        if engine.step_skipped:
            assert same_weights(before, model)
        events["skipped"] += engine.step_skipped
        events["partial"] += engine.step_partial
        losses.append(loss.item())
        scales.append(engine.loss_scale.scale if engine.loss_scale else 1.0)
    return sum(losses[-20:]) / 20, losses[0], scales, events


@pytest.mark.slow
@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_float16_with_overflows_ends_where_float32_does(clip_grad_norm):
    exact, start, _, _ = train_on_text(torch.float32, clip_grad_norm)
    half, _, scales, events = train_on_text(torch.float16, clip_grad_norm)
    assert exact < 0.6 * start
    assert half == pytest.approx(exact, rel=0.02)
    assert events["skipped" if clip_grad_norm else "partial"] >= 5
    assert scales[31] < scales[29] and scales[91] < scales[89]  # fell
    assert scales[59] > scales[31] and scales[-1] > scales[91]  # and grew back
