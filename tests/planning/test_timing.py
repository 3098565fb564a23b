import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lowtide
from helpers import FlopCount, tiny_batch, tiny_config, tiny_model
from lowtide.models import find_blocks, loss
from lowtide.planning import Speeds, StepShape, head_loss, step_time
from lowtide.planning.speeds import NAMES
from lowtide.planning.timing import step_flops

GIVEN = dict.fromkeys(NAMES, "given")


def last_products(shape):
    """Parameters of the last layers of all blocks, where a recompute leaves their products out."""
    names = (".mlp.down_proj.weight", ".mlp.dense_4h_to_h.weight")
    return sum(param.numel() for name, param in shape.model.named_parameters() if name.endswith(names))


def homes_of(shape, home):
    return {unit.name: home for unit in shape.units}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_operations_are_those_of_a_forward_pass_four_times_but_for_what_is_not_made_again(family):
    config = tiny_config(family, use_cache=False, tie_word_embeddings=False)
    shape = StepShape(config, find_blocks=find_blocks, dtype=torch.float32, batch_size=2, seq_len=32)
    model = tiny_model(
        family, attn_implementation="eager", experts_implementation="eager", use_cache=False, tie_word_embeddings=False
    )
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 32, dtype=torch.int64))
    # eager attention takes the whole square, of which half is causal; and a mixture has a router, which is small
    attention = 3 * 2 * (2 * 32) * 32 * 32
    logits = shape.model.get_output_embeddings().weight.numel()
    again = 2 * 64 * (logits + last_products(shape))
    assert (step_flops(shape) + again) / 4 + attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_exact_clipping_costs_three_quarters_more(tiny_shape):
    untied = {"tie_word_embeddings": False}
    plain, exact = tiny_shape(changes=untied), tiny_shape(exact_clipping=True, changes=untied)
    tokens, logits = plain.batch_size * plain.seq_len, plain.model.get_output_embeddings().weight.numel()
    left = last_products(plain)
    assert left > 0
    # Logits are kept once, and the last products left out in both passes.
    whole = step_flops(plain) + 2 * tokens * (logits + left)
    assert step_flops(exact) + 2 * tokens * (logits + 2 * left) == 1.75 * whole


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rule", "optimizer"), [(lowtide.Lomo, "lomo"), (lowtide.AdaLomo, "adalomo")])
def test_operations_are_those_of_a_real_step(monkeypatch, rule, optimizer, tied, clip, kept):
    """The head is most of this model, so that a product with it more or less would show."""
    for module, name in ((loss, "_MAX_KEPT_BYTES"), (head_loss, "MAX_KEPT_BYTES")):
        monkeypatch.setattr(module, name, int(kept * 64 * 2000 * 4))
    for module, prefix in ((loss, "_"), (head_loss, "")):
        monkeypatch.setattr(module, f"{prefix}MAX_LOGITS", 2**14)
        monkeypatch.setattr(module, f"{prefix}MIN_SLICE", 250)
    changes = {"tie_word_embeddings": tied, "vocab_size": 2000, "attn_implementation": "eager", "use_cache": False}
    model = tiny_model(**changes)
    engine = lowtide.fuse(model, rule(model.parameters(), lr=1e-3), clip_grad_norm=clip)
    ids = torch.randint(3, 2000, (2, 32))
    engine.backward(model(input_ids=ids, labels=ids).loss)  # what can be left out is found in the first step
    engine.optimizers[0].step()
    with FlopCount() as counter:
        engine.backward(model(input_ids=ids, labels=ids).loss)
    engine.remove()
    shape = StepShape(
        tiny_config(tie_word_embeddings=tied, vocab_size=2000), find_blocks=find_blocks, dtype=torch.float32, batch_size=2, seq_len=32,
        optimizer=optimizer, exact_clipping=clip is not None,
    )  # fmt: skip
    attention = 3 * 2 * (2 * 32) * 32 * 32 * (7 if clip else 4)  # see above
    assert step_flops(shape) + attention == pytest.approx(counter.total, rel=0.04)  # 31 of 32 tokens count


