"""The memory of one step, moment by moment: what is counted is what is there, and looking on changes nothing."""

import signal
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.fused import linear
from lowtide.optim import sliced
from lowtide.training import read_events, train
from lowtide.training import run as run_module
from lowtide.training.memory_trace import (
    GRADIENTS,
    KEPT,
    STATE,
    WEIGHTS,
    MemoryTrace,
    state_bytes,
    thinned,
    weight_bytes,
)
from streaming_cpu import stream_on_cpu

WIDTH, ROWS = 64, 8
BLOCK_BYTES = 4 * (WIDTH * WIDTH + WIDTH)  # of one layer's weight and bias, float32
INPUT_BYTES = 4 * ROWS * WIDTH


class Tower(nn.Module):
    """Layers that are blocks, and nothing else."""

    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def trace_of(rule=lowtide.Lomo, num_steps=2, depth=4, **options):
    """(trace of the last step, model) of a tower."""
    model = Tower(depth)
    optimizer = rule(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, blocks=["layers"], **options)
    trace = MemoryTrace(engine, [optimizer], "cpu")
    for number in range(num_steps):
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        if number < num_steps - 1:
            engine.backward(model(x).square().mean())
        else:
            with trace():
                engine.backward(model(x).square().mean())
        optimizer.step()
    engine.remove()
    return trace, model


def column(trace, kind):
    """(where, bytes of that kind) of every moment."""
    index = (WEIGHTS, STATE, GRADIENTS, KEPT).index(kind)
    return [(where, counted[index]) for _, where, _, counted in trace.moments]


def most(trace, kind, where):
    """The most bytes of a kind while that was going on."""
    return max(value for name, value in column(trace, kind) if name == where)


def test_the_paper_s_claim_one_gradient_at_a_time():
    trace, model = trace_of()
    assert trace.most[WEIGHTS] == sum(param.nbytes for param in model.parameters())
    assert trace.most[GRADIENTS] == model.layers[0].weight.nbytes
    assert trace.most[STATE] == 0
    assert column(trace, GRADIENTS)[0][1] == column(trace, GRADIENTS)[-1][1] == 0


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_gradients_that_do_not_come_from_autograd(micro_batch_size, monkeypatch):
    monkeypatch.setattr(linear, "computes_16bit", lambda: True)
    traces = []
    for fewest in (1, 2**30):  # elements
        monkeypatch.setattr(linear, "_FEWEST", fewest)
        model = tiny_model(dtype=torch.bfloat16)
        optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
        engine = lowtide.fuse(model, optimizer, micro_batch_size=micro_batch_size)
        trace = MemoryTrace(engine, [optimizer], "cpu")
        used = []
        monkeypatch.setattr(linear.GradientRoom, "of", _noting(linear.GradientRoom.of, used))
        with trace():
            engine.backward(model(**tiny_batch()).loss)
        assert bool(used) == (fewest == 1) and engine.room.observer is None
        engine.remove()
        traces.append(trace)
    assert traces[0].most == traces[1].most
    order = [dict.fromkeys(where for where, _ in column(trace, GRADIENTS)) for trace in traces]
    assert list(order[0]) == list(order[1])


def _noting(original, used):
    def of(room, weight):
        used.append(weight)
        return original(room, weight)

    return of


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("slices", [None, False])
@pytest.mark.parametrize("clip_grad_norm", [None, 1e-3])
def test_the_vocabulary_matrix(tied, clip_grad_norm, slices, monkeypatch):
    """Its gradient comes in slices, also where it is tied; whole ones are two if it is, as autograd holds the head's part."""
    model = tiny_model("llama", vocab_size=2000, tie_word_embeddings=tied)
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    monkeypatch.setattr(sliced, "MAX_SLICE_NUMEL", 2**14)
    engine = lowtide.fuse(model, optimizer, clip_grad_norm=clip_grad_norm, vocabulary_slices=slices)
    matrix = model.get_output_embeddings().weight.nbytes
    with MemoryTrace(engine, [optimizer], "cpu")() as trace:
        engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    engine.remove()
    block = model.model.layers[1].mlp.up_proj.weight.nbytes  # the largest there
    rows = matrix * tiny_batch()["input_ids"].unique().numel() // 2000  # of the batch's tokens, for which more comes
    waits = (matrix if slices is False else rows) if tied else 0
    assert most(trace, GRADIENTS, "backward, model.layers.1") == block + waits
    if slices is False:
        assert trace.most[GRADIENTS] == (2 * matrix if tied else matrix)
    else:
        one_slice = 2**14 // 32 * 32 * 4
        assert one_slice + waits == trace.most[GRADIENTS] < matrix / 3
    assert column(trace, GRADIENTS)[-1] == ("after the step", 0)


