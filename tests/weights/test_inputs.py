"""Block inputs that wait in host memory: the same bits, buffers that are used again, copies that may land late."""

import gc

import pytest
import torch
from streaming import late_lane, train

import lowtide
import lowtide.fusing
from helpers import same_weights, tiny_model
from lowtide.weights import inputs, lanes

CHANGES = {"num_hidden_layers": 5, "attention_dropout": 0.1}


@pytest.fixture
def moving(monkeypatch):
    """Host memory as if it were another place than the CPU's."""
    monkeypatch.setattr(lowtide.fusing, "_copies_needed", lambda device: True)
    return monkeypatch


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.3, "micro_batch_size": 3}], ids=["plain", "clipped"])
def test_same_bits(options, late, moving):
    if late:
        moving.setattr(inputs, "make_lane", late_lane)
    results = []
    for where in ("device", "cpu"):
        torch.manual_seed(0)
        results.append(train("device", num_steps=4, changes=CHANGES, block_inputs=where, **options)[0])
    assert same_weights(*results)


@pytest.mark.parametrize("method", ["wait", "synchronize"])
def test_a_missing_wait_is_caught(method, moving):
    def slow_lane(device, name):
        lane = late_lane(device, name)
        lane.delay_s = 0.0005 if name == "inputs-in" else 0.005
        return lane

    moving.setattr(inputs, "make_lane", slow_lane)
    expected, _, _ = train("device", num_steps=2, changes={"num_hidden_layers": 5})
    moving.setattr(lanes.ThreadTransfer, method, lambda self: None)
    try:
        found, _, _ = train("device", num_steps=2, changes={"num_hidden_layers": 5}, block_inputs="cpu")
    except RuntimeError:  # the gradients were NaN
        return
    assert not same_weights(expected, found)


def test_buffers_are_used_again(moving):
    model = tiny_model()
    optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
    engine = lowtide.fuse(model, optimizer, block_inputs="cpu")
    seen = []
    for _ in range(4):
        ids = torch.randint(3, 97, (2, 6))
        engine.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        gc.collect()
        seen.append(engine._block_inputs.pool_bytes)
    assert seen[0] == 3 * 2 * 6 * 32 * 4 and len(set(seen)) == 1
    engine.remove()


def test_a_bad_place():
    model = tiny_model()
    with pytest.raises(ValueError, match="block_inputs must be device or cpu, got 'disk'"):
        lowtide.fuse(model, lowtide.Lomo(model.parameters()), block_inputs="disk")