def test_the_slowest_lane_decides(tiny_shape):
    shape = tiny_shape(device="cuda")
    for slow, bottleneck in (
        ("flops", "compute"),
        ("to_device", "PCIe"),
        ("disk_read", "disk"),
        ("disk_write", "disk"),
    ):
        values = {**dict.fromkeys(NAMES, 1e12), slow: 1e3}
        found = step_time(shape, homes_of(shape, "disk"), "device", Speeds(**values, sources=GIVEN))
        assert found.bottleneck == bottleneck
        lanes = {"compute": found.compute_s, "PCIe": found.bus_s, "disk": found.disk_s}
        assert found.step_s == max(lanes.values()) + found.exposed_s == lanes[bottleneck] + found.exposed_s


def test_updates_take_the_time_of_their_bytes(tiny_shape):
    shape = tiny_shape(device="cuda", dtype=torch.bfloat16, optimizer="lomo")
    speeds = Speeds(1e9, 1e9, 1e9, 1e9, 1e9, GIVEN, memory=1e6)
    found = step_time(shape, homes_of(shape, "device"), "device", speeds)
    # gradient and weight are read, the weight is written
    assert found.update_s == pytest.approx(3 * 2 * shape.num_parameters / 1e6)
    assert found.compute_s == pytest.approx(found.flops / 1e9 + found.update_s)
    clipped = tiny_shape(device="cuda", dtype=torch.bfloat16, optimizer="lomo", exact_clipping=True)
    assert step_time(clipped, homes_of(shape, "device"), "device", speeds).update_s == pytest.approx(
        found.update_s * 4 / 3
    )


def test_what_is_updated_while_weights_travel_needs_fewer_tokens(tiny_shape):
    shape = tiny_shape(device="cuda")
    without, counted = (
        step_time(shape, homes_of(shape, "host"), "device", Speeds(1e9, 1e6, 1e6, 1e6, 1e6, GIVEN, memory=memory))
        for memory in (None, 1e7)
    )
    assert without.update_s == 0
    assert 0 < counted.tokens_to_hide < without.tokens_to_hide


def test_nothing_moves_where_everything_is_on_the_device(tiny_shape):
    speeds = Speeds(1e9, 1e9, 1e9, 1e9, 1e9, GIVEN)
    shape = tiny_shape(device="cuda")
    found = step_time(shape, homes_of(shape, "device"), "device", speeds)
    assert (found.bus_s, found.disk_s, found.exposed_s, found.tokens_to_hide) == (0, 0, 0, 0)


def test_tokens_that_hide_the_transfers(tiny_shape):
    speeds = Speeds(1e9, 1e6, 1e6, 1e6, 1e6, GIVEN)
    shape = tiny_shape(device="cuda")
    tokens = step_time(shape, homes_of(shape, "host"), "device", speeds).tokens_to_hide
    for batch_size, hidden in ((tokens // 16, False), (tokens // 16 + 1, True)):
        other = shape.resized(batch_size=batch_size, seq_len=16)
        found = step_time(other, homes_of(shape, "host"), "device", speeds)
        assert (found.bottleneck == "compute") is hidden


def test_block_inputs_that_take_longer_than_their_computation_are_never_hidden(tiny_shape):
    speeds = Speeds(1e15, 1e6, 1e6, 1e6, 1e6, GIVEN)
    shape = tiny_shape(device="cuda")
    assert step_time(shape, homes_of(shape, "device"), "host", speeds).tokens_to_hide is None


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_and_writes_are_those_of_the_real_home(tmp_path, clip, tied):
    changes = {"num_hidden_layers": 8, "tie_word_embeddings": tied}
    model = tiny_model(**changes)
    shape = StepShape(
        tiny_config(**changes),
        find_blocks=find_blocks,
        dtype=torch.float32,
        batch_size=8,
        seq_len=10,
        exact_clipping=clip is not None,
    )
    optimizer = lowtide.Lomo(model.parameters(), lr=1e-3)
    engine = lowtide.fuse(model, optimizer, weights=str(tmp_path / "copy"), device="cpu", clip_grad_norm=clip)
    (home,) = engine.home.streamed
    counts = []
    for seed in range(4):
        engine.backward(model(**tiny_batch(seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
        home.synchronize()
        counts.append((home.store.bytes_read, home.store.bytes_written))
    engine.remove()
    read, written = (last - before for last, before in zip(counts[-1], counts[-2], strict=True))
    speeds = Speeds(1e9, 1e9, 1e9, 1e9, 1e9, GIVEN)
    found = step_time(shape, homes_of(shape, "disk"), "device", speeds)
    assert found.disk_write_bytes == pytest.approx(written, rel=0.1)  # blocks are rounded up to pages
    assert found.disk_read_bytes == pytest.approx(read, rel=0.15)