def test_a_block_s_gradients_with_micro_batches():
    trace, model = trace_of(micro_batch_size=3)
    # The sums of the whole block, and the part of the last micro-batch that is about to be added to one of them.
    assert BLOCK_BYTES < trace.most[GRADIENTS] <= BLOCK_BYTES + model.layers[0].weight.nbytes


def test_state_of_the_optimizer():
    trace, model = trace_of(lambda params, lr: lowtide.PerParameter(torch.optim.AdamW, params, lr=lr))
    moments = 2 * sum(param.nbytes for param in model.parameters())
    assert moments <= trace.most[STATE] <= moments + 64 * len(list(model.parameters()))  # and the number of the step


def test_inputs_are_kept_block_by_block_and_freed_on_the_way_back():
    trace, _ = trace_of()
    for number in range(4):
        assert most(trace, KEPT, f"forward, layers.{number}") == (number + 1) * INPUT_BYTES
        assert most(trace, KEPT, f"backward, layers.{number}") == (number + 1) * INPUT_BYTES
    assert column(trace, KEPT)[-1] == ("after the step", 0)


def test_inputs_that_blocks_share_are_counted_once():
    model = tiny_model("qwen3")
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer)
    batch = tiny_batch(batch_size=4, seq_len=40)
    hidden, mask = 4 * 40 * 32 * 4, 4 * 40 * 40 * 4
    with MemoryTrace(engine, [optimizer], "cpu")() as trace:
        engine.backward(model(**batch).loss)
    optimizer.step()
    engine.remove()
    # Three layers; of what is the same for all, the mask (float32 or bool) is the largest.
    assert 3 * hidden < trace.most[KEPT] < 3 * hidden + 1.5 * mask


def test_both_passes_of_exact_clipping_are_told_apart():
    trace, _ = trace_of(clip_grad_norm=1e-3)
    for number in range(4):
        assert most(trace, KEPT, f"norm of the gradients, layers.{number}") == 4 * INPUT_BYTES  # walked again
        assert most(trace, KEPT, f"backward, layers.{number}") == (number + 1) * INPUT_BYTES
    assert trace.most[GRADIENTS] == 4 * WIDTH * WIDTH


def test_gradients_that_clipping_keeps():
    trace, model = trace_of(clip_grad_norm=1e-3, clip_memory_bytes=2**30)
    assert trace.most[GRADIENTS] == sum(param.nbytes for param in model.parameters())
    # There is no second pass, so the inputs go with the first.
    assert most(trace, KEPT, "norm of the gradients, layers.0") == INPUT_BYTES
    assert column(trace, GRADIENTS)[-1][1] == 0


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_of_weights_that_live_elsewhere_only_those_on_the_device_count(home, tmp_path, monkeypatch):
    stream_on_cpu(monkeypatch)
    model = tiny_model("qwen3", num_hidden_layers=12, tie_word_embeddings=False)
    whole = sum(param.nbytes for param in model.parameters())
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, weights="cpu" if home == "cpu" else str(tmp_path / "copy"), device="cpu")
    with MemoryTrace(engine, [optimizer], "cpu")() as trace:
        engine.backward(model(**tiny_batch()).loss)
    optimizer.step()
    pools = sum(slot.num_bytes for streamed in engine.home.streamed for slot in streamed._slots)
    resident = sum(param.untyped_storage().nbytes() for param in model.parameters())
    engine.remove()
    assert pools <= trace.most[WEIGHTS] <= pools + resident < whole


