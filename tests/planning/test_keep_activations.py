"""The planner keeps activations where there is room for them."""

import itertools

import pytest
import torch

from lowtide.planning import Limits, Speeds, make_plan
from lowtide.planning.speeds import NAMES
from lowtide.planning.timing import step_flops
from lowtide.planning.tracing import KEPT

HUGE = 10**15
SPEEDS = Speeds(1e12, 1e10, 1e10, 1e9, 1e9, dict.fromkeys(NAMES, "given"))
LAYERS = 6


@pytest.fixture(params=["cpu", "cuda"])
def shape(tiny_shape, request):
    changes = {"hidden_size": 64, "num_hidden_layers": LAYERS}
    return tiny_shape(changes=changes, device=request.param, batch_size=8, seq_len=64)


def used(shape, kept):
    return shape.keeping(kept).footprint().totals()["device"]


def plan(shape, memory, **options):
    return make_plan(shape, limits=Limits(memory, HUGE, HUGE), speeds=SPEEDS, **options)


def saved_by_autograd(shape, layers):
    """Bytes that a backward pass through so many layers finds, counted by autograd's own hooks on a real model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(shape.config, dtype=shape.dtype).train()
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hidden = torch.randn(shape.batch_size, shape.seq_len, shape.config.hidden_size, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(shape.seq_len)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in model.model.layers[:layers]:
            hidden = layer(hidden, position_embeddings=positions)
    return sum(num_bytes for num_bytes, _ in kept.values())


def test_a_layer_more_takes_what_autograd_saves_of_it(shape):
    live = []
    for kept in (2, 5):
        trace = shape.keeping(kept).step
        turn = [m for m in trace.moments if m.phase == "forward"][-1]
        live.append(sum(num_bytes for kind, num_bytes in turn.after.items() if kind != KEPT))
    expected = saved_by_autograd(shape, 5) - saved_by_autograd(shape, 2)
    assert live[1] - live[0] == pytest.approx(expected, rel=0.1)


def test_memory_grows_and_time_falls_with_every_layer(shape):
    bytes_of = [used(shape, kept) for kept in range(LAYERS + 1)]
    # With the last one nothing is computed again, which takes room of its own.
    assert bytes_of[:-1] == sorted(bytes_of[:-1]) and bytes_of[-1] > bytes_of[-3] > 1.5 * bytes_of[0]
    flops = [step_flops(shape.keeping(kept)) for kept in range(LAYERS + 1)]
    steps = {round(earlier - later) for earlier, later in itertools.pairwise(flops)}
    assert len(steps) == 1 and min(steps) > 0
    forward = (flops[0] - flops[-1]) / LAYERS
    shape.exact_clipping = True
    assert step_flops(shape) - step_flops(shape.keeping(1)) == pytest.approx(2 * forward)


def test_half_of_what_is_left_is_used(shape):
    assert plan(shape, HUGE).keep_activations == LAYERS
    for wanted in (1, 3):
        room = used(shape, 0) + 2 * (used(shape, wanted) - used(shape, 0))
        found = plan(shape, room)
        assert found.keep_activations == wanted
        assert found.footprint.totals()["device"] == used(shape, wanted)
        assert plan(shape, room - 2).keep_activations == wanted - 1
        assert found.time.step_s < plan(shape, room, keep_activations=0).time.step_s
    assert found.to_dict()["keep_activations"] == 3


def test_a_number_that_is_given_is_taken_or_refused(shape):
    exact = used(shape, 4)
    assert plan(shape, exact, keep_activations=4).keep_activations == 4
    with pytest.raises(MemoryError, match="no plan fits: with activations of 4 layers kept .* keep fewer"):
        plan(shape, exact - 1, keep_activations=4)
    with pytest.raises(ValueError, match="not on disk"):
        plan(shape, HUGE, keep_activations=4, weights="disk")
    assert plan(shape, HUGE, keep_activations=1000).keep_activations == LAYERS
    with pytest.raises(ValueError, match="keeps those of the whole batch"):
        plan(shape, HUGE, keep_activations=1, micro_batch_size=2)


def test_never_with_micro_batches_or_weights_elsewhere(shape):
    assert plan(shape, HUGE, micro_batch_size=2).keep_activations == 0
    assert plan(shape, HUGE, weights="disk").keep_activations == 0


def test_not_with_attention_dropout_on_a_cpu(tiny_shape):
    for device, expected in (("cpu", 0), ("cuda", 3)):
        found = tiny_shape(changes={"attention_dropout": 0.1}, device=device)
        assert plan(found, HUGE).keep_activations == expected


def test_not_where_16_bit_products_run_in_float32(tiny_shape, monkeypatch):
    from lowtide.planning import step_shape

    monkeypatch.setattr(step_shape, "computes_bfloat16", lambda: False)
    assert plan(tiny_shape(dtype=torch.bfloat16), HUGE).keep_activations == 0
    assert plan(tiny_shape(), HUGE).keep_activations == 3