def test_moments_are_in_order_and_of_this_process():
    trace, _ = trace_of()
    times = [moment[0] for moment in trace.moments]
    assert times == sorted(times)
    assert min(moment[2] for moment in trace.moments) > 2**20
    assert trace.moments[0][1] == "before the step" and trace.moments[-1][1] == "after the step"


def test_of_sharded_tensors_the_part_of_this_process_counts():
    """A stand-in for DTensor, which has its part in this attribute and says the bytes of the whole."""
    whole = nn.Parameter(torch.zeros(64))
    whole._local_tensor = torch.zeros(16)
    optimizer = torch.optim.SGD([whole], lr=1.0)
    optimizer.state[whole] = {"exp_avg": whole}
    home = type("Home", (), {"streamed": ()})()
    engine = type("Engine", (), {"home": home})()
    assert weight_bytes([whole], engine) == state_bytes([optimizer]) == 64


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = Tower()
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, blocks=["layers"])
    trace = MemoryTrace(engine, [optimizer], "cpu")
    with pytest.raises(KeyError), trace():
        raise KeyError("made up")
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)
    num_moments = len(trace.moments)
    before = model.layers[0].weight.detach().clone()
    engine.backward(model(torch.randn(ROWS, WIDTH)).square().mean())
    optimizer.step()
    assert len(trace.moments) == num_moments and not torch.equal(before, model.layers[0].weight)
    engine.remove()
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_thinning_keeps_what_matters():
    moments = [(float(i), "", 1000 + i % 7, (0, 0, i % 5, 0)) for i in range(10_000)]
    moments[1234] = (1234.0, "full", 9999, (0, 0, 0, 0))
    moments[4321] = (4321.0, "gradients", 1, (0, 0, 99, 0))
    kept = thinned(moments, 300)
    assert len(kept) <= 300 and kept == sorted(kept)
    assert {moments[0], moments[1234], moments[4321], moments[-1]} <= set(kept)
    assert thinned(moments[:300], 300) == moments[:300]


# In a run ------------------------------------------------------------------------------------------------------------


def run(config, stop_after=None):
    def interrupt(event):
        if event["event"] == "train" and event["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    return train(config, on_event=interrupt, show_progress=False)


def traced(result):
    return read_events(result.output / "metrics.jsonl", "memory")


def test_the_second_step_of_a_run_is_followed(make_config):
    (event,) = traced(run(make_config()))
    assert event["step"] == 2 and event["num_tokens"] > 0
    columns = [event["seconds"], event["where"], event["total_bytes"], *event["bytes"].values()]
    assert 4 < len(columns[0]) <= 300 and {len(each) for each in columns} == {len(columns[0])}
    assert list(event["bytes"]) == list(event["most_bytes"]) == [WEIGHTS, STATE, GRADIENTS, KEPT]
    assert all(event["most_bytes"][kind] >= max(values) for kind, values in event["bytes"].items())
    assert event["most_bytes"][STATE] > 0


def test_a_run_of_one_step(make_config):
    assert [event["step"] for event in traced(run(make_config(max_steps=1)))] == [1]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_resumed_run_is_followed_once(make_config, stop_after):
    run(make_config(), stop_after)
    assert [event["step"] for event in traced(run(make_config(resume="latest")))] == [2]


@pytest.mark.parametrize("changes", [{}, {"clip_grad_norm": 0.5, "micro_batch_size": 3}, {"dtype": "bfloat16"}])
def test_looking_on_changes_nothing(make_config, tmp_path, monkeypatch, changes):
    found = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(run_module.Run, "memory_of_step", lambda self: nullcontext())
        result = run(make_config(output=str(tmp_path / name), **changes))
        losses = [event["loss"] for event in read_events(result.output / "metrics.jsonl", "train")]
        files = {path.name: path.read_bytes() for path in result.model_dir.glob("*.safetensors")}
        found.append((losses, files, len(traced(result))))
    assert found[0][:2] == found[1][:2] and [each[2] for each in found] == [1, 0]


def test_only_adapters_have_gradients(make_config):
    (event,) = traced(run(make_config(lora_rank=2, lora_only=True, lr=None, lora_lr=1e-2)))
    assert 0 < event["most_bytes"][GRADIENTS] <= 2 * 64 * 4  # rank x the widest layer x float32
